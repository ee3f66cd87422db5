"""Does a result still hold? `python -m model.verify RESULT.json [--gpus 0]`

A result keeps fingerprints of a few episodes at every stage, from the files to the counted pixels. This command runs the same
episodes again, with the result's config, weights and data, and names the first stage that differs: data, features, prior,
matcher or metric. Exit code 1 when one does.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.build import load_weights, open_system
from model.few_shot.system import FewShot
from model.ops import resize
from model.system import content_hash
from util import cli
from util.cache import TensorCache
from util.config import Config, config_of
from util.data.episodes import Episode, content_key
from util.errors import UserError
from util.run import distributed
from util.run.identity import environment, fingerprint
from util.run.place import Experiment
from util.score.metrics import FewShotMeter, to_original

STAGES = ("data", "features", "prior", "matcher", "metric")  # in the order in which a difference travels
TOLERANCE = 1e-3  # relative: other hardware rounds otherwise, and a deep network amplifies that

Trace = dict[str, dict[str, list]]  # stage -> name -> [hash, size of the values], or the pixel counts



def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1))
    given = parser.parse_args()
    result = read(given.result)
    config = config_of(result["config"], str(given.result))
    context = distributed.start(given.gpus, replace(config.Runtime, processes=1))
    wrong = verify(result, config, context)
    if wrong:
        raise SystemExit(1)


def read(path: Path) -> dict:
    """A report.json with traces."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable report.json ({error})") from error
    if not isinstance(result, dict) or not result.get("traces") or "config" not in result:
        raise UserError(f"{path} has no traces (few-shot results of this version of test.py have); test again")
    return result


def verify(result: dict, config: Config, context: distributed.Context) -> bool:
    """Prints what differs; whether anything beyond rounding does."""
    place = Experiment(result["system"], result["data_set"], *result["place"], Path(config.Runtime.output))
    system, source = open_system(place.arch, config)
    assert isinstance(system, FewShot)
    load_weights(system, config, place, Path(result["checkpoint"]))
    system.to(context.device).eval()
    system.remember(TensorCache(0), fixed_head=True)  # as in testing

    stored = result["environment"]
    now = environment(context.device) | fingerprint(config, source.records("val_list"))
    now |= system.frozen_hashes() | {"weights": content_hash(system.trained)}
    for key in sorted(stored.keys() & now.keys()):
        if stored[key] != now[key]:
            print(f"{key} was {stored[key]}, is {now[key]}")
    lists, wrong = source.test_episodes(), False
    for seed, traces in result["traces"].items():
        found = trace_all(system, source.episodes(lists[int(seed)]), len(traces), config)
        for number, (a, b) in enumerate(zip(traces, found, strict=True)):
            difference, identical = first_difference(a, b)
            wrong |= difference is not None
            same = "the same, bit for bit" if identical else "the same up to rounding"
            print(f"seed {seed}, episode {number}: {f'first difference in {difference}' if difference else same}")
    return wrong


def trace(system: FewShot, episode: Episode, squash: bool) -> Trace:
    """Fingerprints of one episode (B = 1) of an evaluation; squash: see `util.score.metrics.to_original`."""
    features, priors, decoded = system.stages(episode)
    views = {f"{role} {name}": value for role, view in (("query", features.query), ("support", features.support))
             for name, value in vars(view).items() if value is not None}  # fmt: skip
    matcher = {"final": decoded.final} | ({} if decoded.meta is None else {"meta": decoded.meta})
    stages = {"data": episode.tensors(), "features": views, "prior": priors, "matcher": matcher}
    found = {stage: {name: stamp(tensor) for name, tensor in tensors.items()} for stage, tensors in stages.items()}
    truth, cls = episode.original_mask[0], int(episode.cls)
    scores = resize(decoded.final.float(), episode.query.shape[2:])[0]
    prediction = to_original(scores, tuple(truth.shape), squash).argmax(0)
    return found | {"metric": {"pixels": list(FewShotMeter([cls]).update(prediction, truth, cls))}}


def stamp(tensor: Tensor) -> list:
    """[hash of the content, root of the mean square]."""
    values = tensor.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    return [content_key(values.numpy())[:12], float(values.double().square().mean().sqrt())]


def first_difference(stored: Trace, now: Trace) -> tuple[str | None, bool]:
    """(stage, name and values of the first difference beyond rounding, or None; whether every bit is the same).

    Data and pixel counts must be the same to the bit; a pixel count may differ where the stages before only rounded otherwise.
    """
    identical = True
    for stage in STAGES:
        for name in sorted(stored[stage].keys() | now[stage].keys()):
            a, b = stored[stage].get(name), now[stage].get(name)
            if a == b:
                continue
            if a is None or b is None:
                return f"{stage}: {name} is {'new' if a is None else 'missing'}", False
            if stage in ("data", "metric") and (stage == "data" or identical):
                return f"{stage}: {name} was {a}, is {b}", False
            if stage == "metric":
                off = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(*a, 1)
            else:
                off = abs(a[1] - b[1]) / max(abs(a[1]), 1e-12)
            if not off < TOLERANCE:
                return f"{stage}: {name} was {a}, is {b}, {off:.1e} apart", False
            identical = False
    return None, identical


@torch.no_grad()
def trace_all(system: FewShot, data: torch.utils.data.Dataset, count: int, config: Config) -> list[Trace]:
    """Traces of episodes 0..count-1, on the device of the system and in the precision of its evaluation."""
    device = system.encoder.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.Runtime.precision == "bf16"):
        return [trace(system, data[i].to(device), config.Train.resized_val) for i in range(count)]


if __name__ == "__main__":
    cli.run(main)
