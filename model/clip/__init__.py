"""Frozen CLIP: image tokens and attention maps, text banks, Grad-CAM and its refinement by attention.

    load_clip(path)                 -> Clip (visual: ClipTrunk, text: TextEncoder)
    clip.visual.run(tokens, ...)    -> tokens of any block, head-averaged attention of the blocks asked for
    clip.text.bank(texts)           -> one L2-normalised row per text
    softmax_grad_cam(...)           -> batched class activation maps
    ResNetCam, ViTCam               -> the same behind one interface, CamSource, for either kind of image tower
    dense.DenseClip(trunk, variant) -> training-free maps of any text: MaskCLIP, SCLIP, NACLIP, ClearCLIP, ProxyCLIP
    refine(cam, attention)          -> PI-CLIP's high-order relations applied to a map
"""

from model.clip.affinity import box_mask, high_order, min_max, normalise_affinity, propagate, refine, symmetric
from model.clip.cam import Cam, CamSource, ResNetCam, ViTCam, softmax_grad_cam
from model.clip.load import Clip, load_clip
from model.clip.resnet import ResNetTower
from model.clip.trunk import ClipTrunk

__all__ = [
    "Cam", "CamSource", "Clip", "ClipTrunk", "ResNetCam", "ResNetTower", "ViTCam", "box_mask", "high_order", "load_clip",
    "min_max", "normalise_affinity", "propagate", "refine", "softmax_grad_cam", "symmetric",
]
