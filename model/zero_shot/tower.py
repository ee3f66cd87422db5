"""CLIP's frozen image tower with trained prompts before every block and, in CLIP-RC, region tokens behind the patches.

A region token is a class token of a window: it reads the patches of its window and itself, and each patch of that window reads
it (CLIP-RC, Sec. 3.2). Shapes: B images, K prompts, C width, D embedding, h w patch grid, regions a grid of g g.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import ClipTrunk
from model.ops import Dropout


class Views(NamedTuple):
    """What the tower says of an image, all of unit length."""

    whole: Tensor  # B D, class token
    patches: Tensor  # B D h w
    regions: Tensor  # B D g g; g = 0 without region tokens


def owners(grid: tuple[int, int], regions: int, device: torch.device | str = "cpu") -> Tensor:
    """h*w int64: the region, row-major, that owns each patch. Bins are proportional: at 32 x 32 the published 8 x 8."""
    row, column = (torch.arange(side, device=device) * regions // side for side in grid)
    return (row[:, None] * regions + column).flatten()


def reading_mask(grid: tuple[int, int], prompts: int, regions: int, device: torch.device | str = "cpu") -> Tensor | None:
    """N N bool for `ClipTrunk.run`, tokens in the order class | prompts | patches | regions; None without regions."""
    if not regions:
        return None
    kind = torch.cat([torch.full((1 + prompts,), -1, device=device), owners(grid, regions, device)])
    patch = torch.arange(len(kind), device=device) > prompts
    number = torch.arange(regions**2, device=device)
    own = kind == number[:, None]  # regions x the others: the patches of a region
    return torch.cat([torch.cat([torch.ones(len(patch), len(patch), dtype=torch.bool, device=device), own.T], 1),
                      torch.cat([own, torch.eye(regions**2, dtype=torch.bool, device=device)], 1)])  # fmt: skip


class Prompts(nn.Module):
    """The trained part of the tower: K prompts for each block, one projection for all of them, and a norm behind the last block.

    Args:
        width, layers, patch: of CLIP's image tower.
        number: K.
        drop: of the projected prompts, drawn anew for every block.
    """

    def __init__(self, width: int, layers: int, patch: int, number: int, drop: float):
        super().__init__()
        bound = math.sqrt(6 / (3 * patch**2 + width))
        self.prompt_embeddings = nn.Parameter(torch.empty(1, number, width).uniform_(-bound, bound))
        self.deep_prompt_embeddings = nn.Parameter(torch.empty(layers - 1, number, width).uniform_(-bound, bound))
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)
        self.drop = Dropout(drop)

    def forward(self, trunk: ClipTrunk, images: Tensor, regions: int = 0) -> Views:
        """Normalised images B 3 H W, both sides multiples of the patch. regions: side g of the grid of region tokens."""
        visual, number = trunk.visual, self.prompt_embeddings.shape[1]
        region = visual.class_embedding + visual.positional_embedding[0]  # once; published: twice in the class token
        tokens, grid = trunk.embed(images, class_twice=True, extra=region.expand(regions**2, -1))
        sets = torch.cat([self.prompt_embeddings, self.deep_prompt_embeddings])
        tokens = trunk.run(
            tokens,
            prompts=lambda i: self.drop(self.prompt_proj(sets[i]).expand(len(images), -1, -1)),
            allowed=reading_mask(grid, number, regions, images.device),
        ).tokens
        count = 1 + number + grid[0] * grid[1]
        kept, local = torch.cat([tokens[:, :1], tokens[:, 1 + number : count]], 1), tokens[:, count:]
        tokens = torch.cat([self.prompt_norm(kept), local], 1)  # published: the regions go without this norm
        out = F.normalize(trunk.post_norm(tokens) @ visual.proj, dim=-1).transpose(1, 2)
        whole, patches, local = out.split([1, grid[0] * grid[1], regions**2], 2)
        return Views(whole[..., 0], patches.unflatten(2, grid), local.unflatten(2, (regions, regions)))
