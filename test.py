"""Evaluate a trained system on the novel classes: `sh test.sh split0 pascal 1`, or

    python test.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Prints the table and writes exp/DATASET/ARCH/EXP/NET/result/: report.json, report.html, gallery.png, test.log.
`Test_Finetune.weight` takes our checkpoints and the published .pth files.
"""

import functools
import time
from pathlib import Path

from demo import prepare_data
from model import System, load_backbone, open_system, system_class
from util import cli, distributed, evaluate, experiment
from util.checkpoint import check_frozen, check_identity, read_meta
from util.config import Config, load_config
from util.data.build import Source
from util.distributed import Context
from util.errors import UserError
from util.experiment import Experiment
from util.files import load_state, load_tensors
from util.log import RunLog
from util.report import choose, summarise, text_table, write_report


def main() -> None:
    arguments = cli.parse(__doc__)
    config = load_config(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    system_class(arguments.arch)
    context = distributed.start(arguments.gpus, config.Runtime.threads)
    try:
        prepare_data(config, context)
        with RunLog(place.result, "test.log", main=context.main) as log:
            test(config, place, context, log)
    finally:
        distributed.stop()


def test(config: Config, place: Experiment, context: Context, log: RunLog) -> None:
    """Seeds x episodes, a table, a report."""
    # 1. system and weights
    system, source = open_system(place.arch, config)
    weight = place.best if config.Test_Finetune.weight == "auto" else Path(config.Test_Finetune.weight)
    load_weights(system, config, place, weight)
    system.to(context.device).eval()
    for warning in system.warnings:
        log.warning(warning)
    log.info(f"{place.arch} on {place.data_set} {place.exp}, {config.Train.shot}-shot, weights {weight}")

    # 2. scores
    started = time.monotonic()
    seeds, ious = scores(system, source, config, context, log)
    seconds = time.monotonic() - started
    if not context.main:
        return

    # 3. report
    mean, sd = summarise(seeds)
    names = source.names.names
    classes = source.fold.base if source.task == "images" else source.fold.novel
    episodes = sum(seed["episodes"] for seed in seeds)
    result = {
        "system": place.arch, "data_set": place.data_set, "split": config.Train.split, "shot": config.Train.shot,
        "backbone": f"{config.Method.backbone}" + (f" (width {config.Method.width})" if config.Method.width != 64 else ""),
        "checkpoint": str(weight), "protocol": experiment.protocol(config),
        "warnings": list(system.warnings), "mark": system.mark,
        "environment": experiment.environment(context.device), "classes": {c: names[c - 1] for c in classes},
        "seeds": seeds, "mean": mean, "sd": sd, "baselines": baselines(seeds),
        "time": {"seconds": round(seconds, 1), "seconds per episode": round(seconds / episodes, 4)},
    }  # fmt: skip
    cards = []
    if ious:
        first = source.validation(config.Test_Finetune.seeds[0])
        groups = {group: [ious[i][0] for i in at] for group, at in choose([iou for _, iou in ious]).items()}
        cards = evaluate.gallery(system.predict, first, groups, names, context.device, config.Train.resized_val)
    page = write_report(place.result, result, cards)
    log.info("\n" + text_table(result))
    log.info(f"report: {page}")


def scores(system: System, source: Source, config: Config, context: Context, log: RunLog) -> tuple[list[dict], list]:
    """One record per seed, and the foreground IoU of every episode of the first seed (none for the base learner)."""
    train, finetune = config.Train, config.Test_Finetune
    common = {"batch": train.batch_size_val, "workers": train.workers, "squash": train.resized_val}
    if source.task == "images":
        data = source.validation(train.manual_seed)
        return [{"seed": 0} | evaluate.evaluate_images(system.predict, data, source.fold, context, log, **common)], []
    predict = functools.partial(system.predict, baselines=finetune.baselines)
    seeds, first = [], []
    for seed in finetune.seeds:
        record, ious = evaluate.evaluate_episodes(
            predict, source.validation(seed), finetune.test_num, source.fold, context, log, label=f"seed {seed}", **common
        )
        seeds.append({"seed": seed} | record)
        first = first or ious
        log.info(f"seed {seed}: mIoU {100 * record['miou']:.2f}  FB-IoU {100 * record['fb_iou']:.2f}  {system.mark}".rstrip())
    return seeds, first


def load_weights(system: System, config: Config, place: Experiment, weight: Path) -> None:
    """A checkpoint of ours must match the config and the frozen parts; a published one brings its base learner along."""
    if not weight.is_file():
        raise UserError(f"Test_Finetune.weight = {config.Test_Finetune.weight}: no checkpoint {weight}. Train first: "
                        f"`ARCH={place.arch} NET={place.net} sh train.sh {place.command} GPUS`")
    if weight.suffix != ".safetensors":
        system.import_official(load_state(weight), str(weight))
        return
    meta = read_meta(weight)
    check_identity(weight, meta, experiment.identity(place.arch, config, system.prior_names))
    if system.task == "episodes":
        load_backbone(system, config, place)
    check_frozen(weight, meta, system.frozen_hashes())
    system.load_trained(load_tensors(weight), str(weight))


def baselines(seeds: list[dict]) -> dict[str, dict[str, float]]:
    """Means over seeds of the trivial predictions' scores."""
    found = [seed["baselines"] for seed in seeds if "baselines" in seed]
    names = found[0] if found else {}
    return {name: {key: sum(f[name][key] for f in found) / len(found) for key in names[name]} for name in names}


if __name__ == "__main__":
    cli.run(main)
