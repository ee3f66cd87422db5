"""What a Predictor costs: the first query, another one, and one seen before, in seconds of processor time.

    python -m bench.predictor [PI_CLIP HDMNet ...]      # PASCAL's sizes, random weights, the CPU, fp32
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from model import build_system, configure
from model.predict.opening import NO_NAMES
from model.predict.predictor import Predictor
from util.data.folds import fold_of


def main() -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 375, 500, 3), dtype=np.uint8)
    for arch in sys.argv[1:] or ["PI_CLIP", "HDMNet"]:
        config = configure("config/pascal/pascal_split0_resnet50.yaml", arch, ["CLIP.clip_path=random"])
        fold = fold_of(config)
        system = build_system(arch, config, fold, NO_NAMES)
        predictor = Predictor(system, config, fold, NO_NAMES, torch.device("cpu"), "fp32")
        predictor.set_support(images[0], boxes=[100, 100, 300, 300], text="dog")
        first, another, again = (seconds(predictor.predict, images[i]) for i in (1, 2, 2))
        print(f"{arch}: first query {first:.1f}, another {another:.1f}, again {again:.2f}")


def seconds(work: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    """Of processor time, all threads together."""
    begin = time.process_time()
    work(image)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
