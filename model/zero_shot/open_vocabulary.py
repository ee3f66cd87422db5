"""Open-vocabulary systems that train nothing: MaskCLIP, SCLIP, NACLIP, ClearCLIP, ProxyCLIP (`model.clip.dense`).

An image at its working size is seen in windows; cosines of patches and words are averaged, brought to file size, perhaps refined
(PAMR), and become class probabilities. Below a threshold a pixel is background.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.clip import ClipTrunk
from model.clip import dense as D
from model.ops import resize
from model.system import Frozen, Prediction, System
from util.config import Method, Train
from util.errors import UserError
from util.run.identity import Facts
from util.score.open_vocabulary import OpenVocabularyTask

SEPARATOR = ";"  # of several words of a class, in the text of a class list


@dataclass
class Options(Method):
    """Settings that the released configs of these systems differ in."""

    crop: int = 224  # side of the windows; 0: the whole image at once
    stride: int = 112
    scale: float = 40.0  # of the cosines before the softmax
    threshold: float = 0.0  # of the probability, below which a pixel is background; 0 where there is none
    area: float = 0.0  # a class with no more than this share of the foreground gives its pixels to the next best (SCLIP)
    background: list[str] = field(default_factory=list)  # its words; none: it is no class
    pamr: int = 0  # rounds of refinement by the colours of neighbours
    dilations: list[int] = field(default_factory=lambda: [8, 16])  # their distances in pixels
    patches: str = ""  # encoder of ProxyCLIP's patches, timm:NAME
    patches_weight: str = "hub"  # its weights: file | hub | none

    def check(self) -> None:
        if self.crop < 0 or (self.crop and not 0 < self.stride <= self.crop):
            raise UserError(f"Method.crop = {self.crop}, Method.stride = {self.stride}: windows leave gaps; choose a stride of 1 "
                            "to crop, or crop 0 for the whole image")
        if not (0 <= self.threshold < 1 and 0 <= self.area < 1):
            raise UserError(f"Method.threshold = {self.threshold}, Method.area = {self.area}: probabilities and shares, 0 to 1")
        if (self.threshold or self.area) and not self.background:
            raise UserError("Method.threshold and Method.area turn pixels into background: give it words (Method.background), or "
                            "leave them 0")
        if self.scale <= 0 or self.pamr < 0 or min(self.dilations, default=0) < 1:
            raise UserError("Method.scale is positive, Method.pamr 0 or more, Method.dilations distances of 1 or more")


class OpenVocabulary(System):
    """What they share. A subclass names its variant.

    Args:
        clip: frozen, with a ViT image tower.
        classes: texts of the classes, each one word or several with ";" between.
        options: see `Options`.
        patches: frozen encoder, for ProxyCLIP.
        cache: folder for text banks.
    Raises:
        UserError: a CLIP of another kind, no class, or a patch encoder that is missing or not used.
    """

    task = OpenVocabularyTask
    facts = Facts(clip=True, trained=False, frozen=False)
    Options = Options
    variant: ClassVar[str]

    def __init__(self, clip: Frozen, classes: Sequence[str], options: Options, patches: Frozen | None = None,
                 cache: Path | None = None):  # fmt: skip
        super().__init__()
        if not isinstance(clip.module.visual, ClipTrunk):
            raise UserError("CLIP.clip_path is a ResNet; these maps need a ViT image tower: take ViT-B-16")
        variant = D.VARIANTS[self.variant]
        proxy = variant.attention == "proxy"
        if proxy and patches is None:
            raise UserError(f"{type(self).__name__} needs a patch encoder: Method.patches=timm:vit_base_patch8_224.dino "
                            "(published), with its weights in Method.patches_weight")
        if patches is not None and not proxy:
            raise UserError(f"Method.patches: {type(self).__name__} reads CLIP alone, leave it out")
        self.clip, self.options, self.head = clip, options, nn.Module()
        if patches is not None:
            self.patches = patches
        self.maps = D.DenseClip(clip.module.visual, variant, patches.module.cells if proxy else None)
        words = [self.options.background] if self.options.background else []
        words += [[word.strip() for word in text.split(SEPARATOR) if word.strip()] for text in classes]
        if not classes or not all(words):
            raise UserError("Data.class_names: every class needs a word to look for")
        flat = [(word, number) for number, some in enumerate(words) for word in some]
        text = clip.module.text
        bank = D.prompt_bank(text, [word for word, _ in flat], D.prompts_of(text), cache)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("numbers", torch.tensor([number for _, number in flat]), persistent=False)
        first = dict(reversed(flat))
        twice = [word for word, number in flat if first[word] != number]
        if twice:
            self.warnings += (f"{', '.join(twice)}: a word of two classes; it always counts for the first of them",)
        if options.patches_weight == "none" and patches is not None:
            self.warnings += ("the patch encoder has random weights (Method.patches_weight=none): the maps mean little",)
        if clip.module.random:
            self.mark = "[random CLIP]"
            self.warnings += ("CLIP has random weights (CLIP.clip_path=random): the maps and every score mean nothing.",)

    @property
    def reads_text(self) -> bool:
        return True

    def groups(self, train: Train) -> list[dict[str, Any]]:
        return []

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        raise UserError(f"{type(self).__name__} trains nothing: test it, `sh test.sh`")

    @torch.no_grad()
    def predict(self, batch: Any, baselines: bool = False) -> Prediction:
        """`final`: probabilities B C H W at file size; that of the label is the largest."""
        sizes = {placed.hw for placed in batch.placed} or {tuple(batch.image.shape[2:])}
        size = sizes.pop() if len(sizes) == 1 else tuple(batch.image.shape[2:])
        with torch.autocast(batch.image.device.type, enabled=False):
            x = D.normalise(batch.image.float(), self.clip.module.visual.pixels["clip"])
            found = [self.scores(image[None], size) for image in x]
        return Prediction(torch.stack(found), logits=False)

    def scores(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised image 1 3 h w -> C H W."""
        o = self.options
        if o.crop:
            logits = resize(self.maps.slide(x, self.bank, o.crop, o.stride), size, corners=False)
        else:
            logits = self.maps.whole(x, self.bank, size)
        if o.pamr:
            logits = D.pamr(resize(x, size, corners=False), logits, o.pamr, tuple(o.dilations))
        probability = D.probabilities(logits[0], self.numbers, o.scale)
        label = D.decide(probability, o.threshold, o.area)
        best = torch.nextafter(probability.amax(0), probability.new_tensor(2.0))
        return probability.scatter(0, label[None], best[None])


class MaskCLIP(OpenVocabulary):
    variant = "maskclip"


class SCLIP(OpenVocabulary):
    variant = "sclip"


class NACLIP(OpenVocabulary):
    variant = "naclip"


class ClearCLIP(OpenVocabulary):
    variant = "clearclip"


class ProxyCLIP(OpenVocabulary):
    variant = "proxyclip"
