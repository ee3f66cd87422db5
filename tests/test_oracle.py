"""What is computed cheaply equals the plain computation of the papers."""

import pytest
import torch

from bench.oracle import plain_scores
from model.clip import Clip
from model.clip.load import clip_from_state
from model.few_shot.hdmnet import HDMNet
from tests.make import clip_episode, keyed, pi_clip, small_clip, small_system
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
