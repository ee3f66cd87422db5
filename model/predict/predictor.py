"""Segment your own images: supports once, any number of queries after them, on the path that test.py takes.

    predictor = Predictor.from_checkpoint()  # a small network for photographs; or the path of any checkpoint
    predictor.set_support("a.jpg", "a.png")
    found = predictor.predict("b.jpg")  # found.mask, found.score, found.maps

A checkpoint is trained for K shots (Train.shot). Fewer supports repeat in turn. More supports are taken in groups of K, the last
filled up from the first supports; the result is the mean of the groups' scores.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from model.build import build_system, load_weights, priors_of, system_class, text_bank
from model.few_shot.cam_prior import TEMPLATE, CamPrior
from model.few_shot.hsnet import HSNet
from model.few_shot.map_prior import TextMapPrior, parts_of
from model.few_shot.prior import TextPrior
from model.few_shot.system import FewShot
from model.predict.opening import NO_NAMES, checkpoint, trained_on
from model.predict.presence import presence
from model.predict.text_predictor import Segmentation, TextPredictor, as_list, choose_device, choose_precision, longest_side
from model.predict.tiles import check_tile, through_windows, windows
from model.system import Prediction
from util.cache import TensorCache
from util.config import Config
from util.data.episodes import Episode, EpisodeMaker, Shot, collate
from util.data.folds import ClassNames, Fold
from util.data.transforms import IGNORE, ValTransform
from util.errors import UserError
from util.photos.reading import Box, Photo, Source, annotated, box_around, box_lists, doubt, read_photo, shrink, unmarked
from util.run.distributed import Context
from util.run.place import Experiment

CACHE = 2**30  # bytes for cached results of the supports and the latest queries
TEXT_UNREAD = "this system has no text prior: the text changes nothing"
PATCH = 16  # pixels: of systems without CLIP, whose grid has a cell for 8


@dataclass(frozen=True)
class Target:
    """What is looked for, as `Predictor.set_support` understood it."""

    text: str
    groups: list[list[Shot]]  # of K shots; text alone: none
    shot: int  # K
    examples: list[tuple[Photo, np.ndarray, bool]]  # with its mask; whether the mask comes from boxes
    cls: int  # 1, or the row of its text in the bank of the CAM
    base_rank: int  # of the base class that the text names, or -1
    bank: Tensor | None = None  # of the texts, where a prior reads them
    names: tuple[str, ...] = ()  # of the bank, of a CAM
    notes: tuple[str, ...] = ()


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
        self._patch = system.clip_patch or PATCH
        self._tile: int | None = None  # side of the windows of large pictures
        self._target: Target | None = None

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
        self.use(self.target(images, masks, (text or "").strip(), boxes))

    def set_tiles(self, tile: int | None) -> None:
        """Let pictures larger than `tile` pixels be seen through overlapping windows of that side, each as a picture of its own;
        scores are blended without seams, and there are no `maps`. None (at first): every picture as a whole.

        Raises:
            UserError: a side that is not positive, or smaller than a patch of the network.
        """
        if tile is not None:
            check_tile(tile, self._patch)
        self._tile = tile

    def target(self, images: Source | Sequence[Source] | None, masks: Source | Sequence[Source | None] | None, text: str,
                    boxes: Box | Sequence | None) -> Target:  # fmt: skip
        """Understand what is to be found, without looking for it yet. Arguments and errors as `set_support`."""
        photos = [read_photo(source, f"support {i}") for i, source in enumerate(as_list(images), start=1)]
        box, given = box_lists(boxes), as_list(masks)
        unread = not self.needs_masks and (any(mask is not None for mask in given) or any(map(len, box)))
        pairs = annotated(photos, given, box) if self.needs_masks else [(photo, unmarked(photo)) for photo in photos]
        shots = [self._shot(*pair) for pair in pairs]
        self._check(shots, text)
        cls, bank, names, count = 1, None, (), len(shots)
        if not shots:
            self._text_alone.set_support(text=text)
        elif self.cam_prior:
            cls, names = self._competing(text)
            bank = self.system.clip.module.text.bank(names, [TEMPLATE])
        elif self.text_prior:
            bank = text_bank(self.system.clip, [text])
        shot = max(1, count) if isinstance(self.system, HSNet) else self.system.shot  # HSNet's vote, as many as there are
        turns = [shots[i % count] for i in range(-(-count // shot) * shot)]
        groups = [turns[i : i + shot] for i in range(0, len(turns), shot)]
        examples = [(*pair, bool(box) and len(box[i]) > 0) for i, pair in enumerate(pairs)] if self.needs_masks else []
        target = Target(text, groups, shot, examples, cls, self._rank(text), bank, names)
        notes = self._notes(target, count) if count else self._text_alone.notes
        if unread:
            notes = [*notes, "this system reads the name in place of masks: the masks and boxes change nothing"]
        return replace(target, notes=tuple(notes))

    def use(self, target: Target) -> None:
        """Look for a target until the next call."""
        self._target, self.notes = target, target.notes
        if target.bank is not None and self.cam_prior:
            self.cam_prior.use(target.bank, target.names)
        elif target.bank is not None:
            self.text_prior.use(target.bank)
        for prior in self.text_maps if target.groups else ():
            known = self.names.texts
            base = [known[c - 1] for c in self.fold.base if c <= len(known) and known[c - 1] != target.text]
            prior.use([target.text, *base], range(2, 2 + len(base)))
        self.system.shot = target.shot

    def predict(self, image: Source) -> Segmentation:
        """Find the object in an image: a path, Pillow image, uint8 array H W 3 or uint8 tensor 3 H W.

        Raises:
            UserError: no support yet, or an image that cannot be used.
        """
        return self.predict_batch([image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Source]) -> list[Segmentation]:
        """`predict` for several images at once, of any sizes; faster on a GPU."""
        if self._target is None:
            raise UserError("nothing to look for yet: call set_support(images, masks, text) first")
        if not self._target.groups:
            if self._tile:
                raise UserError("windows need supports: a text alone is found by what stands out most in the whole picture")
            return self._text_alone.predict_batch(images)
        photos = [read_photo(source, f"query {i}") for i, source in enumerate(images, start=1)]
        whole = iter(self._whole([photo for photo in photos if not self._is_large(photo)]))
        return [self._tiled(photo) if self._is_large(photo) else next(whole) for photo in photos]

    @torch.no_grad()
    def strips(self, photo: Photo, targets: Sequence[Target]) -> Iterator[tuple[slice, list[tuple[np.ndarray, np.ndarray]]]]:
        """Yield the results of a photo for several targets, as rows and for each target their mask, bool, and score, float32.

        A large photo comes in rows of windows (`set_tiles`); each window is seen for all targets in turn, so that its own
        features are computed once. Another photo comes whole.
        """
        if not self._is_large(photo):
            results = [self._whole([photo], target)[0] for target in targets]
            yield slice(0, photo.hw[0]), [(found.mask, found.score) for found in results]
            return

        def restored(window: Photo) -> list[tuple[Tensor, Tensor | None]]:
            placed, found = self.maker.transform.placed(window.hw), []
            for target in targets:
                mean = self._scores([window], target)
                found.append((placed.restore(mean.final[0]), None if mean.votes is None else placed.restore(mean.votes[0])))
            return found

        yield from through_windows(photo, self._tile, restored)

    def presence(self, image: Source) -> float | None:
        """Say how sure it is that an image shows what the supports show, 0..1 (`model.predict.presence`); None for a text alone
        and for supports without masks. Through windows, that of the best one."""
        if not self.knows_presence:
            return None
        photo = read_photo(image, "query")
        tiles = windows(photo, self._tile) if self._is_large(photo) else [photo]
        shots = sum(self._target.groups, [])
        return max(presence(self.system, self.episode(tile, shots).to(self.device), self.precision) for tile in tiles)

    @property
    def knows_presence(self) -> bool:
        """Whether the present supports are such that `presence` is a number."""
        return self.needs_masks and self._target is not None and bool(self._target.groups)

    def _is_large(self, photo: Photo) -> bool:
        return self._tile is not None and max(photo.hw) > self._tile

    def _whole(self, photos: Sequence[Photo], target: Target | None = None) -> list[Segmentation]:
        """Results of photos that the network sees as a whole, all at once."""
        if not photos:
            return []
        started = time.perf_counter()
        mean, found = self._scores(photos, target), []
        for i, photo in enumerate(photos):
            placed = self.maker.transform.placed(photo.hw)
            whole, mask = placed.restore(mean.final[i]), mean.decide(i, placed) == 1
            shown = {name: prior[i].float().cpu().numpy() for name, prior in mean.maps.items()}
            found.append((mask.cpu().numpy(), whole.softmax(0)[1].cpu().numpy(), shown))
        seconds = (time.perf_counter() - started) / len(photos)
        return [Segmentation(*parts, seconds) for parts in found]

    def _tiled(self, photo: Photo) -> Segmentation:
        """Result of a photo through windows; beside mask and score only those of one row of windows are in memory."""
        started = time.perf_counter()
        mask, score = np.empty(photo.hw, bool), np.empty(photo.hw, np.float32)
        for rows, found in self.strips(photo, [self._target]):
            (mask[rows], score[rows]), = found
        return Segmentation(mask, score, {}, time.perf_counter() - started)

    def _scores(self, photos: Sequence[Photo], target: Target | None = None) -> Prediction:
        """Scores of photos for a target, by default the present one: the mean over its groups of supports."""
        if target is not None:
            self.use(target)
        groups = self._target.groups
        batch = collate([self.episode(photo, shots) for photo in photos for shots in groups]).to(self.device)
        with Context(self.device, precision=self.precision).autocast():
            prediction = self.system.predict(batch)
        maps = {name: self._mean(prior) for name, prior in prediction.maps.items()}
        return replace(prediction, final=self._mean(prediction.final), maps=maps)  # where shots vote there is one group

    def check(self) -> list[float]:
        """Return the IoU 0..1 of each support's object with the result for the support's own photo; for boxes, of the boxes
        around both. Text alone: []. Each costs a query. Where it is low, expect little on other photos."""
        scores = []
        for photo, mask, boxed in self._target.examples if self._target else ():
            given, seen, counts = mask == 1, self.predict(photo).mask, mask != IGNORE
            if boxed:
                given, seen = box_around(given), box_around(seen)
            scores.append(float((given & seen & counts).sum() / ((given | seen) & counts).sum()))
        return scores

    def episode(self, photo: Photo, shots: Sequence[Shot]) -> Episode:
        """Build the batch of one that evaluation builds from a query and its supports; there is no annotation."""
        image = shrink(photo.image, self._side)
        blank = np.zeros(image.shape[:2], np.uint8)
        return self.maker.episode(image.astype(np.float32), blank, shots, cls=self._target.cls, base_rank=self._target.base_rank,
                                  present=torch.zeros(1, dtype=torch.bool), name=photo.name)  # fmt: skip

    @property
    def _side(self) -> int:
        """Pixels to which the longer side of a larger photo is reduced."""
        return max(self.config.Train.val_size, longest_side(self._patch))

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

    def _competing(self, text: str) -> tuple[int, tuple[str, ...]]:
        """Return the number of a text among the classes of the training, and all names that compete."""
        known = [name.casefold() for name in self.names.names]
        new = [] if text.casefold() in known else [text]
        return len(known) + 1 if new else known.index(text.casefold()) + 1, (*self.names.names, *new)

    def _rank(self, text: str) -> int:
        """Rank of the base class that the text names, or -1."""
        ranks = {name.casefold(): rank for rank, c in enumerate(self.fold.base) if c <= len(self.names.names)
                 for name in (self.names.names[c - 1], self.names.texts[c - 1])}  # fmt: skip
        return ranks.get(text.casefold(), -1)

    @property
    def general_notes(self) -> list[str]:
        """Remarks that hold for any supports."""
        return [*self.system.warnings, *([self._note] if self._note else [])]

    def _notes(self, target: Target, count: int) -> list[str]:
        found, shot, text = self.general_notes, target.shot, target.text
        if count > shot:
            found.append(f"{count} supports for a {shot}-shot checkpoint: the mean of {len(target.groups)} predictions")
        elif count < shot:
            found.append(f"{count} of {shot} supports: they are repeated in turn")
        if target.base_rank >= 0 and self.system.uses_base_learner:
            found.append(f"{text!r} is one of the classes that the base learner knows, and is not held for background")
        elif text and not self.takes_text:
            found.append(TEXT_UNREAD)
        found += [f"{photo.name}: {why}" for photo, mask, _ in target.examples if (why := doubt(mask))]
        if self.config.Data.images == "drawings":
            found.append("trained on the drawn demo world: on photographs its masks mean nothing")
        return found

    def _mean(self, x: Tensor) -> Tensor:
        """Average over the groups of supports: B*G ... -> B ..."""
        return x.unflatten(0, (-1, len(self._target.groups))).mean(1)
