"""Protocols: what they fix, under which name and hash, and what they leak."""

from pathlib import Path

import numpy as np
import pytest

from util import protocol
from util.config import Config, load_config, protocol_layer, protocol_names
from util.data.folds import fold
from util.data.source import EpisodeSource
from util.errors import UserError

ROOT = Path(__file__).parents[1]


def config(arch: str = "PI_CLIP", data_set: str = "pascal", *overrides: str) -> Config:
    return load_config(ROOT / f"config/{data_set}/{data_set}_split0_resnet50.yaml", arch, list(overrides))


def test_every_system_runs_under_its_paper_s_protocol() -> None:
    expected = {  # protocols spec, sections 1 and 3: episodes per run, side, seeds, and who crops, letterboxes and filters
        ("PI_CLIP", "pascal"): (1000, 473, 10, False, True, True), ("PI_CLIP", "coco"): (5000, 473, 10, False, True, True),
        ("HDMNet", "pascal"): (1000, 473, 10, False, True, True), ("HDMNet", "coco"): (10000, 633, 10, False, True, True),
        ("BAM", "pascal"): (1000, 473, 5, True, False, True), ("BAM", "coco"): (1000, 641, 5, True, False, True),
        ("PFENet", "pascal"): (5001, 473, 1, True, False, False), ("PFENet", "coco"): (20001, 641, 1, True, False, False),
    }  # fmt: skip
    np.random.seed(123)
    seeds = np.random.randint(0, 1000, 10).tolist()
    assert seeds[:5] == [510, 365, 382, 322, 988]
    for (arch, data_set), (count, side, runs, *values) in expected.items():
        found = config(arch, data_set)
        train, test = found.Train, found.Test_Finetune
        assert (test.test_num, train.train_h, train.val_size) == (count, side, side)
        assert test.seeds == ([321] if arch == "PFENet" else seeds[:runs])
        assert [train.crop, train.resized_val, train.filter_novel] == values
        assert " but " not in protocol.of(found).name and train.selection == "novel"
    for data_set, count in (("pascal", 10000), ("coco", 20000)):
        found = config("BAM", data_set, "Test_Finetune.protocol=strict")
        assert found.Test_Finetune.test_num == count and found.Test_Finetune.seeds == [321]
        assert found.Train.selection == "last" and found.CLIP.vocabulary == "target" and not found.Train.crop


def test_a_changed_protocol_says_so() -> None:
    paper, changed = (protocol.of(config("PI_CLIP", "pascal", *o)) for o in ([], ["Train.filter_novel=false"]))
    assert paper.name == "piclip-paper" and changed.name == "piclip-paper but Train.filter_novel=False"
    assert paper.hash != changed.hash
    assert protocol.of(config("PI_CLIP", "pascal", "Train.epochs=3", "Train.use_split_coco=false")) == paper  # not part of it
    assert protocol.of(config("HDMNet")).hash == paper.hash  # on PASCAL the two papers did the same
    assert protocol.of(config("PI_CLIP", "coco")).hash != protocol.of(config("HDMNet", "coco")).hash
    ours = [f"{name}-paper" for name in ("piclip", "hdmnet", "bam", "pfenet", "hsnet")] + ["strict"]
    assert len({protocol.of(config("BAM", "pascal", f"Test_Finetune.protocol={n}")).hash for n in ours}) == 5
    assert "a leak" in paper.describe()["text vocabulary"] and "a leak" in paper.describe()["checkpoint"]


def test_protocols_share_the_hashes_of_the_parts_they_share() -> None:
    def parts(name: str, data_set: str = "pascal", *more: str) -> dict[str, str]:
        return protocol.of(config("BAM", data_set, f"Test_Finetune.protocol={name}", *more)).parts

    def other(*pair: dict[str, str]) -> set[str]:
        return {part for part in pair[0] if pair[0][part] != pair[1][part]}

    assert len(parts("pfenet")) == 6
    assert other(parts("pfenet"), parts("bam")) == {"episodes and seeds"}
    assert other(parts("bam"), parts("hdmnet")) == {"episodes and seeds", "input resize", "score grid and void"}
    assert other(parts("hsnet"), parts("hsnet-orig")) == {"score grid and void"}
    assert other(parts("hsnet"), parts("matcher")) == {"input resize"}
    assert other(parts("pfenet"), parts("pfenet", "coco")) == {"candidate index", "draw and generator", "episodes and seeds",
                                                               "input resize"}  # fmt: skip
    assert other(parts("hdmnet"), parts("hdmnet", "pascal", "Train.selection=last", "CLIP.vocabulary=all")) == set()
    assert other(parts("hdmnet"), parts("hdmnet", "pascal", "Test_Finetune.mean=m1")) == {"mean"}


def test_every_rule_set_draws_episodes(block, write_voc, tmp_path) -> None:
    labels = {f"im{i}": block((60, 60), (1 + i % 5, 2100), (1 + i * i % 5, 900)) for i in range(40)}
    root, list_file = write_voc(labels)
    given = [f"Data.data_root={root}", f"Data.val_list={list_file}", f"Data.class_names={ROOT}/lists/pascal/classes.txt"]
    drawn = {}
    for name in protocol_names():
        if "Method" in protocol_layer(name, "pascal"):  # of dense systems, which test images
            continue
        found = config("HDMNet", "pascal", *given, f"Test_Finetune.protocol={name}")
        source = EpisodeSource(found, tmp_path)
        for seed, episodes in source.test_episodes().items():
            count = source.count or len(episodes)
            drawn[name, seed, count] = tuple(episodes.spec(i) for i in range(20))
            assert all(s.cls in (1, 2, 3, 4, 5) and s.query not in s.supports for s in drawn[name, seed, count])
    assert len(protocol_names()) - len({name for name, *_ in drawn}) == 7  # WeCLIP's and the zero-shot ones
    assert drawn["hdmnet", 98, 1000] == drawn["piclip", 98, 1000] != drawn["hdmnet-paper", 98, 1000]
    assert drawn["hsnet", 0, 1000] == drawn["matcher", 0, 1000] == drawn["insid3", 0, 1000] != drawn["hsnet-paper", 0, 1000]
    assert drawn["pfenet", 321, 5001] != drawn["fssam", 321, 1000]  # 8 and 32 workers
    assert drawn["abcdfss", 2, 40]  # every pair of image and class once


def test_a_protocol_file_with_an_unknown_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("util.config.PROTOCOLS", tmp_path)
    for text, message in (("Test_Finetun: {mean: m1}", "'Test_Finetun' is no section .*did you mean Test_Finetune"),
                          ("pascl: {Data: {min_pixels: 1}}", "did you mean pascal"),
                          ("Test_Finetune: {grids: square}", "did you mean 'grid'"),
                          ("extends: mine", "circle"), ("extends: other", "there are mine")):  # fmt: skip
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            config("BAM", "pascal", "Test_Finetune.protocol=mine")


def test_leaks_and_their_remedies() -> None:
    paper = config()
    free, differences = protocol.without_leaks(paper, text_prior=True, last_epoch=True)
    assert (free.CLIP.vocabulary, free.Train.selection, len(differences)) == ("target", "last", 2)
    assert (paper.CLIP.vocabulary, paper.Train.selection) == ("present", "novel")
    assert protocol.without_leaks(paper, text_prior=False, last_epoch=False)[1] == []
    assert protocol.without_leaks(config("PI_CLIP", "pascal", "Test_Finetune.protocol=strict"), True, True)[1] == []


def test_unknown_protocol_and_rule() -> None:
    with pytest.raises(UserError, match=r"did you mean strict\?; there are abcdfss, .*strict"):
        config("BAM", "pascal", "Test_Finetune.protocol=strictly")
    with pytest.raises(UserError, match="did you mean 'novel'"):
        config("BAM", "pascal", "Train.selection=novell")


def test_selection_on_base_classes_never_sees_a_novel_object(block, write_voc, tmp_path) -> None:
    labels = {f"im{i}": block((60, 60), (c, 2100)) for i, c in enumerate((1, 1, 2, 7, 7, 7, 8, 8))}
    labels["mixed"] = block((60, 80), (7, 2100), (1, 2100))
    root, list_file = write_voc(labels)
    given = [f"Data.data_root={root}", f"Data.val_list={list_file}", f"Data.class_names={ROOT}/lists/pascal/classes.txt"]
    source = EpisodeSource(config("BAM", "pascal", *given, "Train.selection=base"), tmp_path)
    data = source.episodes(source.validation_episodes())
    novel = set(fold("pascal", 0).novel)
    assert {data.episodes.spec(i).cls for i in range(20)} == {7, 8}
    assert len(data) == 5 and not any(novel & set(r.pixels) for r in data.episodes.index.records)
