"""Does a result still hold? `python -m model.verify RESULT.json [--gpus 0]`

A result has fingerprints of a few episodes at every stage, from the files to the counted pixels. This command runs the same
episodes again, with the result's config, weights and data, and names the first stage that differs: data, features, prior,
matcher or metric. Exit code 1 when one does.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.build import open_tested, system_class
from model.system import System, content_hash
from util import cli
from util.cache import TensorCache
from util.config import Config, config_of
from util.data.episodes import Batch, content_key
from util.errors import BrokenFile, UserError
from util.run import distributed
from util.run.identity import environment, fingerprint
from util.run.place import Experiment
from util.score.metrics import confusion, intersection_union

EXACT = ("data", "metric")  # stages that must be the same to the bit; others may be rounded differently
TOLERANCE = 1e-3  # relative: other hardware rounds differently, and a deep network amplifies it

Trace = dict[str, dict[str, list]]  # stage -> name -> [hash, size of the values], or the pixel counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1))
    given = parser.parse_args()
    result = read(given.result)
    config = config_of(result["config"], str(given.result), options=system_class(result["system"]).Options)
    context = distributed.start(given.gpus, replace(config.Runtime, processes=1))
    wrong = verify(result, config, context)
    if wrong:
        raise SystemExit(1)


def read(path: Path) -> dict:
    """Read a report.json with traces."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable report.json ({error})") from error
    if not isinstance(result, dict) or not result.get("traces") or "config" not in result:
        raise UserError(f"{path} has no traces (few-shot results of this version of test.py have); test again")
    return result


def verify(result: dict, config: Config, context: distributed.Context) -> bool:
    """Print the differences; return whether any is beyond rounding."""
    place = Experiment(result["system"], result["data_set"], *result["place"], Path(config.Runtime.output))
    system, task = open_tested(place.arch, config, place, Path(result["checkpoint"]))
    system.to(context.device).eval()
    system.remember(TensorCache(0), fixed_head=True)  # as in testing

    stored = result["environment"]
    now = environment(context.device) | fingerprint(config, task.records("val_list"))
    now |= system.frozen_hashes() | {"weights": content_hash(system.trained)}
    for key in sorted(stored.keys() & now.keys()):
        if stored[key] != now[key]:
            print(f"{key} was {stored[key]}, is {now[key]}")
    tests, wrong = task.tests(), False
    for seed, traces in result["traces"].items():
        found = trace_all(system, tests[int(seed)].data, len(traces), context)
        for number, (a, b) in enumerate(zip(traces, found, strict=True)):
            difference, identical = first_difference(a, b)
            wrong |= difference is not None
            same = "the same, bit for bit" if identical else "the same up to rounding"
            print(f"seed {seed}, {task.unit[:-1]} {number}: {f'first difference in {difference}' if difference else same}")
    return wrong


@torch.no_grad()
def trace_all(system: System, data: Dataset, count: int, context: distributed.Context) -> list[Trace]:
    """Trace samples 0..count-1, on the device of the system and in the precision of its evaluation; {} for one that cannot be
    read."""
    found: list[Trace] = []
    for i in range(count):
        try:
            sample = data[i].to(context.device)
        except BrokenFile:  # an evaluation that came this far left it out (Data.on_error=skip)
            found.append({})
            continue
        with context.autocast():
            found.append(trace(system, sample))
    return found


def trace(system: System, sample: Batch) -> Trace:
    """Fingerprint a batch of one, at every stage of the system and of the scored labels."""
    found = {stage: {name: stamp(tensor) for name, tensor in tensors.items()} for stage, tensors in system.stages(sample).items()}
    prediction, truth = system.predict(sample), sample.truth(0)
    counts = intersection_union(confusion(prediction.decide(0, sample.placed[0]), truth, prediction.final.shape[1]))
    return found | {"metric": {"pixels": counts.flip(0).flatten().tolist()}}  # foreground first


def stamp(tensor: Tensor) -> list:
    """Return [hash of the content, root of the mean square]."""
    values = tensor.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    return [content_key(values.numpy())[:12], float(values.double().square().mean().sqrt())]


def first_difference(stored: Trace, now: Trace) -> tuple[str | None, bool]:
    """Return (stage, name and values of the first difference beyond rounding, or None; whether every bit is the same).

    Data must be the same to the bit, and pixel counts too unless an earlier stage has been rounded differently.
    """
    identical = True
    for stage in now:  # in the order in which a difference travels
        before = stored.get(stage, {})
        for name in sorted(before.keys() | now[stage].keys()):
            a, b = before.get(name), now[stage].get(name)
            if a == b:
                continue
            if a is None or b is None:
                return f"{stage}: {name} is {'new' if a is None else 'missing'}", False
            if stage in EXACT and (stage == "data" or identical or len(a) != len(b)):
                return f"{stage}: {name} was {a}, is {b}", False
            if stage == "metric":
                off = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(*a, 1)
            else:
                off = abs(a[1] - b[1]) / max(abs(a[1]), 1e-12)
            if not off < TOLERANCE:
                return f"{stage}: {name} was {a}, is {b}, {off:.1e} apart", False
            identical = False
    return None, identical


if __name__ == "__main__":
    cli.run(main)
