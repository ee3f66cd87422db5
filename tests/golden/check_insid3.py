"""Measures every array of the INSID3 files against our segmentation on the same deterministic weights."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.backbone import PatchEncoder
from model.few_shot import insid3 as I
from model.few_shot.contrast import contrast
from model.ops import resize
from tests.golden.rows import Row, compare
from util.data.wrong_supports import wrong_supports

Arrays = dict[str, np.ndarray]
NETWORKS = {384: "small", 768: "base", 1024: "large"}


def tensor_for(name: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """Weights as README_insid3.md defines them; not those of `fill.py`."""
    leaf = name.rpartition(".")[2]
    mean, sd = 0.0, 1 / np.sqrt(np.prod(shape[1:]))
    if leaf in ("cls_token", "reg_token"):
        sd = 1.0
    elif len(shape) == 1:
        mean, sd = {"weight": (1, 0.1), "gamma_1": (0.3, 0.03), "gamma_2": (0.3, 0.03)}.get(leaf, (0, 0.05))
    value = np.random.default_rng([zlib.crc32(name.encode()), salt]).normal(mean, sd, shape)
    if name.endswith("attn.qkv.weight"):
        value[: len(value) * 2 // 3] *= 3
    return torch.from_numpy(value.astype(np.float32))


def filled(arrays: Arrays, published: bool = False) -> PatchEncoder:
    name = f"vit_{NETWORKS[len(arrays['prototype'])]}_patch16_dinov3.lvd1689m"
    encoder = PatchEncoder(name, published)
    own = encoder.body.state_dict()
    encoder.load_weights({key: tensor_for(key, value.shape, int(arrays["salt"])) for key, value in own.items()}, "golden")
    return encoder.requires_grad_(False).eval()


def binary(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array > 0)


def square(mask: Tensor, side: int) -> Tensor:
    """Binary mask H W -> S S bool, nearest."""
    return F.interpolate(mask.float()[None, None], (side, side), mode="nearest")[0, 0] > 0


def equal(name: str, ours: Tensor | np.ndarray | int, reference: np.ndarray) -> Row:
    return compare(name, np.asarray(ours).astype(np.int64), np.asarray(reference), 0)


class Case:
    def __init__(self, arrays: Arrays):
        self.arrays, self.side, self.shots = arrays, int(arrays["side"]), int(arrays["shots"])
        self.system = self.system_of(filled(arrays), float(arrays["tau"]))
        names = ["query_image", *(f"support_image_{k}" for k in range(self.shots))]
        self.images = torch.stack([self.pixels(name) for name in names])
        self.masks = torch.stack([square(binary(arrays[f"support_mask_{k}"]), self.side) for k in range(self.shots)])
        self.unit = self.system.features(self.images)
        self.target, self.supports = self.unit[0], self.unit[1:]
        self.found = self.system.find(self.target, self.supports, self.masks)

    def system_of(self, encoder: PatchEncoder, tau: float, factors: list[float] | None = None) -> I.INSID3:
        arrays = self.arrays
        return I.INSID3(encoder, self.side, int(arrays["svd_components"]), tau, float(arrays["merge_threshold"]), factors)

    def pixels(self, name: str) -> Tensor:
        image = Image.fromarray(self.arrays[name]).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@torch.no_grad()
def check_insid3(path: Path) -> Iterator[Row]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    case = Case(arrays)
    yield from check_features(case)
    yield from check_debiased(case)
    yield from check_candidates(case)
    yield from check_regions(case)
    yield from check_result(case)
    yield from check_contrast(case)
    if "train_factors" in arrays:
        yield from check_training_basis(case)
    if "bf16_periods_raw_query" in arrays:
        raw = filled(arrays, published=True)(case.images[:1])[0, ::16]
        yield compare("bf16_periods_raw_query", raw, arrays["bf16_periods_raw_query"], 5e-4)
    if "unit_cluster_in" in arrays:
        yield from check_units(arrays)
        yield from check_none(case)
        wrong = wrong_supports(arrays["wrong_class"].tolist(), arrays["wrong_query"].tolist(), arrays["wrong_support"].tolist())
        yield equal("wrong_index", np.array(wrong), arrays["wrong_index"])


def check_features(case: Case) -> Iterator[Row]:
    arrays, encoder = case.arrays, case.system.encoder
    inputs = encoder.normalise(case.images)
    yield compare("query_input", inputs[0, :, ::8, ::8], arrays["query_input"], 2e-6)
    yield compare("support_input_0", inputs[1, :, ::8, ::8], arrays["support_input_0"], 2e-6)
    raw = encoder(case.images)
    yield compare("raw_query", raw[0, ::8], arrays["raw_query"], 5e-4)
    ordered = torch.cat([raw[1:], raw[:1]]).flatten(1).double()
    statistics = torch.stack([ordered.mean(1), ordered.std(1, correction=0)], 1)
    yield compare("raw_mean_std", statistics, arrays["raw_mean_std"], 1e-5)
    yield compare("feat_query", case.target, arrays["feat_query"], 5e-5)
    yield equal("query_mask_side", square(binary(arrays["query_mask"]), case.side), arrays["query_mask_side"])
    for k in range(case.shots):
        stride = case.supports.shape[1] // len(arrays[f"feat_support_{k}"])
        yield compare(f"feat_support_{k}", case.supports[k, ::stride], arrays[f"feat_support_{k}"], 5e-5)
        yield equal(f"support_mask_side_{k}", case.masks[k], arrays[f"support_mask_side_{k}"])
        grid = I.grid_mask(case.masks[k], case.target.shape[1:])
        yield equal(f"support_mask_grid_{k}", grid, arrays[f"support_mask_grid_{k}"])


def check_debiased(case: Case) -> Iterator[Row]:
    arrays, P = case.arrays, case.system.projector
    black = case.system.features(torch.zeros_like(case.images[:1]))[0]
    yield compare("black_feat", black[::8], arrays["black_feat"], 5e-5)
    centred = black.flatten(1).double()
    values = torch.linalg.svdvals(centred - centred.mean(1, keepdim=True))
    yield compare("black_singular_values", values, arrays["black_singular_values"], 1e-4)
    yield from check_projector("projector", P, arrays, 5e-5)
    if "projector_upper" in arrays:
        yield compare("projector_upper", P[tuple(torch.triu_indices(*P.shape))], arrays["projector_upper"], 5e-5)
    debiased = I.debias(case.unit, P)
    yield compare("deb_query", debiased[0, ::6], arrays["deb_query"], 5e-5)
    for k in range(case.shots):
        yield compare(f"deb_support_{k}", debiased[1 + k, ::16], arrays[f"deb_support_{k}"], 5e-5)
    yield compare("prototype_shot", case.found.prototypes, arrays["prototype_shot"], 1e-5)
    yield compare("prototype", case.found.prototype, arrays["prototype"], 1e-5)


def check_projector(name: str, P: Tensor, arrays: Arrays, tolerance: float) -> Iterator[Row]:
    yield compare(name, P[::6, ::6], arrays[name], tolerance)
    yield compare(f"{name}_diagonal", P.diagonal(), arrays[f"{name}_diagonal"], tolerance)


def check_candidates(case: Case) -> Iterator[Row]:
    arrays, found, shape = case.arrays, case.found.candidates, case.target.shape[1:]
    debiased = I.debias(case.unit, case.system.projector).flatten(2)
    similarity = debiased[1:].transpose(1, 2) @ debiased[0]  # K, support cell, target cell
    yield compare("sim_forward", found.similarity, arrays["sim_forward"], 5e-5)
    yield compare("sim_0", similarity[0, ::7, ::7], arrays["sim_0"], 5e-5)
    best = similarity.amax(1)
    ours, theirs = (similarity.gather(1, index.flatten(1)[:, None])[:, 0]
                    for index in (found.nearest, torch.from_numpy(arrays["best_index"]).long()))  # fmt: skip
    yield compare("best_index (similarity there)", ours, best.numpy(), 5e-5)
    yield compare("best_index (similarity at the file's)", theirs, best.numpy(), 5e-5)
    cells = torch.stack([I.grid_mask(mask, shape) for mask in case.masks]).flatten(1)[..., None]
    for name, inside in (("best_foreground", cells), ("best_background", ~cells)):
        value = similarity.masked_fill(~inside, float("-inf")).amax(1).view(-1, *shape)
        yield compare(name, value, arrays[name], 5e-5)
    for name, value in (("votes", found.votes), ("forward", found.forward), ("backward", found.backward),
                        ("candidates", found.cells)):  # fmt: skip
        yield equal(name, value, arrays[name])
    for k in range(case.shots):
        if f"alone_candidates_{k}" in arrays:
            alone = case.system.find(case.target, case.supports[k : k + 1], case.masks[k : k + 1])
            yield equal(f"alone_candidates_{k}", alone.candidates.cells, arrays[f"alone_candidates_{k}"])
            yield equal(f"alone_mask_grid_{k}", alone.regions.mask, arrays[f"alone_mask_grid_{k}"])


def check_regions(case: Case) -> Iterator[Row]:
    arrays, regions = case.arrays, case.found.regions
    cells = case.target.flatten(1)
    similarity = (cells.T @ cells).clamp(-1, 1)
    yield compare("distance", (1 - similarity).fill_diagonal_(0)[::7, ::7], arrays["distance"], 5e-5)
    heights = I.average_linkage(similarity)[1].sort().values
    yield compare("merge_heights", heights, arrays["merge_heights"], 5e-5)
    yield equal("labels", regions.label, arrays["labels"])
    yield equal("cluster_count", len(regions.area), arrays["cluster_count"])
    yield equal("cluster_area", regions.area, arrays["cluster_area"])
    yield equal("cluster_matched", regions.matched, arrays["cluster_matched"])
    for name, value in (("cross_proto", regions.prototype), ("cross", regions.cross), ("intra", regions.intra),
                        ("weight", regions.weight), ("score", regions.score)):  # fmt: skip
        yield compare(f"cluster_{name}", value, arrays[f"cluster_{name}"], 5e-5)
    yield equal("seed", regions.seed, arrays["seed"])
    yield equal("mask_grid", regions.mask, arrays["mask_grid"])
    for name in arrays:
        if tau := re.fullmatch(r"labels_tau(\d+)", name):
            other = case.system_of(case.system.encoder, int(tau[1]) / 100).find(case.target, case.supports, case.masks).regions
            yield equal(name, other.label, arrays[name])
            yield equal(f"mask_grid_tau{tau[1]}", other.mask, arrays[f"mask_grid_tau{tau[1]}"])


def check_result(case: Case) -> Iterator[Row]:
    arrays, truth = case.arrays, binary(case.arrays["query_mask"])
    side, whole = (case.system.predict(case.images[0], case.images[1:], case.masks, size) for size in (None, tuple(truth.shape)))
    yield equal("mask_side", side, arrays["mask_side"])
    yield equal("mask_full", whole, arrays["mask_full"])
    for name, mask, right in (("side", side, square(truth, case.side)), ("full", whole, truth)):
        pairs = [(~mask, ~right), (mask, right)]
        yield equal(f"eval_{name}_inter", np.array([int((a & b).sum()) for a, b in pairs]), arrays[f"eval_{name}_inter"])
        yield equal(f"eval_{name}_union", np.array([int((a | b).sum()) for a, b in pairs]), arrays[f"eval_{name}_union"])


def check_contrast(case: Case) -> Iterator[Row]:
    arrays = case.arrays
    masks = [torch.from_numpy(arrays[f"support_mask_{k}"]) for k in range(case.shots)]
    score = contrast(case.target, case.supports, masks)
    yield compare("contrast_grid", score, arrays["contrast_grid"], 5e-5)
    large = resize(score[None, None], (case.side, case.side), corners=False)[0, 0]
    sure = large.abs() >= 5e-5
    yield equal("contrast_mask_side", (large > 0)[sure], arrays["contrast_mask_side"][sure.numpy()])


def check_training_basis(case: Case) -> Iterator[Row]:
    arrays = case.arrays
    system = case.system_of(case.system.encoder, case.system.tau, arrays["train_factors"].tolist())
    yield from check_projector("train_projector", system.projector, arrays, 2e-4)
    found = system.find(case.target, case.supports, case.masks)
    yield equal("train_candidates", found.candidates.cells, arrays["train_candidates"])
    yield equal("train_mask_grid", found.regions.mask, arrays["train_mask_grid"])


def check_units(arrays: Arrays) -> Iterator[Row]:
    for name in (key for key in arrays if key.startswith("unit_grid_in_")):
        wanted = arrays[name.replace("_in_", "_out_")]
        yield equal(name, I.grid_mask(binary(arrays[name]), wanted.shape), wanted)
    wanted = arrays["unit_resize_out"]
    yield equal("unit_resize", square(binary(arrays["unit_resize_in"]), len(wanted)), wanted)
    up = I.enlarge(binary(arrays["unit_up_in"]), (96, 96))
    yield equal("unit_up_96", up, arrays["unit_up_96"])
    for name in ("unit_up_75x111", "unit_up_48"):
        yield equal(name, I.enlarge(up, arrays[name].shape), arrays[name])
    cells = F.normalize(torch.from_numpy(arrays["unit_cluster_in"]), dim=1).T[..., None]
    for tau, wanted in zip(arrays["unit_cluster_tau"].tolist(), arrays["unit_cluster_out"], strict=True):
        yield equal(f"unit_cluster_out ({tau:.1f})", I.find_regions(cells, tau)[:, 0], wanted)

    unit = {key.removeprefix("unit_"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(("unit_a", "unit_c"))}
    shape = unit["cand_reference"].shape[2:]
    masks = torch.stack([I.grid_mask(mask > 0, shape) for mask in unit["cand_masks"]])
    for name in ("negative", "mixed"):
        found = I.find_candidates(unit[f"cand_{name}_target"], unit["cand_reference"], masks, unit["cand_prototype"])
        for part, value in (("forward", found.forward), ("votes", found.votes), ("out", found.cells)):
            yield equal(f"unit_cand_{name}_{part}", value, arrays[f"unit_cand_{name}_{part}"])
    for name in ("normal", "weak", "spread"):
        own = "agg_spread" if name == "spread" else "agg"
        regions = I.judge_regions(unit["agg_labels"].long(), unit[f"{own}_debiased"], unit[f"{own}_original"],
                                  unit[f"agg_{name}_candidates"] > 0, unit[f"agg_{name}_prototype"], 0.2)  # fmt: skip
        yield compare(f"unit_agg_{name}_score", regions.score, arrays[f"unit_agg_{name}_score"], 1e-6)
        yield equal(f"unit_agg_{name}_seed", regions.seed, arrays[f"unit_agg_{name}_seed"])
        yield equal(f"unit_agg_{name}_out", regions.mask, arrays[f"unit_agg_{name}_out"])
    band = I.Band.of(unit["crf_mask"] > 0)
    yield compare("unit_crf_unary", band.unary, arrays["unit_crf_unary"], 2e-6)
    yield equal("unit_crf_out", band.merge(unit["crf_logits"]), arrays["unit_crf_out"])


def check_none(case: Case) -> Iterator[Row]:
    """A support masked by one pixel that leads to no candidate."""
    arrays = case.arrays
    mask = square(binary(arrays["none_support_mask"]), case.side)
    yield equal("none_support_mask_grid", I.grid_mask(mask, case.target.shape[1:]), arrays["none_support_mask_grid"])
    found = case.system.find(case.target, case.supports[:1], mask[None])
    yield compare("none_prototype", found.prototype, arrays["none_prototype"], 1e-5)
    yield equal("none_forward", found.candidates.forward, arrays["none_forward"])
    yield equal("none_votes", found.candidates.votes, arrays["none_votes"])
    whole = case.system.predict(case.images[0], case.images[1:2], mask[None], tuple(arrays["query_mask"].shape))
    yield equal("none_mask_full", whole, arrays["none_mask_full"])
