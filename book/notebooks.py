"""Chapters as notebooks: converted from Markdown, executed by papermill, cached by what they compute.

An executed notebook is found again by the digest of its *code*: code cells, source digests of the modules
that they import, data files of the column, library versions. Prose, captions and cell tags are taken from
the Markdown of the day, so that editing them never runs anything.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from book.paths import ROOT, machine_paths
from reproductions.harness.source import SourceError, source_digest

STYLE = ROOT / "book" / "style"
CELL_TIMEOUT = 900  # seconds; a quick chapter needs a minute in all
SEAL = "digest"  # file in an entry of the cache: the digest of the others
PARTIAL = ".partial-"  # how the names of unfinished entries of the cache begin


class BookError(RuntimeError):
    """The book cannot be built; the message says why and where."""


@dataclass(frozen=True)
class Executed:
    """An executed chapter: the notebook to publish and the folder of its freshly computed numbers."""

    name: str
    notebook: NotebookNode
    fresh: Path
    ran: bool


def digest(files: Iterable[Path], base: Path) -> str:
    """Return one digest for the names (relative to ``base``) and contents of ``files``."""
    total = hashlib.sha256()
    for file in sorted(set(files)):
        if file.is_file() and "__pycache__" not in file.parts:
            total.update(f"{file.relative_to(base)}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def convert(path: Path) -> NotebookNode:
    """Read a chapter (MyST Markdown with a jupytext header) as a notebook without outputs.

    Cell ids are derived from the chapter's name and the position, so that converting is reproducible.
    """
    from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook

    text = path.read_text(encoding="utf8")
    if not is_myst_markdown_notebook(text):
        raise BookError(f"{path}: no jupytext header with `format_name: myst`")
    notebook = read_myst_markdown_notebook(text, path=str(path))
    if not notebook.metadata.get("kernelspec", {}).get("name"):
        raise BookError(f"{path}: the header names no kernel (kernelspec: name: python3)")
    for position, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{path.stem}/{position}".encode()).hexdigest()[:8]
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells, without those that papermill injected."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def imported_modules(notebook: NotebookNode) -> list[str]:
    """Return the sorted names of the project's own modules that the code cells import.

    A package, or a name that it re-exports, stands for all modules in it.
    """
    names: set[str] = set()
    for cell in code_cells(notebook):
        source = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names.update(name if module_files(name) else node.module for name in inner)
    own = [name for name in names if name.split(".")[0] in {"kdrefs", "reproductions"}]
    files = {file.relative_to(ROOT).with_suffix("") for name in own for file in module_files(name)}
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)


def module_files(name: str) -> list[Path]:
    """Return the file of a module of this checkout, all files of a package, nothing for anything else."""
    base = ROOT.joinpath(*name.split("."))
    if (base / "__init__.py").is_file():
        return list(base.rglob("*.py"))
    return [file] if (file := base.with_name(base.name + ".py")).is_file() else []


def library_versions() -> dict[str, str]:
    """Return the versions of what a chapter runs on: the interpreter and the run-time dependencies."""
    wanted = {"ipykernel"}
    for line in metadata.requires("kdrefs") or []:
        requirement, _, marker = line.partition(";")
        if not marker or re.search(r"""extra\s*==\s*['"]repro['"]""", marker):
            wanted.add(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])
    versions = {name: metadata.version(name) for name in sorted(wanted)}
    return versions | {"python": ".".join(map(str, sys.version_info[:2]))}


def cache_key(notebook: NotebookNode, *, profile: str, column: Path) -> str:
    """Return the digest of everything that the outputs of a chapter depend on.

    Args:
        notebook: The converted chapter.
        profile: Value of the parameter ``profile``.
        column: Folder ``reproductions/<column>``; need not exist.

    Raises:
        BookError: A module that the chapter depends on cannot be read.
    """
    modules = set(imported_modules(notebook))
    if (column / "run.py").is_file():
        modules.add(f"reproductions.{column.name}.run")
    try:
        sources = {name: source_digest(name) for name in sorted(modules)}
    except SourceError as error:
        raise BookError(f"chapter {column.name}: {error}") from error
    inputs = {
        "cells": [cell.source for cell in code_cells(notebook)],
        "profile": profile,
        "sources": sources,
        "data": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(column.glob("*"))
            if file.is_file() and file.suffix != ".py" and not file.name.startswith(".")
        },
        "style": {file.name: file.read_text() for file in sorted(STYLE.iterdir()) if file.is_file()},
        "versions": library_versions(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def default_profile(path: Path) -> str:
    """Return the default of the chapter's parameter ``profile``; papermill ignores unknown parameters."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    parameters = papermill.inspect_notebook(str(path))
    if "profile" not in parameters:
        raise BookError(f"chapter {path.stem}: no cell tagged `parameters` sets `profile`")
    return str(ast.literal_eval(parameters["profile"]["default"]))


def kernel_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a chapter's kernel: the book's look of figures, nobody's personal settings."""
    settings = folder / "ipython" / "profile_default"
    settings.mkdir(parents=True)
    shutil.copy(STYLE / "ipython_kernel_config.py", settings)
    return os.environ | {
        "KDREFS_FRESH": "fresh",  # relative to the kernel's folder: no path of this machine in an output
        "IPYTHONDIR": str(settings.parent),
        "MATPLOTLIBRC": str(STYLE / "matplotlibrc"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def run(notebook: NotebookNode, name: str, folder: Path, *, profile: str) -> None:
    """Execute ``notebook`` with papermill; leave ``executed.ipynb`` and ``fresh/`` in ``folder``.

    Raises:
        BookError: A cell fails, or the chapter has no parameter ``profile``.
    """
    (folder / "fresh").mkdir(parents=True)
    source = folder / f"{name}.ipynb"
    nbformat.write(notebook, source)
    parameters = [] if default_profile(source) == profile else ["-p", "profile", profile]
    command = [sys.executable, "-m", "papermill", source.name, "executed.ipynb", *parameters]
    command += ["--no-progress-bar", "--log-level", "ERROR", "--execution-timeout", str(CELL_TIMEOUT)]
    done = subprocess.run(command, cwd=folder, env=kernel_environment(folder), capture_output=True, text=True)
    if done.returncode:
        trace = done.stderr.rpartition("PapermillExecutionError:")[2].strip()
        raise BookError(f"chapter {name} failed\n" + re.sub(r"\x1b\[[\d;]*m", "", trace))


def clean_outputs(notebook: NotebookNode, name: str) -> None:
    """Remove what belongs on no page (stderr, tool metadata) and check that every cell has run, in place.

    Raises:
        BookError: A cell was not executed, or an output shows a path of this machine.
    """
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        first = (cell.source.splitlines() or [""])[0]
        if cell.execution_count is None:
            raise BookError(f"chapter {name}: cell was not executed: {first}")
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for path in machine_paths(json.dumps(cell.outputs, ensure_ascii=False)):
            raise BookError(f"chapter {name}: output shows the machine path {path!r}; cell: {first}")


def merge(converted: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Return the converted chapter with the outputs of its executed twin, an injected cell included."""
    merged = copy.deepcopy(converted)
    for cell, twin in zip(code_cells(merged), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = twin.outputs, twin.execution_count
    for position, cell in enumerate(executed.cells):
        if "injected-parameters" in cell.metadata.get("tags", []):
            merged.cells.insert(position, cell)
    return merged


def execute(path: Path, *, cache: Path, columns: Path, profile: str) -> Executed:
    """Return the executed chapter at ``path``, from ``cache`` if nothing that it computes has changed.

    A damaged entry is thrown away, and the chapter is executed again.

    Args:
        path: The chapter's Markdown; its stem is the column's name.
        cache: Folder of executed notebooks; an entry appears there only once it is complete.
        columns: The folder ``reproductions``.
        profile: Profile that the chapter is run with.
    """
    converted = convert(path)
    entry = cache / f"{path.stem}-{cache_key(converted, profile=profile, column=columns / path.stem)[:20]}"
    ran = not _intact(entry)
    if ran:
        shutil.rmtree(entry, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=PARTIAL) as partial:
            folder = Path(partial) / "entry"
            run(converted, path.stem, folder, profile=profile)
            for scratch in ("ipython", "matplotlib"):
                shutil.rmtree(folder / scratch, ignore_errors=True)
            (folder / SEAL).write_text(_seal(folder), encoding="ascii")
            folder.replace(entry)
    executed = nbformat.read(entry / "executed.ipynb", 4)
    clean_outputs(executed, path.stem)
    return Executed(path.stem, merge(converted, executed), entry / "fresh", ran)


def _seal(entry: Path) -> str:
    return digest((file for file in entry.rglob("*") if file != entry / SEAL), entry)


def _intact(entry: Path) -> bool:
    """Return whether an entry of the cache is there and has the content it was left with."""
    seal = entry / SEAL
    return seal.is_file() and seal.read_text(encoding="ascii", errors="replace") == _seal(entry)


def chapters(folder: Path) -> Iterator[Path]:
    """Yield the chapters of a book, sorted by name."""
    yield from sorted((folder / "chapters").glob("*.md"))
