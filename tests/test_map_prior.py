"""Training-free maps as priors: what they compute, which words compete, patch encoders beside a CNN, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from model import build_system, configure
from model.few_shot.contrast import contrast
from model.few_shot.map_prior import SHARPNESS
from model.few_shot.system import FewShot
from tests.make import CONFIG
from tests.make.batches import keyed, random_episode
from util.cache import TensorCache
from util.data.episodes import Episode
from util.data.folds import fold_of, read_class_names
from util.errors import UserError


def built(arch: str, priors: str, *more: str) -> FewShot:
    small = ["Method.backbone_weight=none", "Method.width=8", "CLIP.vocabulary=base+target"]
    config = configure(CONFIG, arch, [f"Method.priors=[{priors}]", *small, *more])
    torch.manual_seed(0)
    return build_system(arch, config, fold_of(config), read_class_names(config.Data.class_names)).eval()


def maps(system: FewShot, episode: Episode) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return system.prior_maps(episode, system.features(episode))


def test_contrast_sees_the_whole_support() -> None:
    """Also where the decoder masks it: the background counts; joined maps are averaged."""
    system, episode = built("HDMNet", "contrast,naclip,contrast+naclip"), random_episode()
    found = maps(system, episode)
    cells = system.encoder.cells(torch.cat([episode.query[:1], episode.support[0]]))
    score = contrast(cells[0], cells[1:], [*episode.support_mask[0]])
    torch.testing.assert_close(found["contrast"][0, 0], (SHARPNESS * score).sigmoid(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["contrast+naclip"], (found["contrast"] + found["naclip"]) / 2)
    assert all(0 <= x.min() and x.max() <= 1 and x.std() > 0 for x in found.values())


def test_a_patch_encoder_beside_the_cnn() -> None:
    """Its maps are the same from a cache, its weights are frozen and hashed; each image goes through it once."""
    names = "contrast,mutual,regions,proxyclip"
    more = ("Train.shot=2", "Method.patches=timm:vit_tiny_patch16_224", "Method.patches_weight=none")
    system, episode = built("PFENet", names, *more), random_episode(1, 2)
    assert "patches" in system.frozen_hashes() and not any(p.requires_grad for p in system.patches.parameters())
    plain = maps(system, episode)
    seen = []
    system.patches.module.register_forward_hook(lambda *_: seen.append(1))
    system.remember(TensorCache(2**26), fixed_head=False)
    for _ in range(2):
        again = maps(system, keyed(episode))
    assert len(seen) <= 1 + 2 + 1 + 1  # query, supports, a black image, ProxyCLIP's own size of the query
    assert all(torch.allclose(again[name], plain[name], atol=1e-5) for name in plain)


def test_words_that_compete() -> None:
    system = built("HDMNet", "naclip")
    prior, (first, *_), base = system.priors[0], system.priors[0].names, fold_of(configure(CONFIG, "HDMNet")).base
    assert [prior.words[i] for i in prior.competing(0)][0] == first == "star"
    assert set(prior.competing(0)[1:20]) >= {c - 1 for c in base}
    tree = [prior.words[i] for i in prior.competing(2)]
    assert tree[0] == "tree" and tree.count("tree") == 1  # a word of backgrounds that this CLIP knows, but the class itself
    assert "tree" in [prior.words[i] for i in prior.competing(0)]
    images = 255 * torch.rand(1, 3, 64, 64)
    cosines = prior.cosines(images)
    assert cosines.shape == (1, len(prior.words), 8, 8) and cosines.abs().max() <= 1
    other = F.one_hot(torch.tensor(0), len(prior.words)).view(1, -1, 1, 1) * 9
    prior.cosines = lambda images: (cosines + other).expand(len(images), -1, -1, -1)
    episode = random_episode(1)
    episode.cls[:] = 1
    assert maps(system, episode)["naclip"].min() > 0.99


@pytest.mark.parametrize(("priors", "more", "says"), [
    ("naclip", "CLIP.vocabulary=present", "does not read the query's annotation: choose CLIP.vocabulary=target"),
    ("proxyclip", "Train.shot=1", "proxyclip needs a patch encoder.*Method.patches=timm:vit_base_patch8_224.dino"),
    ("contrst+naclip", "Train.shot=1", "unknown prior 'contrst'; did you mean contrast"),
    ("contrast+contrast", "Train.shot=1", "each once"),
    ("contrast", "Method.backbone=timm:vit_tiny_patch16_224", "one grid of features; this system needs a pyramid"),
])  # fmt: skip
def test_what_is_refused(priors: str, more: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        built("PFENet", priors, more)


def test_a_class_without_a_name() -> None:
    system, episode = built("PFENet", "sclip"), random_episode(1)
    episode.cls[:] = 21
    with pytest.raises(UserError, match="no text of class 21: there are 20"):
        maps(system, episode)


def test_another_text_at_prediction() -> None:
    """Words that were there keep their rows, new ones get theirs; base classes of the training still compete."""
    prior = built("PFENet", "naclip").priors[0]
    row = prior.bank[prior.words.index("mug")].clone()
    prior.use(["lamp", "mug"], range(2, 3))
    assert torch.equal(prior.bank[1], row) and [prior.words[i] for i in prior.competing(0)] == ["lamp", "mug", "tree"]
