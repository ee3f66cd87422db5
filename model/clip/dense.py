"""Training-free open-vocabulary maps: another attention in the last block of a frozen CLIP, cosine of every patch to every text.

    maskclip   identity attention: the values alone          (re-implementation of the ClearCLIP code)
    sclip      softmax(q q) + softmax(k k), residual and FFN kept
    clearclip  softmax(q q), no residual, no FFN
    naclip     softmax(k k + Gaussian of the patch distance), no residual, no FFN
    proxyclip  one matrix of another network's patch similarities for all heads

Blocks before the last one are untouched and common to all. Shapes: B images, n = h*w patches, N = 1 + n tokens, H heads,
C width, D embedding, Q texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn

from model.clip.text import FOREGROUND, TextEncoder
from model.clip.trunk import ClipTrunk
from model.ops import Pixels, full, nominal_positions, resize
from util.files import load_tensors, save_tensors

Grid = tuple[int, int]
Templates = Sequence[Callable[[str], str]]
Patches = Callable[[Tensor], Tensor]  # B 3 H W RGB 0..255 -> B C h w, patch features of another network (ProxyCLIP)

# Words of backgrounds that SCLIP, NACLIP and ProxyCLIP let compete with VOC's classes.
BACKGROUND = ("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building",
              "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail",
              "fence")  # fmt: skip
# CLIP's pixel statistics in 0..255 units as all four published configs have them, rounded to three decimals.
MEAN, STD = (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)


@dataclass(frozen=True)
class Variant:
    """Rule of the last block.

    Attributes:
        attention: vanilla | identity | qq | kk | qq+kk (a sum, rows add up to 2) | neighbour (kk with the Gaussian) |
            gaussian (the Gaussian alone) | proxy.
        residual: keep the residual and the FFN behind it.
        multiple: windows are padded to a multiple of this many pixels; 1: the patch convolution leaves a remainder out.
        two_steps: in one piece, maps are resized to the images' own size first (NACLIP).
        std: of the Gaussian, in patches.
        beta, gamma: of ProxyCLIP (its eq. for the normalised similarity).
    """

    attention: str
    residual: bool = False
    multiple: int = 1
    two_steps: bool = False
    std: float = 5.0
    beta: float = 1.2
    gamma: float = 3.0


VARIANTS = {
    "maskclip": Variant("identity", multiple=16), "sclip": Variant("qq+kk", residual=True),
    "naclip": Variant("neighbour", two_steps=True), "clearclip": Variant("qq", multiple=16),
    "proxyclip": Variant("proxy", multiple=56),
}  # fmt: skip


def normalise(images: Tensor, pixels: Pixels | None = None) -> Tensor:
    """B 3 H W RGB 0..255 -> float, with the statistics of the published configs: CLIP's, rounded to three decimals.

    pixels: statistics of this CLIP (`ClipTrunk.pixels`), where they may be others; rounded likewise.
    """
    kind = images.dtype if images.is_floating_point() else torch.float32
    both = (MEAN, STD) if pixels is None else (pixels.mean.double().round(decimals=3), pixels.std.double().round(decimals=3))
    mean, std = (torch.as_tensor(x, device=images.device).to(kind).view(3, 1, 1) for x in both)
    return (images - mean) / std


# ---- texts


def known_words(text: TextEncoder, words: Sequence[str]) -> tuple[str, ...]:
    """Return those of the words that this CLIP knows."""
    return tuple(word for word in words if text.knows(word))


def prompts_of(text: TextEncoder) -> Templates:
    """Return the published prompts, or, for a small CLIP that does not know their words, the one that it was trained with."""
    known = all(text.knows(template("a")) for template in OPENAI_IMAGENET_TEMPLATES)
    return OPENAI_IMAGENET_TEMPLATES if known else (FOREGROUND.format,)


@torch.no_grad()
def prompt_bank(text: TextEncoder, words: Sequence[str], templates: Templates = OPENAI_IMAGENET_TEMPLATES,
                cache: Path | None = None) -> Tensor:  # fmt: skip
    """One vector per query word: the mean of its prompts' unit vectors. Q D, L2-normalised, at least fp32.

    cache: folder where the bank is kept under a hash of its prompts and the tower's weights.

    Raises:
        UserError: a prompt is too long or has a word that this CLIP does not know.
    """
    prompts = {word: [template(word) for template in templates] for word in words}
    file = cache and cache / f"prompts-{text.key([prompts[word] for word in words])}.safetensors"
    if file and file.is_file():
        return load_tensors(file)["bank"].to(text.clip.positional_embedding.device)
    rows = {}
    for word, filled in prompts.items():
        rows[word] = F.normalize(F.normalize(full(encode(text.clip, text.tokens(filled))), dim=-1).mean(0), dim=-1)
    bank = torch.stack([rows[word] for word in words])
    if file:
        save_tensors(file, {"bank": bank})
    return bank


def encode(clip: nn.Module, tokens: Tensor) -> Tensor:
    """n L token ids -> n D, not normalised. The tower is causal: tokens after the longest text's end are left out."""
    tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
    L = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:L]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:L, :L]))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ clip.text_projection


# ---- the image tower up to its last block, and the last block


def embed(trunk: ClipTrunk, x: Tensor) -> tuple[Tensor, Grid]:
    """Embed normalised images: (input of the last block, B N C; patch grid); positions by the nominal factors."""
    visual = trunk.visual
    patches = visual.conv1(x)
    grid = (patches.shape[2], patches.shape[3])
    table = visual.positional_embedding
    table = torch.cat([table[:1], nominal_positions(table[1:], visual.grid_size, grid)])
    cls = visual.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
    tokens = visual.ln_pre(torch.cat([cls, patches.flatten(2).transpose(1, 2)], 1) + table)
    return trunk.run(tokens, stop=len(trunk.blocks) - 1).tokens, grid


def neighbour_bias(grid: Grid, std: float, device: torch.device | None = None) -> Tensor:
    """N N fp32: Gaussian of the distance of two patches, 1 on the diagonal; 0 in the row and column of the class token."""
    y, x = torch.meshgrid(*(torch.arange(side, device=device, dtype=torch.float32) for side in grid), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1)
    squared = (places[:, None] - places).square().sum(-1)
    return F.pad((-squared / (2 * std**2)).exp(), (1, 0, 1, 0))


def attention(variant: Variant, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Attention of the last block, B H N N, rows = queries; q and k are B H N c."""
    scale = q.shape[-1] ** -0.5

    def products(a: Tensor, b: Tensor) -> Tensor:
        return (a * scale) @ b.transpose(-2, -1)

    kind = variant.attention
    if kind == "vanilla":
        return products(q, k).softmax(-1)
    if kind == "identity":
        return torch.eye(q.shape[2], device=q.device, dtype=q.dtype).expand(*q.shape[:3], -1)
    if kind == "qq":
        return products(q, q).softmax(-1)
    if kind == "kk":
        return products(k, k).softmax(-1)
    if kind == "qq+kk":
        return products(q, q).softmax(-1) + products(k, k).softmax(-1)
    bias = neighbour_bias(grid, variant.std, q.device).to(q.dtype)
    if kind == "neighbour":
        return (products(k, k) + bias).softmax(-1)
    if kind == "gaussian":  # as strong as the mean product of a query's and a key's length
        strength = scale * (q.norm(dim=-1).mean(-1) * k.norm(dim=-1).mean(-1)).mean(-1)
        return (bias * strength.view(-1, 1, 1, 1)).softmax(-1).expand(-1, q.shape[1], -1, -1)
    raise ValueError(f"no attention {kind!r}")


def proxy_attention(features: Tensor, beta: float = 1.2, gamma: float = 3.0) -> Tensor:
    """ProxyCLIP's attention B M M of patch features B M C: similarities below beta times their mean get none.

    In an almost constant image (mean similarity above 1 / beta) every pair is below it and the published code gives NaN: a
    patch always keeps itself.
    """
    unit = F.normalize(features, dim=-1)
    similarity = unit @ unit.transpose(-2, -1)
    z = gamma * (similarity - beta * similarity.mean((-2, -1), keepdim=True))
    itself = torch.eye(z.shape[-1], device=z.device, dtype=torch.bool)
    return z.masked_fill((z < 0) & ~itself, float("-inf")).softmax(-1)


def heads(trunk: ClipTrunk, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the last block, each B H N c, of its ln_1's output B N C."""
    attn = trunk.blocks[-1].attn
    qkv = F.linear(y, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(*y.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def project(trunk: ClipTrunk, z: Tensor) -> Tensor:
    """Output of the last block B n C -> features in the space of the texts, B n D, not normalised."""
    return trunk.post_norm(z) @ trunk.visual.proj


def features(trunk: ClipTrunk, tokens: Tensor, grid: Grid, variant: Variant) -> Tensor:
    """Return patch features B n D from the input of the last block (`embed`); n = h*w. ProxyCLIP: `proxy_features`."""
    block = trunk.blocks[-1]
    q, k, v = heads(trunk, block.ln_1(tokens))
    if variant.attention == "identity":
        mixed = v[:, :, 1:]
    else:
        mixed = attention(variant, q, k, grid)[:, :, 1:] @ v  # the class token's row is not used
    z = block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    if variant.residual:
        z = tokens[:, 1:] + z
        z = z + block.mlp(block.ln_2(z))
    return project(trunk, z)


def proxy_features(trunk: ClipTrunk, tokens: Tensor, grid: Grid, variant: Variant, patches: Tensor) -> Tensor:
    """ProxyCLIP's patch features B M D on the other network's grid.

    Args:
        patches: B C h' w', M = h'*w', its patch features of the same pixels.
    """
    block = trunk.blocks[-1]
    v = heads(trunk, block.ln_1(tokens))[2][:, :, 1:]  # B H n c
    values = v.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # B C h w
    values = resize(values, patches.shape[2:], corners=False).flatten(2).transpose(1, 2)
    mixed = proxy_attention(patches.flatten(2).transpose(1, 2), variant.beta, variant.gamma) @ values
    return project(trunk, block.attn.out_proj(mixed))


# ---- maps of images


@dataclass(frozen=True)
class DenseClip:
    """A frozen CLIP that returns a map for every text.

    Attributes:
        patches: another network's patch features; ProxyCLIP needs them (published: DINO ViT-B/8).
    """

    trunk: ClipTrunk
    variant: Variant
    patches: Patches | None = None

    def __post_init__(self) -> None:
        if (self.variant.attention == "proxy") != (self.patches is not None):
            raise ValueError("a patch encoder belongs to proxyclip, and proxyclip to one")

    @torch.no_grad()
    def grid_logits(self, x: Tensor, texts: Tensor) -> Tensor:
        """Cosine of every patch to every text.

        Args:
            x: B 3 H W, normalised; texts: Q D, L2-normalised.
        Returns:
            B Q h w, at least fp32.
        """
        tokens, grid = embed(self.trunk, x)
        if self.patches is None:
            found = features(self.trunk, tokens, grid, self.variant)
        else:
            patches = self.patches(self.pixels(x))
            found = proxy_features(self.trunk, tokens, grid, self.variant, patches)
            grid = (patches.shape[2], patches.shape[3])
        found = F.normalize(full(found), dim=-1)
        return (found @ texts.T).transpose(1, 2).unflatten(2, grid)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images back to RGB 0..255, with CLIP's exact statistics, as published; padding is CLIP's mean colour."""
        return self.trunk.pixels["clip"].undo(x)

    def whole(self, x: Tensor, texts: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps of images B 3 H W in one piece, at another size: B Q H' W'."""
        logits = self.grid_logits(x, texts)
        if self.variant.two_steps:
            logits = resize(logits, x.shape[2:], corners=False)
        return resize(logits, size, corners=False)

    def slide(self, x: Tensor, texts: Tensor, crop: int, stride: int) -> Tensor:
        """Cosines averaged over windows of images B 3 H W, at their own size: B Q H W."""
        total = x.new_zeros(len(x), len(texts), *x.shape[2:])
        count = x.new_zeros(x.shape[2:])
        for top, bottom, left, right in windows(x.shape[2], x.shape[3], crop, stride):
            window, (before_x, _, before_y, _) = padded(x[..., top:bottom, left:right], self.variant.multiple)
            logits = resize(self.grid_logits(window, texts), window.shape[2:], corners=False)
            own = logits[..., before_y : before_y + bottom - top, before_x : before_x + right - left]
            total[..., top:bottom, left:right] += own
            count[top:bottom, left:right] += 1
        return total / count


def windows(height: int, width: int, crop: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of each window, rows first; the last ones are shifted inwards, a short side is taken whole."""

    def spans(side: int) -> list[tuple[int, int]]:
        ends = [min(i * stride + crop, side) for i in range(max(side - crop + stride - 1, 0) // stride + 1)]
        return [(max(end - crop, 0), end) for end in ends]

    for top, bottom in spans(height):
        for left, right in spans(width):
            yield top, bottom, left, right


def padded(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """B 3 H W padded with zeros to multiples, half of it (rounded down) on the left and on top; (left, right, top, bottom)."""
    missing_y, missing_x = (-side % multiple for side in x.shape[2:])
    pad = (missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2)
    return F.pad(x, pad), pad


# ---- from maps to labels


def probabilities(logits: Tensor, classes: Tensor, scale: float) -> Tensor:
    """Softmax over the query words, then the largest of each class's words.

    Args:
        logits: Q H W cosines; classes: Q int64, the class of each word; scale: multiplied onto the cosines.
    Returns:
        C H W, C = largest class + 1; not normalised where a class has several words.
    """
    words = (scale * logits).softmax(0)
    index = classes.view(-1, 1, 1).expand_as(words)
    return words.new_zeros(int(classes.max()) + 1, *words.shape[1:]).scatter_reduce(0, index, words, "amax")


def decide(probability: Tensor, threshold: float = 0.0, area: float = 0.0) -> Tensor:
    """Labels H W of class probabilities C H W; among equal ones the lowest class.

    Args:
        threshold: below it a pixel is background, class 0 (0 for sets without a background class).
        area: SCLIP: foreground classes with no more than this share of all foreground pixels go to the next best class.
    """
    if area:
        counts = _argmax(probability).flatten().bincount(minlength=len(probability)).double()
        counts[0] = 0
        small = counts <= area * counts.sum()
        small[0] = False
        probability = probability * ~small.view(-1, 1, 1)
    label = _argmax(probability)
    return label.masked_fill(probability.amax(0) < threshold, 0)


def _argmax(x: Tensor) -> Tensor:
    """Over axis 0, the first of equal ones on every device."""
    index = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return torch.where(x == x.amax(0), index, len(x)).amin(0)


def pamr(guide: Tensor, maps: Tensor, steps: int, dilations: tuple[int, ...]) -> Tensor:
    """Refine maps by the similarity of neighbouring pixels (PAMR, Araslanov and Roth, CVPR 2020).

    Args:
        guide: B 3 H W, the normalised image at the size of the maps; maps: B Q H W.
        steps: number of rounds; dilations: distances of the 8 neighbours.
    Returns:
        B Q H W.
    """

    def neighbours(x: Tensor) -> Iterator[Tensor]:
        h, w = x.shape[2:]
        for d in dilations:
            wide = F.pad(x, (d, d, d, d), mode="replicate")
            for i in range(9):
                if i != 4:
                    top, left = i // 3 * d, i % 3 * d
                    yield wide[..., top : top + h, left : left + w]

    around = torch.stack(list(neighbours(guide)))
    sd = torch.cat([around, guide.expand(len(dilations), *guide.shape)]).std(0)  # unbiased, the centre once per dilation
    kernel = (-(around - guide).abs() / (1e-8 + 0.1 * sd)).mean(2).softmax(0)  # K B H W
    for _ in range(steps):
        maps = sum(weight[:, None] * x for weight, x in zip(kernel, neighbours(maps), strict=True))
    return maps
