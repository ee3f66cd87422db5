"""Measures every array of a WeCLIP file (training batch or test image, any data set) against our system.

What depends on the data set goes by the number of text rows; sizes are read off the arrays.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from model.clip import Clip, box_mask
from model.clip.load import clip_from_state
from model.ops import resize
from model.system import Frozen
from model.weak import weclip
from model.weak.affinity import filtered, layer_scores, patch_part, spread, transition_matrix
from model.weak.decoder import affinity_of
from model.weak.losses import affinity_loss, balanced_loss, pair_labels
from model.weak.maps import Pairs, Seen, class_maps, decide, last_blocks, see, text_bank, with_background
from model.weak.par import refine_by_colour
from model.weak.weclip import WeCLIP
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare
from util.config import Train
from util.data.folds import read_class_names
from util.run.schedule import Schedule

LISTS = Path(__file__).parents[2] / "lists"
RECIPES = {20: ("pascal", {}, 30_000), 80: ("coco", {"box": 0.7, "rfm_layers": 10}, 80_000)}  # by foreground classes
Arrays = dict[str, np.ndarray]


@dataclass
class Batch:
    """What WeCLIP reads of a batch."""

    image: Tensor
    present: Tensor
    valid: Tensor
    label: Tensor | None = None  # masks are not there


def check_weclip(path: Path) -> Iterator[Row]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    lists, options, steps = RECIPES[len(arrays["fg_text"])]
    clip = filled_clip(int(arrays["salt"]))
    options = weclip.Options(**options)
    names = read_class_names(LISTS / lists / "classes.txt").texts
    bank = text_bank(clip.text, names, options)
    yield from check_texts(arrays, clip, names, options)
    for rows, ours in zip(("fg_text", "bg_text"), bank, strict=True):
        yield compare(rows, ours, arrays[rows], 2e-6)

    system = WeCLIP(Frozen(clip), bank, options).eval()
    system.import_official(official(system, int(arrays["salt"])))
    if str(arrays["part"]) == "train":
        yield from check_train(arrays, system, steps)
    else:
        yield from check_eval(arrays, system)


# Weights and input.


def filled_clip(salt: int) -> Clip:
    with torch.device("meta"):
        shapes = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu")).state_dict()
    state = {name: tensor_for(name, x.shape, salt) for name, x in shapes.items() if name != "attn_mask"}
    for name in state:
        if name.startswith("visual.") and name.endswith("in_proj_weight"):
            state[name] *= 2
    return clip_from_state(state)


def official(system: WeCLIP, salt: int) -> dict[str, Tensor]:
    """A checkpoint as the published scripts save it: trained tensors, CLIP, and two by-products."""
    names = {name: system.official_name(name) for name in system.state_dict()}
    state = {}
    for ours, name in names.items():
        if name is None:
            inside = ours.removeprefix("clip.module.visual.").removeprefix("clip.module.text.clip.")
            state[f"encoder.{inside}"] = system.state_dict()[ours]
            continue
        x = tensor_for(name, system.state_dict()[ours].shape, salt)
        if name.startswith("decoder_fts_fuse.") and name.endswith(".weight"):
            x = 0.25 * x
        if name.startswith("decoder.transformer.") and (".out_proj." in name or ".c_proj." in name):
            x = 0.1 * x
        state[name] = 10 * x if name == "decoder.linear_pred.weight" else x
    state["par.kernel"] = torch.zeros(8, 1, 3, 3)
    state["encoder.visual.positional_embedding_new"] = torch.zeros(401, 768)
    return state


def as_images(x: np.ndarray) -> Tensor:
    """... H W 3 uint8 -> ... 3 H W."""
    return torch.from_numpy(x).movedim(-1, -3).float()


def present_of(arrays: Arrays) -> Tensor:
    """B C bool."""
    present = torch.zeros(len(arrays["label_ids"]), len(arrays["fg_text"]), dtype=torch.bool)
    for row, ids in zip(present, arrays["label_ids"], strict=True):
        row[ids[ids >= 0]] = True
    return present


def every(x: Tensor, step: int) -> Tensor:
    return x[..., ::step, ::step]


def differing(name: str, ours: Tensor, reference: np.ndarray, allowed: int, where: np.ndarray | None = None) -> Row:
    """Counts the entries that differ; `where`: only these count."""
    a = ours.numpy()
    if a.shape != reference.shape:
        return Row(f"{name} {a.shape} instead of {reference.shape}", math.inf, allowed)
    return Row(name, float(((a != reference) & (True if where is None else where)).sum()), allowed)


def exact(name: str, ours: Tensor, reference: np.ndarray) -> Row:
    return differing(name, ours, reference, 0)


def check_texts(arrays: Arrays, clip: Clip, names: tuple[str, ...], options: weclip.Options) -> Iterator[Row]:
    from model.weak.maps import background_texts

    for rows, texts in (("fg_tokens", names), ("bg_tokens", background_texts(names))):
        yield exact(rows, clip.text.tokenizer([options.template.format(text) for text in texts]), arrays[rows])


# The training file.


def check_train(arrays: Arrays, system: WeCLIP, steps: int) -> Iterator[Row]:
    images = system.normalise(as_images(arrays["images"]))
    trunk, present = system.vision.visual, present_of(arrays)
    pairs = Pairs.of(present, images.device)
    with torch.no_grad():
        seen = see(trunk, images, len(trunk.blocks), hidden=True)
        fused, logits = system.head(seen.hidden, seen.grid)
        affinity = affinity_of(fused)
    yield from check_encoder(arrays, seen)
    yield compare("fused", fused, arrays["fused"], 1e-5)
    yield compare("affinity", affinity, arrays["affinity"], 3e-6)
    yield compare("logits", logits, arrays["logits"], 1e-4)
    cam = yield from check_cams(arrays, system, seen, pairs)
    for phase in ("static", "rfm"):
        yield from check_phase(arrays, system, phase, (seen, images, pairs, affinity), cam)
        valid = torch.tensor([0, images.shape[2], 0, images.shape[3]]).expand(len(images), 4)
        batch = Batch(as_images(arrays["images"]), present, valid)
        yield from check_losses(arrays, system, phase, seen, batch)
    yield from check_optimizer(arrays, system, steps, seen)


def check_encoder(arrays: Arrays, seen: Seen) -> Iterator[Row]:
    rms = torch.stack([x.double().square().mean((1, 2)).sqrt() for x in seen.hidden])
    yield compare("block_rms", rms, arrays["block_rms"], 1e-5)
    yield compare("tokens_last_0", seen.tokens[0], arrays["tokens_last_0"], 1e-3)
    mass = torch.stack([a[:, 1:, 1:].sum((1, 2), dtype=torch.float64) for a in seen.attention.values()], 1)
    yield compare("attn_mass (all but the last)", mass, arrays["attn_mass"][:, :-1], 5e-4)


def check_cams(arrays: Arrays, system: WeCLIP, seen: Seen, pairs: Pairs) -> Iterator[Row]:
    """Rows of the class activation maps; returns (maps B K h w, attention of the last block B N N)."""
    found = class_maps(system.vision, system.bank, seen, pairs)
    attention = found.attention[pairs.first]
    mass = attention[:, 1:, 1:].sum((1, 2), dtype=torch.float64)
    yield compare("attn_mass (last)", mass, arrays["attn_mass"][:, -1], 5e-4)
    box = box_mask(found.map, system.options.box)
    for i in range(len(pairs.value)):
        mine = (pairs.image == i).nonzero()[:, 0]
        ids = pairs.cls[mine]
        columns = torch.cat([ids, torch.arange(len(arrays["fg_text"]), found.probability.shape[1])])
        for row in mine:
            yield compare(f"cam_prob_{i}", found.probability[row, columns], arrays[f"cam_prob_{i}"], 1e-5)
        raw = arrays[f"cam_relu_{i}"]
        yield compare(f"cam_relu_{i} (of the maximum)", found.raw[mine] / raw.max(), raw / raw.max(), 2e-4)
        peaks = raw.max((1, 2))
        for k, row in enumerate(mine):
            tolerance = 1e-3 if peaks[k] < peaks.max() / 20 else 2e-4
            yield compare(f"cam_{i}[{k}]", found.map[row], arrays[f"cam_{i}"][k], tolerance)
        yield exact(f"box_{i}", box[mine].to(torch.uint8), arrays[f"box_{i}"])
        yield compare(f"attn_last_{i}", attention[i], arrays[f"attn_last_{i}"], 1e-5)
    return pairs.slots(found.map), attention


def check_phase(arrays: Arrays, system: WeCLIP, phase: str, given: tuple[Seen, Tensor, Pairs, Tensor],
                cam: tuple[Tensor, Tensor]) -> Iterator[Row]:  # fmt: skip
    """From attention maps to the pseudo label."""
    (seen, images, pairs, affinity), (maps, last), o = given, cam, system.options
    layers = o.layers if phase == "static" else o.rfm_layers
    attention = patch_part([*last_blocks(seen, layers), last])
    if phase == "static":
        combined = attention.mean(1)
    else:
        combined, keep = filtered(attention, affinity, absolute=False)
        scores = layer_scores(attention, affinity, absolute=False)
        reference = arrays["rfm_scores"].astype(np.float64)
        yield compare("rfm_scores (mean subtracted)", scores - scores.mean(1, keepdim=True),
                      reference - reference.mean(1, keepdims=True), 1e-2)  # fmt: skip
        yield exact("rfm_keep", keep.to(torch.uint8), arrays["rfm_keep"])
    transition = transition_matrix(combined)
    box = box_mask(maps.flatten(0, 1), o.box).view_as(maps)
    moved = spread(transition, maps, box)
    for i, value in enumerate(pairs.value):
        used = int((value > 0).sum())
        yield compare(f"{phase}_attn_{i}", combined[i], arrays[f"{phase}_attn_{i}"], 3e-6)
        yield compare(f"{phase}_trans_{i}", transition[i] @ transition[i], arrays[f"{phase}_trans_{i}"], 2e-7)
        yield compare(f"{phase}_cam_{i}", moved[i, :used], arrays[f"{phase}_cam_{i}"], 5e-6)

    scores = with_background(moved, images.shape[2:])
    refined = refine_by_colour(images, scores)
    used = 1 + int((pairs.value[0] > 0).sum())
    prefix, step = ("", 1) if phase == "static" else ("rfm_", 4)
    yield compare(f"{prefix}par_in_0", every(scores[0, :used], step), arrays[f"{prefix}par_in_0"], 2e-4)
    yield compare(f"{prefix}par_out_0", every(refined[0, :used], step), arrays[f"{prefix}par_out_0"], 2e-4)
    if phase == "static":
        fed = refine_by_colour(images[:1], torch.from_numpy(arrays["par_in_0"])[None])[0]
        yield compare("par_out_0 (par_in_0 fed)", fed, arrays["par_out_0"], 2e-5)
    label = system.pseudo_label(seen, images, pairs, None if phase == "static" else affinity)
    yield differing(f"{phase}_label (pixels)", label, arrays[f"{phase}_label"], 1)
    yield differing(f"{phase}_label (sure pixels)", label, arrays[f"{phase}_label"], 0, arrays[f"{phase}_label_sure"] == 1)


def losses_of(terms: dict[str, Tensor], weight: float) -> Tensor:
    """(segmentation, affinity without its weight, total)."""
    return torch.stack([terms["segmentation"], terms["affinity"] / weight, sum(terms.values())])


def check_losses(arrays: Arrays, system: WeCLIP, phase: str, seen: Seen, batch: Batch) -> Iterator[Row]:
    label, o = torch.from_numpy(arrays[f"{phase}_label"]), system.options
    fused, logits = system.head(seen.hidden, seen.grid)
    near = pair_labels(label, system.vision.visual.patch, seen.grid, weclip.RADIUS)
    yield exact(f"{phase}_aff_label", near, arrays[f"{phase}_aff_label"])
    yield exact(f"{phase}_aff_counts", torch.stack([(near == 1).sum(), (near == 0).sum()]), arrays[f"{phase}_aff_counts"])
    reference = arrays[f"{phase}_losses"]
    separate = torch.stack([balanced_loss(logits, label), affinity_loss(affinity_of(fused), near)])
    yield compare(f"{phase}_losses (parts)", separate, reference[:2], 3e-6, relative=True)
    terms = system.terms(logits, affinity_of(fused), label)
    yield compare(f"{phase}_losses", losses_of(terms, o.affinity_weight), reference, 3e-6, relative=True)
    own = losses_of(system.losses(batch, 0 if phase == "static" else o.static_steps), o.affinity_weight)
    yield compare(f"{phase}_losses (own labels)", own, reference, 1e-4, relative=True)

    names, parameters = ordered(arrays, system)
    gradients = torch.autograd.grad(sum(terms.values()), parameters)
    norms = norms_of(gradients)
    mlp = np.array(["linears_modulelist" in n and ".proj." in n for n in names])
    for part, where, tolerance in (("first MLP layers", mlp, 2e-4), ("others", ~mlp, 1e-5)):
        reference = arrays[f"{phase}_grad_norms"][where]
        yield compare(f"{phase}_grad_norms ({part})", norms[where], reference, tolerance, relative=True)
    for key, name, tolerance in (("linear_pred_bias", "decoder.linear_pred.bias", 5e-6),
                                 ("linear_fuse_bias", "decoder_fts_fuse.linear_fuse.bias", 5e-5)):
        yield compare(f"{phase}_grad_{key}", gradients[names.index(name)], arrays[f"{phase}_grad_{key}"], tolerance)


def ordered(arrays: Arrays, system: WeCLIP) -> tuple[list[str], list[Tensor]]:
    """Published names of the trained tensors in the file's order, and ours; every one of ours must be among them."""
    ours = {system.official_name(f"head.{name}"): p for name, p in system.head.named_parameters()}
    names = [str(name) for name in arrays["grad_names"]]
    assert set(names) == set(ours)
    return names, [ours[name] for name in names]


def norms_of(tensors: list[Tensor] | tuple[Tensor, ...]) -> np.ndarray:
    """Accumulated in float64."""
    return np.array([float(t.detach().double().norm()) for t in tensors])


def check_optimizer(arrays: Arrays, system: WeCLIP, steps: int, seen: Seen) -> Iterator[Row]:
    """AdamW from the shipped groups on the static phase's batch, with dropout off."""
    train = Train(base_lr=2e-3, weight_decay=0.01)
    rates = np.array([Schedule(steps, 1.0, 50, 1e-6).rate(train.base_lr, int(step)) for step in arrays["lr_steps"]])
    yield compare("lr_values", rates, arrays["lr_values"], 1e-9, relative=True)
    names, parameters = ordered(arrays, system)
    initial = [p.detach().clone() for p in parameters]
    yield compare("param_norms_init", norms_of(initial), arrays["param_norms_init"], 1e-6, relative=True)
    label = torch.from_numpy(arrays["static_label"])

    def forward() -> tuple[Tensor, Tensor]:
        fused, logits = system.head(seen.hidden, seen.grid)
        return losses_of(system.terms(logits, affinity_of(fused), label), system.options.affinity_weight), logits

    def update(optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        losses, _ = forward()
        optimizer.param_groups[0]["lr"] = Schedule(steps, 1.0, 50, 1e-6).rate(train.base_lr, step)
        optimizer.zero_grad()
        losses[2].backward()
        optimizer.step()
        return losses.detach()

    def moved() -> np.ndarray:
        return norms_of([p.detach() - q for p, q in zip(parameters, initial, strict=True)])

    update(system.optimizer(train), 50)
    yield from check_norms("t50_param_norms", norms_of(parameters), arrays["t50_param_norms"], 1e-3, 1e-6)
    yield compare("t50_param_deltas", moved(), arrays["t50_param_deltas"], 3e-3, relative=True)
    with torch.no_grad():
        for p, q in zip(parameters, initial, strict=True):
            p.copy_(q)

    optimizer = system.optimizer(train)
    in_proj = np.array([name.endswith("in_proj_bias") for name in names])
    for step in range(len(arrays["seq_param_norms"])):
        yield compare(f"seq_losses[{step}]", update(optimizer, step), arrays["seq_losses"][step], 1e-4, relative=True)
        norms, reference = norms_of(parameters), arrays["seq_param_norms"][step]
        yield compare(f"seq_param_norms[{step}] (in_proj_bias)", norms[in_proj], reference[in_proj], 5e-5, relative=True)
        yield from check_norms(f"seq_param_norms[{step}]", norms[~in_proj], reference[~in_proj], 2e-6, 2e-7)
        if step:  # the first step's rate is 2e-9: rounding noise
            yield compare(f"seq_param_deltas[{step}]", moved(), arrays["seq_param_deltas"][step], 3e-3, relative=True)
    with torch.no_grad():
        losses, logits = forward()
    yield compare(f"seq_losses[{step + 1}]", losses, arrays["seq_losses"][-1], 1e-4, relative=True)
    yield compare("seq_logits", logits, arrays["seq_logits"], 1e-3)


def check_norms(name: str, ours: np.ndarray, reference: np.ndarray, largest: float, median: float) -> Iterator[Row]:
    yield compare(name, ours, reference, largest, relative=True)
    yield Row(f"{name} (median)", float(np.median(np.abs(ours - reference) / reference)), median)


# The test file.


def check_eval(arrays: Arrays, system: WeCLIP) -> Iterator[Row]:
    close = 2e-4 if len(arrays["fg_text"]) == 20 else 5e-4
    image, present = as_images(arrays["image"])[None], present_of(arrays)
    images, size = system.normalise(image), arrays["image"].shape[:2]
    inputs = list(system.scaled(images))
    yield exact("resized_shapes", torch.tensor([x.shape[2:] for x in inputs]), arrays["resized_shapes"])
    with torch.no_grad():
        for x, name in zip(inputs, ("s1", "s075"), strict=True):
            yield compare(f"input_{name}", every(x[0], 8), arrays[f"input_{name}"], 2e-4)
            yield compare(f"logits_{name}", system.logits(torch.cat([x, x.flip(3)])), arrays[f"logits_{name}"], close)
    found = system.predict(Batch(image, present, torch.empty(0)))
    for name, logits in (("single", found.variants["single scale"]), ("msflip", found.final)):
        yield compare(f"logits_{name}", logits[0], arrays[f"logits_{name}"], close)
        large = resize(logits, size, corners=False)[0]
        yield compare(f"logits_{name}_up", every(large, 8), arrays[f"logits_{name}_up"], close)
        prediction = large.argmax(0)
        yield differing(f"pred_{name} (pixels)", prediction, arrays[f"pred_{name}"], 1)
        yield differing(f"pred_{name} (sure pixels)", prediction, arrays[f"pred_{name}"], 0, arrays[f"pred_{name}_sure"] == 1)
    yield from check_validation(arrays, system, inputs[0], Pairs.of(present, image.device), size)


def check_validation(arrays: Arrays, system: WeCLIP, images: Tensor, pairs: Pairs, size: tuple[int, int]) -> Iterator[Row]:
    """The published label maker in validation: RFM, at the annotation's size."""
    o = system.options
    with torch.no_grad():
        seen = see(system.vision.visual, images, o.rfm_layers, hidden=True)
        affinity = affinity_of(system.head(seen.hidden, seen.grid)[0])
    found = class_maps(system.vision, system.bank, seen, pairs)
    yield compare("val_cam", found.map, arrays["val_cam"], 5e-5)
    box = box_mask(found.map, o.box)
    yield exact("val_box", box.to(torch.uint8), arrays["val_box"])
    attention = patch_part([*last_blocks(seen, o.rfm_layers), found.attention[:1]])
    scores, reference = layer_scores(attention, affinity, absolute=False)[0], arrays["val_rfm_scores"].astype(np.float64)
    yield compare("val_rfm_scores (mean subtracted)", scores - scores.mean(), reference - reference.mean(), 0.1)
    combined, keep = filtered(attention, affinity, absolute=False)
    yield exact("val_rfm_keep", keep[0].to(torch.uint8), arrays["val_rfm_keep"])

    label, wanted = system.pseudo_label(seen, images, pairs, affinity, size=size)[0], arrays["val_pseudo_label"]
    yield differing("val_pseudo_label (pixels)", label, wanted, wanted.size // 1000)
    refined = refine_by_colour(images, with_background(spread(transition_matrix(combined), found.map[None], box[None]), size))
    best = refined[0].topk(2, 0).values
    sure = (best[0] - best[1] >= 5e-3).numpy()
    assert torch.equal(decide(refined, pairs)[0], label) and sure.mean() > 0.9
    yield differing("val_pseudo_label (sure pixels)", label, wanted, 0, sure)
