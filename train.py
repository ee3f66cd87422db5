"""Train a system: `sh train.sh split0 pascal 2`, or

    python train.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Output goes to exp/DATASET/ARCH/EXP/NET/: config.yaml, train.log, curves.jsonl, events/ (TensorBoard), snapshot/. Running the same
command again continues where the last run stopped, bit for bit: at a signal to terminate, at the latest checkpoint otherwise.
"""

# ruff: noqa: E402 (what is wrong on the command line is said before torch is imported)

from model import early

AFTER = "training continues at its last resume point when the same command runs again"
if __name__ == "__main__":
    early.answer(__doc__, AFTER, plan=True)

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from model import System, configure, content_hash, load_frozen, load_start, needs_clip, open_system, system_class
from util import cli
from util.cache import open_cache
from util.config import Config, Method
from util.data.episodes import Batch, collate
from util.data.loading import Loader, RangeSampler
from util.errors import UserError
from util.files import atomic
from util.report.gallery import gallery
from util.report.summary import label
from util.report.viz import contact_sheet
from util.run import checkpoint, distributed, plan, preflight
from util.run.checkpoint import Progress
from util.run.distributed import Context, Termination
from util.run.identity import CODE, fingerprint, identity, sources
from util.run.log import Ahead, RunLog, tracking
from util.run.place import Experiment, before_file, missing_before, owned
from util.run.schedule import Guard, Schedule, Stop, stops
from util.score.task import How, Task, Test, headline


def main() -> None:
    arguments = cli.parse(__doc__, plan=True)
    config = configure(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    context = distributed.start(arguments.gpus, config.Runtime)
    try:
        preflight.make_data(config, context)
        if context.main:
            lists = ("train_list", "val_list") if validates(config) else ("train_list",)
            cls = system_class(place.arch)
            if not cls.facts.trained:
                raise UserError(f"{place.arch} trains nothing. Test it: `ARCH={place.arch} sh test.sh {place.command} GPUS`")
            stages = [] if arguments.dry_run else preflight.start_weights(config, place, cls.facts)
            preflight.require(preflight.Start(config, place, cls.facts, cls.task, needs_clip(place.arch, config), lists), stages)
        context.barrier()
        run = dry_run if arguments.dry_run else train
        before = system_class(place.arch).facts.before
        if before:
            recipe = recipe_of(before, config, arguments.config)
            trained_first = config.Train.before == "run" and config.Method.pre_weight == "auto"
            if context.main and trained_first and (alone := only_second(arguments.overrides, config, recipe)):
                print(f"{before} comes first, by its own recipe. For {place.arch} alone: {', '.join(alone)}", flush=True)
            ready_before(run, config, recipe, place.of(before), place, context, arguments.quiet)
        run(config, place, context, arguments.quiet)
    finally:
        distributed.stop()


def recipe_of(before: str, config: Config, path: str) -> Config:
    """The config of the run that must come first: its own recipe, with the data, the machine and the network of the second."""
    recipe = configure(path, before)
    recipe.Data, recipe.Runtime = config.Data, config.Runtime
    shared = {f.name: getattr(config.Method, f.name) for f in dataclasses.fields(Method)}
    recipe.Method = dataclasses.replace(recipe.Method, **shared)
    recipe.Train.workers, recipe.Train.selection = config.Train.workers, config.Train.selection
    return recipe


def only_second(overrides: Sequence[str], config: Config, recipe: Config) -> list[str]:
    """Those overrides of the training that do not reach the run before it."""
    found = {}
    for text in overrides:
        section, _, key = text.partition("=")[0].partition(".")
        if section == "Train" and getattr(config.Train, key) != getattr(recipe.Train, key):
            found[text] = f"{text} (there {getattr(recipe.Train, key)})"
    return list(found.values())


def ready_before(
    run: Callable, config: Config, recipe: Config, own: Experiment, place: Experiment, context: Context, quiet: bool
) -> None:
    """Trains the run that must come first on the way (to its end), where `Train.before` says so; asks for it otherwise."""
    if config.Train.before == "run" and config.Method.pre_weight == "auto":
        if not checkpoint.finished(own.snapshot):
            run(recipe, own, context, quiet)
    elif not before_file(config, place, own.arch).is_file():
        raise UserError(missing_before(config, place, own.arch))


def dry_run(config: Config, place: Experiment, context: Context, quiet: bool) -> None:
    """Says what a run would do and take, whether the run before it is there yet or not; writes nothing."""
    before = system_class(place.arch).facts.before
    ready = not before or before_file(config, place, before).is_file()
    with RunLog(place.folder, main=False) as log:
        found = plan.measure(build(config, place, context, log, weights=ready))
        if context.main:
            print(found)


@dataclass
class Run:
    """Everything a training run holds."""

    system: System
    task: Task
    data: Dataset
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    stops: list[Stop]  # where the run validates or keeps weights, the last one at its end
    progress: Progress
    config: Config
    place: Experiment
    context: Context
    log: RunLog
    meta: dict[str, Any]  # what the checkpoints are for
    validation: Test | None  # what is validated; it chooses the checkpoint, unless Train.selection says that the last step is it
    step_seconds: float = 0.0  # as measured last; 0: not yet
    validation_seconds: float = 0.0

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.data) // self.config.Train.batch_size

    @property
    def chooses(self) -> bool:
        """Whether the validation chooses the checkpoint."""
        return self.config.Train.selection != "last"

    def validations(self) -> int:
        """How many are still to come."""
        return sum(stop.validate and stop.step > self.progress.closed for stop in self.stops) * (self.validation is not None)

    def ahead(self, steps: int) -> Ahead:
        """What follows an epoch's progress line: steps of training, and the validations."""
        left = self.validations()
        unknown = left > 0 and not self.validation_seconds
        return Ahead(f"training of {self.place.arch}", steps, left * self.validation_seconds, unknown)


def train(config: Config, place: Experiment, context: Context, quiet: bool) -> None:
    """One run, from its start, or from wherever an earlier run of the same command stopped, to its end."""
    tracker = config.Runtime.tracker if context.main else ""
    with (
        owned(place.folder, context.main),
        tracking(tracker, f"{place.arch} {place.command} {place.net}", place.folder, dataclasses.asdict(config)) as tracked,
        RunLog(place.folder, quiet=quiet, main=context.main, tracked=tracked) as log,
    ):
        run = start(config, place, context, log)
        with Termination(context) as termination:
            for stop in run.stops:
                if stop.step > run.progress.closed:
                    iterate(run, stop, termination)
                    close(run, stop)
        if run.chooses:
            best, score = run.progress, label(run.task.headline)
            log.info(f"best {score} {100 * best.best:.2f} after {best.best_epoch:.3g} epochs  {run.system.mark}".rstrip())
        log.info(f"weights: {place.best}")
        context.barrier()


def iterate(run: Run, stop: Stop, termination: Termination) -> None:
    """Steps from where the run stands to `stop`."""
    train, context, progress = run.config.Train, run.context, run.progress
    run.system.train()
    saved = time.monotonic()
    begin, end = (step * train.batch_size for step in (progress.step, stop.step))
    sampler = RangeSampler(begin, end, train.batch_size, context, drop_last=True)
    on_error = run.config.Data.on_error
    batches = Loader(run.data, sampler, train.workers, context.device, run.log.warning, on_error=on_error, training=True)
    first = stop.epoch * run.per_epoch  # of the epoch that the bar shows
    guard = Guard(context)
    steps = min(run.per_epoch, run.schedule.total - first)
    run.log.ahead = run.ahead(run.schedule.total - first - steps)
    with run.log.progress(steps, stop.label, progress.step - first) as bar:
        for batch in batches:
            rate = run.schedule.set(run.optimizer, progress.step)
            batch = batch.to(context.device, non_blocking=True)
            with context.autocast():
                losses = run.system.losses(batch, progress.step)
            loss = sum(losses.values())
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            guard.step(run.optimizer, loss, progress.step)
            losses = {name: value.detach() for name, value in losses.items()}
            shown = (progress.step + 1) % train.print_freq == 0
            look = shown or context.device.type == "cpu" or progress.step + 1 == stop.step  # a GPU is not made to wait in between
            if look and guard.stopped():
                raise UserError(poisoned(run, int(guard.first), losses))
            progress.step += 1
            bar.step(train.batch_size, losses, rate)
            if shown:
                run.log.scalars(losses | run.system.measured() | {"rate": rate}, progress.step, "train")
            stopping = look and termination.asked()
            if stopping or (look and time.monotonic() - saved > 60 * train.save_minutes):
                save_point(run)
                saved = time.monotonic()
            if stopping:
                raise termination.ended(progress.step)
        run.step_seconds = bar.pace


def close(run: Run, stop: Stop) -> None:
    """What follows the last step before a stop: validation, best, last and kept weights, a resume point."""
    progress, place = run.progress, run.place
    if stop.validate and run.validation is not None:
        save_point(run)  # a validation may take longer than a cluster waits
        score = validate(run)
        if run.chooses and score > progress.best:
            progress.best, progress.best_epoch = score, stop.step / run.per_epoch
            save_weights(run, place.best, {"epoch": progress.best_epoch, "score": progress.best})
    if stop.last:
        if not run.chooses:
            save_weights(run, place.best)
        save_weights(run, place.last, {"selection": "last"})
    if stop.keep:
        save_weights(run, place.snapshot / f"{stop.step}.safetensors", {"selection": "last", "step": stop.step})
    progress.closed = progress.step
    save_point(run)


def save_weights(run: Run, file: Path, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    if run.context.main:
        checkpoint.save_weights(file, run.system.trained_state(), run.meta | more)


def save_point(run: Run) -> None:
    """Everything that is needed to go on from here, bit for bit."""
    if run.context.main:
        rng, state = checkpoint.rng_state(run.context.device), run.system.trained_state()
        checkpoint.save_resume(run.place.snapshot, state, run.meta, run.optimizer, rng, run.progress)


def build(config: Config, place: Experiment, context: Context, log: RunLog, weights: bool = True) -> Run:
    """Model, data and optimizer at the start of a run; without `weights` the frozen parts mean nothing, and cost the same."""
    torch.manual_seed(config.Train.manual_seed)
    system, task = open_system(place.arch, config)
    if weights:
        load_frozen(system, config, place, training=True)
    first = load_start(system, config, place) if weights else {}
    for warning in system.warnings:
        log.warning(warning)
    system.to(context.device)
    meta = identity(place.arch, system.facts, config) | {"frozen": system.frozen_hashes()}
    meta["vocabulary"] = system.vocabulary or config.CLIP.vocabulary
    meta |= first
    meta["config"] = dataclasses.asdict(config)
    validation = task.validation() if validates(config) else None
    meta["selection"] = config.Train.selection
    if validation is not None:
        system.remember(open_cache(config.Runtime.cache_gb, config.Runtime.cache_dir, context.device, 0.25), fixed_head=False)
    data, batch = task.training(), config.Train.batch_size
    per_epoch = len(data) // batch
    if per_epoch == 0:
        raise UserError(f"Train.batch_size = {batch}: an epoch has only {len(data)} samples")
    total = config.Train.iterations or per_epoch * config.Train.epochs
    found = sources(config, task.records("train_list"), task.names)
    if warning := system.check_batch(batch // context.world, context.world, context.device):
        log.warning(warning)
    return Run(
        system, task, data, system.optimizer(config.Train), Schedule.of(config.Train, total), stops(config.Train, per_epoch),
        Progress(config=dataclasses.asdict(config), total=total, sources=found), config, place, context, log, meta, validation,
    )  # fmt: skip


def validates(config: Config) -> bool:
    """Whether a run looks at the validation data."""
    return config.Train.watch or config.Train.selection != "last"


def start(config: Config, place: Experiment, context: Context, log: RunLog) -> Run:
    """A run where an earlier one of the same command stopped, or at its start."""
    run = build(config, place, context, log)
    system, task = run.system, run.task
    if "start" in run.meta:
        log.info(f"starts from the weights of {run.meta['start']}, with a fresh optimizer")
    torch.manual_seed(config.Train.manual_seed)  # the same in all processes, see model.ops.Dropout
    if config.Train.resume == "auto":
        resume(run)
    elif context.main:
        shutil.rmtree(place.snapshot / "resume", ignore_errors=True)
    if context.world > 1:
        facts = {"position": f"{run.progress.step}, {run.progress.closed}", "weights": content_hash(system.trained)}
        context.agree(fingerprint(config, task.records("train_list")) | system.frozen_hashes() | facts)
        system.distribute(context.device)
    log.rewind({"train": run.progress.step, "validation": run.progress.closed})
    if context.main:
        with atomic(place.folder / "config.yaml") as file:
            file.write_text(config.to_yaml())
    parameters = sum(p.numel() for p in system.trained.parameters())
    room = preflight.disk(config, plan.checkpoints(parameters))
    if not room.ok:
        raise UserError(f"{room.detail}; {room.remedy}")
    log.info(f"{place.arch} on {place.data_set} {place.exp}: {len(run.data)} samples, {run.per_epoch} iterations an epoch, "
             f"{parameters / 1e6:.2f} M trained parameters, {context.world} process(es) on {context.device}")
    return run


def resume(run: Run) -> None:
    """Goes back to the newest resume point if there is one; the config must be the same."""
    found = checkpoint.load_resume(run.place.snapshot)
    if found is None:
        return
    file, weights, state, damaged = found
    for message in damaged:
        run.log.warning(f"{message}; the one before is used")
    changed = differences(state["progress"]["config"], run.progress.config)
    if changed:
        raise UserError(f"{run.place.snapshot} holds a run with another config ({'; '.join(changed)}). Use Train.resume=none to "
                        "overwrite it, or Runtime.output=FOLDER to keep both")
    check_sources(run, state["progress"].get("sources", {}))
    checkpoint.check_identity(file, checkpoint.read_meta(file), identity(run.place.arch, run.system.facts, run.config))
    checkpoint.check_frozen(file, checkpoint.read_meta(file), run.system.frozen_hashes())
    run.system.load_trained(weights, str(file))
    run.optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_rng_state(state["rng"], run.context.device)
    run.progress = Progress(**state["progress"] | {"sources": run.progress.sources})
    epochs, rest = divmod(run.progress.step, run.per_epoch)
    more = f" and {rest} iterations" if rest else ""
    end = ", nothing is left to train" if run.progress.finished else ""
    run.log.info(f"{epochs} of {-(-run.schedule.total // run.per_epoch)} epochs{more} are done{end}")


def check_sources(run: Run, before: dict[str, str]) -> None:
    """Raises UserError where the data under the run's paths is another than when it started; other code is only a warning."""
    now = run.progress.sources
    changed = [what for what, digest in before.items() if what in now and now[what] != digest]
    if CODE in changed:
        changed.remove(CODE)
        run.log.warning("the code has changed since this run started; it goes on with the new code")
    if changed:
        raise UserError(f"{run.place.snapshot} holds a run on other data: {', '.join(changed)} changed since it started. Put the "
                        "old data back to go on, use Train.resume=none to start over, or Runtime.output=FOLDER to keep both. "
                        "(Copied files have another time: Data.same_by=size looks at sizes alone)")


def differences(old: dict, new: dict) -> list[str]:
    """Keys in which two configs differ, but for how fast a run goes and what is tested later."""
    free = {"Train.workers", "Train.print_freq", "Train.resume", "Train.watch_labels", "Runtime.threads", "Runtime.output",
            "Data.same_by", "Runtime.cache_gb", "Runtime.cache_dir", "Runtime.processes", "Runtime.tracker", "Train.save_minutes"}
    return [f"{section}.{key} was {old.get(section, {}).get(key)!r}, is {value!r}"
            for section, values in new.items() if section != "Test_Finetune"
            for key, value in values.items() if f"{section}.{key}" not in free and old.get(section, {}).get(key) != value]


def poisoned(run: Run, step: int, losses: dict[str, Tensor]) -> str:
    """Keeps the batch and the weights that gave a loss which is no number, and says so. The batch is read again."""
    size, context = run.config.Train.batch_size, run.context
    own = next(iter(RangeSampler(step * size, (step + 1) * size, size, context, drop_last=True)))
    batch: Batch = collate([run.data[i] for i in own])
    file = run.place.folder / f"bad_batch{context.rank}.safetensors"
    shown = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
    weights = {f"weights.{name}": value for name, value in run.system.trained_state().items()}
    checkpoint.save_weights(file, batch.tensors() | weights, {"step": step, "losses": shown})
    return (f"the loss is not finite at iteration {step + 1} ({shown}); lower Train.base_lr, or use "
            f"Runtime.precision=fp32. The last resume point is valid; batch and weights of this step are in {file}")


def validate(run: Run) -> float:
    """The headline score on the validation data; the first three samples go to TensorBoard as pictures."""
    system, task, context, test = run.system.eval(), run.task, run.context, run.validation
    started, how = time.monotonic(), How.of(run.config, context, run.log)
    run.log.ahead = Ahead(f"training of {run.place.arch}", (run.validations() - 1) * how.steps(test),
                          (run.schedule.total - run.progress.step) * run.step_seconds, more=not run.step_seconds)  # fmt: skip
    found = task.evaluate(system.predict, test, how)
    run.validation_seconds, record = time.monotonic() - started, found.record
    if context.main:
        first = list(dict.fromkeys(row.number for row in found.rows))[:3]  # of those that could be read
        cards = gallery(system, test.data, {"": first}, task.names.names, context)
        sheet = contact_sheet([card.panels for card in cards], [f"{card.title} {system.mark}" for card in cards])
        run.log.image(task.unit, sheet, run.progress.step)
    shown = {key: value for key, value in record.items() if key.endswith("iou")}
    run.log.scalars(shown, run.progress.step, "validation")
    text = "  ".join(f"{key} {100 * value:.2f}" for key, value in shown.items())
    run.log.info(f"{text}  ({record['episodes']} {task.unit}, {time.monotonic() - started:.0f} s)  {system.mark}".rstrip())
    return headline(task, record)


if __name__ == "__main__":
    cli.run(main, AFTER)
