"""The few-shot systems: exact identities against the plain formulas, invariances, what is frozen, odd inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import build_encoder
from model.few_shot.ensemble import Ensemble, KShotWeights
from model.few_shot.matcher import Decoder, Match, Matcher, merge_heads, split_heads
from model.few_shot.parts import gram, inside, masked_average, max_cosine
from model.few_shot.prior import join
from model.losses import distillation_loss, segmentation_loss
from tests.make import random_episode, small_system
from util.config import Train
from util.data.episodes import Episode
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


def test_decoder_is_its_layers_one_after_the_other() -> None:
    """At the border too; with any statistics; and so are all gradients."""
    torch.manual_seed(0)
    decoder = Decoder(3, 2, nn.BatchNorm2d(2), nn.ReLU()).double().eval()
    for norm in decoder:
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    plain = x
    for layer in decoder:
        plain = layer(plain)
    torch.testing.assert_close(decoder(x), plain)
    wanted = [x, *decoder.parameters()]
    found, expected = (torch.autograd.grad(y.square().sum(), wanted) for y in (decoder(x), plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(g.any() for g in found)


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
    large, weight = F.interpolate(logits, (9, 9), mode="bilinear", align_corners=True), torch.tensor([1.0, 3.0])
    weighted = F.cross_entropy(large, target, weight, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, target, 3), weighted)
    assert segmentation_loss(logits.double(), target, 3.0).dtype == torch.float64
    maps = [torch.randn(1, 3, 3, requires_grad=True), torch.randn(1, 5, 5, requires_grad=True)]
    loss = distillation_loss(maps, torch.zeros(1, 9, 9, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(m.grad).all() for m in maps)


def test_a_level_that_teaches_does_not_learn() -> None:
    """The coarse level's gradient is that of its own term: the finer one, which it teaches, pulls at nothing."""
    torch.manual_seed(0)
    coarse, fine = torch.randn(2, 3, 3, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    target = torch.rand(2, 9, 9) > 0.5
    (both,) = torch.autograd.grad(2 * distillation_loss([coarse, fine], target), coarse)
    (alone,) = torch.autograd.grad(distillation_loss([coarse], target), coarse)
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("backbone", ["vgg16_bn", "timm:tf_efficientnet_lite0"])
def test_other_backbones(backbone: str) -> None:
    """What test_systems.py holds of resnet50, odd sides and two shots; the weights of shots are in no group, as published."""
    system = small_system(2, backbone).train()
    optimizer, losses = system.optimizer(Train()), system.losses(random_episode(shot=2, side=67))
    sum(losses.values()).backward()
    weights = {k: v.clone() for k, v in system.trained.named_parameters()}
    optimizer.step()
    frozen = {k for k, v in system.trained.named_parameters() if torch.equal(v, weights[k])}
    assert frozen and all("kshot_rw" in k for k in frozen)
    prediction = system.eval().predict(random_episode(shot=2, side=67))
    assert prediction.final.shape == prediction.meta.shape == (2, 2, 67, 67) and prediction.base.shape == (2, 16, 67, 67)


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


@pytest.mark.parametrize(("name", "says"), [
    ("xception41", "cannot run"), ("botnet26t_256", "cannot run"), ("sedarknet21", "levels 2 to 4 must be of one size"),
])  # fmt: skip
def test_networks_of_timm_that_cannot_run_are_not_built(name: str, says: str) -> None:
    with pytest.raises(UserError, match=f"'timm:{name}'.*{says}.*Those that work are"):
        build_encoder(f"timm:{name}")
