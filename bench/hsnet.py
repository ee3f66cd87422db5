"""HSNet and IMR-HSNet against bench/oracle.py in the same minutes: seconds of processor time and peak memory, side 400.

    python -m bench.hsnet [--repeats 3] [--shots 1 5]

ResNet-50, random weights, one thread, fp32, the object of `bench.world.diamond`. Every measurement is a process of its own,
which runs its case once to warm up and once for the figure; fast and plain take turns, and the table shows medians. `cold` goes
through the backbone, `warm` finds its features in the cache. Activation maps of IMR-HSNet are given, half of them 0.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from datetime import date
from functools import partial

import torch

from bench.oracle import plain_hsnet, plain_imr_hsnet
from bench.world import GivenCam, diamond, episodes
from model.backbone import build_encoder
from model.few_shot.hsnet import HSNet
from model.few_shot.imr_hsnet import IMRHSNet
from model.system import Frozen
from util.cache import TensorCache
from util.config import Train

SIDE, BATCH = 400, 2
SYSTEMS = {"HSNet": (HSNet, plain_hsnet), "IMR_HSNet": (IMRHSNet, plain_imr_hsnet)}


def build(arch: str, shot: int, batch: int, plain: bool) -> HSNet:
    """The system, its head in the fast or in the plain form."""
    torch.manual_seed(0)
    cls, formula = SYSTEMS[arch]
    maps = (torch.rand(batch, 1 + shot, 50, 50) - 0.5).clamp(min=0).numpy()
    priors = [GivenCam(maps[:, 0], maps[:, 1:])] if cls is IMRHSNet else []
    system = cls(Frozen(build_encoder("resnet50", stem="plain", dilated=False)), priors, shot, cls.Options())
    if plain:
        system.head.forward = partial(formula, system.head)
    return system


def measure(arch: str, case: str, shot: int, plain: bool) -> tuple[float, float]:
    """(seconds of processor time of one episode or of a step of two, peak memory in GB)."""
    torch.set_num_threads(1)
    batch = BATCH if case == "step" else 1
    system, made = build(arch, shot, batch, plain), episodes(batch, shot, diamond(SIDE))
    if case == "step":
        system.train()
        optimizer = system.optimizer(Train())

        def run() -> None:
            loss = sum(system.losses(made).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    else:
        made.query_key, made.support_key = ["query"], [[f"support {k}" for k in range(shot)]]
        system.eval().remember(TensorCache(2**34 if case == "warm" else 0), fixed_head=True)
        run = partial(system.predict, made)
    run()
    start = time.process_time()
    run()
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(*case: object) -> tuple[float, float]:
    """In a process of its own, so that its memory is its own too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", default=list(SYSTEMS))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(f"## {date.today()}, 1 CPU thread ({platform.machine()}), torch {torch.__version__}, fp32, `python -m bench.hsnet`\n")
    print("| system | what | cpu-s plain | fast | ratio | GB plain | fast |\n|---|---|---|---|---|---|---|")
    for arch in given.archs:
        cases = [(case, shot) for shot in given.shots for case in ("cold", "warm")] + [("step", 1)]
        for case, shot in cases:
            pairs = [[alone(arch, case, shot, plain) for plain in (True, False)] for _ in range(given.repeats)]
            plain, fast = (list(map(statistics.median, zip(*side, strict=True))) for side in zip(*pairs, strict=True))
            name = f"training step, batch {BATCH}" if case == "step" else f"{shot}-shot, {case}"
            print(f"| {arch} | {name} | {plain[0]:.2f} | {fast[0]:.2f} | **{plain[0] / fast[0]:.2f}** "
                  f"| {plain[1]:.1f} | {fast[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
