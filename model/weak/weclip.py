"""WeCLIP (CVPR 2024): a decoder on a frozen CLIP, trained with pseudo labels that CLIP's own maps give at every step."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.clip.load import without_clip
from model.inference import multi_scale
from model.ops import resize
from model.system import Frozen, Prediction
from model.weak.decoder import Head, affinity_of
from model.weak.losses import IGNORE, affinity_loss, balanced_loss, pair_labels
from model.weak.maps import Bank, MapOptions, Pairs, Seen, class_scores, decide, refined_maps, see, with_background
from model.weak.par import refine_by_colour
from model.weak.system import Weak
from util.errors import UserError
from util.run.identity import Facts
from util.score import crf

# Options that tell checkpoints apart.
LEARNED_WITH = ("statistics", "template", "box", "layers", "rfm_layers", "static_steps", "score", "outside", "absent")
RADIUS = 8  # patches; pairs farther apart are not in the affinity loss


@dataclass
class Options(MapOptions):
    """The published recipe on VOC, but for the start of RFM; on COCO box=0.7, rfm_layers=10, static_steps=40000."""

    statistics: Literal["clip", "imagenet"] = "imagenet"  # as published; `clip` is what CLIP was trained with
    rfm_layers: int = 6  # last blocks that RFM filters
    static_steps: int = 15_000  # before RFM; the published VOC run counts validation images too, which makes it 9144
    score: Literal["signed", "absolute"] = "signed"  # how RFM compares attention with the affinity; the paper's is absolute
    outside: Literal["label", "ignore"] = "label"  # what pixels of a crop outside the image are
    # Labels that CLIP finds less likely in the crop than chance: as they are, left out, or their maps scaled by how much less.
    absent: Literal["keep", "drop", "weigh"] = "keep"
    dropout: float = 0.1  # of whole channels of the fused features
    affinity_weight: float = 0.1
    long_side: int = 512  # of a tested image
    scales: list[float] = field(default_factory=lambda: [1.0, 0.75])  # of a tested image, each with its mirror image

    def check(self) -> None:
        super().check()
        if self.rfm_layers < 2:
            raise UserError(f"Method.rfm_layers = {self.rfm_layers}: RFM chooses among at least two blocks")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"Method.scales = {self.scales}: give at least one, all positive")
        if self.static_steps < 0:
            raise UserError(f"Method.static_steps = {self.static_steps}: a number of steps is not negative")
        if self.long_side < 1:
            raise UserError(f"Method.long_side = {self.long_side}: a tested image needs at least a pixel")
        if not 0 <= self.dropout < 1:
            raise UserError(f"Method.dropout = {self.dropout}: choose 0 or more, less than 1")
        if self.affinity_weight < 0:
            raise UserError(f"Method.affinity_weight = {self.affinity_weight}: the weight of a loss is not negative")


class WeCLIP(Weak):
    """WeCLIP. See `Weak` for what it reads of a batch; `label` is read in no case."""

    facts = Facts(identity=tuple(f"Method.{name}" for name in LEARNED_WITH), frozen=False, clip=True)
    Options = Options
    optimizer_name = "adamw"  # with weight decay on all tensors
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        ("head.fuse.mlps.", "decoder_fts_fuse.linears_modulelist."), ("head.fuse.mix.", "decoder_fts_fuse.linear_fuse."),
        ("head.decoder.blocks.", "decoder.transformer.resblocks."), ("head.decoder.classify.", "decoder.linear_pred."),
    )  # fmt: skip
    by_product: ClassVar[tuple[str, ...]] = ("par.kernel", "encoder.visual.positional_embedding_new")  # carry no information
    options: Options

    def __init__(self, clip: Frozen, bank: Bank, options: Options):
        super().__init__(clip, bank, options)
        trunk = self.vision.visual
        self.head = Head(len(trunk.blocks) - 1, trunk.visual.conv1.out_channels, 1 + self.classes, options.dropout)

    # Training.

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        """Weighted terms. From `static_steps` finished steps on, RFM makes the pseudo labels."""
        images = self.normalise(batch.image)
        pairs = self.pairs(batch.present, images.device)
        rfm = step >= self.options.static_steps
        seen = see(self.vision.visual, images, self.options.rfm_layers if rfm else self.options.layers, hidden=True)
        fused, logits = self.head(seen.hidden, seen.grid)
        affinity = affinity_of(fused)
        label = self.pseudo_label(seen, images, pairs, affinity.detach() if rfm else None, batch.valid)
        self.count(label, batch.label)
        return self.terms(logits, affinity, label)

    def pseudo_label(self, seen: Seen, images: Tensor, pairs: Pairs, affinity: Tensor | None = None,
                     valid: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:  # fmt: skip
        """Label maps of normalised images B 3 H W: B h w uint8 at the images' size, or another.

        Args:
            affinity: B n n of the decoder, for RFM; None: the mean of the last blocks (CLIP-ES).
            valid: B 4, see `Weak`; read where `outside` is `ignore`.
        """
        o = self.options
        rfm = None if affinity is None else (affinity, o.score == "absolute")
        maps = refined_maps(self.vision, self.bank, seen, pairs, o.box, o.layers if rfm is None else o.rfm_layers, rfm)
        scores = with_background(maps.spread, size or images.shape[2:])
        if o.absent != "keep":
            weight = (maps.chance >= 1).to(scores.dtype) if o.absent == "drop" else maps.chance.clamp(max=1)
            shown = scores[:, 1:] * weight[..., None, None]
            scores = torch.cat([1 - shown.amax(1, keepdim=True), shown], 1)
        label = decide(refine_by_colour(images, scores), pairs)
        return label if o.outside == "label" or valid is None else ignore_outside(label, valid)

    def terms(self, logits: Tensor, affinity: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Weighted losses of class logits B C h w and affinity B n n against a label map B H W."""
        near = pair_labels(label, self.vision.visual.patch, logits.shape[2:], RADIUS)
        return {"segmentation": balanced_loss(logits, label),
                "affinity": self.options.affinity_weight * affinity_loss(affinity, near)}

    # Testing: blocks 0..n-2 and the decoder, without attention maps, class activation maps or labels.

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images B 3 H W -> class logits B C H // patch W // patch."""
        seen = see(self.vision.visual, images, hidden=True)
        return self.trained(seen.hidden, seen.grid)[1]

    def scaled(self, images: Tensor) -> Iterator[Tensor]:
        """The network's inputs of normalised images B 3 H W: brought to `long_side`, then to each scale of that.

        Sizes are cut to whole pixels, and the scale itself places the samples, not the ratio of the sizes: as published.
        """
        h, w = images.shape[2:]
        side, long = self.options.long_side, max(h, w)
        images = resize(images, (h * side // long, w * side // long), corners=False)
        for scale in self.options.scales:
            yield images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def predict(self, batch: Any, baselines: bool = False) -> Prediction:
        """Mean of the logits over scales and mirror images, on the patch grid of the first scale.

        `variants` has "single scale": the first one, not mirrored. With `baselines` also, at the image's size, the scores of
        the given labels with CLIP alone, and two answers that look at no pixel.
        """
        images = self.normalise(batch.image)
        mean, single = multi_scale(self.logits, list(self.scaled(images)))
        variants = {"single scale": single}
        if baselines:
            variants |= self.without_training(images, self.pairs(batch.present, images.device))
        return Prediction(mean, variants=variants, crf=crf.WECLIP)

    def without_training(self, images: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        """Scores B C H W of class activation maps of the given labels (as they are, spread by CLIP's attention, and then moved by
        colours as in training), and of one class everywhere: the given one with most pixels in the last, or the background."""
        x, o = next(self.scaled(images)), self.options
        maps = refined_maps(self.vision, self.bank, see(self.vision.visual, x, o.layers), pairs, o.box, o.layers)
        cam, refined = (with_background(m, images.shape[2:]) for m in (maps.cam, maps.spread))
        named = {"CAM": cam, "refined CAM": refined, "pseudo label": refine_by_colour(images, refined)}
        found = {f"{name} of the given labels": class_scores(m, pairs, self.classes) for name, m in named.items()}
        area = F.one_hot(decide(named["pseudo label"], pairs).flatten(1).long(), 1 + self.classes).sum(1)  # B 1+classes
        area[:, 0] = 0
        one, nothing = (F.one_hot(c, 1 + self.classes).to(images.dtype)[..., None, None]
                        for c in (area.argmax(1), torch.zeros_like(area[:, 0])))  # fmt: skip
        return found | {"everything the largest given class": one, "everything background": nothing}

    @torch.no_grad()
    def panels(self, batch: Any) -> dict[str, Tensor]:
        """The largest class activation map of the given labels, their pseudo label as the last steps of training make it, and how
        far the decoder holds every patch for the same thing as the patch where that map is largest."""
        images = self.normalise(batch.image)
        x, o, pairs = next(self.scaled(images)), self.options, self.pairs(batch.present, images.device)
        seen = see(self.vision.visual, x, o.rfm_layers, hidden=True)
        affinity = affinity_of(self.trained(seen.hidden, seen.grid)[0])
        cam = refined_maps(self.vision, self.bank, seen, pairs, o.box, o.rfm_layers).cam.amax(1)
        peak = cam.flatten(1).argmax(1)
        return {"CAM": cam, "pseudo label": self.pseudo_label(seen, x, pairs, affinity, size=images.shape[2:]),
                "affinity at its peak": affinity[range(len(peak)), peak].unflatten(1, seen.grid)}

    # Published checkpoints.

    def official_name(self, name: str) -> str | None:
        """Our name -> the published one; None for CLIP, which comes by its own file."""
        if name.startswith("clip."):
            return None
        ours, official = next(pair for pair in self.official if name.startswith(pair[0]))
        rest = name.removeprefix(ours)
        if ours == "head.fuse.mlps.":
            block, layer, leaf = rest.split(".")
            rest = f"{block}.{'proj' if layer == '0' else 'proj_2'}.{leaf}"
        return official + rest

    def _check_foreign(self, foreign: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """CLIP's own tensors must be those in use; by-products of the published forward pass are left out."""
        return without_clip({k: v for k, v in foreign.items() if k not in self.by_product}, self.vision, name)


def ignore_outside(label: Tensor, valid: Tensor) -> Tensor:
    """Label maps B H W with 255 outside the boxes B 4 (y0 y1 x0 x1)."""
    y, x = (torch.arange(n, device=label.device) for n in label.shape[1:])
    y0, y1, x0, x1 = valid.to(label.device, non_blocking=True).T[..., None]
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
    return label.masked_fill(~(rows[:, :, None] & columns[:, None]), IGNORE)
