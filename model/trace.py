"""Fingerprints of an episode at every stage, from the files to the counted pixels: what a result stores of a few episodes, so
that `python -m util.report verify` can say years later where a first difference arises."""

import torch
from torch import Tensor

from model.few_shot.system import FewShot
from model.ops import resize
from util.config import Config
from util.data.episodes import Episode, content_key
from util.metrics import FewShotMeter, to_original

STAGES = ("data", "features", "prior", "matcher", "metric")  # in the order in which a difference travels
TOLERANCE = 1e-3  # relative: other hardware rounds otherwise, and a deep network amplifies that

Trace = dict[str, dict[str, list]]  # stage -> name -> [hash, size of the values], or the pixel counts


def trace(system: FewShot, episode: Episode, squash: bool) -> Trace:
    """Fingerprints of one episode (B = 1) of an evaluation; squash: see `util.metrics.to_original`."""
    features, priors, decoded = system.stages(episode)
    views = {f"{role} {name}": value for role, view in (("query", features.query), ("support", features.support))
             for name, value in vars(view).items() if value is not None}  # fmt: skip
    matcher = {"final": decoded.final} | ({} if decoded.meta is None else {"meta": decoded.meta})
    stages = {"data": episode.tensors(), "features": views, "prior": priors, "matcher": matcher}
    found = {stage: {name: fingerprint(tensor) for name, tensor in tensors.items()} for stage, tensors in stages.items()}
    truth, cls = episode.original_mask[0], int(episode.cls)
    scores = resize(decoded.final.float(), episode.query.shape[2:])[0]
    prediction = to_original(scores, tuple(truth.shape), squash).argmax(0)
    return found | {"metric": {"pixels": list(FewShotMeter([cls]).update(prediction, truth, cls))}}


def fingerprint(tensor: Tensor) -> list:
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
