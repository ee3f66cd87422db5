"""The few-shot systems: exact identities against the plain formulas, invariances, what is frozen, odd inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import build_encoder
from model.few_shot.bam import BAM
from model.few_shot.ensemble import Ensemble, KShotWeights
from model.few_shot.hdmnet import HDMNet
from model.few_shot.matcher import Match, Matcher, merge_heads, split_heads
from model.few_shot.parts import gram, inside, masked_average, max_cosine
from model.few_shot.pfenet import PFENet
from model.few_shot.prior import join
from model.few_shot.system import FewShot
from model.losses import distillation_loss, segmentation_loss
from tests.make import random_episode, small_system
from util.config import Train
from util.data.episodes import Episode, collate
from util.errors import UserError


def plain_match(match: Match, query: Tensor, support: Tensor, inside: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """HDMNet's matching written out: N x K*N attention, masked after the softmax, scores averaged under the mask."""
    q, k = (F.normalize(split_heads(f(match.norm1(x)), 2), dim=-1) for f, x in ((match.q, query), (match.k, support)))
    v = split_heads(match.v(match.norm1(support)), 2)
    score = q @ k.transpose(2, 3) / 0.1
    mask = inside[:, None, None].float()
    out = query + match.o(merge_heads((score.softmax(2) * mask) @ v))
    out = out + match.ffn(match.norm2(out), size)
    correlation = ((score * mask).sum(3) / (mask.sum(3) + 1e-9)).mean(1)
    return out, correlation.unflatten(1, size)


def test_matching_only_inside_the_mask_is_exact() -> None:
    torch.manual_seed(0)
    match = Match(64).double().eval()
    query, support = torch.randn(4, 35, 64).double(), torch.randn(4, 105, 64).double()
    inside = torch.rand(4, 105) < torch.tensor([0.05, 0.5, 1.0, 0.0])[:, None]  # last one: an empty mask
    ours, expected = match(query, support, inside, (5, 7)), plain_match(match, query, support, inside, (5, 7))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert (ours[1][3] == 0).all()


def test_matcher_levels_never_see_the_matched_query() -> None:
    """The encoder's levels depend on the query alone, so another support must not change a coarser level's tokens."""
    torch.manual_seed(0)
    matcher = Matcher(priors=2).eval()
    x = torch.randn(1, 64, 9, 9)
    seen = []
    for level in matcher.levels:
        level.match.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for support in (torch.randn(1, 64, 9, 9), torch.randn(1, 64, 9, 9)):
        matcher(x, support, torch.ones(1, 1, 65, 65), torch.randn(1, 2, 9, 9))
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second)


def test_batchnorm_of_the_matcher_is_fixed_in_training() -> None:
    matcher = Matcher(priors=2).train()
    norms = [m for m in matcher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and any(m.training for m in matcher.modules())


def test_max_cosine_on_a_made_up_case() -> None:
    query = torch.tensor([[[1.0, 0.0, 0.6]], [[0.0, 1.0, 0.8]]]).view(1, 2, 1, 3)
    support = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]).view(1, 2, 1, 2)
    only_first = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(max_cosine(query, inside(support, only_first)).flatten(), torch.tensor([1.0, 0.0, 0.6]))
    both = torch.ones(1, 1, 1, 2)
    torch.testing.assert_close(max_cosine(query, inside(support, both)).flatten(), torch.tensor([1.0, 1.0, 0.8]))
    assert (max_cosine(-query, inside(support, only_first)) >= 0).all()  # a masked-out position stays in the maximum with score 0


def test_prototype_and_gram() -> None:
    features = torch.arange(8.0).view(1, 2, 2, 2)
    mask = torch.tensor([[1.0, 0], [0, 1]]).view(1, 1, 2, 2)
    torch.testing.assert_close(masked_average(features, mask).flatten(), torch.tensor([3.0, 11.0]) / 2.0005)
    assert torch.isfinite(masked_average(features, 0 * mask)).all()
    torch.testing.assert_close(gram(features)[0].diagonal(), torch.ones(2))


@pytest.mark.parametrize("restore", [True, False])
def test_kshot_weights(restore: bool) -> None:
    torch.manual_seed(0)
    weights = KShotWeights(4, 2, restore)
    difference = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    ascending = weights(difference.sort(1).values)
    order = difference.argsort(1).argsort(1)
    torch.testing.assert_close(weights(difference), ascending.gather(1, order) if restore else ascending)


def test_losses_of_ignored_and_empty_targets() -> None:
    logits = torch.randn(2, 2, 5, 5)
    target = torch.randint(2, (2, 9, 9))
    target[0] = 255
    expected = F.cross_entropy(F.interpolate(logits, (9, 9), mode="bilinear", align_corners=True), target, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, target), expected)
    assert segmentation_loss(logits, torch.full_like(target, 255)) == 0
    maps = [torch.randn(1, 3, 3, requires_grad=True), torch.randn(1, 5, 5, requires_grad=True)]
    loss = distillation_loss(maps, torch.zeros(1, 9, 9, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(m.grad).all() for m in maps)


SYSTEMS = [HDMNet, BAM, PFENet]


@pytest.mark.parametrize("cls", SYSTEMS)
@pytest.mark.parametrize("backbone", ["resnet50", "vgg16_bn", "timm:tf_efficientnet_lite0"])
def test_systems_train_and_predict(backbone: str, cls: type[FewShot]) -> None:
    """Odd sides, two shots; only the head gets a gradient and moves, frozen parts stay bit for bit."""
    system = small_system(2, backbone, system=cls).train()
    assert not system.encoder.training
    before = system.frozen_hashes()
    optimizer = system.optimizer(Train())
    losses = system.losses(random_episode(shot=2, side=67))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in system.encoder.parameters())
    weights = {k: v.clone() for k, v in system.trained_state().items() if v.is_floating_point()}
    optimizer.step()
    assert system.frozen_hashes() == before
    moved = {k for k, v in system.trained_state().items() if k in weights and not torch.equal(v, weights[k])}
    frozen = {k for k in weights if k not in moved}
    if cls is HDMNet:
        assert frozen and all("kshot_rw" in k or "running" in k for k in frozen)  # kshot_rw: in no group, as published
    else:
        assert all("kshot_rw" in k for k in frozen)  # its ReLUs may be dead, the last bias never is
        assert cls is PFENet or "ensemble.kshot_rw.2.bias" in moved
    prediction = system.eval().predict(random_episode(shot=2, side=67), baselines=True)
    assert prediction.final.shape == (2, 2, 67, 67) and set(prediction.baselines) > {"everything foreground"}
    if cls is PFENet:
        assert prediction.meta is None and prediction.base is None
    else:
        assert prediction.meta.shape == (2, 2, 67, 67) and prediction.base.shape == (2, 16, 67, 67)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16_bn", "timm:tf_efficientnet_lite0", "timm:resnet18"])
def test_last_stage_is_what_the_encoder_ends_with(backbone: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(backbone, 8).eval()
    maps = encoder(255 * torch.rand(1, 3, 65, 65))
    torch.testing.assert_close(encoder.last_stage(maps[3]), maps[4])


def test_shots_apart_are_weighed() -> None:
    shots, flat = torch.rand(2, 3, 1, 4, 4), torch.rand(2, 2, 4, 4)
    weights = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5]])
    weighed = join([flat, shots], weights)
    assert weighed.shape == (2, 3, 4, 4) and torch.equal(weighed[:, :2], flat)
    torch.testing.assert_close(weighed[0, 2], shots[0, 0, 0])
    torch.testing.assert_close(weighed[1, 2], 0.2 * shots[1, 0, 0] + 0.3 * shots[1, 1, 0] + 0.5 * shots[1, 2, 0])
    torch.testing.assert_close(join([shots])[:, 0], shots[:, :, 0].mean(1))


def test_ensemble_leaves_out_the_own_base_class() -> None:
    ensemble, meta = Ensemble(1), torch.zeros(2, 2, 3, 3)
    ensemble.cls_merge.weight.data = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)  # background = what the base learner knows
    base = torch.randn(2, 4, 3, 3)
    p = base.softmax(1)
    out = ensemble(meta, base, torch.ones(2), torch.tensor([1, -1]))
    torch.testing.assert_close(out[0, 0], p[0, 1] + p[0, 3])
    torch.testing.assert_close(out[1, 0], p[1, 1:].sum(0))


@pytest.mark.parametrize("cls", SYSTEMS)
def test_batch_and_alone_agree_and_shots_are_checked(cls: type[FewShot]) -> None:
    system = small_system(system=cls).eval()
    both = random_episode()
    alone = [Episode(**{k: v[i : i + 1] for k, v in vars(both).items()}) for i in range(2)]
    assert len(collate(alone)) == 2
    batched = system.predict(both).final
    for i, episode in enumerate(alone):
        torch.testing.assert_close(system.predict(episode).final[0], batched[i], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="shot"):
        system.predict(random_episode(shot=3))


def test_identical_shots_count_as_one_prototype() -> None:
    """K copies of a support give the same matcher inputs as one, up to rounding."""
    one, three = small_system(1).eval(), small_system(3).eval()
    episode = random_episode(shot=1)
    copies = Episode(**vars(episode) | {"support": episode.support.repeat(1, 3, 1, 1, 1),
                                        "support_mask": episode.support_mask.repeat(1, 3, 1, 1)})  # fmt: skip
    state = one.head.matcher.state_dict()
    three.head.matcher.load_state_dict(state)
    for name in ("down_query", "down_supp", "query_merge", "supp_merge"):
        getattr(three.head, name).load_state_dict(getattr(one.head, name).state_dict())
    three.base_learner.load_state_dict(one.base_learner.state_dict())
    torch.testing.assert_close(one.prior_maps(episode, one.features(episode))["similarity"],
                               three.prior_maps(copies, three.features(copies))["similarity"])  # fmt: skip


@pytest.mark.parametrize("cls", SYSTEMS)
def test_bf16_is_fp32_but_for_rounding(cls: type[FewShot]) -> None:
    """Runtime.precision=bf16: losses and scores come out in fp32."""
    system, episode = small_system(system=cls).eval(), random_episode()
    plain, loss = system.predict(episode), sum(system.losses(episode).values())
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_losses = system.predict(episode), system.losses(episode)
    assert rough.final.dtype == torch.float32 and all(v.dtype == torch.float32 for v in rough_losses.values())
    torch.testing.assert_close(rough.final.softmax(1), plain.final.softmax(1), rtol=0, atol=0.03)
    torch.testing.assert_close(sum(rough_losses.values()), loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("cls", SYSTEMS)
def test_empty_support_mask_is_finite(cls: type[FewShot]) -> None:
    system = small_system(system=cls).train()
    episode = random_episode()
    episode.support_mask.zero_()
    losses = system.losses(episode)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in system.trained.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", SYSTEMS)
def test_official_checkpoint_is_loaded_whole_or_not_at_all(cls: type[FewShot]) -> None:
    system = small_system(system=cls)
    own = {ours: system.official_name(ours) for ours in system.state_dict()}
    assert len(set(own.values())) == len(own)
    state = {"module." + official: torch.randn_like(v) if v.is_floating_point() else v
             for (ours, v), official in zip(system.state_dict().items(), own.values(), strict=True)}  # fmt: skip
    system.import_official(state)
    torch.testing.assert_close(system.head.down_supp[0].weight, state["module.down_supp.0.weight"])
    before = {k: v.clone() for k, v in system.state_dict().items()}
    for bad in (
        {k: v for k, v in state.items() if "down_query" not in k},
        state | {"module.kshot_rw.0.weight": torch.zeros(2, 5, 1, 1)},
        state | {"module.down_query.0.weight": torch.zeros(256, 7, 1, 1)},
    ):
        with pytest.raises(UserError, match="nothing was loaded"):
            system.import_official({k: torch.zeros_like(v) for k, v in bad.items()})
        assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())


@pytest.mark.parametrize(("name", "says"), [
    ("xception41", "cannot run"), ("botnet26t_256", "cannot run"), ("sedarknet21", "levels 2 to 4 must be of one size"),
])  # fmt: skip
def test_networks_of_timm_that_cannot_run_are_not_built(name: str, says: str) -> None:
    with pytest.raises(UserError, match=f"'timm:{name}'.*{says}.*choose another"):
        build_encoder(f"timm:{name}")
