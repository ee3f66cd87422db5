"""Measures every array of the CLIP-RC files against our system on the same deterministic weights.

Sizes and options come from the file, so that it may be of VOC or of COCO-Stuff. Tolerances: section 0 of the files' README.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from model.clip.load import clip_from_state
from model.inference import slide
from model.ops import resize
from model.system import Frozen
from model.zero_shot.clip_rc import CLIP_RC, REGIONS
from model.zero_shot.losses import IGNORE, focal_and_dice
from model.zero_shot.tower import reading_mask
from model.zero_shot.zegclip import UNSEEN
from tests.golden.check_hsnet import Arrays, load
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare
from util.config import Train
from util.data.transforms import short_side
from util.run.schedule import Schedule
from util.score.metrics import SemanticMeter, intersection_union

CLOSE = 1e-4  # margin below which the two best scores count as equal in the files


@dataclass
class Images:
    """The fields of a batch that the system reads."""

    image: Tensor
    label: Tensor
    valid: Tensor
    name: list[str]


def check_clip_rc(path: Path) -> Iterator[Row]:
    arrays = load(path)
    system = build(arrays)
    text_bank = torch.stack([row / row.norm() for row in tensor_for("text_bank", arrays["text_bank"].shape, int(arrays["salt"]))])
    yield compare("text_bank", text_bank, arrays["text_bank"], 1e-7)
    if "window" in arrays:
        yield from check_windows(arrays, system)
        yield from check_metrics(arrays)
        return
    yield from check_training(arrays, system)
    if "case_logits" in arrays:
        yield from check_cases(arrays)


# ---- from a file to a system

def build(arrays: Arrays) -> CLIP_RC:
    """The system with every tensor filled under its official name, loaded by `import_official`, tensors without use too."""
    salt, classes = int(arrays["salt"]), len(arrays["text_bank"])
    number = len(arrays["mask_allowed"]) - 1041 if "mask_allowed" in arrays else 10 if is_voc(arrays) else 100
    kind = "transductive" if "pseudo_mask" in arrays else "inductive"
    focal, dice, recovery = (float(x) for x in arrays.get("loss_weights", (100, 1, 2)))
    crop, stride = (int(arrays[key][0]) if key in arrays else side for key, side in (("window", 512), ("stride", 426)))
    options = CLIP_RC.Options(prompts=number, setting=kind, focal=focal, dice=dice, recovery=recovery, dropout=0.0, crop=crop,
                              stride=stride)  # fmt: skip
    names = [f"class {i}" for i in range(classes)]
    system = CLIP_RC(filled_clip(salt), names, torch.from_numpy(arrays["text_bank"]), arrays["seen_idx"].tolist(), options)
    system.import_official({f"module.{name}": value for name, value in official(arrays, system).items()})
    return system.eval()


def filled_clip(salt: int) -> Frozen:
    """A CLIP under OpenAI's names; the image tower alone is run."""
    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    shapes = {name: tensor.shape for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    return Frozen(clip_from_state({name: tensor_for(name, shape, salt) for name, shape in shapes.items()}))


def official(arrays: Arrays, system: CLIP_RC) -> dict[str, Tensor]:
    scales = dict(zip(arrays["scale_names"].tolist(), arrays["scale_values"].tolist(), strict=True))
    state = {name: torch.zeros(1) for name in arrays.get("unused_names", np.array([])).tolist()}
    for ours, value in system.trained_state().items():
        name = system.official_name(f"head.{ours}")
        state[name] = tensor_for(name, value.shape, int(arrays["salt"]))
        for end, scale in scales.items():
            if name.endswith(end):
                state[name] = state[name] * torch.tensor(scale)
    visual = system.trunk.visual
    region = (visual.class_embedding + visual.positional_embedding[0]).repeat(REGIONS**2, 1)
    table = system.trunk.position((32, 32)).clone()
    return state | {"backbone.region_level_bridge": region, "backbone.positional_embedding": table}


def is_voc(arrays: Arrays) -> bool:
    return len(arrays["text_bank"]) == 20


# ---- training

class Recorder:
    """Keeps what passes through the parts of a system, the latest of each."""

    def __init__(self, system: CLIP_RC):
        head, trunk = system.trained, system.trunk
        self.inputs: dict[str, tuple] = {}
        self.outputs: dict[str, object] = {}
        for name, module in {
            "block0": trunk.blocks[0].ln_1, "views": head.prompts, "head": head, "recovery": head.recovery,
            **{f"{stream}{i}": layer for stream in "qv" for i, layer in enumerate(getattr(head, f"decoder_{stream}").layers)},
        }.items():  # fmt: skip
            module.register_forward_hook(lambda _, inputs, output, name=name: self.keep(name, inputs, output))
        real = trunk.run
        trunk.run = lambda tokens, **given: self.keep("run", (), real(tokens, keep_hidden=range(12), **given))

    def keep(self, name: str, inputs: tuple, output: object) -> object:
        self.inputs[name], self.outputs[name] = inputs, output
        return output


def check_training(arrays: Arrays, system: CLIP_RC) -> Iterator[Row]:
    kept, step = Recorder(system), int(arrays["logit_class_stride"])
    images = torch.from_numpy(arrays["images"]).movedim(3, 1).float()
    batch = Images(images, torch.from_numpy(arrays["labels"]), torch.tensor([[0, 512, 0, 512]] * 2), ["a", "b"])
    with torch.no_grad():
        scores = system.scores(images)
    logits = kept.outputs["head"].logits
    yield compare("eval_logits", logits[:, ::step], arrays["eval_logits"], 1e-4)
    yield compare("eval_scores", scores[:, ::step, 7::16, 5::16], arrays["eval_scores"], 2e-5)
    yield compare("eval_offset", system.upsample(logits[:, :1], (512, 512)).sigmoid().sub(scores[:, :1]).mean(),
                  arrays["eval_offset"], 1e-6)  # fmt: skip
    yield from check_decision("eval", scores[..., ::4, ::4], arrays["eval_argmax"], arrays["eval_close"])
    del scores

    system.train()
    given = torch.from_numpy(arrays["labels_used"])
    own: list[Tensor] = []
    real = system.targets
    system.targets = lambda *inputs: (own.append(real(*inputs)), given.long())[1]  # strict: losses on the file's labels
    losses = system.losses(batch, 0)
    logits = kept.outputs["head"].logits.detach()
    large = system.upsample(logits, (512, 512))
    with torch.no_grad():
        yield from check_tower(arrays, system, kept, images)
        yield from check_decoder(arrays, kept)
        yield compare("logits", logits[:, ::step], arrays["logits"], 1e-4)
        yield compare("logits_512", large[:, ::step, 7::16, 5::16], arrays["logits_512"], 1e-4)
        yield from check_labels(arrays, system, batch, own[0], large)
        labelled = given != IGNORE
        accuracy = 100 * (large.argmax(1) == given)[labelled].double().mean()
        yield compare("term_acc_seg", accuracy, arrays["term_acc_seg"], 0.01)
    pairs = sum(len(set(label.unique().tolist()) - {IGNORE}) for label in own[0])
    yield compare("n_pairs", pairs, arrays["n_pairs"], 0)
    weights = torch.from_numpy(arrays["loss_weights"])
    for (ours, value), raw, term, weight in zip(
        losses.items(), ("focal", "dice", "l1_q", "l1_v"), ("loss_mask", "loss_dice", "recovery_loss_q", "recovery_loss_k"),
        (*weights, weights[2]), strict=True,
    ):  # fmt: skip
        yield compare(f"raw_{raw} ({ours})", value / weight, arrays[f"raw_{raw}"], 1e-5, relative=True)
        yield compare(f"term_{term}", value, arrays[f"term_{term}"], 1e-5, relative=True)
    yield compare("total", sum(losses.values()), arrays["total"], 1e-5, relative=True)
    yield from check_gradients(arrays, system, losses)


def check_tower(arrays: Arrays, system: CLIP_RC, kept: Recorder, images: Tensor) -> Iterator[Row]:
    trunk, ids = system.trunk, arrays["token_ids"]
    yield compare("images_norm", system.pixels(images)[..., 5::64, 9::64], arrays["images_norm"], 1e-6)
    yield compare("pos_resized", trunk.position((32, 32))[arrays["pos_rows"]], arrays["pos_resized"], 1e-6)
    yield compare("region_init", trunk.visual.class_embedding + trunk.visual.positional_embedding[0], arrays["region_init"], 1e-6)
    allowed = reading_mask((32, 32), system.options.prompts, REGIONS)
    yield compare("mask_allowed", allowed, arrays["mask_allowed"], 0)
    yield compare("tokens_in", kept.inputs["block0"][0][0, ids], arrays["tokens_in"], 1e-5)
    hidden = torch.stack([x[0, ids] for x in kept.outputs["run"].hidden.values()])
    yield compare("tokens_block", hidden, arrays["tokens_block"], 1e-4)
    whole, patches, regions = kept.outputs["views"]
    yield compare("G", whole, arrays["G"], 2e-6)
    yield compare("R", regions, arrays["R"], 2e-6)
    yield compare("V_grid", patches[..., 1::4, 2::4], arrays["V_grid"], 2e-6)
    yield compare("V_chan", patches[:, ::32], arrays["V_chan"], 2e-6)


def check_decoder(arrays: Arrays, kept: Recorder) -> Iterator[Row]:
    """The descriptor and the visual input are never formed whole: here they are put together from their parts."""
    whole, patches, regions = kept.outputs["views"]
    texts, rows, nodes = kept.inputs["head"][2], arrays["q_rows"], arrays["v_nodes"]
    product = (regions.flatten(2).transpose(1, 2) + whole[:, None])[:, :, None] * texts
    descriptor = torch.cat([product, texts.expand_as(product)], 3).flatten(1, 2)
    yield compare("desc", descriptor[:, rows], arrays["desc"], 2e-7)
    visual = torch.cat([resize(regions, (32, 32), corners=False), whole[..., None, None].expand_as(patches), patches], 1)
    yield compare("u", visual.flatten(2).transpose(1, 2)[:, nodes], arrays["u"], 2e-6)
    q0, v0 = kept.inputs["q0"]
    yield compare("q0", q0[:, rows], arrays["q0"], 3e-6)
    yield compare("v0", v0[:, nodes], arrays["v0"], 1e-5)
    for stream, part in (("q", rows), ("v", nodes)):
        layers = torch.stack([kept.outputs[f"{stream}{i}"][:, part] for i in range(3)])
        yield compare(f"{stream}_layers", layers, arrays[f"{stream}_layers"], 3e-5)
    mean = kept.outputs["q2"].unflatten(1, product.shape[1:3]).mean(1)
    yield compare("q3_region_mean", like(mean, arrays["q3_region_mean"]), arrays["q3_region_mean"], 2e-5)
    yield compare("v3_chan", kept.outputs["v2"][..., ::32], arrays["v3_chan"], 5e-6)
    recovered, recovered_patches = kept.outputs["recovery"]
    yield compare("recovered_q", recovered[:, rows], arrays["recovered_q"], 3e-5)
    yield compare("recovered_v", recovered_patches[:, nodes], arrays["recovered_v"], 3e-5)


def check_labels(arrays: Arrays, system: CLIP_RC, batch: Images, own: Tensor, logits: Tensor) -> Iterator[Row]:
    sure = torch.ones_like(own, dtype=torch.bool)
    if "pseudo_mask" in arrays:
        remapped = system.table[batch.label.long()]
        yield compare("labels_remapped", remapped, arrays["labels_remapped"], 0)
        yield compare("pseudo_mask", remapped == UNSEEN, arrays["pseudo_mask"], 0)
        scores = logits[:, system.unseen].sigmoid()
        yield compare("pseudo_scores", like(scores[..., 7::16, 5::16], arrays["pseudo_scores"]), arrays["pseudo_scores"], 2e-5)
        yield flags("pseudo_close", scores, arrays["pseudo_close"], remapped == UNSEEN)
        sure = ~torch.from_numpy(arrays["pseudo_close"])
    yield compare("labels_used", own[sure], arrays["labels_used"][sure.numpy()], 0)


def check_gradients(arrays: Arrays, system: CLIP_RC, losses: dict[str, Tensor]) -> Iterator[Row]:
    ours = {system.official_name(f"head.{key}"): parameter for key, parameter in system.trained.named_parameters()}
    names = arrays["grad_names"].tolist()
    yield compare("grad_names", float(set(names) != set(ours)), np.zeros(()), 0)
    tensors = [ours[name] for name in names]
    yield from check_recovery(arrays, ours, losses)
    sum(losses.values()).backward()
    key_bias = np.array([name.endswith("multihead_attn.k.bias") for name in names])
    flat = np.array([tensor.dim() == 1 for tensor in tensors]) & ~key_bias
    norms = np.array([float(tensor.grad.double().norm()) for tensor in tensors])
    yield compare("grad_norms", norms[~key_bias], arrays["grad_norms"][~key_bias], 1e-4, relative=True)
    for array, key, tolerance in (
        ("grad_prompt", "backbone.prompt_embeddings", 1e-3), ("grad_deep_prompt", "backbone.deep_prompt_embeddings", 1e-3),
        ("grad_q_proj", "decode_head.q_proj.weight", 5e-3), ("grad_lateral_proj", "decode_head.lateral_proj.weight", 5e-3),
    ):  # fmt: skip
        reference = arrays[array]
        rms = np.sqrt((reference.astype(np.float64) ** 2).mean())
        gradient = ours[key].grad[0] if array == "grad_prompt" else ours[key].grad
        yield compare(f"{array} / rms", like(gradient, reference).double() / rms, reference / rms, tolerance)

    (group,) = system.groups(Train(base_lr=2e-4, weight_decay=0.01))
    assert {id(p) for p in group["params"]} == {id(p) for p in tensors}
    optimizer = torch.optim.AdamW([group])
    yield compare("opt_lr", np.full(len(names), group["lr"]), arrays["opt_lr"], 0)
    yield compare("opt_weight_decay", np.full(len(names), group["weight_decay"]), arrays["opt_weight_decay"], 0)
    constants = np.array([*optimizer.defaults["betas"], optimizer.defaults["eps"]])
    yield compare("opt_betas_eps", constants, arrays["opt_betas_eps"], 0)
    norm = lambda x: float(x.detach().double().norm())  # noqa: E731
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer.step()
    yield compare("param_norms_before", np.array([norm(x) for x in before]), arrays["param_norms_before"], 1e-6, relative=True)
    after, reference = np.array([norm(x) for x in tensors]), arrays["param_norms_after"]
    for name, part, tolerance in (("large", ~flat & ~key_bias, 1e-5), ("vectors", flat, 5e-5), ("key biases", key_bias, 1e-3)):
        yield compare(f"param_norms_after ({name})", after[part], reference[part], tolerance, relative=True)
    moved, reference = np.array([norm(a - b) for a, b in zip(tensors, before, strict=True)]), arrays["update_norms"]
    worst = np.argsort(np.where(flat, np.abs(moved / reference - 1), -1))[-3:]  # one element's full or no step
    rest = ~key_bias & ~np.isin(np.arange(len(names)), worst)
    yield compare("update_norms", moved[rest], reference[rest], 1e-4, relative=True)
    yield compare("update_norms (3 worst vectors)", moved[worst], reference[worst], 3e-3, relative=True)


def check_recovery(arrays: Arrays, ours: dict[str, Tensor], losses: dict[str, Tensor]) -> Iterator[Row]:
    """The recovery loss alone reaches the prompts, its targets are detached. Numbers of the spec, for VOC's training file."""
    if not is_voc(arrays) or "pseudo_mask" in arrays:
        return
    tensors = [ours["backbone.prompt_embeddings"], ours["backbone.deep_prompt_embeddings"]]
    recovery = sum(value for name, value in losses.items() if name.startswith("recovery"))
    found = [float(x.double().norm()) for x in torch.autograd.grad(recovery, tensors, retain_graph=True)]
    yield compare("recovery alone, prompts", found[0], np.float64(5.694e-3), 2e-4, relative=True)
    yield compare("recovery alone, deep prompts", found[1], np.float64(1.3988e-2), 1e-4, relative=True)


def check_cases(arrays: Arrays) -> Iterator[Row]:
    logits, labels = torch.from_numpy(arrays["case_logits"]), torch.from_numpy(arrays["case_labels"]).long()
    for case, part in (("a", slice(None)), ("b", slice(1, 2))):
        for name, value in zip(("focal", "dice"), focal_and_dice(logits[part], labels[part]), strict=True):
            yield compare(f"case_{case}_{name}", value, arrays[f"case_{case}_{name}"], 1e-6, relative=True)
    for total, values in zip(arrays["lr_total"].tolist(), arrays["lr_values"], strict=True):
        given = ~np.isnan(values)
        schedule = Schedule(total, 0.9, 1500, 1e-6, floor=1e-6, of_decayed=True)
        ours = [schedule.rate(2e-4, t) for t in arrays["lr_iters"][given].tolist()]
        yield compare(f"lr_values ({total})", np.array(ours), values[given], 1e-9, relative=True)


# ---- windows and metrics

def check_windows(arrays: Arrays, system: CLIP_RC) -> Iterator[Row]:
    """Each window alone, then scores of the whole image with and without the offset for seen classes."""
    step, (crop, stride) = int(arrays["class_stride"]), (system.options.crop, system.options.stride)
    offset = torch.zeros(len(system.names), 1, 1)
    offset[system.seen] = 0.1
    for which in letters(arrays):
        small = short_side(arrays[f"image_{which}"], crop)
        yield compare(f"resized_{which}", small.astype(int), arrays[f"resized_{which}"].astype(int), 1)
        yield compare(f"ori_shape_{which}", np.array(arrays[f"image_{which}"].shape[:2]), arrays[f"ori_shape_{which}"], 0)
        image = torch.from_numpy(arrays[f"resized_{which}"]).movedim(2, 0)[None].float()
        native: list[Tensor] = []
        hook = system.trained.register_forward_hook(lambda *given, native=native: native.append(given[2].logits))
        batch = Images(image, torch.zeros(1, *image.shape[2:], dtype=torch.uint8), torch.zeros(1, 4), [which])
        inductive = system.predict(batch).final
        hook.remove()
        yield compare(f"window_logits_{which}", torch.cat(native)[:, ::step], arrays[f"window_logits_{which}"], 1e-4)
        plain = iter(torch.cat(native).split(1))
        upsampled = lambda window, plain=plain: system.upsample(next(plain), window.shape[2:]).sigmoid()  # noqa: E731
        for name, scores in (("inductive", inductive), ("transductive", slide(upsampled, image, crop, stride, at_once=1))):
            if f"{name}_pred_{which}" not in arrays:
                continue
            full = resize(scores, tuple(arrays[f"ori_shape_{which}"].tolist()), corners=False)
            for place, x in (("net", scores), ("ori", full)):
                reference = arrays[f"{name}_scores_{place}_{which}"]
                yield compare(f"{name}_scores_{place}_{which}", x[0, ::step, 3::13, 4::13], reference, 2e-5)
            pred, close = arrays[f"{name}_pred_{which}"], arrays[f"{name}_close_{which}"]
            yield from check_decision(f"{name}_{which}", full, pred[None], close[None])
            yield compare(f"{name}_pred_{which} (pixels)", (full[0].argmax(0).numpy() != pred).sum(), np.zeros(()), 20)


def check_metrics(arrays: Arrays) -> Iterator[Row]:
    kinds = [key.removesuffix("_intersect") for key in arrays if key.endswith("_intersect")]
    classes = len(arrays["text_bank"])
    for kind in kinds:
        meter = SemanticMeter(range(1, classes + 1))
        for which in letters(arrays):
            label = torch.from_numpy(arrays[f"label_raw_{which}"])
            if is_voc(arrays):  # its png: 0 is background
                label = torch.where((label == 0) | (label == IGNORE), IGNORE, label - 1)
            meter.update(torch.from_numpy(arrays[f"{kind}_pred_{which}"]), label)
        state = meter.state
        hit, union = intersection_union(state).unbind(1)
        for name, value in (("intersect", hit), ("union", union), ("pred_area", state.sum(0)), ("label_area", state.sum(1))):
            yield compare(f"{kind}_{name}", value, arrays[f"{kind}_{name}"], 0)
        unseen = (arrays["unseen_idx"] + 1).tolist()
        ours = meter.result([c for c in meter.classes if c not in unseen], unseen)
        values = np.array([ours[name] for name in ("pixel_accuracy", "miou", "seen_miou", "unseen_miou", "hiou")])
        key = f"{kind}_metrics" if f"{kind}_metrics" in arrays else f"{kind}_values"
        yield compare(key, values, arrays[key], 1e-6)


def letters(arrays: Arrays) -> list[str]:
    return [key.removeprefix("image_") for key in arrays if key.startswith("image_")]


# ---- comparing

def check_decision(name: str, scores: Tensor, argmax: np.ndarray, close: np.ndarray) -> Iterator[Row]:
    """B C h w scores: the best class where the two best are not close, and which are."""
    sure = ~close
    yield compare(f"{name} argmax", scores.argmax(1).numpy()[sure], argmax[sure], 0)
    yield flags(f"{name} close", scores, close)


def flags(name: str, scores: Tensor, close: np.ndarray, where: Tensor | None = None) -> Row:
    """Counts flags that differ although the own margin is not near the threshold."""
    best = scores.topk(2, 1).values
    margin = best[:, 0] - best[:, 1]
    ours = margin < CLOSE if where is None else (margin < CLOSE) & where
    wrong = (ours.numpy() != close) & ((margin - CLOSE).abs() > 2e-5).numpy()
    return Row(f"{name} flags", float(wrong.sum()), 0)


def like(x: Tensor, reference: np.ndarray) -> Tensor:
    """Takes every n-th entry of each axis, as the file did: n follows from the sizes."""
    if x.dim() != reference.ndim:
        return x
    return x[tuple(slice(None, None, -(-n // max(m, 1))) for n, m in zip(x.shape, reference.shape, strict=True))]

