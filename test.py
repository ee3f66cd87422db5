"""Evaluate a trained system on the novel classes: `sh test.sh split0 pascal 1`, or

    python test.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Prints the table and writes exp/DATASET/ARCH/EXP/NET/result/: report.json, report.html, gallery.png, gallery.json, test.log.
`Test_Finetune.weight` takes our checkpoints and the published .pth files; `--episodes FILE` (or Test_Finetune.episodes)
runs the episodes of a file. Where the protocol leaks, the same episodes are also run without the leak.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path

from demo import prepare_data
from model import System, content_hash, load_weights, needs_base_learner, open_system, system_class
from model.few_shot.system import FewShot
from model.verify import trace_all
from util import cli, protocol
from util.cache import TensorCache, open_cache
from util.config import Config, load_config
from util.data.manifest import AnyEpisodes, episode_hash
from util.data.source import Source
from util.report.write import choose, summarise, text_table, write_report
from util.run import curves, distributed, preflight
from util.run.checkpoint import EXPORT, check_identity, read_meta
from util.run.distributed import Context
from util.run.identity import environment, fingerprint, identity
from util.run.log import RunLog
from util.run.place import Experiment, base_learner_file
from util.score import causes, evaluate
from util.score import statistics as stats
from util.score.evaluate import Row

FIRST = 6  # pictures of episodes that every run has
TRACED = 2  # episodes of each seed whose stages a result keeps fingerprints of


def main() -> None:
    arguments = cli.parse(__doc__, episodes=True)
    config = load_config(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    system_class(arguments.arch)
    context = distributed.start(arguments.gpus, config.Runtime)
    try:
        prepare_data(config, context)
        with RunLog(place.result, "test.log", quiet=arguments.quiet, main=context.main) as log:
            if context.main:
                ready(config, place)
            context.barrier()
            test(config, place, context, log)
    finally:
        distributed.stop()


@dataclass
class Scored:
    """One evaluation: a record per seed, and by seed its episodes and their rows (none for the base learner)."""

    system: System
    source: Source
    weight: Path
    seeds: list[dict]
    episodes: dict[int, AnyEpisodes]
    rows: dict[int, list[Row]]


def test(config: Config, place: Experiment, context: Context, log: RunLog) -> None:
    """Seeds x episodes, the same without leaks, a table, a report."""
    # 1. scores under the protocol
    config = with_selection(config, place.arch, weight_file(config, place))
    cache = open_cache(config.Runtime.cache_gb, config.Runtime.cache_dir)
    started = time.monotonic()
    scored = score(config, place, context, log, cache)
    result = summary(config, place, context, scored, time.monotonic() - started) if context.main else {}
    cards = gallery(config, context, scored) if context.main else []
    if context.main:
        page = write_report(place.result, result, cards)
    # 2. and without what it leaks
    other = without_leaks(config, place, scored)
    if other:
        config_free, differences = other
        log.info(f"without leaks: {'; '.join(differences)}")
        mean, sd = summarise(score(config_free, place, context, log, cache).seeds)
        result["leak_free"] = {"mean": mean, "sd": sd, "differences": differences}
        if context.main:
            page = write_report(place.result, result, cards)
    if context.main:
        log.info("\n" + text_table(result))
        log.info(f"report: {page}")


def score(config: Config, place: Experiment, context: Context, log: RunLog, cache: TensorCache) -> Scored:
    """Builds the system, loads its weights and evaluates it."""
    system, source = open_system(place.arch, config)
    weight = weight_file(config, place)
    load_weights(system, config, place, weight)
    system.to(context.device).eval()
    system.remember(cache, fixed_head=True)
    if context.world > 1:
        facts = system.frozen_hashes() | {"weights": content_hash(system.trained)}
        context.agree(fingerprint(config, source.records("val_list")) | facts)
    for warning in system.warnings:
        log.warning(warning)
    log.info(f"{place.arch} on {place.data_set} {place.exp}, {config.Train.shot}-shot, weights {weight}")

    test, common = config.Test_Finetune, evaluate.settings(config)
    if source.task == "images":
        record = evaluate.evaluate_images(system.predict, source.validation(), source.fold, context, log, **common)
        return Scored(system, source, weight, [{"seed": 0} | record], {}, {})
    predict = functools.partial(system.predict, baselines=test.baselines)
    seeds, rows, lists = [], {}, source.test_episodes()
    for seed, episodes in lists.items():
        count = len(episodes) if test.episodes else test.test_num
        record, rows[seed] = evaluate.evaluate_episodes(
            predict, source.episodes(episodes), count, source.fold, context, log, label=f"seed {seed}", **common
        )
        seeds.append({"seed": seed} | record)
        log.info(f"seed {seed}: mIoU {100 * record['miou']:.2f}  FB-IoU {100 * record['fb_iou']:.2f}  {system.mark}".rstrip())
    return Scored(system, source, weight, seeds, lists, rows)


def weight_file(config: Config, place: Experiment) -> Path:
    """The checkpoint that the config names; auto: what the selection rule chose."""
    if config.Test_Finetune.weight != "auto":
        return Path(config.Test_Finetune.weight)
    return place.last if config.Train.selection == "last" and place.last.is_file() else place.best


def ready(config: Config, place: Experiment) -> None:
    """Raises a UserError with everything that is wrong, the checkpoint included."""
    weight, findings = weight_file(config, place), []
    whole = weight.suffix != ".safetensors" or place.arch == "PSPNet"  # it brings everything along
    if weight.suffix == ".safetensors" and weight.is_file():
        meta, cls = read_meta(weight), system_class(place.arch)
        priors = config.Method.priors or list(cls.default_priors) if issubclass(cls, FewShot) else None
        wanted = identity(place.arch, with_selection(config, place.arch, weight), priors)
        findings.append(preflight.attempt("checkpoint", lambda: check_identity(weight, meta, wanted) or str(weight)))
        whole |= EXPORT in meta
    preflight.require(config, place, ("val_list",), start=not whole, extra=findings)


def with_selection(config: Config, arch: str, weight: Path) -> Config:
    """The rule by which a checkpoint was chosen, where that is known better than from the config."""
    found = None
    if weight.suffix != ".safetensors":
        found = "novel"  # as all published checkpoints were chosen
    elif weight.is_file():
        found = read_meta(weight).get("selection")
        if found != "last" and system_class(arch).task == "episodes":
            found = None  # `check_identity` compares
    return replace(config, Train=replace(config.Train, selection=found)) if found else config


def without_leaks(config: Config, place: Experiment, scored: Scored) -> tuple[Config, list[str]] | None:
    """Config and differences of the leak-free evaluation; None where nothing leaks or no other weights are at hand."""
    if scored.source.task == "images" or not config.Test_Finetune.leak_free:
        return None
    last = scored.weight.parent / place.last.name
    ours = config.Train.selection == "novel" and scored.weight.suffix == ".safetensors" and last.is_file()
    free, differences = protocol.without_leaks(config, "vtp" in (scored.system.prior_names or []), last_epoch=ours)
    if ours:
        free = replace(free, Test_Finetune=replace(free.Test_Finetune, weight=str(last)))
    return (free, differences) if differences else None


def summary(config: Config, place: Experiment, context: Context, scored: Scored, seconds: float) -> dict:
    """The result as util/report/write.py wants it."""
    system, source, seeds, used = scored.system, scored.source, scored.seeds, protocol.of(config)
    mean, sd = summarise(seeds)
    classes = source.fold.base if source.task == "images" else source.fold.novel
    episodes = sum(seed["episodes"] for seed in seeds)
    result = {
        "system": place.arch, "data_set": place.data_set, "split": config.Train.split, "shot": config.Train.shot,
        "backbone": f"{config.Method.backbone}" + (f" (width {config.Method.width})" if config.Method.width != 64 else ""),
        "priors": system.prior_names, "checkpoint": str(scored.weight),
        "protocol": used.describe(bool({"vtp", "cam"} & {*(system.prior_names or [])}), source.task == "images")
        | trained_with(scored.weight),
        "protocol_hash": used.hash, "warnings": [*system.warnings, *skipped(seeds)], "mark": system.mark,
        "environment": environment(context.device) | provenance(config, scored),
        "classes": {c: source.names.names[c - 1] for c in classes},
        "other_classes": {c: name for c, name in enumerate(source.names.names, start=1) if c not in classes},
        "curves": learning_curves(config, place, scored.weight),
        "seeds": seeds, "mean": mean, "sd": sd, "baselines": baselines(seeds),
        "time": {"seconds": round(seconds, 1), "seconds per episode": round(seconds / episodes, 4)},
    }  # fmt: skip
    if isinstance(system, FewShot):
        result |= {"config": dataclasses.asdict(config), "place": [place.exp, place.net], "traces": {
            seed: trace_all(system, source.episodes(episodes), min(TRACED, len(scored.rows[seed])), config)
            for seed, episodes in scored.episodes.items()
        }}  # fmt: skip
    if scored.rows:
        texts = [" ".join(map(str, (seed, row.number, row.cls, *row.counts, row.query, *row.spread)))
                 for seed, rows in scored.rows.items() for row in rows]
        count = None if config.Test_Finetune.episodes else config.Test_Finetune.test_num
        columns = " ".join([*stats.COLUMNS, stats.QUERY, *stats.SPREAD])
        result["episodes"] = {"hash": episode_hash(scored.episodes, count), "columns": columns, "rows": texts}
        read = stats.read_episodes(result)
        result["interval"] = stats.bootstrap(read)
        result["causes"] = causes.tally(read.cls, read.counts, read.spread)
    return result


def provenance(config: Config, scored: Scored) -> dict[str, str]:
    """Hashes of code, config, data and every weight."""
    found = fingerprint(config, scored.source.records("val_list")) | scored.system.frozen_hashes()
    return found | {"weights": content_hash(scored.system.trained)}


def skipped(seeds: list[dict]) -> list[str]:
    """A warning where broken files were left out (Data.on_error=skip)."""
    count = sum(len(seed.get("skipped", [])) for seed in seeds)
    return [f"{count} of the protocol's episodes could not be read and were left out; report.json names them."] if count else []


def learning_curves(config: Config, place: Experiment, weight: Path) -> dict[str, dict]:
    """Of the runs that a checkpoint of ours and its base learner come from, as far as they are on record."""
    if weight.suffix != ".safetensors":
        return {}
    files = {place.arch: weight}
    if needs_base_learner(place.arch):
        files["base learner"] = base_learner_file(config, place)
    found = {name: curves.read(file.parents[1] / curves.FILE) for name, file in files.items()}
    return {name: points for name, points in found.items() if points}


def trained_with(weight: Path) -> dict[str, str]:
    """What a checkpoint of ours tells of its training that the protocol of the test does not."""
    vocabulary = read_meta(weight).get("vocabulary") if weight.suffix == ".safetensors" else None
    return {"text vocabulary in training": vocabulary} if vocabulary else {}


def gallery(config: Config, context: Context, scored: Scored) -> list:
    """Cards of the first seed: best, median and worst episodes, some for every cause of failure, and the first of some
    classes, which every run has, so that two can be laid side by side."""
    if not scored.rows:
        return []
    seed, rows = next(iter(scored.rows.items()))
    data = scored.source.episodes(scored.episodes[seed])
    found = choose([row.counts.iou for row in rows])
    found |= causes.examples([row.counts for row in rows], [row.spread for row in rows], without=sum(found.values(), []))
    found["first of a class"] = sorted({row.cls: i for i, row in reversed([*enumerate(rows)])}.values())[:FIRST]
    groups = {group: [rows[i].number for i in at] for group, at in found.items()}
    return evaluate.gallery(scored.system.predict, data, groups, scored.source.names.names, context.device,
                            config.Train.resized_val)  # fmt: skip


def baselines(seeds: list[dict]) -> dict[str, dict[str, float]]:
    """Means over seeds of the trivial predictions' scores."""
    found = [seed["baselines"] for seed in seeds if "baselines" in seed]
    names = found[0] if found else {}
    return {name: {key: sum(f[name][key] for f in found) / len(found) for key in names[name]} for name in names}


if __name__ == "__main__":
    cli.run(main)
