"""People's files: photos of every kind, masks by one rule, what is refused, and masks as polygons."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from demo import world
from model.predict.text_predictor import Segmentation
from tests.make import upright
from util.data import transforms
from util.data.transforms import read_image
from util.errors import UserError
from util.photos import KINDS
from util.photos.polygons import Coco, polygons, rle
from util.photos.reading import ORIENTATION, Photo, box_mask, doubt, find, read_mask, read_photo
from util.photos.results import Results


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_and_masks_follow(orientation: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, mask = upright(rng), np.zeros((40, 60), np.uint8)
    mask[5:20, 30:58] = 255
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # that undoes it: the other quarter turn
    store = (lambda x: x) if method is None else (lambda x: x.transpose(Image.Transpose(method)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    store(Image.fromarray(image)).save(tmp_path / "a.png", exif=exif)
    found = read_photo(tmp_path / "a.png")
    assert np.array_equal(found.image, image)
    Image.fromarray(mask).save(tmp_path / "upright.png")
    assert np.array_equal(read_mask(tmp_path / "upright.png", found), mask // 255)
    if orientation > 4:  # otherwise the size does not tell
        store(Image.fromarray(mask)).save(tmp_path / "stored.png")
        assert np.array_equal(read_mask(tmp_path / "stored.png", found), mask // 255)
        found = read_photo(Image.fromarray(image.transpose(1, 0, 2)))
        with pytest.raises(UserError, match="60 x 40 pixels, its photo .* 40 x 60"):
            read_mask(tmp_path / "upright.png", found)


def test_kinds_of_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = upright(rng)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:10] = 0
    over_white = image.copy()
    over_white[:10] = 255
    kinds = {
        "rgb.png": (Image.fromarray(image), image),
        "grey.png": (Image.fromarray(grey), np.repeat(grey[..., None], 3, 2)),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 256 + 77), np.repeat(grey[..., None], 3, 2)),
        "alpha.png": (Image.fromarray(np.dstack([image, alpha])), over_white),
        "palette.gif": (Image.fromarray(image).quantize(256), image),
        "cmyk.tif": (Image.fromarray(image).convert("CMYK"), image),
        "line.png": (Image.fromarray(grey > 128), np.repeat(((grey > 128) * np.uint8(255))[..., None], 3, 2)),
    }
    for name, (stored, expected) in kinds.items():
        stored.save(tmp_path / name)
        assert np.abs(read_photo(tmp_path / name).image.astype(int) - expected).max() <= 2, name
    frames_ = [Image.fromarray(image), Image.fromarray(255 - image)]
    frames_[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames_[1:], lossless=True)
    assert np.array_equal(read_photo(tmp_path / "moving.webp").image, image)  # the first frame


def test_a_mask_with_object_and_background_exchanged_is_told() -> None:
    mask = np.ones((40, 60), np.uint8)
    mask[10:20, 20:30] = 0
    assert "exchanged" in doubt(mask) and "exchanged" in doubt(np.where(mask == 0, 255, mask))
    close = np.zeros((40, 60), np.uint8)
    close[2:, 3:] = 1  # a thing that fills the photo
    assert doubt(1 - mask) == doubt(close) == ""


def test_kinds_of_masks(tmp_path: Path) -> None:
    found = read_photo(np.zeros((4, 6, 3), np.uint8))
    values = np.zeros((4, 6), np.uint8)
    values[1, 1:5], values[2, 2], values[3, 3] = 1, 7, 255
    both, ignored = (values != 0).astype(np.uint8), np.where(values == 255, 255, values != 0).astype(np.uint8)
    opaque = np.dstack([np.zeros((4, 6, 3), np.uint8), both * 255])
    palette = Image.fromarray(values, "P")
    palette.putpalette(world.palette())
    for name, stored, expected in (
        ("grey", Image.fromarray(values), both), ("palette", palette, ignored), ("bit", Image.fromarray(values != 0), both),
        ("colour", Image.fromarray(np.dstack([values, 0 * values, 0 * values])), both), ("alpha", Image.fromarray(opaque), both),
        ("sixteen", Image.fromarray(values.astype(np.uint16)), both),
    ):  # fmt: skip
        stored.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", found), expected), name
    assert np.array_equal(read_mask(values.astype(np.int64), found), both)
    Image.fromarray(values).save(tmp_path / "mask.jpg")
    with pytest.raises(UserError, match="lossless"):
        read_mask(tmp_path / "mask.jpg", found)
    with pytest.raises(UserError, match="empty"):
        read_mask(np.zeros((4, 6), bool), found)
    assert box_mask([[1, 1, 3, 5], [-1, 0, 1, 1]], found).tolist() == [[1, 0, 0, 0, 0, 0], *[[0, 1, 1, 0, 0, 0]] * 3]
    for box in ([1, 1, 3, 9], [-5, 0, 1, 1]):  # x, y, width, height, perhaps, or of another size of the photo
        with pytest.raises(UserError, match="reaches far outside"):
            box_mask([box], found)
    for box in ([3, 1, 3, 2], [6, 0, 9, 2], [-9, 0, -1, 2], [1, 2, 3], [0, 0, float("nan"), 2]):
        with pytest.raises(UserError, match="box"):
            box_mask([box], found)


def test_what_is_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    Image.fromarray(upright(np.random.default_rng(2), (300, 300))).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, message in (("text.jpg", "not an image"), ("cut.png", "not a readable image"), ("none.png", "no such file"),
                          ("", "no such file"), ("float.tif", "floating point")):  # fmt: skip
        with pytest.raises(UserError, match=message) as raised:
            read_photo(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
    monkeypatch.setattr("util.photos.reading.MAX_PIXELS", 80_000)
    with pytest.raises(UserError, match="decompression bomb"):
        read_photo(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        read_photo(tmp_path / "whole.png")
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4), 7):
        with pytest.raises(UserError, match="uint8|expected"):
            read_photo(array)


def test_polygons_give_the_mask_back() -> None:
    rng = np.random.default_rng(4)
    masks = [rng.random(rng.integers(1, 30, 2)) < share for share in (0.2, 0.5, 0.6, 0.9, 1.0) for _ in range(12)]
    masks += [cv2.blur(rng.random((60, 50)), (7, 7)) > 0.5 for _ in range(5)]
    ring = np.ones((9, 9), bool)
    ring[2:7, 2:7], ring[4, 4] = False, True
    for mask in [*masks, ring]:
        data = Coco(["star"])
        data.add("a.jpg", mask.shape, [("star", mask, 0.5)])
        record = data.content()
        assert bool(record["annotations"]) == mask.any()
        for made in record["annotations"]:
            runs = coco_mask.frPyObjects(made["segmentation"], *mask.shape)
            assert np.array_equal(coco_mask.decode(coco_mask.merge(runs)).astype(bool), mask)
            assert made["area"] == mask.sum() and made["bbox"] == coco_mask.toBbox(coco_mask.merge(runs)).tolist()
    assert len(polygons(ring)) == 3 and all(len(polygon) >= 4 for polygon in polygons(ring))


def test_exports_of_other_tools(tmp_path: Path) -> None:
    """Runs are those of pycocotools; YOLO and Label Studio name corners as shares of the sides; files name the photo alone."""
    rng = np.random.default_rng(5)
    for share in (0, 0.02, 0.5, 0.98, 1):
        mask = rng.random(rng.integers(1, 40, 2)) < share
        assert rle(mask) == {"size": [*mask.shape],
                             "counts": coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()}  # fmt: skip
    mask = np.zeros((40, 50), bool)
    mask[10:20, 5:30] = True
    made = {}
    for kind in KINDS:
        results = Results(tmp_path / kind, kind, ["house"], {})
        results.add("a", Photo(np.zeros((40, 50, 3), np.uint8), "photos/a.jpg"), mask, mask.astype(np.float32), 0.1)
        results.add("b", Photo(np.zeros((40, 50, 3), np.uint8), "photos/b.jpg"), mask & False, mask * 0.1, 0.1)
        results.close()
        made[kind] = {str(p.relative_to(tmp_path / kind)): p.read_text() for p in (tmp_path / kind).rglob("*.*")
                      if p.suffix in (".json", ".txt", ".yaml") and p.name != "scores.json"}  # fmt: skip
    assert json.loads(made["coco-rle"]["coco.json"])["annotations"][0]["segmentation"] == rle(mask)
    assert made["yolo"].keys() == {"labels/a.txt", "labels/b.txt", "data.yaml"} and made["yolo"]["labels/b.txt"] == ""
    cls, *corners = made["yolo"]["labels/a.txt"].split()
    assert cls == "0" and {*map(float, corners[::2])} == {0.1, 0.6} and {*map(float, corners[1::2])} == {0.25, 0.5}
    first, second = json.loads(made["label-studio"]["label-studio.json"])
    assert first["data"]["image"].endswith("?d=a.jpg") and not second["predictions"][0]["result"]
    assert {tuple(p) for p in first["predictions"][0]["result"][0]["value"]["points"]} == {(10, 25), (60, 25), (60, 50), (10, 50)}


def test_photos_of_phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert find([str(tmp_path)]) == [path]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"IMG_1\.HEIC: HEIC.*pip install pillow-heif"):
            read_photo(path)
    heif = pytest.importorskip("pillow_heif")
    transforms._formats.cache_clear()  # of the time without the package
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(path, quality=95)
    assert read_photo(path).hw == (48, 64) and np.abs(read_photo(path).image[20, 20] - np.array([200, 30, 30])).max() < 12


def test_results_for_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((40, 50), bool)
    mask[10:20, 5:30] = True
    found = Segmentation(mask, np.where(mask, 0.75, 0.1).astype(np.float32), {}, 0.1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "supervision", None)
        with pytest.raises(UserError, match="pip install supervision"):
            found.detections()
    pytest.importorskip("supervision")
    made = found.detections(class_id=3)
    assert made.xyxy.tolist() == [[5, 10, 30, 20]] and made.area.tolist() == [250] and made.confidence[0] == pytest.approx(0.75)
    assert made.class_id.tolist() == [3] and len(Segmentation(mask & False, found.score, {}, 0.1).detections()) == 0


def test_masks_that_show_another_meaning(tmp_path: Path) -> None:
    """Soft edges, opaque colours and palettes: what the picture shows, or a refusal."""
    true = np.zeros((120, 160), np.uint8)
    true[30:80, 40:100] = 255
    photo = read_photo(np.zeros((120, 160, 3), np.uint8))
    half = cv2.resize(true, (80, 60), interpolation=cv2.INTER_AREA)
    brush = cv2.fillPoly(np.zeros((120, 160), np.uint8), [np.array([[400, 300], [1003, 350], [700, 799]])], 200, cv2.LINE_AA, 3)
    softs = {"blur": cv2.GaussianBlur(true, (15, 15), 0), "wide": cv2.GaussianBlur(true, (31, 31), 0), "brush": brush,
             "resized": cv2.resize(half, (160, 120), interpolation=cv2.INTER_LINEAR)}  # fmt: skip
    code = cv2.imencode(".jpg", cv2.blur(true, (2, 2)), [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    softs["JPEG"] = cv2.imdecode(code, cv2.IMREAD_GRAYSCALE)
    for name, soft in softs.items():
        expected = soft >= 128
        opaque = np.dstack([soft, soft, soft, np.full_like(soft, 255)])
        kinds = (soft, Image.fromarray(soft), Image.fromarray(opaque), Image.fromarray(opaque).convert("LA"),
                 Image.fromarray(np.dstack([soft, 0 * soft, 0 * soft])), Image.fromarray(soft.astype(np.uint16) * 257),
                 Image.fromarray(soft.astype(np.uint16) * 16 + soft // 16))  # the last: 12 bits
        for number, kind in enumerate(kinds):
            found = read_mask(kind, photo) == 1
            assert (found != expected).mean() < 0.002, (name, number)
    with pytest.raises(UserError, match="nowhere brighter than"):
        read_mask(softs["blur"] // 3, photo)
    with pytest.raises(UserError, match="floating point"):
        read_mask(Image.fromarray(softs["blur"] / np.float32(255)), photo)

    objects = np.kron(np.arange(48).reshape(6, 8) * 5, np.ones((20, 20))).astype(np.uint8)  # instances, side by side
    for kind in (objects, Image.fromarray(objects), Image.fromarray(objects.astype(np.uint16) * 7)):
        assert np.array_equal(read_mask(kind, photo), objects != 0)

    clear = Image.fromarray((true == 0).astype(np.uint8), "P")
    clear.putpalette([0, 0, 0, 255, 255, 255])
    clear.save(tmp_path / "clear.png", transparency=1)
    assert np.array_equal(read_mask(tmp_path / "clear.png", photo), true == 255)  # what is opaque, in a palette too
    for colours in ([255, 255, 255, 0, 0, 0], [90, 20, 0, 200, 0, 0], [0, 0, 0, 255, 255, 255, 0, 0, 0]):
        palette = Image.fromarray((true == 0) + np.uint8(len(colours) > 6), "P")
        palette.putpalette(colours)
        with pytest.raises(UserError, match="must be black"):
            read_mask(palette, photo)
    grey = Image.fromarray(softs["blur"]).convert("RGB").quantize(200, dither=Image.Dither.NONE)
    order = np.argsort(np.reshape(grey.getpalette(), (-1, 3)).sum(1))
    order[1:] = order[:0:-1]  # black first, then white to dark
    read = read_mask(grey.remap_palette(order.tolist()), photo)
    assert ((read == 1) != (softs["blur"] >= 128)).mean() < 0.002


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_sixteen_bits_that_are_not_filled(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(5).integers(0, 2**bits, (40, 60, 3)).astype(np.uint16)
    for name, content in (("grey.png", values[..., 0]), ("colour.png", values), ("colour.tif", values)):
        cv2.imwrite(str(tmp_path / name), content)
        for read in (read_photo, read_image) if name != "colour.tif" else (read_image,):
            with pytest.raises(UserError, match=rf"{name}.*16 bits whose values have \d+: .*nearly black"):
                read(tmp_path / name)
        cv2.imwrite(str(tmp_path / name), content << (16 - bits))
        assert np.array_equal(read_image(tmp_path / name)[..., 0], ((content << (16 - bits)) >> 8).reshape(40, 60, -1)[..., -1])
