"""What several tests make. No test file imports another (test_arrows.py)."""

from tests.make.batches import abstract_index, clip_episode, keyed, only, random_episode
from tests.make.scenes import CONFIG, NUMBERS, ROOT, STAR, draw, make, palette_mask, photo, placed, restore, star, upright
from tests.make.systems import TEXT, VISION, pi_clip, small_clip, small_system, text_prior

__all__ = [
    "CONFIG", "NUMBERS", "ROOT", "STAR", "TEXT", "VISION", "abstract_index", "clip_episode", "draw", "keyed", "make", "only",
    "palette_mask", "photo", "pi_clip", "placed", "random_episode", "restore", "small_clip", "small_system", "star",
    "text_prior", "upright",
]  # fmt: skip
