"""Pictures of chosen samples of an evaluation. Each sample is predicted again and drawn; sample i is always the same."""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.episodes import Batch, Episode
from util.data.semantic import Images
from util.report.viz import Card, colours, episode_panels, heatmap
from util.run.distributed import Context
from util.score.causes import spread
from util.score.metrics import FewShotMeter, confusion, intersection_union
from util.score.priors import title
from util.score.task import Predict


@torch.no_grad()
def gallery(predict: Predict, data: Dataset, groups: dict[str, Sequence[int]], names: Sequence[str], context: Context
            ) -> list[Card]:  # fmt: skip
    """Draw cards of the samples with the given numbers.

    Args:
        groups: section of the gallery -> sample numbers.
        names: class names, 0-based.
    """
    cards = []
    for group, numbers in groups.items():
        for number in numbers:
            sample: Batch = data[number]
            with context.autocast():  # as in evaluation: a card's IoU is its row's
                prediction = predict(sample.to(context.device))
            cards.append(card(sample, prediction, group, number, names))
    return cards


@singledispatch
def card(sample: Batch, prediction: Any, group: str, number: int, names: Sequence[str]) -> Card:
    """The card of a batch of one, for each kind of batch."""
    raise TypeError(f"no pictures of a {type(sample).__name__}")


@card.register
def _episode(sample: Episode, prediction: Any, group: str, number: int, names: Sequence[str]) -> Card:
    supports = [(picture(image), mask.numpy()) for image, mask in zip(sample.support[0], sample.support_mask[0], strict=True)]
    pred = prediction.final[0].argmax(0).cpu().numpy().astype("uint8")
    original, cls = sample.original_mask[0], int(sample.cls)
    shown = prediction.decide(0, sample.placed[0]).cpu()
    iou = FewShotMeter([cls]).update(shown, original, cls).iou
    name = names[cls - 1]
    if group == "confused":
        name += f", confused with {names[spread(shown, sample.original_label[0], cls).other - 1]}"
    maps = {title(name): value[0].float().cpu().numpy() for name, value in prediction.maps.items()}
    return Card(
        title=f"{name}, IoU {100 * iou:.1f}",
        subtitle=f"episode {number}: {sample.query_name[0]} with {', '.join(sample.support_names[0])} "
                 f"({sample.query.shape[-1]} px)",
        group=group,
        number=number,
        panels=episode_panels(supports, picture(sample.query[0]), maps, pred, sample.query_mask[0].numpy()),
    )  # fmt: skip


@card.register
def _images(sample: Images, prediction: Any, group: str, number: int, names: Sequence[str]) -> Card:
    """Draw a batch of one `Images`, a colour per channel; the score is the mean IoU over the channels in truth or prediction."""
    truth, shown = sample.original_label[0], prediction.decide(0, sample.placed[0]).cpu()
    counts = intersection_union(confusion(shown, truth, prediction.final.shape[1]))
    found = counts[:, 1] > 0
    iou = float((counts[found, 0] / counts[found, 1]).mean()) if found.any() else 1.0
    image = picture(sample.image[0])
    maps = [(title(name), heatmap(value[0].float().cpu().numpy(), image)) for name, value in prediction.maps.items()]
    return Card(
        title=f"image {number}, mean IoU {100 * iou:.1f}",
        subtitle=f"{sample.name[0]} ({image.shape[1]} x {image.shape[0]} px)",
        group=group,
        number=number,
        panels=[("image", image), *maps, ("prediction", colours(shown.numpy())), ("truth", colours(truth.numpy()))],
    )


def picture(image: torch.Tensor) -> np.ndarray:
    """Turn 3 H W float 0..255 into H W 3 uint8."""
    return image.clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype("uint8")
