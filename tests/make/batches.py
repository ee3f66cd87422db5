"""Batches and indices out of nothing."""

import torch
from torch import Tensor

from util.data.episodes import Episode, content_key
from util.data.index import Index, Record, build_index


def random_episode(batch: int = 2, shot: int = 1, side: int = 65) -> Episode:
    generator = torch.Generator().manual_seed(7)

    def mask(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).to(torch.uint8)

    def image(*shape: int) -> Tensor:
        return 255 * torch.rand(shape, generator=generator)

    return Episode(
        image(batch, 3, side, side), mask(batch, side, side), image(batch, shot, 3, side, side), mask(batch, shot, side, side),
        mask(batch, side, side), torch.full((batch,), 7), torch.full((batch,), 1), torch.ones(batch, 20, dtype=torch.bool), [],
        torch.tensor([[side, side]] * batch), torch.arange(batch), [], [], ["q"] * batch, [["s"] * shot] * batch,
    )  # fmt: skip


def clip_episode(shot: int = 1) -> Episode:
    """Three queries of two sizes; classes 7, with 7 and 9 (0-based 6, 8) annotated."""
    made = random_episode(batch=3, shot=shot)
    generator = torch.Generator().manual_seed(5)
    sizes = [(32, 48), (48, 32), (32, 48)]
    made.clip_query = [torch.randint(256, (3, *size), generator=generator).to(torch.uint8) for size in sizes]
    made.annotation_hw = torch.tensor([(30, 41), (45, 29), (32, 48)])
    made.present = torch.zeros(3, 20, dtype=torch.bool)
    made.present[:, [6, 8]] = True
    return made


def keyed(made: Episode) -> Episode:
    made.query_key = [content_key(image.numpy()) for image in made.query]
    made.support_key = [[content_key(image.numpy(), mask.numpy()) for image, mask in zip(images, masks, strict=True)]
                        for images, masks in zip(made.support, made.support_mask, strict=True)]  # fmt: skip
    return made


def only(made: Episode, rows: list[int]) -> Episode:
    def pick(value):
        return value[rows] if isinstance(value, torch.Tensor) else [value[i] for i in rows] if value else []

    return Episode(**{name: pick(value) for name, value in vars(made).items()})


def abstract_index(images: int, classes: tuple[int, ...]) -> Index:
    """Image p shows class p mod C, and every third one the next class too; no files behind it."""
    c = len(classes)
    present = [tuple(sorted({classes[p % c], classes[(p + (p % 3 == 0)) % c]})) for p in range(images)]
    records = [Record(f"{p}.jpg", f"{p}.png", 9, 9, {k: 5000 for k in present[p]}, present[p]) for p in range(images)]
    return build_index(records, classes, only=True)
