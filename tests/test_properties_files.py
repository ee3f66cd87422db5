"""Properties of everything that reads a user's file: what is sought comes out, or a UserError that names the file."""

import dataclasses
import io
import math
import os
import re
import time
import types
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.few_shot.hdmnet import HDMNet
from tests.make.runs import check
from util.config import Config, load_config
from util.data.folds import read_class_names, read_folds
from util.data.index import _annotated, read_list, scan
from util.data.transforms import image_hw, read_image, read_label
from util.errors import UserError

NAMES = read_class_names(Path(__file__).resolve().parents[1] / "lists/pascal/classes.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# ---- configs

SECTIONS = {name: type(section) for name, section in vars(Config(Method=HDMNet.Options())).items()}
KEYS = [(section, key.name) for section, kind in SECTIONS.items() for key in dataclasses.fields(kind)]
# What PyYAML fails on with errors that are not its own, what is too long or too deep, and what no number may be.
AWKWARD = ["2024-13-45", "2001-01-01 25:61:61", "!!int x", "!!float a", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}",
           "!!omap [a]", "!!python/name:os.system", "&a [*a]", "? [a]", "[[[", "[" * 3000, "9" * 5000, f"0x{'f' * 5000}",
           f"1{'0' * 400}", ".inf", ".nan", "-.inf", "1e999", "1e-4", "[1, 2]", "[1, a]", "{a: b}", "~", "x\0y"]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(AWKWARD), st.none(), st.booleans(), st.integers(-3, 999), st.floats(), st.text(max_size=8),
    st.sampled_from(["present", "adamw", "paper", "mask", "bf16", "strict", "coco", "[vtp, vvp]", "[321]", "0.5", "1", "none"]),
)  # fmt: skip
NAMED = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.tuples(st.text(max_size=5), st.text(max_size=5)))


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a type hint."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(v, arguments[0]) for v in value)
    return value is None if kind is types.NoneType else type(value) is kind and (kind is not float or math.isfinite(value))


def check_config(folder: Path, path: Path, overrides: list[str]) -> bool:
    """Whether it loads; then its types are right and what is written down of it loads to the same."""
    try:
        config = load_config(path, "HDMNet", overrides, HDMNet.Options)
    except UserError:
        return False
    for section, kind in SECTIONS.items():
        values = getattr(config, section)
        assert all(fits(getattr(values, key), hint) for key, hint in typing.get_type_hints(kind).items())
    (folder / "again.yaml").write_text(config.to_yaml())
    assert load_config(folder / "again.yaml", options=HDMNet.Options) == config
    return True


@check(200)
@given(NAMED, VALUES, st.booleans())
def test_any_override(folder: Path, name: tuple[str, str], value: object, in_file: bool) -> None:
    path = folder / "config.yaml"
    path.write_bytes(f"{name[0]}: {{{name[1]}: {value}}}".encode("utf-8", "replace") if in_file else b"")
    check_config(folder, path, [] if in_file else [f"{name[0]}.{name[1]}={value}"])


@pytest.mark.slow
def test_awkward_and_plain_overrides(folder: Path) -> None:
    """One key of every type with every awkward value; and that sound values do load."""
    (folder / "empty.yaml").write_text("")
    for key in ("Train.shot", "Train.base_lr", "Train.crop", "Train.optimizer", "Train.data_set", "Method.priors", "no.key"):
        for value in AWKWARD:
            check_config(folder, folder / "empty.yaml", [f"{key}={value}"])
    for override in ("Train.base_lr=1e-4", "Method.priors=[vtp]", "CLIP.clip_path=ö ü", "Train.data_set=", "Train.epochs=7"):
        assert check_config(folder, folder / "empty.yaml", [override])


LINES = ["Train:", "Train: {shot: 2}", " shot: 1", "  shot: 1", "extends: x.yaml", "extends: .", "- a", "#", "&a", "*a", "---",
         "...", "%YAML 1.1", "!!map", "{", "}", "|", "\t", "<<: *a", 'extends: "a\\0b"', f"extends: {'a' * 300}",
         "extends: config.yaml"]  # fmt: skip


@check(100)
@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(LINES), max_size=5).map(lambda x: "\n".join(x).encode())))
def test_any_config_file(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    check_config(folder, path, [])


@pytest.mark.parametrize("text", ["Train: {shot: 1}\nTrain: {epochs: 2}", "Train:\n  shot: 1\n  shot: 1"])
def test_nothing_is_dropped(folder: Path, text: str) -> None:
    """YAML would let the second section replace the first without a word."""
    (folder / "twice.yaml").write_text(text)
    with pytest.raises(UserError, match=r"twice\.yaml is no valid YAML: '(Train|shot)' is there twice"):
        load_config(folder / "twice.yaml")


# ---- lists


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    """A data root with one pair, a link that leaves it, and one that goes nowhere."""
    root = folder / "root"
    (root / "i").mkdir(parents=True)
    (folder / "outside").mkdir()
    Image.new("RGB", (9, 8)).save(root / "i/a.jpg")
    Image.fromarray(np.full((8, 9), 3, np.uint8)).save(root / "i/a.png")
    Image.fromarray(np.full((8, 9), 4, np.uint8)).save(folder / "outside/b.png")
    (root / "elsewhere").symlink_to(folder / "outside", target_is_directory=True)
    (root / "loop.png").symlink_to("loop.png")
    return root


STRANGE = ["i", "i/a.jpg/x", "loop.png", "a" * 300, "a\0b", "../x", "i/../../x", "/etc/passwd", "C:/x", "C:x", r"i\a.jpg",
           r"\\host\x", "//host/x", ".", "..", "~", "./i/a.png", "i//a.png", "con", "\u00a0", "x\u2028y", "ä b"]  # fmt: skip
PATHS = st.one_of(st.sampled_from(["i/a.jpg", "i/a.png", "elsewhere/b.png"]), st.sampled_from(STRANGE), st.text(max_size=6))


def check_list(folder: Path, root: Path, content: bytes) -> None:
    """Relative paths below the root, in order, each image once; otherwise the line is named."""
    path = folder / "list.txt"
    path.write_bytes(content)
    try:
        pairs = read_list(path)
    except UserError as error:
        assert re.match(rf"{re.escape(str(path))}(:\d+: |: the list is empty|: not a text file in UTF-8)", str(error))
        return
    fields = path.read_text("utf-8-sig").split()
    assert [name for pair in pairs for name in pair] == fields and len({image for image, _ in pairs}) == len(pairs)
    assert all(os.path.normpath(root / name).startswith(str(root)) for name in fields)
    try:
        records = scan(root, path, NAMES, folder / "cache")
    except UserError as error:
        assert any(name in str(error) for name in fields)
    else:
        assert [(r.image, r.label) for r in records] == pairs


@check(150)
@given(st.one_of(st.lists(st.lists(PATHS, min_size=1, max_size=3).map(" ".join), max_size=4), st.binary(max_size=30)))
def test_any_list(folder: Path, root: Path, lines: list[str] | bytes) -> None:
    check_list(folder, root, lines if isinstance(lines, bytes) else "\n".join(lines).encode("utf-8", "replace"))


@pytest.mark.parametrize("name", STRANGE)
def test_strange_paths(folder: Path, root: Path, name: str) -> None:
    check_list(folder, root, f"{name} i/a.png\n".encode())
    check_list(folder, root, f"i/a.jpg i/a.png\nelsewhere/b.jpg {name}\n".encode())
    check_list(folder, root, f"i/a.jpg {name}\n".encode())


def test_links_may_leave_the_root(folder: Path, root: Path) -> None:
    """Data sets are linked to: a link is the user's own doing, `..` in a list is not."""
    (folder / "linked.txt").write_text("i/a.jpg elsewhere/b.png\n")
    assert scan(root, folder / "linked.txt", NAMES, folder / "cache")[0].pixels == {4: 72}


def test_damaged_cache_is_made_again(folder: Path, root: Path) -> None:
    (folder / "cached.txt").write_text("i/a.jpg i/a.png\n")
    first = scan(root, folder / "cached.txt", NAMES, folder / "own")
    (cache,) = (folder / "own").iterdir()
    whole = cache.read_text()
    for damage in ("", whole[:-9], "[" * 100_000, "[5]", "[]", "{}", whole.replace("pixels", "pixel"), whole.replace("3", "x")):
        cache.write_text(damage)
        assert scan(root, folder / "cached.txt", NAMES, folder / "own") == first and cache.read_text() == whole


# ---- VOC XML

TAGS = ["<annotation>", "</annotation>", "<object>", "</object>", "<name>", "</name>", "cat", "dog", "unicorn", "&a;",
        "<object/>", "<!DOCTYPE a [<!ENTITY a 'cat'>]>", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'>", "<![CDATA[", "]]>", "<!--",
        "\0", "&#0;", *(f"<?xml version='1.0' encoding='{name}'?>" for name in ("utf-7", "shift_jis", "x"))]  # fmt: skip


@check(200)
@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(TAGS), max_size=10).map(lambda tags: "".join(tags).encode())))
def test_any_xml(folder: Path, content: bytes) -> None:
    path = folder / "any.xml"
    path.write_bytes(content)
    try:
        found = _annotated(path, NAMES.names)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert set(found) <= {8, 12} and list(found) == sorted(set(found))  # cat, dog


@check(50)
@given(st.lists(st.sampled_from([*NAMES.names, "unicorn"]), max_size=6))
def test_objects_of_an_xml(folder: Path, names: list[str]) -> None:
    path = folder / "objects.xml"
    path.write_text(f"<a>{''.join(f'<object><name>{n}</name><part><name>x</name></part></object>' for n in names)}</a>")
    if "unicorn" in names:
        with pytest.raises(UserError, match=r"objects\.xml: object names \['unicorn'\]"):
            _annotated(path, NAMES.names)
    else:
        assert _annotated(path, NAMES.names) == tuple(sorted({NAMES.names.index(n) + 1 for n in names}))


LAUGHS = "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(12))


@pytest.mark.parametrize("text", [
    f"<!DOCTYPE l [<!ENTITY a0 'ha'>{LAUGHS}]><l>&a12;</l>",  # a billion laughs
    f"<!DOCTYPE l [<!ENTITY a '{'x' * 200_000}'>]><l>{'&a;' * 20_000}</l>",  # quadratic
    "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a><object><name>&x;</name></object></a>",
    "<a>" * 50_000, "<annotation><object><name>cat</name>",
], ids=["laughs", "quadratic", "outside", "deep", "truncated"])  # fmt: skip
def test_hostile_xml(folder: Path, text: str) -> None:
    (folder / "hostile.xml").write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"hostile\.xml: not a readable VOC annotation"):
        _annotated(folder / "hostile.xml", NAMES.names)
    assert time.monotonic() - start < 20


# ---- images and labels


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
RGB, INDICES = Image.fromarray(PIXELS), Image.fromarray(PIXELS).quantize(20)
FILES = {
    **{format: encoded(RGB, format) for format in ("png", "jpeg", "bmp", "webp", "tiff", "jpeg2000")},
    "palette": encoded(INDICES, "png"), "gif": encoded(INDICES, "gif"), "progressive": encoded(RGB, "jpeg", progressive=True),
    "grey": encoded(RGB.convert("L"), "png"), "lzw": encoded(INDICES, "tiff", compression="tiff_lzw"),
}  # fmt: skip


def check_picture(path: Path) -> None:
    """An array of the size that the header tells, or an error that names the file."""
    for read in (read_image, read_label, image_hw):
        try:
            found = read(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        if read is read_image:
            assert found.dtype == np.float32 and found.shape == (*image_hw(path), 3)
        elif read is read_label:
            assert found.dtype == np.uint8 and found.shape == image_hw(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@check(150)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3), st.floats(0, 1))
def test_damaged_pictures(folder: Path, kind: str, changes: list[tuple[float, int]], kept: float) -> None:
    """Bytes changed (rather in the header), perhaps cut off too."""
    content = bytearray(FILES[kind])
    for position, value in changes:
        content[min(int(position**2 * len(content)), len(content) - 1)] = value
    (folder / "damaged").write_bytes(content if kept > 0.5 else content[: int(2 * kept * len(content))])
    check_picture(folder / "damaged")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", sorted(FILES))
def test_truncated_pictures(folder: Path, kind: str) -> None:
    """Wherever the end is missing. cv2.imread would paint the missing rows of a JPEG grey, without a word."""
    path, content = folder / f"truncated {kind}", FILES[kind]
    for size in [*range(0, len(content), len(content) // 40), len(content) - 2, len(content) - 1]:
        path.write_bytes(content[:size])
        check_picture(path)
        with pytest.raises(UserError, match="not a readable image"):
            read_image(path)
    path.write_bytes(content)
    assert read_image(path).shape == (40, 48, 3)


@check(100)
@given(VALUES, st.sampled_from(["split0", "split1", "train"]))
def test_any_folds(folder: Path, value: object, key: str) -> None:
    path = folder / "folds.yaml"
    path.write_bytes(f"{key}: {value}".encode("utf-8", "replace"))
    with pytest.raises(UserError, match=r"folds\.yaml"):
        read_folds(path, NAMES)
    path.write_text("split0: [bird, cat]\nsplit1: [dog]\n")
    assert read_folds(path, NAMES) == [(3, 8), (12,)]
