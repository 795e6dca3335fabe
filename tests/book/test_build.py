"""What re-runs a chapter and what does not, and that a broken book fails to build every time."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from book import notebooks
from book.build import Book, api_pages, build, main
from book.inventories import inventory
from book.notebooks import BookError, cache_key, clean_outputs, convert, imported_modules, merge
from book.paths import ROOT
from tests.book.minibook import CELLS, HEADER, make_book, make_fake, write_chapter


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    return tmp_path / "columns"


@pytest.fixture
def fake(columns: Path) -> Path:
    return columns / make_fake(columns)


def key(folder: Path, fake: Path, text: str = "", cells: str = CELLS, profile: str = "quick") -> str:
    # The parsed sources are kept within a process; a build is one process.
    from reproductions.harness import source

    source._parse.cache_clear()
    source.source_digest.cache_clear()
    chapter = write_chapter(folder / "chapter.md", text, cells)
    return cache_key(convert(chapter), profile=profile, column=fake)


def test_prose_captions_and_tags_keep_the_key(tmp_path: Path, fake: Path) -> None:
    before = key(tmp_path, fake)
    assert key(tmp_path, fake, text="Other *words*, and $x$.") == before
    tagged = CELLS.replace("python\n6 * 7", "python\n:tags: [hide-input]\n6 * 7")
    assert tagged != CELLS
    assert key(tmp_path, fake, cells=tagged) == before


def test_code_profile_and_data_files_change_the_key(tmp_path: Path, fake: Path) -> None:
    keys = [key(tmp_path, fake), key(tmp_path, fake, cells=CELLS.replace("6 * 7", "6 * 8"))]
    keys.append(key(tmp_path, fake, profile="standard"))
    (fake / "ledger.json").write_text("{}")
    keys.append(key(tmp_path, fake))
    assert len(set(keys)) == len(keys)


def test_code_of_the_column_changes_the_key_its_docstring_does_not(tmp_path: Path, fake: Path) -> None:
    before, run = key(tmp_path, fake), fake / "run.py"
    text = run.read_text()
    run.write_text(text.replace('"""A column that costs nothing', '"""A column that costs little'))
    assert run.read_text() != text
    assert key(tmp_path, fake) == before
    run.write_text(text.replace('"method": 55.0', '"method": 56.0'))
    assert key(tmp_path, fake) != before


def test_library_and_style_change_the_key(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(tmp_path, fake)
    monkeypatch.setattr(notebooks, "library_versions", lambda: {"torch": "0"})
    other = key(tmp_path, fake)
    monkeypatch.undo()
    (tmp_path / "style").mkdir()
    monkeypatch.setattr(notebooks, "STYLE", tmp_path / "style")
    assert len({before, other, key(tmp_path, fake)}) == 3


def test_versions_are_those_of_the_run_time_dependencies() -> None:
    assert {"torch", "numpy", "scikit-learn", "matplotlib", "ipykernel", "python"} <= set(
        notebooks.library_versions()
    )
    assert "ruff" not in notebooks.library_versions()


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("%matplotlib inline\nimport kdrefs.metrics, torch", ["kdrefs.metrics"]),
        ("from kdrefs.methods import pkt", ["kdrefs.methods.pkt"]),
        ("from kdrefs.methods.pkt import pkt_loss", ["kdrefs.methods.pkt"]),
        ("from numpy import array", []),
    ],
)
def test_imports_of_our_own_are_found(tmp_path: Path, code: str, modules: list[str]) -> None:
    chapter = write_chapter(tmp_path / "chapter.md", cells=f"```{{code-cell}} python\n{code}\n```\n")
    assert imported_modules(convert(chapter)) == modules


def test_a_package_stands_for_all_its_modules(tmp_path: Path) -> None:
    cell = "```{code-cell} python\nfrom kdrefs import pkt_loss\n```\n"
    found = imported_modules(convert(write_chapter(tmp_path / "chapter.md", cells=cell)))
    assert {"kdrefs", "kdrefs.methods.pkt", "kdrefs.nets.small", "kdrefs.nets"} <= set(found)


@pytest.mark.parametrize(
    ("header", "message"), [("", "no jupytext header"), (HEADER.split("kernelspec")[0] + "---\n", "kernel")]
)
def test_incomplete_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    chapter = tmp_path / "chapter.md"
    chapter.write_text(f"{header}\n# Chapter\n\n{CELLS}")
    with pytest.raises(BookError, match=message):
        convert(chapter)


def executed(tmp_path: Path) -> nbformat.NotebookNode:
    notebook = copy.deepcopy(convert(write_chapter(tmp_path / "old.md")))
    for number, cell in enumerate(notebooks.code_cells(notebook), 1):
        cell.execution_count = number
    return notebook


def test_outputs_are_merged_into_new_prose(tmp_path: Path) -> None:
    old = executed(tmp_path)
    old.cells[-1].outputs = [nbformat.v4.new_output("stream", text="42")]
    injected = nbformat.v4.new_code_cell("profile = 'x'", metadata={"tags": ["injected-parameters"]})
    old.cells.insert(2, injected)
    new = merge(convert(write_chapter(tmp_path / "new.md", text="New prose.")), old)
    assert "New prose." in new.cells[0].source
    assert new.cells[-1].outputs[0].text == "42"
    assert [cell.source for cell in new.cells if cell.cell_type == "code"][1] == "profile = 'x'"


def test_outputs_are_cleaned(tmp_path: Path) -> None:
    notebook = executed(tmp_path)
    cell = notebook.cells[-1]
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text=name) for name in ("stderr", "stdout")]
    clean_outputs(notebook, "chapter")
    assert [output.name for output in cell.outputs] == ["stdout"]
    cell.outputs[0].text = f"saved in {ROOT}/build"
    with pytest.raises(BookError, match="machine path"):
        clean_outputs(notebook, "chapter")
    cell.outputs, cell.execution_count = [], None
    with pytest.raises(BookError, match="was not executed: 6"):
        clean_outputs(notebook, "chapter")


def test_every_public_module_has_a_page() -> None:
    pages = api_pages(ROOT)
    assert {"kdrefs", "kdrefs.methods.pkt", "kdrefs.data.batches", "reproductions.pkt.run"} <= set(pages)
    assert "reproductions.kcd.condensation" in pages  # its chapter links to it
    assert "reproductions.kcd.figures" not in pages
    assert not [name for name in pages if any(part.startswith("_") for part in name.split("."))]


def test_every_chapter_is_in_the_contents_once() -> None:
    parts = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["parts"]
    listed = [entry["file"] for part in parts for entry in part["chapters"] if "chapters/" in entry["file"]]
    files = sorted(file.stem for file in (ROOT / "book" / "chapters").glob("*.md"))
    assert sorted(Path(name).name for name in listed) == files


def test_inventory_is_read_by_sphinx() -> None:
    import io

    from sphinx.util.inventory import InventoryFile

    file = io.BytesIO(inventory("other", {"py:class": {"a.B": "b.html#$"}}))
    loaded = InventoryFile.load(file, "https://example.org", lambda base, path: f"{base}/{path}")
    assert loaded["py:class"]["a.B"][2] == "https://example.org/b.html#a.B"


def fake_execution(notebook: nbformat.NotebookNode, name: str, folder: Path, *, profile: str) -> None:
    """What papermill leaves, without running anything."""
    (folder / "fresh").mkdir(parents=True)
    (folder / "fresh" / "numbers.json").write_text("{}")
    done = copy.deepcopy(notebook)
    for number, cell in enumerate(notebooks.code_cells(done), 1):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="50.25")]
    nbformat.write(done, folder / "executed.ipynb")


@pytest.mark.parametrize("damage", ["digit", "cut", "emptied", "no numbers", "no digest"])
def test_damaged_entry_of_the_cache_is_executed_again(
    tmp_path: Path, columns: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(notebooks, "run", fake_execution)
    chapter = write_chapter(tmp_path / f"{fake.name}.md")

    def execute() -> notebooks.Executed:
        return notebooks.execute(chapter, cache=tmp_path / "cache", columns=columns, profile="quick")

    first = execute()
    assert (first.ran, execute().ran) == (True, False)
    (entry,) = (tmp_path / "cache").iterdir()
    path = entry / "executed.ipynb"
    if damage == "no numbers":
        (entry / "fresh" / "numbers.json").unlink()
    elif damage == "no digest":
        (entry / notebooks.SEAL).unlink()
    else:
        text = path.read_text()
        damaged = {"digit": text.replace("50.25", "50.26"), "cut": text[:300], "emptied": ""}[damage]
        assert damaged != text
        path.write_text(damaged)
    again = execute()
    assert again.ran
    assert again.notebook == first.notebook
    assert not execute().ran


class Killed(BaseException):
    """Stands for the end of the process."""


def pages(html: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in html.iterdir()} if html.exists() else {}


@pytest.mark.parametrize("last", ["replace", "replace again", "rmtree"])
def test_a_site_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    module = sys.modules["book.build"]
    book, site = Book(output=tmp_path / "build"), tmp_path / "site"
    for folder, word in ((book.html, "old"), (site, "new")):
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / name).write_text(word)
    old, new = pages(book.html), pages(site)
    calls, replace = [], os.replace

    def dying(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == last.count("replace") + last.count("again"):
            raise Killed
        replace(*arguments)

    def half(folder: Path, **options: object) -> None:
        (folder / "one").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying) if last != "rmtree" else patch.setattr(
            module.shutil, "rmtree", half
        )
        with pytest.raises(Killed):
            module.publish(book, site)
    assert pages(book.html) == {"replace": old, "replace again": {}, "rmtree": new}[last]
    (book.output / "cache" / f"{notebooks.PARTIAL}killed" / "entry").mkdir(parents=True)
    module.tidy(book)
    assert pages(book.html) == (new if last == "rmtree" else old)
    assert sorted(path.name for path in book.output.iterdir()) == ["cache", "html"]
    assert list((book.output / "cache").iterdir()) == []
    if site.exists():
        module.publish(book, site)
    assert pages(book.html) == new
    assert sorted(path.name for path in book.output.iterdir()) == ["cache", "html"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": "x"}', "\x00"])
def test_damaged_stamp_means_a_new_site(tmp_path: Path, text: str) -> None:
    module = sys.modules["book.build"]
    (tmp_path / "stamp.json").write_text(text)
    assert not module.up_to_date(Book(output=tmp_path), tmp_path / "stamp.json", "x")


@pytest.mark.slow
class TestMiniBook:
    """Builds of a book with one chapter."""

    def test_builds_once_and_notices_changes(self, tmp_path: Path) -> None:
        book = make_book(tmp_path, "It is {num}`COLUMN/quick/synthetic/map/method`.")
        assert build(book)
        page = next((book.html / "chapters").glob("*.html"))
        assert "55.2" in page.read_text(encoding="utf8")
        notebook = nbformat.read(next((book.output / "notebooks").glob("*.ipynb")), 4)
        assert notebook.cells[-1].outputs[0].data["text/plain"] == "42"
        assert (book.html / "_sources" / "chapters" / f"{page.stem}.ipynb").is_file()
        assert not build(book), "nothing has changed"
        for seconds in (4e9, 0):
            for path in tmp_path.rglob("*"):
                os.utime(path, (seconds, seconds))
            assert not build(book), "dates do not matter"
        entries = set((book.output / "cache").iterdir())
        make_book(tmp_path, "Now {num}`COLUMN/quick/synthetic/map/student`.")
        assert build(book)
        assert "50.2" in page.read_text(encoding="utf8")
        assert set((book.output / "cache").iterdir()) == entries, "prose does not run a chapter"
        page.write_text("damaged")
        assert build(book), "a damaged site is built anew"

    @pytest.mark.parametrize(
        ("text", "cells", "message"),
        [
            ("{num}`COLUMN/quick/synthetic/map/nobody`", CELLS, "no recorded number"),
            ("[gone](gone.md)", CELLS, "gone.md"),
            ('<a href="gone.html">gone</a>', CELLS, "no such file: gone.html"),
            ("", CELLS.replace("6 * 7", "1 / 0"), "ZeroDivisionError"),
            ("", CELLS.replace("profile =", "profil ="), "no cell tagged `parameters` sets `profile`"),
        ],
        ids=["unknown number", "broken link", "broken HTML link", "failing cell", "no profile"],
    )
    def test_broken_book_fails_every_time(
        self, tmp_path: Path, text: str, cells: str, message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        book = make_book(tmp_path, text, cells)
        for _ in range(2):
            with pytest.raises(BookError) as error:
                build(book)
            assert message in capfd.readouterr().err + str(error.value)
        assert not book.html.exists()


@pytest.mark.parametrize(
    "error", [BookError("chapter x failed"), OSError(28, "chapter x failed", "page.html")]
)
def test_command_line_reports_a_broken_book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def broken(book: Book, *, force: bool) -> bool:
        raise error

    monkeypatch.setattr(sys.modules["book.build"], "build", broken)
    monkeypatch.setattr(sys.modules["book.build"], "Book", lambda profile: Book(output=tmp_path / "out"))
    assert main([]) == 1
    assert "chapter x failed" in capsys.readouterr().err
