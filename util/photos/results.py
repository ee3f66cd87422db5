"""Results of predict.py: masks, overlays, scores and polygons. Those of one run appear together, at its end, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from util.errors import UserError
from util.files import atomic, save_json
from util.photos import polygons
from util.photos.reading import Photo, shrink
from util.report import viz

UNFINISHED = "unfinished"  # folder of a run that has not come to its end
OVERLAY_SIDE = 1600  # pixels: overlays of larger photos are reduced to it
SHEET = 30  # pictures of overview.jpg at most, supports first
ROW = 6  # pictures in a row
TILE = 200  # height of a picture in pixels


class Results:
    """Write results into OUT/unfinished; `close` moves everything to OUT and replaces an earlier run's results.

    Args:
        kind: kind of export, one of KINDS, or None.
        names: of the objects, for the export.
        record: entries of scores.json about the run.
    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, out: Path, kind: str | None, names: Sequence[str], record: dict[str, Any]) -> None:
        self.out, self.kind, self.names = out / UNFINISHED, kind, names
        with _writing(out):
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir(parents=True)
        self.record = record | {"images": [], "unread": []}
        self._taken: set[str] = set()
        self._coco, self._tasks = polygons.Coco(names, runs=kind == "coco-rle"), []
        self._panels: list[viz.Panel] = []

    def support(self, number: int, photo: Photo, mask: np.ndarray) -> None:
        """Write a support with its mask, H W {0, 1, 255}."""
        self._save_overlay(f"supports/{number}.jpg", f"example {number}", photo.image, mask, "support mask")

    def add(self, stem: str, photo: Photo, mask: np.ndarray, score: np.ndarray, seconds: float,
            presence: float | None = None) -> dict[str, Any]:  # fmt: skip
        """Write the files of one image and return its entry of scores.json.

        Args:
            stem: stem of its files' names; a number is added where it is taken.
            mask: H W bool; score: H W in 0..1.
            presence: how sure it is that the object is there, 0..1, where that is known.
        """
        name = self._free(stem)
        mean = round(float(score[mask].mean()), 4) if mask.any() else None
        self._save(f"masks/{name}.png", Image.fromarray(mask.astype(np.uint8) * 255), "PNG")
        self._save_overlay(f"overlays/{name}.jpg", name, photo.image, mask.astype(np.uint8), "prediction")
        self._save_polygons(name, photo, [(self.names[0], mask, mean)])
        return self._add(name, photo, seconds, {
            "fraction": round(float(mask.mean()), 4), "score": mean, "highest": round(float(score.max()), 4),
            **({} if presence is None else {"presence": round(presence, 4)}),
        })  # fmt: skip

    def add_labels(self, stem: str, photo: Photo, label: np.ndarray, score: np.ndarray, classes: Mapping[int, str],
                   seconds: float, presence: Mapping[str, float] | None = None) -> dict[str, Any]:  # fmt: skip
        """Write the files of one labelled image and return its entry of scores.json, its classes by size.

        Args:
            stem: as `add`; label: H W uint8, class numbers; score: H W in 0..1; classes: number -> name, 0 the background.
            presence: as `add`, of each name.
        """
        name, masks = self._free(stem), {number: label == number for number in np.unique(label).tolist()}
        rows = [{"class": classes[number], "value": number, "fraction": round(float(mask.mean()), 4),
                 "score": round(float(score[mask].mean()), 4)} for number, mask in masks.items()]  # fmt: skip
        rows.sort(key=lambda row: -row["fraction"])
        painted = Image.fromarray(label)
        painted.putpalette(viz.palette().tobytes())
        self._save(f"masks/{name}.png", painted, "PNG")
        image, small = shrink(photo.image, OVERLAY_SIDE), shrink(label, OVERLAY_SIDE, cv2.INTER_NEAREST)
        legend = [(row["value"], f"{row['class']} {100 * row['fraction']:.1f} %") for row in rows]
        shown = viz.tinted(image, small)
        self._save_jpeg(f"overlays/{name}.jpg", viz.with_legend(shown, legend))
        self._show(name, viz.with_legend(viz.fit(shown, TILE), legend))
        objects = [(row["class"], masks[row["value"]], row["score"]) for row in rows if row["value"]]
        self._save_polygons(name, photo, objects)
        known = {} if presence is None else {"presence": {name: round(value, 4) for name, value in presence.items()}}
        return self._add(name, photo, seconds, {"classes": rows, **known})

    def _add(self, name: str, photo: Photo, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
        entry = {"image": photo.name, "mask": f"masks/{name}.png", "overlay": f"overlays/{name}.jpg", "height": photo.hw[0],
                 "width": photo.hw[1], **found, "seconds": round(seconds, 3)}  # fmt: skip
        self.record["images"].append(entry)
        return entry

    def unread(self, source: str, reason: str) -> None:
        """Record an image that could not be read."""
        self.record["unread"].append({"image": source, "reason": reason})

    def close(self) -> None:
        """Write the files about all images, and move the results to their place."""
        self.finish()
        with _writing(final := self.out.parent):
            for made in sorted(self.out.iterdir()):
                if (final / made.name).is_dir():
                    shutil.rmtree(final / made.name)
                made.replace(final / made.name)
            self.out.rmdir()
        self.out = final

    def finish(self) -> None:
        """Write the files about all images so far, without touching an earlier run's results."""
        with _writing(self.out):
            if self.kind in ("coco", "coco-rle"):
                save_json(self.out / "coco.json", self._coco.content())
            if self.kind == "label-studio":
                save_json(self.out / "label-studio.json", self._tasks)
            if self.kind == "yolo":
                self._save_text("data.yaml", yaml.safe_dump({"names": dict(enumerate(self.names))}, allow_unicode=True))
            save_json(self.out / "scores.json", self.record)
        if self._panels:
            rows = [self._panels[i : i + ROW] for i in range(0, len(self._panels), ROW)]
            self._save_jpeg("overview.jpg", viz.contact_sheet(rows, height=TILE))

    def _save_text(self, name: str, text: str) -> None:
        with _writing(self.out), atomic(self.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _save_polygons(self, name: str, photo: Photo, objects: Sequence[polygons.Object]) -> None:
        if self.kind == "labelme":
            with _writing(self.out):
                save_json(self.out / f"labelme/{name}.json", polygons.labelme(self._from_labelme(photo), photo.hw, objects))
        file = Path(photo.name).name
        if self.kind in ("coco", "coco-rle"):
            self._coco.add(file, photo.hw, objects)
        if self.kind == "yolo":
            self._save_text(f"labels/{name}.txt", polygons.yolo(photo.hw, objects, self.names))
        if self.kind == "label-studio":
            self._tasks.append(polygons.label_studio(file, photo.hw, objects))

    def _from_labelme(self, photo: Photo) -> str:
        """Path of a photo as seen from OUT/labelme: both folders can move together."""
        return os.path.relpath(Path(photo.name).resolve(), (self.out.parent / "labelme").resolve())

    def _free(self, stem: str) -> str:
        name, count = stem, 2
        while name in self._taken:
            name, count = f"{stem}-{count}", count + 1
        self._taken.add(name)
        return name

    def _save_overlay(self, name: str, caption: str, image: np.ndarray, mask: np.ndarray, colour: str) -> None:
        image, mask = shrink(image, OVERLAY_SIDE), shrink(mask, OVERLAY_SIDE, cv2.INTER_NEAREST)
        shown = viz.overlay(image, mask, viz.COLOURS[colour], outline=max(1, round(max(mask.shape) / 300)))
        self._save_jpeg(name, shown)
        self._show(caption, viz.fit(shown, TILE))

    def _show(self, caption: str, image: np.ndarray) -> None:
        if len(self._panels) < SHEET:
            self._panels.append((caption, image))

    def _save_jpeg(self, name: str, image: np.ndarray) -> None:
        self._save(name, Image.fromarray(image), "JPEG", quality=92, subsampling=0)

    def _save(self, name: str, image: Image.Image, kind: str, **options: int) -> None:
        with _writing(self.out), atomic(self.out / name) as temporary:
            image.save(temporary, kind, **options)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out {folder}: cannot be written ({reason}); choose another folder, or make room") from error
