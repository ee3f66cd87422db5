"""Made-up episodes of PASCAL's sizes, to measure with."""

import torch

from util.data.episodes import Episode

SIDE, HEIGHT, WIDTH = 473, 375, 500


def episodes(batch: int, shot: int = 1) -> Episode:
    """Random episodes with an object that covers a sixth of the image, as PASCAL's do on average."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> torch.Tensor:
        return (255 * torch.rand(shape, generator=generator)).round()

    mask = torch.zeros(batch, SIDE, SIDE, dtype=torch.uint8)
    mask[:, 100:293, 150:343] = 1
    present = torch.zeros(batch, 20, dtype=torch.bool)
    present[:, [6, 14]] = True
    return Episode(
        image(batch, 3, SIDE, SIDE), mask, image(batch, shot, 3, SIDE, SIDE), mask[:, None].repeat(1, shot, 1, 1), mask,
        torch.full((batch,), 7), torch.ones(batch, dtype=torch.int64), present, [image(3, 384, 512).byte()] * batch,
        torch.tensor([[HEIGHT, WIDTH]] * batch), torch.arange(batch), [], [], [""] * batch, [[""] * shot] * batch,
    )  # fmt: skip
