"""Controls beside every few-shot result: supports of another class, and predictions that need no training."""

import html
from pathlib import Path

import numpy as np
import pytest
import torch

from model.system import Prediction
from tests.make.counted import row, table
from tests.make.reports import result
from util.data.episodes import EpisodeDataset, EpisodeList
from util.data.folds import fold, read_class_names
from util.data.index import build_index, scan
from util.data.transforms import ValTransform
from util.data.wrong_supports import WrongSupports
from util.report.summary import plain
from util.report.write import render, text_table
from util.run.distributed import Context
from util.run.log import RunLog
from util.score.episodes import evaluate_control, evaluate_episodes
from util.score.rules import Rule, under
from util.score.statistics import pooled, support_gap
from util.score.table import EpisodeTable, read_episodes
from util.score.task import How

ROOT, CPU, COUNT = Path(__file__).parents[1], torch.device("cpu"), 12
M1 = Rule(mean="m1")  # three of the five classes of the fold are drawn


@pytest.fixture
def data(block, write_voc, tmp_path) -> EpisodeDataset:
    """Twelve images, each with one of three novel classes of fold 0 of PASCAL."""
    labels = {f"im{i}": block((60, 60), (1 + i % 3, 2100 + 10 * i)) for i in range(12)}
    root, list_file = write_voc(labels)
    first, names = fold("pascal", 0), read_class_names(ROOT / "lists/pascal/classes.txt")
    episodes = EpisodeList(build_index(scan(root, list_file, names, tmp_path), first.novel, False, 2048), 1, seed=3)
    return EpisodeDataset(episodes, first, root, ValTransform(33, squash=True), num_classes=20, clip_size=None, patch=1,
                          evaluation=True)  # fmt: skip


def by_support(episode) -> Prediction:
    """Find the query's pixels that have the colour of the support's object."""
    masks = []
    for query, support, mask in zip(episode.query, episode.support[:, 0], episode.support_mask[:, 0], strict=True):
        colour = support[:, mask == 1].median(1).values
        masks.append(((query - colour[:, None, None]).abs().amax(0) < 5).float())
    mask = torch.stack(masks)
    return Prediction(torch.stack([1 - mask, mask], 1))


def by_query(episode) -> Prediction:
    """Find what is not blue, whatever the support."""
    mask = (episode.query[:, 0] > 128).float()
    return Prediction(torch.stack([1 - mask, mask], 1))


def test_a_control_has_another_class_s_support_and_never_the_query(data) -> None:
    control = WrongSupports(data, COUNT)
    assert len(control) == COUNT
    for k, (i, _) in enumerate(control.pairs):
        own, wrong, spec = data[i], control[k], data.episodes.spec(i)
        assert wrong.query_name == own.query_name and wrong.cls == own.cls and wrong.number == i == spec.number
        assert torch.equal(wrong.query, own.query) and torch.equal(wrong.original_mask[0], own.original_mask[0])
        (name,), = wrong.support_names
        shown = int(Path(name).stem.removeprefix("im")) % 3 + 1
        assert shown != spec.cls and name not in own.query_name and (wrong.support_mask == 1).any()
        assert wrong.support_key != own.support_key


def test_the_support_gap(data, tmp_path) -> None:
    with RunLog(tmp_path, "log", quiet=True) as log:
        how = How(Context(CPU), log, batch=5, trivial=True)
        for predict, gaps in ((by_support, (0.9, 1)), (by_query, (0, 0))):
            found = evaluate_episodes(predict, data, COUNT, data.fold, how, rule=M1)
            rows = evaluate_control(predict, WrongSupports(data, COUNT), how, M1)
            gap = support_gap(EpisodeTable.of("x", {0: found.rows}), EpisodeTable.of("x", {0: rows}))
            assert gaps[0] <= gap["gap"] <= gaps[1] and gap["episodes"] == COUNT
            assert gap["miou"] == pytest.approx(found.record["miou"]) and gap["interval"][0] <= gap["gap"] <= gap["interval"][1]
    baselines, sums = found.record["baselines"], {c: np.zeros(2) for c in (1, 2, 3)}
    for i in range(COUNT):
        truth = data[i].original_mask[0]
        sums[data.episodes.spec(i).cls] += (truth == 1).sum().item(), (truth != 255).sum().item()
    assert baselines["everything foreground"]["miou"] == pytest.approx(np.mean([hit / union for hit, union in sums.values()]))
    assert 0.9 < baselines["mean of the support masks"]["miou"] < 1  # the blocks lie in one corner


def test_the_headline_follows_the_rule(data, tmp_path) -> None:
    """Scores, rows and spread of an evaluation under a rule are those that any evaluation stores for it."""
    plain_rows, shares = None, {}
    with RunLog(tmp_path, "log", quiet=True) as log:
        for rule in (Rule(), M1, Rule("square", "background"), Rule("letterbox", "background", "m1")):
            found = evaluate_episodes(by_query, data, COUNT, data.fold, How(Context(CPU), log, batch=5), rule=rule)
            rows = EpisodeTable.of("x", {0: found.rows}, absent=rule.absent(data.fold.novel, {1, 2, 3}))
            plain_rows = rows if plain_rows is None else plain_rows
            assert (rows.tallies == plain_rows.tallies).all()
            assert (rows.counts == under(plain_rows.tallies, rule.grid, rule.void)).all()
            assert found.record["miou"] == pytest.approx(pooled(rows)["miou"]) and found.record["undrawn"] == [4, 5]
            assert read_episodes({"episodes": rows.to_json()}).absent == rows.absent
            shares[rule] = found.record["miou"]
        assert evaluate_control(by_query, WrongSupports(data, 1), How(Context(CPU), log), M1) == []  # one class: no control
    assert shares[Rule()] == pytest.approx(shares[M1] * 3 / 5)


def test_what_is_said_of_it() -> None:
    own = table()
    worse = {s: [row(i, 1 + i % 3, i // 2, 2, 50) for i in range(29)] for s in range(2)}  # one episode has no such supports
    gap = support_gap(own, EpisodeTable.of("hash", worse))
    assert gap["episodes"] == 58 and gap["interval"][0] > 0
    given = result(2, control=gap | {"names": True})
    line = next(line for line in text_table(given).splitlines() if "support gap" in line)
    assert "2 episodes have no such" in line and "name stays right" in line
    assert line.strip() in html.unescape(render(plain(given | {"date": ""}), []))
    none, says = support_gap(own, own), "WARNING: this system hardly uses its supports"
    assert none["gap"] == 0 and says in text_table(result(2, control=none | {"names": False})) and says not in text_table(given)
    assert "Test_Finetune.control=true" in text_table(result(rules={"rows": [], "flags": []}))
    nothing = result(baselines={"mean of the support masks": {"miou": 0.6}})
    assert "below its own baselines, so it has learnt nothing" in text_table(nothing)
