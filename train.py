"""Train a system: `sh train.sh split0 pascal 2`, or

    python train.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Output goes to exp/DATASET/ARCH/EXP/NET/: config.yaml, train.log, curves.jsonl, events/ (TensorBoard), snapshot/. Running the same
command again continues where the last run stopped, bit for bit: at a signal to terminate, at the latest checkpoint otherwise.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from demo import prepare_data
from model import System, content_hash, load_backbone, needs_base_learner, open_system
from util import cli
from util.cache import open_cache
from util.config import Config, load_config
from util.data.episodes import Batch
from util.data.loading import Loader, RangeSampler
from util.data.source import Source
from util.errors import UserError
from util.files import atomic
from util.report.viz import contact_sheet
from util.run import checkpoint, distributed, plan, preflight
from util.run.checkpoint import Progress
from util.run.distributed import Context, Termination
from util.run.identity import fingerprint, identity
from util.run.log import RunLog, tracking
from util.run.place import Experiment, base_learner_file, missing_base_learner
from util.run.schedule import poly
from util.score import evaluate


def main() -> None:
    arguments = cli.parse(__doc__, plan=True)
    config = load_config(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    context = distributed.start(arguments.gpus, config.Runtime)
    try:
        prepare_data(config, context)
        if context.main:
            preflight.require(config, place, ("train_list", "val_list") if config.Train.evaluate else ("train_list",))
        context.barrier()
        run = dry_run if arguments.dry_run else train
        if needs_base_learner(place.arch):
            ready_base_learner(run, config, load_config(arguments.config, "PSPNet"), place, context, arguments.quiet)
        run(config, place, context, arguments.quiet)
    finally:
        distributed.stop()


def ready_base_learner(run: Callable, config: Config, recipe: Config, place: Experiment, context: Context, quiet: bool) -> None:
    """The demo's base learner takes minutes, so it is trained (to its end) on the way; a real one is a run of its own."""
    own = place.of("PSPNet")
    if config.Train.data_set == "demo" and config.Method.pre_weight == "auto":
        if not checkpoint.finished(own.snapshot):
            recipe.Data, recipe.Method, recipe.Runtime = config.Data, config.Method, config.Runtime
            recipe.Train.workers, recipe.Train.selection = config.Train.workers, config.Train.selection
            run(recipe, own, context, quiet)
    elif not base_learner_file(config, place).is_file():
        raise UserError(missing_base_learner(config, place))


def dry_run(config: Config, place: Experiment, context: Context, quiet: bool) -> None:
    """Says what a run would do and take, whether its base learner is there yet or not; writes nothing."""
    ready = not needs_base_learner(place.arch) or base_learner_file(config, place).is_file()
    with RunLog(place.folder, main=False) as log:
        found = plan.measure(build(config, place, context, log, weights=ready))
        if context.main:
            print(found)


@dataclass
class Run:
    """Everything a training run holds."""

    system: System
    source: Source
    data: Dataset
    optimizer: torch.optim.Optimizer
    progress: Progress
    config: Config
    place: Experiment
    context: Context
    log: RunLog
    meta: dict[str, Any]  # what the checkpoints are for
    validation: Dataset | None  # what chooses the checkpoint; None: the last epoch is it

    @property
    def per_epoch(self) -> int:
        """Iterations of an epoch."""
        return len(self.data) // self.config.Train.batch_size


def train(config: Config, place: Experiment, context: Context, quiet: bool) -> None:
    """One run, from its start, or from wherever an earlier run of the same command stopped, to its end."""
    tracker = config.Runtime.tracker if context.main else ""
    with (
        tracking(tracker, f"{place.arch} {place.command} {place.net}", place.folder, dataclasses.asdict(config)) as tracked,
        RunLog(place.folder, quiet=quiet, main=context.main, tracked=tracked) as log,
    ):
        run = start(config, place, context, log)
        with Termination(context) as termination:
            for epoch in range(config.Train.epochs):
                for end in parts(run.per_epoch, config.Train.SubEpoch_val):
                    if epoch * run.per_epoch + end > run.progress.closed:
                        iterate(run, epoch, end, termination)
                        close_part(run, epoch, end)
        if run.validation is not None:
            best = run.progress
            log.info(f"best mIoU {100 * best.best:.2f} after {best.best_epoch:.3g} epochs  {run.system.mark}".rstrip())
        log.info(f"weights: {place.best}")
        context.barrier()


def close_part(run: Run, epoch: int, end: int) -> None:
    """What follows the last iteration of (half) an epoch: validation, best and last weights, a resume point."""
    progress = run.progress
    if run.validation is not None:
        save_point(run)  # a validation may take longer than a cluster waits
        score = validate(run)
        if score > progress.best:
            progress.best, progress.best_epoch = score, epoch + end / run.per_epoch
            save_best(run)
    if end == run.per_epoch:
        if run.validation is None:
            save_best(run)
        if run.context.main:
            checkpoint.save_weights(run.place.last, run.system.trained_state(), run.meta | {"selection": "last"})
    progress.closed = progress.step
    save_point(run)


def save_point(run: Run) -> None:
    """Everything that is needed to go on from here, bit for bit."""
    if run.context.main:
        rng, state = checkpoint.rng_state(run.context.device), run.system.trained_state()
        checkpoint.save_resume(run.place.snapshot, state, run.meta, run.optimizer, rng, run.progress)


def build(config: Config, place: Experiment, context: Context, log: RunLog, weights: bool = True) -> Run:
    """Model, data and optimizer at the start of a run; without `weights` the frozen parts mean nothing, and cost the same."""
    torch.manual_seed(config.Train.manual_seed)
    system, source = open_system(place.arch, config)
    if weights:
        load_backbone(system, config, place)
    for warning in system.warnings:
        log.warning(warning)
    system.to(context.device)
    meta = identity(place.arch, config, system.prior_names) | {"frozen": system.frozen_hashes()}
    meta["vocabulary"] = config.CLIP.vocabulary
    meta["config"] = dataclasses.asdict(config)
    validation = source.validation() if config.Train.evaluate and config.Train.selection != "last" else None
    meta["selection"] = config.Train.selection if validation is not None else "last"
    if validation is not None:
        system.remember(open_cache(config.Runtime.cache_gb, config.Runtime.cache_dir), fixed_head=False)
    run = Run(
        system, source, source.training(), system.optimizer(config.Train), Progress(config=dataclasses.asdict(config)),
        config, place, context, log, meta, validation,
    )  # fmt: skip
    if source.task == "images":
        if config.Train.batch_size // context.world < 2:
            raise UserError(f"Train.batch_size = {config.Train.batch_size}: BatchNorm needs at least 2 images in each process")
        if context.world > 1 and context.device.type == "cpu":
            log.warning("on the CPU each process normalises its own part of the batch: not the base learner of one process")
    if run.per_epoch == 0:
        raise UserError(f"Train.batch_size = {config.Train.batch_size}: an epoch has only {len(run.data)} samples")
    run.progress.total = run.per_epoch * config.Train.epochs
    return run


def start(config: Config, place: Experiment, context: Context, log: RunLog) -> Run:
    """A run where an earlier one of the same command stopped, or at its start."""
    run = build(config, place, context, log)
    system, source = run.system, run.source
    torch.manual_seed(config.Train.manual_seed)  # the same in all processes, see model.ops.Dropout
    if config.Train.resume == "auto":
        resume(run)
    elif context.main:
        shutil.rmtree(place.snapshot / "resume", ignore_errors=True)
    if context.world > 1:
        facts = {"position": f"{run.progress.step}, {run.progress.closed}", "weights": content_hash(system.trained)}
        context.agree(fingerprint(config, source.records("train_list")) | system.frozen_hashes() | facts)
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
    checkpoint.check_identity(file, checkpoint.read_meta(file), run.meta)
    checkpoint.check_frozen(file, checkpoint.read_meta(file), run.system.frozen_hashes())
    run.system.load_trained(weights, str(file))
    run.optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_rng_state(state["rng"], run.context.device)
    run.progress = Progress(**state["progress"])
    epochs, rest = divmod(run.progress.step, run.per_epoch)
    more = f" and {rest} iterations" if rest else ""
    end = ", nothing is left to train" if run.progress.finished else ""
    run.log.info(f"{epochs} of {run.config.Train.epochs} epochs{more} are done{end}")


def differences(old: dict, new: dict) -> list[str]:
    """Keys in which two configs differ, but for how fast a run goes and what is tested later."""
    free = {"Train.workers", "Train.print_freq", "Train.resume", "Runtime.threads", "Runtime.output",
            "Runtime.cache_gb", "Runtime.cache_dir", "Runtime.processes", "Runtime.tracker", "Train.save_minutes"}
    return [f"{section}.{key} was {old.get(section, {}).get(key)!r}, is {value!r}"
            for section, values in new.items() if section != "Test_Finetune"
            for key, value in values.items() if f"{section}.{key}" not in free and old.get(section, {}).get(key) != value]


def parts(per_epoch: int, halves: bool) -> list[int]:
    """Iterations of an epoch after which it is validated."""
    half = per_epoch // 2
    return [half, per_epoch] if halves and half else [per_epoch]


def iterate(run: Run, epoch: int, end: int, termination: Termination) -> None:
    """Iterations of an epoch from where the run stands to `end`."""
    train, context, progress = run.config.Train, run.context, run.progress
    run.system.train()
    begin, saved = progress.step - epoch * run.per_epoch, time.monotonic()
    first, last = ((epoch * run.per_epoch + i) * train.batch_size for i in (begin, end))
    sampler = RangeSampler(first, last, train.batch_size, context, drop_last=True)
    on_error = run.config.Data.on_error
    batches = Loader(run.data, sampler, train.workers, context.device, run.log.warning, on_error=on_error, training=True)
    with run.log.progress(run.per_epoch, f"epoch {epoch + 1}/{train.epochs}", begin) as bar:
        for batch in batches:
            poly(run.optimizer, progress.step, progress.total, train.power)
            batch = batch.to(context.device, non_blocking=True)
            with torch.autocast(context.device.type, torch.bfloat16, enabled=run.config.Runtime.precision == "bf16"):
                losses = run.system.losses(batch)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise UserError(poisoned(run, batch, losses))
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            progress.step += 1

            rate = run.optimizer.param_groups[0]["lr"]
            losses = {name: value.detach() for name, value in losses.items()}
            bar.step(train.batch_size, losses, rate)
            stopping, due = termination.asked(), time.monotonic() - saved > 60 * train.save_minutes
            if progress.step % train.print_freq == 0:
                run.log.scalars(losses | {"rate": rate}, progress.step, "train")
            if stopping or due:
                save_point(run)
                saved = time.monotonic()
            if stopping:
                raise termination.ended(progress.step)


def poisoned(run: Run, batch: Batch, losses: dict[str, torch.Tensor]) -> str:
    """Keeps the batch and the weights that gave a loss which is no number, and says so."""
    file = run.place.folder / f"bad_batch{run.context.rank}.safetensors"
    shown = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
    weights = {f"weights.{name}": value for name, value in run.system.trained_state().items()}
    checkpoint.save_weights(file, batch.tensors() | weights, {"step": run.progress.step, "losses": shown})
    return (f"the loss is not finite at iteration {run.progress.step + 1} ({shown}); lower Train.base_lr, or use "
            f"Runtime.precision=fp32. The last resume point is valid; batch and weights of this step are in {file}")


def validate(run: Run) -> float:
    """mIoU on the validation data; the first three episodes go to TensorBoard as pictures."""
    system, source, train, context = run.system.eval(), run.source, run.config.Train, run.context
    data, common = run.validation, evaluate.settings(run.config)
    started = time.monotonic()
    if source.task == "images":
        scores = evaluate.evaluate_images(system.predict, data, source.fold, context, run.log, **common)
    else:
        scores, _ = evaluate.evaluate_episodes(
            system.predict, data, train.val_episodes, source.fold, context, run.log, label="validation", **common
        )
        if context.main:
            cards = evaluate.gallery(system.predict, data, {"": range(3)}, source.names.names, context.device, train.resized_val)
            sheet = contact_sheet([card.panels for card in cards], [f"{card.title} {system.mark}" for card in cards])
            run.log.image("episodes", sheet, run.progress.step)
    shown = {key: value for key, value in scores.items() if key.endswith("iou")}
    run.log.scalars(shown, run.progress.step, "validation")
    text = "  ".join(f"{key} {100 * value:.2f}" for key, value in shown.items())
    run.log.info(f"{text}  ({scores['episodes']} {source.task}, {time.monotonic() - started:.0f} s)  {system.mark}".rstrip())
    return scores["miou"]


def save_best(run: Run) -> None:
    if run.context.main:
        best = {"epoch": run.progress.best_epoch, "score": run.progress.best} if run.validation is not None else {}
        checkpoint.save_weights(run.place.best, run.system.trained_state(), run.meta | best)


if __name__ == "__main__":
    cli.run(main)
