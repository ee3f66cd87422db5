"""Measures every array of the HSNet file against our system on the same deterministic weights."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.oracle import masked, whole
from model.backbone import build_encoder
from model.few_shot.conv4d import CenterPivotConv4d, Cosines, unit
from model.few_shot.hsnet import Head, HSNet
from model.few_shot.system import FewShot
from model.system import Frozen
from tests.golden.fill import tensor_for
from tests.golden.rows import Row, compare, voted
from util.data.episodes import Episode
from util.score.metrics import FewShotMeter, vote

LEVELS = ("l4", "l3", "l2")  # order of the file
Arrays = dict[str, np.ndarray]


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def build(arrays: Arrays, cls: type[HSNet] = HSNet) -> HSNet:
    """The system with every tensor filled under its official name, loaded by `import_official`, `module.` and classifier too."""
    system = cls(encoder(arrays), [], 1, cls.Options())
    system.import_official({f"module.{key}": value for key, value in official(system, int(arrays["salt"])).items()})
    return system.eval()


def encoder(arrays: Arrays) -> Frozen:
    """The backbone that the file names, else ResNet-50."""
    return Frozen(build_encoder(str(arrays.get("backbone", "resnet50")), stem="plain", dilated=False))


def official(system: FewShot, salt: int) -> dict[str, Tensor]:
    own = {system.official_name(name): value.shape for name, value in system.state_dict().items()}
    own |= {"backbone.fc.weight": (1000, 2048), "backbone.fc.bias": (1000,)}
    return {name: tensor_for(name.removeprefix("backbone."), shape, salt) for name, shape in own.items() if name is not None}


def episode(query: np.ndarray, query_mask: np.ndarray, support: np.ndarray, support_mask: np.ndarray) -> Episode:
    """Arrays of the file as a batch: B H W 3, B H W, B K H W 3, B K H W."""
    images = lambda x: torch.from_numpy(x).movedim(-1, -3).float()  # noqa: E731
    B, K = support.shape[:2]
    return Episode(
        query=images(query), query_mask=torch.from_numpy(query_mask), support=images(support),
        support_mask=torch.from_numpy(support_mask), base_label=torch.zeros(0), cls=torch.ones(B, dtype=torch.int64),
        base_rank=torch.full((B,), -1), present=torch.zeros(B, 20, dtype=torch.bool), clip_query=[],
        annotation_hw=torch.zeros(B, 2), number=torch.arange(B), original_mask=[], original_base=[],
        query_name=["golden"] * B, support_names=[["golden"] * K] * B,
    )  # fmt: skip


def check_hsnet(path: Path) -> Iterator[Row]:
    arrays = load(path)
    system = build(arrays)
    batch = episode(*(arrays[name] for name in ("query_image", "query_mask", "support_images", "support_masks")))
    first = episode(*(arrays[name] for name in ("query_image", "query_mask")), arrays["support_images"][:, :1],
                    arrays["support_masks"][:, :1])  # fmt: skip
    with torch.no_grad():
        yield from check_features(arrays, system, first)
        yield from check_units(arrays)
        yield from check_encoder(arrays, system, first)
        yield from check_predictions(arrays, system, batch)
    yield from check_training(arrays, system, first, "")
    small = episode(arrays["small_query_image"], arrays["small_query_mask"], arrays["small_support_image"][:, None],
                    arrays["small_support_mask"][:, None])  # fmt: skip
    with torch.no_grad():
        correlations = correlate(system, small)
        for name, by in (("l4", (1, 1, 1, 1)), ("l3", (3, 3, 2, 2)), ("l2", (5, 5, 4, 4))):
            yield compare(f"small_corr_{name}", every(correlations[name], *by), arrays[f"small_corr_{name}"], 1e-5)
        yield compare("small_logits", system.run(small)[2].final, arrays["small_logits"], 1e-5)
    yield from check_training(arrays, system, small, "small_")


def check_features(arrays: Arrays, system: HSNet, batch: Episode) -> Iterator[Row]:
    features = system.features(batch)
    query = [x.double() for level in features.query.levels for x in level.unbind(1)]
    support = [x.double() for level in features.support.levels for x in masked(level, features.mask).unbind(1)]
    for name, maps in (("query_feature", query), ("masked_support_feature", support)):
        yield close(f"{name}_mean", torch.stack([x.mean() for x in maps]), arrays[f"{name}_mean"], 1e-5)
        yield close(f"{name}_std", torch.stack([x.std(correction=0) for x in maps]), arrays[f"{name}_std"], 1e-5)
    negative = torch.stack([(x < 0).double().mean() for x in query])
    yield compare("query_feature_negative_fraction", negative, arrays["query_feature_negative_fraction"], 1e-5)
    correlations = correlate(system, batch)
    for name, by in (("l4", (3, 3, 3, 3)), ("l3", (5, 5, 4, 4)), ("l2", (9, 9, 7, 7))):
        yield compare(f"corr_{name}", every(correlations[name], *by), arrays[f"corr_{name}"], 1e-5)
    yield from check_correlations(arrays, correlations, "")


def check_correlations(arrays: Arrays, correlations: dict[str, Tensor], suffix: str) -> Iterator[Row]:
    blocks = [x.double() for name in LEVELS for x in correlations[name].unbind(1)]
    yield close(f"corr_mean{suffix}", torch.stack([x.mean() for x in blocks]), arrays[f"corr_mean{suffix}"], 1e-5)
    yield close(f"corr_std{suffix}", torch.stack([x.std(correction=0) for x in blocks]), arrays[f"corr_std{suffix}"], 1e-5)
    zeros = torch.stack([(x == 0).double().mean() for x in blocks])
    yield compare(f"corr_zero_fraction{suffix}", zeros, arrays[f"corr_zero_fraction{suffix}"], 1e-6)


def correlate(system: HSNet, batch: Episode) -> dict[str, Tensor]:
    """Of the first support of each episode, by level."""
    features = system.features(batch)
    pairs = Head.pairs(features.query.levels, features.support.levels, features.mask)
    levels = [[whole(pair) for pair in levels] for levels in pairs]
    return dict(zip(("l2", "l3", "l4"), map(torch.stack, zip(*levels, strict=True)), strict=True))


def check_units(arrays: Arrays) -> Iterator[Row]:
    for i in range(3):
        query, support = (torch.from_numpy(arrays[f"unit_corr_{side}_{i}"])[:, None] for side in ("query", "support"))
        pairs = [Cosines(unit(q), s, torch.ones(s.shape[2:])) for q, s in zip(query, support, strict=True)]
        yield compare(f"unit_corr_{i}", torch.stack([whole(pair) for pair in pairs]), arrays[f"unit_corr_out_{i}"], 1e-6)
        kernel, stride = map(int, arrays[f"unit_cp4d_kernel_stride_{i}"])
        outputs, inputs = arrays[f"unit_cp4d_conv1_weight_{i}"].shape[:2]
        conv = CenterPivotConv4d(inputs, outputs, kernel, stride)
        conv.load_state_dict({f"{part}.{leaf}": torch.from_numpy(arrays[f"unit_cp4d_{part}_{leaf}_{i}"])
                              for part in ("conv1", "conv2") for leaf in ("weight", "bias")})  # fmt: skip
        yield compare(f"unit_cp4d_{i}", conv(torch.from_numpy(arrays[f"unit_cp4d_in_{i}"])), arrays[f"unit_cp4d_out_{i}"], 2e-6)
    votes = torch.from_numpy(arrays["vote_logits"])
    yield compare("vote_prediction", torch.stack([vote(v.argmax(1)) for v in votes]), arrays["vote_prediction"], 0)


def check_encoder(arrays: Arrays, system: HSNet, batch: Episode) -> Iterator[Row]:
    kept = Outputs(system.head.encoder, ("encoder_layer4", "encoder_layer3", "encoder_layer2", "encoder_layer4to3",
                                         "encoder_layer3to2"))  # fmt: skip
    kept.also(system.head, "encoder")
    logits = system.run(batch)[2].final
    kept.remove()
    for name in kept.names[:-1]:
        yield compare(f"out_{name}", kept[name][:, ::16, ::6, ::6], arrays[f"out_{name}"], 3e-5)
    yield compare("encoded", kept["encoder"][:, ::8, ::3, ::3], arrays["encoded"], 3e-5)
    yield compare("logits_100", logits, arrays["logits_100"], 1e-5)
    yield compare("logits_400", system.predict(batch).final[..., ::8, ::8], arrays["logits_400"], 1e-5)


def check_predictions(arrays: Arrays, system: HSNet, batch: Episode) -> Iterator[Row]:
    system.shot = batch.support.shape[1]
    votes = system.predict(batch).votes[0]
    system.shot = 1
    side, (width, height) = (400, 400), arrays["original_wh"].tolist()
    shots = torch.stack([voted(v[None], side) for v in votes])
    yield pixels("shot_predictions", shots, arrays["shot_predictions"][0])
    for shot, size, name in ((1, side, "prediction"), (5, side, "prediction"), (1, (height, width), "original_prediction"),
                             (5, (height, width), "original_prediction")):  # fmt: skip
        yield pixels(f"{name}_{shot}shot", voted(votes[:shot], size), arrays[f"{name}_{shot}shot"][0])
    truth = torch.from_numpy(np.where(arrays["query_boundary"][0], 255, arrays["query_mask"][0]))
    for shot in (1, 5):
        counts = FewShotMeter([1]).update(torch.from_numpy(arrays[f"prediction_{shot}shot"][0]), truth, 1)
        yield compare(f"eval_inter_{shot}shot", np.array([counts.background_intersection, counts.intersection]),
                      arrays[f"eval_inter_{shot}shot"], 0)  # fmt: skip
        yield compare(f"eval_union_{shot}shot", np.array([counts.background_union, counts.union]),
                      arrays[f"eval_union_{shot}shot"], 0)  # fmt: skip


def check_training(arrays: Arrays, system: FewShot, batch: Episode, prefix: str, losses: dict[str, Tensor] | None = None
                   ) -> Iterator[Row]:  # fmt: skip
    """Loss, and of every gradient the norm and a projection that sees sign and order; some gradients whole."""
    names = [str(name) for name in arrays[f"{prefix}grad_names"]]
    ours = {system.official_name(key): parameter for key, parameter in system.named_parameters()}
    losses = system.losses(batch) if losses is None else losses
    yield compare(f"{prefix}loss", sum(losses.values()), arrays[f"{prefix}loss"], 5e-6)
    found = dict(zip(names, torch.autograd.grad(sum(losses.values()), [ours[name] for name in names]), strict=True))
    reference, salt = arrays[f"{prefix}grad_norms"], int(arrays["salt"]) + 1000
    norms = np.array([float(gradient.double().norm()) for gradient in found.values()])
    yield compare(f"{prefix}grad_norms", norms, reference, 2e-3, relative=True)
    probes = [float((g.double() * tensor_for(name, g.shape, salt).double()).sum()) for name, g in found.items()]
    yield compare(f"{prefix}grad_probes", np.array(probes) / reference, arrays[f"{prefix}grad_probes"] / reference, 2e-3)
    for key in arrays:
        if key.startswith(f"{prefix}grad__"):
            name = key.removeprefix(f"{prefix}grad__")
            gradient = found[name][:, ::8, ::5, ::5] if name == "state" else found[name]
            yield close(key, gradient, arrays[key], 5e-3 if name == "state" else 3e-3)
    assert prefix or any(key.startswith("grad__") for key in arrays)


class Outputs:
    """Keeps what children of a module gave, by name."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        self.names: list[str] = []
        self.kept: dict[str, list[Tensor]] = {}
        self.hooks = []
        for name in names:
            self.also(module, name)

    def also(self, module: nn.Module, name: str) -> None:
        def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            self.kept.setdefault(name, []).append(output)

        self.names.append(name)
        self.hooks.append(module.get_submodule(name).register_forward_hook(keep))

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name][0]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def every(x: Tensor, *steps: int) -> Tensor:
    """x[..., ::a, ::b, ...] over the last axes."""
    return x[(..., *(slice(None, None, step) for step in steps))]


def close(name: str, ours: Tensor, reference: np.ndarray, tolerance: float) -> Row:
    """Error relative to the largest value of the reference."""
    scale = float(np.abs(reference).max())
    return compare(name, ours.double() / scale, reference.astype(np.float64) / scale, tolerance)


def pixels(name: str, ours: Tensor, reference: np.ndarray) -> Row:
    """Share of the pixels that differ."""
    if tuple(ours.shape) != reference.shape:
        return Row(f"{name} {tuple(ours.shape)} instead of {reference.shape}", float("inf"), 1e-4)
    return Row(name, float((ours.numpy() != reference).mean()), 1e-4)
