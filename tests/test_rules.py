"""Rules of scoring: counts worked out by hand on each grid and void rule, and the two means over classes."""

import numpy as np
import pytest
import torch

from model.system import Prediction
from util import protocol
from util.config import Config
from util.data.transforms import Placed, ValTransform
from util.report.summary import undrawn
from util.score.causes import Spread
from util.score.episodes import on_grids
from util.score.metrics import Counts, FewShotMeter
from util.score.rules import COLUMNS, DEFAULT, GRIDS, VOIDS, Rule, tally, under
from util.score.statistics import pooled
from util.score.table import EpisodeTable, Row


def scores(mask: torch.Tensor) -> torch.Tensor:
    """Two channels whose argmax is the mask."""
    return torch.stack([1 - mask.float(), mask.float()])


def test_the_rules_are_keys_of_a_protocol_and_leave_older_hashes_alone() -> None:
    config = Config()
    config.Test_Finetune.protocol = "strict"
    plain = protocol.of(config)
    assert not any(key in plain.values for key in ("Test_Finetune.grid", "Test_Finetune.void", "Test_Finetune.mean"))
    config.Test_Finetune.void = "background"
    changed = protocol.of(config)
    assert changed.hash != plain.hash and "but Test_Finetune.void=background, " in changed.name
    assert changed.describe()["void pixels"] == "count as background"
    assert Rule.of(config) == Rule(void="background") and Rule.of(Config()) == DEFAULT


def counted(rule: Rule, placed: Placed, values: torch.Tensor, truth: torch.Tensor) -> Counts:
    """Counts by the meter, for one rule alone."""
    pred = rule.place(placed, 4).restore(values).argmax(0)
    return FewShotMeter([1]).update(pred, rule.truth(truth, 4), 1)


def test_a_tiny_episode_on_every_grid() -> None:
    """2 x 4 pixels, the network's side is 4; predicted are the left half and a column of the right."""
    truth = torch.tensor([[1, 1, 0, 255], [1, 0, 0, 255]], dtype=torch.uint8)
    seen = torch.tensor([[1, 1, 0, 1]] * 4)  # S x S, squashed: the columns are the file's
    squashed = {  # grid, void: intersection, union, background intersection, background union
        ("original", "ignore"): (3, 4, 2, 3), ("original", "background"): (3, 6, 2, 5),
        ("square", "ignore"): (6, 8, 4, 6), ("square", "background"): (6, 12, 4, 10),
        ("letterbox", "ignore"): (3, 4, 2, 3), ("letterbox", "background"): (3, 6, 10, 13),
    }  # fmt: skip
    boxed = torch.cat([seen[:2], torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])])  # letterboxed: 3 of the padding are predicted
    letterboxed = {("original", "ignore"): (3, 4, 2, 3), ("original", "background"): (3, 6, 2, 5),
                   ("letterbox", "ignore"): (3, 4, 2, 3), ("letterbox", "background"): (3, 9, 7, 13)}  # fmt: skip
    for canvas, grid_scores, expected in (((2, 4), scores(seen), squashed), ((4, 4), scores(boxed), letterboxed)):
        placed, prediction = Placed((2, 4), canvas), Prediction(grid_scores[None])
        row = tally(on_grids(prediction, 0, placed, 4), truth, 4, placed.canvas != placed.hw)
        assert dict(zip(COLUMNS, row, strict=True)).items() >= {"area": 8, "object": 3}.items()
        for (grid, void), counts in expected.items():
            assert counted(Rule(grid, void), placed, grid_scores, truth) == counts, (grid, void)
            assert tuple(under(np.array([row]), grid, void)[0]) == counts, (grid, void)


def test_what_is_stored_gives_the_counts_of_every_rule() -> None:
    """Odd sizes, a squashed and a letterboxed input, random scores: the stored row against the meter of each rule."""
    torch.manual_seed(0)
    values, truth = torch.randn(1, 2, 4, 4), torch.randint(0, 3, (7, 5), dtype=torch.uint8)
    truth[truth == 2] = 255
    for canvas in ((7, 5), (7, 7)):
        placed = Placed((7, 5), canvas)
        row = np.array([tally(on_grids(Prediction(values), 0, placed, 4), truth, 4, canvas != placed.hw)])
        for grid in GRIDS:
            for void in VOIDS:
                stored = tuple(under(row, grid, void)[0])
                assert stored == counted(Rule(grid, void), placed, values[0], truth), (canvas, grid, void)
    with pytest.raises(ValueError, match="0 and 1"):
        tally(on_grids(Prediction(values), 0, placed, 4), truth + 3, 4, True)


def test_truth_on_the_square_is_the_network_s_own() -> None:
    label = torch.randint(0, 3, (37, 53), dtype=torch.uint8)
    _, _, (squashed,) = ValTransform(41, squash=True)(None, torch.zeros(37, 53, 3).numpy(), [label.numpy()])
    assert (Rule("square").truth(label, 41).numpy() == squashed).all()


def test_a_class_never_drawn_counts_zero_or_is_left_out() -> None:
    rows = {7: [Row(0, 1, 0, Counts(3, 4, 9, 10), Spread(3, 0, 0)), Row(1, 2, 1, Counts(1, 2, 9, 10), Spread(1, 0, 0))]}
    for mean, miou in (("m0", 1.25 / 3), ("m1", 1.25 / 2)):
        absent = Rule(mean=mean).absent((1, 2, 3), {1, 2})
        assert pooled(EpisodeTable.of("hash", rows, absent=absent))["miou"] == miou
        meter = FewShotMeter([1], absent=absent)
        meter.update(torch.tensor([[1, 0]]), torch.tensor([[1, 1]]), 1)
        assert meter.result()["miou"] == 0.5 / (1 + absent)
    result = {"classes": {"3": "hair drier"}, "seeds": [{"seed": 321, "undrawn": [3]}]}
    assert "hair drier. Each counts 0" in undrawn(result)[0]
    assert "left out" in undrawn(result | {"config": {"Test_Finetune": {"mean": "m1"}}})[0]
