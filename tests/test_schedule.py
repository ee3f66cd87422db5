"""The course of a training: rates by the step, where it stops, and a loss that is no number."""

import math

import pytest
import torch

from util.config import Train
from util.run.distributed import Context
from util.run.schedule import Guard, Schedule, stops

CPU = torch.device("cpu")


def test_poly_without_warm_up_is_the_published_rate() -> None:
    rate = Schedule(200, 0.9).rate
    assert rate(0.01, 0) == 0.01 and rate(0.01, 50) == pytest.approx(0.01 * 0.75**0.9) and 0 < rate(0.01, 199) < 1e-4
    assert Schedule(200, 0).rate(0.01, 199) == 0.01


@pytest.mark.parametrize("of_decayed", [False, True])
def test_warm_up(of_decayed: bool) -> None:
    """A factor grows in a line from `ratio`: of the initial rate (WeCLIP) or of the decayed one (mmcv)."""
    schedule = Schedule(100, 1.0, warmup=20, ratio=0.1, of_decayed=of_decayed)
    for step in (0, 5, 19):
        factor = 0.1 + 0.9 * step / 20
        assert schedule.rate(2.0, step) == pytest.approx(2 * factor * (1 - step / 100 if of_decayed else 1))
    assert schedule.rate(2.0, 20) == pytest.approx(2 * 0.8)


def test_the_decay_ends_at_the_floor() -> None:
    schedule = Schedule(100, 0.9, floor=1e-4)
    assert schedule.rate(0.01, 0) == pytest.approx(0.01)
    assert schedule.rate(0.01, 40) == pytest.approx((0.01 - 1e-4) * 0.6**0.9 + 1e-4)
    assert schedule.rate(0.01, 99) > 1e-4 and schedule.rate(0.01, 100) == pytest.approx(1e-4)


def test_every_group_keeps_its_factor_and_the_log_shows_the_highest() -> None:
    """Also after a resume, where the optimizer brings its initial rates along."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 1.0}], lr=0.5)

    schedule, first, second = Schedule(10, 1.0), optimizer(), optimizer()
    assert schedule.set(first, 0) == 1.0  # of the second group
    assert schedule.set(first, 5) == pytest.approx(0.5)
    assert [group["lr"] for group in first.param_groups] == pytest.approx([0.05, 0.5])
    second.load_state_dict(first.state_dict())
    assert schedule.set(second, 8) == pytest.approx(0.2) and second.param_groups[0]["lr"] == pytest.approx(0.02)


def test_stops_of_epochs() -> None:
    found = stops(Train(epochs=3), per_epoch=10)
    assert [(s.step, s.epoch, s.label, s.validate, s.last) for s in found] == [
        (10, 0, "epoch 1/3", True, True), (20, 1, "epoch 2/3", True, True), (30, 2, "epoch 3/3", True, True),
    ]  # fmt: skip
    half = stops(Train(epochs=2, validate_every=0.5), per_epoch=7)
    assert [(s.step, s.epoch, s.validate, s.last) for s in half] == [
        (3, 0, True, False), (7, 0, True, True), (10, 1, True, False), (14, 1, True, True),
    ]  # fmt: skip
    rare = stops(Train(epochs=3, validate_every=2), per_epoch=10)
    assert [(s.step, s.validate) for s in rare] == [(10, False), (20, True), (30, True)]  # the end is always judged


def test_stops_of_iterations() -> None:
    found = stops(Train(iterations=25, validate_every=10, keep=[5, 20, 99], epochs=1), per_epoch=8)
    assert [(s.step, s.validate, s.last, s.keep) for s in found] == [
        (5, False, False, True), (8, False, True, False), (10, True, False, False), (16, False, True, False),
        (20, True, False, True), (24, False, True, False), (25, True, True, False),
    ]  # fmt: skip
    assert found[-1].label == "epoch 4/4"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_weight_takes_a_loss_that_is_no_number(bad: float) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, guard = torch.optim.AdamW([weight], lr=0.1), Guard(Context(CPU))

    def step(number: int, factor: float) -> None:
        loss = (factor * weight).sum()
        optimizer.zero_grad()
        loss.backward()
        guard.step(optimizer, loss, number)

    step(0, 1.0)
    assert not guard.stopped() and int(guard.first) == -1 and (weight < 1).all()
    kept, state = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    step(1, bad)
    step(2, 1.0)  # what follows is not taken either
    assert guard.stopped() and int(guard.first) == 1
    assert torch.equal(weight, kept) and all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits() -> None:
    """The same through the fused optimizer, which looks at the flag itself."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer, guard = torch.optim.AdamW([weight], lr=0.1, fused=True), Guard(Context(torch.device("cuda")))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, factor in enumerate((1.0, 1.0, math.nan, 1.0)):
            loss = (factor * weight).sum()
            optimizer.zero_grad()
            loss.backward()
            guard.step(optimizer, loss, number)
            if number == 1:
                kept = weight.detach().clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.stopped() and int(guard.first) == 2 and torch.equal(weight, kept) and (kept < 1).all()
