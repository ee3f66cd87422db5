"""What must stay finite: the four systems on degenerate episodes, and the way of odd image files into a batch.

Degenerate means: empty masks, objects below a feature cell, nothing to learn from, flat pictures, sharp attention, large
weights; in fp32 and under bf16 autocast.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.clip import refine
from model.clip.cam import Cam
from model.clip.load import clip_from_state
from model.few_shot import prior as prior_module
from model.few_shot.bam import BAM
from model.few_shot.hdmnet import HDMNet
from model.few_shot.pfenet import PFENet
from model.few_shot.system import FewShot
from tests.make import pi_clip, random_episode, restore, small_clip, small_system
from util.data.episodes import Episode, EpisodeDataset, EpisodeList, collate
from util.data.folds import fold, read_class_names
from util.data.index import build_index, scan
from util.data.transforms import TrainTransform, ValTransform, bbox_mask, image_hw, read_image
from util.errors import UserError
from util.score.metrics import FewShotMeter

SYSTEMS = ("PI_CLIP", "HDMNet", "BAM", "PFENet")
NAMES = read_class_names(Path(__file__).resolve().parents[1] / "lists/pascal/classes.txt")


@cache
def system(name: str, shot: int = 2, sharpness: float = 1.0) -> FewShot:
    """A tiny system; `sharpness` multiplies the queries and keys of CLIP's attention."""
    if name != "PI_CLIP":
        return small_system(shot, system={"HDMNet": HDMNet, "BAM": BAM, "PFENet": PFENet}[name])
    state = {k: v * sharpness if "visual" in k and "in_proj_weight" in k else v for k, v in small_clip().state_dict().items()}
    return pi_clip(clip_from_state({**state, "visual.positional_embedding": state["visual.positional_embedding"] * 20}), shot)


def episode(shot: int = 2) -> Episode:
    """Two random queries of side 65, both of class 7."""
    made = random_episode(2, shot)
    generator = torch.Generator().manual_seed(1)
    made.clip_query = [torch.randint(256, (3, 48, 64), generator=generator).to(torch.uint8) for _ in range(2)]
    made.annotation_hw = torch.tensor([(45, 61)] * 2)
    return made


def flat(e: Episode, value: float) -> None:
    for images in (e.query, e.support, *e.clip_query):
        images.fill_(value)


def speck(e: Episode) -> None:
    e.support_mask.zero_()
    e.support_mask[..., 30, 31] = 1  # between the nodes of every grid


CASES: dict[str, Callable[[Episode], object]] = {
    "empty support mask": lambda e: e.support_mask.zero_(),
    "one of the shots empty": lambda e: e.support_mask[:, 1].zero_(),
    "speck": speck,
    "ignored query": lambda e: (e.query_mask.fill_(255), e.base_label.fill_(255)),
    "query without the class": lambda e: e.query_mask.zero_(),
    "support is the query": lambda e: e.support.copy_(e.query[:, None].expand_as(e.support)),
    "black": lambda e: flat(e, 0),
    "white": lambda e: flat(e, 255),
    "grey": lambda e: flat(e, 117),
}  # fmt: skip


def check_finite(model: FewShot, batch: Episode, bf16: bool) -> dict[str, Tensor]:
    """One training step's losses and gradients, one prediction and its score; returns the losses."""
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = model.losses(batch)
        prediction = model.eval().predict(batch, baselines=True)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.trained.named_parameters() if p.grad is not None}
    outputs = {"final": prediction.final, "meta": prediction.meta, "base": prediction.base} | prediction.maps
    assert gradients
    for kind, found in (("loss", losses), ("gradient", gradients), ("output", outputs)):
        wrong = [name for name, value in found.items() if value is not None and not torch.isfinite(value).all()]
        assert not wrong, f"{kind} of {wrong}"
    meter = FewShotMeter([7])
    for scores, truth in zip(prediction.final, batch.query_mask, strict=True):
        assert 0 <= meter.update(restore(scores, (65, 65), True).argmax(0), truth, 7).iou <= 1
    return losses


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_degenerate_episodes(name: str, case: str, bf16: bool) -> None:
    batch = episode()
    CASES[case](batch)
    losses = check_finite(system(name), batch, bf16)
    if case == "ignored query":
        assert losses["main"] == 0 and all(value == 0 for key, value in losses.items() if key != "distil")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_large_weights(name: str, bf16: bool) -> None:
    """Ten times too large in every layer is finite; what overflows is an error at the score and never a silent background."""
    model = system(name)
    before = {key: value.clone() for key, value in model.trained.state_dict().items()}
    try:
        for parameter in model.trained.parameters():
            parameter.data *= 10
        check_finite(model, episode(), bf16)
        for parameter in model.trained.parameters():
            parameter.data *= 1e30
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = model.eval().predict(episode())
        with pytest.raises(UserError, match="not finite"):
            restore(prediction.final, (65, 65), squash=True)
    finally:
        model.trained.load_state_dict(before)


@pytest.mark.parametrize("bf16", [False, True])
def test_sharp_attention(bf16: bool) -> None:
    """Attention that underflows leaves patches that nobody attends to: columns of zeros in the affinity."""
    check_finite(system("PI_CLIP", sharpness=1000.0), episode(), bf16)
    for affinity in (torch.zeros(1, 12, 12), torch.eye(12)[None].roll(1, 2) * (torch.arange(12) > 5)):
        refined = refine(torch.rand(1, 3, 4), affinity)
        assert torch.isfinite(refined).all() and 0 <= refined.min() <= refined.max() <= 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_cam(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Grad-CAM that is zero everywhere gives a prior of zero; a constant one something within 0..1."""
    real = prior_module.softmax_grad_cam

    def constant(*given: object, **named: object) -> Cam:
        cam = real(*given, **named)
        return cam._replace(map=torch.full_like(cam.map, value))

    monkeypatch.setattr(prior_module, "softmax_grad_cam", constant)
    check_finite(system("PI_CLIP"), episode(), bf16=False)
    prior = system("PI_CLIP").predict(episode()).maps["vtp"]
    assert prior.min() >= 0 and prior.max() <= 1 and (value or not prior.any())


@pytest.mark.parametrize("name", ["BAM", "PFENet"])
def test_copies_of_a_support_count_as_one(name: str) -> None:
    """Prototypes, priors and scene differences are means over shots. (HDMNet's matcher sums over support tokens.)"""
    one, three, single = system(name, 1), system(name, 3), episode(1)
    three.trained.load_state_dict(one.trained.state_dict(), strict=False)  # BAM's weights of shots are its own
    copies = Episode(**vars(single) | {"support": single.support.repeat(1, 3, 1, 1, 1),
                                       "support_mask": single.support_mask.repeat(1, 3, 1, 1)})  # fmt: skip
    torch.testing.assert_close(three.eval().predict(copies).final, one.eval().predict(single).final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["HDMNet", "BAM", "PFENet"])
def test_order_of_shots_does_not_matter(name: str) -> None:
    """But for what was published otherwise: HDMNet's weights of scene differences, PI-CLIP's channel for each shot."""
    model, batch = system(name, 3).eval(), episode(3)
    if name == "BAM":
        for parameter in model.trained.ensemble.kshot_rw.parameters():
            parameter.data = 5 * torch.rand_like(parameter)  # far from equal weights
    part = "meta" if name == "HDMNet" else "final"
    expected = getattr(model.predict(batch), part)
    for order in ([2, 0, 1], [1, 2, 0], [1, 0, 2]):
        other = Episode(**vars(batch) | {"support": batch.support[:, order], "support_mask": batch.support_mask[:, order]})
        torch.testing.assert_close(getattr(model.predict(other), part), expected, rtol=1e-4, atol=1e-5)


# ---- from odd files to a batch

SHAPES = ((1, 1), (1, 2), (3, 1), (1, 40), (60, 1), (8, 160), (160, 8))


@pytest.mark.parametrize("transform", [
    TrainTransform(65, 0.9, 1.1), TrainTransform(65, 0.1, 0.2, crop=True), TrainTransform(65, 0.5, 2.0, rotate=(-90, 90)),
    ValTransform(65, squash=True), ValTransform(65, squash=False),
], ids=["train", "train, crop, tiny scale", "train, turned", "squash", "letterbox"])  # fmt: skip
def test_tiny_and_thin_images(transform: TrainTransform | ValTransform, write_voc: Callable[..., tuple[Path, Path]]) -> None:
    """Files of one pixel, of one row and of 20:1 go through data set, batch, CLIP prior and score."""
    root, list_file = write_voc({f"im{i}": np.full(shape, 7, np.uint8) for i, shape in enumerate(SHAPES)})
    f = fold("pascal", 1)
    records = scan(root, list_file, NAMES, root / "cache")
    episodes = EpisodeList(build_index(records, f.novel, only=False, min_pixels=1), 2, seed=5)
    data = EpisodeDataset(episodes, f, root, transform, num_classes=20, clip_size="original", patch=16, ann_type="bbox",
                          evaluation=True)  # fmt: skip
    batch = collate([data[i] for i in range(len(SHAPES))])
    assert torch.isfinite(batch.query).all() and torch.isfinite(batch.support).all()
    assert [tuple(mask.shape) for mask in batch.original_mask] == list(SHAPES)
    batch.query_mask.clamp_(max=1)  # a crop of one pixel may be all border
    model, meter = system("PI_CLIP"), FewShotMeter([7])
    losses = model.losses(batch)
    prediction = model.eval().predict(batch)
    assert all(torch.isfinite(value) for value in losses.values()) and torch.isfinite(prediction.maps["vtp"]).all()
    for scores, truth in zip(prediction.final, batch.original_mask, strict=True):
        meter.update(restore(scores, tuple(truth.shape), transform.squash).argmax(0), truth, 7)
    assert 0 <= meter.result()["miou"] <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_of_thin_masks(shape: tuple[int, int]) -> None:
    full = np.ones(shape, np.uint8)
    assert np.array_equal(bbox_mask(full), full) and not bbox_mask(0 * full).any() and (bbox_mask(255 * full) == 255).all()


RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8), (48, 36))
GREY, ALPHA = RGB[..., 0], RNG.integers(0, 256, RGB.shape[:2]).astype(np.uint8)
THREE_GREYS = np.stack([GREY] * 3, -1)
PALETTE = Image.fromarray(RGB).quantize(16)
TURNED = Image.Exif()
TURNED[0x112] = 6  # lies on its side
FRAMES = [Image.fromarray(np.roll(RGB, i, 0)) for i in range(3)]
ANIMATION = {"save_all": True, "append_images": FRAMES[1:]}

# file name: picture, options for saving it, expected pixels, how far they may be off (lossy formats)
FORMATS: dict[str, tuple[Image.Image, dict, np.ndarray, int]] = {
    "rgb.png": (Image.fromarray(RGB), {}, RGB, 0),
    "grey.png": (Image.fromarray(GREY), {}, THREE_GREYS, 0),
    "grey.jpg": (Image.fromarray(GREY), {"quality": 100}, THREE_GREYS, 2),
    "grey_alpha.png": (Image.fromarray(np.dstack([GREY, ALPHA])), {}, THREE_GREYS, 0),
    "rgba.png": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, RGB, 0),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), {"quality": 100}, RGB, 6),
    "cmyk.tif": (Image.fromarray(RGB).convert("CMYK"), {}, RGB, 1),
    "grey16.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, THREE_GREYS, 0),
    "one_bit.png": (Image.fromarray(GREY > 128), {}, np.where(THREE_GREYS > 128, 255, 0), 0),
    "palette.png": (PALETTE, {}, np.array(PALETTE.convert("RGB")), 0),
    "palette_alpha.png": (PALETTE, {"transparency": 3}, np.array(PALETTE.convert("RGB")), 0),
    "palette.gif": (PALETTE, {}, np.array(PALETTE.convert("RGB")), 0),
    "turned.jpg": (Image.fromarray(RGB), {"exif": TURNED, "quality": 100, "subsampling": 0}, RGB, 4),
    "turned.png": (Image.fromarray(RGB), {"exif": TURNED}, RGB, 0),
    "turned.webp": (Image.fromarray(RGB), {"exif": TURNED, "lossless": True}, RGB, 0),
    "animated.png": (FRAMES[0], ANIMATION, RGB, 0),
    "animated.webp": (FRAMES[0], {**ANIMATION, "lossless": True}, RGB, 0),
    "pages.tif": (FRAMES[0], ANIMATION, RGB, 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_image_formats(name: str, tmp_path: Path) -> None:
    """H W 3 float32 RGB 0..255 as stored: a tag that turns the picture is not obeyed, for labels have none."""
    picture, options, expected, tolerance = FORMATS[name]
    picture.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)
    assert found.dtype == np.float32 and found.shape == (36, 48, 3) and found.shape[:2] == image_hw(tmp_path / name)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_colour_of_16_bits(tmp_path: Path) -> None:
    for name, depth in (("rgb16.png", RGB), ("rgba16.png", np.dstack([RGB, ALPHA]))):
        swapped = cv2.cvtColor(depth, cv2.COLOR_RGB2BGR if depth.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
        cv2.imwrite(str(tmp_path / name), swapped.astype(np.uint16) * 257)
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB)


def test_formats_without_a_meaning(tmp_path: Path) -> None:
    for name, array in (("float.tif", RGB[..., 0] / np.float32(255)), ("integers.tif", RGB[..., 0].astype(np.int32))):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: not a readable image"):
            read_image(tmp_path / name)
