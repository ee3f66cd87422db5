"""HDMNet's matcher: a transformer that encodes query and support in a hierarchy and matches them level by level.

Encoding and matching are decoupled: level i+1 reads the encoder's own output, never the matched query, so levels can be
matched independently (HDMNet Sec. 3.2). Two exact identities keep the matching cheap. Support columns outside the mask
contribute nothing, so only tokens inside it are gathered. The correlation map, a mean of cosines over support tokens, equals
the cosine with their mean key.

Shapes: B queries, K shots, N = h*w tokens of a level, M gathered support tokens, C = 64 channels, H heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import Dropout, resize

EPS = 1e-6  # of every LayerNorm here
TEMPERATURE = 0.1
DROPOUT = 0.1


def to_tokens(x: Tensor) -> Tensor:
    """B C h w -> B N C."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """B N C -> B C h w."""
    return x.transpose(1, 2).unflatten(2, size)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm; B C h w -> tokens and their grid."""

    def __init__(self, width: int, kernel: int, stride: int):
        super().__init__()
        self.projection = nn.Conv2d(width, width, kernel, stride, padding=stride // 2)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.projection(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Multi-head self-attention without biases, keys and values reduced by a strided convolution (`sr`)."""

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, eps=EPS)
        self.reduction = reduction
        self.dropout = Dropout(DROPOUT)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        source = x
        if self.reduction > 1 and min(size) >= self.reduction:
            source = self.norm(to_tokens(self.sr(to_map(x, size))))
        q, k, v = (split_heads(f(t), self.heads) for f, t in ((self.q, x), (self.k, source), (self.v, source)))
        return self.dropout(self.o(merge_heads(F.scaled_dot_product_attention(q, k, v))))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """B N C -> B H N c."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """B H N c -> B N C."""
    return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Sequential):
    """1x1, depthwise 3x3, GELU, 1x1 on a map, with dropout; called on tokens."""

    def __init__(self, width: int, hidden: int):
        super().__init__(
            nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU(),
            Dropout(DROPOUT), nn.Conv2d(hidden, width, 1), Dropout(DROPOUT),
        )  # fmt: skip

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return to_tokens(super().forward(to_map(x, size)))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, reduction)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        return x + self.ffn(self.norm2(x), size)


class Match(nn.Module):
    """Query tokens read from the support tokens inside the mask (HDMNet Eqs. 3-5)."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.dropout = Dropout(DROPOUT)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, query: Tensor, support: Tensor, inside: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: B N C; support: B K*N C; inside: B K*N bool, support tokens in the mask.
            size: (h, w) of the level.
        Returns:
            matched query B N C, correlation map B h w (mean score with the support inside the mask, 0 if it is empty).
        """
        support, valid = gather_inside(support, inside)
        source = self.norm1(support)
        q = F.normalize(split_heads(self.q(self.norm1(query)), self.heads), dim=-1)
        k = F.normalize(split_heads(self.k(source), self.heads), dim=-1)
        v = split_heads(self.v(source), self.heads)
        valid = valid[:, None, :, None].to(k.dtype)  # B 1 M 1

        # The softmax runs over *query* positions, so each support token spreads one unit of attention over the query
        # and padding tokens are silenced by their value alone.
        attention = (k / TEMPERATURE @ q.transpose(2, 3)).softmax(3)  # B H M N
        matched = query + self.dropout(self.o(merge_heads(attention.transpose(2, 3) @ (v * valid))))
        matched = matched + self.ffn(self.norm2(matched), size)

        mean_key = (k * valid).sum(2, keepdim=True) / (valid.sum(2, keepdim=True) + 1e-9)
        correlation = (q @ mean_key.transpose(2, 3)).mean(1) / TEMPERATURE  # B N 1
        return matched, correlation[..., 0].unflatten(1, size)


def gather_inside(tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the tokens inside the mask, padded to the largest count in the batch (at least one).

    Returns:
        tokens B M C, valid B M bool.
    """
    count = max(int(inside.sum(1).max()), 1)
    order = inside.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2])), inside.gather(1, order)


class Level(nn.Module):
    """One level of the hierarchy: encode, match, merge the priors, decode."""

    def __init__(self, width: int, priors: int, kernel: int, stride: int, heads: int, reduction: int):
        super().__init__()
        self.embed = PatchEmbed(width, kernel, stride)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, reduction) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.match = Match(width)
        self.merge = nn.ModuleDict({
            "conv": nn.Conv2d(width + priors, width, 3, padding=1, bias=False), "bn": nn.BatchNorm2d(width),
        })  # fmt: skip
        self.parse = Decoder(width, width, nn.BatchNorm2d(width), nn.ReLU())

    def encode(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = self.embed(x)
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x), size

    def with_priors(self, x: Tensor, priors: Tensor) -> Tensor:
        x = torch.cat([x, resize(priors, x.shape[2:])], 1)
        return F.relu(self.merge["bn"](self.merge["conv"](x)))


class Decoder(nn.Sequential):
    """1x1, BN, 3x3, BN, 1x1 with four times the width inside, and what follows it.

    No activation stands between the five and their BNs keep their statistics, so they are one 3x3 convolution, and the gradient
    of its weights leads back to theirs. That is 17 times fewer multiplications at 64 channels, forward and backward. The 3x3
    pads with zeros what the first 1x1 has given a bias to, so the border has a bias of its own: a channel of ones carries it.
    """

    def __init__(self, width: int, out: int, *after: nn.Module):
        inner = 4 * width
        super().__init__(
            nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, 3, padding=1), nn.BatchNorm2d(inner),
            nn.Conv2d(inner, out, 1), *after,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.composed()
        x = F.conv2d(F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0), weight, bias, padding=1)
        for module in [*self][5:]:
            x = module(x)
        return x

    def composed(self) -> tuple[Tensor, Tensor]:
        """Return the weight out (width + 1) 3 3, its last channel for an input of ones, and the bias out; float32."""
        first, norm1, middle, norm2, last, *_ = self
        with torch.autocast(first.weight.device.type, enabled=False):
            scale1, shift1 = affine(norm1)
            scale2, shift2 = affine(norm2)
            before = torch.cat([scale1[:, None] * first.weight[..., 0, 0], (scale1 * first.bias + shift1)[:, None]], 1)
            behind = last.weight[..., 0, 0]
            inner = len(before)
            reduced = ((behind * scale2) @ middle.weight.flatten(1)).view(-1, inner, 3, 3)  # out inner 3 3
            weight = torch.einsum("oihw,ic->ochw", reduced, before)
            bias = behind @ (scale2 * middle.bias + shift2) + last.bias
        return weight, bias


def affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm with fixed statistics as a factor and a summand of each channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - scale * norm.running_mean


class Matcher(nn.Module):
    """Three levels, finest first (kernel 1/3/3, stride 1/2/2), decoded from coarse to fine.

    BatchNorms stay in eval mode in training too, as published (`fix_bn`): their statistics remain (0, 1).

    Args:
        priors: number of prior channels merged at each level.
        width: channels of the query and support maps.
    """

    def __init__(self, priors: int, width: int = 64):
        super().__init__()
        self.levels = nn.ModuleList(
            Level(width, priors, kernel, stride, heads, reduction)
            for kernel, stride, heads, reduction in ((1, 1, 2, 4), (3, 2, 4, 2), (3, 2, 8, 1))
        )
        self.head = Decoder(width, 2)

    def train(self, mode: bool = True) -> "Matcher":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, query: Tensor, support: Tensor, mask: Tensor, priors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            query: B C h w; support: B*K C h w; mask: B*K 1 S S in {0, 1}; priors: B P h w.
        Returns:
            logits B 2 h w; correlation maps B h w of the levels, coarse first.
        """
        B = len(query)
        # Shared weights: one pass for query and support, ordered by episode (see `Dropout`).
        both = self.encode(torch.cat([query[:, None], support.unflatten(0, (B, -1))], 1).flatten(0, 1))
        episodes = [tokens.unflatten(0, (B, -1)) for tokens, _ in both]  # B 1+K N C
        queries = [(tokens[:, 0], size) for tokens, (_, size) in zip(episodes, both, strict=True)]
        return self.match(queries, [tokens[:, 1:].flatten(0, 1) for tokens in episodes], mask, priors)

    def encode(self, x: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """Encode B C h w into tokens B N C and the grid of every level, finest first. Support and query do not interact here."""
        levels = []
        for level in self.levels:
            tokens, size = level.encode(x)
            levels.append((tokens, size))
            x = to_map(tokens, size)
        return levels

    def match(
        self, query: Sequence[tuple[Tensor, tuple[int, int]]], support: Sequence[Tensor], mask: Tensor, priors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Match encoded images. query: result of `encode`; support: its tokens B*K N C alone. Returns as `forward`."""
        B = len(priors)
        matched, correlations = [], []
        for level, (q, size), s in zip(self.levels, query, support, strict=True):
            inside = F.interpolate(mask, size, mode="nearest").view(B, -1) > 0
            q, correlation = level.match(q, s.unflatten(0, (B, -1)).flatten(1, 2), inside, size)
            matched.append(level.with_priors(to_map(q, size), priors))
            correlations.append(correlation)

        out = self.levels[-1].parse(matched[-1])
        for level, fine in zip(reversed(self.levels[:-1]), reversed(matched[:-1]), strict=True):
            out = resize(out, fine.shape[2:], corners=False)
            out = out + level.parse(fine + out)
        return self.head(out), correlations[::-1]
