"""Open-vocabulary maps: the last block's variants against plain formulas, windows, labels, refinement."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from model.clip import Clip
from model.clip import dense as D
from model.clip.load import clip_from_state
from model.ops import resize

VISION = {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    state = CLIP(32, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=True).state_dict()
    for key, value in state.items():
        if key.endswith("in_proj_weight"):
            value.mul_(4)  # attention that is not uniform
    return clip_from_state(state).requires_grad_(False).eval()


def texts(n: int = 4) -> Tensor:
    return F.normalize(torch.randn(n, 32, generator=torch.Generator().manual_seed(1)), dim=1)


def test_plain_attention_is_clips_own_forward(clip: Clip) -> None:
    x = torch.randn(2, 3, 64, 64)
    trunk = clip.visual
    whole = trunk.run(trunk.embed(x)[0]).tokens
    expected = (trunk.post_norm(whole) @ trunk.visual.proj)[:, 1:]
    ours = D.features(trunk, *D.embed(trunk, x), D.Variant("vanilla", residual=True))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["maskclip", "sclip", "clearclip", "naclip"])
def test_variants_equal_their_formulas(clip: Clip, name: str) -> None:
    """On a grid of 3 x 5, head by head, written out."""
    trunk, variant = clip.visual, D.VARIANTS[name]
    tokens, grid = D.embed(trunk, torch.randn(1, 3, 48, 80))
    assert grid == (3, 5)
    block = trunk.blocks[-1]
    y, weight, bias = block.ln_1(tokens)[0], block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, v = ((y @ w.T + b).unflatten(1, (2, 64)) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    distance = [[(a // 5 - b // 5) ** 2 + (a % 5 - b % 5) ** 2 for b in range(15)] for a in range(15)]
    near = torch.zeros(16, 16)
    near[1:, 1:] = torch.exp(-torch.tensor(distance) / 50)
    out = []
    for h in range(2):
        qq, kk = (x[:, h] @ x[:, h].T / 8 for x in (q, k))
        weights = {"maskclip": torch.eye(16), "sclip": qq.softmax(1) + kk.softmax(1), "clearclip": qq.softmax(1),
                   "naclip": (kk + near).softmax(1)}[name]  # fmt: skip
        out.append(weights @ v[:, h])
    z = block.attn.out_proj(torch.cat(out, 1))
    if name == "sclip":
        z = tokens[0] + z
        z = z + block.mlp(block.ln_2(z))
    expected = (trunk.post_norm(z) @ trunk.visual.proj)[1:]
    torch.testing.assert_close(D.features(trunk, tokens, grid, variant)[0], expected, rtol=1e-4, atol=1e-5)


def test_proxy_attention_keeps_what_is_more_alike_than_the_mean() -> None:
    unit = F.normalize(torch.randn(2, 12, 5), dim=-1)
    ours = D.proxy_attention(torch.cat([unit[:1] * 7, unit[1:]]))  # lengths do not count
    for weights, e in zip(ours, unit, strict=True):
        g = e @ e.T
        z = 3 * (g - 1.2 * g.mean())
        torch.testing.assert_close(weights, torch.where(z < 0, 0, z.exp()) / torch.where(z < 0, 0, z.exp()).sum(1, keepdim=True))
    constant = D.proxy_attention(torch.ones(1, 6, 5))  # mean similarity 1: the published code gives NaN
    torch.testing.assert_close(constant[0], torch.eye(6))


def test_proxy_maps_on_the_other_grid(clip: Clip) -> None:
    def patches(images: Tensor) -> Tensor:
        assert images.mean() > 50  # RGB 0..255, whatever CLIP got
        return F.avg_pool2d(images, 8)

    maps = D.DenseClip(clip.visual, D.VARIANTS["proxyclip"], patches)
    x = D.normalise(torch.randint(0, 256, (2, 3, 56, 112)))
    both = maps.grid_logits(x, texts())
    assert both.shape == (2, 4, 7, 14)  # not square
    torch.testing.assert_close(both[1:], maps.grid_logits(x[1:], texts()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="patch encoder"):
        D.DenseClip(clip.visual, D.VARIANTS["proxyclip"])


@pytest.mark.parametrize(("height", "width"), [(224, 299), (300, 224), (100, 500), (90, 80), (448, 448)])
def test_windows_cover_every_pixel(height: int, width: int) -> None:
    seen, boxes = torch.zeros(height, width), list(D.windows(height, width, 224, 112))
    for top, bottom, left, right in boxes:
        assert bottom - top == min(224, height) and right - left == min(224, width)
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1 and len(set(boxes)) == len(boxes)
    assert boxes == sorted(boxes)


def test_sliding(clip: Clip) -> None:
    """One window is the whole image; several are averaged; padding is cut off again."""
    x = torch.randn(1, 3, 64, 72)
    plain = D.DenseClip(clip.visual, D.VARIANTS["sclip"])
    torch.testing.assert_close(plain.slide(x, texts(), 80, 40), resize(plain.grid_logits(x, texts()), (64, 72), corners=False))
    left, right = (resize(plain.grid_logits(part, texts()), (64, 64), corners=False) for part in (x[..., :64], x[..., 8:]))
    slid = plain.slide(x, texts(), 64, 32)
    torch.testing.assert_close(slid[..., :8], left[..., :8])
    torch.testing.assert_close(slid[..., 8:64], (left[..., 8:] + right[..., :56]) / 2)
    clear = D.DenseClip(clip.visual, D.VARIANTS["clearclip"])
    wide, pad = D.padded(x, 16)
    assert pad == (4, 4, 0, 0) and wide.shape[3] == 80
    inside = resize(clear.grid_logits(wide, texts()), (64, 80), corners=False)[..., 4:76]
    torch.testing.assert_close(clear.slide(x, texts(), 80, 40), inside)


def test_prompt_bank_equals_open_clip(clip: Clip) -> None:
    templates = [lambda c: f"a photo of a {c}.", lambda c: f"a very long photo, with many more words, of the {c}"]
    words = ["dog", "tv monitor", "dog"]
    ours = D.prompt_bank(clip.text, words, templates)
    encoded = [clip.text.clip.encode_text(open_clip.tokenize([t(w) for t in templates]), normalize=True) for w in words]
    torch.testing.assert_close(ours, torch.stack([F.normalize(rows.mean(0), dim=0) for rows in encoded]))


def test_labels() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2], [0.4, 0.1, 0.2], [0.3, 0.2, 0.2]]).view(3, 1, 3)  # two words of class 1
    p = D.probabilities(logits, torch.tensor([0, 1, 1]), 10.0)
    words = (10 * logits).softmax(0)
    torch.testing.assert_close(p, torch.stack([words[0], words[1:].amax(0)]))
    assert D.decide(p).tolist() == [[1, 0, 0]]  # equal ones: the lowest
    assert D.decide(p, threshold=0.71).tolist() == [[0, 0, 0]]

    p = torch.tensor([[0.1, 0.9, 0.1, 0.1, 0.1], [0.5, 0.05, 0.5, 0.5, 0.2], [0.4, 0.05, 0.4, 0.4, 0.7]])[:, None]
    assert D.decide(p).tolist() == [[1, 0, 1, 1, 2]]
    assert D.decide(p, area=0.25).tolist() == [[1, 0, 1, 1, 1]]  # class 2 has just a quarter of the foreground


def test_refinement_stays_within_edges() -> None:
    guide = torch.zeros(1, 3, 12, 12)
    guide[..., 6:] = 1
    maps = torch.rand(1, 2, 12, 12)
    maps[0, 1] = 0.3
    ours = D.pamr(guide, maps, 40, (1, 2))
    torch.testing.assert_close(ours[0, 1], torch.full((12, 12), 0.3))  # weights add up to one
    halves = ours[0, 0, :, :6], ours[0, 0, :, 6:]
    assert max(half.std() for half in halves) < 0.2 * maps[0, 0].std()
    changed = maps.clone()
    changed[..., 6:] += 5
    left = (D.pamr(guide, x, 3, (1, 2))[..., :3] for x in (changed, maps))
    torch.testing.assert_close(*left, atol=0.01, rtol=0)
