"""CLIP's image tower, run block by block.

open_clip holds the weights and modules. This runner adds, for segmentation: any patch
grid, the tokens of any block, head-averaged attention maps of chosen blocks, and a stop before the last block (Grad-CAM
re-runs that one under autograd). Trained tokens may join: prompts that are new before every block, further tokens behind the
patches, and a mask of which token reads which (ZegCLIP, CLIP-RC).

Shapes: B images, N = 1 + h*w tokens (class token first, patches row-major), C width, H heads, D embedding, K prompts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import Pixels

# Pixel statistics in 0..1 units. CLIP's own; ImageNet's because published systems feed them to CLIP (PI-CLIP's VVP).
STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class Run:
    """Results of a run through the blocks, by 0-based block number."""

    tokens: Tensor  # B N C, output of the last block that ran
    hidden: dict[int, Tensor] = field(default_factory=dict)  # B N C, raw residual outputs
    attention: dict[int, Tensor] = field(default_factory=dict)  # B N N, softmax averaged over heads, row = query


def attend(block: nn.Module, x_BNC: Tensor, want_map: bool = False, allowed: Tensor | None = None
           ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Self-attention of one residual block on an input that already went through its ln_1.

    Args:
        allowed: N N bool, True where the query (row) may read the key (column); every row needs one. None: everywhere.
    Returns:
        (B N C, head-averaged attention B N N or None). Without the map the attention matrix is never materialised.
    """
    attn = block.attn
    B, N, C = x_BNC.shape
    qkv = F.linear(x_BNC, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(B, N, 3, attn.num_heads, C // attn.num_heads).permute(2, 0, 3, 1, 4)  # each B H N c
    attention = None
    if want_map:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        probability = (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))).softmax(-1)
        out = probability.to(v.dtype) @ v
        attention = probability.mean(1)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return attn.out_proj(out.transpose(1, 2).reshape(B, N, C)), attention


class ClipTrunk(nn.Module):
    """The image tower of a CLIP model, `visual` being open_clip's VisionTransformer."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.pixels = nn.ModuleDict({name: Pixels(*statistics) for name, statistics in STATISTICS.items()})

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    @property
    def patch(self) -> int:
        return self.visual.patch_size[0]

    def normalise(self, images: Tensor, statistics: str = "clip") -> Tensor:
        """B 3 H W RGB 0..255 (any dtype) -> float, (x - mean) / std with "clip" or "imagenet" statistics."""
        return self.pixels[statistics](images)

    def position(self, grid: tuple[int, int]) -> Tensor:
        """(1 + h*w) C positional table for a patch grid: bilinear, no corners, no antialias; class slot unchanged."""
        table = self.visual.positional_embedding
        side = self.visual.grid_size
        if tuple(grid) == tuple(side):
            return table
        patches = table[1:].T.reshape(1, -1, *side)
        patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:1], patches.flatten(2)[0].T])

    def embed(self, images: Tensor, *, class_twice: bool = False, extra: Tensor | None = None
              ) -> tuple[Tensor, tuple[int, int]]:  # fmt: skip
        """Normalised images B 3 H W of any size -> (tokens B N C after ln_pre, patch grid (H // patch, W // patch)).

        Args:
            class_twice: add the class embedding a second time, as DenseCLIP and its successors do; published weights need it.
            extra: M C, further tokens behind the patches, with their position; ln_pre follows. N grows by M.
        """
        patches = self.visual.conv1(images)
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)
        cls = self.visual.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
        tokens = torch.cat([2 * cls if class_twice else cls, tokens], dim=1) + self.position(grid)
        if extra is not None:
            tokens = torch.cat([tokens, extra.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        return self.visual.ln_pre(tokens), grid

    def run(
        self,
        tokens: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        keep_hidden: Collection[int] = (),
        keep_attention: Collection[int] = (),
        prompts: Callable[[int], Tensor] | None = None,
        allowed: Tensor | None = None,
    ) -> Run:
        """Run blocks start..stop-1 (default: all) on B N C tokens, and keep the results asked for.

        Args:
            prompts: block number -> B K C. They take places 1..K before that block, and replace the last block's prompts.
            allowed: see `attend`; counts the prompts.
        """
        run, prompted = Run(tokens), 0
        for i in range(start, len(self.blocks) if stop is None else stop):
            block = self.blocks[i]
            if prompts is not None:
                own = prompts(i).to(run.tokens.dtype)
                run.tokens = torch.cat([run.tokens[:, :1], own, run.tokens[:, 1 + prompted :]], dim=1)
                prompted = own.shape[1]
            out, attention = attend(block, block.ln_1(run.tokens), i in keep_attention, allowed)
            run.tokens = run.tokens + out
            run.tokens = run.tokens + block.mlp(block.ln_2(run.tokens))
            if i in keep_hidden:
                run.hidden[i] = run.tokens
            if attention is not None:
                run.attention[i] = attention
        return run

    def post_norm(self, tokens: Tensor) -> Tensor:
        """ln_post on B N C tokens; the caller pools, then multiplies with `visual.proj` (C D)."""
        return self.visual.ln_post(tokens)
