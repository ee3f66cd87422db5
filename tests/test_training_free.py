"""Systems that train nothing: they are what their parts say, their frozen weights are loaded, and what is refused."""

from pathlib import Path

import pytest
import torch

from model import SYSTEMS, System, build_system, configure, open_tested
from model.clip import dense as D
from model.few_shot.insid3 import INSID3
from model.ops import resize
from tests.make import CONFIG
from tests.make.batches import keyed, random_episode
from util.cache import TensorCache
from util.config import Config
from util.data.folds import ClassNames, Fold, fold_of, read_class_names
from util.data.semantic import Images, images_of
from util.data.transforms import WorkingTransform
from util.errors import UserError
from util.files import load_state
from util.run.identity import Facts
from util.run.place import Experiment
from util.run.preflight import weights
from util.score.open_vocabulary import OpenVocabularyTask

OPEN = "config/demo/demo_open_vit8.yaml"
TINY = ["Method.backbone=timm:vit_tiny_patch16_224", "Method.backbone_weight=none"]


def built(arch: str, *more: str, file: str = CONFIG, names: ClassNames | None = None) -> tuple[System, Config]:
    config = configure(file, arch, [*more])
    torch.manual_seed(0)
    names = names or read_class_names(config.Data.class_names)
    return build_system(arch, config, fold_of(config), names).eval(), config


def test_all_of_them_say_so() -> None:
    free = [arch for arch, cls in SYSTEMS.items() if not cls.facts.trained]
    assert free == ["CLIP_ES", "CONTRAST", "INSID3", "MASKCLIP", "SCLIP", "NACLIP", "CLEARCLIP", "PROXYCLIP"]
    assert all(isinstance(SYSTEMS[arch].facts, Facts) and (Path("config/system") / f"{arch}.yaml").is_file() for arch in free)


def test_frozen_weights_are_loaded(scenes: Path) -> None:
    """As test.py does it, although there is no checkpoint: the encoder, and a patch encoder beside a CLIP."""
    wanted = load_state(Path("demo/backbone.safetensors"))
    data = [f"Data.data_root={scenes}", f"Data.val_list={scenes / 'list.txt'}"]
    for arch, file, part in (("CONTRAST", CONFIG, "backbone"), ("PROXYCLIP", OPEN, "patches")):
        config = configure(file, arch, data)
        system, _ = open_tested(arch, config, Experiment.from_config_path(arch, file, "exp"), Path("none"))
        encoder = getattr(system, part).module
        assert torch.equal(encoder.state_dict()["stages.4.0.conv2.weight"], encoder.translate(wanted)["stages.4.0.conv2.weight"])


@pytest.mark.parametrize("shot", [1, 3])
def test_insid3_is_its_rule(shot: int) -> None:
    """On the published kind of encoder; the same from a cache."""
    system, _ = built("INSID3", "Train.val_size=96", f"Train.shot={shot}", *TINY)
    episode = random_episode(2, shot, 96)
    found = system.predict(episode)
    rule = INSID3(system.encoder, 96, None)
    for i in range(2):
        mask = rule.predict(episode.query[i], episode.support[i], episode.support_mask[i] == 1)
        assert torch.equal(found.final[i].argmax(0) == 1, mask)
    system.remember(TensorCache(2**26), fixed_head=True)
    assert torch.equal(system.predict(keyed(episode)).final, found.final)
    episode.query_key, episode.support_key = [], []
    episode.support_mask[1] = 0  # nothing is left of the object at this side
    assert not system.predict(episode).final[1].argmax(0).any()


def scene() -> Images:
    image = (255 * torch.rand(90, 120, 3, generator=torch.Generator().manual_seed(0))).numpy()
    label = torch.zeros(90, 120, dtype=torch.uint8).numpy()
    return images_of(image, label, WorkingTransform(72), torch.zeros(3, dtype=torch.bool), "a.png")


@pytest.mark.parametrize("arch", ["SCLIP", "NACLIP", "CLEARCLIP"])
def test_open_vocabulary_is_its_steps(arch: str) -> None:
    """Windows, file size, refinement, words of a class, the threshold."""
    names = ClassNames(("star", "plant", "house"), ("star", "tree; flower", "house"))
    settings = ["Method.background=[photo]", "Method.threshold=0.35", "Method.crop=64", "Method.stride=32", "Method.scale=9"]
    system, config = built(arch, *settings, file=OPEN, names=names)
    batch, pixels = scene(), system.clip.module.visual.pixels["clip"]
    assert batch.image.shape[2:] == (72, 96) and torch.equal(batch.image, batch.image.round())
    words = ["photo", "star", "tree", "flower", "house"]
    bank = D.prompt_bank(system.clip.module.text, words, ["a photo of {}.".format])
    x = D.normalise(batch.image, pixels)
    logits = resize(system.maps.slide(x, bank, 64, 32), (90, 120), corners=False)
    if config.Method.pamr:
        assert arch == "NACLIP"
        logits = D.pamr(resize(x, (90, 120), corners=False), logits, 10, (4, 8))
    probability = D.probabilities(logits[0], torch.tensor([0, 1, 2, 2, 3]), 9.0)
    label = D.decide(probability, 0.35)
    prediction = system.predict(batch)
    assert torch.equal(prediction.decide(0, batch.placed[0]), label) and 0 < (label == 0).float().mean() < 1
    torch.testing.assert_close(prediction.final[0].amax(0), probability.amax(0))  # that of the label is raised to the best


def test_with_words_the_background_is_a_class(scenes: Path) -> None:
    data = [f"Data.data_root={scenes}", f"Data.val_list={scenes / 'list.txt'}"]
    plain, whole = (OpenVocabularyTask(configure(OPEN, "NACLIP", [*data, f"Method.background={words}"]))
                    for words in ("[]", "[photo]"))  # fmt: skip
    assert plain.channels == tuple(range(1, 21)) and whole.channels == tuple(range(21))
    assert plain.target(False)[0] == 255 and plain.target(False)[1] == 0 and whole.target(False)[0] == 0
    assert plain.fold == whole.fold == Fold("demo", 0, (), tuple(range(1, 21)))


def test_a_word_of_two_classes_is_said() -> None:
    names = ClassNames(("star", "tree", "wood"), ("star", "tree", "star; tree"))
    system, _ = built("SCLIP", file=OPEN, names=names)
    assert "star, tree: a word of two classes" in system.warnings[0]


@pytest.mark.parametrize(("arch", "file", "more", "says"), [
    ("SCLIP", OPEN, ["Method.threshold=0.1"], "give it words"),
    ("SCLIP", OPEN, ["Method.crop=64", "Method.stride=65"], "windows leave gaps"),
    ("SCLIP", OPEN, ["Method.patches=resnet50"], "reads CLIP alone"),
    ("PROXYCLIP", OPEN, ["Method.patches="], "needs a patch encoder.*vit_base_patch8_224.dino"),
    ("SCLIP", OPEN, ["Method.background=[sky]"], "does not know sky"),
    ("CONTRAST", CONFIG, ["Method.priors=[vtp]"], "takes no priors"),
    ("INSID3", CONFIG, ["Train.val_size=100", *TINY], "100 pixels is no multiple of the patch"),
])  # fmt: skip
def test_what_is_refused(arch: str, file: str, more: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        built(arch, *more, file=file)


def test_weights_of_dinov3_that_are_not_there() -> None:
    config = configure("config/coco/coco_split0_dinov3_vitl16.yaml", "INSID3")
    method = config.Method
    found = weights("ImageNet weights", method.backbone, "Method.backbone_weight", method.backbone_weight)
    assert not found.ok and "DINOv3 licence" in found.remedy and "vit_large_patch16_dinov3.lvd1689m" in found.remedy
    assert config.Train.val_size == 1024 and config.Train.antialias
