"""`python -m bench.step [ARCH]`: seconds per training sample and per evaluated episode at PASCAL's sizes.

ResNet-50, ViT-B/16, side 473, 1-shot, a 500 x 375 query; random weights and images, since time does not depend on them.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from model import build_system
from util.config import Config
from util.data.episodes import Episode
from util.data.folds import fold, read_class_names

SIDE, HEIGHT, WIDTH = 473, 375, 500


def episodes(batch: int) -> Episode:
    """Random episodes with an object that covers a sixth of the image, as PASCAL's do on average."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> torch.Tensor:
        return (255 * torch.rand(shape, generator=generator)).round()

    mask = torch.zeros(batch, SIDE, SIDE, dtype=torch.uint8)
    mask[:, 100:293, 150:343] = 1
    present = torch.zeros(batch, 20, dtype=torch.bool)
    present[:, [6, 14]] = True
    return Episode(
        image(batch, 3, SIDE, SIDE), mask, image(batch, 1, 3, SIDE, SIDE), mask[:, None], mask, torch.full((batch,), 7),
        torch.ones(batch, dtype=torch.int64), present, [image(3, 384, 512).byte()] * batch,
        torch.tensor([[HEIGHT, WIDTH]] * batch), torch.arange(batch), [], [], [], [],
    )  # fmt: skip


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arch: str) -> None:
    config = Config()
    config.CLIP.clip_path = "random"
    system = build_system(arch, config, fold("pascal", 0), read_class_names("lists/pascal/classes.txt"))
    optimizer = system.optimizer(config.Train)
    batch = episodes(2)

    def step() -> None:
        loss = sum(system.losses(batch).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    single = episodes(1)
    system.train()
    print(f"{arch}, side {SIDE}, 1-shot, fp32, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"training, batch 2: {seconds(step) / 2:.2f} s per sample")
    system.eval()
    print(f"evaluation, batch 1: {seconds(lambda: system.predict(single)):.2f} s per episode")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "PI_CLIP")
