"""Label every pixel of your own images, with the classes of a dense system or, where it reads names, with others.

    predictor = DensePredictor.from_checkpoint("weclip.safetensors")
    found = predictor.predict("b.jpg")                  # found.label, found.score; predictor.classes: number -> name

    predictor = DensePredictor.from_checkpoint("clip_rc.safetensors")
    predictor.set_classes(["cat", "dog", "sofa"])       # zero-shot systems alone

It takes the path of test.py: the same resize, the same scores, the same decision. Photos longer than 640 pixels are reduced for
the network (fewer with a CLIP of smaller patches than 16); labels come at full size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.build import build_system, load_weights, system_class
from model.few_shot.system import FewShot
from model.predict.opening import checkpoint, trained_on
from model.predict.predictor import Predictor
from model.predict.text_predictor import choose_device, choose_precision, longest_side
from model.system import System
from util.config import Config
from util.data.folds import ClassNames, Fold, clean_name, read_class_names
from util.data.semantic import images_of
from util.data.transforms import IGNORE
from util.errors import UserError
from util.photos.reading import Photo, Source, read_photo, shrink
from util.run.distributed import Context
from util.run.place import Experiment

BACKGROUND = "background"


@dataclass(frozen=True)
class Labelling:
    """Result for one upright image of H x W pixels."""

    label: np.ndarray  # H W uint8, class numbers: keys of `DensePredictor.classes`
    score: np.ndarray  # H W float32 0..1, probability of the class
    seconds: float


class DensePredictor:
    """A trained dense system for a user's images. Use `from_checkpoint`, then `predict`.

    Attributes:
        system: in evaluation mode, on `device`.
        config: that of its training.
        fold, names: classes of the training.
        classes: number -> name of the present ones; 0 is the background, where the system has one.
        notes: remarks for the user about the results.
    """

    def __init__(self, system: System, config: Config, fold: Fold, names: ClassNames, device: torch.device, precision: str,
                 note: str = ""):
        self.system, self.config, self.device, self.precision = system.to(device).eval(), config, device, precision
        self.fold, self.names, self._note = fold, names, note
        self._transform = system.task.transform(config, training=False)
        self._patch = system.clip.module.visual.patch if hasattr(system, "clip") else None
        self._name(system.task.channels_of(fold), names)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | None = None, precision: str | None = None,
                        config: Config | None = None, arch: str | None = None) -> "DensePredictor":  # fmt: skip
        """Load a checkpoint and CLIP, checked by hash as in test.py. Arguments and errors as `Predictor.from_checkpoint`."""
        found, chosen = checkpoint(path, config, arch), choose_device(device)
        if issubclass(system_class(found.arch), FewShot):
            raise UserError(f"{found.path} (ARCH={found.arch}) finds what an example shows: open it with "
                            "model.predict.predictor.Predictor")
        fold, names = trained_on(found)
        if len(names.names) != fold.num_classes:
            raise UserError(f"{found.path} has {fold.num_classes} classes, Data.class_names = {found.config.Data.class_names} "
                            f"names {len(names.names)}; give the file of its training (Data.class_names=FILE)")
        system = build_system(found.arch, found.config, fold, names)
        load_weights(system, found.config, Experiment.of_checkpoint(found.path, found.arch, found.config), found.path)
        return cls(system, found.config, fold, names, chosen, choose_precision(precision, chosen), found.meta.get("note", ""))

    def set_classes(self, names: Sequence[str] | ClassNames) -> None:
        """Choose the classes to predict, until the next call; a trained class keeps the text that it was trained with.

        Raises:
            UserError: the system has no text bank; no class, more than 254, or two of one name; a text that CLIP does not know.
        """
        if not isinstance(names, ClassNames):
            known = dict(zip(map(str.casefold, self.names.names), self.names.texts, strict=True))
            names = ClassNames(tuple(names), tuple(known.get(name.casefold(), name) for name in names))
        folded = [name.casefold() for name in names.names]
        if twice := [name for i, name in enumerate(names.names) if folded[i] in folded[:i]]:
            raise UserError(f"two classes have the name {twice[0]!r}; name them apart")
        if not 0 < len(folded) < IGNORE:
            raise UserError(f"{len(folded)} classes: name at least one and at most {IGNORE - 1}")
        self.system.use_classes(names)
        self._name(tuple(range(1, 1 + len(folded))), names)

    def predict(self, image: Source) -> Labelling:
        """Label an image: a path, Pillow image, uint8 array H W 3 or uint8 tensor 3 H W.

        Raises:
            UserError: an image that cannot be used, or one that is smaller than a patch of CLIP.
        """
        return self.predict_batch([image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Source]) -> list[Labelling]:
        """Run `predict` on several images of any sizes, one after the other."""
        return [self._predict(read_photo(source, f"query {i}")) for i, source in enumerate(images, start=1)]

    def _predict(self, photo: Photo) -> Labelling:
        started = time.perf_counter()
        image = shrink(photo.image, longest_side(self._patch or 16)).astype(np.float32)
        if min(image.shape[:2]) < (self._patch or 1):
            reduced = "" if image.shape[:2] == photo.hw else f", {image.shape[1]} x {image.shape[0]} reduced for the network"
            raise UserError(f"{photo.name} is {photo.hw[1]} x {photo.hw[0]} pixels{reduced}: smaller than a patch of "
                            f"CLIP ({self._patch} pixels); give a larger or less narrow picture")
        blank, present = np.full(image.shape[:2], IGNORE, np.uint8), torch.zeros(self.fold.num_classes, dtype=torch.bool)
        batch = images_of(image, blank, self._transform, present, photo.name).to(self.device)
        try:
            with Context(self.device, precision=self.precision).autocast():
                prediction = self.system.predict(batch)
        except UserError as error:
            raise UserError(f"{photo.name}: {error}") from error
        placed = self._transform.placed(photo.hw)
        label = self._numbers[prediction.decide(0, placed).cpu().numpy()]
        return Labelling(label, prediction.confidence(0, placed).cpu().numpy(), time.perf_counter() - started)

    def _name(self, channels: tuple[int, ...], names: ClassNames) -> None:
        """Set the classes of the channels, and what is to say about them."""
        self._numbers = np.array(channels, np.uint8)
        self.classes = {c: names.names[c - 1] if c else BACKGROUND for c in channels}
        notes = [*self.system.warnings, *([self._note] if self._note else [])]
        if self.system.reads_text:
            notes.append(f"every pixel gets one of these {len(channels)} classes, whatever it shows, and scores depend on the "
                         "vocabulary: a name added or left out changes them. Name what else is in the pictures, too")  # fmt: skip
        if self.config.Data.images == "drawings":
            notes.append("trained on the drawn demo world: on photographs its labels mean nothing")
        self.notes = tuple(notes)


def load_predictor(path: str | Path, device: str | None = None, precision: str | None = None, config: Config | None = None,
                   arch: str | None = None) -> Predictor | DensePredictor:  # fmt: skip
    """Open a checkpoint with the predictor of its system. Arguments and errors as `Predictor.from_checkpoint`."""
    few_shot = issubclass(system_class(checkpoint(path, config, arch).arch), FewShot)
    return (Predictor if few_shot else DensePredictor).from_checkpoint(path, device, precision, config, arch)


def read_classes(given: str) -> list[str] | ClassNames:
    """Read the classes of a command line: names separated by commas, or a file with a name a line (`NAME | text for CLIP`).

    Raises:
        UserError: no such file, or no name.
    """
    if Path(given).is_file():
        return read_class_names(given)
    if "/" in given or given.endswith(".txt"):
        raise UserError(f"--classes {given}: no such file; give names separated by commas, or a file with a name a line")
    return [clean_name(f"--classes {given!r}", name) for name in given.strip().strip(",").split(",")]
