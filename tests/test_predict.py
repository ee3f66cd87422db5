"""Your own images: the same numbers as evaluation, supports paid for once, photos of every kind, the command line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

import predict
from demo import world
from model import build_system, load_backbone, load_weights, open_system
from model.build import text_bank
from model.predictor import Predictor
from model.system import Prediction
from util import cli, experiment
from util.cache import TensorCache
from util.checkpoint import read_meta, save_weights
from util.config import Config, load_config
from util.data.episodes import Episode, EpisodeList, mask_table
from util.data.folds import fold, read_class_names
from util.data.photos import ORIENTATION, box_mask, read_mask, read_photo
from util.data.transforms import read_label
from util.distributed import Context
from util.errors import UserError
from util.evaluate import evaluate_episodes
from util.experiment import Experiment
from util.files import load_tensors
from util.log import RunLog
from util.metrics import FewShotMeter, to_original
from util.polygons import coco, polygons

ROOT = Path(__file__).parents[1]
CONFIG = "config/demo/demo_split0_resnet50.yaml"
NUMBERS = range(5001, 5101)
STAR = 1  # class


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 scenes of the demo world in VOC's layout, and their list."""
    root = tmp_path_factory.mktemp("scenes")
    for folder in ("JPEGImages", "SegmentationClassAug", "Annotations"):
        (root / folder).mkdir()
    for number in NUMBERS:
        world.write(root, number)
    (root / "list.txt").write_text(world.list_lines(NUMBERS))
    return root


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def make(root: Path, arch: str, *overrides: str) -> tuple[Config, Path]:
    """An untrained system's checkpoint as train.py writes it, with its base learner; its config and file."""
    few = ["Train.val_size=65", f"Runtime.output={root}/exp", "Method.ppm_scales=[9,5,2]", *overrides]
    for name in ("PSPNet", arch):
        config = load_config(CONFIG, name, few)
        place = Experiment.from_config_path(name, CONFIG, config.Runtime.output)
        torch.manual_seed(5)
        system = build_system(name, config, fold("demo", 0), read_class_names(config.Data.class_names))
        load_backbone(system, config, place)
        with torch.no_grad():
            for parameter in system.trained.parameters() if name == arch else ():
                parameter.mul_(1.5)  # scores that differ, and masks that are neither empty nor full
            if hasattr(system.trained, "ensemble"):
                system.trained.ensemble.cls_merge.weight.fill_(1)  # so far the base learner has no say
        meta = experiment.identity(name, config, system.prior_names) | {"frozen": system.frozen_hashes()}
        save_weights(place.best, system.trained_state(), meta | {"config": asdict(config)})
    return config, place.best


@pytest.fixture(scope="module")
def piclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.chdir(ROOT)
    return make(tmp_path_factory.mktemp("piclip"), "PI_CLIP")[1]


def photo(scenes: Path, number: int) -> Path:
    return scenes / f"JPEGImages/{world.stem(number)}.jpg"


def palette_mask(path: Path, cls: int) -> Image.Image:
    """What evaluation makes of a label, {0, 1, 255 = does not count}, with a palette."""
    image = Image.fromarray(mask_table(cls)[read_label(path)], "P")
    image.putpalette(world.palette())
    return image


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
        _, rows = evaluate_episodes(watched, data, 4, source.fold, Context(torch.device("cpu")), log, batch=1, workers=0,
                                    squash=config.Train.resized_val)  # fmt: skip
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
            scores = to_original(theirs.final[0], tuple(truth.shape), config.Train.resized_val)
            np.testing.assert_allclose(ours.score, scores.softmax(0)[1].numpy(), atol=1e-4)
            prior = next(prior for prior in system.priors if prior.name == "vtp")
            whole = prior.bank
            prior.use(text_bank(system.clip, [text]))
            theirs = system.predict(replace(episode, cls=torch.tensor([1]), present=torch.zeros(1, 1, dtype=torch.bool)))
            prior.use(whole)
        scores = to_original(theirs.final[0], tuple(truth.shape), config.Train.resized_val)
        assert ours.score.std() > 1e-4
        assert np.array_equal(ours.score, scores.softmax(0)[1].numpy())
        assert np.array_equal(ours.mask, scores.argmax(0).numpy() == 1)
        assert ours.maps.keys() == theirs.maps.keys()
        assert all(np.array_equal(ours.maps[name], theirs.maps[name][0].numpy()) for name in ours.maps)


def star(scenes: Path, *, of: int = 2) -> tuple[list[Path], list[np.ndarray]]:
    """Scenes that show a star, with its mask."""
    labels = {n: read_label(scenes / f"SegmentationClassAug/{world.stem(n)}.png") == STAR for n in NUMBERS}
    shown = [n for n, mask in labels.items() if mask.sum() > 400][:of]
    return [photo(scenes, n) for n in shown], [labels[n] for n in shown]


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
    with pytest.raises(UserError, match="not trained on 'golden', 'retriever'"):
        predictor.set_support(text="golden retriever")
    assert np.array_equal(predictor.predict(images[0]).score, found.score)  # what failed has changed nothing
    with pytest.raises(UserError, match="give a text"):
        predictor.set_support(images[0], masks[0])
    other = Predictor.from_checkpoint(make(tmp_path, "PFENet")[1])
    other.set_support(images[0], masks[0], "golden retriever")
    assert "the text changes nothing" in " ".join(other.notes)
    with pytest.raises(UserError, match="needs at least one image"):
        other.set_support(text="star")
    with pytest.raises(UserError, match="call set_support"):
        Predictor.from_checkpoint(piclip).predict(images[0])


def test_a_base_class_is_known_by_its_name(piclip: Path, scenes: Path) -> None:
    """The base learner would hold it for background."""
    predictor = Predictor.from_checkpoint(piclip)
    images, masks = star(scenes)
    query = read_photo(images[1])
    for text, rank in (("star", -1), ("Crown", fold("demo", 0).base_rank(predictor.names.names.index("crown") + 1))):
        predictor.set_support(images[0], masks[0], text)
        assert predictor.episode(query, predictor._groups[0]).base_rank.tolist() == [rank]
    assert rank >= 0 and "base learner knows" in " ".join(predictor.notes)


def upright(rng: np.random.Generator, hw: tuple[int, int] = (40, 60)) -> np.ndarray:
    return cv2.resize(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8), hw[::-1], interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_and_masks_follow(orientation: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, mask = upright(rng), np.zeros((40, 60), np.uint8)
    mask[5:20, 30:58] = 255
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # that undoes it: the other quarter turn
    store = (lambda x: x) if method is None else (lambda x: x.transpose(Image.Transpose(method)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    store(Image.fromarray(image)).save(tmp_path / "a.png", exif=exif)
    found = read_photo(tmp_path / "a.png")
    assert np.array_equal(found.image, image)
    Image.fromarray(mask).save(tmp_path / "upright.png")
    assert np.array_equal(read_mask(tmp_path / "upright.png", found), mask // 255)
    if orientation > 4:  # otherwise the size does not tell
        store(Image.fromarray(mask)).save(tmp_path / "stored.png")
        assert np.array_equal(read_mask(tmp_path / "stored.png", found), mask // 255)
        found = read_photo(Image.fromarray(image.transpose(1, 0, 2)))
        with pytest.raises(UserError, match="60 x 40 pixels, its photo .* 40 x 60"):
            read_mask(tmp_path / "upright.png", found)


def test_kinds_of_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = upright(rng)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:10] = 0
    over_white = image.copy()
    over_white[:10] = 255
    kinds = {
        "rgb.png": (Image.fromarray(image), image),
        "grey.png": (Image.fromarray(grey), np.repeat(grey[..., None], 3, 2)),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 256 + 77), np.repeat(grey[..., None], 3, 2)),
        "alpha.png": (Image.fromarray(np.dstack([image, alpha])), over_white),
        "palette.gif": (Image.fromarray(image).quantize(256), image),
        "cmyk.tif": (Image.fromarray(image).convert("CMYK"), image),
        "line.png": (Image.fromarray(grey > 128), np.repeat(((grey > 128) * np.uint8(255))[..., None], 3, 2)),
    }
    for name, (stored, expected) in kinds.items():
        stored.save(tmp_path / name)
        assert np.abs(read_photo(tmp_path / name).image.astype(int) - expected).max() <= 2, name
    frames_ = [Image.fromarray(image), Image.fromarray(255 - image)]
    frames_[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames_[1:], lossless=True)
    assert np.array_equal(read_photo(tmp_path / "moving.webp").image, image)  # the first frame


def test_kinds_of_masks(tmp_path: Path) -> None:
    found = read_photo(np.zeros((4, 6, 3), np.uint8))
    values = np.zeros((4, 6), np.uint8)
    values[1, 1:5], values[2, 2], values[3, 3] = 1, 7, 255
    both, ignored = (values != 0).astype(np.uint8), np.where(values == 255, 255, values != 0).astype(np.uint8)
    opaque = np.dstack([np.zeros((4, 6, 3), np.uint8), both * 255])
    palette = Image.fromarray(values, "P")
    palette.putpalette(world.palette())
    for name, stored, expected in (
        ("grey", Image.fromarray(values), both), ("palette", palette, ignored), ("bit", Image.fromarray(values != 0), both),
        ("colour", Image.fromarray(np.dstack([values, 0 * values, 0 * values])), both), ("alpha", Image.fromarray(opaque), both),
        ("sixteen", Image.fromarray(values.astype(np.uint16)), both),
    ):  # fmt: skip
        stored.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", found), expected), name
    assert np.array_equal(read_mask(values.astype(np.int64), found), both)
    Image.fromarray(values).save(tmp_path / "mask.jpg")
    with pytest.raises(UserError, match="lossless"):
        read_mask(tmp_path / "mask.jpg", found)
    with pytest.raises(UserError, match="empty"):
        read_mask(np.zeros((4, 6), bool), found)
    assert box_mask([[1, 1, 3, 9], [-5, 0, 1, 1]], found).tolist() == [[1, 0, 0, 0, 0, 0], *[[0, 1, 1, 0, 0, 0]] * 3]
    for box in ([3, 1, 3, 2], [6, 0, 9, 2], [-9, 0, -1, 2], [1, 2, 3], [0, 0, float("nan"), 2]):
        with pytest.raises(UserError, match="box"):
            box_mask([box], found)


def test_what_is_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    Image.fromarray(upright(np.random.default_rng(2), (300, 300))).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, message in (("text.jpg", "not an image"), ("cut.png", "not a readable image"), ("none.png", "no such file"),
                          ("", "no such file"), ("float.tif", "floating point")):  # fmt: skip
        with pytest.raises(UserError, match=message) as raised:
            read_photo(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
    monkeypatch.setattr("util.data.photos.MAX_PIXELS", 80_000)
    with pytest.raises(UserError, match="decompression bomb"):
        read_photo(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        read_photo(tmp_path / "whole.png")
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4), 7):
        with pytest.raises(UserError, match="uint8|expected"):
            read_photo(array)


def test_large_small_and_thin(piclip: Path) -> None:
    """A photo larger than any of the data sets is reduced on the way in; the mask has the photo's size all the same."""
    predictor = Predictor.from_checkpoint(piclip)
    rng = np.random.default_rng(3)
    large = upright(rng, (1500, 2000))
    predictor.set_support(large, boxes=[300, 300, 900, 900], text="star")
    episode = predictor.episode(read_photo(large), predictor._groups[0])
    assert episode.annotation_hw.tolist() == [[240, 320]]
    assert predictor.predict(large).mask.shape == (1500, 2000)
    for hw in ((1, 1), (3, 200), (2000, 2)):
        assert predictor.predict(upright(rng, hw)).mask.shape == hw
    with pytest.raises(UserError, match="too small"):
        predictor.set_support(large, boxes=[301, 301, 303, 303], text="star")


def test_polygons_give_the_mask_back() -> None:
    rng = np.random.default_rng(4)
    masks = [rng.random(rng.integers(1, 30, 2)) < share for share in (0.2, 0.5, 0.6, 0.9, 1.0) for _ in range(12)]
    masks += [cv2.blur(rng.random((60, 50)), (7, 7)) > 0.5 for _ in range(5)]
    ring = np.ones((9, 9), bool)
    ring[2:7, 2:7], ring[4, 4] = False, True
    for mask in [*masks, ring]:
        record = coco([("a.jpg", mask, 0.5)], "star")
        assert bool(record["annotations"]) == mask.any()
        for made in record["annotations"]:
            runs = coco_mask.frPyObjects(made["segmentation"], *mask.shape)
            assert np.array_equal(coco_mask.decode(coco_mask.merge(runs)).astype(bool), mask)
            assert made["area"] == mask.sum() and made["bbox"] == coco_mask.toBbox(coco_mask.merge(runs)).tolist()
    assert len(polygons(ring)) == 3 and all(len(polygon) >= 4 for polygon in polygons(ring))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs predict.py as its command line does; exit code and everything printed."""
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        code = 0
        try:
            cli.run(predict.main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_command_line(piclip: Path, scenes: Path, tmp_path: Path, program: Callable) -> None:
    """A mask and a box; a folder with something unreadable, a pattern, two files of one name, a video."""
    images, masks = star(scenes, of=4)
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = [np.asarray(Image.open(image)) for image in images[2:]]
    Image.fromarray(pictures[0]).save(folder / "a.jpg", quality=95)
    Image.fromarray(pictures[1]).save(folder / "a.png")
    (folder / "broken.jpg").write_text("no photo")
    (folder / "notes.txt").write_text("not looked at")
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for i in range(5):
        video.write(np.full((48, 64, 3), 40 * i, np.uint8))
    video.release()
    out = tmp_path / "out"
    code, said = program(
        "--support", images[0], "--mask", tmp_path / "mask.png", "--support", images[1], "--box", "10,20,80,90", "--text", "star",
        "--query", folder, tmp_path / "photos/*.png", tmp_path / "clip.avi", "--every", 2, "--weights", piclip, "--out", out,
        "--polygons", "coco",
    )  # fmt: skip
    assert code == 2 and "1 of the queries could not be read" in said and "broken.jpg" in said, said
    record = json.loads((out / "scores.json").read_text())
    names = ["a", "a-2", "clip_000000", "clip_000002", "clip_000004"]
    assert [Path(image["mask"]).stem for image in record["images"]] == names
    assert [item["image"] for item in record["unread"]] == [str(folder / "broken.jpg")]
    assert {f.name for f in (out / "supports").iterdir()} == {"1.jpg", "2.jpg"} and record["notes"]
    predictor = Predictor.from_checkpoint(piclip)
    predictor.set_support(images[:2], [masks[0], None], "star", [None, [10, 20, 80, 90]])
    found = predictor.predict(folder / "a.png")
    stored = Image.open(out / "masks/a-2.png")
    assert stored.mode == "L" and np.array_equal(np.asarray(stored), found.mask * np.uint8(255))
    row = record["images"][1]
    assert row["fraction"] == pytest.approx(found.mask.mean(), abs=1e-4) and (row["height"], row["width"]) == found.mask.shape
    data = json.loads((out / "coco.json").read_text())
    assert len(data["images"]) == 5 and data["categories"][0]["name"] == "star"
    overlay = np.asarray(Image.open(out / "overlays/a-2.jpg")).astype(int)
    changed = np.abs(overlay - pictures[1]).max(-1) > 40
    assert overlay.shape == pictures[1].shape and changed[~found.mask].mean() < 0.02 < changed[found.mask].mean()
    assert not [f for f in out.rglob(".*")]

    code, said = program("--text", "star", "--query", folder / "a.png", "--weights", piclip, "--out", tmp_path / "text",
                         "--polygons", "labelme", "--precision", "bf16")  # fmt: skip
    assert code == 0 and "text alone" in said, said
    record = json.loads((tmp_path / "text/labelme/a.json").read_text())
    mask = np.asarray(Image.open(tmp_path / "text/masks/a.png")) > 0
    assert record["imagePath"] == str(folder / "a.png") and (record["imageHeight"], record["imageWidth"]) == mask.shape
    area = sum(cv2.contourArea(np.array(shape["points"], np.float32)) for shape in record["shapes"])
    assert area == mask.sum() > 0


def test_wrong_command_lines(piclip: Path, scenes: Path, tmp_path: Path, program: Callable, monkeypatch) -> None:
    (image, query), (mask, _) = star(scenes)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:-1]).save(tmp_path / "other.png")
    Image.fromarray(mask & False).save(tmp_path / "empty.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "clip.mp4").write_text("no video")
    base = piclip.parents[4] / "PSPNet/split0/resnet50/snapshot/best.safetensors"
    good = {"--support": image, "--mask": tmp_path / "mask.png", "--text": "star", "--query": query, "--weights": piclip,
            "--out": tmp_path / "out"}  # fmt: skip
    wrong = [
        ({"--support": tmp_path / "none.jpg"}, "no such file.*none.jpg"), ({"--support": tmp_path / "file"}, "not an image"),
        ({"--mask": tmp_path / "other.png"}, "needs the size of its photo"), ({"--mask": tmp_path / "empty.png"}, "is empty"),
        ({"--mask": None}, "give a mask or boxes"), ({"--box": "1,1,9,9"}, "not both"), ({"--text": None}, "give a text"),
        ({"--support": None}, "give its --support"), ({"--query": tmp_path / "*.jpg"}, "no such file, folder or pattern"),
        ({"--query": tmp_path / "folder"}, "no photo and no video"), ({"--query": tmp_path / "clip.mp4"}, "not a readable video"),
        ({"--weights": tmp_path / "none.safetensors"}, "no such file"), ({"--weights": tmp_path / "file"}, "--arch PI_CLIP"),
        ({"--weights": base}, "is a base learner"), ({"--out": tmp_path / "file/out"}, "cannot be written"),
        ({"--out": tmp_path / "file"}, "cannot be written"), ({"--every": "0"}, "at least 1"), ({"--device": "tpu9"}, "device"),
        ({"--box": "1,2,3", "--mask": None}, "x0, y0, x1, y1"), ({"--box": "a,b", "--mask": None}, "four numbers"),
    ]  # fmt: skip
    for change, message in wrong:
        arguments = [str(part) for option, value in (good | change).items() if value is not None for part in (option, value)]
        code, said = program(*arguments)
        assert code == 2 and "Traceback" not in said, (change, said)
        assert re.search(message, said), (message, said)
    monkeypatch.setattr(predict, "DEMO", "nowhere/best.safetensors")
    code, said = program("--text", "star", "--query", query, "--out", tmp_path / "out")
    assert code == 2 and "sh train.sh split0 demo 0" in said


def test_checkpoint_tells_its_config(piclip: Path, scenes: Path, tmp_path: Path, program: Callable, monkeypatch) -> None:
    """From any folder; of before the config was recorded: the run's config.yaml; and what is missing is named."""
    assert read_meta(piclip)["config"]["Train"]["val_size"] == 65
    monkeypatch.chdir(tmp_path)  # the config's demo/clip is found in the repository
    Predictor.from_checkpoint(piclip)
    run = tmp_path / "exp/demo/PI_CLIP/split0/resnet50"
    meta, state = read_meta(piclip), load_tensors(piclip)
    config = meta.pop("config")
    save_weights(run / "snapshot/best.safetensors", state, meta)
    with pytest.raises(UserError, match="does not tell its config"):
        Predictor.from_checkpoint(run / "snapshot/best.safetensors")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="Method.pre_weight = auto: no base learner"):
        Predictor.from_checkpoint(run / "snapshot/best.safetensors")
    base = piclip.parents[4] / "PSPNet/split0/resnet50/snapshot/best.safetensors"
    code, said = program(f"Method.pre_weight={base}", "--text", "star", "--query", star(scenes)[0][0], "--out", "out",
                         "--weights", run / "snapshot/best.safetensors")  # fmt: skip
    assert code == 0, said


def test_as_a_program(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    """In a process of its own, in another folder."""
    command = [sys.executable, ROOT / "predict.py", "--text", "star", "--query", star(scenes)[0][0], "--weights", piclip]
    run = subprocess.run([*command, "--out", "out"], cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0 and len(list((tmp_path / "out/masks").iterdir())) == 1, run.stderr
