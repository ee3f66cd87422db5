"""IMR-HSNet: the official masking and its quirks, activation maps of either CLIP, what it refuses, a step of training."""

from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from bench.oracle import correlation, masked, whole
from model import configure
from model.backbone import build_encoder
from model.build import open_system
from model.clip import ResNetTower, load_clip
from model.clip.cam import ResNetCam, ViTCam, published_map
from model.clip.load import clip_from_state
from model.few_shot.cam_prior import CamPrior
from model.few_shot.conv4d import keep, unit
from model.few_shot.imr_hsnet import Head, IMRHSNet, Options
from model.ops import resize
from model.system import Frozen
from tests.make import random_episode
from util.cache import TensorCache
from util.data.episodes import Episode, EpisodeMaker
from util.data.folds import fold
from util.data.transforms import TrainTransform, ValTransform
from util.errors import UserError
from util.run.checkpoint import check_identity
from util.run.identity import identity

ROOT = Path(__file__).parents[1]


def imr(shot: int = 1, **method: object) -> IMRHSNet:
    """On the demo's ViT, with three classes."""
    torch.manual_seed(0)
    clip = Frozen(load_clip(str(ROOT / "demo/clip")))
    bank = clip.module.text.bank([f"a photo of a {name}" for name in ("star", "fish", "tree")])
    cam = CamPrior(ViTCam(clip.module.visual, clip.module.logit_scale), bank, "all", (2, 3))
    encoder = Frozen(build_encoder("resnet50", 8, dilated=False))
    return IMRHSNet(encoder, [cam], shot, Options(**method), clip).eval()


def episode(shot: int = 1, batch: int = 2) -> Episode:
    made = random_episode(batch, shot)
    made.cls = torch.tensor([1, 2])[:batch]
    images = (torch.arange(batch * (shot + 1) * 3 * 128 * 128) % 251).view(batch, shot + 1, 3, 128, 128).to(torch.uint8)
    images[:, :, :, 30:80, 50:90] = 200
    made.clip_query = list(images[:, 0])
    made.clip_support = [list(row[1:]) for row in images]
    return made


def levels(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 6, side, side, generator=generator) for n, side in ((2, 9), (3, 5), (1, 3))]


def correlations(head: Head, query: list[Tensor], support: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """By level, queries first."""
    kept = [[keep(unit(q), unit(s)) for q, s in zip(*pair, strict=True)] for pair in zip(query, support, strict=True)]
    norms = [torch.cat(pair).norm(dim=2) for pair in zip(query, support, strict=True)]
    pairs = [[whole(level) for level in pair] for pair in head.pairs(kept, norms, masks)]
    return [torch.stack(level) for level in zip(*pairs, strict=True)]


def test_official_masks_start_swapped_and_stay() -> None:
    head = Head((2, 3, 1), 6, 2, "official")
    query, support = levels(1), levels(2)
    maps = [torch.rand(4, 1, 9, 9) * (torch.rand(4, 1, 9, 9) > 0.3) for _ in range(2)]
    sizes = [x.shape[3:] for x in query]
    once = head.masks([], maps[0], sizes)
    first = correlations(head, query, support, once)
    second = correlations(head, query, support, head.masks(once, maps[1], sizes))
    (q0, s0), (q1, s1) = (m.chunk(2) for m in maps)
    for level in range(3):
        q, s = masked(query[level], s0), masked(support[level], q0)  # each image under the other's map
        torch.testing.assert_close(first[level][:2], correlation(q, s), rtol=0, atol=1e-6)
        assert torch.equal(first[level][2:], first[level][:2].permute(0, 1, 4, 5, 2, 3))
        torch.testing.assert_close(second[level][:2], correlation(masked(q, q1), masked(s, s1)), rtol=0, atol=1e-6)  # on top


def test_paper_masks_one_side_anew() -> None:
    head = Head((2, 3, 1), 6, 2, "paper")
    query, support, maps = levels(1), levels(2), torch.rand(4, 1, 9, 9)
    sizes = [x.shape[3:] for x in query]
    found = correlations(head, query, support, head.masks(head.masks([], maps.flip(0), sizes), maps, sizes))
    forth, back = correlation(query[1], masked(support[1], maps[2:])), correlation(support[1], masked(query[1], maps[:2]))
    torch.testing.assert_close(found[1], torch.cat([forth, back]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask_mode", ["official", "paper"])
def test_training_reaches_everything_trained_and_masks_only_the_loss(mask_mode: str) -> None:
    system, made = imr(stages=3, mask_mode=mask_mode).train(), episode()
    losses = system.losses(made)
    assert set(losses) == {"query", "support"}
    sum(losses.values()).backward()
    missing = [name for name, p in system.head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing and all(p.grad is None for p in system.backbone.parameters())
    before = system.eval().predict(made).final
    made.support_mask = 1 - made.support_mask
    assert torch.equal(system.predict(made).final, before)  # the masks of the supports are no input


@torch.no_grad()
def test_predicts_with_several_shots_and_keeps_its_maps() -> None:
    system, made = imr(2), episode(2)
    plain = system.predict(made, baselines=True)
    assert plain.votes.shape[:3] == (2, 2, 2) and set(plain.maps) == {"cam", "support cam", "stage 1", "stage 2"}
    last = plain.votes.softmax(2)[:, :, 1].mean(1)
    torch.testing.assert_close(plain.maps["stage 2"], last)
    assert "CAM > 0.5" in plain.baselines and 0 < plain.maps["cam"].max() <= 1
    made.query_key, made.support_key = ["a", "b"], [["c", "d"], ["e", "f"]]
    system.remember(cache := TensorCache(2**28), fixed_head=True)
    for _ in range(2):
        torch.testing.assert_close(system.predict(made).votes, plain.votes, rtol=1e-4, atol=1e-5)
    hits = cache.hits
    made.cls = made.cls.flip(0)  # the same images, other classes: other maps
    other = system.predict(made)
    assert cache.hits > hits and (other.maps["cam"] - plain.maps["cam"]).abs().max() > 0.05


@torch.no_grad()
def test_images_in_which_clip_finds_nothing_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    system, made = imr(), episode(1)
    made.query_key, made.support_key = ["a", "b"], [["c"], ["d"]]
    made.query_name, made.support_names = ["blank.jpg", "some.jpg"], [["s.jpg"], ["t.jpg"]]
    cam = system.priors[0]
    maps, cam.source = cam.source, lambda images, *given: maps(images, *given) * (images.amax((1, 2, 3)) > 0)[:, None, None]
    made.clip_query[0] = torch.zeros_like(made.clip_query[0])
    for _ in range(2):
        system.predict(made)
    assert [record.getMessage() for record in caplog.records] == [
        "blank.jpg: CLIP finds no class 1, its activation map is 0 everywhere"]  # fmt: skip


@torch.no_grad()
def test_reads_maps_that_the_published_scripts_stored(tmp_path: Path) -> None:
    """In fp16 and fp32, under the ids of VOC and of COCO; a missing or broken file is named."""
    system, made = imr(), episode(1)
    cam = system.priors[0]
    given = (cam.source, cam.bank, "all", (2, 3))
    made.query_name = ["JPEGImages/2007_1.jpg", "val2014/COCO_2.jpg"]
    made.support_names = [["JPEGImages/3.jpg"], ["val2014/COCO_4.jpg"]]
    stored = torch.rand(4, 50, 50)
    (tmp_path / "val2014").mkdir()
    for name, found in zip(("2007_1--0", "3--0", "val2014/COCO_2.jpg--1", "val2014/COCO_4.jpg--1"), stored, strict=True):
        torch.save(found.half() if "COCO" in name else found, tmp_path / f"{name}.pt")
    system.priors = [CamPrior(*given, folders=[str(tmp_path)])]
    maps = system.predict(made).maps
    size = maps["cam"].shape[1:]
    for shown, rows in ((maps["cam"], stored[[0, 2]]), (maps["support cam"], stored[[1, 3]])):
        torch.testing.assert_close(shown, resize(rows[:, None], size)[:, 0], atol=1e-3, rtol=0)
    torch.save(stored[0] * 2, tmp_path / "2007_1--0.pt")
    with pytest.raises(UserError, match=r"2007_1--0\.pt: expected a map H W in 0\.\.1"):
        system.predict(made)
    (tmp_path / "2007_1--0.pt").unlink()
    with pytest.raises(UserError, match=r"Method\.cams: no map of JPEGImages/2007_1\.jpg and class 1 \(2007_1--0\.pt\)"):
        system.predict(made)
    with pytest.raises(UserError, match="Method.cams: no such folder"):
        CamPrior(*given, folders=[str(tmp_path / "none")])


def test_maps_of_a_resnet_clip_follow_the_target() -> None:
    torch.manual_seed(0)
    config = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    made = open_clip.model.CLIP(64, config, text, quick_gelu=True)
    for block in made.visual.modules():
        if hasattr(block, "bn3"):
            torch.nn.init.ones_(block.bn3.weight)  # open_clip starts at 0, where every block is the identity
    state = {key: value for key, value in made.state_dict().items() if key != "attn_mask"}
    clip = clip_from_state(state).eval()
    assert isinstance(clip.visual, ResNetTower) and clip.visual.side == 64
    bank = clip.text.bank(["star", "fish", "tree"])
    source, images = ResNetCam(clip.visual), (255 * torch.rand(2, 3, 64, 64)).to(torch.uint8)
    candidates, target = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 2])
    maps = source(images, bank, candidates, target)
    assert maps.shape == (2, 50, 50) and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(source(images[1:], bank, candidates[1:], target[1:]), maps[1:], rtol=1e-3, atol=1e-4)


def test_an_empty_map_stays_empty() -> None:
    assert torch.equal(published_map(-torch.rand(2, 7, 7)), torch.zeros(2, 50, 50))


def test_the_square_image_for_clip() -> None:
    data, image, label = fold("pascal", 0), torch.zeros(60, 100, 3).numpy(), torch.ones(60, 100, dtype=torch.uint8).numpy()
    image[:, :20], image[:, 20:] = 250, 10  # the stripe lies outside of the centre
    how = {"clip_size": "whole", "patch": 32, "evaluation": False}
    for size, sees in (("whole", True), ("crop", False)):
        maker = EpisodeMaker(ValTransform(65, squash=True), data, **how | {"clip_size": size})
        shot = maker.shot(image, label, "s")
        made = maker.episode(image, label, [shot, shot], cls=1, base_rank=-1, present=torch.zeros(20), name="q")
        assert shot.clip.shape == made.clip_query[0].shape == (3, 32, 32) and len(made.clip_support[0]) == 2
        assert (shot.clip > 200).any() == sees and torch.equal(made.clip_query[0], shot.clip)
    for transform in (TrainTransform(65, 0.9, 1.1), ValTransform(65, squash=False)):
        with pytest.raises(UserError, match="clip_size=crop cuts"):
            EpisodeMaker(transform, data, **how | {"clip_size": "crop"})


@pytest.mark.parametrize(("override", "message"), [
    ("CLIP.clip_size=original", "for this system choose whole"),
    ("CLIP.vocabulary=present", "choose all"),
    ("CLIP.vocabulary=target", "choose all"),
    ("Method.priors=[cosine]", "no other prior"),
    ("Method.stages=0", "at least 1"),
])  # fmt: skip
def test_what_it_refuses(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        open_system("IMR_HSNet", configure("config/demo/demo_split0_resnet50.yaml", "IMR_HSNet", [override]))


def test_a_resnet_clip_is_refused_where_tokens_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    made = open_clip.model.CLIP(64, config, text).state_dict()
    made.pop("attn_mask", None)
    monkeypatch.setattr("model.clip.load._load", lambda *_: clip_from_state(made))
    load_clip("RN50", resnet=True)
    with pytest.raises(UserError, match="only ViT image towers"):
        load_clip("RN50")


def test_a_checkpoint_is_not_tested_with_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made, asked = (configure("config/demo/demo_split0_resnet50.yaml", "IMR_HSNet", given)
                   for given in ([], ["Method.stages=3", "CLIP.clip_size=crop", "Train.shot=5"]))  # fmt: skip
    with pytest.raises(UserError) as found:
        check_identity(tmp_path, *(identity("IMR_HSNet", IMRHSNet.facts, config) for config in (made, asked)))
    assert "Method.stages: the checkpoint has 2, the config 3" in str(found.value) and "CLIP.clip_size" in str(found.value)
    assert "Train.shot" not in str(found.value)  # shots vote: any number will do
