"""WeCLIP, plainly: image by image, class by class, every attention map kept.

Written from the published description, as slow as that reads. It takes blocks, convolutions and linear layers from a system, for
their weights. `tests/test_oracle.py` compares the two, `python -m bench.weclip` their time.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip.trunk import attend
from model.weak.weclip import WeCLIP

DILATIONS = (1, 2, 4, 8, 12, 24)


def plain_losses(system: WeCLIP, images: Tensor, present: Tensor, rfm: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Weighted losses of a training step, and its pseudo labels B H W. images: B 3 H W RGB 0..255; present: B C bool."""
    images, o = system.normalise(images), system.options
    seen = [encode(system, image[None]) for image in images]
    hidden = [torch.cat([one[0][block] for one in seen]) for block in range(len(seen[0][0]))]
    fused, logits = system.head(hidden, tuple(side // system.vision.visual.patch for side in images.shape[2:]))
    flat = fused.flatten(2)
    affinity = (flat.transpose(1, 2) @ flat).sigmoid()
    label = torch.stack([
        pseudo_label(system, image[None], one, ids.nonzero()[:, 0].tolist(), matrix.detach() if rfm else None)
        for image, one, ids, matrix in zip(images, seen, present, affinity, strict=True)
    ])  # fmt: skip
    logits = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
    parts = [F.cross_entropy(logits, torch.where(part, label, 255), ignore_index=255) for part in (label == 0, label > 0)]
    return {"segmentation": sum(parts) / 2, "affinity": o.affinity_weight * affinity_loss(system, affinity, label)}, label


def plain_predict(system: WeCLIP, image: Tensor) -> Tensor:
    """Logits of one image 1 3 H W RGB 0..255 on the patch grid of the first scale: each view alone."""
    found = []
    for x in system.scaled(system.normalise(image)):
        for turned in (False, True):
            view = x.flip(3) if turned else x
            grid = tuple(side // system.vision.visual.patch for side in view.shape[2:])
            logits = system.head(encode(system, view)[0], grid)[1]
            found.append(logits.flip(3) if turned else logits)
    size = found[0].shape[2:]
    return sum(F.interpolate(x, size, mode="bilinear", align_corners=False) for x in found) / len(found)


@torch.no_grad()
def encode(system: WeCLIP, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and head-averaged attention after each block but the last, of one normalised image."""
    trunk = system.vision.visual
    tokens, _ = trunk.embed(image)
    hidden, maps = [], []
    for block in list(trunk.blocks)[:-1]:
        out, attention = attend(block, block.ln_1(tokens), want_map=True)
        tokens = tokens + out
        tokens = tokens + block.mlp(block.ln_2(tokens))
        hidden.append(tokens)
        maps.append(attention)
    return hidden, maps


def pseudo_label(system: WeCLIP, image: Tensor, seen: tuple[list[Tensor], list[Tensor]], labels: list[int],
                 affinity: Tensor | None) -> Tensor:  # fmt: skip
    """H W int64 of one normalised image 1 3 H W with these 0-based classes. affinity: n n of the decoder, for RFM."""
    o, (hidden, maps), size = system.options, seen, image.shape[2:]
    h, w = (side // system.vision.visual.patch for side in size)
    if not labels:
        return torch.zeros(size, dtype=torch.int64)
    cams = [class_map(system, hidden[-1], labels, target, (h, w)) for target in range(len(labels))]
    count = o.layers if affinity is None else o.rfm_layers
    attention = torch.stack([m[0, 1:, 1:] for m in [*maps, cams[0][1]][-count:]])
    if affinity is None:
        mean = attention.mean(0)
    else:
        score = [float((affinity.double() - m.double()).sum()) for m in attention]
        kept = torch.stack([m for m, s in zip(attention, score, strict=True) if s <= sum(score) / len(score)])
        mean = kept.sum(0) / (len(kept) + 1e-5) * affinity
    transition = mean.double()
    for _ in range(3):
        transition = transition / transition.sum(0, keepdim=True)
        transition = transition / transition.sum(1, keepdim=True)
    transition = (transition + transition.T) / 2
    transition = transition @ transition
    spread = []
    for cam, _ in cams:
        inside = torch.from_numpy(boxes(cam.numpy(), o.box)).flatten()
        found = ((transition * inside) @ cam.flatten().double()[:, None])[:, 0].float()
        found = found - found.min()
        found = (found / (found.max() + 1e-7)).view(1, 1, h, w)
        spread.append(F.interpolate(found, size, mode="bilinear", align_corners=False)[0, 0])
    scores = torch.stack(spread)
    scores = torch.cat([1 - scores.amax(0, keepdim=True), scores])
    best = refine(image, scores[None])[0].argmax(0)
    return torch.tensor([0, *(c + 1 for c in labels)])[best]


def class_map(system: WeCLIP, tokens: Tensor, labels: list[int], target: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Softmax Grad-CAM h w of one class among the image's labels and the background texts; attention of the last block."""
    trunk, last = system.vision.visual, system.vision.visual.blocks[-1]
    texts = torch.cat([system.foreground[labels], system.background])
    with torch.enable_grad():
        a = last.ln_1(tokens).detach().requires_grad_()
        out, attention = attend(last, a, want_map=True)
        z = tokens + out
        z = z + last.mlp(last.ln_2(z))
        feature = (trunk.post_norm(z)[:, 1:] @ trunk.visual.proj).mean(1)
        score = (system.vision.logit_scale.exp() * F.normalize(feature, dim=-1) @ texts.T).softmax(-1)[0, target]
        (gradient,) = torch.autograd.grad(score, a)
    cam = (a.detach()[0, 1:] * gradient[0, 1:].mean(0)).sum(-1).relu()
    for _ in range(2):
        cam = cam - cam.min()
        cam = cam / (cam.max() + 1e-7)
    return cam.view(grid), attention.detach()


def boxes(cam: np.ndarray, threshold: float) -> np.ndarray:
    """Union of the boxes of the components of a thresholded map h w; the last row and column never belong to one."""
    level = (255 * cam).astype(np.uint8)
    above = (level > int(threshold * level.max())).astype(np.uint8)
    out = np.zeros(cam.shape, bool)
    for left, top, width, height, _ in cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:]:
        out[top : min(top + height, cam.shape[0] - 1), left : min(left + width, cam.shape[1] - 1)] = True
    return out


def refine(image: Tensor, maps: Tensor) -> Tensor:
    """PAR of one image 1 3 H W: neighbours by dilated convolutions, 20 times. maps: 1 K H W."""
    kernel = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)

    def around(x: Tensor) -> Tensor:
        parts = [F.conv2d(F.pad(x, (d,) * 4, mode="replicate").transpose(0, 1), kernel, dilation=d) for d in DILATIONS]
        return torch.cat(parts, 1)  # K 48 H W

    near = around(image)
    sigma = near.std(1, keepdim=True)
    colour = -((near - image.transpose(0, 1)).abs() / (sigma + 1e-8) / 0.3).square().mean(0)
    far = torch.tensor([d * r for d in DILATIONS for r in (2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5)])
    place = (-(far / (far.std() + 1e-8) / 0.3).square()).softmax(0)
    weights = colour.softmax(0) + 0.01 * place[:, None, None]
    for _ in range(20):
        maps = (around(maps) * weights).sum(1)[None]
    return maps


def affinity_loss(system: WeCLIP, affinity: Tensor, label: Tensor) -> Tensor:
    """Mean over all equal and over all different pairs of near patches, summed pair by pair of images."""
    patch = system.vision.visual.patch
    cells = nn.functional.interpolate(label[:, None].float(), scale_factor=1 / patch, mode="nearest")[:, 0]
    h, w = cells.shape[1:]
    y, x = (v.flatten() for v in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= 8
    flat = cells.flatten(1)
    same = flat[:, :, None] == flat[:, None]
    equal, different = same & near, ~same & near
    return ((1 - affinity[equal]).sum() / (equal.sum() + 1) + affinity[different].sum() / (different.sum() + 1)) / 2
