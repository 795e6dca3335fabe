"""Folders of images and segmentations as CUB, VOC and COCO have them; cells, boxes and garments."""

import numpy as np
import pytest
from PIL import Image

from kdrefs.data import DataError, ImageSet, Split, load_set
from kdrefs.data import garments as module
from kdrefs.data.cells import box_masks, central_cells, mask_cells
from kdrefs.data.folders import import_folder, main, masked_images
from kdrefs.data.garments import garment_set


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def cub(tmp_path):
    """Twenty images of two classes, 12x10 pixels; the object is a rectangle of soft values."""
    draw = np.random.default_rng(0)
    for number in range(20):
        name = f"{1 + number % 2:03d}.Bird/bird_{number:04d}"
        image = draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        mask = np.zeros((10, 12), dtype=np.uint8)
        mask[2:6, 3:9] = 51 * (1 + number % 5)
        picture(tmp_path / "images" / f"{name}.png", image)
        picture(tmp_path / "segmentations" / f"{name}.png", mask)
    return tmp_path


def test_cub_style_folder(cub):
    found = list(masked_images(cub / "images", cub / "segmentations", 24))
    assert len(found) == 20
    assert {item.label for item in found} == {"001.Bird", "002.Bird"}
    assert found[0].image.shape == (24, 24, 3)
    rows, columns = (np.flatnonzero(found[0].mask.any(axis)) for axis in (1, 0))
    assert (rows[0], rows[-1]) == (5, 13)  # centres between 2 and 6 of 10, in 24
    assert (columns[0], columns[-1]) == (6, 17)
    assert found[0].mask.sum() == 9 * 12
    assert set(np.unique(found[0].mask)) == {0, 1}


def test_voc_style_folder_crops_to_the_object(tmp_path):
    values = np.zeros((40, 60), dtype=np.uint8)
    values[10:20, 20:40] = 7
    values[20:22, 20:40] = 255  # the border
    values[0:2, 0:3] = 12
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:20, 20:40] = 200
    picture(tmp_path / "JPEGImages" / "2007_1.png", image)
    picture(tmp_path / "JPEGImages" / "2007_2.png", image)  # not segmented
    palette = Image.fromarray(values, mode=None).convert("P")
    palette.putdata(values.flatten().tolist())
    (tmp_path / "SegmentationClass").mkdir()
    palette.save(tmp_path / "SegmentationClass" / "2007_1.png")
    options = {"objects": (7, 7), "labels": "mask"}
    (plain,) = masked_images(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", 20, **options)
    (cropped,) = masked_images(
        tmp_path / "JPEGImages", tmp_path / "SegmentationClass", 20, margin=1.2, **options
    )
    assert plain.label == cropped.label == "7"
    assert plain.name == "2007_1"
    assert plain.mask.mean() == pytest.approx(200 / 2400, abs=0.02)
    assert cropped.mask.mean() == pytest.approx(1 / 1.44, abs=0.06)  # to whole pixels
    assert (cropped.image.mean(2)[cropped.mask == 1] > 150).mean() > 0.9
    (both,) = masked_images(
        tmp_path / "JPEGImages", tmp_path / "SegmentationClass", 40, objects=(1, 20), labels="mask"
    )
    assert both.label == "7"
    assert both.mask.mean() > plain.mask.mean()


def test_import_and_load_again(cub, tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path / "cache"))
    data = import_folder("birds", cub / "images", cub / "segmentations", 16)
    again = load_set("birds")
    assert again.digests == data.digests
    assert again.classes == ("001.Bird", "002.Bird")
    assert len(again.train) + len(again.test) == 20
    assert again.train.extras["masks"].shape == (len(again.train), 16, 16)
    # Masks go with their images into canonical order: the object is where the mask says.
    found = {
        item.image.tobytes(): item.mask for item in masked_images(cub / "images", cub / "segmentations", 16)
    }
    for image, mask in zip(again.test.images, again.test.extras["masks"], strict=True):
        np.testing.assert_array_equal(found[image.tobytes()], mask)


def test_command_takes_a_list_of_test_images(cub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path / "cache"))
    names = [f"{1 + n % 2:03d}.Bird/bird_{n:04d}.png" for n in range(4)]
    (tmp_path / "test.txt").write_text("\n".join(names))
    main(["birds", "--images", str(cub / "images"), "--masks", str(cub / "segmentations"),
          "--size", "8", "--test", str(tmp_path / "test.txt")])  # fmt: skip
    assert capsys.readouterr().out == "birds: 16 training and 4 test images, 2 classes\n"
    assert len(load_set("birds").test) == 4


def test_folders_that_do_not_fit(cub, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        next(masked_images(tmp_path / "nowhere", cub / "segmentations", 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image has a segmentation"):
        next(masked_images(cub / "images", tmp_path / "empty", 8))
    with pytest.raises(DataError, match="20 training and 0 test images"):
        import_folder("birds", cub / "images", cub / "segmentations", 8, test=["nothing"], root=tmp_path)
    for options, message in (
        ({"size": 0}, "size, margin"),
        ({"objects": (5, 2)}, "objects"),
        ({"labels": "name"}, "labels"),
        ({"margin": 0.5}, "size, margin"),
    ):
        with pytest.raises(ValueError, match=message):
            next(masked_images(cub / "images", cub / "segmentations", **{"size": 8} | options))
    picture(cub / "segmentations" / "001.Bird" / "bird_0000.png", np.zeros((5, 5), dtype=np.uint8))
    with pytest.raises(DataError, match="pixels, but"):
        list(masked_images(cub / "images", cub / "segmentations", 8))


@pytest.mark.parametrize("folder", ["images", "segmentations"])
@pytest.mark.parametrize("keep", [0, 20, 60])
def test_damaged_images_are_named(cub, folder, keep):
    path = next((cub / folder).rglob("bird_0003.png"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"bird_0003\.png or its segmentation cannot be read"):
        list(masked_images(cub / "images", cub / "segmentations", 24))


def test_cells_of_masks():
    mask = np.zeros((1, 6, 9), dtype=np.uint8)
    mask[0, 0:2, 0:3] = 5  # one cell of 3 x 3 in whole
    mask[0, 2, 3:6] = 1  # half of another's six pixels
    assert mask_cells(mask, 3).tolist() == [[[True, False, False], [False, True, False], [False] * 3]]
    assert not mask_cells(mask, 3, share=0.6)[0, 1, 1]
    with pytest.raises(ValueError, match="masks, grid"):
        mask_cells(mask, 7)
    with pytest.raises(ValueError, match="share"):
        mask_cells(mask, 3, share=0.0)


def test_masks_of_boxes():
    found = box_masks(np.array([[1.0, 0.0, 3.0, 2.0], [0.4, 0.6, 1.6, 4.0]]), 4, 5)
    assert found[0].tolist() == [[False, True, True, False, False]] * 2 + [[False] * 5] * 2
    assert found[1].sum(0).tolist() == [3, 3, 0, 0, 0]  # the first row's centre, 0.5, lies outside
    with pytest.raises(ValueError, match="boxes"):
        box_masks(np.zeros(4), 4, 5)


def test_central_box_is_the_authors():
    inside = central_cells()
    assert inside.sum() == 144
    assert inside[2:14, 2:14].all()
    with pytest.raises(ValueError, match="grid"):
        central_cells(10)


def test_garments_lie_whole_on_their_backgrounds(monkeypatch):
    cloth = np.zeros((6, 28, 28, 1), dtype=np.uint8)
    cloth[:, 4:24, 8:20] = 180
    split = Split(cloth, np.arange(6, dtype=np.uint8))
    source = ImageSet("fashion_mnist", split, split, tuple("abcdef"), {})
    monkeypatch.setattr(module, "load_set", lambda _: source)
    data = garment_set(20, 10)
    images, masks = data.train.images[..., 0], data.train.extras["masks"] == 1
    assert images.shape == (20, 32, 32)
    assert 0.08 < masks.mean() < 0.2
    assert (images[masks] > 25).all()
    assert images[~masks].max() <= 128  # darkened photographs
    assert len({image.tobytes() for image in images}) == 20
    assert garment_set(20, 10).digests == data.digests
    with pytest.raises(ValueError, match="garment, jitter"):
        garment_set(2, 2, size=16)
