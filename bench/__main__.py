"""`python -m bench [ARCH ...]`: seconds per training sample and per evaluated episode at PASCAL's sizes, part by part.

ResNet-50, ViT-B/16, side 473; random weights, since time does not depend on them, and made-up images (a 500 x 375 query, an
object of a sixth of the area) or real ones. `plain` is bench/oracle.py: image by image, everything computed. Prints markdown
for bench/RESULTS.md.

    python -m bench                         PI_CLIP and HDMNet, 1-shot and 5-shot, fp32
    python -m bench --images ../shared/data/voc2012_mini
    python -m bench PI_CLIP --precision bf16 --shots 1 --device cuda --batch 8
"""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.oracle import plain_scores
from bench.world import HEIGHT, SIDE, WIDTH, episodes, real_episodes
from model import build_system
from model.few_shot.hdmnet import HDMNet
from model.few_shot.system import FewShot
from util.cache import TensorCache
from util.config import Config
from util.data.episodes import Episode
from util.data.folds import fold, read_class_names
from util.run.distributed import Context


class Bench:
    """One system at one number of shots."""

    def __init__(self, arch: str, shot: int, device: torch.device, precision: str, batch: int, repeats: int, images: str | None):
        config = Config()
        config.CLIP.clip_path, config.Train.shot = "random", shot
        torch.manual_seed(0)
        names = read_class_names("lists/pascal/classes.txt")
        self.system: FewShot = build_system(arch, config, fold("pascal", 0), names).to(device)
        self.optimizer = self.system.optimizer(config.Train)
        self.shot, self.device, self.precision, self.batch, self.repeats = shot, device, precision, batch, repeats
        self.images = images

    def episodes(self, batch: int) -> Episode:
        made = real_episodes(Path(self.images), batch, self.shot) if self.images else episodes(batch, self.shot)
        return made.to(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median wall time of a call under the autocast, after one to warm up."""
        times = []
        with Context(self.device, precision=self.precision).autocast():
            for _ in range(1 + self.repeats):
                start = time.perf_counter()
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def training(self) -> list[tuple[str, float]]:
        """(part, seconds per sample); the first row is the whole step."""
        system, batch = self.system.train(), self.episodes(self.batch)

        def step() -> None:
            loss = sum(system.losses(batch).values())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

        rows = [("**training step**", self.seconds(step)), *self.parts(batch)]
        return [(name, value / self.batch) for name, value in rows]

    def parts(self, batch) -> list[tuple[str, float]]:
        """The frozen parts of a step, measured alone."""
        with torch.no_grad():
            rows = [("frozen ResNet", self.seconds(lambda: self.system.features(batch)))]
            features = self.system.features(batch)
            rows += [(f"prior {p.name}", self.seconds(lambda p=p: p(batch, features))) for p in self.system.priors]
        return rows

    def evaluation(self) -> list[tuple[str, float]]:
        """(case, seconds per episode)."""
        system, episode = self.system.eval(), self.episodes(1)
        episode.query_key, episode.support_key = ["query"], [[f"support {k}" for k in range(self.shot)]]

        system.remember(TensorCache(0), fixed_head=True)
        rows = [("**evaluation, nothing cached**", self.seconds(lambda: system.predict(episode)))]
        system.remember(TensorCache(2**34), fixed_head=True)
        system.predict(episode)
        entry = system.memo.cache.size / (1 + self.shot) / 2**20
        rows.append((f"**evaluation, all cached** ({entry:.1f} MB an image)", self.seconds(lambda: system.predict(episode))))
        if isinstance(system, HDMNet) and self.device.type == "cpu":
            with torch.no_grad():
                rows.append(("evaluation, plain", self.seconds(lambda: plain_scores(system, episode, 0))))
        return rows

    def flops(self) -> float:
        """Floating-point operations of an uncached episode."""
        system, episode = self.system.eval(), self.episodes(1)
        system.remember(TensorCache(0), fixed_head=False)
        with FlopCounterMode(display=False) as counter:
            system.predict(episode)
        return counter.get_total_flops()


def matrix_product(device: torch.device, dtype: torch.dtype, n: int = 3072) -> float:
    """FLOP/s of an n x n matrix product: what the machine can do."""
    a, times = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", default=["PI_CLIP", "HDMNet"])
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=2, help="of the training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", metavar="DIR", help="real images: a VOC folder with those of lists/pascal_mini")
    given = parser.parse_args()
    device = torch.device(given.device)
    cuda = device.type == "cuda"
    able = matrix_product(device, torch.bfloat16 if given.precision == "bf16" else torch.float32)
    cores = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    hardware = torch.cuda.get_device_name(device) if cuda else cores
    seen = given.images or f"query {WIDTH} x {HEIGHT}"
    print(f"## {date.today()}, {hardware}, torch {torch.__version__}, {given.precision}\n")
    print(f"Side {SIDE}, {seen}, batch {given.batch} in "
          f"training. A matrix product reaches {able / 1e9:,.0f} GFLOP/s.\n")
    print("| system | shots | what | s | GFLOP/s |\n|---|---|---|---|---|")
    for arch in given.archs:
        for shot in given.shots:
            bench = Bench(arch, shot, device, given.precision, given.batch, given.repeats, given.images)
            evaluation, flops = bench.evaluation(), bench.flops()
            for i, (name, value) in enumerate([*evaluation, *bench.training()]):
                rate = f"{flops / value / 1e9:,.0f}" if i == 0 else ""
                print(f"| {arch} | {shot} | {name} | {value:.3f} | {rate} |", flush=True)
            peak = torch.cuda.max_memory_allocated(device) if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"| {arch} | {shot} | peak memory so far | {peak / 2**30:.1f} GB | |", flush=True)


if __name__ == "__main__":
    main()
