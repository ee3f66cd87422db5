"""The one door to all encoders: from the name in a config to a network."""

from difflib import get_close_matches
from typing import TypeVar

import timm
import torch
from torch import Tensor

from model.backbone.encoder import Encoder, ImageEncoder, ResNetEncoder, VGGEncoder
from model.backbone.patch import PatchEncoder
from model.backbone.timm_cnn import OTHERS, LevelEncoder, TimmEncoder
from util.errors import UserError

KINDS = "resnet50, resnet101, vgg16_bn, vgg16 or timm:NAME"


Kind = TypeVar("Kind", bound=ImageEncoder)


def build_encoder(backbone: str, width: int = 64, stem: str = "deep", dilated: bool = True, kind: type[Kind] = Encoder,
                  published: bool = False) -> Kind:  # fmt: skip
    """Build `resnet50`, `resnet101` (of any base width; 64 is published), `vgg16_bn`, `vgg16` or `timm:NAME`.

    A CNN of timm is a pyramid; a vision transformer, or a network that timm cannot dilate, gives one grid.

    Args:
        stem: deep or plain, of a ResNet.
        dilated: stages 3 and 4 of a pyramid keep stride 8 (VGG ignores it).
        kind: what is needed of it: `Encoder`, a pyramid, or `ImageEncoder`, one grid, which a pyramid gives too.
        published: see `PatchEncoder`.
    Raises:
        UserError: unknown name, or a network of another kind.
    """
    if backbone in ("resnet50", "resnet101"):
        return ResNetEncoder(int(backbone.removeprefix("resnet")), width, stem == "deep", dilated)
    if backbone in VGGEncoder.SPLITS:
        return VGGEncoder(backbone)
    if not backbone.startswith("timm:"):
        raise UserError(f"Method.backbone = {backbone!r}: choose {KINDS}")
    name, pyramid = backbone.removeprefix("timm:"), issubclass(kind, Encoder)
    patches = gives_patches(name)
    if patches and pyramid:
        raise UserError(f"Method.backbone = {backbone!r} gives {PatchEncoder.reads}; this system needs {kind.reads}. Systems "
                        f"that train nothing take it, and priors beside a CNN (Method.patches={backbone}). {OTHERS}")
    if patches:
        return PatchEncoder(name, published)
    try:
        return TimmEncoder(name, dilated)
    except UserError as error:
        if pyramid:
            raise
        try:
            return LevelEncoder(name)
        except UserError as other:
            raise UserError(f"{error}. {other}") from error


def gives_patches(name: str) -> bool:
    """Return whether a network of timm is a vision transformer. (Nothing is allocated for it.)

    Raises:
        UserError: timm has no such network, or no such weights of it; the message has near names.
    """
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise UserError(f"timm has no network {arch!r} (timm:{name}); near names: {near(arch, timm.list_models())}")
    tagged = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in tagged:
        raise UserError(f"timm has no weights {tag!r} of {arch} (timm:{name}); there are {', '.join(tagged) or 'none'}")
    try:
        with torch.device("meta"):
            body = timm.create_model(name)
    except Exception:  # some networks compute with their tensors while they are built; none of them is a plain ViT
        return False
    return all(hasattr(body, part) for part in ("num_prefix_tokens", "patch_embed", "norm", "blocks"))


def near(name: str, known: list[str]) -> str:
    """Return up to five known names like a name."""
    return ", ".join(get_close_matches(name, known, n=5, cutoff=0.5)) or "none"


def hub_state(encoder: ImageEncoder) -> dict[str, Tensor]:
    """Return the published weights of this encoder from timm's hub (downloaded once into the hub's own cache).

    Raises:
        UserError: the hub cannot be reached, or does not give them without an account.
    """
    try:
        return timm.create_model(encoder.hub, pretrained=True).state_dict()
    except Exception as error:  # network, hub and file errors of several libraries
        raise UserError(f"the weights of {encoder.hub} are not here: timm could not fetch them ({error}). {origin(encoder)} "
                        "Without network, give a file (Method.backbone_weight=initmodel/NAME.safetensors) or train from scratch "
                        "(=none)") from error


def origin(encoder: ImageEncoder) -> str:
    """Say where the weights of an encoder come from, and under which licence."""
    found = timm.get_pretrained_cfg(encoder.hub, allow_unregistered=True)
    if found is None:
        return ""
    licence = f", licence {found.license}" if found.license else ""
    gated = " (accept it at Meta first; a copy of yours is a file)" if "dinov3" in (found.license or "") else ""
    return f"They are {found.hf_hub_id or encoder.hub} of the Hugging Face hub{licence}{gated}."
