"""Segment your own images: supports once, any number of queries after them, on the path that test.py takes.

    predictor = Predictor.from_checkpoint()  # a small network for photographs; or the path of any checkpoint
    predictor.set_support("a.jpg", "a.png")
    found = predictor.predict("b.jpg")  # found.mask, found.score, found.maps

A checkpoint is trained for K shots (Train.shot). Fewer supports repeat in turn. More supports are taken in groups of K, the last
filled up from the first supports; the result is the mean of the groups' scores.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from model.backbone.pspnet import PSPNet
from model.build import build_system, load_weights, priors_of, recorded, system_class, text_bank
from model.few_shot.cam_prior import TEMPLATE, CamPrior
from model.few_shot.hsnet import HSNet
from model.few_shot.map_prior import TextMapPrior, parts_of
from model.few_shot.prior import TextPrior
from model.few_shot.system import FewShot
from model.predict.text_predictor import Segmentation, TextPredictor, as_list, choose_device, choose_precision, longest_side
from util import ROOT
from util.cache import TensorCache
from util.config import Config
from util.data.episodes import Episode, EpisodeMaker, Shot, collate
from util.data.folds import ClassNames, Fold, read_class_names
from util.data.transforms import IGNORE, ValTransform
from util.errors import UserError
from util.photos.reading import Box, Photo, Source, box_mask, doubt, read_mask, read_photo, shrink
from util.run.checkpoint import EXPORT, read_meta
from util.run.distributed import Context
from util.run.place import Experiment

NAMED = {"photos": "demo/photos/hdmnet_lite0.safetensors", "demo": "exp/demo/PI_CLIP/split0/resnet50/snapshot/best.safetensors"}
CACHE = 2**30  # bytes for cached results of the supports and the latest queries
NO_NAMES = ClassNames((), ())


class Predictor:
    """A trained few-shot system for a user's images. Use `from_checkpoint`, then `set_support`, then `predict`.

    Attributes:
        system: in evaluation mode, on `device`.
        config: that of its training.
        takes_text: whether its priors read a text (VTP, CAM); other systems use a text only to know a base class by its name.
        needs_masks: False for a system that reads the name of the object in place of its masks (IMR-HSNet).
        notes: remarks for the user about the present supports and text.
    """

    def __init__(self, system: FewShot, config: Config, fold: Fold, names: ClassNames, device: torch.device, precision: str,
                 note: str = ""):
        self.system = system.to(device).eval()
        self.config, self.fold, self.names, self.device, self.precision = config, fold, names, device, precision
        self._note = note  # of an exported file
        self.system.remember(TensorCache(CACHE), fixed_head=True)
        self.maker = EpisodeMaker(
            ValTransform(config.Train.val_size, config.Train.resized_val, config.Train.antialias), fold,
            clip_size=config.CLIP.clip_size if system.clip_patch else None, patch=system.clip_patch or 1, evaluation=True,
        )  # fmt: skip
        priors = parts_of(system.priors)
        self.text_prior = next((prior for prior in priors if isinstance(prior, TextPrior)), None)
        self.text_maps = [prior for prior in priors if isinstance(prior, TextMapPrior)]
        self.cam_prior = next((prior for prior in system.priors if isinstance(prior, CamPrior)), None)
        self.needs_masks = self.cam_prior is None
        reads = self.text_prior is not None or bool(self.text_maps)
        self.takes_text = reads or not self.needs_masks
        self.notes: tuple[str, ...] = ()
        self._text_alone = TextPredictor(system.clip, device, precision) if reads else None
        self._cls = 1  # of the object: 1, or the row of its text in the bank of the CAM
        self._groups: list[list[Shot]] | None = None  # of K shots; text alone: none
        self._examples: list[tuple[Photo, np.ndarray, bool]] = []  # with its mask; whether the mask comes from boxes
        self._base_rank = -1

    @classmethod
    def from_checkpoint(cls, path: str | Path = "photos", device: str | None = None, precision: str | None = None,
                        config: Config | None = None, arch: str | None = None) -> "Predictor":  # fmt: skip
        """Load a checkpoint and the frozen parts of its training, checked by hash as in test.py.

        Args:
            path: snapshot/best.safetensors of a run, an exported file, or a published .pth; here or below the repository.
                Or a name: photos (comes with the repository, see demo/photos/), demo (PI-CLIP, once it is trained).
            device: cuda, cpu, ...; None: the GPU where there is one.
            precision: fp32 or bf16; None: bf16 on a GPU that has it, fp32 otherwise.
            config: instead of the recorded one; needed, with `arch`, for a published .pth (`load_config(file, arch)`).
        Raises:
            UserError: no such checkpoint, one of another kind, or frozen parts of its training are missing.
        """
        found, chosen = checkpoint(path, config, arch), choose_device(device)
        if not issubclass(system_class(found.arch), FewShot):
            raise UserError(f"{found.path} (ARCH={found.arch}) labels every pixel with its own classes and looks for no example: "
                            f"`python predict.py --weights {found.path} --query PHOTOS`, model.predict.dense_predictor")
        cam = "cam" in priors_of(found.arch, found.config)  # a CAM needs classes that compete; else those in an image are unknown
        config = replace(found.config, CLIP=replace(found.config.CLIP, vocabulary="all" if cam else "target"),
                         Method=replace(found.config.Method, cams=[]) if cam else found.config.Method)  # no maps of these photos
        fold, names = trained_on(found)
        system = build_system(found.arch, config, fold, names if cam else NO_NAMES)
        load_weights(system, config, Experiment.of_checkpoint(found.path, found.arch, config), found.path)
        for prior in parts_of(system.priors):
            if isinstance(prior, TextMapPrior):
                prior.vocabulary = found.config.CLIP.vocabulary
        return cls(system, config, fold, names, chosen, choose_precision(precision, chosen), found.meta.get("note", ""))

    def set_support(self, images: Source | Sequence[Source] | None = None, masks: Source | Sequence[Source | None] | None = None,
                    text: str | None = None, boxes: Box | Sequence[Box | Sequence[Box] | None] | None = None) -> None:
        """Set the object to look for, until the next call.

        Args:
            images: supports: paths, Pillow images, uint8 arrays H W 3 or uint8 tensors 3 H W. None: the text alone.
            masks: one for each image, None where it has boxes; see util/photos/reading.py for what counts as the object. Left out
                where `needs_masks` is False.
            text: name of the object, "golden retriever".
            boxes: one entry for each image: None, a box x0 y0 x1 y1 in pixels, or several boxes.
        Raises:
            UserError: not one mask or box for each image, an image or mask that cannot be used, no text where the priors read
                one, a text that this CLIP does not know.
        """
        text = (text or "").strip()
        photos = [read_photo(source, f"support {i}") for i, source in enumerate(as_list(images), start=1)]
        box, given = box_lists(boxes), as_list(masks)
        unread = not self.needs_masks and (any(mask is not None for mask in given) or any(map(len, box)))
        pairs = annotated(photos, given, box) if self.needs_masks else [(photo, unmarked(photo)) for photo in photos]
        shots = [self._shot(*pair) for pair in pairs]
        self._check(shots, text)
        if not shots:
            self._text_alone.set_support(text=text)
        elif self.cam_prior:
            self._cls = self._use_names(text)
        elif self.text_prior:
            self.text_prior.use(text_bank(self.system.clip, [text]))
        for prior in self.text_maps if shots else ():
            known = self.names.texts
            base = [known[c - 1] for c in self.fold.base if c <= len(known) and known[c - 1] != text]
            prior.use([text, *base], range(2, 2 + len(base)))
        if isinstance(self.system, HSNet):
            self.system.shot = max(1, len(shots))  # as many as there are: they vote
        shot, count = self.system.shot, len(shots)
        turns = [shots[i % count] for i in range(-(-count // shot) * shot)]
        self._groups = [turns[i : i + shot] for i in range(0, len(turns), shot)]
        self._examples = [(*pair, bool(box) and len(box[i]) > 0) for i, pair in enumerate(pairs)] if self.needs_masks else []
        self._base_rank = self._rank(text)
        self.notes = tuple(self._notes(count, text)) if count else self._text_alone.notes
        if unread:
            self.notes = (*self.notes, "this system reads the name in place of masks: the masks and boxes change nothing")

    def predict(self, image: Source) -> Segmentation:
        """Find the object in an image: a path, Pillow image, uint8 array H W 3 or uint8 tensor 3 H W.

        Raises:
            UserError: no support yet, or an image that cannot be used.
        """
        return self.predict_batch([image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Source]) -> list[Segmentation]:
        """`predict` for several images at once, of any sizes; faster on a GPU."""
        if self._groups is None:
            raise UserError("nothing to look for yet: call set_support(images, masks, text) first")
        if not self._groups:
            return self._text_alone.predict_batch(images)
        started = time.perf_counter()
        photos = [read_photo(source, f"query {i}") for i, source in enumerate(images, start=1)]
        if not photos:
            return []
        batch = collate([self.episode(photo, shots) for photo in photos for shots in self._groups]).to(self.device)
        with Context(self.device, precision=self.precision).autocast():
            prediction = self.system.predict(batch)
        maps = {name: self._mean(prior) for name, prior in prediction.maps.items()}
        mean = replace(prediction, final=self._mean(prediction.final))  # where shots vote there is one group
        found = []
        for i, photo in enumerate(photos):
            placed = self.maker.transform.placed(photo.hw)
            whole, mask = placed.restore(mean.final[i]), mean.decide(i, placed) == 1
            shown = {name: prior[i].float().cpu().numpy() for name, prior in maps.items()}
            found.append((mask.cpu().numpy(), whole.softmax(0)[1].cpu().numpy(), shown))
        seconds = (time.perf_counter() - started) / len(photos)
        return [Segmentation(*parts, seconds) for parts in found]

    def check(self) -> list[float]:
        """Return the IoU 0..1 of each support's object with the result for the support's own photo; for boxes, of the boxes
        around both. Text alone: []. Each costs a query. Where it is low, expect little on other photos."""
        scores = []
        for photo, mask, boxed in self._examples:
            given, seen, counts = mask == 1, self.predict(photo).mask, mask != IGNORE
            if boxed:
                given, seen = box_around(given), box_around(seen)
            scores.append(float((given & seen & counts).sum() / ((given | seen) & counts).sum()))
        return scores

    def episode(self, photo: Photo, shots: Sequence[Shot]) -> Episode:
        """Build the batch of one that evaluation builds from a query and its supports; there is no annotation."""
        image = shrink(photo.image, self._side)
        blank = np.zeros(image.shape[:2], np.uint8)
        return self.maker.episode(image.astype(np.float32), blank, shots, cls=self._cls, base_rank=self._base_rank,
                                  present=torch.zeros(1, dtype=torch.bool), name=photo.name)  # fmt: skip

    @property
    def _side(self) -> int:
        """Pixels to which the longer side of a larger photo is reduced."""
        return max(self.config.Train.val_size, longest_side(self.system.clip_patch or 16))

    def _shot(self, photo: Photo, mask: np.ndarray) -> Shot:
        image = shrink(photo.image, self._side)
        shot = self.maker.shot(image.astype(np.float32), shrink(mask, self._side, cv2.INTER_NEAREST), photo.name)
        if self.needs_masks and not (shot.mask == 1).any():
            raise UserError(f"the object in {photo.name} is too small: no pixel of its mask is left at the network's side of "
                            f"{self.config.Train.val_size} pixels; cut the photo around it")
        return shot

    def _check(self, shots: Sequence[Shot], text: str) -> None:
        if self.takes_text and not text:
            name = self.names.texts[self.fold.novel[0] - 1] if self.names.texts else "dog"
            raise UserError(f"this checkpoint's priors read the name of what is to be found: give a text, for instance {name!r}")
        if not shots and not text:
            raise UserError("nothing to look for: give supports (images with masks or boxes), a text, or both")
        if not shots and not self.needs_masks:
            raise UserError("this system compares photos: give at least one support that shows the object; it needs no mask")
        if not shots and not self.takes_text:
            raise UserError("this checkpoint has no text prior (CLIP): it needs an example with a mask or a box. For a name "
                            "alone take a CLIP: python predict.py --clip --text NAME --query PHOTOS")

    def _use_names(self, text: str) -> int:
        """Let a text compete with the classes of the training; returns its number among them."""
        known = [name.casefold() for name in self.names.names]
        new = [] if text.casefold() in known else [text]
        names = (*self.names.names, *new)
        self.cam_prior.use(self.system.clip.module.text.bank(names, [TEMPLATE]), names)
        return len(known) + 1 if new else known.index(text.casefold()) + 1

    def _rank(self, text: str) -> int:
        """Rank of the base class that the text names, or -1."""
        ranks = {name.casefold(): rank for rank, c in enumerate(self.fold.base) if c <= len(self.names.names)
                 for name in (self.names.names[c - 1], self.names.texts[c - 1])}  # fmt: skip
        return ranks.get(text.casefold(), -1)

    def _notes(self, count: int, text: str) -> list[str]:
        found, shot = [*self.system.warnings, *([self._note] if self._note else [])], self.system.shot
        if count > shot:
            found.append(f"{count} supports for a {shot}-shot checkpoint: the mean of {len(self._groups)} predictions")
        elif count < shot:
            found.append(f"{count} of {shot} supports: they are repeated in turn")
        if self._base_rank >= 0 and self.system.uses_base_learner:
            found.append(f"{text!r} is one of the classes that the base learner knows, and is not held for background")
        elif text and not self.takes_text:
            found.append("this system has no text prior: the text changes nothing")
        found += [f"{photo.name}: {why}" for photo, mask, _ in self._examples if (why := doubt(mask))]
        if self.config.Data.images == "drawings":
            found.append("trained on the drawn demo world: on photographs its masks mean nothing")
        return found

    def _mean(self, x: Tensor) -> Tensor:
        """Average over the groups of supports: B*G ... -> B ..."""
        return x.unflatten(0, (-1, len(self._groups))).mean(1)


def find_weights(given: str | Path) -> Path:
    """Find a checkpoint by its path, here or below the repository, or by its name.

    Raises:
        UserError: there is none.
    """
    name = NAMED.get(str(given), given)
    found = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if found is None and given == "demo":
        raise UserError("the demo's model is not trained yet: `sh train.sh split0 demo 0` (minutes on a CPU)")
    if found is None:
        raise UserError(f"no such checkpoint: {given}. Give {' or '.join(NAMED)}, what `sh train.sh` has trained, an exported "
                        "file, or a published .pth (docs/predict.md)")
    return found


class Checkpoint(NamedTuple):
    """A file of weights, and what it is."""

    path: Path
    meta: dict
    arch: str
    config: Config


def checkpoint(path: str | Path, config: Config | None = None, arch: str | None = None) -> Checkpoint:
    """Find a checkpoint and what it is. Arguments and errors as `Predictor.from_checkpoint`; a base learner is an error, too."""
    path = find_weights(path)
    meta = read_meta(path) if path.suffix == ".safetensors" else {}
    arch = arch or meta.get("system")
    if arch is None or (not meta and config is None):
        raise UserError(f"{path} does not say what it is: a published checkpoint needs the config and the system that it is "
                        "of (--config config/pascal/pascal_split0_resnet50.yaml --arch PI_CLIP)")
    if issubclass(system_class(arch), PSPNet):
        raise UserError(f"{path} is a base learner (ARCH={arch}); give the checkpoint of a system")
    return Checkpoint(path, meta, arch, config or recorded(path))


def trained_on(found: Checkpoint) -> tuple[Fold, ClassNames]:
    """Return fold and class names of the training, from an exported file or from the config's files (names may be missing)."""
    config, meta = found.config, found.meta
    if EXPORT in meta:
        names, texts, novel, base = map(tuple, meta["classes"])
        return Fold(config.Train.data_set, config.Train.split, novel, base), ClassNames(names, texts)
    file = Path(config.Data.class_names)
    return system_class(found.arch).task.folds(config), read_class_names(file) if file.is_file() else NO_NAMES


def unmarked(photo: Photo) -> np.ndarray:
    """Return the mask of a photo that has none: H W uint8, 0 everywhere."""
    return np.zeros(photo.hw, np.uint8)


def box_around(mask: np.ndarray) -> np.ndarray:
    """Fill the smallest box around a mask, H W bool."""
    filled, (y, x) = np.zeros_like(mask), np.nonzero(mask)
    if len(y):
        filled[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    return filled


def box_lists(boxes: Box | Sequence | None) -> list[list[Box]]:
    """Return the boxes of each image, from any of the accepted forms."""
    def is_box(value: Sequence) -> bool:
        return len(value) > 0 and not any(isinstance(x, (list, tuple, np.ndarray, type(None))) for x in value)

    boxes = [] if boxes is None else list(boxes)
    if is_box(boxes):
        boxes = [boxes]
    return [[] if entry is None else [entry] if is_box(entry) else list(entry) for entry in boxes]


def annotated(photos: Sequence[Photo], masks: Sequence[Source | None], boxes: Sequence[Sequence[Box]]
              ) -> list[tuple[Photo, np.ndarray]]:  # fmt: skip
    """Return each photo with its mask, H W uint8 {0, 1, 255}.

    Raises:
        UserError: not one mask, or one entry of boxes, for each.
    """
    for what, given in (("masks", masks), ("entries of boxes", boxes)):
        if given and len(given) != len(photos):
            raise UserError(f"{len(photos)} supports and {len(given)} {what}: each support needs a mask or a box of its own")
    pairs = []
    for i, photo in enumerate(photos):
        mask, box = masks[i] if masks else None, boxes[i] if boxes else []
        if (mask is None) == (not len(box)):
            raise UserError(f"support {photo.name}: give a mask or boxes (--mask PNG, --box x0,y0,x1,y1)"
                            + ("" if mask is None else ", not both"))
        pairs.append((photo, box_mask(box, photo) if mask is None else read_mask(mask, photo)))
    return pairs
