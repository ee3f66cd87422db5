"""Commands about the data of a config.

    python -m util.data index --config FILE      the images of its fold: counted, stored, compared with the published index
    python -m util.data export --config FILE     its episodes as a file that other codebases can run
    python -m util.data hsnet  --config FILE --splits DIR     HSNet's published episodes and training list, from its data/splits
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from util import cli, protocol
from util.cache import CACHE
from util.config import Config, load_config
from util.data import hsnet_splits
from util.data.episodes import check_novel, episodes_per_class
from util.data.fold_counts import store, verdict
from util.data.index import build_index, table
from util.data.manifest import episode_hash, manifest_text, write_manifest
from util.data.source import EpisodeSource
from util.layers import names_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m util.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True, dest="command")
    for name, what in (("index", "count and store the images of a fold"), ("export", "write the episodes as a text file"),
                       ("hsnet", "repeat HSNet's published episodes")):  # fmt: skip
        command = commands.add_parser(name, help=what)
        command.add_argument("--config", required=True, help="config/DATASET/DATASET_EXP_NET.yaml")
        command.add_argument("--arch", help="system whose recipe and protocol count (default: none, the protocol strict)")
        command.add_argument("overrides", nargs="*", metavar="Section.key=value")
        if name != "index":
            file = "DATASET_EXP_SHOTshot.txt" if name == "export" else "DATASET_EXP_SHOTshot_hsnet.txt"
            command.add_argument("--out", help=f"file, or - for the console (default OUTPUT/episodes/{file})")
    command.add_argument("--splits", type=Path, required=True, help="the folder data/splits of HSNet's repository")
    given = parser.parse_args(arguments)
    config = load_config(given.config, given.arch, given.overrides, options=None)
    if given.command == "index":
        index(config)
    elif given.command == "export":
        export(config, given.config, given.out)
    else:
        hsnet(config, given.config, given.splits, given.out)


def index(config: Config) -> None:
    """Print both parts of a fold. Raises UserError when a novel class has no episode."""
    source = EpisodeSource(config)
    for part in ("train", "val"):
        records, index = source.records(f"{part}_list"), source.index(training=part == "train")
        print(f"\n{config.Train.data_set}, fold {config.Train.split}, {part}: {getattr(config.Data, f'{part}_list')}")
        counts = None
        try:
            if part == "val":
                counts = _episodes(source)
        finally:  # the table helps to understand an error too
            print(table(index, source.names, counts))
        print(verdict(config, part, len(records), len(index.records), sum(map(len, index.by_class.values()))))
        print(f"stored in {store(CACHE, config, part, records, index, source.names.names)}")


def _episodes(source: EpisodeSource) -> Counter[int]:
    """Count the episodes of each class, of the first seed."""
    episodes = next(iter(source.test_episodes().values()))
    count = source.count or len(episodes)
    check_novel(episodes, source.fold, source.names, count)
    return episodes_per_class(episodes, count)


def export(config: Config, file: str, out: str | None) -> None:
    """Write the episodes of a config's protocol. Raises UserError when a novel class has no episode."""
    train, used = config.Train, protocol.of(config)
    source = EpisodeSource(config)
    lists, count = source.test_episodes(), source.count
    header = {"data set": train.data_set, "split": train.split, "shot": train.shot, "protocol": used.name,
              "protocol hash": used.hash, "list": config.Data.val_list}
    if out == "-":
        print(manifest_text(header, lists, count), end="")
        return
    path = Path(out or episode_file(config, file))
    write_manifest(path, header, lists, count)
    print(f"{len(lists)} seeds × {count or len(next(iter(lists.values()))):,} episodes ({episode_hash(lists, count)}): {path}")


def hsnet(config: Config, file: str, splits: Path, out: str | None) -> None:
    """Write HSNet's published episodes and training list, and compare its lists with ours.

    Raises UserError for lists that are absent or broken, or name an image that Data.val_list does not have.
    """
    train, source = config.Train, EpisodeSource(config)
    data_set, fold, shot = train.data_set, train.split, train.shot
    listed = hsnet_splits.read(splits, data_set, "val", fold)
    drawn = hsnet_splits.draw(listed, data_set, source.fold.novel, shot)
    index = build_index(source.records("val_list"), source.fold.novel, only=False, min_pixels=1)
    lists = {hsnet_splits.SEED: hsnet_splits.as_manifest(drawn, data_set, index, shot)}
    print(hsnet_splits.compare(listed, data_set, source.index(training=False)))
    header = {"data set": data_set, "split": fold, "shot": shot, "list": config.Data.val_list, "drawn from": str(listed.file)}
    if out == "-":
        print(manifest_text(header, lists, None), end="")
    else:
        path = Path(out or episode_file(config, file, "_hsnet"))
        write_manifest(path, header, lists, None)
        print(f"{len(drawn):,} episodes ({episode_hash(lists, None)}): {path}")
    print(hsnet_splits.verdict(drawn, data_set, fold, shot))
    training = Path(config.Runtime.output) / "episodes" / f"{data_set}_split{fold}_hsnet_train.txt"
    count = hsnet_splits.write_training_list(training, splits, data_set, fold)
    print(f"{count:,} training images, for Data.train_list: {training}")


def episode_file(config: Config, file: str, suffix: str = "") -> Path:
    """Return where the episodes of a config go."""
    data_set, exp, _ = names_of(file)
    return Path(config.Runtime.output) / "episodes" / f"{data_set}_{exp}_{config.Train.shot}shot{suffix}.txt"


if __name__ == "__main__":
    cli.run(main)
