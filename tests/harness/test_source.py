"""The source digest: what it covers, what it ignores, and that it stays the same."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

from reproductions.harness.source import SourceError, canonical, source_closure, source_digest
from tests.harness.fakes import REPOSITORY

TREE = {
    "kdrefs/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "_TABLE = {'loss': 'kdrefs.methods.one'}\n"
        "if TYPE_CHECKING:\n"
        "    from kdrefs.methods.one import loss as loss\n"
        "    from kdrefs.methods.two import other as other\n"
    ),
    "kdrefs/kernels.py": "def cosine(x, y=None):\n    '''Cosine.'''\n    return x @ (y or x).T  # similarity\n",
    "kdrefs/methods/__init__.py": "",
    "kdrefs/methods/one.py": (
        '"""One."""\nfrom __future__ import annotations\nfrom kdrefs.kernels import cosine\n\n'
        "def loss(s: Tensor, t: Tensor, *, scale: float = 1.0) -> Tensor:\n"
        '    """A loss."""\n    total: Tensor = scale * (cosine(s) - cosine(t)).square().mean()\n    return total\n'
    ),
    "kdrefs/methods/two.py": "def other(s):\n    return s\n",
    "kdrefs/nets/__init__.py": "from kdrefs.nets.small import Net\nfrom .large import Large\n",
    "kdrefs/nets/small.py": "class Net: pass\n",
    "kdrefs/nets/large.py": "class Large: pass\n",
    "reproductions/__init__.py": "",
    "reproductions/harness/runs.py": "from kdrefs.methods.two import other\n",
    "reproductions/protocols/pairs.py": "from kdrefs.nets import Net\nPAIRS = {'digits': Net}\n",
    "reproductions/col/helpers.py": "RATE = 1e-3\n",
    "reproductions/col/errata.py": "ERRATA = ()\n",
    "reproductions/col/run.py": (
        "from dataclasses import dataclass\n"
        "from kdrefs import loss\n"
        "from reproductions.harness.runs import Run\n"
        "from reproductions.protocols.pairs import PAIRS\n"
        "from reproductions.col.helpers import RATE\n\n"
        "@dataclass(frozen=True)\nclass Config:\n    rate: float = RATE\n    seeds: tuple = (0, 1)\n    name: str\n\n"
        "def execute(run, config):\n    return {'map': f'{loss(1, 2):.{3}f}' 'x' * 2}\n"
    ),
}
PINNED = "379ffe49a3ef774f6114de5ea31464aa469316e95a82f190f08359220018264c"


@pytest.fixture
def tree(tmp_path):
    """Write the fixture tree, with one file changed, to a folder of its own; return its root."""
    made = iter(range(100))

    def write(path: str = "", old: str = "", new: str = "") -> Path:
        root = tmp_path / f"tree{next(made)}"
        files = dict(TREE)
        if path:
            assert old in files[path]
            files[path] = files[path].replace(old, new)
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return root

    return write


def digest(root: Path) -> str:
    return source_digest("reproductions.col.run", root)


def test_closure_is_what_run_depends_on_and_nothing_else(tree):
    assert list(source_closure("reproductions.col.run", tree())) == [
        "kdrefs.kernels",
        "kdrefs.methods.one",
        "kdrefs.nets.small",
        "reproductions.col.helpers",
        "reproductions.col.run",
        "reproductions.protocols.pairs",
    ]


def test_digest_of_the_fixture_is_pinned(tree):
    assert digest(tree()) == PINNED


def test_a_path_means_the_module_in_its_tree(tree):
    root = tree()
    assert source_digest(root / "reproductions" / "col" / "run.py") == digest(root)


@pytest.mark.parametrize(
    "change",
    [
        ("kdrefs/methods/one.py", '"""A loss."""', '"""A better text."""\n    "and another"'),
        ("kdrefs/methods/one.py", '"""One."""\n', ""),
        ("kdrefs/kernels.py", "  # similarity", ""),
        ("kdrefs/kernels.py", "    return", "    # the Gram matrix\n\n    return"),
        ("kdrefs/methods/one.py", "s: Tensor, t: Tensor", "s, t: 'Float[Tensor, \"b d\"]'"),
        ("kdrefs/methods/one.py", "-> Tensor", ""),
        ("kdrefs/methods/one.py", "total: Tensor = ", "total = "),
        ("kdrefs/methods/one.py", "from __future__ import annotations\n", ""),
        ("kdrefs/methods/one.py", "    total", "    total: float\n    total"),
        ("reproductions/col/run.py", "rate: float", "rate: int"),
        ("reproductions/col/run.py", "    name: str\n", '    name: str\n    """What it is called."""\n'),
        ("reproductions/col/run.py", "{'map'", '{"map"'),
        ("reproductions/col/run.py", "(0, 1)", "(0,1,)"),
        ("reproductions/col/helpers.py", "1e-3", "0.001"),
        ("kdrefs/methods/two.py", "return s", "return 2 * s"),
        ("kdrefs/nets/large.py", "pass", "x = 1"),
        ("reproductions/col/errata.py", "()", "(1,)"),
        ("reproductions/harness/runs.py", "other", "nothing"),
        ("kdrefs/__init__.py", "_TABLE = {", "_TABLE = {'third': 'kdrefs.methods.three', "),
    ],
    ids=str,
)
def test_digest_ignores_what_is_not_code_of_the_column(tree, change):
    assert digest(tree(*change)) == digest(tree())


@pytest.mark.parametrize(
    "change",
    [
        ("kdrefs/kernels.py", "x @ ", "2 * x @ "),
        ("kdrefs/kernels.py", "y=None", "y=0"),
        ("kdrefs/kernels.py", "def cosine(x, y", "def cosine(x, *, y"),
        ("kdrefs/methods/one.py", "1.0", "2.0"),
        ("kdrefs/methods/one.py", " - ", " + "),
        ("kdrefs/methods/one.py", ".mean()", ".mean(0)"),
        ("kdrefs/nets/small.py", "class Net: pass", "class Net:\n    x: int"),
        ("reproductions/protocols/pairs.py", "'digits'", "'digit'"),
        ("reproductions/col/helpers.py", "1e-3", "1e-4"),
        ("reproductions/col/run.py", "    name: str\n", "    name: str\n    other: str\n"),
        ("reproductions/col/run.py", "frozen=True", "frozen=False"),
        ("reproductions/col/run.py", ".{3}f", ".{4}f"),
        ("reproductions/col/run.py", "'map'", "b'map'"),
        ("reproductions/col/run.py", "(0, 1)", "[0, 1]"),
        ("reproductions/col/run.py", "(0, 1)", "(0, True)"),
        ("reproductions/col/run.py", "1, 2)", "1, 2.0)"),
    ],
    ids=str,
)
def test_digest_sees_code_of_the_column(tree, change):
    assert digest(tree(*change)) != digest(tree())


def test_type_checking_blocks_are_neither_followed_nor_covered(tree):
    block = "import typing\nif typing.TYPE_CHECKING:\n    from kdrefs.methods.two import other\nRATE"
    path = "reproductions/col/helpers.py"
    with_block, without = tree(path, "RATE", block), tree(path, "RATE", "import typing\nRATE")
    assert digest(with_block) == digest(without)
    assert "kdrefs.methods.two" not in source_closure("reproductions.col.run", with_block)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from kdrefs import loss", {"kdrefs.methods.one", "kdrefs.kernels"}),
        ("import kdrefs\nkdrefs.loss(1, 2)", {"kdrefs.methods.one", "kdrefs.kernels"}),
        ("import kdrefs as k\nf = k.methods.two.other", {"kdrefs.methods.two"}),
        ("import kdrefs.methods.two", {"kdrefs.methods.two"}),
        ("import kdrefs.methods.two as two", {"kdrefs.methods.two"}),
        ("from kdrefs.methods import two", {"kdrefs.methods.two"}),
        ("from kdrefs.nets import Large as Big", {"kdrefs.nets.large"}),
        ("from kdrefs import nets\nnets.Net()", {"kdrefs.nets.small"}),
        (
            "from kdrefs import nets\ndef f(x: nets.Large) -> nets:\n    return nets.Net()",
            {"kdrefs.nets.small"},
        ),
        ("from kdrefs import nets\nuse(nets)", {"kdrefs.nets", "kdrefs.nets.small", "kdrefs.nets.large"}),
        ("from kdrefs.nets import *", {"kdrefs.nets", "kdrefs.nets.small", "kdrefs.nets.large"}),
        ("def f():\n    from kdrefs.kernels import cosine", {"kdrefs.kernels"}),
        ("from .helpers import RATE", {"reproductions.col.helpers"}),
        ("from . import helpers", {"reproductions.col.helpers"}),
        ("from ..protocols.pairs import PAIRS", {"reproductions.protocols.pairs", "kdrefs.nets.small"}),
        ("import torch, reproductions.harness.runs", set()),
        ("from reproductions.harness import runs\nruns.other()", set()),
    ],
)
def test_every_form_of_import_is_followed(tree, code, expected):
    root = tree()
    (root / "reproductions" / "col" / "run.py").write_text(code)
    assert set(source_closure("reproductions.col.run", root)) == expected | {"reproductions.col.run"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from kdrefs.methods import three", "'kdrefs.methods' has no 'three'"),
        ("import kdrefs.nothing", "'kdrefs' has no 'nothing'"),
        ("from reproductions.other.run import plan", "reaches into reproductions.other"),
        ("x = = 1", "line 1"),
    ],
)
def test_what_cannot_be_covered_is_an_error(tree, code, message):
    root = tree()
    (root / "reproductions" / "other").mkdir()
    (root / "reproductions" / "other" / "run.py").write_text("def plan(): pass")
    (root / "reproductions" / "col" / "run.py").write_text(code)
    with pytest.raises(SourceError, match=message):
        source_closure("reproductions.col.run", root)


def test_canonical_tree_has_no_positions_and_merges_f_string_texts():
    def tree(text):
        return canonical(ast.parse(text))

    assert tree("x = f'a{1}b' 'c'") == tree("\n\nx = f'a{1}' 'bc'")
    assert tree("x = f'{a!r:>{w}}'") != tree("x = f'{a!s:>{w}}'")
    assert tree("x = 1.0") != tree("x = 1")
    assert tree("x = True") != tree("x = 1")
    assert tree("x = None") != tree("x")
    assert tree("f(**a)") != tree("f(*a)")
    assert tree("a[1:]") != tree("a[:1]")
    assert tree("def f(*, a, b=1): pass") != tree("def f(*, a=1, b): pass")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_digest_is_equal_on_other_pythons(version):
    """The digests of real modules, full of f-strings and annotations, computed by each Python found."""
    python = shutil.which(f"python{version}")
    modules = ["reproductions.pkt.run", "kdrefs.data.sets"]
    code = (
        "from pathlib import Path; from reproductions.harness.source import source_digest\n"
        f"print(*(source_digest(name, Path({str(REPOSITORY)!r})) for name in {modules}))"
    )
    command = [python or "python", "-c", code]
    done = python and subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    if not done or done.returncode == 127:
        pytest.skip(f"no Python {version} on this machine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [source_digest(module, REPOSITORY) for module in modules]
