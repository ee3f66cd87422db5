"""Your own images: the same numbers as evaluation, supports paid for once."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from demo import world
from model import load_weights, open_system
from model.build import text_bank
from model.few_shot.prior import TextPrior
from model.predict.predictor import Predictor
from model.predict.text_predictor import TextPredictor
from model.system import Prediction
from tests.make import CONFIG, ROOT, make, palette_mask, restore, star, upright
from util.cache import TensorCache
from util.data.episodes import Episode, EpisodeList, mask_table
from util.data.transforms import read_label
from util.errors import UserError
from util.photos.reading import read_photo
from util.run.distributed import Context
from util.run.log import RunLog
from util.run.place import Experiment
from util.score.episodes import evaluate_episodes
from util.score.metrics import FewShotMeter, vote
from util.score.task import How


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("arch", "overrides"), [
    ("PI_CLIP", []), ("PI_CLIP", ["Train.shot=2", "CLIP.clip_size=train"]), ("PI_CLIP", ["Train.resized_val=false"]),
    ("HDMNet", ["Train.resized_val=false"]), ("BAM", ["Train.shot=2"]), ("PFENet", []),
])  # fmt: skip
def test_bit_for_bit_what_evaluation_gives(arch: str, overrides: list[str], scenes: Path, tmp_path: Path) -> None:
    """`evaluate_episodes` over the files, against the predictor over the same files; the text prior's bank of all classes
    rounds otherwise than a bank of one, so with that one the bits are compared, too."""
    config, weight = make(tmp_path, arch, *overrides, f"Data.data_root={scenes}", f"Data.val_list={scenes}/list.txt",
                          "CLIP.vocabulary=target")  # fmt: skip
    system, source = open_system(arch, config)
    load_weights(system, config, Experiment.from_config_path(arch, CONFIG, config.Runtime.output), weight)
    system.eval().remember(TensorCache(0), fixed_head=True)
    episodes = EpisodeList(source.index(training=False), config.Train.shot, seed=1)
    data, seen = source.episodes(episodes), []

    def watched(episode: Episode) -> Prediction:
        seen.append((episode, system.predict(episode)))
        return seen[-1][1]

    with RunLog(tmp_path, "log") as log:
        rows = evaluate_episodes(watched, data, 4, source.fold, How(Context(torch.device("cpu")), log)).rows
    predictor = Predictor.from_checkpoint(weight, device="cpu")
    for row, (episode, theirs) in zip(rows, seen, strict=True):
        spec, records = episodes.spec(row.number), episodes.index.records
        supports, text = [records[i] for i in spec.supports], source.names.texts[spec.cls - 1]
        masks = [palette_mask(scenes / record.label, spec.cls) for record in supports]
        predictor.set_support([scenes / record.image for record in supports], masks, text)
        ours = predictor.predict(scenes / records[spec.query].image)
        truth = torch.from_numpy(mask_table(spec.cls)[read_label(scenes / records[spec.query].label)])
        assert FewShotMeter([spec.cls]).update(torch.from_numpy(ours.mask).long(), truth, spec.cls) == row.counts
        if arch == "PI_CLIP":
            scores = restore(theirs.final[0], tuple(truth.shape), config.Train.resized_val)
            np.testing.assert_allclose(ours.score, scores.softmax(0)[1].numpy(), atol=1e-4)
            prior = next(prior for prior in system.priors if prior.name == "vtp")
            whole = prior.bank
            prior.use(text_bank(system.clip, [text]))
            theirs = system.predict(replace(episode, cls=torch.tensor([1]), present=torch.zeros(1, 1, dtype=torch.bool)))
            prior.use(whole)
        scores = restore(theirs.final[0], tuple(truth.shape), config.Train.resized_val)
        assert ours.score.std() > 1e-4
        assert np.array_equal(ours.score, scores.softmax(0)[1].numpy())
        assert np.array_equal(ours.mask, scores.argmax(0).numpy() == 1)
        assert ours.maps.keys() == theirs.maps.keys()
        assert all(np.array_equal(ours.maps[name], theirs.maps[name][0].numpy()) for name in ours.maps)


def test_supports_of_hsnet_vote(scenes: Path, tmp_path: Path) -> None:
    """As many as there are, whatever the checkpoint's number of shots; the mask is the vote of what each finds alone."""
    predictor = Predictor.from_checkpoint(make(tmp_path, "HSNet", "Train.val_size=97")[1])
    images, masks = star(scenes, of=4)
    masks = [np.roll(mask, 30 * i, 1) for i, mask in enumerate(masks)]
    alone = []
    for image, mask in zip(images[:3], masks[:3], strict=True):
        predictor.set_support(image, mask)
        alone.append(torch.from_numpy(predictor.predict(images[3]).mask))
    predictor.set_support(images[:3], masks[:3])
    assert np.array_equal(predictor.predict(images[3]).mask, vote(torch.stack(alone)) == 1)
    assert not predictor.notes or "repeated" not in " ".join(predictor.notes)
    assert any(mask.any() for mask in alone)


def test_a_name_in_place_of_masks(scenes: Path, tmp_path: Path) -> None:
    """IMR-HSNet: what evaluation gives, bit for bit; a name that is no class of the training competes with those that are."""
    given = [f"Data.data_root={scenes}", f"Data.val_list={scenes}/list.txt", "Train.val_size=65"]
    config, weight = make(tmp_path, "IMR_HSNet", *given)
    system, source = open_system("IMR_HSNet", config)
    load_weights(system, config, Experiment.from_config_path("IMR_HSNet", CONFIG, config.Runtime.output), weight)
    system.eval().remember(TensorCache(0), fixed_head=True)
    episodes = EpisodeList(source.index(training=False), 1, seed=1, start=config.Train.draw)
    predictor = Predictor.from_checkpoint(weight, device="cpu")
    for i in range(2):
        episode = source.episodes(episodes)[i]
        spec, records = episodes.spec(i), episodes.index.records
        support, query = scenes / records[spec.supports[0]].image, scenes / records[spec.query].image
        predictor.set_support(support, text=source.names.names[spec.cls - 1])
        ours, theirs = predictor.predict(query), system.predict(episode)
        assert ours.maps.keys() == theirs.maps.keys() >= {"cam", "stage 1", "stage 2"}
        assert all(np.array_equal(ours.maps[name], theirs.maps[name][0].numpy()) for name in ours.maps)
        scores = restore(theirs.final[0], ours.mask.shape, config.Train.resized_val)
        assert np.array_equal(ours.mask, scores.argmax(0).numpy() == 1)
    assert not predictor.check() and not predictor.needs_masks
    before = predictor.predict(query)
    predictor.set_support(support, np.ones_like(read_photo(support).image[..., 0]), source.names.names[spec.cls - 1])
    assert any("the masks and boxes change nothing" in note for note in predictor.notes)
    assert np.array_equal(predictor.predict(query).score, before.score)
    predictor.set_support(support, text="fish star")
    assert len(predictor.cam_prior.bank) == 21
    assert not np.array_equal(predictor.predict(query).maps["cam"], before.maps["cam"])
    for wrong, says in (({"images": support}, "give a text"), ({"text": "star"}, "at least one support")):
        with pytest.raises(UserError, match=says):
            predictor.set_support(**wrong)


def counted(module: torch.nn.Module) -> list[int]:
    """How many images each call of a module has seen."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen


def test_supports_are_paid_for_once(piclip: Path, scenes: Path) -> None:
    predictor = Predictor.from_checkpoint(piclip)
    images, masks = star(scenes, of=4)
    predictor.set_support(images[0], masks[0], "star")
    backbone, clip = counted(predictor.system.encoder), counted(predictor.system.clip.module.visual.visual.conv1)
    text = counted(predictor.system.clip.module.text)
    predictor.predict(images[1])
    assert (sum(backbone), sum(clip)) == (2, 3)  # support and query; CLIP sees the query twice, for its two priors
    predictor.predict(images[2])
    assert (sum(backbone), sum(clip)) == (3, 5)
    predictor.predict(images[2])
    assert (sum(backbone), sum(clip)) == (3, 5) and not text
    predictor.set_support(images[3], masks[3], "star")
    predictor.predict(images[2])
    assert (sum(backbone), sum(clip)) == (4, 6) and text == [2]  # the new support alone


def test_examples_are_found_in_their_own_photos(piclip: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor.from_checkpoint(piclip)
    images, masks = star(scenes, of=3)
    assert predictor.check() == []
    mask = np.zeros((40, 60), np.uint8)
    mask[:20, :20], mask[20:] = 1, 255
    label = Image.fromarray(mask, "P")
    label.putpalette(world.palette())
    predictor.set_support([images[0], np.full((40, 60, 3), 90, np.uint8)], [masks[0], label], "star")
    seen = np.zeros((40, 60), bool)
    seen[10:, :10] = True  # 100 pixels of the object's 400, and many that do not count
    monkeypatch.setattr(predictor, "predict", lambda photo: SimpleNamespace(mask=seen if photo.hw == (40, 60) else masks[0]))
    assert predictor.check() == [1, 0.25]
    seen[:] = False
    seen[10, 0], seen[19, 14] = True, True  # two pixels far apart, in a box of 10 x 15
    predictor.set_support(np.full((40, 60, 3), 90, np.uint8), boxes=[0, 0, 20, 20], text="star")
    assert predictor.check() == [150 / 400]
    seen[:] = False
    assert predictor.check() == [0]
    predictor.set_support(images[2], ~masks[2], "star")
    assert "exchanged" in " ".join(predictor.notes) and "drawn demo world" in " ".join(predictor.notes)
    predictor.set_support(text="star")
    assert predictor.check() == []


def test_every_way_to_give_an_image(piclip: Path, scenes: Path) -> None:
    predictor = Predictor.from_checkpoint(piclip)
    (support, query), (mask, _) = star(scenes)
    array = np.asarray(Image.open(support))
    box = [2, 3, 60, 70]
    filled = np.zeros_like(mask)
    filled[3:70, 2:60] = True
    found = []
    for image in (support, str(support), Image.open(support), array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        for kind in ({"masks": filled}, {"masks": [torch.from_numpy(filled).long()]}, {"boxes": box}, {"boxes": [[box]]}):
            predictor.set_support(image, text="star", **kind)
            found.append(predictor.predict(query).score)
    assert all(np.array_equal(found[0], other) for other in found)
    found = predictor.predict(query)
    assert found.mask.dtype == bool and found.score.dtype == np.float32 and found.mask.shape == found.score.shape
    assert found.mask.shape == Image.open(query).size[::-1] and 0 <= found.score.min() <= found.score.max() <= 1
    assert found.maps.keys() == {"vtp", "vvp", "correlation"} and found.seconds > 0


def test_batch_is_singles(piclip: Path, scenes: Path) -> None:
    predictor = Predictor.from_checkpoint(piclip)
    images, masks = star(scenes, of=5)
    for given in (lambda: predictor.set_support(images[:2], masks[:2], "star"), lambda: predictor.set_support(text="star")):
        given()
        together = predictor.predict_batch(images[2:])
        assert len(together) == 3 and predictor.predict_batch([]) == []
        for image, one in zip(images[2:], together, strict=True):
            alone = predictor.predict(image)
            np.testing.assert_allclose(one.score, alone.score, atol=1e-5)
            assert all(np.allclose(one.maps[name], alone.maps[name], atol=1e-5) for name in alone.maps)


def logit(score: np.ndarray) -> np.ndarray:
    return np.log(score / (1 - score))


def test_fewer_and_more_supports_than_shots(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    images, masks = star(scenes, of=4)
    query = images[3]
    one = Predictor.from_checkpoint(piclip)  # 1-shot: the mean of the scores
    one.set_support(images[:3], masks[:3], "star")
    assert "mean of 3" in " ".join(one.notes)
    mean, alone = logit(one.predict(query).score), []
    for image, mask in zip(images[:3], masks[:3], strict=True):
        one.set_support(image, mask, "star")
        alone.append(logit(one.predict(query).score))
    np.testing.assert_allclose(mean, np.mean(alone, 0), atol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 1e-2

    two = Predictor.from_checkpoint(make(tmp_path, "PI_CLIP", "Train.shot=2")[1])
    given = [([0], [0, 0]), ([0, 1, 2], [0, 1, 2, 0])]  # in turn
    for few, turns in given:
        two.set_support([images[i] for i in few], [masks[i] for i in few], "star")
        found = two.predict(query).score
        two.set_support([images[i] for i in turns], [masks[i] for i in turns], "star")
        assert np.array_equal(found, two.predict(query).score)


def test_text_alone_and_systems_without_it(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    images, masks = star(scenes)
    predictor = Predictor.from_checkpoint(piclip)
    predictor.set_support(text="star")
    encoder = counted(predictor.system.encoder)
    found = predictor.predict(images[0])
    assert not encoder and "text alone" in " ".join(predictor.notes)
    assert found.maps.keys() == {"vtp"} and np.array_equal(found.mask, found.score > 0.5) and 0 < found.mask.mean() < 1
    inside, outside = found.score[masks[0]].mean(), found.score[~masks[0]].mean()
    assert inside > 1.5 * outside  # the demo's CLIP is trained, and knows a star
    with pytest.raises(UserError, match="does not know golden, retriever .* all its words: .*anchor"):
        predictor.set_support(text="golden retriever")
    assert np.array_equal(predictor.predict(images[0]).score, found.score)  # what failed has changed nothing
    with pytest.raises(UserError, match="give a text"):
        predictor.set_support(images[0], masks[0])
    other = Predictor.from_checkpoint(make(tmp_path, "PFENet")[1])
    other.set_support(images[0], masks[0], "golden retriever")
    assert "the text changes nothing" in " ".join(other.notes)
    with pytest.raises(UserError, match="needs an example"):
        other.set_support(text="star")
    with pytest.raises(UserError, match="call set_support"):
        Predictor.from_checkpoint(piclip).predict(images[0])


def test_without_any_training(piclip: Path, scenes: Path) -> None:
    """CLIP and a text alone: what a trained system with the same CLIP says of a text alone, and the published computation."""
    images, masks = star(scenes)
    alone, trained = TextPredictor.from_clip("demo/clip"), Predictor.from_checkpoint(piclip)
    with pytest.raises(UserError, match="call set_support"):
        alone.predict(images[0])
    alone.set_support(text=" star ")
    trained.set_support(text="star")
    found = alone.predict(images[0])
    assert np.array_equal(found.score, trained.predict(images[0]).score) and alone.notes == trained.notes
    assert found.score[masks[0]].mean() > 1.5 * found.score[~masks[0]].mean()
    image = read_photo(images[0]).image
    image = image[: image.shape[0] // 8 * 8, : image.shape[1] // 8 * 8]  # whole patches: CLIP sees it as it is
    bank = text_bank(alone.clip, ["star"])
    prior = TextPrior(alone.clip, bank, "all", ()).refined(
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None], torch.ones(1, 2, dtype=torch.bool), torch.tensor([0]))
    np.testing.assert_array_equal(alone.predict(image).maps["vtp"], prior[0].numpy())
    for text, message in ((" ", "give a text"), ("golden retriever", "does not know")):
        with pytest.raises(UserError, match=message):
            alone.set_support(text=text)
    with pytest.raises(UserError, match="no examples"):
        alone.set_support(images[0], masks[0], "star")
    assert np.array_equal(alone.predict(images[0]).score, found.score) and alone.check() == []  # what failed has changed nothing
    large = cv2.resize(image, None, fx=6, fy=6)
    assert alone.predict(large).mask.shape == large.shape[:2] and max(alone.predict(large).maps["vtp"].shape) == 320 // 8
    for hw in ((1, 1), (3, 200), (2000, 2)):
        assert alone.predict(upright(np.random.default_rng(3), hw)).mask.shape == hw


def test_a_base_class_is_known_by_its_name(piclip: Path, scenes: Path) -> None:
    """The base learner would hold it for background."""
    predictor = Predictor.from_checkpoint(piclip)
    images, masks = star(scenes)
    query = read_photo(images[1])
    for text, rank in (("star", -1), ("Crown", predictor.fold.base_rank(predictor.names.names.index("crown") + 1))):
        predictor.set_support(images[0], masks[0], text)
        assert predictor.episode(query, predictor._target.groups[0]).base_rank.tolist() == [rank]
    assert rank >= 0 and "base learner knows" in " ".join(predictor.notes)


def test_large_small_and_thin(piclip: Path) -> None:
    """A photo larger than any of the data sets is reduced on the way in; the mask has the photo's size all the same."""
    predictor = Predictor.from_checkpoint(piclip)
    rng = np.random.default_rng(3)
    large = upright(rng, (1500, 2000))
    predictor.set_support(large, boxes=[300, 300, 900, 900], text="star")
    episode = predictor.episode(read_photo(large), predictor._target.groups[0])
    assert episode.annotation_hw.tolist() == [[240, 320]]
    assert predictor.predict(large).mask.shape == (1500, 2000)
    for hw in ((1, 1), (3, 200), (2000, 2)):
        assert predictor.predict(upright(rng, hw)).mask.shape == hw
    with pytest.raises(UserError, match="too small"):
        predictor.set_support(large, boxes=[301, 301, 303, 303], text="star")


def test_published_checkpoints(scenes: Path, tmp_path: Path) -> None:
    """A .pth under the published names, with the config and the system that it is of."""
    config, weight = make(tmp_path, "HDMNet")
    images, masks = star(scenes)
    ours = Predictor.from_checkpoint(weight)
    names = {name: ours.system.official_name(name) for name in ours.system.state_dict()}
    torch.save({"state_dict": {f"module.{names[name]}": x for name, x in ours.system.state_dict().items()}}, tmp_path / "hdm.pth")
    with pytest.raises(UserError, match="--arch PI_CLIP"):
        Predictor.from_checkpoint(tmp_path / "hdm.pth")
    theirs = Predictor.from_checkpoint(tmp_path / "hdm.pth", config=config, arch="HDMNet")
    for predictor in (ours, theirs):
        predictor.set_support(images[0], masks[0])
    assert np.array_equal(ours.predict(images[1]).score, theirs.predict(images[1]).score)
