"""Protocols: what they fix, under which name and hash, and what they leak."""

from pathlib import Path

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
    expected = {  # PI-CLIP spec, section 1: episodes per run, and who crops, letterboxes and filters
        ("PI_CLIP", "pascal"): (1000, False, True, True), ("PI_CLIP", "coco"): (5000, False, True, True),
        ("HDMNet", "pascal"): (1000, False, True, True), ("HDMNet", "coco"): (10000, False, True, True),
        ("BAM", "pascal"): (1000, True, False, True), ("BAM", "coco"): (1000, True, False, True),
        ("PFENet", "pascal"): (5000, True, False, False), ("PFENet", "coco"): (20000, True, False, False),
    }  # fmt: skip
    for (arch, data_set), values in expected.items():
        found = config(arch, data_set)
        train = found.Train
        assert (found.Test_Finetune.test_num, train.crop, train.resized_val, train.filter_novel) == values
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
    shared = [name for name in protocol_names() if "Method" not in protocol_layer(name, "pascal")]  # others need their systems
    assert len({protocol.of(config("BAM", "pascal", f"Test_Finetune.protocol={n}")).hash for n in shared}) == 6
    assert "a leak" in paper.describe()["text vocabulary"] and "a leak" in paper.describe()["checkpoint"]


def test_leaks_and_their_remedies() -> None:
    paper = config()
    free, differences = protocol.without_leaks(paper, text_prior=True, last_epoch=True)
    assert (free.CLIP.vocabulary, free.Train.selection, len(differences)) == ("target", "last", 2)
    assert (paper.CLIP.vocabulary, paper.Train.selection) == ("present", "novel")
    assert protocol.without_leaks(paper, text_prior=False, last_epoch=False)[1] == []
    assert protocol.without_leaks(config("PI_CLIP", "pascal", "Test_Finetune.protocol=strict"), True, True)[1] == []


def test_unknown_protocol_and_rule() -> None:
    with pytest.raises(UserError, match="there are bam-paper, .*strict"):
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
