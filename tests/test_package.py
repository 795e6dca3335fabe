"""The package's lazy names: all there, all listed, the same for type checkers."""

import ast
import re
from importlib import import_module, metadata
from pathlib import Path

import pytest

import kdrefs


def test_every_exported_name_is_the_object_of_its_module():
    for name, module in kdrefs._MODULE_OF.items():
        assert getattr(kdrefs, name) is getattr(import_module(module), name)
    assert set(kdrefs.__all__) <= set(dir(kdrefs))
    assert {"pkt_loss", "supervised_pkt_loss", "retrieval_map", "precision_at"} <= set(kdrefs.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(kdrefs.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == set(kdrefs._MODULE_OF.items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kdrefs' has no attribute 'pkt'"):
        _ = kdrefs.pkt
    with pytest.raises(ImportError):
        exec("from kdrefs import no_such_loss")


def test_version_is_the_distribution_s():
    assert kdrefs.__version__ == metadata.version("kdrefs")
    assert re.fullmatch(r"\d+\.\d+\.\d+", kdrefs.__version__)
    assert (Path(kdrefs.__file__).parent / "py.typed").is_file()
