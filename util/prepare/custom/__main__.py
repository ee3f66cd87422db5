"""Make a data set from your own images: check every file, then write lists, configs and folds.

    python -m util.prepare.custom NAME --from DIR                 images/ masks/ classes.txt [folds.yaml] [train.txt val.txt]
    python -m util.prepare.custom NAME --voc DIR                  the layout of VOC, with classes.txt or CVAT's labelmap.txt
    python -m util.prepare.custom NAME --coco-images DIR --annotations JSON [JSON]

Nothing is copied or changed in your folder: data/NAME links to it and holds the masks that had to be converted. Lists and
configs are written last, after all checks. Run the same command again after you have added images.
docs/custom-data.md has the rest.
"""

import argparse
import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from util import cli
from util.config import load_config
from util.data.folds import NUM_CLASSES, read_folds
from util.data.index import MIN_PIXELS
from util.errors import UserError
from util.layers import CONFIGS
from util.prepare.custom import check, sources, write

RESERVED = {*NUM_CLASSES, "protocol", "system", "template", "episodes", "sweep"}  # folders of config/ and exp/


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m util.prepare.custom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the data set: letters, digits, '_' and '-'")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="holds images/, masks/ and classes.txt")
    source.add_argument("--voc", type=Path, metavar="DIR", help="holds JPEGImages/, SegmentationClass/, ImageSets/Segmentation/")
    source.add_argument("--coco-images", type=Path, metavar="DIR", help="the images of --annotations")
    parser.add_argument("--annotations", type=Path, nargs="+", metavar="JSON",
                        help="COCO instances: one file, or one with 'train' and one with 'val' in its name")
    parser.add_argument("--classes", type=Path, metavar="FILE",
                        help="one `NAME` or `NAME | text for CLIP` a line (default DIR/classes.txt); with COCO: which categories "
                             "(default lists/NAME/classes.txt if it is there, else all)")
    parser.add_argument("--folds", type=int, metavar="N", help="how many folds to make where there is no folds.yaml (default 4)")
    parser.add_argument("--min-pixels", type=int, metavar="N",
                        help="a class counts in an image from this many labelled pixels on (Data.min_pixels; default: that of "
                             f"config/NAME/base.yaml, else {MIN_PIXELS})")
    given = parser.parse_args(argv)
    if bool(given.coco_images) != bool(given.annotations):
        parser.error("--coco-images and --annotations go together")
    if given.min_pixels is not None and given.min_pixels < 1:
        parser.error("--min-pixels must be at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Raise UserError for any fault in the input; no list and no config is changed then."""
    given = parse(argv)
    name = given.name
    check_name(name)
    places = write.Places(name)
    found = read(given, places)
    check.classes(found.names)
    for note in found.notes:
        print(note)
    min_pixels = given.min_pixels or (load_config(places.base).Data.min_pixels if places.base.is_file() else MIN_PIXELS)
    folds_text, folds = choose_folds(given, found, places)
    seen = check.parted(check.look(found.pairs, len(found.names.names)), min_pixels, places.earlier_parts())
    check.enough(seen, found.names, folds, min_pixels)
    stuck = check.stuck(seen, found.names, folds, min_pixels)
    print("\n".join([check.table(seen, found.names, folds, min_pixels), *stuck.values(), *check.remarks(seen)]))

    for link, folder in found.links.items():
        sources.link(folder, places.data / link)
    written, kept = write.write(places, found, seen, folds_text, len(folds), min_pixels)
    print()
    for place in dict.fromkeys(path.parent for path in written):
        print(f"written to {place}: {', '.join(path.name for path in written if path.parent == place)}")
    for path in kept:
        print(f"left alone: {path} is other than would be written now; delete it to have it made anew")
    if not written:
        print("nothing new to write")
    ready = [split for split in range(len(folds)) if split not in stuck]
    print(following(name, ready[0], torch.cuda.is_available()) if ready else "No fold can run yet: mend what the warnings say, "
          "then run this command again")


def check_name(name: str) -> None:
    """Raise UserError where NAME cannot be the name of a data set."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
        raise UserError(f"{name!r} is no name for a data set: letters, digits, '_' and '-' only; it names folders")
    places = write.Places(name)
    bases = [*CONFIGS.glob("*/base.yaml"), *places.base.parents[1].glob("*/base.yaml")]  # of the program, of the working folder
    alike = [load_config(base) for base in bases if base.parent.name.lower() == name.lower() not in RESERVED]
    foreign = any(config.Train.data_set != name or not config.Data.folds for config in alike)
    if name.lower() in RESERVED or foreign or (places.base.parent.exists() and not places.folds.is_file()):
        raise UserError(f"the name {name!r} is taken (config/{name} is not this command's); choose another")


def read(given: argparse.Namespace, places: write.Places) -> sources.Found:
    """Read the source."""
    if given.folder:
        return sources.folder(given.folder, given.classes, places.data)
    if given.voc:
        return sources.voc(given.voc, given.classes, places.data)
    try:
        module = importlib.import_module("util.prepare.custom.coco")  # here: the other layouts do without pycocotools
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; `python env.py` prepares .venv with it") from error
    return module.coco(given.coco_images, given.annotations, given.classes or places.classes, bool(given.classes), places.data)


def choose_folds(given: argparse.Namespace, found: sources.Found, places: write.Places) -> tuple[str, list[tuple[int, ...]]]:
    """Return the text of folds.yaml and the novel classes of each fold: the user's, those of an earlier run, or new ones."""
    path = next((p for p in (found.folds, places.folds) if p and p.is_file()), None)
    if path is None:
        return write.make_folds(found.names, given.folds)
    folds = read_folds(path, found.names)
    if given.folds not in (None, len(folds)):
        raise UserError(f"--folds {given.folds}: {path} has {len(folds)}; leave --folds out, or delete that file")
    print(f"folds: those of {path}")
    return path.read_text(encoding="utf-8-sig"), folds


def following(name: str, split: int, gpu: bool) -> str:
    """Return the commands that train a fold and test it, on this machine; without a GPU they use a small network."""
    return write.template(f"next_commands_{'gpu' if gpu else 'cpu'}.txt").format(name=name, split=split).rstrip()


if __name__ == "__main__":
    cli.run(main)
