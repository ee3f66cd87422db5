"""Patch features of any timm vision transformer (DINO, DINOv2, DINOv3, SigLIP, PE, TIPS, ...) on its own grid.

Beside the CNN pyramids of `model.backbone.encoder`; an encoder normalises its own input with the statistics of its training.
"""

from collections.abc import Callable, Mapping, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone.encoder import ImageEncoder
from model.ops import nominal_positions, resize
from util.errors import UserError


class PatchEncoder(ImageEncoder):
    """A timm ViT without its head.

    Args:
        name: timm's, with or without the tag of its weights (`vit_small_patch16_dinov3.lvd1689m`). Nothing is downloaded.
        published: follow the first authors' code where timm differs: DINO v1 resamples its positional table by
            `model.ops.nominal_positions`; DINOv3's checkpoint holds the periods of its rotary positions rounded to bfloat16.
    Attributes:
        channels: C of the features; patch: (rows, columns) of pixels of a cell; hub: the timm model whose weights fit.
    Raises:
        UserError: unknown name, or a network that gives no patch tokens at any image size.
    """

    def __init__(self, name: str, published: bool = False):
        super().__init__()
        try:
            body = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        except Exception as error:  # timm raises many kinds: unknown name or tag, no dynamic size
            raise UserError(f"timm:{name}: timm cannot build it as a vision transformer of any image size ({error}); choose for "
                            "instance vit_small_patch16_dinov3.lvd1689m") from error
        if not hasattr(body, "num_prefix_tokens") or not hasattr(body, "norm"):
            raise UserError(f"timm:{name} is a {type(body).__name__} and gives no patch tokens; choose a ViT, for instance "
                            "vit_small_patch16_dinov3.lvd1689m")
        self.body, self.hub, self.published = body, name, published
        self.channels, self.patch = body.num_features, tuple(body.patch_embed.patch_size)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(body.pretrained_cfg[key]).view(3, 1, 1), persistent=False)
        if published and self._periods is not None:
            self._periods.copy_(self._periods.bfloat16())

    @property
    def _periods(self) -> Tensor | None:
        return getattr(getattr(self.body, "rope", None), "periods", None)

    def normalise(self, images: Tensor) -> Tensor:
        """B 3 H W RGB 0..255 -> float, (x / 255 - mean) / std."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std

    def grid(self, height: int, width: int, rule: Callable[[float], int] = int) -> tuple[int, int]:
        """Return the grid of cells of an image, by a rule for parts of a cell: `int` leaves them out, at the bottom and right.

        Raises:
            UserError: the image is smaller than a cell.
        """
        rows, columns = rule(height / self.patch[0]), rule(width / self.patch[1])
        if height < self.patch[0] or width < self.patch[1]:
            raise UserError(f"an image of {height} x {width} pixels is smaller than a patch of {self.hub} ({self.patch[0]} x "
                            f"{self.patch[1]})")
        return rows, columns

    def forward(self, images: Tensor, factors: Sequence[float] | None = None) -> Tensor:
        """Patch tokens of the last block after the final norm; class and register tokens are dropped.

        Args:
            images: B 3 H W RGB 0..255, of any height and width.
            factors: one per block, multiplied onto the coordinates of DINOv3's rotary positions (as its training does).
        Returns:
            B C h w.
        """
        h, w = self.grid(*images.shape[2:])
        x = self.normalise(images[..., : h * self.patch[0], : w * self.patch[1]])
        absolute = self.published and self.body.pos_embed is not None and self._periods is None
        if factors is not None or absolute:
            tokens = self._step_by_step(x, (h, w), factors)
        else:
            tokens = self.body.forward_features(x)
        return tokens[:, self.body.num_prefix_tokens :].transpose(1, 2).reshape(len(x), -1, h, w)

    def _step_by_step(self, x: Tensor, grid: tuple[int, int], factors: Sequence[float] | None) -> Tensor:
        """Run timm's forward_features with our own positions."""
        body = self.body
        x = body.patch_embed(x)  # B h w C
        if factors is None:
            table, side = body.pos_embed[0], body.patch_embed.grid_size
            prefix = len(table) - side[0] * side[1]
            tokens = torch.cat([body.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
            x = tokens + torch.cat([table[:prefix], nominal_positions(table[prefix:], side, grid)])
            ropes = [{}] * len(body.blocks)
        else:
            x, _ = body._pos_embed(x)
            ropes = [{"rope": self._rope(grid, factor)} for factor in factors]
        x = body.norm_pre(x)
        for block, rope in zip(body.blocks, ropes, strict=True):
            x = block(x, **rope)
        return body.norm(x)

    def _rope(self, grid: tuple[int, int], factor: float) -> Tensor:
        """Rotary positions with coordinates times a factor, which is periods divided by it."""
        kept = self._periods.clone()
        try:
            self._periods.div_(factor)
            return self.body.rope.get_embed(shape=list(grid))
        finally:
            self._periods.copy_(kept)

    def cells(self, images: Tensor) -> Tensor:
        """Sides are resized to the nearest multiples of a patch, so that the grid covers the whole image."""
        sides = [n * p for n, p in zip(self.grid(*images.shape[2:], round), self.patch, strict=True)]
        return F.normalize(self(resize(images.to(self.mean.dtype), sides, corners=False)), dim=1)

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of timm, or DINOv3's own file (its bias of q, k and v is zero and left out)."""
        found = {}
        for key, value in state.items():
            for theirs, ours in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), ("storage_tokens", "reg_token")):
                key = key.replace(theirs, ours) if "reg_token" not in state else key
            found[f"body.{key}"] = value
        return found
