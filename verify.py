"""Does a result still hold? `python -m util.report verify RESULT.json [--gpus 0]`, or `python verify.py RESULT.json`.

Runs the episodes that the result keeps fingerprints of again, with its config, weights and data, and says where the first
difference arises: data, features, prior, matcher or metric. Exit code 1 when there is one.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from model import content_hash, load_weights, open_system
from model.few_shot.system import FewShot
from model.trace import first_difference, trace_all
from util import cli, distributed, experiment
from util.cache import TensorCache
from util.config import Config, config_of
from util.errors import UserError
from util.experiment import Experiment


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
    now = experiment.environment(context.device) | experiment.fingerprint(config, source.records("val_list"))
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


if __name__ == "__main__":
    cli.run(main)
