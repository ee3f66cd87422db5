"""Folders of one's own as tools and people leave them: read as a run reads them, or named."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.make.folders import COLOURS, label_of, prepare
from util.data.index import read_list
from util.data.transforms import SUFFIXES, read_image
from util.errors import UserError
from util.photos.reading import find, others
from util.prepare.custom import sources


def tiff(array: np.ndarray, compression: int = 5) -> Callable[[Path], object]:
    return lambda path: cv2.imwrite(str(path), array, [cv2.IMWRITE_TIFF_COMPRESSION, compression])


GREY = np.random.default_rng(0).integers(1, 255, (64, 64)).astype(np.uint8)
UNREADABLE = {  # ending, how it is written, what is said
    "float": (".tif", lambda path: Image.fromarray(GREY / np.float32(255)).save(path), "not a readable image|no fixed white"),
    "colour float": (".tif", tiff(np.dstack([GREY] * 3).astype(np.float32)), "not a readable image|no fixed white"),
    "zstd": (".tif", lambda path: Image.fromarray(GREY).save(path, compression="zstd"), "not a readable image"),
    "TGA": (".png", lambda path: Image.fromarray(GREY).save(path, format="TGA"), "not a readable image"),
    "ICO": (".png", lambda path: Image.fromarray(GREY).save(path, format="ICO"), "not a readable image"),
    "12 bits": (".png", lambda path: Image.fromarray(GREY * np.uint16(16)).save(path), "16 bits whose values have 12"),
    "empty": (".jpg", lambda path: path.write_bytes(b""), "not a readable image"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_the_check_reads_as_a_run_does(own: Path, kind: str) -> None:
    ending, write, says = UNREADABLE[kind]
    (own / "images/im05.jpg").unlink()
    write(path := own / f"images/im05{ending}")
    for read in (lambda: read_image(path), lambda: prepare(own)):
        with pytest.raises(UserError, match=rf"im05\{ending}: .*({says})"):
            read()
    assert not Path("lists").exists()


def test_copies_in_both_parts_are_told(own: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(3):
        shutil.copy(own / f"images/im0{i}.jpg", own / f"images/copy{i}.jpg")
        shutil.copy(own / f"masks/im0{i}.png", own / f"masks/copy{i}.png")
    Image.fromarray(read_image(own / "images/im03.jpg").astype(np.uint8)).save(own / "images/other.png")  # the same pixels
    shutil.copy(own / "masks/im03.png", own / "masks/other.png")
    (own / "train.txt").write_text("".join(f"im{i:02}\n" for i in range(16)))
    (own / "val.txt").write_text("copy0\ncopy1\nother\n" + "".join(f"im{i:02}\n" for i in range(16, 32)))
    prepare(own)
    told = r"warning: 3 images of validation .* same image .*: images/copy0\.jpg \(images/im00\.jpg\)"
    assert re.search(told, capsys.readouterr().out)
    (own / "val.txt").write_text("".join(f"im{i:02}\n" for i in range(16, 32)))
    prepare(own)
    assert "same image" not in capsys.readouterr().out


def test_what_may_be_a_mistake_is_told(own: Path, capsys: pytest.CaptureFixture) -> None:
    """A palette that shows the background in white, a phone's photo with a mask of the size as stored."""
    mask = Image.fromarray(label_of(5), "P")
    mask.putpalette([255, 255, 255, 0, 0, 0])
    mask.save(own / "masks/im05.png")
    exif = Image.Exif()
    exif[sources.ORIENTATION] = 6
    Image.new("RGB", (80, 64), "red").save(own / "images/im06.jpg", exif=exif)
    Image.fromarray(np.pad(label_of(6), ((0, 0), (0, 16)))).save(own / "masks/im06.png")
    exif[sources.ORIENTATION] = 0  # of cameras that do not know
    Image.new("RGB", (64, 64), "blue").save(own / "images/im07.jpg", exif=exif)
    prepare(own)
    shown = capsys.readouterr().out
    assert re.search(r"warning: 1 images have an EXIF note .*im06\.jpg\n", shown), shown
    assert re.search(r"warning: 1 masks have a palette whose entry 0 is not black.*im05\.jpg\n", shown), shown


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_texts_that_are_not_utf8(own: Path, encoding: str) -> None:
    lines = "".join(f"{name.replace('fish', 'küken')}:{r},{g},{b}::\n" for name, (r, g, b) in COLOURS.items())
    for name, content in (("classes.txt", "küken\nauto\n"), ("folds.yaml", "split0: [küken]\n"), ("labelmap.txt", lines)):
        (own / name).write_bytes(content.encode(encoding))
        with pytest.raises(UserError, match=name):
            prepare(own)
        (own / name).unlink()
        (own / "classes.txt").write_text("star\nfish\ntree\nhouse\n")
    prepare(own)
    Path("config/mine/BAM.yaml").write_bytes("# mit Gefühl\n".encode(encoding))
    prepare(own)  # yours: left alone


def test_hidden_and_strange_entries(own: Path, capsys: pytest.CaptureFixture) -> None:
    """What a Mac leaves on a stick is passed over; what would block whoever reads it is not opened."""
    for folder, ending in (("images", "jpg"), ("masks", "png")):
        (own / f"{folder}/._im05.{ending}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (own / "images/.DS_Store").touch()
    os.mkfifo(own / "images/pipe.jpg")
    for ending in SUFFIXES:
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
        picture.save(own / f"images/x{ending[1:]}{ending}")
        Image.fromarray(label_of(3)).save(own / f"masks/x{ending[1:]}.png")
    prepare(own)
    assert "no PNGs: pipe.jpg\n" in capsys.readouterr().out
    listed = {Path(image).name for part in ("train", "val") for image, _ in read_list(f"lists/mine/{part}.txt")}
    assert len(listed) == 32 + len(SUFFIXES) and {path.name for path in find([str(own / "images")])} == listed
    assert others([str(own / "images")]) == [] and len(find([str(own / "images/._im05.jpg")])) == 1  # asked for by its name
