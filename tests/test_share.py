"""One file with everything but CLIP: the same bits, with the result that is about it, to a hub and back."""

import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from model import configure, load_weights, open_system, open_tested
from model.predict.predictor import Predictor
from model.predict.share import export, main, scrubbed
from tests.make import CONFIG, ROOT, make, star
from tests.make.scenes import make_dense
from util.errors import UserError
from util.files import load_tensors, save_json, save_tensors
from util.run.checkpoint import read_meta
from util.run.place import Experiment


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_one_file_to_share(piclip: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands alone but for CLIP, gives the same bits, is taken by test.py, and brings the result that is about it."""
    images, masks = star(scenes)
    predictor = Predictor.from_checkpoint(piclip)
    predictor.set_support(images[0], masks[0], "star")
    expected = predictor.predict(images[1])
    file = tmp_path / "mine/shared.safetensors"
    assert "no result inside" in export(piclip, file)[0] and "Not tested yet" in file.with_suffix(".md").read_text()
    meta = read_meta(file)
    assert meta["classes"][0][0] == "star" and str(piclip.parents[6]) not in json.dumps(meta)  # no folder of this machine
    monkeypatch.chdir(tmp_path)
    other = Predictor.from_checkpoint(file)
    other.set_support(images[0], masks[0], "star")
    assert np.array_equal(other.predict(images[1]).score, expected.score) and other.names == predictor.names
    monkeypatch.chdir(ROOT)

    config = configure(CONFIG, "PI_CLIP", ["Train.val_size=65", f"Runtime.output={tmp_path}"])  # as test.py does
    system, _ = open_system("PI_CLIP", config)
    load_weights(system, config, Experiment.from_config_path("PI_CLIP", CONFIG, str(tmp_path)), file)
    theirs, ours = system.state_dict(), predictor.system.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    config.CLIP.clip_path = "random"
    config.CLIP.vocabulary = "target"
    with pytest.raises(UserError, match="other frozen weights: clip"):
        Predictor.from_checkpoint(file, config=config)
    config = configure(CONFIG, "PI_CLIP", ["Train.val_size=65", "Train.split=1"])
    with pytest.raises(UserError, match="Train.split: the checkpoint has 0"):
        Predictor.from_checkpoint(file, config=config)
    with pytest.raises(UserError, match="exported file already"):
        export(file, tmp_path / "again.safetensors")
    with pytest.raises(UserError, match=r"call it .*model\.safetensors"):
        export(piclip, tmp_path / "model.pth")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        export(piclip, tmp_path / "taken/model.safetensors")


def test_texts_name_no_folder_of_this_machine() -> None:
    own = ["/data/home of me/exp"]
    for text, expected in [
        (f"{ROOT}/lists/demo/val.txt", "lists/demo/val.txt"), ("no file /data/home of me/exp/a.pt, or", "no file exp/a.pt, or"),
        ("weights (/mnt/x/b.pth) and ~/y/c.pt: see", "weights (b.pth) and c.pt: see"), (r"C:\Users\me\d.pt", "d.pt"),
        ("ViT-B-16/openai, 1/2 and and/or, of https://a.org/b/c", "ViT-B-16/openai, 1/2 and and/or, of https://a.org/b/c"),
        ({"a": ["/x/y/z", 5, None]}, {"a": ["z", 5, None]}),
    ]:
        assert scrubbed(text, own) == expected


def test_half_the_size(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    for name, half in (("whole", False), ("half", True)):
        export(piclip, tmp_path / f"{name}.safetensors", half, "knows stars only" * half)
    whole, half = (tmp_path / f"{name}.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.55 * whole.stat().st_size and "half precision" in half.with_suffix(".md").read_text()
    images, masks = star(scenes)
    scores = []
    for file in (whole, half):
        predictor = Predictor.from_checkpoint(file)
        predictor.set_support(images[0], masks[0], "star")
        scores.append(predictor.predict(images[1]).score)
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.01
    assert predictor.notes[0] == "knows stars only" and "- knows stars only" in half.with_suffix(".md").read_text()


def test_what_a_zero_shot_system_trained(tmp_path: Path) -> None:
    """The slim file has the trained parts alone, and is tested as the run's own; another CLIP, K or setting is refused."""
    config, weight = make_dense(tmp_path, "CLIP_RC", "inductive_vit8")
    file = tmp_path / "slim.safetensors"
    export(weight, file, note="drawings only")
    meta, tensors = read_meta(file), load_tensors(file)
    assert tensors.keys() and all(name.startswith("head.") for name in tensors)
    assert file.stat().st_size < 4.1 * sum(t.numel() for t in tensors.values()) + 2e5
    assert meta["classes"][0][0] == "star" and len(meta["classes"][2]) == 5 and meta["config"]["Method"]["prompts"] == 10
    card = file.with_suffix(".md").read_text()
    for part in ("without labels in training: star, fish", '--classes "cat, dog', "drawings only"):
        assert part in card
    assert meta["frozen"]["clip"] in card

    place = Experiment("CLIP_RC", "demo", "inductive", "vit8", tmp_path)
    ours, theirs = (open_tested("CLIP_RC", config, place, path)[0].state_dict() for path in (weight, file))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.copytree("demo/clip", tmp_path / "clip")
    tower = load_tensors(tmp_path / "clip/model.safetensors")
    save_tensors(tmp_path / "clip/model.safetensors", tower | {"visual.proj": 2 * tower["visual.proj"]})
    for change, message in (
        (f"CLIP.clip_path={tmp_path}/clip", "other frozen weights: clip"), ("Method.prompts=3", "prompts: the checkpoint has 10"),
        ("Method.setting=full", "setting: the checkpoint has 'inductive'"),
    ):  # fmt: skip
        other = configure("config/demo/demo_inductive_vit8.yaml", "CLIP_RC", [change])
        with pytest.raises(UserError, match=message):
            open_tested("CLIP_RC", other, place, file)
    export(weight, file, half=True)
    assert file.stat().st_size < 2.1 * sum(t.numel() for t in tensors.values()) + 2e5


def test_a_data_set_of_ones_own(scenes: Path, tmp_path: Path) -> None:
    """Its folds and names go along: their files are not on the other machine."""
    (tmp_path / "folds.yaml").write_text("split0: [star, fish, tree]\n")
    _, weight = make(tmp_path, "HDMNet", "Train.data_set=mine", f"Data.folds={tmp_path}/folds.yaml")
    export(weight, tmp_path / "shared.safetensors")
    mine = Predictor.from_checkpoint(weight)
    shutil.rmtree(tmp_path / "exp")
    (tmp_path / "folds.yaml").unlink()
    other = Predictor.from_checkpoint(tmp_path / "shared.safetensors")
    assert other.fold == mine.fold and len(other.fold.base) == 17
    images, masks = star(scenes)
    for predictor in (mine, other):
        predictor.set_support(images[0], masks[0], "house")
        assert "base learner knows" in " ".join(predictor.notes)
    assert np.array_equal(mine.predict(images[1]).score, other.predict(images[1]).score)


def test_the_result_in_a_shared_file_is_about_it(piclip: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(piclip.parents[6], run)
    snapshot = run / "exp/demo/PI_CLIP/split0/resnet50/snapshot/best.safetensors"
    base_learner = run / "exp/demo/PSPNet/split0/resnet50/snapshot/best.safetensors"
    file = snapshot.parents[1] / "result/report.json"
    file.parent.mkdir()
    scores = {"miou": 0.4321, "fb_iou": 0.6}
    seed = scores | {"seed": 1, "episodes": 5, "per_class": {"1": 0.4}, "episodes_per_class": {"1": 5}}
    report = {"system": "PI_CLIP", "data_set": "demo", "split": 0, "shot": 1, "backbone": "resnet50", "protocol_hash": "47a2",
              "protocol": {"name": f"strict with {tmp_path}/e.txt", "hash": "47a2"}, "warnings": [f"no {run}/a.jpg"],
              "checkpoint": "exp/run/snapshot/best.safetensors", "mean": scores,
              "sd": scores, "seeds": [seed], "classes": {"1": "star"}, "environment": {}}  # fmt: skip
    save_json(file, report)
    out = tmp_path / "shared.safetensors"
    assert len(export(snapshot, out, note=f"made from {run}/photos")) == 1
    told = json.dumps(read_meta(out)) + out.with_suffix(".md").read_text()
    assert str(tmp_path) not in told and str(ROOT) not in told and told.count("made from photos") == 3 and "with e.txt" in told
    assert read_meta(out)["result"]["mean"] == scores and read_meta(out)["result"]["protocol_hash"] == "47a2"
    card = out.with_suffix(".md").read_text()
    assert "43.21" in card.split("---")[2]
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]  # as hubs read it
    (found,) = index["results"]
    assert [(m["type"], m["value"]) for m in found["metrics"]] == [("mean_iou", 43.21), ("fb_iou", 60.0)]
    told = {"protocol": "strict with e.txt", "hash": "47a2"}
    assert found["dataset"] == {"type": "demo", "name": "demo, fold 0, 1-shot", "args": told}
    os.utime(file, (0, 0))
    assert "older than the checkpoint" in export(snapshot, out)[0] and not read_meta(out)["result"]
    save_json(file, report | {"checkpoint": "exp/run/snapshot/last.safetensors"})
    shutil.copy(snapshot, snapshot.with_name("last.safetensors"))
    assert len(export(snapshot, out)) == 1 and read_meta(out)["result"]  # the same weights under another name
    shutil.copy(base_learner, snapshot.with_name("last.safetensors"))
    assert "is about" in export(snapshot, out)[0] and not read_meta(out)["result"]
    for damaged, message in (("{", "no valid JSON"), ("{}", "no report of an evaluation")):
        file.write_text(damaged)
        with pytest.raises(UserError, match=rf"report\.json: {message}"):
            export(snapshot, out)


class Hub:
    """Stands in for huggingface_hub: a repository is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def HfApi(self) -> "Hub":
        return self

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        (self.root / repository).mkdir(parents=True, exist_ok=exist_ok)

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
        shutil.copy(path_or_fileobj, self.root / repo_id / path_in_repo)

    def snapshot_download(self, repository: str, local_dir: Path, allow_patterns: list[str]) -> None:
        if not (self.root / repository).is_dir():
            raise OSError("404 not found")
        shutil.copytree(self.root / repository, local_dir)


def test_the_stand_in_is_called_as_the_real_client() -> None:
    """With the names of arguments that the installed huggingface_hub has (it comes along with timm)."""
    import huggingface_hub

    api, ours = huggingface_hub.HfApi, Hub(Path())
    pairs = [(api.create_repo, ours.create_repo), (api.upload_file, ours.upload_file),
             (huggingface_hub.snapshot_download, ours.snapshot_download)]  # fmt: skip
    for real, stand_in in pairs:
        known = list(inspect.signature(real).parameters)
        for name, parameter in inspect.signature(stand_in).parameters.items():
            positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name == "repository"
            assert name in known or (positional and known[known[0] == "self"] == "repo_id"), (real, name)


def test_push_and_pull(piclip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path))
    assert "pushed to me/stars" in command("export", piclip, "--out", tmp_path / "a.safetensors", "--push", "me/stars")
    assert (tmp_path / "me/stars/README.md").read_text().startswith("---\nlibrary_name")
    assert command("pull", "me/stars", "--out", tmp_path / "got").strip() == str(tmp_path / "got/a.safetensors")
    Predictor.from_checkpoint(tmp_path / "got/a.safetensors")
    with pytest.raises(UserError, match="pull me/none: 404"):
        command("pull", "me/none", "--out", tmp_path / "got2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        command("export", piclip, "--out", tmp_path / "b.safetensors", "--push", "me/stars")
    assert not (tmp_path / "b.safetensors").exists()
