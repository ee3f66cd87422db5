"""What is wrong is said before the first step, all at once, with a remedy."""

from collections import namedtuple
from pathlib import Path

import pytest

from model import configure, needs_clip, system_class
from util.errors import UserError
from util.run import preflight
from util.run.place import Experiment
from util.run.preflight import Finding, Start, inspect, require

CONFIG = "config/pascal/pascal_split0_resnet50.yaml"


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr("util.data.source.CACHE", tmp_path / "cache")


@pytest.fixture
def voc(block, write_voc) -> list[str]:
    """Three images of every class, and the overrides that read them."""
    root, file = write_voc({f"im{c}_{i}": block((60, 50), (c, 2500)) for c in range(1, 21) for i in range(3)})
    return [f"Data.data_root={root}", f"Data.train_list={file}", f"Data.val_list={file}", "CLIP.clip_path=random",
            "Method.backbone_weight=none", "Train.workers=0", f"Runtime.output={root}/exp"]  # fmt: skip


def start(overrides: list[str], arch: str, lists: tuple[str, ...] = ("train_list", "val_list")) -> Start:
    config, cls = configure(CONFIG, arch, overrides), system_class(arch)
    place = Experiment.from_config_path(arch, CONFIG, config.Runtime.output)
    return Start(config, place, cls.facts, cls.task, needs_clip(arch, config), lists)


def bad(overrides: list[str], arch: str = "PFENet", **how: bool) -> dict[str, Finding]:
    return {f.what: f for f in inspect(start(overrides, arch), read=True, **how) if not f.ok}


def test_a_sound_config(voc: list[str]) -> None:
    assert not bad(voc) and not bad(voc, "PSPNet", full=True)
    found = {f.what: f.detail for f in inspect(start(voc, "PFENet"), read=True)}
    assert found["val_list: classes"] == "15 images of 5 classes, fewest of aeroplane: 3"


def test_everything_at_once(voc: list[str], tmp_path: Path) -> None:
    wrong = [*voc, "Data.data_root=nowhere", "Data.val_list=none.txt", "CLIP.clip_path=clip.pt", "Method.pre_weight=base.pth"]
    assert bad(wrong, "PI_CLIP").keys() == {"data", "val_list", "CLIP", "base learner"}
    with pytest.raises(UserError) as error:
        require(start(wrong, "PI_CLIP", ("val_list",)))
    for text in ("nowhere: no such folder", "none.txt", "clip.pt", "base.pth", "ARCH=PSPNet"):
        assert text in str(error.value)


def test_files_are_opened(voc: list[str]) -> None:
    root = Path(voc[0].partition("=")[2])
    images = sorted((root / "JPEGImages").iterdir())
    images[7].write_bytes(images[7].read_bytes()[:300])
    found = bad(voc, full=True)
    assert images[7].name in found["val_list: images and labels"].detail
    for image in images:
        image.unlink()
    assert "60 that were opened" in bad([*voc, "Data.on_error=skip"], full=True)["train_list: images and labels"].detail


def test_too_few_images_of_a_class(voc: list[str]) -> None:
    found = bad([*voc, "Train.shot=3"])
    assert "class 1 (aeroplane) has 3 images" in found["val_list: classes"].detail
    assert "Train.shot" in found["train_list: classes"].detail


def test_room(voc: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**26, 0, 2**26))
    monkeypatch.setattr(preflight, "SHARED", Path("/tmp"))
    found = bad([*voc, "Train.workers=8"])
    assert "64 MB free" in found["disk"].detail and "--shm-size" in found["shared memory"].remedy
    assert found.keys() == {"disk", "shared memory"}
