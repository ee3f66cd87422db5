"""Published checkpoints of zero-shot systems, as tests make them."""

import torch
from torch import Tensor

from model.zero_shot.clip_rc import CLIP_RC
from model.zero_shot.zegclip import ZegCLIP


def published(system: ZegCLIP) -> dict[str, Tensor]:
    """A whole published state dict: trained parts, parts without use, CLIP's two towers."""
    visual = system.trunk.visual
    state = {system.official_name(f"head.{name}"): torch.randn_like(value) for name, value in system.trained_state().items()}
    state |= {f"backbone.{name}": value.half().float() for name, value in visual.state_dict().items()}
    state |= {f"text_encoder.{name}": value for name, value in system.clip.module.text.clip.state_dict().items()
              if name != "logit_scale"}  # fmt: skip
    state["backbone.positional_embedding"] = system.trunk.position((6, 6))
    state["backbone.region_level_bridge"] = (visual.class_embedding + visual.positional_embedding[0]).repeat(16, 1)
    stream = "decoder_q" if isinstance(system, CLIP_RC) else "decoder_1"
    dead = ("self_attn.in_proj_weight", "norm1.bias") + (() if isinstance(system, CLIP_RC) else ("linear1.weight",))
    return state | {f"decode_head.{stream}.layers.2.{name}": torch.zeros(3) for name in dead}
