"""IMR-HSNet's input instead of masks: CLIP's activation map of the episode's class, in the query and in the supports."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.clip import CamSource
from model.few_shot.prior import Features
from model.ops import resize
from util.data.episodes import Episode, content_key
from util.errors import UserError
from util.files import load_array

TEMPLATE = "a photo of a {}"  # as published, of the bare class names


class CamPrior:
    """Class activation maps, resized to the feature grid.

    Args:
        bank: C D, one row of TEMPLATE for every class, base and novel.
        names: those of the classes, for messages.
        vocabulary: which classes compete, CLIP.vocabulary; published: `all`.
        base: 1-based base classes of the fold.
        view: CLIP.clip_size, the part of an image that CLIP sees; it is part of the key of cached maps.
        folders: where the published scripts stored maps; if any are given, maps are read there and not computed.
    """

    name, channels = "cam", 1
    query_needs = support_needs = frozenset()

    def __init__(self, source: CamSource, bank: Tensor, vocabulary: str, base: Sequence[int], view: str = "whole",
                 names: Sequence[str] = (), folders: Sequence[str] = ()):  # fmt: skip
        if vocabulary not in ("all", "base+target"):
            raise UserError(
                f"CLIP.vocabulary = {vocabulary}: a class activation map needs classes that compete with the target, "
                "known without the annotation: choose all (as published) or base+target"
            )
        if not len(bank):
            raise UserError(
                "IMR-HSNet's class activation maps need the names of all classes, in training as in prediction; "
                "use test.py with the data set's lists"
            )
        self.source, self.vocabulary, self.view = source, vocabulary, view
        self.folders = [Path(folder) for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"Method.cams: no such folder: {folder}")
        self.base = torch.tensor(base) - 1
        self.blank: set[tuple[str, int]] = set()  # (image, class): where CLIP finds nothing of the class
        self.use(bank, names)

    def use(self, bank: Tensor, names: Sequence[str]) -> None:
        """Use other texts from now on."""
        self.bank, self.names = bank, names
        self.kept_as = f"cam {content_key(bank.cpu().numpy())} {self.vocabulary} {self.view} {self.folders}"

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        """B 1 h w of the queries."""
        return self.maps(episode.clip_query, episode.cls, episode.query_key, episode.query_name, features)

    def of_supports(self, episode: Episode, features: Features) -> Tensor:
        """B K 1 h w."""
        images = [shot for shots in episode.clip_support for shot in shots]
        cls = episode.cls.repeat_interleave(features.shot)
        keys, names = sum(episode.support_key, []), sum(episode.support_names, [])
        found = self.maps(images, cls, keys, names, features)
        return found.unflatten(0, (-1, features.shot))

    def maps(self, images: Sequence[Tensor], cls: Tensor, keys: Sequence[str], names: Sequence[str],
             features: Features) -> Tensor:  # fmt: skip
        """N 1 h w of images 3 side side and their classes. Warns once of each image in which CLIP finds nothing of the class."""
        size, device = features.size, cls.device
        self.bank = self.bank.to(device)

        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            target, places = cls[rows] - 1, range(len(names))[rows] if isinstance(rows, slice) else rows
            shown = [names[i] for i in places]
            if self.folders:
                found = torch.stack([self.stored(*pair) for pair in zip(shown, target.tolist(), strict=True)]).to(device)
            else:
                found = self.source(torch.stack([images[i] for i in places]), self.bank, self.candidates(target), target)
            if keys:  # of an evaluation
                self._warn(shown, cls[rows].tolist(), found.flatten(1).amax(1).tolist())
            return {"map": resize(found[:, None], size)}

        keys = [f"{key} {c}" for key, c in zip(keys, cls.tolist(), strict=True)] if keys else []
        return features.memo.rows(f"{self.kept_as} {tuple(size)}", keys, device, compute)["map"]

    def stored(self, name: str, cls: int) -> Tensor:
        """Read the map 50 50 of an image and a class, 0-based: IMAGE_ID--CLASS.pt; COCO's ids are the names of its images.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        files = [folder / f"{image}--{cls}.pt" for folder in self.folders for image in (Path(name).stem, name)]
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            raise UserError(f"Method.cams: no map of {name} and class {cls + 1} ({files[0].name}) in "
                            f"{', '.join(map(str, self.folders))}; the published scripts make those of HSNet's lists "
                            "(Data.train_list, --episodes: docs/systems/hsnet.md)")
        found = load_array(path).float()
        if found.dim() != 2 or not 0 <= found.min() <= found.max() <= 1:
            raise UserError(f"{path}: expected a map H W in 0..1, got {tuple(found.shape)}, up to {found.max():.3g}")
        return found

    def _warn(self, names: Sequence[str], classes: Sequence[int], peaks: Sequence[float]) -> None:
        found = {(name, cls) for name, cls, peak in zip(names, classes, peaks, strict=True) if not peak}
        for name, cls in sorted(found - self.blank):
            what = self.names[cls - 1] if cls <= len(self.names) else f"class {cls}"
            logging.getLogger(__name__).warning("%s: CLIP finds no %s, its activation map is 0 everywhere", name, what)
        self.blank |= found

    def candidates(self, target: Tensor) -> Tensor:
        """N C bool."""
        classes = torch.full((len(target), len(self.bank)), self.vocabulary == "all", device=target.device)
        classes[:, self.base.to(target.device)] = True
        return classes.scatter(1, target[:, None], True)
