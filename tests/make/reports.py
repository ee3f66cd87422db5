"""A result as test.py writes it, and cards."""

import re

import numpy as np

from util.report.summary import summarise
from util.report.viz import Card, episode_panels

NAMES = {1: "aeroplane", 2: "bicycle <b>", 3: "bird"}


def card(group: str, side: int = 48) -> Card:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side + 16, 3)).astype(np.uint8)
    mask = rng.choice([0, 1, 255], image.shape[:2]).astype(np.uint8)
    panels = episode_panels([(image, mask)], image, {"VTP": rng.random((6, 8))}, (mask == 1).astype(np.uint8), mask)
    return Card(f"bird, {group}", "episode 7 · <query>.jpg", group, panels)


def result(seeds: int = 3, **extra) -> dict:
    runs = [{"seed": s, "episodes": 30, "miou": 0.5 + s / 100, "fb_iou": 0.7, "fg_iou": np.float32(0.6),
             "per_class": {1: 0.4, 2: 0.5, 3: 0.6 + s / 100}, "episodes_per_class": {1: 10, 2: 12, 3: 8},
             "meta_miou": 0.45, "base_miou": float("nan")} for s in range(seeds)]
    mean, sd = summarise(runs)
    return {"system": "PI-CLIP", "data_set": "demo", "split": 0, "shot": 1, "backbone": "resnet50",
            "checkpoint": "best", "protocol": {"vocabulary": "present", "episodes": 30}, "environment": {"torch": "2"},
            "classes": NAMES, "seeds": runs, "mean": mean, "sd": sd, **extra}


def self_contained(page: str) -> bool:
    """No script, and nothing fetched from elsewhere: pictures are inside, url(#...) points into the page."""
    markup = re.sub(r"data:image/(jpeg|png);base64,[\w+/=\s]*", "", page)
    return not re.search(r"https?:|//|<script|<link|@import|url\((?!#)", markup)
