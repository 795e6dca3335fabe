"""Build the book: run the chapters, stage a copy, render it with Jupyter Book, check what came out.

    python -m book.build [--profile quick] [--force]

Everything lands in ``build/book``: ``notebooks/`` (executed chapters), ``fresh/`` (their numbers) and
``html/``. Every warning is an error. The site is rebuilt from nothing unless all its inputs and the site
itself are unchanged since a build that passed; so what failed once fails again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
from filelock import FileLock

from book import check, inventories
from book._ext.roles import locate
from book.notebooks import PARTIAL, BookError, Executed, chapters, digest, execute
from book.paths import ROOT
from reproductions.harness.files import write_atomic

STAGED = ("*.md", "*.yml", "*.bib", "api/*.md", "chapters/*.md", "_static/**/*")
INPUTS = ("kdrefs/**/*", "reproductions/**/*", "pyproject.toml", "CITATION.cff")


@dataclass(frozen=True)
class Book:
    """One book: its sources, where it is built, and the columns that its chapters belong to."""

    source: Path = ROOT / "book"
    output: Path = ROOT / "build" / "book"
    columns: Path = ROOT / "reproductions"
    profile: str = "quick"

    @property
    def html(self) -> Path:
        """Folder of the finished site."""
        return self.output / "html"

    @property
    def replaced(self) -> Path:
        """Where the former site stands while the new one takes its place."""
        return self.output / "html.replaced"


def input_digest(book: Book, executed: list[Executed]) -> str:
    """Return the digest of all that the site is made from, libraries included."""
    parts = [
        digest(book.source.rglob("*"), book.source),
        digest(book.columns.rglob("*"), book.columns),
        digest((file for pattern in INPUTS for file in ROOT.glob(pattern)), ROOT),
        *(nbformat.writes(chapter.notebook) for chapter in executed),
        *(digest(chapter.fresh.glob("*"), chapter.fresh) for chapter in executed),
        *sorted(f"{one.name} {one.version}" for one in metadata.distributions()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def empty(folder: Path) -> Path:
    """Return ``folder``, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish_notebooks(book: Book, executed: list[Executed]) -> None:
    """Put the executed notebooks and their numbers where the pages, the tests and readers find them."""
    notebooks, fresh = empty(book.output / "notebooks"), empty(book.output / "fresh")
    for chapter in executed:
        nbformat.write(chapter.notebook, notebooks / f"{chapter.name}.ipynb")
        shutil.copytree(chapter.fresh, fresh, dirs_exist_ok=True)


def api_pages(root: Path) -> dict[str, str]:
    """Return a page, name to Markdown, for every public module of the library and of the protocols, for every column's
    run, and for what else of a column the chapters link to.
    """
    files = [*root.glob("kdrefs/**/*.py"), *root.glob("reproductions/protocols/*.py")]
    files += root.glob("reproductions/*/run.py")
    for chapter in root.glob("book/chapters/*.md"):
        named = re.findall(r"\{source\}`(reproductions[\w.]+)`", chapter.read_text(encoding="utf8"))
        files += {locate(name, root)[0] for name in named}
    pages = {}
    for file in files:
        *folders, stem = file.relative_to(root).with_suffix("").parts
        is_package = stem == "__init__"
        if any(part.startswith("_") for part in [*folders, *([] if is_package else [stem])]):
            continue
        name = ".".join(folders if is_package else [*folders, stem])
        # What a module merely re-exports is documented where it is defined.
        directive = f".. automodule:: {name}\n   :ignore-module-all:"
        pages[name] = f"# {name}\n\n```{{eval-rst}}\n{directive}\n```\n"
    return pages


def stage(book: Book) -> Path:
    """Return a copy of the book's sources in which executed notebooks stand for the chapters."""
    staged = empty(book.output / "source")
    for file in (file for pattern in STAGED for file in book.source.glob(pattern)):
        if file.is_file():
            target = staged / file.relative_to(book.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for file in sorted((book.output / "notebooks").glob("*.ipynb")):
        shutil.copy(file, staged / "chapters")
        (staged / "chapters" / f"{file.stem}.md").unlink()
    if (staged / "api").is_dir():
        for name, text in api_pages(ROOT).items():
            (staged / "api" / f"{name}.md").write_text(text, encoding="utf8")
    inventories.write_all(ROOT / "book" / "inventories.toml", staged / "_inv")
    return staged


def render(book: Book, staged: Path) -> Path:
    """Run Jupyter Book over the staged sources, warnings as errors; return the folder of pages."""
    site = empty(book.output / "site")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(staged)]
    command += ["--path-output", str(site), "-W", "-n", "--keep-going", "--all", "-q"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "KDREFS_FRESH": str(book.output / "fresh"),
        "KDREFS_COLUMNS": str(book.columns),
    }
    # What it prints on success is where the pages lie before they are checked; warnings come on the other stream.
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
        raise BookError("Jupyter Book reported warnings or errors (above)")
    return site / "_build" / "html"


def build(book: Book, *, force: bool = False) -> bool:
    """Build ``book``; return False where the finished site was up to date already.

    Args:
        book: What to build.
        force: Render even if nothing has changed.

    Raises:
        BookError: A chapter fails, a page warns, or the site has a defect.
        OSError: Something cannot be written; the finished site is as it was.
    """
    book.output.mkdir(parents=True, exist_ok=True)
    with FileLock(book.output / ".lock"):
        tidy(book)
        return _build(book, force)


def tidy(book: Book) -> None:
    """Remove what a killed build left, and put the old site back if it died between taking it away and the new one."""
    if book.replaced.is_dir() and not book.html.exists():
        book.replaced.replace(book.html)
    shutil.rmtree(book.replaced, ignore_errors=True)
    for left in (book.output / "cache").glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def publish(book: Book, site: Path) -> None:
    """Put a new site into the place of the old one; nobody finds one that is half there."""
    if book.html.exists():
        book.html.replace(book.replaced)
    site.replace(book.html)
    shutil.rmtree(book.replaced, ignore_errors=True)


def up_to_date(book: Book, stamp: Path, inputs: str) -> bool:
    """Return whether the finished site is there as a build from the same inputs left it."""
    try:
        seen = json.loads(stamp.read_text(encoding="utf8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(seen == {"inputs": inputs, "html": digest(book.html.rglob("*"), book.html)})


def _build(book: Book, force: bool) -> bool:
    stamp = book.output / "stamp.json"
    executed = []
    for path in chapters(book.source):
        executed.append(
            execute(path, cache=book.output / "cache", columns=book.columns, profile=book.profile)
        )
        print(f"chapter {path.stem}: {'executed' if executed[-1].ran else 'from cache'}", flush=True)
    inputs = input_digest(book, executed)
    if not force and up_to_date(book, stamp, inputs):
        return False
    stamp.unlink(missing_ok=True)
    publish_notebooks(book, executed)
    site = render(book, stage(book))
    if defects := check.check_site(site):
        raise BookError("\n".join([f"{len(defects)} defects in the built site", *map(str, defects)]))
    publish(book, site)
    write_atomic(stamp, json.dumps({"inputs": inputs, "html": digest(book.html.rglob("*"), book.html)}))
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m book.build", description="Build the book.")
    parser.add_argument("--profile", default="quick", help="profile that the chapters are run with")
    parser.add_argument("--force", action="store_true", help="render even if nothing has changed")
    options = parser.parse_args(arguments)
    book = Book(profile=options.profile)
    try:
        built = build(book, force=options.force)
    except (BookError, OSError) as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    page = book.html / "index.html"
    print(f"{'built' if built else 'up to date'}: {os.path.relpath(page)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
