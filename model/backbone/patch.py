"""Patch features of any timm vision transformer (DINO, DINOv2, DINOv3, SigLIP, PE, TIPS, ...) on its own grid.

Beside the CNN pyramids of `model.backbone.encoder`; an encoder normalises its own input with the statistics of its training.
"""

from collections.abc import Mapping, Sequence

import timm
import torch
from torch import Tensor, nn

from model.ops import nominal_positions
from util.errors import UserError


class PatchEncoder(nn.Module):
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
            near = timm.list_models(f"*{name.split('.')[0].rsplit('_', 1)[0]}*")[:5] or timm.list_models("vit_*_dino*")[:5]
            raise UserError(f"timm:{name}: timm cannot build it as a vision transformer of any image size ({error}); near names: "
                            f"{', '.join(near)}") from error
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

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid of cells of an image; remaining pixels at the bottom and on the right are not used.

        Raises:
            UserError: the image is smaller than a cell.
        """
        rows, columns = height // self.patch[0], width // self.patch[1]
        if not rows or not columns:
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

    def load_weights(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load timm's weights; those of a classifier's head are left out.

        Raises:
            UserError: a tensor is missing or has another shape (another patch size or grid).
        """
        own = self.body.state_dict()
        missing = [key for key in own if key not in state]
        wrong = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in own
                 if key in state and state[key].shape != own[key].shape]  # fmt: skip
        if missing or wrong:
            raise UserError(f"{name} does not fit timm:{self.hub}: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
                            f"{len(wrong)} of another shape ({', '.join(wrong[:3])})")
        self.body.load_state_dict({key: state[key] for key in own})
