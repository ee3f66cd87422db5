"""Evaluation: predictions at file size, whole-number counts summed over ranks, pictures of chosen episodes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from util.config import Config
from util.data.episodes import Episode, EpisodeDataset, episodes_per_class
from util.data.folds import Fold
from util.data.loading import Loader, RangeSampler
from util.report.viz import Card, episode_panels
from util.run.distributed import Context
from util.run.log import RunLog
from util.score.causes import Spread, spread
from util.score.metrics import Counts, FewShotMeter, SemanticMeter, decide, to_original
from util.score.priors import MAP_NAMES, PriorMeter

Predict = Callable[[Any], Any]  # batch on the device -> model.Prediction


def settings(config: Config) -> dict[str, Any]:
    """What of a config `evaluate_episodes` and `evaluate_images` go by."""
    train = config.Train
    return {"batch": train.batch_size_val, "workers": train.workers, "squash": train.resized_val,
            "precision": config.Runtime.precision, "on_error": config.Data.on_error}


class Row(NamedTuple):
    """One evaluated episode: its number, class and query (position in the index), its pixel counts, where its prediction lies."""

    number: int
    cls: int
    query: int
    counts: Counts
    spread: Spread


def evaluate_episodes(
    predict: Predict, data: EpisodeDataset, count: int, fold: Fold, context: Context, log: RunLog, *,
    batch: int, workers: int, squash: bool, precision: str = "fp32", on_error: str = "stop", label: str = "test",
) -> tuple[dict, list[Row]]:  # fmt: skip
    """Episodes 0..count-1, sharded over the ranks: any number of ranks and any batch size give the same counts.

    Returns:
        scores: `FewShotMeter.result()` of the final prediction with, where the system has them, `meta_miou` (few-shot
        branch alone), `base_miou` (base learner on the base classes, foreground), `prior_quality` (`PriorMeter.result`) and
        `skipped`, messages about episodes that could not be read (`Data.on_error`); and a row for every other episode.
    """
    classes = sorted(episodes_per_class(data.episodes, count))
    meters: dict[str, FewShotMeter] = defaultdict(lambda: FewShotMeter(classes, context.device))
    base, priors = SemanticMeter(len(fold.base) + 1, context.device), PriorMeter(classes, context.device)
    rows: list[Row] = []
    sampler = RangeSampler(0, count, batch * context.world, context, drop_last=False)
    loader = Loader(data, sampler, workers, context.device, log.warning, on_error=on_error)
    with log.progress(len(sampler), label) as bar:
        for episode in loader:
            episode = episode.to(context.device, non_blocking=True)
            with torch.autocast(context.device.type, torch.bfloat16, enabled=precision == "bf16"):
                prediction = predict(episode)
            for i in range(len(episode)):
                truth, cls = episode.original_mask[i], int(episode.cls[i])
                size, number = tuple(truth.shape), int(episode.number[i])
                pred = decide(prediction.final[i], votes_of(prediction, i), size, squash)
                counts = meters["final"].update(pred, truth, cls)
                where = spread(pred, episode.original_label[i], cls)
                rows.append(Row(number, cls, data.episodes.spec(number).query, counts, where))
                priors.update({name: prior[i] for name, prior in prediction.maps.items()}, truth, cls, squash)
                if prediction.meta is not None:
                    meters["meta"].update(to_original(prediction.meta[i], size, squash).argmax(0), truth, cls)
                if prediction.base is not None:
                    base.update(to_original(prediction.base[i], size, squash).argmax(0), episode.original_base[i])
                for name, mask in prediction.baselines.items():
                    scores = torch.stack([~mask[i], mask[i]]).float()
                    meters[f"baseline {name}"].update(to_original(scores, size, squash).argmax(0), truth, cls)
            bar.step(len(episode))
    names = sorted({name for part in context.gather([sorted(meters)]) for name in part})  # a rank may have had no episode
    for name in names:
        context.all_reduce(meters[name].state)
    context.all_reduce(base.state)
    results = {name: meters[name].result() for name in names}
    scores = results["final"] | skipped(loader, context)
    if "meta" in results:
        scores["meta_miou"] = results["meta"]["miou"]
    if base.state[1:].any() and base.state[:, 1:].any():
        scores["base_miou"] = base.result()["miou_foreground"]
    if quality := priors.result(context):
        scores["prior_quality"] = quality
    baselines = {name.removeprefix("baseline "): {key: result[key] for key in ("miou", "fb_iou")}
                 for name, result in results.items() if name.startswith("baseline ")}
    return scores | ({"baselines": baselines} if baselines else {}), sorted(context.gather(rows))


def evaluate_images(
    predict: Predict, data: Dataset, fold: Fold, context: Context, log: RunLog, *,
    batch: int, workers: int, squash: bool, precision: str = "fp32", on_error: str = "stop",
) -> dict:  # fmt: skip
    """The base learner on every image of the list: mIoU over the base classes, without and with background."""
    meter = SemanticMeter(len(fold.base) + 1, context.device)
    sampler = RangeSampler(0, len(data), batch * context.world, context, drop_last=False)
    loader = Loader(data, sampler, workers, context.device, log.warning, on_error=on_error)
    with log.progress(len(sampler), "base classes") as bar:
        for images in loader:
            images = images.to(context.device, non_blocking=True)
            with torch.autocast(context.device.type, torch.bfloat16, enabled=precision == "bf16"):
                prediction = predict(images)
            for scores, truth in zip(prediction.final, images.original_label, strict=True):
                meter.update(to_original(scores, tuple(truth.shape), squash).argmax(0), truth)
            bar.step(len(images))
    context.all_reduce(meter.state)
    result, without = meter.result(), skipped(loader, context)
    return without | {
        "miou": result["miou_foreground"], "background_miou": result["miou_with_background"],
        "episodes": len(data) - len(without.get("skipped", [])),
        "pixel_accuracy": result["pixel_accuracy"],
        "per_class": {cls: result["per_class"][rank] for rank, cls in enumerate(fold.base, start=1)},
    }  # fmt: skip


def skipped(loader: Loader, context: Context) -> dict[str, list[str]]:
    """{"skipped": messages of all ranks}, empty when nothing was skipped."""
    messages = context.gather([f"{failure.number}: {failure.message}" for failure in loader.skipped])
    return {"skipped": messages} if messages else {}


def gallery(predict: Predict, data: EpisodeDataset, groups: dict[str, Sequence[int]], names: Sequence[str], device: torch.device,
            squash: bool) -> list[Card]:  # fmt: skip
    """Runs chosen episodes again and draws them; episode i is the same whenever it is asked for.

    Args:
        groups: section of the gallery -> episode numbers.
        names: class names, 0-based.
    """
    cards = []
    for group, numbers in groups.items():
        for number in numbers:
            sample: Episode = data[number]
            episode = sample.to(device)
            prediction = predict(episode)
            side = tuple(sample.query.shape[2:])
            pred = prediction.final[0].argmax(0).cpu().numpy().astype("uint8")
            truth = sample.query_mask[0].numpy()
            shots = zip(sample.support[0], sample.support_mask[0], strict=True)
            supports = [(_picture(image), mask.numpy()) for image, mask in shots]
            maps = {MAP_NAMES.get(name, name): value[0].float().cpu().numpy() for name, value in prediction.maps.items()}
            original, cls = sample.original_mask[0], int(sample.cls)
            shown = decide(prediction.final[0], votes_of(prediction, 0), tuple(original.shape), squash).cpu()
            iou = FewShotMeter([cls]).update(shown, original, cls).iou
            name = names[cls - 1]
            if group == "confused":
                name += f", confused with {names[spread(shown, sample.original_label[0], cls).other - 1]}"
            cards.append(Card(
                title=f"{name}, IoU {100 * iou:.1f}",
                subtitle=f"episode {number}: {sample.query_name[0]} with {', '.join(sample.support_names[0])} ({side[0]} px)",
                group=group,
                number=number,
                panels=episode_panels(supports, _picture(sample.query[0]), maps, pred, truth),
            ))  # fmt: skip
    return cards


def votes_of(prediction: Any, i: int) -> torch.Tensor | None:
    """The votes of episode i, where shots vote."""
    return None if prediction.votes is None else prediction.votes[i]


def _picture(image: torch.Tensor):
    """3 H W float 0..255 -> H W 3 uint8."""
    return image.clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype("uint8")
