"""Cross-attention between class tokens and patch tokens. Shapes: B images, Q targets, M memory tokens, D width."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import Dropout

HEAD = 64  # width of an attention head


class CrossAttention(nn.Module):
    """Multi-head attention of targets on a memory, with biases everywhere.

    Args:
        drop: of the attention probabilities and of the output. Where it acts the probabilities are written out, so that the
            mask does not depend on the number of processes (`model.ops.Dropout`); else attention is fused.
    """

    def __init__(self, width: int, drop: float):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.heads = max(1, width // HEAD)
        self.attn_drop, self.proj_drop = Dropout(drop), Dropout(drop)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        """B Q D, B M D -> B Q D."""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer, x in ((self.q, target), (self.k, memory), (self.v, memory)))  # fmt: skip
        if self.training and self.attn_drop.p > 0:
            probability = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)
            out = self.attn_drop(probability).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention on a memory, then a feed-forward part; norms behind each. There is no self-attention."""

    def __init__(self, width: int, drop: float):
        super().__init__()
        self.multihead_attn = CrossAttention(width, drop)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = Dropout(drop), Dropout(drop)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        target = self.norm2(target + self.multihead_attn(target, memory))
        return self.norm3(target + self.outer(self.linear2(self.inner(self.linear1(target).relu()))))


class Layers(nn.Module):
    """Blocks that start as copies of one, as in the published training (its own initialiser is never called there)."""

    def __init__(self, width: int, drop: float, count: int):
        super().__init__()
        first = Block(width, drop)
        self.layers = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(count - 1))])


class Scores(nn.Module):
    """Head-averaged scores of an attention before its softmax, nothing else of a block: ZegCLIP's last layer."""

    def __init__(self, attention: CrossAttention):
        super().__init__()
        self.multihead_attn = nn.ModuleDict({"q": copy.deepcopy(attention.q), "k": copy.deepcopy(attention.k)})
        self.heads = attention.heads

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        """B Q D, B M D -> B Q M."""
        q, k = self.multihead_attn["q"](target), self.multihead_attn["k"](memory)
        return q @ k.transpose(1, 2) / (self.heads * (q.shape[2] / self.heads) ** 0.5)


class RecoveryDecoder(nn.Module):
    """Predicts CLIP's own features from the decoder's outputs, in training only (CLIP-RC, Sec. 3.4)."""

    def __init__(self, width: int, drop: float):
        super().__init__()
        self.linear_q_in, self.linear_k_in = nn.Linear(width, width), nn.Linear(width, width)
        self.decouple_q, self.decouple_v = nn.ModuleList([Block(width, drop)]), nn.ModuleList([Block(width, drop)])
        self.linear_q_out, self.linear_k_out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last decoder layers, B Q D and B M D -> descriptors B Q 2D, patch features B M D."""
        a, b = self.linear_q_in(classes), self.linear_k_in(patches)
        for of_classes, of_patches in zip(self.decouple_q, self.decouple_v, strict=True):
            a, b = of_classes(a, b), of_patches(b, a)  # both from the old pair
        return self.linear_q_out(a), self.linear_k_out(b)
