"""WeCLIP against bench/weak_oracle.py in the same minutes: seconds of processor time, one thread, fp32.

    python -m bench.weclip [--batch 4] [--repeats 3]

ViT-B/16 with random weights, VOC's 20 classes and 25 background texts, 1.5 labels an image. A training step has crops of 320
pixels and is measured in both phases (encoder, labels, losses, backward; no optimizer), a tested image has 500 x 375 pixels (two
scales with mirror images). Fast and plain take turns, the table shows medians. First it compares what they compute.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.weak_oracle import plain_losses, plain_predict
from model import build_system, configure
from model.weak.weclip import WeCLIP
from util.data.folds import Fold, read_class_names

SIDE, HEIGHT, WIDTH = 320, 375, 500
LABELS = ((7, 14), (2,), (11, 14), (19,))


def build() -> WeCLIP:
    torch.manual_seed(0)
    config = configure("config/voc/voc_weak_vitb16.yaml", "WeCLIP", ["CLIP.clip_path=random", "Method.dropout=0"])
    names = read_class_names("lists/pascal/classes.txt")
    system: WeCLIP = build_system("WeCLIP", config, Fold("voc", 0, (), tuple(range(1, 21))), names)
    for block in system.vision.visual.blocks:  # attention that is not uniform, as a trained one
        block.attn.in_proj_weight.mul_(3)
    return system


def pictures(batch: int, height: int, width: int) -> SimpleNamespace:
    """Coarse random images with labels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 3, 9, 12, generator=generator)
    image = 255 * F.interpolate(coarse, (height, width), mode="bilinear")
    present = torch.zeros(batch, 20, dtype=torch.bool)
    for i, row in enumerate(present):
        row[list(LABELS[i % len(LABELS)])] = True
    return SimpleNamespace(image=image, present=present, valid=torch.tensor([0, height, 0, width]).repeat(batch, 1), label=None)


def step(system: WeCLIP, batch: SimpleNamespace, rfm: bool, plain: bool) -> dict[str, Tensor]:
    """Losses after a backward pass."""
    system.zero_grad()
    if plain:
        terms = plain_losses(system, batch.image, batch.present, rfm)[0]
    else:
        terms = system.losses(batch, system.options.static_steps if rfm else 0)
    sum(terms.values()).backward()
    return {name: value.detach() for name, value in terms.items()}


def seconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median processor time of each call, taking turns; the comparison before has warmed them up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    system, crops, image = build().train(), pictures(given.batch, SIDE, SIDE), pictures(1, HEIGHT, WIDTH)
    print(f"## {date.today()}, 1 CPU thread ({platform.machine()}), torch {torch.__version__}, fp32, `python -m bench.weclip`\n")
    print(f"Training step: batch {given.batch}, {SIDE} x {SIDE}. Tested image: {WIDTH} x {HEIGHT}.\n")
    print("| what | cpu-s plain | fast | ratio | largest relative difference |\n|---|---|---|---|---|")
    for rfm, name in ((False, "training step, static"), (True, "training step, RFM")):
        calls = [lambda plain=plain, rfm=rfm: step(system, crops, rfm, plain) for plain in (True, False)]
        plain, fast = (call() for call in calls)
        apart = max(float(abs(plain[key] - fast[key]) / abs(plain[key])) for key in plain)
        row(name, seconds(calls, given.repeats), apart)
    system.eval()
    with torch.no_grad():
        calls = [lambda: plain_predict(system, image.image), lambda: system.predict(image).final]
        plain, fast = (call() for call in calls)
        row("tested image", seconds(calls, given.repeats), float((plain - fast).abs().max() / plain.abs().max()))


def row(name: str, times: list[float], apart: float) -> None:
    plain, fast = times
    print(f"| {name} | {plain:.2f} | {fast:.2f} | **{plain / fast:.2f}** | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
