"""`python -m util.data.episodes export`: the episodes of a config's protocol as a file that other codebases can run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from util import protocol
from util.config import load_config
from util.data.build import Source
from util.data.manifest import episode_hash, manifest_text, write_manifest
from util.experiment import CACHE, Experiment


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError when a novel class has no episode."""
    parser = argparse.ArgumentParser(prog="python -m util.data.episodes", description="Episodes of a config as a text file.")
    command = parser.add_subparsers(required=True).add_parser("export", help="write them")
    command.add_argument("--config", required=True, help="config/DATASET/DATASET_EXP_NET.yaml")
    command.add_argument("--arch", default="PI_CLIP", help="system whose recipe counts (default PI_CLIP)")
    command.add_argument("--out", help="file, or - for the console (default OUTPUT/episodes/DATASET_EXP_SHOTshot.txt)")
    command.add_argument("overrides", nargs="*", metavar="Section.key=value")
    given = parser.parse_args(arguments)
    config = load_config(given.config, given.arch, given.overrides)
    place = Experiment.from_config_path(given.arch, given.config, config.Runtime.output)
    train, test, used = config.Train, config.Test_Finetune, protocol.of(config)

    lists = Source(config, "episodes", CACHE).test_episodes()
    count = None if test.episodes else test.test_num
    header = {"data set": train.data_set, "split": train.split, "shot": train.shot, "protocol": used.name,
              "protocol hash": used.hash, "list": config.Data.val_list}
    if given.out == "-":
        print(manifest_text(header, lists, count), end="")
        return
    out = Path(given.out or place.root / "episodes" / f"{place.data_set}_{place.exp}_{train.shot}shot.txt")
    write_manifest(out, header, lists, count)
    print(f"{len(lists)} seeds × {test.test_num:,} episodes ({episode_hash(lists, count)}): {out}")
