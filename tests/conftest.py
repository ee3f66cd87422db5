"""Data for the tests: a tiny VOC-like folder written on the spot, and the small cut of VOC where it is at hand."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported, and for the programs that tests start: see env.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Palette of the synthetic labels: no colour resembles its index, so reading colours instead of indices shows.
PALETTE = [(37 * i + 11 * channel + 90) % 256 for i in range(256) for channel in range(3)]


# Files of tests that train, which take minutes: they begin, so that no process ends long after the others (env.py test).
LONGEST = ("test_train.py", "test_weak_run.py", "test_zero_shot_run.py", "test_distributed.py", "test_launch.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def voc_mini() -> Path:
    """The small cut of VOC 2012: $VOC_MINI, or ../shared/data/voc2012_mini beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared/data/voc2012_mini"
    root = Path(os.environ.get("VOC_MINI", beside))
    if not (root / "SegmentationClassAug").is_dir():
        pytest.skip(f"no small cut of VOC at {root}; set VOC_MINI to the folder that holds it")
    return root


@pytest.fixture
def block() -> Callable[..., np.ndarray]:
    """Make a label: for each (class, pixels) that many pixels of the class, and an ignored one in the last corner."""

    def make(shape: tuple[int, int], *objects: tuple[int, int]) -> np.ndarray:
        flat = np.zeros(shape[0] * shape[1], np.uint8)
        start = 0
        for cls, pixels in objects:
            flat[start : start + pixels] = cls
            start += pixels
        flat[-1] = 255
        return flat.reshape(shape)

    return make


@pytest.fixture
def write_voc(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write labels (stem -> H W uint8) as a VOC folder; returns (data root, list file).

    The image of a label shows class c as RGB (255, 12 c, 0) on blue. `xml`: stem -> object names, where there is one.
    """

    def write(labels: Mapping[str, np.ndarray], xml: Mapping[str, Sequence[str]] | None = None) -> tuple[Path, Path]:
        root = tmp_path / "VOC"
        for folder in ("JPEGImages", "SegmentationClassAug", "Annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for stem, label in labels.items():
            image = np.zeros((*label.shape, 3), np.uint8)
            image[..., 2] = 255
            shown = (label > 0) & (label < 255)
            image[shown] = np.stack([np.full_like(label, 255), 12 * label, np.zeros_like(label)], -1)[shown]
            Image.fromarray(image).save(root / f"JPEGImages/{stem}.jpg", quality=95, subsampling=0)
            png = Image.fromarray(label).convert("P")
            png.putdata(label.ravel().tolist())
            png.putpalette(PALETTE)
            png.save(root / f"SegmentationClassAug/{stem}.png")
        for stem, names in (xml or {}).items():
            objects = "".join(f"<object><name>{n}</name><part><name>head</name></part></object>" for n in names)
            (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
        list_file = tmp_path / "list.txt"
        list_file.write_text("".join(f"JPEGImages/{s}.jpg SegmentationClassAug/{s}.png\n" for s in labels))
        return root, list_file

    return write


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred scenes of the demo world in VOC's layout, and list.txt."""
    from tests.make import draw  # here: most tests need none of its imports

    return draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def piclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an untrained 1-shot PI-CLIP on the demo, its base learner where it looks for it."""
    from tests.make import ROOT, make

    with contextlib.chdir(ROOT):
        return make(tmp_path_factory.mktemp("piclip"), "PI_CLIP")[1]


@pytest.fixture(scope="session")
def small_clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages of docs/ run on, in a folder of its own: configs, weights and a tenth of the scenes of the demo."""
    from demo import world

    root, place = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("clone")
    for name in ("config", "lists", "demo", "notebooks"):
        shutil.copytree(root / name, place / name)
    shutil.copy(root / "train.py", place)
    scenes = {"train": world.TRAIN[:120], "val": world.VAL[:60]}
    for folder in ("JPEGImages", "SegmentationClassAug", "Annotations"):
        (place / "data/demo" / folder).mkdir(parents=True)
    for name, numbers in scenes.items():
        (place / f"lists/demo/{name}.txt").write_text(world.list_lines(numbers))
        for number in numbers:
            world.write(place / "data/demo", number)
    (place / "data/demo/done").write_text(f"demo world {world.VERSION}\n")
    return place


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, beside an empty repository that is the working folder."""
    from tests.make.folders import write_own

    write_own(tmp_path / "own data")
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path / "own data"
