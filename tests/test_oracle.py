"""What is computed cheaply equals the plain computation of the papers."""

import pytest
import torch

from bench import oracle
from bench.oracle import plain_scores
from bench.weak_oracle import plain_losses, plain_predict
from model.clip import Clip
from model.clip.load import clip_from_state
from model.few_shot import conv4d, hsnet, imr_hsnet
from model.few_shot.hdmnet import HDMNet
from model.weak.decoder import affinity_of
from model.weak.maps import see
from tests.make import clip_episode, keyed, pi_clip, small_clip, small_system
from tests.make.weak import batch, system
from util.cache import TensorCache


def systems() -> list[HDMNet]:
    state = small_clip().state_dict()  # as it comes, its attention is too even for a prior to have a shape
    clip: Clip = clip_from_state({**state, "visual.positional_embedding": state["visual.positional_embedding"] * 20})
    return [pi_clip(clip, 2).eval(), small_system(2).eval()]


@pytest.mark.parametrize("fixed", [None, False, True], ids=["plain", "cached", "cached, head fixed"])
@pytest.mark.parametrize("system", systems(), ids=lambda s: type(s).__name__)
def test_scores_are_those_of_the_plain_computation(system: HDMNet, fixed: bool | None) -> None:
    batch = clip_episode(shot=2)
    batch.support_mask[1, 1] = 0  # a shot without an object
    if fixed is not None:
        system.remember(TensorCache(2**30), fixed)
        keyed(batch)
    found = [system.predict(batch) for _ in range(2)][-1]
    with torch.no_grad():
        for i in range(len(batch)):
            final, meta = plain_scores(system, batch, i)
            for ours, plain in ((found.meta[i], meta), (found.final[i], final)):
                torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5 * float(plain.std()))


def random_mask(N: int, side: int) -> torch.Tensor:
    """N 1 S S in {0, 1}: boxes at random places, the last one empty."""
    mask = torch.zeros(N, 1, side, side)
    for i in range(N - 1):
        top, left = torch.randint(0, side - 9, (2,)).tolist()
        mask[i, :, top : top + 9 + i, left : left + 11] = 1
    return mask


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 4), (3, 4)])
@pytest.mark.parametrize("grid", [(7, 5, 13, 10), (4, 6, 9, 9), (5, 3, 2, 2), (3, 3, 2, 1)])
def test_4d_convolutions_are_the_plain_ones(kernel: int, stride: int, grid: tuple[int, ...], monkeypatch) -> None:
    """On a given tensor and on a correlation of which a part is masked out; all gradients too."""
    monkeypatch.setitem(conv4d.CHUNK, "cpu", 300)  # several pieces
    torch.manual_seed(0)
    layer, (k, l) = conv4d.CorrelationConv4d(3, 4, kernel, stride).double(), grid[2:]  # noqa: E741
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    wanted = oracle.conv4d(layer, x)
    assert_same(conv4d.CenterPivotConv4d.forward(layer, x), wanted, [x, *layer.parameters()])
    query, support = (torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True) for size in (grid[:2], grid[2:]))
    whole, corner, middle = (0, k, 0, l), (0, 1, l - 1, l), (k // 3, k // 3 + 2, l // 3, l // 2 + 1)
    for top, bottom, left, right in (whole, corner, middle, (k // 2, k, 0, 1), (0, 0, 0, 0)):
        mask = torch.zeros(k, l, dtype=torch.float64)
        mask[top:bottom, left:right] = 1
        wanted = oracle.conv4d(layer, oracle.correlation(query[None], (support * mask)[None]))
        found = layer(conv4d.Cosines(conv4d.unit(query), support, mask))
        assert_same(found, wanted, [query, support, *layer.parameters()] if mask.any() else list(layer.parameters()))


def assert_same(found: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    probe = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * probe).sum(), inputs, materialize_grads=True) for y in (found, wanted)]
    for ours, plain in ((found, wanted), *zip(*gradients, strict=True)):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shot", [1, 3])
@pytest.mark.parametrize("sides", [(13, 7, 4), (8, 4, 2)])
def test_hsnet_is_the_plain_computation(shot: int, sides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = hsnet.Head((2, 3, 1)).double()
    query, support = ([torch.randn(N, n, 6, s, s + d, dtype=torch.float64) for n, s in zip((2, 3, 1), sides, strict=True)]
                      for N, d in ((2, 1), (2 * shot, 0)))  # fmt: skip
    mask = random_mask(2 * shot, 40).double()
    inputs = list(head.parameters())
    assert_same(head(query, support, mask), oracle.plain_hsnet(head, query, support, mask), inputs)
    one = [head([x[:1] for x in query], [x[k : k + 1] for x in support], mask[k : k + 1]) for k in range(shot)]
    assert torch.equal(head(query, support, mask)[:shot], torch.cat(one))  # to the bit, whatever comes with it


@pytest.mark.parametrize("mask_mode", ["official", "paper"])
def test_imr_hsnet_is_the_plain_computation(mask_mode: str) -> None:
    torch.manual_seed(0)
    head = imr_hsnet.Head((2, 3, 1), 6, 3, mask_mode).double()
    query, support = ([torch.randn(2, n, 6, s, s, dtype=torch.float64) for n, s in ((2, 9), (3, 5), (1, 3))] for _ in range(2))
    cams = [torch.rand(2, 1, 9, 9, dtype=torch.float64) * (torch.rand(2, 1, 9, 9) > 0.5) for _ in range(2)]
    cams[0][:, :, :4] = 0
    found, wanted = head(query, support, *cams), oracle.plain_imr_hsnet(head, query, support, *cams)
    assert_same(torch.stack(found), torch.stack(wanted), list(head.parameters()))


def test_group_norm_keeps_its_digits_far_from_zero() -> None:
    norm, x = conv4d.NormReLU4d(4, 16), 0.5 * torch.randn(1, 20, 20, 9, 9, 16).permute(0, 5, 1, 2, 3, 4) + 30
    wanted = torch.nn.functional.group_norm(x.double(), 4).relu()
    torch.testing.assert_close(norm(x).double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rfm", [False, True], ids=["static", "rfm"])
def test_weclip_is_its_plain_computation(rfm: bool) -> None:
    """Labels, losses and gradients of a batch with ragged labels, and a tested image."""
    model, given = system(dropout=0, long_side=96).train(), batch(((0, 3), (2, 4, 5), (1,)))
    plain, label = plain_losses(model, given.image, given.present, rfm)
    expected = torch.autograd.grad(sum(plain.values()), list(model.head.parameters()))
    images = model.normalise(given.image)
    seen = see(model.vision.visual, images, 3, hidden=True)
    affinity = affinity_of(model.head(seen.hidden, seen.grid)[0]).detach() if rfm else None
    ours = model.pseudo_label(seen, images, model.pairs(given.present, images.device), affinity)
    assert (ours == label).float().mean() > 0.998 and len(label.unique()) > 4
    losses = model.losses(given, 10 if rfm else 0)
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value, rtol=5e-3, atol=0)
    found = torch.autograd.grad(sum(losses.values()), list(model.head.parameters()))
    assert all((a - b).norm() <= 0.02 * b.norm() + 1e-6 for a, b in zip(found, expected, strict=True))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.predict(given.rows(slice(0, 1))).final, plain_predict(model, given.image[:1]),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
