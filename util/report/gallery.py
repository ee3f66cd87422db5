"""Pictures of chosen samples of an evaluation. Each sample is predicted again and drawn; sample i is always the same."""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.episodes import Batch, Episode
from util.data.semantic import Images
from util.report.viz import Card, episode_panels, heatmap, tinted, with_legend
from util.run.distributed import Context
from util.score.causes import spread
from util.score.metrics import FewShotMeter, confusion, intersection_union
from util.score.priors import title


@torch.no_grad()
def gallery(system: Any, data: Dataset, groups: dict[str, Sequence[int]], names: Sequence[str], context: Context
            ) -> list[Card]:  # fmt: skip
    """Draw cards of the samples with the given numbers.

    Args:
        system: `predict` gives the prediction, `panels` further pictures (model.system.System).
        groups: section of the gallery -> sample numbers.
        names: class names, 0-based.
    """
    cards, classes = [], getattr(data, "classes", ())
    for group, numbers in groups.items():
        for number in numbers:
            sample: Batch = data[number]
            moved = sample.to(context.device)
            with context.autocast():  # as in evaluation: a card's IoU is its row's
                prediction, panels = system.predict(moved), system.panels(moved)
            prediction.maps |= panels
            cards.append(card(sample, prediction, group, number, names, classes))
    return cards


@singledispatch
def card(sample: Batch, prediction: Any, group: str, number: int, names: Sequence[str], classes: Sequence[int]) -> Card:
    """The card of a batch of one, for each kind of batch. classes: of the channels, of images."""
    raise TypeError(f"no pictures of a {type(sample).__name__}")


@card.register
def _episode(sample: Episode, prediction: Any, group: str, number: int, names: Sequence[str], classes: Sequence[int]) -> Card:
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
def _images(sample: Images, prediction: Any, group: str, number: int, names: Sequence[str], classes: Sequence[int]) -> Card:
    """Draw a batch of one `Images`, a colour per class; the score is the mean IoU over the channels in truth or prediction."""
    truth, shown = sample.original_label[0], prediction.decide(0, sample.placed[0]).cpu()
    counts = intersection_union(confusion(shown, truth, prediction.final.shape[1]))
    found = counts[:, 1] > 0
    iou = float((counts[found, 0] / counts[found, 1]).mean()) if found.any() else 1.0
    image = picture(sample.image[0])
    table = np.array([*classes, *[255] * (256 - len(classes))], np.uint8)  # channel -> class

    def painted(label: torch.Tensor) -> np.ndarray:
        of_class = table[label.cpu().numpy()]
        found, areas = np.unique(of_class[of_class < 255], return_counts=True)
        entries = [(int(c), names[c - 1] if c else "background") for c in found[np.argsort(-areas)]]
        base = cv2.resize(image, of_class.shape[::-1], interpolation=cv2.INTER_LINEAR)  # the network may see another size
        return with_legend(tinted(base, of_class, alpha=0.7), entries)

    maps = [(title(name), heatmap(value[0].float().cpu().numpy(), image) if value.is_floating_point() else painted(value[0]))
            for name, value in prediction.maps.items()]  # fmt: skip
    return Card(
        title=f"image {number}, mean IoU {100 * iou:.1f}",
        subtitle=f"{sample.name[0]} ({image.shape[1]} x {image.shape[0]} px)",
        group=group,
        number=number,
        panels=[("image", image), *maps, ("prediction", painted(shown)), ("truth", painted(truth))],
    )


def picture(image: torch.Tensor) -> np.ndarray:
    """Turn 3 H W float 0..255 into H W 3 uint8."""
    return image.clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype("uint8")
