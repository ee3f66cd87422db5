"""Measures every array of the files of IMR-HSNet and of its class activation maps (CLIP RN50)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch

from bench.oracle import whole
from bench.world import GivenCam
from model.clip.cam import published_map, resnet_grad_cam
from model.clip.load import clip_from_state
from model.few_shot.cam_prior import TEMPLATE
from model.few_shot.imr_hsnet import IMRHSNet
from model.ops import resize
from tests.golden.check_hsnet import (
    Arrays,
    check_correlations,
    check_training,
    close,
    encoder,
    episode,
    every,
    load,
    official,
    pixels,
)
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare, voted
from util.data.episodes import Episode
from util.data.transforms import clip_crop

MODEL = "RN50-quickgelu"


def check_imr_hsnet(path: Path) -> Iterator[Row]:
    arrays = load(path)
    cams = GivenCam(arrays["query_cam"], arrays["support_cams"][:, :1])
    system = IMRHSNet(encoder(arrays), [cams], 1, IMRHSNet.Options(stages=int(arrays["stages"])))
    state = official(system, int(arrays["salt"]))
    dead = {"hpn_learner.decoder1.0.weight": torch.zeros(128, 128, 3, 3)}  # of which older checkpoints have eight
    system.import_official({f"module.{key}": value for key, value in (state | dead).items()})
    system.eval()
    masks = arrays["support_masks"][:, None]
    batch = episode(arrays["query_image"], arrays["query_mask"], arrays["support_images"][:, :1], masks)

    for role, grids in (("query_cam", "query_cam_grid"), ("support_cams", "support_cam_grids")):
        grid = torch.from_numpy(arrays[grids])
        cams = published_map(grid.view(-1, 7, 7)).view(*grid.shape[:-2], 50, 50)
        yield compare(f"{role} (from {grids})", cams, arrays[role], 2e-6)
    with torch.no_grad():
        yield from check_stages(arrays, system, batch)
        yield from check_losses(arrays, system, batch)
    yield from check_training(arrays, system, batch, "")
    with torch.no_grad():
        yield from check_shots(arrays, system, batch)
        yield from check_state(arrays, system, batch)


def check_stages(arrays: Arrays, system: IMRHSNet, batch: Episode) -> Iterator[Row]:
    kept = record(system)
    system.run(batch)
    middle = resize(kept["adapter"][0], (50, 50)).chunk(2)
    for role, x in zip(("query", "support"), middle, strict=True):
        yield compare(f"{role}_mid", every(x, 16, 5, 5), arrays[f"{role}_mid"], 2e-4)
        yield close(f"{role}_mid_mean_std", torch.stack([x.mean(), x.std(correction=0)]), arrays[f"{role}_mid_mean_std"], 1e-5)
    for t in range(system.head.stages):
        levels = dict(zip(("l2", "l3", "l4"), (x[:2] for x in kept["correlations"][t]), strict=True))
        for name, by in (("l4", (4, 4, 3, 3)), ("l3", (6, 6, 6, 6)), ("l2", (9, 9, 12, 12))):
            yield compare(f"corr_{name}_{t}", every(levels[name], *by), arrays[f"corr_{name}_{t}"], 1e-5)
        yield from check_correlations(arrays, levels, f"_{t}")
        for part, steps, tolerance in (("map", (1, 1), 1e-6 if t == 0 else 1e-5), ("encoded", (8, 5, 5), 3e-5),
                                       ("state", (8, 5, 5), 1e-4), ("decoder", (4, 4), 1e-5), ("logits", (1, 1), 1e-5)):
            both = kept[part][t].chunk(2)
            for role, x in zip(("query", "support"), both, strict=True):
                if part == "map":
                    x = x[:, 0]
                yield compare(f"{role}_{part}_{t}", every(x, *steps), arrays[f"{role}_{part}_{t}"], tolerance)
                if part == "state":
                    stats = torch.stack([x.mean(), x.std(correction=0), x.min(), x.max(), x.abs().mean()])
                    yield compare(f"{role}_state_stats_{t}", stats, arrays[f"{role}_state_stats_{t}"], 1e-4)


def record(system: IMRHSNet) -> dict[str, list]:
    """Keeps what the head's parts see and give, stage by stage."""
    kept, head = defaultdict(list), system.head

    def hook(name: str):
        return lambda _module, _inputs, output: kept[name].append(output)

    for part, name in (("adapter", "adapter"), ("encoder", "encoded"), ("decoder", "decoder"), ("residual", "logits")):
        head.get_submodule(part).register_forward_hook(hook(name))
    pairs, update = head.pairs, head.update

    def kept_pairs(*given):
        found = list(pairs(*given))
        kept["correlations"].append([torch.stack([whole(x) for x in level]) for level in zip(*found, strict=True)])
        return found

    def kept_update(state, shown, *rest):
        kept["map"].append(shown)
        kept["state"].append(update(state, shown, *rest))
        return kept["state"][-1]

    head.pairs, head.update = kept_pairs, kept_update
    return kept


def check_losses(arrays: Arrays, system: IMRHSNet, batch: Episode) -> Iterator[Row]:
    stages = system.run(batch)[2].inner
    for i, role in enumerate(("query", "support")):
        large = resize(stages[-1].chunk(2)[i], (400, 400))
        yield compare(f"{role}_logits_400", large[..., ::16, ::16], arrays[f"{role}_logits_400"], 1e-5)
    features = system.features(batch)
    for t, logits in enumerate(stages):
        losses = system.terms(SimpleNamespace(inner=[logits]), features, batch)
        found = torch.stack([losses["query"], losses["support"]])
        yield compare(f"stage_losses[{t}]", found, arrays["stage_losses"][t], 5e-6)


def check_shots(arrays: Arrays, system: IMRHSNet, batch: Episode) -> Iterator[Row]:
    votes = []
    for k in range(5):
        batch.support = torch.from_numpy(arrays["support_images"][:, k : k + 1]).movedim(-1, -3).float()
        system.priors = [GivenCam(arrays["query_cam"], arrays["support_cams"][:, k : k + 1])]
        votes.append(system.predict(batch).votes)
    votes, side = torch.cat(votes, 1), (400, 400)
    shots = torch.stack([torch.stack([voted(v[None], side) for v in each]) for each in votes])
    yield pixels("shot_predictions", shots, arrays["shot_predictions"])
    for shot in (1, 5):
        found = torch.stack([voted(v[:shot], side) for v in votes])
        yield pixels(f"prediction_{shot}shot", found, arrays[f"prediction_{shot}shot"])
    width, height = arrays["original_wh"].tolist()
    original = voted(votes[0, :1], (height, width))
    yield pixels("original_prediction_1shot", original, arrays["original_prediction_1shot"][0])


def check_state(arrays: Arrays, system: IMRHSNet, batch: Episode) -> Iterator[Row]:
    """One stage, with a learned first state a hundred times larger."""
    batch.support = torch.from_numpy(arrays["support_images"][:, :1]).movedim(-1, -3).float()
    system.priors, system.head.stages = [GivenCam(arrays["query_cam"], arrays["support_cams"][:, :1])], 1
    system.head.state *= 100
    for role, logits in zip(("query", "support"), system.run(batch)[2].inner[0].chunk(2), strict=True):
        yield compare(f"state100_{role}_logits", logits[..., ::2, ::2], arrays[f"state100_{role}_logits"], 1e-5)


def check_clip(path: Path) -> Iterator[Row]:
    """Class activation maps of CLIP's RN50 from the image to the 50 x 50 map."""
    arrays = load(path)
    with torch.device("meta"):
        empty = open_clip.model.CLIP(**open_clip.get_model_config(MODEL)).state_dict()
        shapes = {key: value.shape for key, value in empty.items()}
    state = {key: tensor_for(key, shape, int(arrays["salt"])) for key, shape in shapes.items() if key != "attn_mask"}
    clip = clip_from_state(state).eval()
    tower, names = clip.visual, [str(name) for name in arrays["class_names"]]
    with torch.no_grad():
        yield compare("tokens", clip.text.tokenizer([TEMPLATE.format(n) for n in names]).numpy(), arrays["tokens"], 0)
        text = clip.text.clip.encode_text(torch.from_numpy(arrays["tokens"]).long())
        yield close("text_features", text, arrays["text_features"], 2e-5)
        bank = clip.text.bank([TEMPLATE.format(n) for n in names])
        image = tower.normalise(torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None])
        yield compare("image_input", image[0, :, ::8, ::8], arrays["image_input"], 1e-6)
        wide = tower.normalise(clip_crop(arrays["nonsquare_image"].astype(np.float32), tower.side)[None])
        yield compare("nonsquare_input", wide[0, :, ::7, ::7], arrays["nonsquare_input"], 1e-6)
        activation = tower.activation(image)
        yield close("activation", activation[0, ::16], arrays["activation"], 2e-5)
        stats = torch.stack([activation.mean(), activation.std(correction=0), (activation == 0).float().mean()])
        yield close("activation_mean_std", stats, arrays["activation_mean_std"], 2e-5)
        feature = tower.pool(activation)
        yield close("image_feature", feature, arrays["image_feature"], 2e-5)
        logits = 100 * torch.nn.functional.normalize(feature, dim=-1) @ bank.T
        yield close("logits", logits[0], arrays["logits"], 2e-5)
        yield close("probs", logits[0].softmax(0), arrays["probs"], 2e-5)
    classes, every_class = len(names), torch.arange(len(names))
    candidates = torch.ones(classes, classes, dtype=torch.bool)
    alpha, raw = resnet_grad_cam(tower, activation.expand(classes, -1, -1, -1), bank, candidates, every_class)
    yield close("alpha", alpha[:, ::8], arrays["alpha"], 1e-4)
    yield close("alpha_mean_std", torch.stack([alpha.mean(1), alpha.std(1, correction=0)], 1), arrays["alpha_mean_std"], 1e-4)
    yield close("grid_raw", raw, arrays["grid_raw"], 1e-4)
    at = int(arrays["class_index"])
    yield close("cam_7", raw[at].relu(), arrays["cam_7"], 1e-4)
    yield close("cam_224", published_map(raw, grid=224)[at, ::4, ::4], arrays["cam_224"], 1e-4)
    cams = published_map(raw)
    yield close("cam_50", cams[at], arrays["cam_50"], 1e-4)
    yield close("cam_50_all", cams[:, ::3, ::3], arrays["cam_50_all"], 1e-4)
