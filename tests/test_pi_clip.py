"""PI-CLIP's priors on a small CLIP: vocabularies, batches of mixed sizes, and CLIP tensors inside a checkpoint."""

import pytest
import torch

from model.clip import Clip
from model.clip.load import clip_from_state
from model.few_shot.prior import check_priors
from tests.make import clip_episode, pi_clip, small_clip, text_prior
from util.data.episodes import Episode
from util.errors import UserError


@pytest.fixture(scope="module")
def clip() -> Clip:
    state = small_clip().state_dict()
    return clip_from_state({**state, "visual.positional_embedding": state["visual.positional_embedding"] * 20})


def test_mixed_sizes_in_a_batch_equal_one_by_one(clip: Clip) -> None:
    prior, batch = text_prior(clip, "present"), clip_episode()
    together = prior.at_annotation_size(batch, range(3))
    assert [tuple(m.shape) for m in together] == [(30, 41), (45, 29), (32, 48)]
    for i in range(3):
        alone = Episode(**{k: v[i : i + 1] for k, v in vars(batch).items()})
        torch.testing.assert_close(prior.at_annotation_size(alone, [0])[0], together[i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("vocabulary", "classes"), [
    ("present", {6, 8}), ("target", {6}), ("base+target", {6, *range(5, 20)}), ("all", set(range(20))),
])  # fmt: skip
def test_vocabularies(clip: Clip, vocabulary: str, classes: set[int]) -> None:
    found = text_prior(clip, vocabulary).candidates(clip_episode())[0].nonzero().flatten().tolist()
    assert set(found) == classes | {c + 20 for c in classes}


def test_only_present_reads_the_annotation(clip: Clip) -> None:
    other = clip_episode()
    other.present = ~other.present
    for vocabulary in ("present", "target", "base+target", "all"):
        prior = text_prior(clip, vocabulary)
        same = torch.equal(prior.candidates(clip_episode()), prior.candidates(other))
        assert same == (vocabulary != "present")
    assert text_prior(clip, "present").candidates(other)[:, 6].all()  # the target competes even where it is not annotated


@pytest.mark.parametrize("shot", [1, 3])
def test_priors_are_channels_and_baselines(clip: Clip, shot: int) -> None:
    system, batch = pi_clip(clip, shot), clip_episode(shot)
    assert system.head.query_merge[0].in_channels == 514 + 2 * shot
    prediction = system.predict(batch, baselines=True)
    assert prediction.maps["vtp"].shape == prediction.maps["vvp"].shape == (3, 9, 9)
    assert set(prediction.baselines) == {"contrast > 0", "cosine prior > 0.5", "text prior (VTP) > 0.5"}


def test_clip_inside_a_checkpoint_must_be_the_one_in_use(clip: Clip) -> None:
    system = pi_clip(clip, 1)
    state = {official: v.clone() for ours, v in system.state_dict().items() if (official := system.official_name(ours))}
    inside = {f"clip_model.visual.{k}": v.half() for k, v in clip.visual.visual.state_dict().items()}
    inside |= {f"clip_model.{k}": v.half() for k, v in clip.text.clip.state_dict().items()}
    system.import_official(state | inside)
    inside["clip_model.visual.proj"] = inside["clip_model.visual.proj"] + 1
    with pytest.raises(UserError, match="another CLIP"):
        system.import_official(state | inside)
    with pytest.raises(UserError, match="not part of this model: extra"):
        system.import_official(state | {"extra.weight": torch.zeros(1)})


def test_unknown_priors() -> None:
    for names in (["vtp", "vtp"], [], ["magic"]):
        with pytest.raises(UserError, match="Method.priors"):
            check_priors(names, base_learner=True)
    with pytest.raises(UserError, match="similarity"):
        check_priors(["similarity"], base_learner=False)
