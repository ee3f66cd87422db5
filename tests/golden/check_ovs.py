"""Measures every array of the open-vocabulary files (MaskCLIP, SCLIP, NACLIP, ClearCLIP, ProxyCLIP) against our maps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from torch import Tensor

from model.backbone import PatchEncoder
from model.clip import Clip
from model.clip import dense as D
from model.clip.load import clip_from_state
from model.ops import resize
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare
from util.data.transforms import working_size

Arrays = dict[str, np.ndarray]
ARCHES = {  # names of NACLIP's and ClearCLIP's variants
    "vanilla": "vanilla", "csa": "qq+kk", "kk": "kk", "naclip": "neighbour", "nonly": "gaussian",
    "MaskCLIP": "identity", "SCLIP": "qq+kk", "ClearCLIP": "qq",
}  # fmt: skip
TEMPLATES = open_clip.OPENAI_IMAGENET_TEMPLATES


@lru_cache(maxsize=1)
def filled_clip(salt: int, scale: float) -> Clip:
    """CLIP ViT-B/16, the attention of all image blocks but the last sharpened by a factor."""
    model = open_clip.get_model_config("ViT-B-16-quickgelu")
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in open_clip.model.CLIP(**model).state_dict().items() if k != "attn_mask"}
    last, state = model["vision_cfg"]["layers"] - 1, {}
    for name, shape in shapes.items():
        state[name] = tensor_for(name, shape, salt)
        if name.startswith("visual.") and name.endswith("attn.in_proj_weight") and f".{last}." not in name:
            state[name] *= scale
    return clip_from_state(state).requires_grad_(False).eval()


@lru_cache(maxsize=2)
def bank(salt: int, scale: float, words: tuple[str, ...], kind: torch.dtype) -> Tensor:
    clip = filled_clip(salt, scale).to(kind)
    return D.prompt_bank(clip.text, words)


def filled_dino(arrays: Arrays) -> PatchEncoder:
    encoder = PatchEncoder("vit_base_patch8_224.dino", published=True)
    state = {}
    for name, value in encoder.body.state_dict().items():
        factor = float(arrays["scale_dino_qkv"]) if name.endswith("attn.qkv.weight") else 1.0
        factor = float(arrays["scale_dino_pos"]) if name == "pos_embed" else factor
        state[name] = factor * tensor_for(f"dino.{name}", value.shape, int(arrays["salt"]))
    encoder.load_weights(state, "golden")
    return encoder.requires_grad_(False).eval()


class Case:
    """A file with the model it describes, in fp32 or fp64."""

    def __init__(self, arrays: Arrays, kind: torch.dtype = torch.float32):
        self.arrays, self.system = arrays, str(arrays["system"])
        salt, scale = int(arrays["salt"]), float(arrays["scale_visual_in_proj"])
        self.words = tuple(str(word) for word in arrays["queries"])
        self.clip = filled_clip(salt, scale).to(kind)
        self.texts = bank(salt, scale, self.words, kind)
        patches = filled_dino(arrays).to(kind) if self.system == "proxyclip" else None
        self.maps = D.DenseClip(self.clip.visual, D.VARIANTS[self.system], patches)
        self.classes = torch.from_numpy(arrays["query_idx"])
        image = torch.from_numpy(arrays["net_image_u8"]).permute(2, 0, 1)[None]
        self.x = D.normalise(image.to(kind))
        self.size = arrays["photo"].shape[:2]
        self.crop, self.stride = int(arrays["slide_crop"]), int(arrays["slide_stride"])

    def windows(self) -> list[tuple[Tensor, tuple[int, int, int, int]]]:
        boxes = D.windows(*self.x.shape[2:], self.crop, self.stride)
        return [D.padded(self.x[..., t:b, left:right], self.maps.variant.multiple) for t, b, left, right in boxes]

    def variant(self, **changes: object) -> D.DenseClip:
        return replace(self.maps, variant=replace(self.maps.variant, **changes))


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


@torch.no_grad()
def check_ovs(path: Path) -> Iterator[Row]:
    arrays = load(path)
    case = Case(arrays)
    yield from check_texts(case)
    yield from check_inputs(case)
    yield from check_last_block(case)
    yield from check_variants(case)
    if case.system == "proxyclip":
        yield from check_proxy(case)
    logits = torch.cat([case.maps.grid_logits(window, case.texts) for window, _ in case.windows()])
    yield compare("window_logits", logits, arrays["window_logits"], 2.5e-4)
    slide = resize(case.maps.slide(case.x, case.texts, case.crop, case.stride), case.size, corners=False)[0]
    yield compare("slide_logits", slide[:, ::4, ::4], arrays["slide_logits"], 2e-4)
    yield from check_labels(case, slide)
    if "whole_grid" in arrays:
        yield from check_whole(case, slide)
    yield from check_double(arrays)


def check_texts(case: Case) -> Iterator[Row]:
    prompts = [template(word) for word in case.words for template in TEMPLATES]
    tokens = case.clip.text.tokens(prompts).view(len(case.words), len(TEMPLATES), -1)
    used = case.arrays["tokens"].shape[2]
    yield compare("tokens", tokens[..., :used], case.arrays["tokens"], 0)
    yield compare("text_raw0", D.encode(case.clip.text.clip, tokens[0])[:, ::8], case.arrays["text_raw0"], 1e-5)
    yield compare("text", case.texts, case.arrays["text"], 1e-6)


def check_inputs(case: Case) -> Iterator[Row]:
    photo = case.arrays["photo"]
    height, width = working_size(*photo.shape[:2], int(case.arrays["short_side"]))
    yield compare("net_image_u8", cv2.resize(photo, (width, height)), case.arrays["net_image_u8"], 0)
    yield compare("input", case.x[0, :, ::7, ::7], case.arrays["input"], 1e-5)
    windows = case.windows()
    yield compare("window_hw", np.array([window.shape[2:] for window, _ in windows]), case.arrays["window_hw"], 0)
    if "pad0" in case.arrays:
        yield compare("pad0", np.array(windows[0][1]), case.arrays["pad0"], 0)


def check_last_block(case: Case) -> Iterator[Row]:
    trunk, variant, (window, _) = case.clip.visual, case.maps.variant, case.windows()[0]
    tokens, grid = D.embed(trunk, window)
    y = trunk.blocks[-1].ln_1(tokens)
    yield compare("last_ln1", y[0, ::4, ::8], case.arrays["last_ln1"], 1e-2)
    if case.maps.patches is not None:
        other = case.maps.patches(case.maps.pixels(window))
        weights = D.proxy_attention(other.flatten(2).transpose(1, 2))
        found = D.proxy_features(trunk, tokens, grid, variant, other)
        yield compare("attn_last", weights[:, ::4], case.arrays["attn_last"], 5e-6)
    else:
        q, k, _ = D.heads(trunk, y)
        weights = D.attention(variant, q, k, grid)[0, case.arrays["attn_last_heads"], ::4]
        found = D.features(trunk, tokens, grid, variant)
        yield compare("attn_last", weights, case.arrays["attn_last"], 2e-3)
    yield compare("feat", found[0, :, ::4], case.arrays["feat"], 2e-2)
    if "omega_row" in case.arrays:
        yield compare("omega_row", D.neighbour_bias(grid, variant.std)[::13], case.arrays["omega_row"], 1e-6)


def changes(name: str) -> dict[str, object]:
    """What the name of a `var_` array says of its variant."""
    parts = name.removeprefix("var_").split("_")
    if parts[0].startswith("beta"):
        return {"beta": float(parts[0].removeprefix("beta")), "gamma": float(parts[1].removeprefix("gamma"))}
    if len(parts) == 1:  # SCLIP
        return {"attention": ARCHES[parts[0]], "residual": True}
    if len(parts) == 3:  # NACLIP
        return {"residual": parts[0] == "vanilla", "attention": ARCHES[parts[1]], "std": float(parts[2])}
    return {"attention": ARCHES[parts[0]], "residual": parts[1] == "res"}


def check_variants(case: Case) -> Iterator[Row]:
    window = case.windows()[0][0]
    for name in (key for key in case.arrays if key.startswith("var_")):
        logits = case.variant(**changes(name)).grid_logits(window, case.texts)
        yield compare(name, logits[0].flatten(1), case.arrays[name], 2.5e-4)


def check_proxy(case: Case) -> Iterator[Row]:
    arrays, (window, _) = case.arrays, case.windows()[0]
    pixels = case.maps.pixels(window)
    yield compare("dino_input", case.maps.patches.normalise(pixels)[0, :, ::7, ::7], arrays["dino_input"], 1e-5)
    found = case.maps.patches(pixels).flatten(2).transpose(1, 2)
    yield compare("dino_feat", found[0, ::3, ::8], arrays["dino_feat"], 1e-4)
    yield compare("sim_mean", mean_similarity(found), arrays["sim_mean"], 2e-6)
    kept = (D.proxy_attention(found)[0] > 0).numpy()
    yield compare("keep_count", kept.sum(), arrays["keep_count"], 0)
    yield compare("keep", np.packbits(kept), arrays["keep"], 0)
    odd = odd_window(case)
    yield compare("odd_hw", np.array(odd.shape[2:]), arrays["odd_hw"], 0)
    yield compare("odd_sim_mean", mean_similarity(case.maps.patches(case.maps.pixels(odd)).flatten(2).transpose(1, 2)),
                  arrays["odd_sim_mean"], 2e-6)  # fmt: skip
    logits = case.variant(beta=float(arrays["odd_beta"])).grid_logits(odd, case.texts)
    yield compare("odd_logits", logits[0], arrays["odd_logits"], 2e-4)
    nan = case.maps.grid_logits(odd, case.texts).isnan().sum()
    yield compare("NaN where the published code has them", nan, np.array(0), 0)


def mean_similarity(patches: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(patches[0], dim=-1)
    return (unit @ unit.T).mean()


def odd_window(case: Case) -> Tensor:
    side = int(case.arrays["odd_side"])
    return D.padded(case.x[..., :side, :side], case.maps.variant.multiple)[0]


def label_rows(name: str, ours: Tensor, case: Case, sure: str = "") -> Iterator[Row]:
    """Pixels that differ: none of the sure ones, at most 60 in all."""
    sure = sure or name.replace("_label", "_sure")
    wrong = ours.numpy() != case.arrays[name]
    yield Row(f"{name} (sure pixels)", float((wrong & (case.arrays[sure] > 0)).sum()), 0)
    yield Row(f"{name} (pixels)", float(wrong.sum()), 60)


def check_labels(case: Case, slide: Tensor) -> Iterator[Row]:
    arrays, classes = case.arrays, case.classes
    scale, threshold = float(arrays["logit_scale"]), float(arrays["prob_thd"])
    first = torch.tensor([int((classes == c).nonzero()[0]) for c in range(int(classes.max()) + 1)])

    def divided(p: Tensor) -> Tensor:
        return p / p.sum(0) if case.system == "naclip" else p

    found = {
        "": D.probabilities(slide, classes, scale),
        "default_": D.probabilities(slide, classes, 40.0),
        "nobg_": D.probabilities(slide[classes > 0], classes[classes > 0] - 1, scale),
        "nosyn_": D.probabilities(slide[first], classes[first], scale),
    }
    for name, p in found.items():
        yield compare(f"{name}probs", divided(p)[:, ::4, ::4], arrays[f"{name}probs"], 2e-4 if name == "default_" else 2e-3)
        label = f"{name or 'plain_'}label"
        yield from label_rows(label, D.decide(p), case, "plain_sure" if name == "default_" else "")
    yield from label_rows("thd_label", D.decide(found[""], threshold), case)
    if "area_label" in arrays:
        yield from label_rows("area_label", D.decide(found[""], threshold, float(arrays["area_thd"])), case)


def check_whole(case: Case, slide: Tensor) -> Iterator[Row]:
    arrays, scale = case.arrays, float(case.arrays["logit_scale"])
    naclip = case.system == "naclip"
    yield compare("whole_grid", case.maps.grid_logits(case.x, case.texts)[0], arrays["whole_grid"], 3e-4)
    whole = case.maps.whole(case.x, case.texts, case.size)[0]
    yield compare("whole_logits", whole[:, ::4, ::4], arrays["whole_logits"], 3e-4)
    guide = resize(case.x, case.size, corners=False)
    steps, dilations = int(arrays["pamr_steps"]), tuple(arrays["pamr_dilations"].tolist())
    refined = D.pamr(guide, (whole if naclip else slide)[None], steps, dilations)
    yield compare("pamr_logits", refined[0, :, ::4, ::4], arrays["pamr_logits"], 2e-4)
    p, threshold = D.probabilities(refined[0], case.classes, scale), float(arrays["prob_thd"])
    yield from label_rows("pamr_label", D.decide(p, 0.0 if naclip else threshold), case)
    if naclip:
        yield compare("pamr_guide", guide[0, :, ::4, ::4], arrays["pamr_guide"], 1e-4)
        yield compare("pamr_probs", (p / p.sum(0))[:, ::4, ::4], arrays["pamr_probs"], 2e-3)
        yield from label_rows("whole_label", D.decide(D.probabilities(whole, case.classes, scale), threshold), case)


def check_double(arrays: Arrays) -> Iterator[Row]:
    """The same in fp64, where only another formula makes a difference."""
    case = Case(arrays, torch.float64)
    try:
        makers: dict[str, Callable[[], Tensor]] = {
            "f64_window_logits": lambda: torch.cat([case.maps.grid_logits(window, case.texts) for window, _ in case.windows()]),
            "f64_whole_grid": lambda: case.maps.grid_logits(case.x, case.texts)[0],
            "f64_odd_logits": lambda: case.variant(beta=float(arrays["odd_beta"])).grid_logits(odd_window(case), case.texts)[0],
        }
        for name, make in makers.items():
            if name in arrays:
                yield compare(name, make(), arrays[name], 1e-8)
    finally:
        case.clip.float()
