"""Systems small enough for a test, on random weights."""

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from model.backbone import BaseLearner, build_encoder
from model.clip import Clip
from model.few_shot.hdmnet import PICLIP, HDMNet
from model.few_shot.prior import CosinePrior, SimilarityPrior, TextPrior, VisualPrior
from model.few_shot.system import FewShot
from model.system import Frozen

VISION = {"image_size": 64, "layers": 4, "width": 128, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def small_clip(seed: int = 0) -> CLIP:
    """A ViT of CLIP's architecture, small enough for a test; its heads are 64 wide as OpenAI's."""
    torch.manual_seed(seed)
    return CLIP(32, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=True).eval()


def small_system(shot: int = 1, backbone: str = "resnet50", width: int = 8, system: type[FewShot] = HDMNet) -> FewShot:
    torch.manual_seed(0)
    encoder = build_encoder(backbone, width)
    learner = Frozen(BaseLearner(encoder, 16, 64))
    prior = SimilarityPrior() if system is HDMNet else CosinePrior()
    return system(learner if system.facts.before else Frozen(encoder), [prior], shot, system.Options())


BASE = tuple(range(6, 21))


def text_prior(clip: Clip, vocabulary: str) -> TextPrior:
    torch.manual_seed(3)
    bank = torch.nn.functional.normalize(torch.randn(40, 32), dim=-1)
    prior = TextPrior(Frozen(clip), bank, vocabulary, BASE)
    return prior


def pi_clip(clip: Clip, shot: int) -> PICLIP:
    frozen = Frozen(clip)
    prior = text_prior(clip, "present")
    prior.clip = frozen.module
    torch.manual_seed(0)
    return PICLIP(small_system(shot).base_learner, [prior, VisualPrior(frozen, shot)], shot, PICLIP.Options(), frozen).eval()
