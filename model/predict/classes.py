"""Several things at once: a named group of supports for each, and one label for every pixel.

    several = ClassPredictor(Predictor.from_checkpoint())
    several.add("cat", "a.jpg", "a.png")
    several.add("dog", ["b.jpg", "c.jpg"], boxes=[[10, 20, 200, 300], [5, 5, 90, 80]])
    found = several.predict("d.jpg")            # found.label, found.score; several.classes: number -> name, 0 the background

Each pixel gets the class of the highest foreground probability among those whose mask holds it, else 0. The query's own features
are computed once for all classes.
"""

import time
from collections.abc import Collection, Sequence

import numpy as np

from model.predict.dense_predictor import BACKGROUND, Labelling
from model.predict.predictor import TEXT_UNREAD, Predictor, Target
from util.data.transforms import IGNORE
from util.errors import UserError
from util.photos.reading import Box, Source, read_photo


class ClassPredictor:
    """A few-shot system that looks for several classes. Use `add` for each, then `predict`.

    Attributes:
        classes: number -> name; 0 is the background.
        notes: remarks for the user, each with the name of its class.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.device, self.precision = predictor.device, predictor.precision
        self.classes = {0: BACKGROUND}
        self.notes: tuple[str, ...] = ()
        self._targets: list[Target] = []

    def add(self, name: str, images: Source | Sequence[Source], masks: Source | Sequence[Source | None] | None = None,
            boxes: Box | Sequence | None = None) -> None:  # fmt: skip
        """Add a class by its supports, as in `Predictor.set_support`; systems that read a text read the name.

        Raises:
            UserError: as `Predictor.set_support`; no name, a name that is taken, no support, more than 254 classes.
        """
        name = name.strip()
        if not name or name.casefold() in map(str.casefold, self.classes.values()):
            raise UserError(f"two classes have the name {name!r} (or it is the background's); name them apart" if name
                            else "a class needs a name")  # fmt: skip
        if len(self.classes) >= IGNORE:
            raise UserError(f"{len(self.classes)} classes: at most {IGNORE - 1} have a number in the masks")
        target = self.predictor.target(images, masks, name, boxes)
        if not target.groups:
            raise UserError(f"class {name!r} has no support: each class needs at least one image that shows it")
        self._targets.append(target)
        self.classes[len(self._targets)] = name
        general = self.predictor.general_notes
        own = [f"{name}: {note}" for note in target.notes if note not in (*general, TEXT_UNREAD)]
        self.notes = tuple(dict.fromkeys([*(self.notes or general), *own]))

    def check(self) -> list[float]:
        """See `Predictor.check`: of the supports of all classes in turn, each searched for its own class alone."""
        found = []
        for target in self._targets:
            self.predictor.use(target)
            found += self.predictor.check()
        return found

    def presence(self, image: Source) -> dict[str, float] | None:
        """See `Predictor.presence`: of each class by its name."""
        if not self.predictor.needs_masks:
            return None
        photo, found = read_photo(image, "query"), {}
        for target in self._targets:
            self.predictor.use(target)
            found[target.text] = self.predictor.presence(photo)
        return found

    def predict(self, image: Source, absent: Collection[str] = ()) -> Labelling:
        """Label an image: a path, Pillow image, uint8 array H W 3 or uint8 tensor 3 H W.

        absent: names of classes that are not there and get no pixel.

        Raises:
            UserError: no class yet, or an image that cannot be used.
        """
        if not self._targets:
            raise UserError("nothing to look for yet: call add(name, images, masks) first")
        started, photo = time.perf_counter(), read_photo(image, "query")
        label, score = np.zeros(photo.hw, np.uint8), np.ones(photo.hw, np.float32)
        wanted = {number: target for number, target in enumerate(self._targets, start=1) if target.text not in absent}
        for rows, found in self.predictor.strips(photo, list(wanted.values())) if wanted else ():
            score[rows] = 1 - np.max([probability for _, probability in found], 0)  # of the background
            best = np.zeros_like(score[rows])
            for number, (mask, probability) in zip(wanted, found, strict=True):
                wins = mask & (probability > best)
                best[wins], label[rows][wins] = probability[wins], number
            score[rows] = np.where(label[rows] > 0, best, score[rows])
        return Labelling(label, score, time.perf_counter() - started)
