"""Patch encoders: bit-equal to timm at several grids, own statistics, and what they refuse."""

import pytest
import timm
import torch

from model.backbone.patch import PatchEncoder
from util.errors import UserError


def lively(encoder: PatchEncoder) -> PatchEncoder:
    """With layer scales that let the blocks be seen, and attention that is not uniform."""
    for name, parameter in encoder.named_parameters():
        if "gamma" in name:
            torch.nn.init.constant_(parameter, 0.3)
        elif name.endswith("qkv.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval()


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch16_dinov3.lvd1689m", "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_pe_spatial_tiny_patch16_512.fb",
])  # fmt: skip
@torch.no_grad()
def test_equals_timm(name: str) -> None:
    torch.manual_seed(0)
    encoder = lively(PatchEncoder(name))
    timms = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    timms.load_state_dict(encoder.body.state_dict())
    p = encoder.patch[0]
    mean, std = (torch.tensor(timms.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for h, w in ((4, 4), (5, 3), (2, 7)):
        images = torch.randint(0, 256, (2, 3, h * p + 1, w * p)).float()  # one row of pixels too many
        tokens = timms.forward_features((images[:, :, : h * p] / 255 - mean) / std)
        features = encoder(images)
        assert features.shape == (2, encoder.channels, h, w)
        assert torch.equal(features.flatten(2).transpose(1, 2), tokens[:, tokens.shape[1] - h * w :])


@torch.no_grad()
def test_published_positions() -> None:
    """DINO v1: the table itself on its own grid, another than timm's elsewhere. DINOv3: rounded periods; factor 1 is none."""
    torch.manual_seed(0)
    ours, timms = PatchEncoder("vit_tiny_patch16_224", published=True).eval(), PatchEncoder("vit_tiny_patch16_224").eval()
    timms.load_weights({**ours.body.state_dict(), "head.weight": torch.zeros(1)}, "ours")
    native, other = torch.rand(1, 3, 224, 224) * 255, torch.rand(1, 3, 64, 96) * 255
    torch.testing.assert_close(ours(native), timms(native))
    assert (ours(other) - timms(other)).abs().max() > 1e-3

    plain, rounded = (lively(PatchEncoder("vit_small_patch16_dinov3", published=flag)) for flag in (False, True))
    rounded.load_weights(plain.body.state_dict(), "ours")
    assert (plain(other) - rounded(other)).abs().max() > 1e-4
    torch.testing.assert_close(plain(other, [1.0] * 12), plain(other))
    assert (plain(other, [1.0] * 11 + [1.5]) - plain(other)).abs().max() > 1e-4
    torch.testing.assert_close(plain(other, [1.0] * 12), plain(other))  # the periods are back


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="near names: .*dinov3"):
        PatchEncoder("vit_small_patch16_dinov4")
    with pytest.raises(UserError, match="resnet18"):
        PatchEncoder("resnet18")
    encoder = PatchEncoder("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="smaller than a patch"):
        encoder(torch.zeros(1, 3, 15, 64))
    state = PatchEncoder("vit_tiny_patch16_384").body.state_dict()
    with pytest.raises(UserError, match="pos_embed .*1, 577.* instead of .*1, 197"):
        encoder.load_weights(state, "other.safetensors")
