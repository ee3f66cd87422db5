"""ZegCLIP (CVPR 2023): zero-shot segmentation by class tokens that attend to the patches of a prompted CLIP.

Written from the paper and from what it shares with CLIP-RC, which extends it; CLIP-RC alone is checked against published code.
Facts of both, not options, since published weights depend on them: CLIP sees ImageNet's statistics, the class token gets its
embedding twice, ignored pixels are negatives of every class, and weight decay acts on norms and biases too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import ClipTrunk
from model.clip.load import clip_tensors
from model.inference import slide
from model.ops import full, resize
from model.system import Frozen, Prediction, System
from model.zero_shot.decoder import Block, Layers, Scores
from model.zero_shot.losses import IGNORE, focal_and_dice, pseudo_labels
from model.zero_shot.texts import text_bank
from model.zero_shot.tower import Prompts
from util.config import Method, Train
from util.data.folds import ClassNames
from util.errors import UserError
from util.run.identity import Facts
from util.score.zero_shot import ZeroShotTask

DEPTH = 3  # decoder layers
COMMON = 1.5  # length of the part that all names get in common, at that start; their own has length 1
BORDER = 0.19  # cosine of text and patch from which on a class is there, at the start from CLIP's scores
OTHER_CLASSES = "The classes are"  # how the warning about another vocabulary begins
UNSEEN = -1  # label of training pixels whose class is not seen


@dataclass
class Options(Method):
    """What ZegCLIP's runs differ in; the defaults are VOC's.

    Settings (labels are those of seen classes only, but in the last):
        inductive: texts of the seen classes; pixels of unseen classes are ignored.
        transductive: all texts; pixels of unseen classes get pseudo-labels. Where they are, but not which, is read from the
            ground truth, as published.
        transductive-strict: the same without that leak: any pixel without a seen label whose best class is unseen.
        full: all texts, all labels.
    """

    # Of training: random, as published; or so that the first scores are nearly those of CLIP without training, which hold for
    # names that are unlike those with labels, too.
    start: Literal["random", "clip"] = "random"
    prompts: int = 10  # K in each layer; 100 on COCO-Stuff
    setting: Literal["inductive", "transductive", "transductive-strict", "full"] = "inductive"
    focal: float = 100.0  # weights of the losses
    dice: float = 1.0
    dropout: float = 0.1
    templates: Literal["one", "many"] = "one"  # texts of a class; many on COCO-Stuff
    bank: str = ""  # file of a text bank for the data set's classes, such as the published .npy; "": made from their texts
    offset: float = 0.1  # taken from the scores of seen classes in the inductive setting
    inference: Literal["slide", "whole"] = "slide"  # whole: the image at once, which was not published
    crop: int = 512  # side of the windows
    stride: int = 426

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        if self.prompts < 1:
            raise UserError(f"Method.prompts = {self.prompts}: give each layer at least one")
        if not 0 < self.stride <= self.crop:
            raise UserError(f"Method.stride = {self.stride}: windows of crop = {self.crop} leave gaps; choose 1 to {self.crop}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"Method.dropout = {self.dropout}: choose 0 or more, less than 1")
        if not 0 <= self.offset <= 1:
            raise UserError(f"Method.offset = {self.offset}: scores are 0 to 1; choose 0 to 1")
        if negative := [name for name in ("focal", "dice", "recovery") if getattr(self, name, 0) < 0]:
            raise UserError(f"Method.{negative[0]} = {getattr(self, negative[0])}: the weight of a loss is not negative")


class Scored(NamedTuple):
    """What a head returns."""

    logits: Tensor  # B classes h w on the patch grid, one independent sigmoid each
    extra: dict[str, Tensor]  # further loss terms, before their weight


class Head(nn.Module):
    """Everything that ZegCLIP trains: prompts, the projection of descriptors, the decoder."""

    def __init__(self, trunk: ClipTrunk, options: Options):
        super().__init__()
        (layer_width, width), drop = trunk.visual.proj.shape, options.dropout
        self.prompts = Prompts(layer_width, len(trunk.blocks), trunk.patch, options.prompts, drop)
        self.q_proj = nn.Linear(2 * width, width)
        self.build_decoder(width, options)

    def build_decoder(self, width: int, options: Options) -> None:
        self.decoder = Layers(width, options.dropout, DEPTH)
        self.decoder.layers[-1] = Scores(self.decoder.layers[0].multihead_attn)

    @torch.no_grad()
    def start_as_clip(self, texts: Tensor) -> None:
        """At first the decoder passes on what it gets, and the best class is nearly that of the largest cosine of CLIP's.

        What has no label is a negative of every class with labels. Where texts are unlike each other, training lowers these
        classes alone, and the others win everywhere. So all names get a large part in common, as the texts of a large CLIP have,
        and a border where a class begins: what is learned for some names then holds for all.

        Args:
            texts: C D, of the classes that training names.
        """
        scale = texts.shape[1] ** 0.5  # of both streams; the norms give them that length later
        parts, border = self.aligned()
        for part in parts:
            part += scale * torch.eye(texts.shape[1])
        common = F.normalize(texts.mean(0), dim=0)
        self.q_proj.bias += scale * COMMON * common
        border -= scale * BORDER * common / (COMMON + (texts @ common).mean())
        for decoder in self.modules():
            for block in decoder.layers if isinstance(decoder, Layers) else ():
                for last in (block.multihead_attn.proj, block.linear2) if isinstance(block, Block) else ():
                    last.weight.zero_()
                    last.bias.zero_()

    def aligned(self) -> tuple[list[Tensor], Tensor]:
        """Parts D D of the weights between CLIP's texts and patches and their product; the last bias D of the patches."""
        last = self.decoder.layers[-1].multihead_attn
        return [self.q_proj.weight.chunk(2, 1)[1], last["q"].weight, last["k"].weight], last["k"].bias

    def describe(self, product: Tensor, texts: Tensor) -> Tensor:
        """Projects descriptors [product | text], ... C D and C D -> ... C D, without repeating the texts."""
        of_product, of_text = self.q_proj.weight.chunk(2, 1)
        return F.linear(product, of_product) + F.linear(texts, of_text, self.q_proj.bias)

    def forward(self, trunk: ClipTrunk, images: Tensor, texts: Tensor) -> Scored:
        """Normalised images B 3 H W, both sides multiples of the patch; texts C D."""
        views = self.prompts(trunk, images)
        classes, patches = self.describe(views.whole[:, None] * texts, texts), views.patches.flatten(2).transpose(1, 2)
        block: Block
        for block in self.decoder.layers[:-1]:
            classes = block(classes, patches)
        return Scored(self.decoder.layers[-1](classes, patches).unflatten(2, views.patches.shape[2:]), {})


class ZegCLIP(System):
    """The system.

    Args:
        clip: frozen.
        names: of all classes.
        texts: C D, their text bank (`text_bank`).
        seen: 0-based numbers of the classes with labels.
    """

    task = ZeroShotTask
    facts = Facts(identity=("Method.setting", "Method.prompts", "Method.templates"), frozen=False, clip=True,
                  stages=("Method.setting",))  # fmt: skip
    optimizer_name = "adamw"
    Options: ClassVar[type] = Options
    Head: ClassVar[type[nn.Module]] = Head
    official: ClassVar[tuple[tuple[str, str], ...]] = (  # ours -> published, the first match wins
        ("head.prompts.", "backbone."), ("head.decoder.", "decode_head.decoder_1."), ("head.", "decode_head."),
    )  # fmt: skip

    def __init__(self, clip: Frozen, names: Sequence[str], texts: Tensor, seen: Sequence[int], options: Options):
        super().__init__()
        self.clip, self.options = clip, options
        self.head = self.Head(self.trunk, options)
        for name in ("texts", "seen", "unseen", "table"):
            self.register_buffer(name, None, persistent=False)
        self.use(names, texts, seen)
        self.first = (self.names, frozenset(names[c].casefold() for c in seen))  # all names, and those with labels
        if options.setting.startswith("transductive") and len(seen) == len(names):
            raise UserError(f"Method.setting = {options.setting}: every class is seen; choose full")
        if options.start == "clip":
            self.head.start_as_clip(self.texts[self.seen] if options.setting == "inductive" else self.texts)
        self.vocabulary = "seen classes" if options.setting == "inductive" else "all classes"
        if clip.module.random:
            self.mark = "[random CLIP]"
            self.warnings = ("CLIP has random weights (CLIP.clip_path=random): every score means nothing.",)

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def trunk(self) -> ClipTrunk:
        return self.clip.module.visual

    def use(self, names: Sequence[str], texts: Tensor, seen: Sequence[int]) -> None:
        """Takes names, their bank C D, and which of them are seen. `use_classes` makes the other two from any names.

        Raises:
            UserError: no name at all, a text is missing, a class has the name of another, or the seen classes are not some of
                them.
        """
        C, seen = len(names), list(seen)
        if not 1 <= C <= IGNORE:
            raise UserError(f"{C} class names; 1 to {IGNORE} are possible")
        if len(texts) != C:
            raise UserError(f"{C} class names, but a text bank of {len(texts)} rows: make the bank from these names")
        if twice := sorted({name for name in names if list(names).count(name) > 1}):
            raise UserError(f"two classes have the name {twice[0]!r}; name them apart")
        if len(set(seen)) < len(seen) or not set(seen) <= set(range(C)):
            raise UserError(f"seen classes {seen}: expected some of 0..{C - 1}, each once")
        unseen = [c for c in range(C) if c not in seen]
        device = self.trunk.visual.proj.device
        table = torch.full((256,), UNSEEN, dtype=torch.int64)
        table[seen] = torch.arange(len(seen)) if self.options.setting == "inductive" else torch.tensor(seen, dtype=torch.int64)
        if self.options.setting == "full":
            table[:C] = torch.arange(C)
        table[IGNORE] = IGNORE
        self.names = tuple(names)
        self.texts, self.table = texts.to(device), table.to(device)
        self.seen, self.unseen = (torch.tensor(x, dtype=torch.int64, device=device) for x in (seen, unseen))

    def use_classes(self, given: ClassNames, cache: Path | None = None) -> None:
        """Classes with the name of one that training saw stay seen."""
        names = given.names
        if blank := [c for c, name in enumerate(names, start=1) if not name.strip()]:
            raise UserError(f"class {blank[0]} of {len(names)} has no name; give every class one")
        bank = text_bank(self.clip, given.texts, self.options.templates, cache)
        self.use(names, bank, [c for c, name in enumerate(names) if name.casefold() in self.first[1]])
        kept = tuple(warning for warning in self.warnings if not warning.startswith(OTHER_CLASSES))
        new = len(set(names) - set(self.first[0]))
        other = (f"{OTHER_CLASSES} {len(names)} of a list, {new} of them new, instead of the {len(self.first[0])} of training. "
                 "Scores depend on the vocabulary: compare results of one vocabulary alone.")
        self.warnings = kept if set(names) == set(self.first[0]) else (*kept, other)

    # Training.

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        self._check(batch)
        texts = self.texts[self.seen] if self.options.setting == "inductive" else self.texts
        scored = self.head(self.trunk, self.pixels(batch.image, batch.valid), texts)
        logits = self.upsample(scored.logits, batch.label.shape[1:])
        focal, dice = focal_and_dice(logits, self.targets(logits, batch))
        return {"focal": self.options.focal * focal, "dice": self.options.dice * dice} | self.weigh(scored.extra)

    def weigh(self, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """The further terms of a head, weighted."""
        return extra

    def targets(self, logits: Tensor, batch: Any) -> Tensor:
        """B h w int64, the labels that the losses see: columns of the logits B C h w, or 255."""
        target, setting = self.table[batch.label.long()], self.options.setting
        if setting == "transductive":
            target = pseudo_labels(logits, target, target == UNSEEN, self.unseen)
        elif setting == "transductive-strict":
            best = full(logits.detach()).sigmoid().argmax(1)
            free = ((target == UNSEEN) | (target == IGNORE)) & torch.isin(best, self.unseen)
            target = torch.where(free & inside(batch.valid, target.shape[1:]), best, target)
        return target.where(target != UNSEEN, IGNORE)

    def groups(self, train: Train) -> list[dict]:
        """One group: in the published run every rule for norms and for parts is shadowed by an earlier one, so that all trained
        parameters have the same rate (2e-4) and decay (0.01)."""
        return [{"params": list(self.trained.parameters()), "lr": train.base_lr, "weight_decay": train.weight_decay}]

    # Prediction.

    @torch.no_grad()
    def predict(self, batch: Any, baselines: bool = False) -> Prediction:
        """`final`: B C h w at the images' size, sigmoids averaged over windows. baselines: also CLIP as it is, a variant."""
        looks = {"final": self.scores} | ({"CLIP without training": self.cosines} if baselines else {})
        if self.options.inference == "whole":
            found = {name: look(batch.image) for name, look in looks.items()}
        else:
            found = {name: slide(look, batch.image, self.options.crop, self.options.stride) for name, look in looks.items()}
        return Prediction(found.pop("final"), variants=found, logits=False)

    def cosines(self, images: Tensor) -> Tensor:
        """B 3 h w RGB 0..255 -> B C h w, the cosine of each patch of the frozen CLIP to each text, in CLIP's own statistics."""
        tokens, grid = self.trunk.embed(self.padded(self.trunk.normalise(images)))
        found = self.trunk.post_norm(self.trunk.run(tokens).tokens[:, 1:]) @ self.trunk.visual.proj
        cosines = F.normalize(full(found), dim=-1) @ F.normalize(self.texts, dim=1).T
        return self.upsample(cosines.transpose(1, 2).unflatten(2, grid), images.shape[2:])

    def scores(self, images: Tensor) -> Tensor:
        """B 3 h w RGB 0..255 of any size -> B C h w sigmoids, lowered for seen classes in the inductive setting."""
        logits = self.trained(self.trunk, self.pixels(images), self.texts).logits
        scores = self.upsample(logits, images.shape[2:]).sigmoid()
        if self.options.setting == "inductive":
            scores[:, self.seen] -= self.options.offset
        return scores

    # Both.

    def pixels(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """B 3 H W RGB 0..255 -> normalised, zero outside of `valid` (B 4), padded."""
        images = self.trunk.normalise(images, "imagenet")
        if valid is not None:
            images = images * inside(valid, images.shape[2:])[:, None]
        return self.padded(images)

    def padded(self, images: Tensor) -> Tensor:
        """With zeros on the right and below, to multiples of the patch."""
        right, below = (-side % self.trunk.patch for side in (images.shape[3], images.shape[2]))
        return F.pad(images, (0, right, 0, below))

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """From the patch grid to the pixels of images that `pixels` may have padded."""
        whole = [side * self.trunk.patch for side in logits.shape[2:]]
        return resize(full(logits), whole, corners=False)[..., : size[0], : size[1]]

    def _check(self, batch: Any) -> None:
        wrong = (batch.label >= len(self.names)) & (batch.label != IGNORE)
        if wrong.any():
            row = int(wrong.flatten(1).any(1).nonzero()[0])
            values = batch.label[row][wrong[row]].unique().tolist()[:8]
            raise UserError(f"the label of {batch.name[row]} holds {values}; expected 0..{len(self.names) - 1} (there are "
                            f"{len(self.names)} classes) or 255, which does not count")

    # Published checkpoints.

    @staticmethod
    def official_options(state: Mapping[str, Tensor], name: str = "checkpoint") -> dict[str, int]:
        """Options that a published checkpoint (its `state_dict`) settles: K is the number of prompts in a layer.

        Raises:
            UserError: it holds no prompts.
        """
        shape = getattr(state.get("backbone.prompt_embeddings"), "shape", ())
        if len(shape) != 3:
            raise UserError(f"{name} holds no backbone.prompt_embeddings: it is no checkpoint of ZegCLIP or CLIP-RC")
        return {"prompts": shape[1]}

    def import_official(self, state: Mapping[str, Tensor], name: str = "checkpoint") -> None:
        state = {key.removeprefix("module."): value for key, value in state.items()}
        number = self.official_options(state, name)["prompts"]
        if number != self.options.prompts:
            raise UserError(f"{name} has {number} prompts in each layer, this system {self.options.prompts}; nothing was loaded. "
                            f"Set Method.prompts={number}, and the data set it was trained on (VOC has 10, COCO-Stuff 100)")
        super().import_official(state, name)

    def check_classes(self, classes: Sequence[str], name: str = "checkpoint") -> None:
        plain = [["".join(filter(str.isalnum, text.casefold())) for text in texts] for texts in (classes, self.names)]
        if plain[0] != plain[1]:
            where = next((c for c, pair in enumerate(zip(*plain, strict=False)) if pair[0] != pair[1]), min(map(len, plain)))
            shown = [f"{len(texts)} classes, number {where + 1} {repr(texts[where]) if where < len(texts) else 'none'}"
                     for texts in (classes, self.names)]  # fmt: skip
            raise UserError(f"{name} was trained on {shown[0]}; this data set has {shown[1]}. Nothing was loaded; take the data "
                            "set it was trained on, and other classes by Test_Finetune.classes")

    def official_name(self, name: str) -> str | None:
        if name.startswith("clip."):
            return None
        ours, official = next(pair for pair in self.official if name.startswith(pair[0]))
        return official + name.removeprefix(ours)

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Drops what published code holds but never uses; the copy of CLIP inside has to equal the CLIP in use (to fp16)."""
        own, visual = clip_tensors(self.clip.module), self.trunk.visual
        if (table := foreign.get("backbone.positional_embedding")) is not None:  # resized to the crop it was trained on
            side = round(max(len(table) - 1, 1) ** 0.5)
            own["visual.positional_embedding"] = self.trunk.position((side, side))
        own["visual.region_level_bridge"] = (visual.class_embedding + visual.positional_embedding[0]).expand(16, -1)
        rest, differing = {}, []
        for key, value in foreign.items():
            bare = key.removeprefix("text_encoder.").replace("backbone.", "visual.", 1)
            if bare in own and not key.startswith("decode_head."):
                same = value.shape == own[bare].shape and torch.allclose(value.float(), own[bare].cpu().float(), 1e-3, 1e-5)
                differing += [] if same else [key]
            elif not self._dead(key):
                rest[key] = value
        if differing:
            raise UserError(f"{name} was trained with another CLIP than CLIP.clip_path gives: {len(differing)} tensors differ "
                            f"({', '.join(differing[:3])}); nothing was loaded")
        return rest

    def _dead(self, key: str) -> bool:
        """Whether a published tensor takes part in nothing."""
        return ".self_attn." in key or ".norm1." in key or key.startswith(f"decode_head.decoder_1.layers.{DEPTH - 1}.")


def inside(valid: Tensor, size: Iterable[int]) -> Tensor:
    """B h w bool, True within the boxes B 4 (y0 y1 x0 x1, ends exclusive)."""
    height, width = size
    y, x = torch.arange(height, device=valid.device), torch.arange(width, device=valid.device)
    top, bottom, left, right = valid.T[..., None]
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
