"""The source digest: what code a result depends on, without docstrings, comments and annotations.

The digest covers the modules that a column's `run.py` imports, directly or not, from `kdrefs`,
`reproductions.protocols` and its own folder. Imports are read from the syntax trees; nothing is
executed. A package's `__init__` counts as a table of names: `from kdrefs import pkt_loss` leads to
the module that the `__init__` imports `pkt_loss` from (under `if TYPE_CHECKING:` or not), and the
`__init__` itself is covered only where a name is defined in it or the package is used as a whole.
So adding a method to the table changes no other column's digest.

A digest is computed once a process, as a module is imported once: while a training runs, it stays that
of the code it began with.

The trees are written in a spelling of our own, because that of `ast.dump` differs between Python
versions: node names, fields in alphabetical order, no positions, no empty fields.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NOT_CODE = {"annotation", "ctx", "kind", "returns", "simple", "type_comment", "type_params"}
_ALWAYS = ("kdrefs", "reproductions.protocols")
_NEVER = ("reproductions.harness", "reproductions.cli")


class SourceError(RuntimeError):
    """A module of the closure cannot be read, or reaches across columns."""


@functools.cache
def source_digest(module: str | Path, root: Path | None = None) -> str:
    """Return the digest of everything `module` depends on.

    Args:
        module: Dotted name such as `"reproductions.pkt.run"`, or the path of such a file,
            `<root>/reproductions/<column>/run.py`.
        root: Folder that holds `kdrefs` and `reproductions`; default: where they are imported from.

    Returns:
        SHA-256, hexadecimal; equal on every Python from 3.11 on.
    """
    code = {name: canonical(_parse(path)) for name, path in source_closure(module, root).items()}
    text = json.dumps(sorted(code.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def source_closure(module: str | Path, root: Path | None = None) -> dict[str, Path]:
    """Return the covered modules, dotted name to file, in order of name."""
    if isinstance(module, Path):
        root = root or module.resolve().parents[2]
        module = ".".join(module.resolve().relative_to(root.resolve()).with_suffix("").parts)
    column = ".".join(module.split(".")[:2]) if module.startswith("reproductions.") else "kdrefs"
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or not _covered(name, column):
            continue
        path = _find(name, root)
        if path is None:
            raise SourceError(f"no file for the module {name!r}, which {module!r} imports")
        found[name] = path
        waiting += _imports(name, path, root)
    return dict(sorted(found.items()))


def _covered(name: str, column: str) -> bool:
    if _within(name, (*_ALWAYS, column)):
        return True
    if name.startswith("reproductions.") and not _within(name, _NEVER):
        raise SourceError(f"{column} reaches into {name}; what two columns share belongs in protocols/")
    return False


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _find(name: str, root: Path | None) -> Path | None:
    top, *rest = name.split(".")
    folders = [root / top] if root else [Path(p) for p in importlib.import_module(top).__path__]
    for folder in folders:
        base = folder.joinpath(*rest)
        for path in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


@functools.cache
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise SourceError(f"{path.name}, line {error.lineno}: {error.msg}") from error


def _imports(name: str, path: Path, root: Path | None) -> Iterator[str]:
    """Yield the modules that the module `name` at `path` depends on."""
    nodes = list(_running(_parse(path)))
    packages: dict[str, str] = {}
    for node in nodes:
        for local, dotted in _bindings(node, name, path):
            if dotted.split(".")[0] not in ("kdrefs", "reproductions") or _within(dotted, _NEVER):
                continue
            target = _resolve(dotted, root)
            if local and _is_package(target, root):
                packages[local] = target
            else:
                yield target
    inner: set[int] = set()
    for node in nodes:
        parts = _dotted(node)
        if parts and parts[0] in packages and id(node) not in inner:
            inner.update(id(part) for part in ast.walk(node))
            used = ".".join([packages[parts[0]], *parts[1:]])
            if not _within(used, _NEVER):
                yield _resolve(used, root)


def _bindings(node: ast.AST, name: str, path: Path) -> Iterator[tuple[str | None, str]]:
    """Yield (local name, dotted origin) of an import; no local name where all of the origin is meant."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname or "." not in alias.name:
                yield alias.asname or alias.name, alias.name
            else:
                yield alias.name.split(".")[0], alias.name.split(".")[0]
                yield f"{alias.name} ", alias.name  # not a name that code could use
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            drop = node.level - (path.name == "__init__.py")
            base = name.split(".")[: len(name.split(".")) - drop]
            origin = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            local = None if alias.name == "*" else alias.asname or alias.name
            yield local, f"{origin}.{alias.name}" if local else origin


def _resolve(dotted: str, root: Path | None) -> str:
    """Return the module that defines what `dotted` names, through the tables of the packages."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        path = _find(module, root)
        if path is not None:
            break
    else:
        raise SourceError(f"no file for {dotted!r}")
    if size < len(parts) and path.name == "__init__.py":
        tree = _parse(path)
        table = {
            local: origin
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for local, origin in _bindings(node, module, path)
        }
        origin = table.get(parts[size])
        if origin is not None and origin.split(".")[0] in ("kdrefs", "reproductions"):
            return _resolve(".".join([origin, *parts[size + 1 :]]), root)
        if origin is None and None not in table and parts[size] not in _defined(tree):
            raise SourceError(f"{module!r} has no {parts[size]!r}, neither as a module nor as a name")
    return module


def _defined(tree: ast.Module) -> set[str]:
    """Return the names that a module's own statements bind."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Import):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        else:
            names.update(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
    return names


def _is_package(name: str, root: Path | None) -> bool:
    path = _find(name, root)
    return path is not None and path.name == "__init__.py"


def _dotted(node: ast.AST) -> list[str]:
    """Return `["a", "b", "c"]` for the expression `a.b.c`, else nothing."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `node`, outer before inner, without annotations and `if TYPE_CHECKING:`."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in _NOT_CODE:
            continue
        for child in _statements(value) if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _running(child)


def _statements(nodes: list[Any], in_class: bool = False) -> list[Any]:
    """Return `nodes` without docstrings, `TYPE_CHECKING` blocks and bare annotations."""
    kept: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.AnnAssign) and node.value is None and not in_class:
            continue
        if isinstance(node, ast.If) and _dotted(node.test)[-1:] == ["TYPE_CHECKING"]:
            kept += _statements(node.orelse, in_class)
        else:
            kept.append(node)
    return kept


def canonical(node: Any, in_class: bool = False) -> Any:
    """Return a syntax tree as nested lists in a spelling that no Python version changes.

    A class keeps its annotated names, since a dataclass makes fields of them; the annotation itself goes.
    """
    if isinstance(node, list):
        return [canonical(item, in_class) for item in _statements(node, in_class)]
    if isinstance(node, ast.Constant):
        return ["Constant", type(node.value).__name__, _spelling(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", [canonical(item) for item in _joined(node.values)]]
    if isinstance(node, ast.AnnAssign) and not in_class:
        return ["Assign", ["targets", [canonical(node.target)]], ["value", canonical(node.value)]]
    if not isinstance(node, ast.AST):
        return node
    inside = isinstance(node, ast.ClassDef) or (
        in_class and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    )
    fields = [
        [field, canonical(value, inside)]
        for field, value in sorted(ast.iter_fields(node))
        if field not in _NOT_CODE and value is not None and value != []
    ]
    return [type(node).__name__, *[[name, value] for name, value in fields if value != []]]


def _spelling(value: Any) -> Any:
    if isinstance(value, (str, bool)) or value is None:
        return value
    return value.hex() if isinstance(value, (float, bytes)) else str(value)


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """Return the parts of an f-string with neighbouring texts merged and empty ones dropped."""
    parts: list[ast.expr] = []
    for value in values:
        if isinstance(value, ast.Constant) and parts and isinstance(parts[-1], ast.Constant):
            parts[-1] = ast.Constant(str(parts[-1].value) + str(value.value))
        else:
            parts.append(value)
    return [part for part in parts if not (isinstance(part, ast.Constant) and part.value == "")]
