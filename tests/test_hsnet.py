"""HSNet's parts: features before the ReLU, 4-D convolutions, sizes, the vote, the published checkpoint, its episodes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.backbone import build_encoder
from model.few_shot import imr_hsnet
from model.few_shot.conv4d import Cosines, unit
from model.few_shot.hsnet import Encoder4d, Head, HSNet, vote_scores
from model.system import Frozen
from tests.golden.check_hsnet import check_units, load
from tests.make import abstract_index, random_episode
from util.data.episodes import EpisodeList
from util.data.transforms import Placed, ValTransform
from util.errors import UserError
from util.score.metrics import vote

GOLDEN = Path(__file__).parent / "golden/hsnet_r50.npz"


def hsnet(shot: int = 1, backbone: str = "resnet50", stem: str = "plain") -> HSNet:
    torch.manual_seed(0)
    return HSNet(Frozen(build_encoder(backbone, 8, stem, dilated=False)), [], shot, HSNet.Options()).eval()


def test_published_unit_cases() -> None:
    rows = list(check_units(load(GOLDEN)))
    assert len(rows) == 7 and not [row for row in rows if not row.ok]


@pytest.mark.parametrize(("backbone", "stem"), [("resnet50", "plain"), ("resnet50", "deep"), ("vgg16", ""), ("vgg16_bn", ""),
                                                ("timm:tf_efficientnet_lite0", "")])  # fmt: skip
def test_the_pyramid_is_what_the_stages_make_of_it(backbone: str, stem: str) -> None:
    encoder = build_encoder(backbone, 8, stem, dilated=False).eval()
    image = 255 * torch.rand(1, 3, 65, 81)
    with torch.no_grad():
        levels, stages = encoder.pyramid(image), encoder(image)
    assert tuple(level.shape[1] for level in levels) == encoder.blocks and (levels[0] < 0).any()
    if backbone.startswith("timm:"):
        assert encoder.blocks == (2, 3, 1) and [tuple(level.shape[3:]) for level in levels] == [(9, 11), (5, 6), (3, 3)]
        assert all(torch.equal(encoder.stage_of(level), stage) for level, stage in zip(levels, stages[2:], strict=True))
        return
    if backbone == "resnet50":
        assert [tuple(level.shape[3:]) for level in levels] == [(9, 11), (5, 6), (3, 3)]
        for level, stage in zip(levels, stages[2:], strict=True):
            assert torch.equal(level[:, -1].relu(), stage)
    else:
        assert torch.equal(levels[1][:, -1].relu(), stages[4]) and levels[0].shape[3:] == (8, 10)


def pair(h: int, w: int, side: int, blocks: int) -> Cosines:
    mask = torch.ones(side, side)
    mask[: side // 3] = 0
    return Cosines(unit(torch.randn(blocks, 4, h, w)), torch.randn(blocks, 4, side, side), mask)


def test_any_size_one_after_the_other_and_where_levels_do_not_meet() -> None:
    encoder = Encoder4d((2, 3, 1)).eval()
    with torch.no_grad():
        for side in (16, 10, 19):  # no state is left of the size before
            levels = [pair(side // d, side // d + 1, side // d, n) for n, d in ((2, 1), (3, 2), (1, 4))]
            assert encoder([levels]).shape == (1, 128, side, side + 1)
    apart = [pair(4, 4, side, n) for n, side in ((2, 33), (3, 16), (1, 8))]
    with pytest.raises(UserError, match="2 x 2 and 1 x 1 and 1 x 1"):
        encoder([apart])


def test_vote_counts_against_the_largest_number_of_votes() -> None:
    masks = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    assert vote(masks).tolist() == [[1, 1, 0, 0]]  # one of at most two is half
    assert vote(torch.cat([masks, masks[:1]])).tolist() == [[1, 1, 0, 0]]  # three and two of four
    assert vote(torch.cat([masks, masks[1:2]])).tolist() == [[1, 0, 0, 0]]  # one of three is not
    assert not vote(torch.zeros(3, 1, 4)).any()
    for some in (masks, torch.cat([masks, masks[:1]]), torch.cat([masks, masks[1:2]])):
        logits = torch.stack([1 - some, some], 1)[None].float()  # B K 2 h w
        assert torch.equal(vote_scores(logits).argmax(1)[0], vote(some))


@torch.no_grad()
def test_shots_vote_at_file_size_and_equal_shots_are_one() -> None:
    episode = random_episode(batch=2, shot=1, side=65)
    one = hsnet().predict(episode)
    assert one.final.shape == (2, 2, 65, 65) and one.votes.shape[:3] == (2, 1, 2)
    episode.support, episode.support_mask = episode.support.repeat(1, 3, 1, 1, 1), episode.support_mask.repeat(1, 3, 1, 1)
    three = hsnet(3).predict(episode, baselines=True)
    assert set(three.baselines) == {"contrast > 0", "cosine prior > 0.5"}
    placed = Placed((70, 50), (70, 50))
    for i in range(2):
        wanted = one.decide(i, placed)
        assert torch.equal(three.decide(i, placed), wanted)
        assert torch.equal(three.votes[i].argmax(1)[0], (three.votes[i].argmax(1).sum(0) > 1).long())
        assert (three.final[i].argmax(0) == one.final[i].argmax(0)).float().mean() > 0.9


def test_published_checkpoint_leaves_its_classifier_out() -> None:
    system, other = hsnet(), hsnet(backbone="resnet50", stem="plain")
    state = {f"module.{system.official_name(name)}": value + 1 if value.is_floating_point() else value
             for name, value in system.state_dict().items() if not name.endswith("num_batches_tracked")}  # fmt: skip
    state["module.backbone.fc.weight"] = torch.zeros(3, 3)
    other.import_official(state)
    assert torch.equal(other.head.decoder.decoder2[2].bias, system.head.decoder.decoder2[2].bias + 1)


def test_sizes_and_names_are_the_published_ones() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    blocks = {"resnet50": (4, 6, 3), "resnet101": (4, 23, 3), "vgg16": (3, 3, 1)}
    with torch.device("meta"):
        assert [count(Head(n)) for n in blocks.values()] == [2_573_794, 2_587_394, 2_570_018]
        assert count(imr_hsnet.Head(blocks["resnet50"], 1024, 2, "official")) == 4_712_352
        assert count(imr_hsnet.Head(blocks["vgg16"], 512, 2, "official")) == 4_183_776
    system = hsnet(backbone="vgg16")
    names = {system.official_name(name) for name in system.state_dict()}
    layers = [i for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)) for i in stage]
    wanted = {f"backbone.features.{i}.{leaf}" for i in layers for leaf in ("weight", "bias")}
    assert {name for name in names if name.startswith("backbone")} == wanted


def test_what_it_cannot_be_built_on() -> None:
    with pytest.raises(UserError, match="reads every block"):
        hsnet(backbone="timm:resnet18")


def test_episodes_from_pairs_and_classes() -> None:
    index = abstract_index(40, (2, 5, 9))
    pairs = [(q, c) for c, filed in index.by_class.items() for q in filed]
    episodes = EpisodeList(index, 5, seed=0, shuffle=True, start="pair")
    specs = [episodes.spec(i) for i in range(len(episodes))]
    assert sorted((s.query, s.cls) for s in specs) == sorted(pairs)  # each once
    by_class = [EpisodeList(index, 5, seed=0, start="class").spec(i) for i in range(900)]
    counts = np.bincount([s.cls for s in by_class])[[2, 5, 9]]
    assert counts.min() > 240 and len(EpisodeList(index, 5, seed=0, start="class")) == 40
    for spec in specs + by_class:
        filed = index.by_class[spec.cls]
        assert spec.query in filed and set(spec.supports) <= set(filed) - {spec.query} and len(spec.supports) == 5
    assert any(len(set(s.supports)) < 5 for s in by_class)  # with replacement
    EpisodeList(index, 1000, seed=0, start="pair")  # so any number of shots


def test_antialiased_squash_is_pillow_s() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.float32)
    label = np.zeros((90, 70), np.uint8)
    ours, _, (mask,) = ValTransform(33, squash=True, antialias=True)(None, image, [label])
    theirs = np.asarray(Image.fromarray(image.astype(np.uint8)).resize((33, 33), Image.Resampling.BILINEAR))
    assert np.array_equal(ours, theirs) and ours.dtype == np.float32 and mask.shape == (33, 33)
    plain, _, _ = ValTransform(33, squash=True)(None, image, [label])
    assert plain.std() > 1.5 * ours.std()
