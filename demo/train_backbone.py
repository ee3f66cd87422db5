"""`python -m demo.train_backbone`: makes demo/backbone.safetensors, the demo's stand-in for ImageNet weights.

Real base learners start from a network that was trained to classify ImageNet, whose classes include PASCAL's. So here: a
narrow ResNet-50 learns to name the things of fresh scenes (none of the train or val list), with stride 32 as usual, in
a quarter of an hour on one core. The weights are stored under timm's names and loaded like any ImageNet weights.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor

from demo.shapes import NAMES
from demo.world import FRESH, VAL, Scene, scene
from model.backbone.encoder import IMAGENET_MEAN, IMAGENET_STD
from util.files import save_tensors

FILE = Path("demo/backbone.safetensors")
WIDTH, SIDE, BATCH, STEPS, RATE = 16, 96, 64, 2000, 3e-3


def network() -> ResNet:
    """ResNet-50 with deep stem and a quarter of the channels, as `build_encoder("resnet50", width=16)` but at stride 32."""
    channels = tuple(WIDTH * 2**i for i in range(4))
    return ResNet(Bottleneck, (3, 4, 6, 3), len(NAMES), stem_type="deep", stem_width=WIDTH, channels=channels)


def crop(made: Scene, rng: np.random.Generator, augment: bool = True) -> tuple[np.ndarray, int]:
    """A thing of the scene, somewhere near the middle of a SIDE x SIDE window: (image uint8 RGB, 0-based class)."""
    cls, left, top, right, bottom = made.boxes[rng.integers(len(made.boxes))]
    zoom = SIDE / max(right - left, bottom - top, 16) * (rng.uniform(0.4, 0.95) if augment else 0.7)
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    turn = np.radians(rng.uniform(-15, 15)) * augment
    matrix = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if augment and rng.random() < 0.5:
        matrix[:, 0] *= -1
    shift = SIDE * (0.5 + rng.uniform(-0.1, 0.1, 2) * augment) - matrix @ centre
    window = np.concatenate([matrix, shift[:, None]], 1)
    image = cv2.warpAffine(made.image, window, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return (image[..., rng.permutation(3)] if augment else image), cls - 1


def batch(scenes: list[Scene], rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """(size 3 SIDE SIDE normalised, size int64)."""
    images, classes = zip(*(crop(scenes[rng.integers(len(scenes))], rng) for _ in range(size)), strict=True)
    return normalise(np.stack(images)), torch.tensor(classes)


def normalise(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def accuracy(net: ResNet, scenes: list[Scene]) -> float:
    rng = np.random.default_rng(0)
    images, classes = zip(*(crop(s, rng, augment=False) for s in scenes), strict=True)
    net.eval()
    with torch.no_grad():
        right = sum((net(normalise(np.stack(images[i : i + 64]))).argmax(1) == torch.tensor(classes[i : i + 64])).sum().item()
                    for i in range(0, len(images), 64))  # fmt: skip
    net.train()
    return right / len(images)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    with ProcessPoolExecutor() as pool:
        scenes = list(pool.map(scene, range(FRESH, FRESH + 5000), chunksize=50))
        held_out = list(pool.map(scene, VAL, chunksize=50))
    scenes, held_out = ([s for s in group if s.boxes] for group in (scenes, held_out))
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
    started = time.monotonic()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        images, classes = batch(scenes, rng, BATCH)
        loss = F.cross_entropy(net(images), classes, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"{step + 1}/{STEPS}  loss {loss.item():.3f}  held-out things named right: "
                  f"{100 * accuracy(net, held_out):.1f} %  {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    save_tensors(FILE, {key: value for key, value in state.items() if not key.startswith("fc.")})
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
