"""Prepare a data set: label PNGs and lists from the official downloads ("PI-CLIP Sec. 1, Lists").

    python -m util.prepare pascal --voc DIR_OR_TAR --sbd DIR_OR_TGZ
    python -m util.prepare coco --images DIR --annotations JSON [JSON ...]
    python -m util.prepare fss | isic | lung | suim | deepglobe | isaid | pascal_part | paco_part | lvis --from DIR_OR_ARCHIVE
    python -m util.prepare voc | coco_stuff | context --root DIR      (folders as mmsegmentation has them: only lists are made)

Existing files are kept, so the same command continues after an interruption. Lists are written last.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from util.errors import UserError

ROOT = {"pascal": Path("data/VOCdevkit/VOC2012"), "coco": Path("data/MSCOCO2014")}  # as in config/*/base.yaml
FOLDERS = {  # data roots as in config/*/zero_shot.yaml
    "voc": (Path("data/VOCdevkit/VOC2012"), "VOC 2012 with the labels of SBD, 10,582 images"),
    "coco_stuff": (Path("data/coco_stuff164k"), "COCO-Stuff 164k, 171 classes"),
    "context": (Path("data/VOCdevkit/VOC2010"), "PASCAL Context, 59 classes"),
}
SETS = {  # data sets that are only tested on, util/prepare/sets.py
    "fss": "FSS-1000, its 240 test classes", "isic": "ISIC 2018, skin lesions of three classes",
    "lung": "chest X-rays, variants 704 and 566", "suim": "SUIM, seven classes under water",
    "deepglobe": "DeepGlobe, land cover of six classes, variants 5666 and 9174", "isaid": "iSAID-5i, 15 classes in three folds",
    "pascal_part": "PASCAL-Part, 56 parts in four folds", "paco_part": "PACO-Part, 448 parts in four folds",
    "lvis": "LVIS-92i, ten folds, variants 1shot and 5shot",
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m util.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="data_set", required=True)
    pascal = commands.add_parser("pascal", help="PASCAL-5i: VOC 2012 and SBD")
    pascal.add_argument("--voc", type=Path, required=True, help="VOCtrainval_11-May-2012.tar, or the folder it unpacks to")
    pascal.add_argument("--sbd", type=Path, help="SBD's benchmark.tgz, or the folder it unpacks to; train_noval.txt is read "
                                                 "from that folder (beside the archive), or derived")
    coco = commands.add_parser("coco", help="COCO-20i: COCO 2014")
    coco.add_argument("--images", type=Path, required=True, help="the folder that holds train2014 and val2014")
    coco.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="JSON",
                      help="instances_train2014.json, instances_val2014.json; the file name says which split it is")
    for name, words in SETS.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("--from", type=Path, required=True, dest="source", metavar="DIR_OR_ARCHIVE",
                             help="the folder, or its zip or tar archive, which goes to OUT/source")
        command.add_argument("--variant", default="", help="where there are several; else the counts tell it")
        command.add_argument("--out", type=Path, help=f"the data root (default data/{name})")
    for name, (root, words) in FOLDERS.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("--root", type=Path, default=root, help="the data root, which is only read (default %(default)s)")
    for name, command in (("pascal", pascal), ("coco", coco)):
        command.add_argument("--out", type=Path, default=ROOT[name], help="the data root (default %(default)s); a source folder "
                                                                          "elsewhere is linked to, never written to")
    for name, command in commands.choices.items():
        command.add_argument("--lists", type=Path, help=f"where train.txt and val.txt go (default lists/{name})")
        command.add_argument("--partial", action="store_true", help="accept a part of the data set; needs --lists")
    return parser.parse_args(argv)


def prepare(argv: Sequence[str] | None) -> None:
    args = vars(parse(argv))
    data_set = args.pop("data_set")
    if data_set in FOLDERS or data_set in SETS:
        args["data_set"] = data_set
    if args["partial"] and not args["lists"]:
        raise UserError(f"--partial needs --lists DIR: lists/{data_set} is for the lists of the whole data set")
    args["lists"] = args["lists"] or Path("lists") / data_set
    try:
        name = "folders" if data_set in FOLDERS else "sets" if data_set in SETS else data_set
        importlib.import_module(f"util.prepare.{name}").prepare(**args)
    except ModuleNotFoundError as error:  # scipy, pycocotools: not needed for training
        raise UserError(f"the package {error.name} is missing; `python env.py` prepares .venv with it") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 2 after a message about wrong or missing input; 130 after Ctrl-C."""
    try:
        prepare(argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
