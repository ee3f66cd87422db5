"""util/data/manifest: episodes written as text and read back."""

from dataclasses import fields
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from util.data.__main__ import main
from util.data.episodes import Episode, EpisodeDataset, EpisodeList
from util.data.folds import fold, read_class_names
from util.data.index import Record, build_index, scan
from util.data.manifest import episode_hash, read_manifest, write_manifest
from util.data.transforms import ValTransform
from util.errors import UserError
from util.score.metrics import FewShotMeter

NOVEL = (1, 2)


def record(number: int, **pixels: int) -> Record:
    counts = {int(c[1:]): n for c, n in pixels.items()}
    return Record(f"images/{number}.jpg", f"labels/{number}.png", 9, 9, counts, tuple(counts))


# 0 and 1 show a class too small to count; 2 shows no novel class; the rest 1, 2 or both.
RECORDS = [
    record(0, c1=30), record(1, c2=9, c7=5000), record(2, c7=5000),
    *(record(n, **({"c1": 3000} if n % 3 else {}), **({"c2": 4000} if n % 2 else {"c7": 1})) for n in range(3, 15)),
]  # fmt: skip
LINE = "321 1 images/4.jpg images/8.jpg"


def lists(shot: int, seeds: tuple[int, ...] = (321, 7)) -> dict[int, EpisodeList]:
    index = build_index(RECORDS, NOVEL, only=False)
    return {seed: EpisodeList(index, shot, seed) for seed in seeds}


def named(episodes, count: int) -> list[tuple]:
    """(class, query, supports) by image name."""
    names = [r.image for r in episodes.index.records]
    specs = [episodes.spec(i) for i in range(count)]
    assert [s.number for s in specs] == list(range(count))
    return [(s.cls, names[s.query], [names[p] for p in s.supports]) for s in specs]


@pytest.mark.parametrize("shot", [1, 3])
def test_round_trip(tmp_path, shot):
    drawn = lists(shot)
    write_manifest(tmp_path / "new/m.txt", {"data set": "pascal", "shot": shot}, drawn, 25)
    back = read_manifest(tmp_path / "new/m.txt", RECORDS, NOVEL, shot)
    assert sorted(back) == [7, 321] and all(len(e) == 25 and e.shot == shot and e.seed == s for s, e in back.items())
    for seed in drawn:
        assert named(back[seed], 25) == named(drawn[seed], 25)
    index = back[7].index
    assert {r.image for r in RECORDS[:3]}.isdisjoint(r.image for r in index.records)  # no episode names them
    assert all(c in index.records[p].pixels for c in NOVEL for p in index.by_class[c])
    with pytest.raises(IndexError):
        back[7].spec(25)
    text = (tmp_path / "new/m.txt").read_text()
    assert text.startswith("# format: episodes 1\n# data set: pascal\n") and len(text.splitlines()) == 4 + 50
    write_manifest(tmp_path / "again.txt", {"data set": "pascal", "shot": shot}, back, None)
    assert (tmp_path / "again.txt").read_text() == text


def test_hash_is_of_the_episodes_alone(tmp_path):
    known = episode_hash(lists(1), 20)
    assert known == "cd30504ffc59c4e2"  # never change it: it is in reports and files
    write_manifest(tmp_path / "m.txt", {"note": "a name of no meaning"}, lists(1), 20)
    body = "".join(line for line in (tmp_path / "m.txt").read_text().splitlines(True) if not line.startswith("#"))
    assert blake2b(body.encode(), digest_size=8).hexdigest() == known
    assert episode_hash(read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 1)) == known == episode_hash(lists(1, (7, 321)), 20)
    others = [episode_hash(lists(1), 21), episode_hash(lists(2), 20)]
    others += [episode_hash(lists(1, seeds), 20) for seeds in ((321,), (321, 8))]
    assert known not in others and len(set(others)) == 4
    lines = (tmp_path / "m.txt").read_text().splitlines()
    (tmp_path / "m.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="cut"):
        read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 1)


def test_files_of_others(tmp_path):
    """Blank lines, CRLF, a mark at the start, no header, seeds in turn; classes below the pixel limit are allowed."""
    lines = ["5 1 images/0.jpg images/4.jpg", "", "4 2 images/1.jpg images/3.jpg", "5 2 images/5.jpg  images/9.jpg"]
    (tmp_path / "m.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 1)
    assert list(found) == [5, 4] and [len(e) for e in found.values()] == [2, 1]
    assert named(found[5], 2) == [(1, "images/0.jpg", ["images/4.jpg"]), (2, "images/5.jpg", ["images/9.jpg"])]


def test_messages_name_the_classes(tmp_path):
    (tmp_path / "m.txt").write_text("321 3 images/4.jpg images/8.jpg")
    with pytest.raises(UserError, match=r"class 3 \(car\) is not one of .* 1 \(bird\), 2 \(boat\)"):
        read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 1, names=("bird", "boat", "car"))
    meter = FewShotMeter([1, 2], names=("bird", "boat"))
    meter.update(torch.tensor([[1]]), torch.tensor([[1]]), 1)
    with pytest.raises(UserError, match=r"class 2 \(boat\): its IoU"):
        meter.result()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["# shot: 1", LINE, "321 1 images/77.jpg images/8.jpg"], r":3: the image images/77\.jpg is not in Data\.val_list"),
        ([LINE, "321 7 images/4.jpg images/8.jpg"], r":2: class 7 is not one of .* 1, 2 \(Train\.split\)"),
        (["321 1 images/4.jpg images/8.jpg images/10.jpg"], r":1: expected a query and 1 support \(Train\.shot = 1\), got 3"),
        (["321 1 images/4.jpg images/4.jpg"], r":1: the image images/4\.jpg is there twice"),
        (["321 1 images/3.jpg images/4.jpg"], r":1: the label of the query images/3\.jpg has no pixel of class 1"),
        (["321 1 images/4.jpg images/3.jpg"], r":1: the label of the support images/3\.jpg has no pixel of class 1"),
        (["# list: a", "# list: b", LINE], r":2: the header has 'list' twice"),
        ([LINE, "# list: a"], r":2: expected `# key: value` lines before"),
        (["# nonsense", LINE], r":1: expected `# key: value`"),
        (["# format: episodes 2", LINE], r":1: the format is 'episodes 2'"),
        (["# shot: 5", LINE], r":1: the episodes are of shot 5, the config has 1: Train\.shot"),
        (["# data set: coco", LINE], r":1: the episodes are of data set coco, the config has pascal: Train\.data_set"),
        (["images/4.jpg images/8.jpg"], ":1: expected `seed class query"),
        (["321"], ":1: expected `seed class query"),
        (["# list: a"], "no episode in it"),
        ([], "no episode in it"),
    ],
)
def test_bad_manifests(tmp_path, lines, says):
    (tmp_path / "m.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"m\.txt.*{says}"):
        read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 1, of={"data set": "pascal"})
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        read_manifest(tmp_path / "none.txt", RECORDS, NOVEL, 1)


def test_repeated_support_is_refused(tmp_path):
    (tmp_path / "m.txt").write_text("1 1 images/4.jpg images/8.jpg images/8.jpg")
    with pytest.raises(UserError, match=r"images/8\.jpg is there twice"):
        read_manifest(tmp_path / "m.txt", RECORDS, NOVEL, 2)


def test_the_same_pictures_come_out(tmp_path, block, write_voc):
    names = read_class_names(Path(__file__).resolve().parents[1] / "lists/pascal/classes.txt")
    root, list_file = write_voc({f"im{n}": block((30 + n, 40), (1 + n % 2, 300), (9, 50)) for n in range(8)})
    records, f = scan(root, list_file, names, tmp_path / "cache"), fold("pascal", 0)
    drawn = {3: EpisodeList(build_index(records, f.novel, False, 200), 2, 3)}
    write_manifest(tmp_path / "m.txt", {}, drawn, 6)
    sets = [EpisodeDataset(e, f, root, ValTransform(32, True), num_classes=20, clip_size="original", patch=16, evaluation=True)
            for e in (drawn[3], read_manifest(tmp_path / "m.txt", records, f.novel, 2)[3])]  # fmt: skip
    assert len(sets[1]) == 6
    for i in (0, 5):
        a, b = (data[i] for data in sets)
        for field in fields(Episode):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else str(x) == str(y), field.name


def test_export_command(tmp_path, block, write_voc, monkeypatch, capsys):
    repository = Path(__file__).resolve().parents[1]
    root, list_file = write_voc({f"im{n}": block((50, 60), (1 + n % 5, 2100)) for n in range(15)})
    given = ["export", "--arch", "PI_CLIP", "--config",
             str(repository / "config/pascal/pascal_split0_resnet50.yaml"), f"Data.data_root={root}",
             f"Data.val_list={list_file}", f"Data.class_names={repository}/lists/pascal/classes.txt",
             f"Runtime.output={tmp_path}/exp", "Test_Finetune.seeds=[5, 6]", "Test_Finetune.test_num=20"]  # fmt: skip
    monkeypatch.chdir(tmp_path)  # the cache
    main(given)
    path = tmp_path / "exp/episodes/pascal_split0_1shot.txt"
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    assert "# protocol: piclip-paper but Test_Finetune.test_num=20" in text and "# protocol hash: " in text
    assert len(text.splitlines()) == 8 + 40
    main([*given, "--out", "-"])
    assert capsys.readouterr().out == text
    with pytest.raises(UserError, match=r"no image is filed.*4 \(boat\), 5 \(bottle\)"):
        list_file.write_text("\n".join(line for i, line in enumerate(list_file.read_text().splitlines()) if i % 5 < 3))
        main(given)
