"""Patch encoders: bit-equal to timm at several grids, own statistics, and what they refuse."""

import re

import pytest
import timm
import torch

from model.backbone import Encoder, ImageEncoder, build_encoder
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


@pytest.mark.parametrize("name", ["convnext_atto", "sam2_hiera_tiny"])
@torch.no_grad()
def test_levels_are_those_of_timm(name: str) -> None:
    """A network of four levels; one that timm cannot dilate gives its last two."""
    encoder = build_encoder(f"timm:{name}", dilated=False, kind=ImageEncoder).eval()
    state = {key.removeprefix("body.").removeprefix("model."): value for key, value in encoder.state_dict().items()}
    theirs = timm.create_model(name, features_only=True).eval()
    own = theirs.state_dict()
    theirs.load_state_dict({key: state[key.removeprefix("model.")] for key in own})
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    for h, w in ((2, 2), (3, 2), (1, 4)):
        images = torch.randint(0, 256, (2, 3, 32 * h, 32 * w)).float()
        third, fourth = theirs((images - mean) / std)[-2:]
        cells = encoder.cells(images)
        assert cells.shape[2:] == third.shape[2:] == (2 * h, 2 * w)
        assert torch.equal(cells[:, : third.shape[1]], torch.nn.functional.normalize(third, dim=1) / 2**0.5)
        if isinstance(encoder, Encoder):
            maps = encoder(images)
            assert [x.shape[1] for x in maps] == [*encoder.channels] and torch.equal(maps[4], fourth)
    encoder.load_weights(timm.create_model(name).state_dict(), "timm's")


@torch.no_grad()
def test_cells_cover_the_whole_image() -> None:
    """Unit features; sides are resized to multiples of a patch, so no pixel is left out."""
    encoder = PatchEncoder("vit_tiny_patch16_224").eval()
    image = torch.rand(1, 3, 57, 39) * 255
    cells = encoder.cells(image)
    assert cells.shape == (1, 192, 4, 2)
    torch.testing.assert_close(cells.norm(dim=1), torch.ones(1, 4, 2))
    image[..., -1] = 0
    assert not torch.equal(encoder.cells(image), cells)


def test_names_of_dinov3s_own_file() -> None:
    encoder = PatchEncoder("vit_small_patch16_dinov3")
    theirs = {re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("reg_token", "storage_tokens"): value + 1
              for key, value in encoder.body.state_dict().items()}  # fmt: skip
    encoder.load_weights(theirs | {"rope_embed.periods": torch.zeros(16), "blocks.0.attn.qkv.bias": torch.zeros(1152)}, "hub.pth")
    assert torch.equal(encoder.body.blocks[3].gamma_2, theirs["blocks.3.ls2.gamma"])


def test_what_it_refuses() -> None:
    for name, says in (("vit_smal_patch16_dinov3", "near names: vit_small_patch16_dinov3"),
                       ("vit_tiny_patch16_224.none", "there are"),
                       ("naflexvit_base_patch16_gap", "cannot build it as a pyramid")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            build_encoder(f"timm:{name}", kind=ImageEncoder)
    with pytest.raises(UserError, match="one grid of features; this system needs a pyramid"):
        build_encoder("timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="resnet18"):
        PatchEncoder("resnet18")
    encoder = PatchEncoder("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="smaller than a patch"):
        encoder(torch.zeros(1, 3, 15, 64))
    state = PatchEncoder("vit_tiny_patch16_384").body.state_dict()
    with pytest.raises(UserError, match="pos_embed .*1, 577.* instead of .*1, 197"):
        encoder.load_weights(state, "other.safetensors")
