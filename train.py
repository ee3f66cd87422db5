"""Train a system: `sh train.sh split0 pascal 2`, or

    python train.py --config config/demo/demo_split0_resnet50.yaml --arch PI_CLIP --gpus 0 [Section.key=value ...]

Output goes to exp/DATASET/ARCH/EXP/NET/: config.yaml, train.log, events/ (TensorBoard), snapshot/. Running the same
command again continues after the last finished epoch.
"""

import dataclasses
import time

import torch

from demo import prepare_data
from model import System, initialise_backbone, load_base_learner, open_system, system_class
from util import cli, distributed, evaluate, experiment
from util.checkpoint import (
    Progress,
    check_frozen,
    load_resume,
    read_meta,
    rng_state,
    save_resume,
    save_weights,
    set_rng_state,
)
from util.config import Config, load_config
from util.data.build import Source
from util.distributed import Context, RangeSampler
from util.errors import UserError
from util.experiment import Experiment
from util.files import atomic
from util.log import RunLog
from util.optim import poly
from util.viz import contact_sheet


def main() -> None:
    arguments = cli.parse(__doc__)
    config = load_config(arguments.config, arguments.arch, arguments.overrides)
    place = Experiment.from_config_path(arguments.arch, arguments.config, config.Runtime.output)
    system_class(arguments.arch)
    context = distributed.start(arguments.gpus, config.Runtime.threads)
    try:
        prepare_data(config, context)
        if system_class(arguments.arch).task == "episodes" and not experiment.base_learner_file(config, place).is_file():
            if config.Train.data_set != "demo" or config.Method.pre_weight != "auto":
                raise UserError(experiment.missing_base_learner(config, place))
            train(load_config(arguments.config, "PSPNet", arguments.overrides), place.of("PSPNet"), context)
        train(config, place, context)
    finally:
        distributed.stop()


def train(config: Config, place: Experiment, context: Context) -> None:
    """One run from its first (or last finished) epoch to its end."""
    with RunLog(place.folder, main=context.main) as log:
        # 1. data and model
        torch.manual_seed(config.Train.manual_seed)
        system, source = open_system(place.arch, config)
        for warning in system.warnings:
            log.warning(warning)
        if source.task == "images":
            initialise_backbone(system, config.Method.backbone_weight)
        else:
            load_base_learner(system, config, place)
        data = source.training()
        system.to(context.device)
        optimizer = system.optimizer(config.Train)
        meta = experiment.identity(place.arch, config, system.prior_names) | {"frozen": system.frozen_hashes()}

        # 2. where it stopped, if it did
        torch.manual_seed(config.Train.manual_seed + context.rank)  # dropout differs between ranks
        progress = resume(config, place, system, optimizer, context, log)
        if context.world > 1:
            system.distribute(context.device)
        if context.main:
            with atomic(place.folder / "config.yaml") as file:
                file.write_text(config.to_yaml())
        per_epoch = len(data) // config.Train.batch_size
        if per_epoch == 0:
            raise UserError(f"Train.batch_size = {config.Train.batch_size}: an epoch has only {len(data)} samples")
        total = per_epoch * config.Train.epochs
        parameters = sum(p.numel() for p in system.trained.parameters())
        log.info(f"{place.arch} on {place.data_set} {place.exp}: {len(data)} samples an epoch, {total} iterations, "
                 f"{parameters / 1e6:.2f} M trained parameters, {context.world} process(es) on {context.device}")

        # 3. epochs
        for epoch in range(progress.epoch, config.Train.epochs):
            halves = (per_epoch // 2, per_epoch) if config.Train.SubEpoch_val and per_epoch > 1 else (per_epoch,)
            begin = 0
            for end in halves:
                first = (epoch * per_epoch + begin) * config.Train.batch_size
                last = (epoch * per_epoch + end) * config.Train.batch_size
                sampler = RangeSampler(first, last, config.Train.batch_size, context, drop_last=True)
                run_iterations(system, optimizer, data, sampler, config, context, log, progress, epoch, per_epoch, total)
                begin = end
                if config.Train.evaluate:
                    score = validate(system, source, config, context, log, progress.step)
                    if score > progress.best:
                        progress.best, progress.best_epoch = score, epoch + end / per_epoch
                        if context.main:
                            save_weights(place.best, system.trained_state(), meta | {"epoch": progress.best_epoch, "score": score})
            progress.epoch = epoch + 1
            rng = context.gather([rng_state(context.device)])
            if context.main:
                last_meta = meta | {"epoch": progress.epoch}
                if not config.Train.evaluate:
                    save_weights(place.best, system.trained_state(), last_meta)
                save_resume(place.snapshot, system.trained_state(), last_meta, optimizer, rng, progress)
        if config.Train.evaluate:
            log.info(f"best mIoU {100 * progress.best:.2f} at epoch {progress.best_epoch:.3g} {system.mark}".rstrip())
        log.info(f"weights: {place.best}")
        context.barrier()


def run_iterations(system: System, optimizer: torch.optim.Optimizer, data, sampler: RangeSampler, config: Config,
                   context: Context, log: RunLog, progress: Progress, epoch: int, per_epoch: int, total: int) -> None:  # fmt: skip
    """One pass over the sampler."""
    system.train()
    bf16 = config.Runtime.precision == "bf16"
    with log.progress(per_epoch, f"epoch {epoch + 1}/{config.Train.epochs}", start=progress.step - epoch * per_epoch) as bar:
        for batch in evaluate.loader(data, sampler, config.Train.workers, context.device):
            poly(optimizer, progress.step, total, config.Train.power)
            batch = batch.to(context.device, non_blocking=True)
            with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
                losses = system.losses(batch)
            loss = sum(losses.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.step += 1
            losses = {name: value.detach() for name, value in losses.items()}
            bar.step(config.Train.batch_size, losses, optimizer.param_groups[0]["lr"])
            if progress.step % config.Train.print_freq == 0:
                if not torch.isfinite(loss):
                    raise UserError(f"the loss is {loss.item()} at iteration {progress.step}; lower Train.base_lr or use "
                                    "Runtime.precision=fp32. The checkpoints of the last finished epoch are valid")
                log.scalars(losses, progress.step, "loss")
                log.scalars({"lr": optimizer.param_groups[0]["lr"]}, progress.step, "train")


def validate(system: System, source: Source, config: Config, context: Context, log: RunLog, step: int) -> float:
    """mIoU on the validation data; three episodes go to TensorBoard as pictures."""
    system.eval()
    train, data = config.Train, source.validation(config.Train.manual_seed)
    common = {"batch": train.batch_size_val, "workers": train.workers, "squash": train.resized_val}
    started = time.monotonic()
    if source.task == "images":
        scores = evaluate.evaluate_images(system.predict, data, source.fold, context, log, **common)
    else:
        scores, _ = evaluate.evaluate_episodes(system.predict, data, train.val_episodes, source.fold, context, log,
                                               label="validation", **common)  # fmt: skip
        if context.main:
            cards = evaluate.gallery(system.predict, data, {"": range(3)}, source.names.names, context.device, train.resized_val)
            log.image("episodes", contact_sheet([card.panels for card in cards], [card.title for card in cards]), step)
    shown = {key: value for key, value in scores.items() if key.endswith("miou") or key.endswith("iou")}
    log.scalars(shown, step, "val")
    log.info("  ".join(f"{key} {100 * value:.2f}" for key, value in shown.items())
             + f"  ({scores['episodes']} {source.task}, {time.monotonic() - started:.0f} s) {system.mark}".rstrip())
    return scores["miou"]


def resume(config: Config, place: Experiment, system: System, optimizer: torch.optim.Optimizer, context: Context,
           log: RunLog) -> Progress:  # fmt: skip
    """State of an earlier run of the same command; a fresh Progress when there is none (`Train.resume=none`: always)."""
    found = load_resume(place.snapshot) if config.Train.resume == "auto" else None
    fresh = Progress(config=dataclasses.asdict(config))
    if found is None:
        return fresh
    weights, state = found
    progress = Progress(**state["progress"])
    changed = differences(progress.config, fresh.config)
    if changed:
        raise UserError(f"{place.snapshot} holds a run with another config ({'; '.join(changed)}). Go on with Train.resume=none "
                        "to overwrite it, or with Runtime.output=FOLDER to keep both")
    if len(state["rng"]) != context.world:
        raise UserError(f"{place.snapshot} was written by {len(state['rng'])} process(es), this run has {context.world}; "
                        "use the same number of GPUs, or Train.resume=none to start over")
    check_frozen(place.snapshot / "last.safetensors", read_meta(place.snapshot / "last.safetensors"), system.frozen_hashes())
    system.load_trained(weights, str(place.snapshot / "last.safetensors"))
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"][context.rank], context.device)
    done = progress.epoch >= config.Train.epochs
    log.info(f"continuing after epoch {progress.epoch} of {config.Train.epochs}" + (": training is complete" if done else ""))
    return progress


def differences(old: dict, new: dict) -> list[str]:
    """Keys in which two configs differ; how fast a run goes and what is tested later does not matter."""
    free = {"Train.workers", "Train.print_freq", "Train.resume", "Runtime.threads", "Runtime.output"}
    return [f"{section}.{key} was {old.get(section, {}).get(key)!r}, is {value!r}"
            for section, values in new.items() if section != "Test_Finetune"
            for key, value in values.items() if f"{section}.{key}" not in free and old.get(section, {}).get(key) != value]


if __name__ == "__main__":
    cli.run(main)
