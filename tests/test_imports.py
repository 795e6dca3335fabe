"""What imports what: layers, no circles, no method in another's debt, and nothing heavy at import time."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

# Lowest first; the first pattern that matches a module's name gives its layer. Nothing imports upwards.
LAYERS: list[tuple[str, ...]] = [
    (r"kdrefs\._\w+", r"kdrefs\.kernels", r"kdrefs\.divergences", r"kdrefs\.noise", r"kdrefs\.pair_sums"),
    (r"kdrefs\.data(\..*)?", r"kdrefs\.nets(\..*)?", r"kdrefs\.metrics"),
    (r"kdrefs\.training(\..*)?",),
    (r"kdrefs\.methods(\..*)?",),
    (r"kdrefs",),  # the re-exports of the package itself: for users, not for its own modules
    (r"reproductions", r"reproductions\.harness(\..*)?"),
    (r"reproductions\.protocols(\..*)?",),
    (r"reproductions\.(?!cli$|readme$)\w+(\.\w+)*",),
    (r"reproductions\.(cli|readme)",),
    (r"book(\..*)?",),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_modules() -> dict[str, Path]:
    files = [path for top in ("kdrefs", "reproductions", "book") for path in (ROOT / top).rglob("*.py")]
    return {module_name(path): path for path in files}


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """Modules of the project that ``source`` imports anywhere, in functions and type-checking blocks too."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b` names the module a.b if there is one, else something inside a.
            names = [sub if (sub := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        found.update(name for name in names if name in modules and name != module)
    return found


def layer(module: str) -> int:
    return next(rank for rank, names in enumerate(LAYERS) if any(re.fullmatch(n, module) for n in names))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Each module with the project's modules it imports."""
    modules = project_modules()
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", set(modules))
        for name, path in modules.items()
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b.c", {"a.b.c"}),
        ("from a.b import c", {"a.b.c"}),
        ("from a.b import name", {"a.b"}),
        ("from . import d", {"a.b.d"}),
        ("from .d import name", {"a.b.d"}),
        ("from .. import name", {"a"}),
        ("from ..e import name", {"a.e"}),
        ("def f():\n    import a.e", {"a.e"}),
        ("import os, torch", set()),
    ],
)
def test_imports_are_found_in_every_form(source, expected):
    assert imports(source, "a.b.c2", False, {"a", "a.b", "a.b.c", "a.b.d", "a.e"}) == expected
    assert imports("from . import d", "a.b", True, {"a.b.d"}) == {"a.b.d"}


def test_no_module_imports_a_higher_layer(graph):
    assert {"kdrefs", "kdrefs.methods.pkt", "reproductions.cli"} <= set(graph)
    upward = [(a, b) for a, targets in graph.items() for b in targets if layer(b) > layer(a)]
    assert upward == []


def test_no_module_imports_itself_in_a_circle(graph):
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_method_or_column_imports_another(graph):
    def column(module: str) -> str | None:
        """The column a module belongs to; a method's private module is named after it: ``_pkt_official``."""
        match = re.match(r"kdrefs\.methods\.(\w+)|reproductions\.(\w+)\.", module)
        name = match and (match[1] or match[2])
        if name and name.startswith("_"):
            name = next(c for c in columns if name.startswith(f"_{c}"))
        return None if name in {"harness", "protocols"} else name

    columns = {m.rpartition(".")[2] for m in graph if re.fullmatch(r"kdrefs\.methods\.[a-z]\w*", m)}
    for kind in ("kdrefs.methods.", "reproductions."):
        edges = [(a, b) for a, bs in graph.items() for b in bs if a.startswith(kind) and b.startswith(kind)]
        assert [(a, b) for a, b in edges if column(a) and column(b) and column(a) != column(b)] == []


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=120)


def test_importing_kdrefs_imports_neither_torch_nor_numpy():
    run_python("import sys, kdrefs; assert not {'torch', 'numpy'} & set(sys.modules), 'kdrefs is not lazy'")


def torch_requirements() -> set[str]:
    """Import names of what an installation of torch brings with it."""
    names, todo = set(), ["torch", "numpy"]
    while todo:
        name = todo.pop()
        names.add(name.replace("-", "_").lower())
        try:
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        needed = [r.name for r in requirements if r.marker is None or r.marker.evaluate()]
        todo += [name for name in needed if name.replace("-", "_").lower() not in names]
    return names - {"setuptools"}


def test_losses_import_with_torch_and_numpy_alone():
    modules = [name for name in project_modules() if name.startswith("kdrefs.methods")]
    modules += ["kdrefs.kernels", "kdrefs.divergences", "kdrefs.metrics"]
    run_python(f"""
import importlib, sys
allowed = set(sys.stdlib_module_names) | {torch_requirements()!r} | {{"kdrefs", "torchgen"}}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{{name}} is not there when kdrefs alone is installed", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import jaxtyping
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the blocker does not block")
for module in {modules!r}:
    importlib.import_module(module)
import torch, kdrefs
student = torch.randn(4, 3, requires_grad=True)
kdrefs.pkt_loss(student, torch.randn(4, 5)).backward()
assert student.grad.abs().sum() > 0
""")
