"""Correlations of all positions of a query with all positions of a support, and convolutions over both grids (HSNet Sec. 3).

Shapes: N pairs of a query and a support, n blocks of a level, C channels of a feature, c of a convolution, (h, w) the query's
grid, (k, l) the support's. A tensor N c h w k l lies in memory as N h w k l c. So the convolution over the support's grid reads
a batch of channels-last images where they lie, and the one over the query's grid moves whole rows of channels.

A correlation is never whole in memory: `CorrelationConv4d` asks for it a few query rows at a time, and only where the support
is not masked out.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import full

EPSILON = 1e-5  # added to the norms, as published
CHUNK = {"cpu": 2**20, "cuda": 2**27}  # numbers of a correlation that are computed at a time; on the CPU they stay in its cache

Block = Callable[[slice], Tensor]  # positions of the query -> q k l n


class Pair(Protocol):
    """One level of one pair of images; its correlation is computed where it is asked for."""

    grid: tuple[int, int, int, int]  # h w k l

    def seen(self) -> Tensor:
        """k l bool: where the support counts; elsewhere the correlation is 0."""

    def within(self, ks: slice, ls: slice) -> Block:
        """Gives access to the correlation with these rows and columns of the support."""


def unit(level: Tensor) -> Tensor:
    """n C h w -> n h w C of length 1, in at least fp32; a vector that is shorter than about 1e-5 stays short."""
    x = full(level).permute(0, 2, 3, 1).contiguous()
    return x / (x.norm(dim=3, keepdim=True) + EPSILON)


def cosines(query: Tensor, support: Tensor) -> Tensor:
    """n q C and n p C -> q p n, negative ones set to 0."""
    return (query @ support.transpose(1, 2)).clamp_(min=0).permute(1, 2, 0).contiguous()


class Cosines:
    """Correlation with a support that is masked before it is normalised.

    Args:
        query: n h w C, see `unit`.
        support: n C k l, as the backbone gives it.
        mask: k l, not negative.
    """

    def __init__(self, query: Tensor, support: Tensor, mask: Tensor):
        self.query, self.support, self.mask = query, support, mask
        self.grid = (*query.shape[1:3], *mask.shape)

    def seen(self) -> Tensor:
        return self.mask != 0

    def within(self, ks: slice, ls: slice) -> Block:
        mask, query = self.mask[ks, ls], self.query.flatten(1, 2)
        seen = mask.flatten().nonzero()[:, 0]
        support = self.support[:, :, ks, ls].flatten(2)[:, :, seen] * mask.flatten()[seen]
        vectors = F.pad(unit(support[..., None])[:, :, 0], (0, 0, 0, 1))  # n p+1 C: the last one, 0, for all that is masked out
        place = torch.full((mask.numel(),), len(seen), device=mask.device)
        place[seen] = torch.arange(len(seen), device=mask.device)
        return lambda rows: cosines(query[:, rows], vectors).index_select(1, place).unflatten(1, mask.shape)


class Products:
    """Correlation from cosines that are kept, for masks that change: what a mask does to a vector is one factor a position.

    Args:
        kept: n h w k l, see `keep`.
        query: n h w and
        support: n k l, see `shrink`.
    """

    def __init__(self, kept: Tensor, query: Tensor, support: Tensor):
        self.kept, self.query, self.support = kept, query, support
        self.grid = tuple(kept.shape[1:])

    def seen(self) -> Tensor:
        return (self.support != 0).any(0)

    def within(self, ks: slice, ls: slice) -> Block:
        kept, query, support = self.kept.flatten(1, 2)[..., ks, ls], self.query.flatten(1), self.support[:, None, ks, ls]
        return lambda rows: (query[:, rows, None, None] * support * kept[:, rows]).permute(1, 2, 3, 0).contiguous()


def keep(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """n h w C and n k l C, see `unit` -> cosines n h w k l, negative ones set to 0, and the same as n k l h w."""
    found = (query.flatten(1, 2) @ support.flatten(1, 2).transpose(1, 2)).clamp_(min=0)
    back = torch.stack([x.T.contiguous() for x in found])  # faster than the transposed copy of a batch
    both = (found, query.shape[1:3], support.shape[1:3]), (back, support.shape[1:3], query.shape[1:3])
    return tuple(x.unflatten(2, last).unflatten(1, first) for x, first, last in both)


def shrink(norm: Tensor, mask: Tensor) -> Tensor:
    """Factor between the unit vector of a feature and the one of the feature times a mask, which the 1e-5 makes smaller than 1.

    Args:
        norm: N n h w, length of the features; mask: N 1 h w, not negative.
    """
    return (norm + EPSILON) * mask / (norm * mask + EPSILON)


def at_once(width: int, like: Tensor) -> int:
    """How many rows of so many numbers to compute at a time."""
    return max(1, CHUNK.get(like.device.type, CHUNK["cuda"]) // max(width, 1))


def plane(conv: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer of images to M a b c, channels last."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def on_query_grid(layer: Callable[[Tensor], Tensor], x_NchwKL: Tensor) -> Tensor:
    """Applies a layer of images to the query's grid at every position of the support: N c h w k l -> N c' h' w' k l."""
    return over_query(layer, x_NchwKL.permute(0, 2, 3, 4, 5, 1)).permute(0, 5, 1, 2, 3, 4)


def over_query(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same in the order of the memory: N h w k l c -> N h' w' k l c'."""
    images = x.permute(0, 3, 4, 1, 2, 5)
    return plane(layer, images.flatten(0, 2).contiguous()).unflatten(0, images.shape[:3]).permute(0, 3, 4, 1, 2, 5)


class CenterPivotConv4d(nn.Module):
    """A 4-D convolution with a sparse kernel: the sum of a 2-D one over the query's grid and one over the support's (Sec. 3.2).

    Both read N c h w k l and give N c' h w k' l', where k' = ceil(k / stride).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)

    def forward(self, x_NchwKL: Tensor) -> Tensor:
        x = x_NchwKL.permute(0, 2, 3, 4, 5, 1)
        y = self.over_support(x.flatten(0, 2)).unflatten(0, x.shape[:3])
        y = y + over_query(self.conv1, x if self.stride == 1 else x[:, :, :, :: self.stride, :: self.stride])
        return y.permute(0, 5, 1, 2, 3, 4)

    def over_support(self, x: Tensor) -> Tensor:
        """M k l c -> M k' l' c'. On a grid so small that every output reads every input, it is one linear layer."""
        (height, width), (size, _), (pad, _) = x.shape[1:3], self.conv2.kernel_size, self.conv2.padding
        if self.stride > 1 or max(height, width) > pad + 1 or height * width >= size**2:
            return plane(self.conv2, x)
        kernel, cells = self.conv2.weight.permute(0, 2, 3, 1), [(i, j) for i in range(height) for j in range(width)]
        weight = torch.stack([kernel[:, pad - i : pad - i + height, pad - j : pad - j + width] for i, j in cells])
        y = F.linear(x.flatten(1), weight.flatten(2).flatten(0, 1), self.conv2.bias.repeat(len(cells)))
        return y.view(len(x), height, width, -1)


class CorrelationConv4d(CenterPivotConv4d):
    """The same on a correlation that is computed on the way (`Pair`). Where the support is masked out, only biases are left."""

    def forward(self, pair: Pair) -> Tensor:
        """-> 1 c' h w k' l'."""
        h, w, *support = pair.grid
        seen, cells = pair.seen().cpu(), tuple((size - 1) // self.stride + 1 for size in support)
        bias = self.conv1.bias + self.conv2.bias
        if not seen.any():
            bias = bias + 0 * (self.conv1.weight.sum() + self.conv2.weight.sum())  # a gradient of 0, not none: DDP waits for all
            return bias.expand(1, h, w, *cells, -1).contiguous().permute(0, 5, 1, 2, 3, 4)
        (k_cells, ks), (l_cells, ls) = self.reach(seen.any(1)), self.reach(seen.any(0))
        on_query = partial(F.conv2d, weight=self.conv1.weight, padding=self.conv1.padding)
        on_support = partial(F.conv2d, weight=self.conv2.weight, stride=self.stride, padding=self.conv2.padding)
        around = pair.within(ks, ls)
        step = at_once((ks.stop - ks.start) * (ls.stop - ls.start) * self.conv1.in_channels, bias)
        y = torch.cat([plane(on_support, around(slice(i, i + step))) for i in range(0, h * w, step)]).unflatten(0, (1, h, w))
        centres = pair.within(*(slice(part.start, part.stop, self.stride) for part in (ks, ls)))
        y = y + over_query(on_query, centres(slice(None)).unflatten(0, (1, h, w)))
        y = F.pad(y, (0, 0, l_cells.start, cells[1] - l_cells.stop, k_cells.start, cells[0] - k_cells.stop))
        y += bias
        return y.permute(0, 5, 1, 2, 3, 4)

    def reach(self, seen: Tensor) -> tuple[slice, slice]:
        """Of one axis of the support: output cells that see something, and the positions to compute them from.

        A cell i reads positions stride * i - pad to stride * i + pad. The part starts where a cell has its centre, so that its
        convolution has the same centres; what it leaves out is 0, as its padding is.
        """
        at, stride, pad = seen.nonzero().flatten().tolist(), self.stride, self.conv2.padding[0]
        start = min(at[0] // stride, max(0, -((pad - at[0]) // stride)))
        stop = min((len(seen) - 1) // stride, (at[-1] + pad) // stride) + 1
        return slice(start, stop), slice(stride * start, min(len(seen), stride * stop))


class NormReLU4d(nn.GroupNorm):
    """Group norm over the channels of a group and all positions of N c h w k l, which lies in memory as said above; then ReLU.

    torch's own norm copies such a tensor or, asked for channels last, adds up its squares in fp32 one after the other: over the
    400,000 positions of level 2 the variance keeps three digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = full(x).permute(0, 2, 3, 4, 5, 1)
        y = _NormReLU.apply(x.reshape(len(x), -1, x.shape[5]), self.weight, self.bias, self.num_groups, self.eps)
        return y.view(x.shape).permute(0, 5, 1, 2, 3, 4)


class _NormReLU(torch.autograd.Function):
    """Of N m c over m and the channels of a group: partial sums of pieces that fit a cache, joined in fp64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        def per_group(sums: Tensor) -> Tensor:  # N c -> N c: the mean over the positions and channels of the group
            means = sums.unflatten(1, (groups, -1)).mean(2, keepdim=True) / x.shape[1]
            return means.expand(-1, -1, x.shape[2] // groups).flatten(1)

        step = at_once(x.shape[0] * x.shape[2], x)
        first = x[:, :step]
        shift = per_group(first.sum(1).double() * (x.shape[1] / first.shape[1])).to(x)  # near the mean: nothing cancels
        sums = squares = 0
        for piece in x.split(step, 1):
            piece = piece - shift[:, None]
            sums, squares = sums + piece.sum(1).double(), squares + piece.square_().sum(1).double()
        off = per_group(sums)
        mean, rate = shift + off, (per_group(squares) - off**2 + eps).rsqrt()
        scale = rate * weight
        scale, offset = (value[:, None].to(x) for value in (scale, bias - mean * scale))
        y = torch.empty_like(x)
        for i in range(0, x.shape[1], step):
            torch.addcmul(offset, x[:, i : i + step], scale, out=y[:, i : i + step]).relu_()
        ctx.save_for_backward(x, y, weight, mean, rate)
        ctx.per_group, ctx.step = per_group, step
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, rate = ctx.saved_tensors
        pieces = [slice(i, i + ctx.step) for i in range(0, x.shape[1], ctx.step)]
        dx, sums, products = torch.empty_like(x), 0, 0  # first keeps what passed the ReLU
        for rows in pieces:
            piece = torch.mul(dy[:, rows], y[:, rows] > 0, out=dx[:, rows])
            sums, products = sums + piece.sum(1).double(), products + (piece * x[:, rows]).sum(1).double()
        products = rate * (products - mean * sums)  # with the normalised x
        along, level = ctx.per_group(products * weight) * rate**2, ctx.per_group(sums * weight) * rate
        by_dy, by_x, offset = (value[:, None].to(x) for value in (rate * weight, -along, along * mean - level))
        for rows in pieces:
            dx[:, rows].mul_(by_dy).add_(offset).addcmul_(x[:, rows], by_x)
        return dx, products.sum(0).to(weight), sums.sum(0).to(weight), None, None
