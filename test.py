"""Evaluate a trained system: `sh test.sh split0 pascal 1`, or

    python test.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Prints the table and writes exp/DATASET/ARCH/EXP/NET/result/: report.json, report.html, gallery.png, gallery.json, test.log.
`Test_Finetune.weight` takes our checkpoints and the published .pth files; `--episodes FILE` (or Test_Finetune.episodes)
runs the episodes of a file. Where the protocol leaks, the same episodes are also run without the leak.
"""

# ruff: noqa: E402 (what is wrong on the command line is said before torch is imported)

from model import early

AFTER = "an earlier result is unharmed; the same command starts over, faster where Runtime.cache_dir keeps features"
if __name__ == "__main__":
    early.answer(__doc__, AFTER, episodes=True)

import dataclasses
import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path

from model import System, configure, content_hash, needs_clip, open_tested, system_class
from model.verify import trace_all
from util import cli, protocol
from util.cache import TensorCache, open_cache
from util.config import Config, home_of
from util.report.gallery import gallery
from util.report.summary import label, prior_quality, summarise
from util.report.viz import Card
from util.report.write import choose, text_table, write_report
from util.run import curves, distributed, preflight
from util.run.checkpoint import EXPORT, check_identity, read_meta
from util.run.distributed import Context
from util.run.identity import environment, fingerprint, identity
from util.run.log import Ahead, RunLog
from util.run.place import Experiment, before_file, owned
from util.score import causes, crf
from util.score import statistics as stats
from util.score.priors import THRESHOLDS, title
from util.score.rescore import rescore
from util.score.table import EpisodeTable
from util.score.task import How, Scores, Task

FIRST = 6  # pictures of samples that every run has
NONE = Path("none, nothing is trained")  # in the place of a checkpoint
TRACED = 2  # samples of each seed whose stages a result keeps fingerprints of


def main() -> None:
    arguments = cli.parse(__doc__, episodes=True)
    config = configure(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    if config.Test_Finetune.trained_on:  # a result of its own, beside those of other weights
        place = replace(place, net=config.Test_Finetune.trained_on.replace("/", "_"))
    context = distributed.start(arguments.gpus, config.Runtime)
    try:
        preflight.make_data(config, context)
        with owned(place.result, context.main), RunLog(place.result, "test.log", quiet=arguments.quiet, main=context.main) as log:
            if context.main:
                ready(config, place)
            context.barrier()
            test(config, place, context, log)
    finally:
        distributed.stop()


@dataclass
class Scored:
    """One evaluation: the scores and rows of every seed."""

    system: System
    task: Task
    weight: Path
    scores: dict[int, Scores]

    @property
    def seeds(self) -> list[dict]:
        return [{"seed": seed} | found.record for seed, found in self.scores.items()]


def test(config: Config, place: Experiment, context: Context, log: RunLog) -> None:
    """Seeds x samples, the same without leaks, a table, a report."""
    # 1. scores under the protocol
    config = with_selection(config, place.arch, weight_file(config, place))
    cache = open_cache(config.Runtime.cache_gb, config.Runtime.cache_dir, context.device)
    started = time.monotonic()
    scored = score(config, place, context, log, cache)
    result = summary(config, place, context, scored, time.monotonic() - started) if context.main else {}
    cards = pictures(context, scored) if context.main else []
    if context.main:
        page = write_report(place.result, result, cards)
    # 2. and without what it leaks
    other = without_leaks(config, place, scored)
    if other:
        config_free, differences = other
        log.info(f"without leaks: {'; '.join(differences)}")
        config_free = replace(config_free, Test_Finetune=replace(config_free.Test_Finetune, control=False))
        mean, sd = summarise(score(config_free, place, context, log, cache).seeds)
        result["leak_free"] = {"mean": mean, "sd": sd, "differences": differences}
        if context.main:
            page = write_report(place.result, result, cards)
    if verdict := cache.verdict():
        log.info(verdict)
    if context.main:
        log.info("\n" + text_table(result))
        log.info(f"report: {page}")


def score(config: Config, place: Experiment, context: Context, log: RunLog, cache: TensorCache) -> Scored:
    """Builds the system, loads its weights and evaluates it."""
    weight = weight_file(config, place)
    system, task = open_tested(place.arch, config, place, weight)
    system.to(context.device).eval()
    system.remember(cache, fixed_head=True)
    if context.world > 1:
        facts = system.frozen_hashes() | {"weights": content_hash(system.trained)}
        context.agree(fingerprint(config, task.records("val_list")) | facts)
    for warning in system.warnings:
        log.warning(warning)
    log.info(f"{place.arch} on {place.data_set} {place.exp}, {task.setting}, weights {weight}")

    predict = functools.partial(system.predict, baselines=config.Test_Finetune.baselines)
    asked, scores = config.Test_Finetune, {}
    how = replace(How.of(config, context, log), crf=asked.crf, maps=Path(asked.maps) if asked.maps else None, trivial=True,
                  control=asked.control)  # fmt: skip
    tests = task.tests()
    for seed, test in tests.items():
        later = sum(how.steps(other) for other in [*tests.values()][len(scores) + 1 :])
        log.ahead = Ahead("all seeds", later) if later else None
        scores[seed] = task.evaluate(predict, test, how)
        shown = "  ".join(f"{label(key)} {100 * scores[seed].record[key]:.2f}" for key in ("miou", "fb_iou", "hiou")
                          if key in scores[seed].record)  # fmt: skip
        log.info(f"{test.label}: {shown}  {system.mark}".rstrip())
    return Scored(system, task, weight, scores)


def weight_file(config: Config, place: Experiment) -> Path:
    """The checkpoint that the config names; auto: what the selection rule chose. `NONE` for a system that trains nothing."""
    if not system_class(place.arch).facts.trained:
        return NONE
    if config.Test_Finetune.weight != "auto":
        return Path(config.Test_Finetune.weight)
    place = place.home(config.Test_Finetune.trained_on)
    return place.last if config.Train.selection == "last" and place.last.is_file() else place.best


def ready(config: Config, place: Experiment) -> None:
    """Raises a UserError with everything that is wrong, the checkpoint included."""
    weight, findings, cls = weight_file(config, place), [], system_class(place.arch)
    if config.Test_Finetune.crf:
        findings.append(preflight.attempt("CRF", lambda: crf.load().__name__))
    frozen = weight.suffix == ".safetensors"  # a published checkpoint brings everything along
    if frozen and weight.is_file():
        meta = read_meta(weight)
        wanted = identity(place.arch, cls.facts, with_selection(home_of(config), place.arch, weight))
        findings.append(preflight.attempt("checkpoint", lambda: check_identity(weight, meta, wanted) or str(weight)))
        frozen = EXPORT not in meta and cls.facts.frozen
    clip = needs_clip(place.arch, config)
    frozen = frozen or weight == NONE and cls.facts.frozen  # a system that trains nothing may have a frozen encoder
    preflight.require(preflight.Start(config, place, cls.facts, cls.task, clip, ("val_list",), frozen), findings)


def with_selection(config: Config, arch: str, weight: Path) -> Config:
    """The rule by which a checkpoint was chosen, where that is known better than from the config."""
    found = None
    if weight == NONE:
        found = "last"
    elif weight.suffix != ".safetensors":
        found = "novel"  # as all published checkpoints were chosen
    elif weight.is_file():
        found = read_meta(weight).get("selection")
        if found != "last" and "Train.selection" in system_class(arch).facts.identity:
            found = None  # `check_identity` compares
    return replace(config, Train=replace(config.Train, selection=found)) if found else config


def without_leaks(config: Config, place: Experiment, scored: Scored) -> tuple[Config, list[str]] | None:
    """Config and differences of the leak-free evaluation; None where nothing leaks or no other weights are available."""
    if not scored.task.fold.novel or not config.Test_Finetune.leak_free or not scored.task.leaks:
        return None
    last = scored.weight.parent / place.last.name
    ours = config.Train.selection == "novel" and scored.weight.suffix == ".safetensors" and last.is_file()
    free, differences = protocol.without_leaks(config, scored.system.reads_text, last_epoch=ours)
    if ours:
        free = replace(free, Test_Finetune=replace(free.Test_Finetune, weight=str(last)))
    return (free, differences) if differences else None


def summary(config: Config, place: Experiment, context: Context, scored: Scored, seconds: float) -> dict:
    """The result that util/report/write.py describes."""
    system, task, seeds, used = scored.system, scored.task, scored.seeds, protocol.of(config)
    mean, sd = summarise(seeds)
    samples = sum(seed["episodes"] for seed in seeds)
    table = task.table(scored.scores)
    tests = task.tests()
    found = {
        "system": place.arch, "data_set": place.data_set, "split": config.Train.split, "shot": config.Train.shot,
        "setting": task.setting, "unit": task.unit,
        "backbone": f"{config.Method.backbone}" + (f" (width {config.Method.width})" if config.Method.width != 64 else ""),
        "priors": system.prior_names, "checkpoint": str(scored.weight),
        "protocol": used.describe(system.reads_text, task.says) | trained_with(config, scored.weight),
        "protocol_hash": used.hash, "protocol_parts": used.parts, "mark": system.mark,
        "warnings": [*system.warnings, *skipped(seeds, task.unit)],
        "environment": environment(context.device) | provenance(config, scored),
        "classes": {c: task.names.names[c - 1] if c else "background" for c in task.classes},
        "other_classes": {c: name for c, name in enumerate(task.names.names, start=1) if c not in task.classes},
        "curves": learning_curves(config, place, scored.weight),
        "seeds": seeds, "mean": mean, "sd": sd, "baselines": baselines(seeds),
        "time": {"seconds": round(seconds, 1), f"seconds per {task.unit.removesuffix('s')}": round(seconds / samples, 4)},
        "config": dataclasses.asdict(config), "place": [place.exp, place.net],
        "traces": {seed: trace_all(system, test.data, min(TRACED, test.count), context) for seed, test in tests.items()},
        "episodes": table.to_json(), "interval": stats.bootstrap(table),
        "causes": causes.tally(table.cls, table.counts, table.spread),
    }  # fmt: skip
    if table.tallies is not None:
        found["rules"] = rescore([found])
    control = EpisodeTable.of(table.hash, {seed: scores.control for seed, scores in scored.scores.items()})
    if len(control):
        found["control"] = stats.support_gap(table, control) | {"names": system.reads_text, "rows": control.to_json()}
    return found


def provenance(config: Config, scored: Scored) -> dict[str, str]:
    """Hashes of code, config, data and every weight."""
    found = fingerprint(config, scored.task.records("val_list")) | scored.system.frozen_hashes()
    return found | {"weights": content_hash(scored.system.trained)}


def skipped(seeds: list[dict], unit: str) -> list[str]:
    """A warning where broken files were left out (Data.on_error=skip)."""
    messages = [message for seed in seeds for message in seed.get("skipped", [])]
    if not messages:
        return []
    files = sorted({message.partition(": ")[2] for message in messages})
    count = len(messages) + sum(seed["episodes"] for seed in seeds)
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    return [f"{len(messages):,} of the {count:,} {unit} of the protocol could not be read and were left out "
            f"(Data.on_error=skip): {files[0]}{more}. report.json names them. The scores are of the others."]


def learning_curves(config: Config, place: Experiment, weight: Path) -> dict[str, dict]:
    """Of the runs that a checkpoint of ours and its base learner come from, as far as they are on record."""
    if weight.suffix != ".safetensors":
        return {}
    files, before = {place.arch: weight}, system_class(place.arch).facts.before
    if before:
        files["base learner"] = before_file(config, place.home(config.Test_Finetune.trained_on), before)
    found = {name: curves.read(file.parents[1] / curves.FILE) for name, file in files.items()}
    return {name: points for name, points in found.items() if points}


def trained_with(config: Config, weight: Path) -> dict[str, str]:
    """What a checkpoint of ours tells of its training that the protocol of the test does not."""
    home = config.Test_Finetune.trained_on
    found = {"weights trained on": home} if home else {}
    vocabulary = read_meta(weight).get("vocabulary") if weight.suffix == ".safetensors" else None
    return found | ({"text vocabulary in training": vocabulary} if vocabulary else {})


def pictures(context: Context, scored: Scored) -> list[Card]:
    """Cards of the first seed: best, median and worst samples, some for every cause of failure, and the first of some
    classes, which every run has, so that two can be laid side by side."""
    seed, found = next(iter(scored.scores.items()))
    rows, data = [row for row in found.rows if row.cls], scored.task.tests()[seed].data  # of objects: the background is easy
    groups = choose([row.counts.iou for row in rows])
    groups |= causes.examples([row.counts for row in rows], [row.spread for row in rows], without=sum(groups.values(), []))
    groups["first of a class"] = sorted({row.cls: i for i, row in reversed([*enumerate(rows)])}.values())[:FIRST]
    numbers = {group: list(dict.fromkeys(rows[i].number for i in at)) for group, at in groups.items()}
    return gallery(scored.system, data, numbers, scored.task.names.names, context)


def baselines(seeds: list[dict]) -> dict[str, dict[str, float]]:
    """Means over seeds of the trivial predictions' scores; with them each prior at the best of its thresholds."""
    found = [seed["baselines"] for seed in seeds if "baselines" in seed]
    names = found[0] if found else {}
    means = {name: {key: sum(f[name][key] for f in found) / len(found) for key in names[name]} for name in names}
    for name, values in prior_quality({"seeds": seeds}).items() if means else ():
        best = max(range(len(values)), key=values.__getitem__)
        means[f"{title(name)} > {THRESHOLDS[best]:.1f}, chosen on this test"] = {"miou": values[best]}
    return means


if __name__ == "__main__":
    cli.run(main, AFTER)
