"""Few-shot episodes as a task: predictions at file size, whole-number counts summed over processes."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from util.data.episodes import Episode, EpisodeDataset, episodes_per_class
from util.data.folds import Fold
from util.data.manifest import episode_hash
from util.data.source import EpisodeSource
from util.data.transforms import Placed
from util.data.wrong_supports import WrongSupports
from util.score.causes import spread
from util.score.metrics import Counts, FewShotMeter, SemanticMeter
from util.score.priors import PriorMeter
from util.score.rules import DEFAULT, Rule, tally, under
from util.score.table import EpisodeTable, Row
from util.score.task import How, Predict, Scores, Test


class FewShotTask(EpisodeSource):
    """Episodes of novel classes; see `util.score.task.Task`."""

    headline, leaks = "miou", True
    says: ClassVar[dict[str, str]] = {}

    @property
    def classes(self) -> tuple[int, ...]:
        return self.fold.novel

    def validation(self) -> Test:
        return Test("validation", self.episodes(self.validation_episodes()), self.config.Train.val_episodes)

    def tests(self) -> dict[int, Test]:
        return {seed: Test(f"seed {seed}", self.episodes(episodes), self.count or len(episodes))
                for seed, episodes in self.test_episodes().items()}

    def evaluate(self, predict: Predict, test: Test, how: How) -> Scores:
        rule = Rule.of(self.config)
        fold = replace(self.fold, base=()) if self.config.Test_Finetune.trained_on else self.fold  # its base classes are no one's
        scores = evaluate_episodes(predict, test.data, test.count, fold, how, test.label, rule)
        if how.control:
            scores.control = evaluate_control(predict, WrongSupports(test.data, test.count), how, rule)
        return scores

    def table(self, scores: Mapping[int, Scores]) -> EpisodeTable:
        rows = {seed: found.rows for seed, found in scores.items()}
        absent = Rule.of(self.config).absent(self.classes, {row.cls for some in rows.values() for row in some})
        return EpisodeTable.of(episode_hash(self.test_episodes(), self.count), rows, absent=absent)


def on_grids(prediction: Any, i: int, file: Placed, side: int) -> Callable[[str], Tensor]:
    """Return a function from a grid to the prediction of episode i on it, H W {0, 1}; each is made once.

    The image's part of the letterbox square is that of the original grid, also where shots vote (their vote is one of the image).
    """

    @cache
    def decide(grid: str) -> Tensor:
        pred = prediction.decide(i, Rule(grid).place(file, side))
        if grid == "letterbox":
            pred[: file.hw[0], : file.hw[1]] = decide("original")
        return pred

    return decide


def evaluate_episodes(
    predict: Predict, data: EpisodeDataset, count: int, fold: Fold, how: How, label: str = "test", rule: Rule = DEFAULT
) -> Scores:
    """Evaluate episodes 0..count-1, shared out among the processes. Their number and the batch size change no count.

    All scores but the base learner's follow the rule.

    Returns:
        record: `FewShotMeter.result()` of the final prediction with, where the system has them, `meta_miou` (few-shot branch
        alone), `base_miou` (base learner on the base classes), `prior_quality` (`PriorMeter.result`), `baselines`, `undrawn`,
        novel classes without an episode, and `skipped`, messages about episodes that could not be read (`Data.on_error`);
        and a row for every other episode.
    """
    context, classes = how.context, sorted(episodes_per_class(data.episodes, count))
    names = data.episodes.index.names
    absent = rule.absent(fold.novel, classes)
    meters: dict[str, FewShotMeter] = defaultdict(lambda: FewShotMeter(classes, context.device, names, absent))
    base, priors = SemanticMeter((0, *fold.base), context.device), PriorMeter(classes, context.device, absent)
    rows: list[Row] = []
    loader = how.loader(data, count)
    with how.log.progress(len(loader), label) as bar:
        for episode in loader:
            episode: Episode = episode.to(context.device, non_blocking=True)
            with context.autocast():
                prediction = predict(episode)
            side, trivial = episode.query.shape[-1], {}
            if how.trivial:  # what can be said without a look at the query
                trivial = {"everything foreground": torch.ones_like(episode.query_mask, dtype=torch.bool),
                           "mean of the support masks": (episode.support_mask == 1).float().mean(1) >= 0.5}
            for i, file in enumerate(episode.placed):
                placed, truth = rule.place(file, side), rule.truth(episode.original_mask[i], side)
                cls, number = int(episode.cls[i]), int(episode.number[i])
                decide = on_grids(prediction, i, file, side)
                counted = tally(decide, episode.original_mask[i], side, file.canvas != file.hw)
                counts = Counts(*under(np.array([counted]), rule.grid, rule.void)[0].tolist())
                meters["final"].add(counts, cls)
                where = spread(decide(rule.grid), rule.truth(episode.original_label[i], side), cls)
                rows.append(Row(number, cls, data.episodes.spec(number).query, counts, where, counted))
                priors.update({name: prediction.maps[name][i] for name in prediction.priors}, truth, cls, placed)
                if prediction.meta is not None:
                    meters["meta"].update(placed.restore(prediction.meta[i]).argmax(0), truth, cls)
                if prediction.base is not None and fold.base:
                    base.update(file.restore(prediction.base[i]).argmax(0), episode.original_base[i])
                for name, mask in (prediction.baselines | trivial).items():
                    scores = torch.stack([~mask[i], mask[i]]).float()
                    meters[f"baseline {name}"].update(placed.restore(scores).argmax(0), truth, cls)
            bar.step(len(episode))
    found = sorted({name for part in context.gather([sorted(meters)]) for name in part})  # a process may have had no episode
    for name in found:
        context.all_reduce(meters[name].state)
    context.all_reduce(base.state)
    results = {name: meters[name].result() for name in found}
    record = results["final"] | how.skipped(loader)
    if "meta" in results:
        record["meta_miou"] = results["meta"]["miou"]
    if base.state[1:].any() and base.state[:, 1:].any():
        record["base_miou"] = base.result()["miou"]
    if undrawn := [c for c in fold.novel if c not in classes]:
        record["undrawn"] = undrawn
    if quality := priors.result(context):
        record["prior_quality"] = quality
    baselines = {name.removeprefix("baseline "): {key: result[key] for key in ("miou", "fb_iou")}
                 for name, result in results.items() if name.startswith("baseline ")}
    return Scores(record | ({"baselines": baselines} if baselines else {}), sorted(context.gather(rows)))


def evaluate_control(predict: Predict, data: WrongSupports, how: How, rule: Rule) -> list[Row]:
    """Evaluate the wrong-support control; return a row for every episode that has one, of all processes."""
    rows: list[Row] = []
    if not len(data):
        how.log.warning("no support gap: the control needs episodes of two classes")
        return rows
    loader = how.loader(data, len(data))
    with how.log.progress(len(loader), "wrong supports") as bar:
        for episode in loader:
            episode: Episode = episode.to(how.context.device, non_blocking=True)
            with how.context.autocast():
                prediction = predict(episode)
            side = episode.query.shape[-1]
            for i, file in enumerate(episode.placed):
                cls, number, pred = int(episode.cls[i]), int(episode.number[i]), on_grids(prediction, i, file, side)(rule.grid)
                counts = FewShotMeter([cls]).update(pred, rule.truth(episode.original_mask[i], side), cls)
                where = spread(pred, rule.truth(episode.original_label[i], side), cls)
                rows.append(Row(number, cls, data.data.episodes.spec(number).query, counts, where))
            bar.step(len(episode))
    return sorted(how.context.gather(rows))
