"""WeCLIP and CLIP-ES on a small CLIP: a batch equals its images, no step waits for the device, variants, wrong input."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.clip.affinity import components
from model.clip.load import clip_tensors
from model.weak import clip_es, maps, weclip
from model.weak.affinity import filtered
from model.weak.clip_es import CLIPES
from model.weak.losses import balanced_loss, pair_labels
from model.weak.maps import BACKGROUND, Pairs, background_texts, decide, see
from model.weak.par import refine_by_colour
from model.weak.weclip import WeCLIP
from tests.make.runs import in_processes
from tests.make.weak import CLASSES, Images, bank, batch, clip, system
from util.config import Train, options_of
from util.data.folds import read_class_names
from util.errors import UserError
from util.run.distributed import Context
from util.score.metrics import confusion, intersection_union

LISTS = Path(__file__).parents[1] / "lists"


def labels(model: WeCLIP, given: Images, rfm: bool = False) -> Tensor:
    images = model.normalise(given.image)
    seen = see(model.vision.visual, images, 3, hidden=True)
    affinity = weclip.affinity_of(model.head(seen.hidden, seen.grid)[0]).detach() if rfm else None
    return model.pseudo_label(seen, images, model.pairs(given.present, images.device), affinity, given.valid)


@pytest.mark.parametrize("rfm", [False, True])
def test_pseudo_labels_of_a_batch_are_those_of_its_images(rfm: bool) -> None:
    """Ragged numbers of labels, an image without any among them; in float64, so that no rounding decides."""
    model, given = system().double().eval(), batch()
    given.image = given.image.double()
    together = labels(model, given, rfm)
    for i, ids in enumerate(given.present):
        assert torch.equal(labels(model, given.rows(slice(i, i + 1)), rfm)[0], together[i])
        found = set(together[i].unique().tolist())
        assert found <= {0, *(ids.nonzero()[:, 0] + 1).tolist()}
        assert len(found) > 1 or not ids.any()
    assert (labels(model, given, not rfm) != together).any()


def test_the_filter_starts_after_the_static_steps() -> None:
    given = batch()
    by_step = {step: system().eval().losses(given, step) for step in (0, 9, 10)}
    assert torch.equal(by_step[0]["segmentation"], by_step[9]["segmentation"])
    assert not torch.equal(by_step[9]["segmentation"], by_step[10]["segmentation"])


def test_absolute_scores_follow_the_affinity_and_signed_ones_the_mass() -> None:
    """Block 0 attends most between patches, block 1 as the decoder does, block 2 neither."""
    affinity = torch.eye(4)[None]
    attention = torch.stack([torch.full((4, 4), 0.25), 0.9 * torch.eye(4), torch.full((4, 4), 0.2).fill_diagonal_(0)])[None]
    for absolute, kept in ((False, [[True, True, False]]), (True, [[False, True, False]])):
        combined, keep = filtered(attention, affinity, absolute)
        assert keep.tolist() == kept
        torch.testing.assert_close(combined, affinity * attention[keep].mean(0))
    several = filtered(attention, 0.01 * affinity, absolute=False)[1]
    assert several.tolist() == [[True, True, False]]  # whatever the decoder says


class Waits(TorchDispatchMode):
    """Counts operations after which the host would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        masks = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in (args[1] if isinstance(args[1], list) else ())
        )
        if masks or any(name == n or name.startswith(f"{n}.") for n in self.NAMES):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("step", [0, 10])
def test_a_training_step_never_waits_for_the_device(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = system(outside="ignore", absent="drop").train(), batch()
    pairs = model.pairs(given.present, torch.device("cpu"))  # from labels on the CPU: allowed
    monkeypatch.setattr(model, "pairs", lambda *_: pairs)
    with Waits() as waits:
        sum(model.losses(given, step).values()).backward()
    assert waits.found == []
    with Waits() as waits:
        Pairs.of(given.present, torch.device("cpu"))
    assert waits.found  # the net does catch


def test_everything_frozen_stays_and_everything_else_learns() -> None:
    model = system().train()
    sum(model.losses(batch(), 10).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    optimizer = model.optimizer(Train(base_lr=2e-3, weight_decay=0.01))
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.head.parameters()}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (2e-3, 0.01, (0.9, 0.999), 1e-8)


def two_steps(context: Context) -> dict[str, Tensor]:
    """WeCLIP after two steps on four images in float64, dropout included, across the start of RFM."""
    model = system(static_steps=1).double().train()
    optimizer = model.optimizer(Train(base_lr=1e-3))
    if context.world > 1:
        model.distribute(torch.device("cpu"))
    torch.manual_seed(5)
    given = batch()
    given.image = given.image.double()
    share = 4 // context.world
    for step in range(2):
        optimizer.zero_grad()
        sum(model.losses(given.rows(slice(context.rank * share, (context.rank + 1) * share)), step).values()).backward()
        optimizer.step()
    return dict(model.trained_state())


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, together = two_steps(Context(torch.device("cpu"))), in_processes(2, tmp_path, two_steps)
    start = system(static_steps=1).double().trained_state()
    assert max((one[n] - start[n]).abs().max() for n in one) > 1e-3
    for name, value in one.items():
        for other in together:
            if name.endswith("in_proj_bias"):  # the keys' gradient is zero but for rounding, which Adam turns into steps
                value[256:512] = other[name][256:512] = 0
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8, msg=name)


def dilated(image: Tensor, mask: Tensor) -> Tensor:
    """PAR from its description: neighbours by unfolding, one dilation after the other."""

    def around(x: Tensor) -> Tensor:
        parts = []
        for d in (1, 2, 4, 8, 12, 24):
            padded = F.pad(x, (d,) * 4, mode="replicate")
            cells = F.unfold(padded, 3, dilation=d).unflatten(1, (x.shape[1], 9)).unflatten(3, x.shape[2:])
            parts.append(cells[:, :, [0, 1, 2, 3, 5, 6, 7, 8]])
        return torch.cat(parts, 2)

    near = around(image)
    sigma = near.std(2, keepdim=True)
    colour = -(((near - image[:, :, None]).abs() / (sigma + 1e-8) / 0.3) ** 2).mean(1)
    distance = torch.tensor([r * d for d in (1, 2, 4, 8, 12, 24) for r in (2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5)])
    place = (-((distance / (distance.std() + 1e-8) / 0.3) ** 2)).softmax(0)
    weights = colour.softmax(1) + 0.01 * place.view(1, -1, 1, 1)
    for _ in range(20):
        mask = (around(mask) * weights[:, None]).sum(2)
    return mask


def test_refinement_by_colour_equals_its_description() -> None:
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.randn(2, 3, 30, 41, generator=generator), torch.rand(2, 4, 30, 41, generator=generator)
    mask[1, 2:] = 0
    ours = refine_by_colour(image, mask)
    torch.testing.assert_close(ours, dilated(image, mask), rtol=1e-4, atol=1e-6)
    assert (ours[1, 2:] == 0).all()
    torch.testing.assert_close(refine_by_colour(image[1:], mask[1:, :2])[0], ours[1, :2])
    assert math.isclose(float(refine_by_colour(image, torch.ones(2, 1, 30, 41)).mean()), 1.01**20, rel_tol=1e-4)


def snake(n: int) -> np.ndarray:
    """A component as long as can be: rows joined at alternating ends."""
    field = np.zeros((n, n), bool)
    field[::2] = True
    field[1::4, -1] = field[3::4, 0] = True
    return field


def test_components_of_the_longest_paths() -> None:
    rng = np.random.default_rng(0)
    fields = [turned for n in (7, 33) for f in (snake(n), snake(n)[::-1]) for turned in (f, f.T, f[:, ::-1], f[:, ::-1].T)]
    for field in fields + [rng.random((24, 40)) < p for p in (0.25, 0.35, 0.45)]:
        count, expected = cv2.connectedComponents(field.astype(np.uint8), connectivity=8)
        ours = components(torch.from_numpy(field.copy())[None])[0].numpy()
        pairs = set(zip(expected.ravel().tolist(), ours.tolist(), strict=True))
        assert len(pairs) == count == len({b for _, b in pairs}) and (0, 0) in pairs


def test_one_of_two_sets_of_pixels_may_be_empty() -> None:
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    for label in (torch.zeros(2, 16, 16), torch.full((2, 16, 16), 3), torch.full((2, 16, 16), 255)):
        loss = balanced_loss(logits, label.to(torch.uint8))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        assert (loss == 0) == bool((label == 255).all())
    mixed = torch.zeros(2, 16, 16, dtype=torch.uint8)
    mixed[0, :2], mixed[1, 0] = 3, 255
    large = F.interpolate(logits, (16, 16), mode="bilinear").movedim(1, -1)
    parts = [F.cross_entropy(large[mixed == c], mixed[mixed == c].long()) for c in (0, 3)]
    torch.testing.assert_close(balanced_loss(logits, mixed), sum(parts) / 2)


def test_pairs_of_patches_on_a_grid_that_is_not_square() -> None:
    label = torch.zeros(1, 5 * 16 + 3, 12 * 16 + 9, dtype=torch.uint8)
    label[:, 16:32, 32:48], label[:, :16, :16] = 2, 255
    near = pair_labels(label, 16, (5, 12), radius=8).view(5, 12, 5, 12)
    assert near[0, 1, 0, 9] == 1 and near[0, 1, 0, 10] == 255  # distance 8 is near, 9 is not
    assert near[1, 2, 0, 2] == 0 and near[1, 2, 1, 2] == 1
    assert (near[0, 0] == 255).all() and (near[:, :, 0, 0] == 255).all()


def test_variants_of_the_labels() -> None:
    given = batch()
    given.valid[0] = torch.tensor([8, 40, 0, 56])
    plain, inside = labels(system(), given), labels(system(outside="ignore"), given)
    assert (inside[0, 8:40, :56] == plain[0, 8:40, :56]).all() and (inside[0] == 255).sum() == 64 * 80 - 32 * 56
    assert torch.equal(inside[1:], plain[1:])

    model, dropping = system(), system(absent="drop")
    seen = see(model.vision.visual, model.normalise(given.image), 3)
    pairs = model.pairs(given.present, given.image.device)
    found = maps.refined_maps(model.vision, model.bank, seen, pairs, 0.4, 3)
    probability = maps.class_maps(model.vision, model.bank, seen, pairs).probability
    kept = {(int(i), int(c) + 1) for i, c, p in zip(pairs.image, pairs.cls, probability, strict=True)
            if p[c] >= 1 / (given.present[i].sum() + 4)}  # fmt: skip
    assert 0 < len(kept) < len(pairs) and (found.chance >= 1).sum() == len(kept)
    shown = labels(dropping, given)
    assert {(i, c) for i in range(4) for c in shown[i].unique().tolist() if c} <= kept
    weighed = labels(system(absent="weigh"), given)
    areas = [int((label > 0).sum()) for label in (shown, weighed, plain)]
    assert areas == sorted({*areas})  # dropped < weighed < kept
    assert not torch.equal(model.normalise(given.image), system(statistics="clip").normalise(given.image))


def test_pseudo_labels_are_scored_where_there_are_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the steps since the last value; nothing of it reaches the losses."""
    monkeypatch.setattr("model.weak.system.RANGE", 3)
    model, given = system().eval(), batch()
    expected, plain = labels(model, given), model.losses(given, 0)
    given.label = torch.full_like(expected, 255)
    given.label[0] = expected[0]
    given.label[2, :32] = 0
    for _ in range(2):
        assert model.measured() == {}
        losses = model.losses(given, 0)
    assert all(torch.equal(losses[name], plain[name]) for name in plain)
    counted = given.label != 255
    state = confusion(expected[counted], given.label[counted], 1 + CLASSES)
    counts = intersection_union(state).double()
    assert model.measured() == {"pseudo_label_miou": pytest.approx(float((counts[:, 0] / counts[:, 1]).nanmean()))}
    assert model.measured() == {} and not [name for name in model.state_dict() if "counted" in name]


def test_an_image_without_labels_is_background_and_a_batch_of_them_trains() -> None:
    given, model = batch(((), ())), system()
    assert (labels(model, given) == 0).all()
    assert all(torch.isfinite(x) for x in model.losses(given, 10).values())


def test_unused_slots_never_win() -> None:
    pairs = Pairs.of(batch().present, torch.device("cpu"))
    assert pairs.value.tolist() == [[0, 1, 4, 0], [0, 0, 0, 0], [0, 3, 5, 6], [0, 2, 0, 0]]
    assert pairs.first.tolist() == [0, 0, 2, 5]
    scores = torch.zeros(4, 4, 2, 2)
    scores[0, 2], scores[3, 1] = 0.1, 0.2
    assert decide(scores, pairs)[:, 0, 0].tolist() == [4, 0, 0, 2]


def test_prediction_needs_neither_labels_nor_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = system(long_side=96).eval(), batch(size=(50, 37))
    monkeypatch.setattr("model.weak.maps.class_maps", lambda *_: pytest.fail("a class activation map at test time"))
    found = model.predict(Images(given.image, None, None, given.name))
    assert found.final.shape == (4, 1 + CLASSES, 6, 4) == found.variants["single scale"].shape  # of 96 x 71 pixels
    mirrored = model.predict(Images(given.image.flip(3), None, None, given.name))
    one = system(long_side=96, scales=[1.0]).eval()
    assert not torch.allclose(one.predict(given).final, found.final, atol=1e-3)
    assert not torch.allclose(mirrored.variants["single scale"], found.variants["single scale"], atol=1e-3)


def test_baselines_are_maps_of_the_given_labels() -> None:
    model, given = system(long_side=96).eval(), batch(size=(50, 37))
    found = model.predict(given, baselines=True).variants
    assert (found["everything background"].argmax(1) == 0).all()
    pseudo = found["pseudo label of the given labels"].argmax(1).flatten(1)
    largest = [max(ids, key=lambda c: (row == c).sum()) if (ids := given.present[i].nonzero()[:, 0] + 1).numel() else 0
               for i, row in enumerate(pseudo)]  # fmt: skip
    assert found["everything the largest given class"].argmax(1).flatten().tolist() == [int(c) for c in largest]
    for name in ("CAM of the given labels", "refined CAM of the given labels", "pseudo label of the given labels"):
        assert found[name].shape == (4, 1 + CLASSES, 50, 37)
        assert (found[name][:, 1:].amax((2, 3)) > 0).eq(given.present).all()


def test_clip_es() -> None:
    model = CLIPES(clip(), bank(), clip_es.Options(layers=3))
    given = batch(size=(50, 37))
    found = model.predict(given)
    assert found.final.shape == (4, 1 + CLASSES, 50, 37) and (found.final[1, 0] == 1).all()
    assert (found.final[:, 1:].amax((2, 3)) > 0).eq(given.present).all()
    assert not torch.equal(found.final, found.variants["CAM"])
    squared = CLIPES(clip(), bank(), clip_es.Options(layers=3, power=2)).predict(given)
    torch.testing.assert_close(squared.final[:, 0], found.final[:, 0] ** 2)
    for i in range(4):
        torch.testing.assert_close(model.predict(given.rows(slice(i, i + 1))).final[0], found.final[i], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="trains nothing"):
        model.losses(given, 0)
    assert model.groups(Train()) == [] and not model.trained_state()


def published(model: WeCLIP) -> dict[str, Tensor]:
    state = {official: v.clone() for ours, v in model.state_dict().items() if (official := model.official_name(ours))}
    inside = {f"encoder.{k}": v.half() for k, v in clip_tensors(model.vision).items()}
    inside["encoder.visual.positional_embedding_new"] = torch.zeros(9, 128)
    return state | inside | {"par.kernel": torch.zeros(8, 1, 3, 3)}


def test_published_checkpoints_are_read_strictly() -> None:
    model, other = system(), system()
    with torch.no_grad():
        for p in other.head.parameters():
            p.add_(1)
    state = published(other)
    model.import_official({f"module.{k}": v for k, v in state.items()})
    assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), other.head.parameters(), strict=True))
    wrong = {
        "not part of this model: dino_decoder_fts_fuse": state | {"dino_decoder_fts_fuse.linear_fuse.bias": torch.zeros(256)},
        "missing: decoder.linear_pred.bias": {k: v for k, v in state.items() if k != "decoder.linear_pred.bias"},
        r"linear_pred.weight is \(81, 256, 1, 1\), expected \(7": (
            state | {"decoder.linear_pred.weight": torch.zeros(81, 256, 1, 1)}),
        "another CLIP": state | {"encoder.visual.proj": state["encoder.visual.proj"] + 1},
    }
    for message, damaged in wrong.items():
        with pytest.raises(UserError, match=message):
            model.import_official(damaged)


def test_wrong_input() -> None:
    model, given = system(), batch()
    with pytest.raises(UserError, match="20 classes, but this model has 6"):
        model.losses(Images(given.image, torch.zeros(4, 20, dtype=torch.bool), given.valid, given.name, given.label), 0)
    with pytest.raises(UserError, match="smaller than CLIP's patch"):
        model.losses(batch(size=(64, 12)), 0)
    with pytest.raises(UserError, match="last 8 blocks is wanted, but this CLIP has 4"):
        system(layers=8).losses(given, 0)
    for options in ({"score": "both"}, {"outside": "drop"}, {"absent": "maybe"}, {"statistics": "clips"}, {"box": 1.0},
                    {"template": "a photo"}, {"scales": []}, {"scales": [0.0]}, {"rfm_layers": 1}, {"layers": 0},
                    {"static_steps": -1}, {"dropout": 1.0}, {"affinity_weight": -1}, {"long_side": 0}):  # fmt: skip
        with pytest.raises(UserError, match=f"Method.{next(iter(options))}"):
            options_of(options, weclip.Options)


def test_background_texts() -> None:
    texts = {name: read_class_names(LISTS / name / "classes.txt").texts for name in ("pascal", "coco")}
    assert background_texts(texts["pascal"]) == list(BACKGROUND)
    assert [b for b in BACKGROUND if b not in background_texts(texts["coco"])] == ["keyboard", "sign"]
