"""CLIP-RC and ZegCLIP on a small CLIP: masks, losses, settings, windows, published checkpoints. Golden arrays: tests/golden."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import clip_rc as plainly
from model.clip.load import clip_from_state
from model.inference import slide
from model.system import Frozen
from model.zero_shot.clip_rc import CLIP_RC
from model.zero_shot.losses import focal_and_dice
from model.zero_shot.texts import MANY, text_bank
from model.zero_shot.tower import owners, reading_mask
from model.zero_shot.zegclip import ZegCLIP
from tests.make import small_clip
from tests.make.runs import CPU, in_processes
from tests.make.zero_shot import published
from util.config import Train
from util.data.folds import ClassNames
from util.data.loading import RangeSampler
from util.errors import UserError
from util.run.distributed import Context

NAMES, SEEN = ("cat", "dog", "sky", "tree", "boat"), (3, 0, 1)  # not in order: an index is not a class
SYSTEMS = (CLIP_RC, ZegCLIP)


@dataclass
class Images:
    """Stands for the batch of dense systems; the fields that these read."""

    image: Tensor
    label: Tensor
    valid: Tensor
    name: list[str]

    def rows(self, rows: list[int]) -> "Images":
        return Images(self.image[rows], self.label[rows], self.valid[rows], [self.name[i] for i in rows])


def small(cls: type[ZegCLIP] = CLIP_RC, seed: int = 0, **options: object) -> ZegCLIP:
    clip = Frozen(clip_from_state(small_clip().state_dict()))
    torch.manual_seed(seed)
    system = cls(clip, NAMES, F.normalize(torch.randn(5, 32), dim=1), SEEN, cls.Options(**{"prompts": 3, "crop": 64, "stride": 40,
                                                                                        **options}))  # fmt: skip
    for name, parameter in system.trained.named_parameters():  # far from the tiny differences of a fresh start
        if name.endswith("weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return system


def random_images(batch: int = 2, side: tuple[int, int] = (64, 64)) -> Images:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randint(6, (batch, 4, 4), generator=generator)
    label = coarse.repeat_interleave(side[0] // 4 + 1, 1).repeat_interleave(side[1] // 4 + 1, 2)[:, : side[0], : side[1]]
    label = torch.where(label == 5, 255, label).to(torch.uint8)
    return Images(255 * torch.rand(batch, 3, *side, generator=generator), label, torch.tensor([[0, side[0], 0, side[1]]] * batch),
                  [f"im{i}" for i in range(batch)])  # fmt: skip


# ---- regions

@pytest.mark.parametrize("prompts", [10, 100])
def test_reading_mask_at_512(prompts: int) -> None:
    """Spec 3.5: how many keys each kind of token may read; an own window is 8 x 8."""
    mask, N = reading_mask((32, 32), prompts, 4), 1 + prompts + 1024 + 16
    count = mask.sum(1)
    assert mask.shape == (N, N) and (count[: 1 + prompts] == 1 + prompts + 1024).all()
    assert (count[1 + prompts : -16] == 1 + prompts + 1025).all() and (count[-16:] == 65).all()
    window = mask[-16 + 6, 1 + prompts : -16].view(32, 32).nonzero()  # region in row 1, column 2
    assert window.amin(0).tolist() == [8, 16] and window.amax(0).tolist() == [15, 23]
    assert torch.equal(mask[1 + prompts : -16, -16:], mask[-16:, 1 + prompts : -16].T)


def test_every_patch_of_any_grid_has_a_region() -> None:
    for grid in ((29, 29), (30, 47), (5, 4), (2, 1)):
        owner = owners(grid, 4)
        assert len(owner) == grid[0] * grid[1] and 0 <= owner.min() and owner.max() < 16
        assert min(grid) < 4 or len(owner.unique()) == 16
        assert reading_mask(grid, 3, 4).any(1).all()


# ---- losses

def test_focal_and_dice_equal_the_definition() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 4, 8, 9, dtype=torch.float64)).requires_grad_()
    target = torch.randint(4, (3, 8, 9))
    target[0, :3], target[1] = 255, 255
    target[2][target[2] == 1] = 0
    onehot = torch.stack([target == c for c in range(4)], 1).double()
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    right, alpha = p * onehot + (1 - p) * (1 - onehot), 0.25 * onehot + 0.75 * (1 - onehot)
    present = onehot.sum((2, 3)) > 0
    focal = (alpha * (1 - right) ** 2 * entropy).mean((2, 3)).sum() / present.sum()
    dice = 1 - (2 * (p * onehot).sum((2, 3)) + 1) / (p.sum((2, 3)) + onehot.sum((2, 3)) + 1)
    dice = dice[present].sum() / present.sum()
    ours = focal_and_dice(logits, target)
    torch.testing.assert_close(ours, (focal, dice))
    torch.testing.assert_close(*(torch.autograd.grad(a + 2 * b, logits)[0] for a, b in (ours, (focal, dice))))


def test_recovery_is_computed_in_training_where_it_has_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, with_it, without = random_images(), small(), small(recovery=0.0)
    assert set(with_it.losses(batch, 0)) == {"focal", "dice", "recovery_classes", "recovery_patches"}
    assert set(without.losses(batch, 0)) == {"focal", "dice"} and not [k for k in without.trained_state() if "recovery" in k]
    monkeypatch.setattr(with_it.trained.recovery, "forward", lambda *_: pytest.fail("computed"))
    with_it.eval().predict(batch)


@pytest.mark.parametrize("cls", SYSTEMS)
def test_everything_trained_has_a_gradient_and_nothing_else(cls: type[ZegCLIP]) -> None:
    """Data-parallel training needs the former; every parameter has the same rate and decay, norms too."""
    system = small(cls)
    sum(system.losses(random_images(), 0).values()).backward()
    assert not [name for name, p in system.trained.named_parameters() if p.grad is None]
    assert not [name for name, p in system.clip.named_parameters() if p.requires_grad or p.grad is not None]
    (group,) = system.groups(Train(base_lr=2e-4, weight_decay=0.01))
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (2e-4, 0.01, len(list(system.trained.parameters())))


def test_zegclip_scores_are_the_mean_of_the_heads_before_the_softmax() -> None:
    """The head written out, one attention head after the other; there are no published arrays of ZegCLIP."""
    clip = small_clip()
    state = clip.state_dict() | {"visual.proj": torch.randn(128, 128) / 12, "text_projection": torch.randn(64, 128)}  # two heads
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(5, 128), dim=1)
    system = ZegCLIP(Frozen(clip_from_state(state)), NAMES, texts, SEEN, ZegCLIP.Options(prompts=3)).eval()
    head, images = system.trained, system.pixels(random_images(1).image)
    with torch.no_grad():
        views = head.prompts(system.trunk, images)
        patches = views.patches.flatten(2)[0].T
        t = head.q_proj(torch.cat([texts * views.whole, texts], 1))
        for block in head.decoder.layers[:2]:
            a, heads = block.multihead_attn, []
            for at in (slice(0, 64), slice(64, 128)):
                q, k, v = a.q(t)[:, at], a.k(patches)[:, at], a.v(patches)[:, at]
                heads.append((q @ k.T / 8).softmax(1) @ v)
            t = block.norm2(t + a.proj(torch.cat(heads, 1)))
            t = block.norm3(t + block.linear2(block.linear1(t).relu()))
        last = head.decoder.layers[2].multihead_attn
        q, k = last["q"](t), last["k"](patches)
        expected = sum(q[:, at] @ k[:, at].T / 8 for at in (slice(0, 64), slice(64, 128))) / 2
        logits = head(system.trunk, images, texts).logits
    torch.testing.assert_close(logits, expected.view(1, 5, 4, 4), rtol=1e-4, atol=1e-5)


def test_equals_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, repeated vectors and the mean over regions written out (bench.clip_rc): scores, losses, gradients."""
    fast = small(dropout=0.0)
    monkeypatch.setattr(CLIP_RC, "Head", plainly.Plain)
    plain = small(dropout=0.0)
    plain.losses = lambda batch: plainly.plain_losses(plain, batch)
    plain.load_trained(fast.trained_state(), "fast")
    for call in (plainly.crop, plainly.step):
        for a, b in zip(call(fast, random_images())(), call(plain, random_images())(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# ---- settings

def test_targets_of_the_settings() -> None:
    batch, logits = random_images(1, (1, 6)), torch.full((1, 5, 1, 6), -4.0)
    batch.label = torch.tensor([[[0, 1, 2, 3, 4, 255]]], dtype=torch.uint8)
    logits[0, 2, 0, 2:] = 20.0  # sigmoids of exactly 1 tie: the first unseen class wins
    logits[0, 4, 0, 2:] = 30.0
    logits[0, 4, 0, 4], logits[0, 0, 0, 4] = 31.0, 40.0
    find = lambda setting, batch=batch: small(setting=setting).targets(logits, batch)[0, 0].tolist()  # noqa: E731
    assert find("inductive") == [1, 2, 255, 0, 255, 255]  # index in the list of seen classes
    assert find("transductive") == [0, 1, 2, 3, 2, 255]
    assert find("transductive-strict") == [0, 1, 2, 3, 255, 2]  # where a seen class is best there is no label; 255 may get one
    assert find("full") == [0, 1, 2, 3, 4, 255]
    batch.valid[0, 3] = 5
    assert find("transductive-strict")[5] == 255  # not in the border that was filled up


def test_seen_scores_are_lowered_in_the_inductive_setting_only() -> None:
    batch = random_images(1)
    plain, lowered = (small(setting=s).eval().predict(batch).final for s in ("transductive", "inductive"))
    torch.testing.assert_close((plain - lowered).mean((0, 2, 3)), torch.tensor([0.1, 0.1, 0.0, 0.1, 0.0]))
    assert torch.equal(small(setting="inductive", offset=0.0).eval().predict(batch).final, plain)


def test_who_depends_on_the_vocabulary() -> None:
    """CLIP-RC's patches attend to all classes, ZegCLIP's to none."""
    for cls, depends in ((CLIP_RC, True), (ZegCLIP, False)):
        system, batch = small(cls).eval(), random_images(1)
        before = system.predict(batch).final[:, :2]
        system.use(NAMES[:2], system.texts[:2], (0, 1))
        assert ((system.predict(batch).final - before).abs().max() > 1e-3) == depends


def test_any_classes_after_training() -> None:
    """Names decide who is seen; the bank is that of the names; the warning is there as long as the classes are other ones."""
    named = lambda *names: ClassNames(names, names)  # noqa: E731
    system = small(setting="inductive").eval()
    system.use_classes(ClassNames(("sofa", "dog", "cat"), ("a red sofa", "dog", "cat")))
    assert system.names == ("sofa", "dog", "cat") and system.seen.tolist() == [1, 2] and system.unseen.tolist() == [0]
    assert torch.equal(system.texts, text_bank(system.clip, ["a red sofa", "dog", "cat"], "one"))
    assert system.predict(random_images(1)).final.shape[1] == 3
    system.use_classes(named("lamp"))
    assert len(system.warnings) == 1 and "1 of a list, 1 of them new, instead of the 5" in system.warnings[0]
    system.use_classes(named(*NAMES))
    assert not system.warnings and set(system.seen.tolist()) == set(SEEN)
    small(setting="transductive").use_classes(named(NAMES[0]))  # nothing unseen among what is asked for: fine in prediction
    for names, message in (((), "0 class names"), (("a", " "), "class 2 of 2 has no name"), (("a", "b", "a"), "the name 'a'")):
        with pytest.raises(UserError, match=message):
            system.use_classes(named(*names))
    assert system.names == NAMES


# ---- images and windows

@pytest.mark.parametrize("cls", SYSTEMS)
@pytest.mark.parametrize("side", [(1, 1), (7, 90), (100, 64), (65, 131)])
def test_images_of_any_size(cls: type[ZegCLIP], side: tuple[int, int]) -> None:
    for inference in ("slide", "whole"):
        final = small(cls, inference=inference).eval().predict(random_images(2, side)).final
        assert final.shape == (2, 5, *side) and torch.isfinite(final).all() and final.min() >= -0.1 and final.max() <= 1


def test_windows_are_averaged_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    image, calls = torch.rand(2, 3, 130, 50), []

    def score(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x[:, :1] + torch.arange(x.shape[2])[:, None]  # depends on the place in the window

    total, count = torch.zeros(2, 1, 130, 50), torch.zeros(130, 1)
    for y in (0, 42, 66):  # the last one ends at the border; the image is narrower than a window
        total[:, :, y : y + 64] += image[:, :1, y : y + 64] + torch.arange(64)[:, None]
        count[y : y + 64] += 1
    torch.testing.assert_close(slide(score, image, 64, 42, at_once=2), total / count)
    assert calls == [(4, 3, 64, 50), (2, 3, 64, 50)]
    slide(score, torch.rand(1, 3, 64, 65), 64, 64)
    assert calls[-1] == (2, 3, 64, 64)  # one column more is one window more
    with pytest.raises(ValueError, match="stride"):
        slide(score, image, 64, 65)


def test_filled_up_border_is_the_mean_colour() -> None:
    """A crop that is not full scores alike, whatever the loader put beside it."""
    system, batch = small().eval(), random_images(1)
    batch.valid = torch.tensor([[0, 64, 0, 40]])
    filled = system.pixels(batch.image, batch.valid)
    batch.image[..., 40:] = 99
    assert torch.equal(system.pixels(batch.image, batch.valid), filled) and (filled[..., 40:] == 0).all()
    assert (filled[..., :40] != 0).any(1).all()


# ---- checkpoints

@pytest.mark.parametrize("cls", SYSTEMS)
def test_published_checkpoints(cls: type[ZegCLIP]) -> None:
    system = small(cls)
    state = published(system)
    assert cls.official_options(state) == {"prompts": 3}
    system.import_official({f"module.{name}": value for name, value in state.items()})
    for name, value in system.trained_state().items():
        assert torch.equal(value, state[system.official_name(f"head.{name}")]), name

    with pytest.raises(UserError, match="has 3 prompts in each layer, this system 5; nothing was loaded"):
        small(cls, prompts=5).import_official(state)
    with pytest.raises(UserError, match="another CLIP .* 1 tensors differ .backbone.conv1.weight"):
        system.import_official(state | {"backbone.conv1.weight": 1.01 * state["backbone.conv1.weight"]})
    with pytest.raises(UserError, match="1 missing: decode_head.q_proj.bias"):
        system.import_official({name: value for name, value in state.items() if name != "decode_head.q_proj.bias"})
    with pytest.raises(UserError, match="1 not part of this model: decode_head.other"):
        system.import_official(state | {"decode_head.other": torch.zeros(1)})
    with pytest.raises(UserError, match="no backbone.prompt_embeddings"):
        system.import_official({"layer.weight": torch.zeros(1)})


def test_recovery_of_a_published_checkpoint_is_dropped_without_use() -> None:
    small(recovery=0.0).import_official(published(small()))


# ---- text and wrong input

def test_text_bank_is_rounded_as_published() -> None:
    system = small()
    bank = text_bank(system.clip, ["cat", "sky"], "many")
    assert len(set(MANY)) == 15 and torch.equal(bank, bank.half().float())
    each = torch.stack([system.clip.module.text([t.format(name) for t in MANY]).mean(0) for name in ("cat", "sky")])
    torch.testing.assert_close(bank, F.normalize(each, dim=1), rtol=0, atol=5e-4)


def test_the_clip_start_keeps_the_classes_order() -> None:
    """At the start each patch prefers the class whose text is nearest to it; a random start prefers any."""
    for cls in SYSTEMS:
        agree = {}
        for start in ("clip", "random"):
            torch.manual_seed(0)
            clip, texts = Frozen(clip_from_state(small_clip().state_dict())), F.normalize(torch.randn(5, 32), dim=1)
            system = cls(clip, NAMES, texts, SEEN, cls.Options(prompts=3, start=start)).eval()
            image = system.pixels(random_images(4).image)
            with torch.no_grad():
                patches = system.trained.prompts(system.trunk, image, 4).patches
                logits = system.trained(system.trunk, image, system.texts).logits
            nearest = torch.einsum("bdhw,cd->bchw", patches, texts)
            centred = [x - x.mean((0, 2, 3), keepdim=True) for x in (logits, nearest)]
            agree[start] = float(torch.corrcoef(torch.stack([x.flatten() for x in centred]))[0, 1])
        assert agree["clip"] > 0.5 > agree["random"], (cls, agree)


def test_wrong_input() -> None:
    system, batch = small(), random_images()
    texts = system.texts
    batch.label[1, 0, 0] = 5
    with pytest.raises(UserError, match=r"im1 holds \[5\]; expected 0..4"):
        system.losses(batch, 0)
    for names, rows, seen, message in (
        (NAMES, texts[:4], SEEN, "5 class names, but a text bank of 4 rows"),
        (("cat", "cat", *NAMES[2:]), texts, SEEN, "two classes have the name 'cat'"),
        (NAMES, texts, (0, 0), "each once"), (NAMES, texts, (0, 5), r"some of 0..4"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            system.use(names, rows, seen)
    with pytest.raises(UserError, match="every class is seen"):
        CLIP_RC(system.clip, NAMES[:2], texts[:2], (0, 1), CLIP_RC.Options(setting="transductive"))
    for wrong in ({"prompts": 0}, {"stride": 65}, {"dropout": 1.0}, {"recovery": -1.0}, {"offset": 2.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            small(**wrong)


# ---- several processes

def three_steps(context: Context) -> list[dict[str, Tensor]]:
    """Both systems after three steps on global batches of four images, in float64, with dropout."""
    return [_three_steps(cls, setting, context) for cls, setting in ((CLIP_RC, "transductive"), (ZegCLIP, "inductive"))]


def _three_steps(cls: type[ZegCLIP], setting: str, context: Context) -> dict[str, Tensor]:
    system = small(cls, setting=setting).double().train()
    optimizer = torch.optim.SGD(system.groups(Train(base_lr=1e-4)))
    torch.manual_seed(5)
    if context.world > 1:
        system.distribute(CPU)
    batch = random_images(12)
    batch.image = batch.image.double()
    batch.label[::3] = 255  # ranks see different numbers of classes
    for step in range(3):
        rows = next(iter(RangeSampler(4 * step, 4 * step + 4, 4, context, drop_last=True)))
        optimizer.zero_grad()
        sum(system.losses(batch.rows(rows), step).values()).backward()
        optimizer.step()
    return system.trained_state()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone, together = three_steps(Context(CPU)), in_processes(2, tmp_path, three_steps)
    for cls, one, *two in zip(SYSTEMS, alone, *together, strict=True):
        start = small(cls).double().trained_state()
        assert any((one[name] - start[name]).abs().max() > 1e-4 for name in one)  # it did train
        for name in one:
            for other in two:
                torch.testing.assert_close(other[name], one[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_clip_as_it_is_stands_beside() -> None:
    """Its scores are the cosines of CLIP's own patch tokens to the texts, window by window."""
    system = small(inference="whole").eval()
    batch = random_images(1)
    found = system.predict(batch, baselines=True)
    assert torch.equal(found.final, system.predict(batch).final) and not system.predict(batch).variants
    visual = system.trunk.visual
    tokens = system.trunk.run(system.trunk.embed(system.trunk.normalise(batch.image))[0]).tokens
    patches = F.normalize(visual.ln_post(tokens[:, 1:]) @ visual.proj, dim=-1)
    side = 64 // system.trunk.patch
    expected = (patches @ system.texts.T).transpose(1, 2).unflatten(2, (side, side))
    torch.testing.assert_close(found.variants["CLIP without training"],
                               F.interpolate(expected, (64, 64), mode="bilinear"), rtol=1e-4, atol=1e-5)  # fmt: skip
