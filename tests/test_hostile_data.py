"""Data made to do harm: archives, annotations, configs, pictures. Nothing is run, nothing is written elsewhere, nothing hangs.

Whatever is wrong ends in a UserError that names the file. Weights: test_hostile.py.
"""

import base64
import io
import json
import os
import re
import signal
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from demo.web import session as web
from util.config import load_config
from util.data.transforms import image_hw, read_image, read_label
from util.errors import UserError
from util.files import save_json
from util.photos.reading import frames, read_mask, read_photo
from util.pool import parallel
from util.prepare.archives import unpack
from util.prepare.custom import check, sources
from util.score.statistics import load_result

# ---- archives and annotations of data sets


def archive(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", headers: dict[str, str] | None = None) -> bytes:
    """A tar archive of one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.pax_headers = kind, link, headers or {}
        member.size = 1 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"x"))
    return file.getvalue()


SPARSE = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,1"}


@pytest.mark.parametrize(("content", "says"), [
    *((archive(name), "leads out") for name in ("../x/a", "x/../../x/a", "/x/a", "/etc/x/a", "x/..")),
    *((archive("x/a", kind, "/etc/passwd"), "link or device") for kind in (
        tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)),
    (archive("x/a", headers={**SPARSE, "GNU.sparse.size": str(2**27)}), "would be 134,217,728 bytes"),
    (archive("x/a", headers={"size": "-5"}), "would be -5 bytes|damaged"),
    (archive("x/a", headers={**SPARSE, "GNU.sparse.size": "abc"}), "damaged"),
    (archive("x/a")[:512], "damaged"), (b"\x1f\x8b\x08" + bytes(50), "damaged"), (b"no archive", "damaged"), (b"", "damaged"),
], ids=range(18))  # fmt: skip
def test_hostile_archives(tmp_path: Path, content: bytes, says: str) -> None:
    """Nothing appears, neither within the folder nor beside it."""
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.tar: .*({says})"):
        unpack(tmp_path / "a.tar", tmp_path / "out/x", r"x/[\w.-]+")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]


def test_a_name_decides_nothing_but_the_ending(tmp_path: Path) -> None:
    for name in ("x/a", "./x/a", "y/z/x/a", "C:\\x/a", "~/x/a"):
        (tmp_path / "a.tar").write_bytes(archive(name))
        unpack(tmp_path / "a.tar", tmp_path / "out", r"x/[\w.-]+")
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {"a.tar", "out/x/a"}


POLYGONS = {
    "beyond any image": [[1e9, 0, 1e9, 1e9, 0, 1e9]], "negative": [[-1e9, 0, 5, 5, 0, 5]], "endless": [[0, 0, 6e4, 6e4] * 99],
    "where five times it leaves an integer": [[429496729, 0, 429496730, 1, 429496729, 2]],
    "not finite": [[float("nan"), 1, 2, 3, 4, 5]], "too large for a float": [[10**400, 1, 2, 3, 4, 5]], "text": "abc",
    "nested": [[[1, 2]]], "long run": {"counts": [10**30], "size": [10, 10]}, "back": {"counts": [-1, 101], "size": [10, 10]},
}  # fmt: skip


@pytest.mark.parametrize("shape", POLYGONS)
def test_hostile_polygons(tmp_path: Path, shape: str) -> None:
    """pycocotools crashes, or hangs, on numbers that it has no memory for."""
    coco = pytest.importorskip("util.prepare.coco")
    names = coco.read_class_names(coco.CLASS_FILE).names
    content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 10}],
               "annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": POLYGONS[shape]}],
               "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)]}  # fmt: skip
    (tmp_path / "instances_train2014.json").write_text(json.dumps(content))
    (image,), _ = coco.read_annotations(tmp_path / "instances_train2014.json", "train2014")
    with pytest.raises(UserError, match=r"instances_train2014\.json: annotation 7: "):
        coco.paint(tmp_path / "instances_train2014.json", image)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, f"[{'9' * 5000}]", "\0", "\ud800", "", '{"a":'], ids=range(7))
def test_hostile_json(tmp_path: Path, text: str) -> None:
    coco = pytest.importorskip("util.prepare.coco")
    path = tmp_path / "train2014.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (load_result, lambda p: coco.read_annotations(p, "train2014")):
        with pytest.raises(UserError, match=r"train2014\.json.*JSON"):
            read(path)


@pytest.mark.parametrize("rows", [5, True, {"1": 2}, "abc", ["1 2"], [5], [f"1 2 3 4 {10**30} 6 7"], ["9" * 5000]], ids=range(8))
def test_malformed_reports(tmp_path: Path, rows: object) -> None:
    columns = "seed number class intersection union background_intersection background_union"
    report = {"protocol_hash": "a", "protocol": {}, "episodes": {"hash": "x", "columns": columns, "rows": rows}}
    save_json(tmp_path / "report.json", report)
    with pytest.raises(UserError, match=r"report\.json: the report's .*malformed"):
        load_result(tmp_path / "report.json")


# ---- configs and pictures


def test_a_config_of_a_billion_values(tmp_path: Path) -> None:
    """Aliases of aliases take no room until they are printed."""
    nested = ", ".join(f"&k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 10)}]" for i in range(6))
    for value in (f"[{nested}]", "[" * 50 + "]" * 50, "x" * 1900):
        (tmp_path / "fold.yaml").write_text(f"Train: {{shot: {value}}}")
        with pytest.raises(UserError, match=r"fold\.yaml: Train\.shot = .*: expected int") as caught:
            load_config(tmp_path / "fold.yaml")
        assert len(str(caught.value)) < 500
    canary = tmp_path / "canary"
    for text in (f"Train: {{shot: !!python/object/apply:os.system ['touch {canary}']}}", "!!python/object/new:os.system [true]"):
        (tmp_path / "fold.yaml").write_text(text)
        with pytest.raises(UserError, match=r"fold\.yaml is no valid YAML"):
            load_config(tmp_path / "fold.yaml")
    assert not canary.exists()


def png(width: int, height: int, colour: int) -> bytes:
    """Grey (0) or RGB (2), of 8 bits, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour", [0, 2])
@pytest.mark.parametrize("size", [(20_000, 20_000), (200_000, 200_000), (2**31 - 1, 2**31 - 1)])
def test_picture_bombs(tmp_path: Path, size: tuple[int, int], colour: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, colour))
    for read in (read_image, read_label, image_hw):
        with pytest.raises(UserError, match=r"bomb\.png: not a readable (image|label) \(.*decompression bomb"):
            read(path)


def test_picture_wider_than_opencv_allows(tmp_path: Path) -> None:
    path = tmp_path / "wide.bmp"
    Image.new("L", (2**20 + 1, 1)).save(path)
    assert image_hw(path) == (1, 2**20 + 1)
    with pytest.raises(UserError, match=r"wide\.bmp: not a readable image"):
        read_image(path)


def read_or_die(name: str) -> int:
    if name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    return len(name)


def test_a_file_that_crashes_its_reader_does_not_hang() -> None:
    """scipy's reader of .mat files does crash on some damaged ones."""
    names = [f"{i}" for i in range(40)]
    assert list(parallel(read_or_die, names, workers=2, chunk=3)) == [len(name) for name in names]
    with pytest.raises(UserError, match="a worker process died"):
        list(parallel(read_or_die, [*names, "crash", *names], workers=2, chunk=3))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow goes by content: an EPS of any name would start Ghostscript, here a stand-in that leaves a trace."""
    trace, program, picture = tmp_path / "trace", tmp_path / "bin/gs", tmp_path / "a.png"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    picture.write_bytes(EPS)
    with Image.open(picture) as image, pytest.raises(OSError, match="image"):
        image.load()
    assert trace.exists()  # so it does start
    trace.unlink()

    photo = read_photo(Image.new("RGB", (4, 4)))
    session = web.Session(support=web.Support(photo, photo))
    painted = f"data:image/png;base64,{base64.b64encode(EPS).decode()}"
    for read in (read_image, read_label, image_hw, read_photo, lambda path: read_mask(path, photo),
                 lambda path: sources.convert([(path, tmp_path / "label.png")], {}), lambda path: list(frames(path, 1)),
                 lambda path: web.open_support(web.Session(), str(path)), lambda path: web.open_mask(session, str(path)),
                 lambda path: web.read_painted(painted, photo)):  # fmt: skip
        with pytest.raises(UserError):
            read(picture)
    looked = check._look(2, sources.Pair("", picture, picture, ("a.png", "a.png")))
    assert isinstance(looked, str) and "a.png" in looked and not trace.exists()


def test_pictures_are_opened_in_one_place() -> None:
    root = Path(__file__).resolve().parents[1]
    files = [path for folder in ("util", "model", "demo") for path in (root / folder).rglob("*.py")] + list(root.glob("*.py"))
    found = [f"{path.name}: {line.strip()}" for path in files for line in path.read_text().splitlines()
             if re.search(r"\bImage\.open\(|\bimread\(", line)]  # fmt: skip
    assert len(found) == 1 and "formats=" in found[0], found
