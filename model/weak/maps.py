"""From image-level labels to class maps: text bank, pairs of image and class, class activation maps, their refinement.

Training-free (CLIP-ES, CVPR 2023; WeCLIP Sec. 3.2). Shapes: B images, C foreground classes, P pairs of an image and one of its
labels, K slots (the most labels of one image; slots that an image does not use hold zeros), N = 1 + h*w tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.clip import Cam, Clip, ClipTrunk, box_mask, min_max, softmax_grad_cam
from model.clip.text import TextEncoder
from model.ops import resize
from model.weak.affinity import filtered, patch_part, spread, transition_matrix
from util.config import Method
from util.errors import UserError

BACKGROUND = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway", "railroad",
    "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge", "sign",
)  # fmt: skip


@dataclass
class MapOptions(Method):
    """What both systems set of the class maps."""

    statistics: Literal["clip", "imagenet"] = "clip"  # pixel statistics that CLIP sees
    template: str = "a clean origami {}."
    # Texts that compete with the labels; None: the published ones. One that ends with a full stop is not put into the template.
    background: list[str] | None = None
    layers: int = 8  # last blocks whose attention is averaged
    box: float = 0.4  # threshold of the box mask; published: 0.4 on VOC, 0.7 on COCO

    def check(self) -> None:
        if "{}" not in self.template:
            raise UserError(f"Method.template = {self.template!r}: the place of the class name, {{}}, is missing")
        if not 0 <= self.box < 1:
            raise UserError(f"Method.box = {self.box}: the threshold of the box mask lies in 0..1, and is less than 1")
        if self.layers < 1:
            raise UserError(f"Method.layers = {self.layers}: average the attention of at least one block")


class Bank(NamedTuple):
    """L2-normalised rows of CLIP's text tower."""

    foreground: Tensor  # C D, by class id
    background: Tensor  # M D


def text_bank(text: TextEncoder, classes: Sequence[str], options: MapOptions, cache: Path | None = None) -> Bank:
    """Embed every class text and the background texts. cache: see `TextEncoder.bank`."""
    background = background_texts(classes) if options.background is None else options.background
    others = [text if text.endswith(".") else options.template.format(text) for text in background]
    rows = text.bank([*(options.template.format(name) for name in classes), *others], cache=cache)
    return Bank(rows[: len(classes)], rows[len(classes) :])


def background_texts(classes: Sequence[str]) -> list[str]:
    """Return the published background texts without those that are a word of a class (on COCO keyboard and sign)."""
    words = {word for name in classes for word in re.findall(r"\w+", name)}
    return [name for name in BACKGROUND if name not in words]


@dataclass
class Pairs:
    """Every label of every image as one row, images first, then class ids, both ascending."""

    image: Tensor  # P int64, row of the batch
    cls: Tensor  # P int64, 0-based class
    slot: Tensor  # P int64, which label of its image this is
    first: Tensor  # B int64, an image's first pair; 0 for an image without labels
    value: Tensor  # B 1+K uint8, label value of each channel: 0, then class + 1; 0 for unused slots

    @classmethod
    def of(cls, present: Tensor, device: torch.device) -> "Pairs":
        """present: B C bool. Keep it on the CPU: on a device its count has to be waited for."""
        present = present.cpu()
        image, label = present.nonzero(as_tuple=True)
        counts = present.sum(1)
        start = counts.cumsum(0) - counts
        slot = torch.arange(len(image)) - start[image]
        value = torch.zeros(len(present), 1 + max(int(counts.max()), 1), dtype=torch.uint8)
        value[image, 1 + slot] = (label + 1).to(torch.uint8)
        first = torch.where(counts > 0, start, 0)
        return cls(*(x.to(device, non_blocking=True) for x in (image, label, slot, first, value)))

    def __len__(self) -> int:
        return len(self.image)

    def slots(self, rows: Tensor) -> Tensor:
        """One row per pair, P ... -> B K ..., zeros in unused slots."""
        B, channels = self.value.shape
        out = rows.new_zeros(B, channels - 1, *rows.shape[1:])
        out[self.image, self.slot] = rows
        return out


class Seen(NamedTuple):
    """What one pass through all blocks but the last leaves of B images."""

    tokens: Tensor  # B N C, input of the last block
    hidden: list[Tensor]  # B N C of each block, in order; empty where not asked for
    attention: dict[int, Tensor]  # block -> B N N
    grid: tuple[int, int]


def see(trunk: ClipTrunk, images: Tensor, layers: int = 1, hidden: bool = False) -> Seen:
    """Run normalised images B 3 H W through the trunk once.

    Args:
        layers: last blocks whose attention is wanted, the last of all included, which is not run here.
        hidden: whether to keep the tokens of every block.
    Raises:
        UserError: an image smaller than a patch, or more layers than blocks.
    """
    last = len(trunk.blocks) - 1
    if layers > last + 1:
        raise UserError(f"attention of the last {layers} blocks is wanted, but this CLIP has {last + 1}; lower `layers`")
    if min(images.shape[2:]) < trunk.patch:
        raise UserError(f"images of {images.shape[2]}x{images.shape[3]} pixels are smaller than CLIP's patch of {trunk.patch}")
    tokens, grid = trunk.embed(images)
    run = trunk.run(tokens, stop=last, keep_attention=range(last + 1 - layers, last), keep_hidden=range(last if hidden else 0))
    return Seen(run.tokens, list(run.hidden.values()), run.attention, grid)


def class_maps(clip: Clip, bank: Bank, seen: Seen, pairs: Pairs) -> Cam:
    """Class activation map of every pair: its image's labels and all background texts compete, absent classes do not."""
    rows = torch.cat(bank)
    C = len(bank.foreground)
    present = torch.zeros(len(seen.tokens), len(rows), dtype=torch.bool, device=seen.tokens.device)
    present[:, C:] = True
    present[pairs.image, pairs.cls] = True
    return softmax_grad_cam(
        clip.visual, seen.tokens[pairs.image], seen.grid, rows, clip.logit_scale, present[pairs.image], pairs.cls
    )


class Refined(NamedTuple):
    """Maps of every image and slot."""

    cam: Tensor  # B K h w in 0..1, class activation maps
    spread: Tensor  # B K h w, spread by the transition matrix; not rescaled
    chance: Tensor  # B K, probability of the class times the number of candidates: below 1 it is less likely than chance


@torch.no_grad()
def refined_maps(clip: Clip, bank: Bank, seen: Seen, pairs: Pairs, box: float, layers: int,
                 rfm: tuple[Tensor, bool] | None = None) -> Refined:  # fmt: skip
    """Class activation maps, and the same spread over their objects by attention, for a batch.

    Args:
        layers: last blocks whose attention is used; `seen` must hold it.
        rfm: (the decoder's affinity B n n, absolute scores or not) filter the blocks, see `filtered`; None: their mean.
    """
    with torch.autocast(seen.tokens.device.type, enabled=False):
        if not len(pairs):
            nothing = seen.tokens.new_zeros(*pairs.slots(pairs.cls).shape, *seen.grid)
            return Refined(nothing, nothing, nothing[..., 0, 0])
        found = class_maps(clip, bank, seen, pairs)
        attention = patch_part([*last_blocks(seen, layers), found.attention[pairs.first]])
        combined = attention.mean(1) if rfm is None else filtered(attention, *rfm)[0]
        mask = pairs.slots(box_mask(found.map, box))
        cam = pairs.slots(found.map)
        own = found.probability.gather(1, pairs.cls[:, None])[:, 0]
        candidates = (pairs.value > 0).sum(1)[pairs.image] + len(bank.background)
        return Refined(cam, spread(transition_matrix(combined), cam, mask), pairs.slots(own * candidates))


def last_blocks(seen: Seen, layers: int) -> list[Tensor]:
    """Attention B N N of the last `layers` blocks but the very last, in order."""
    blocks = sorted(seen.attention)
    return [seen.attention[i] for i in blocks[len(blocks) - (layers - 1) :]]


def with_background(maps: Tensor, size: tuple[int, int], power: float = 1) -> Tensor:
    """Rescale each map, bring it to a size and put the background before them: B K h w -> B 1+K H W.

    The background is (1 - largest map) ** power, taken at the new size.
    """
    maps = resize(min_max(maps.flatten(2)).view_as(maps), size, corners=False)
    return torch.cat([(1 - maps.amax(1, keepdim=True)) ** power, maps], 1)


def decide(scores: Tensor, pairs: Pairs) -> Tensor:
    """Label map of B 1+K H W scores >= 0: B H W uint8. An unused slot scores 0 and never wins, the background comes first."""
    best = scores.argmax(1)
    return pairs.value.gather(1, best.flatten(1)).view_as(best)


def class_scores(scores: Tensor, pairs: Pairs, classes: int) -> Tensor:
    """Scores of slots as scores of classes: B 1+K H W -> B 1+classes H W, classes that an image does not have at 0."""
    out = scores.new_zeros(len(scores), 1 + classes, *scores.shape[2:])
    out[:, 0] = scores[:, 0]
    out[pairs.image, 1 + pairs.cls] = scores[pairs.image, 1 + pairs.slot]
    return out
