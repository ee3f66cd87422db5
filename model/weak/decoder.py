"""What WeCLIP trains (Sec. 3.3): tokens of CLIP's blocks -> one feature map -> class logits. 84 tensors, 6.0 M numbers.

Shapes: B images, N = 1 + h*w tokens of width C, D = 256.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.clip.trunk import attend
from model.ops import Dropout, full

WIDTH, HEADS, LAYERS = 256, 8, 3


class Fusion(nn.Module):
    """A private two-layer MLP for each block, their outputs concatenated and mixed by a 1x1 convolution; then Dropout2d."""

    def __init__(self, blocks: int, channels: int, dropout: float):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(blocks)
        )
        self.mix = nn.Conv2d(blocks * WIDTH, WIDTH, 1)
        self.dropout = Dropout(dropout, channels=True)

    def forward(self, hidden: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens of each block B N C, in block order -> B D h w. The class token is left out."""
        maps = [mlp(x[:, 1:]) for mlp, x in zip(self.mlps, hidden, strict=True)]
        return self.dropout(self.mix(torch.cat(maps, 2).transpose(1, 2).unflatten(2, grid)))


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Block(nn.Module):
    """Pre-norm transformer block, as CLIP's. `attend` reads the weights of `attn`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        # In training not the fused kernel: its backward gives the bias of the keys, whose gradient is zero, more rounding noise,
        # which Adam then scales up.
        x = x + attend(self, self.ln_1(x), want_map=torch.is_grad_enabled())[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Decoder(nn.Module):
    """Three transformer blocks without positions, then a 1x1 classifier."""

    def __init__(self, classes: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.classify = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, fused: Tensor) -> Tensor:
        tokens = self.blocks(fused.flatten(2).transpose(1, 2))
        return self.classify(tokens.transpose(1, 2).unflatten(2, fused.shape[2:]))


class Head(nn.Module):
    """Everything that WeCLIP trains.

    Args:
        blocks: of CLIP that it reads: all but the last, which only the class activation maps use.
        channels: width of CLIP.
        classes: including the background.
    """

    def __init__(self, blocks: int, channels: int, classes: int, dropout: float = 0.1):
        super().__init__()
        self.fuse = Fusion(blocks, channels, dropout)
        self.decoder = Decoder(classes)

    def forward(self, hidden: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens of each block -> (fused features B D h w, class logits B classes h w)."""
        fused = self.fuse(hidden, grid)
        return fused, self.decoder(fused)


def affinity_of(fused: Tensor) -> Tensor:
    """Sigmoid of the Gram matrix over positions, not normalised: B D h w -> B n n in float32."""
    with torch.autocast(fused.device.type, enabled=False):
        flat = full(fused).flatten(2)
        return (flat.transpose(1, 2) @ flat).sigmoid()
