"""util/data/hsnet_splits: HSNet's lists and the episodes that its published test draws from them."""

import pickle
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from util import protocol
from util.config import load_config
from util.data.__main__ import main
from util.data.episodes import EpisodeSpec
from util.data.hsnet_splits import COUNT, digest, draw, read
from util.data.source import EpisodeSource
from util.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PASCAL = [(f"im{n}", 1 + n % 5) for n in range(15)]


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Lists of both data sets, fold 1 of COCO unsorted, as the published ones are."""
    for data_set in ("pascal", "coco"):
        for part in ("trn", "val"):
            (tmp_path / "splits" / data_set / part).mkdir(parents=True)
    for fold in range(4):
        (tmp_path / f"splits/pascal/trn/fold{fold}.txt").write_text(f"tr{fold}__{5 * fold + 1:02d}\nboth__{5 * fold + 2:02d}\n")
    (tmp_path / "splits/pascal/val/fold0.txt").write_text("".join(f"{image}__{cls:02d}\n" for image, cls in PASCAL))
    listed = {cls: [f"val2014/{(7 * n) % 31}_{cls}.jpg" for n in range(3 + cls)] if cls % 4 == 1 else [] for cls in range(80)}
    (tmp_path / "splits/coco/val/fold1.pkl").write_bytes(pickle.dumps(listed, protocol=3))
    return tmp_path / "splits"


def published(listed: dict[int, list[str]], pairs: list[tuple[str, int]], classes: list[int], shot: int) -> str:
    """The draw as numpy's own choice makes it, classes 0-based; returns the digest."""
    np.random.seed(0)
    lines = []
    for i in range(COUNT):
        if pairs:
            query, cls = pairs[i % len(pairs)]
        else:
            cls = np.random.choice(classes, 1, replace=False)[0]
            query = np.random.choice(listed[cls], 1, replace=False)[0]
        supports = []
        while len(supports) < shot:
            support = np.random.choice(listed[cls], 1, replace=False)[0]
            if support != query:
                supports.append(support)
        lines.append(f"{query}|{cls}|{'|'.join(supports)}")
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("shot", [1, 5])
def test_episodes_are_those_of_numpys_choice(splits: Path, shot: int) -> None:
    drawn = draw(read(splits, "pascal", "val", 0), "pascal", [1, 2, 3, 4, 5], shot)
    by_class = {cls: [image for image, c in PASCAL if c == cls + 1] for cls in range(5)}
    assert digest(drawn) == published(by_class, [(image, cls - 1) for image, cls in PASCAL], [], shot)
    listed = pickle.loads((splits / "coco/val/fold1.pkl").read_bytes())
    drawn = draw(read(splits, "coco", "val", 1), "coco", [4 * v + 2 for v in range(20)], shot)
    assert digest(drawn) == published(listed, [], [4 * v + 1 for v in range(20)], shot)
    assert len({len(set(episode.supports)) for episode in drawn}) == (1 if shot == 1 else 5)  # supports repeat


def test_the_command_writes_episodes_that_test_py_reads(splits, write_voc, block, tmp_path, monkeypatch, capsys) -> None:
    root, list_file = write_voc({f"im{n}": block((50, 60), (1 + n % 5, 2100 if n else 99)) for n in range(15)})
    given = ["--arch", "HSNet", "--config", str(REPOSITORY / "config/pascal/pascal_split0_resnet50.yaml"),
             f"Data.data_root={root}", f"Data.val_list={list_file}", f"Runtime.output={tmp_path}/exp",
             f"Data.class_names={REPOSITORY}/lists/pascal/classes.txt"]  # fmt: skip
    monkeypatch.chdir(tmp_path)  # the cache
    main(["hsnet", "--splits", str(splits), *given])
    out = capsys.readouterr().out
    assert "15 pairs of image and class; ours 14, 14 in both, 1 only there, 0 only here" in out
    assert "DIFFERENT from the published episodes" in out and "da65bb259e39dfbb" in out
    path = tmp_path / "exp/episodes/pascal_split0_1shot_hsnet.txt"
    assert path.read_text().splitlines()[-COUNT].startswith("0 1 JPEGImages/im0.jpg JPEGImages/im")
    training = tmp_path / "exp/episodes/pascal_split0_hsnet_train.txt"
    pairs = [f"JPEGImages/{image}.jpg SegmentationClassAug/{image}.png" for image in ("both", "tr1", "tr2", "tr3")]
    assert training.read_text().splitlines() == pairs
    # The file is an ordinary one: export writes the same episodes from it again.
    main(["export", *given, f"Test_Finetune.episodes={path}", "--out", "-"])
    assert capsys.readouterr().out.splitlines()[-COUNT:] == path.read_text().splitlines()[-COUNT:]


def test_hsnet_s_rules_draw_the_same_from_its_lists(splits, write_voc, block, tmp_path, monkeypatch) -> None:
    """Data.pair_lists: what counts is what the lists name, in their order; the protocol hsnet draws what the command writes."""
    monkeypatch.chdir(tmp_path)
    root, list_file = write_voc({f"im{n}": block((50, 60), (1 + n % 5, 2100 if n else 99)) for n in reversed(range(15))})
    given = [f"Data.data_root={root}", f"Data.val_list={list_file}", f"Data.class_names={REPOSITORY}/lists/pascal/classes.txt"]
    file = REPOSITORY / "config/pascal/pascal_split0_resnet50.yaml"

    def episodes(*more: str) -> list[EpisodeSpec]:
        (found,) = EpisodeSource(load_config(file, "HSNet", [*given, *more]), tmp_path).test_episodes().values()
        return [found.spec(i) for i in range(len(found))]

    with_lists = [f"Data.pair_lists={splits}", "Test_Finetune.protocol=hsnet"]
    main(["hsnet", "--splits", str(splits), "--config", str(file), *given, "--out", str(tmp_path / "m.txt")])
    named = EpisodeSource(load_config(file, "HSNet", [*given, *with_lists]), tmp_path)
    index = named.index(training=False)
    lines = [line.split()[1:] for line in (tmp_path / "m.txt").read_text().splitlines() if line[0] != "#"]
    assert [[str(e.cls), *(index.records[i].image for i in (e.query, *e.supports))] for e in episodes(*with_lists)] == lines
    assert len(index.records) == 15 and len(EpisodeSource(load_config(file, "HSNet", given), tmp_path).index(False).records) == 14
    ours, theirs = (protocol.of(load_config(file, "HSNet", [*given, *more])) for more in (with_lists[1:], with_lists))
    assert [part for part in ours.parts if ours.parts[part] != theirs.parts[part]] == ["candidate index"]
    (splits / "pascal/val/fold0.txt").write_text("im3__04\nim4__04\n")
    with pytest.raises(UserError, match=r"fold0\.txt: 1 of its 2 lines .*does not show the class; .*im4\.jpg, class 4"):
        episodes(*with_lists)


def test_wrong_lists(splits: Path) -> None:
    class Runs:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    (splits / "coco/val/fold0.pkl").write_bytes(pickle.dumps(Runs()))
    (splits / "coco/val/fold2.pkl").write_bytes(pickle.dumps({0: "val2014/1.jpg"}))
    (splits / "pascal/val/fold1.txt").write_text("2007_000032 6\n")
    (splits / "pascal/val/fold2.txt").write_text("2007_000032__11\n2007_000033__12\n")
    for data_set, fold, says in (
        ("coco", 0, r"fold0\.pkl: not a pickle of dicts.*exec"),
        ("coco", 2, r"fold2\.pkl: expected \{class"),
        ("pascal", 1, r"fold1\.txt:1: expected a line like"),
        ("pascal", 3, r"fold3\.txt: cannot be read"),
        ("fss", 0, "not of fss"),
    ):
        with pytest.raises(UserError, match=says):
            read(splits, data_set, "val", fold)
    with pytest.raises(UserError, match=r"class 11 has 1 image"):
        draw(read(splits, "pascal", "val", 2), "pascal", [11, 12, 13, 14, 15], 1)
