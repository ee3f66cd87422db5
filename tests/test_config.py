"""The typed config: layers, overrides, and errors that name the file, the key and the nearest right one."""

import copy
import dataclasses
from pathlib import Path

import pytest

from model import SYSTEMS, configure
from util.config import config_of, load_config
from util.data.folds import fold_of, read_class_names
from util.errors import UserError
from util.prepare.sets import FACTS

CONFIGS = sorted(p for p in Path("config").glob("*/*_split?_*.yaml"))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "fold.yaml"


def test_layers_later_wins(tmp_path: Path) -> None:
    path = write(tmp_path, base="Train: {shot: 5, epochs: 7, base_lr: 1e-3}", HDMNet="Train: {epochs: 8, split: 3}",
                 fold="extends: base.yaml\nTrain: {split: 2}")  # fmt: skip
    config = load_config(path, "HDMNet", ["Train.batch_size=16", "Method.priors=[vvp]"])
    assert (config.Train.shot, config.Train.epochs, config.Train.split, config.Train.batch_size) == (5, 8, 2, 16)
    assert config.Train.base_lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config.Method.priors == ["vvp"]
    assert load_config(path, "PI_CLIP").Train.epochs == 7
    rewritten = tmp_path / "again.yaml"
    rewritten.write_text(config.to_yaml())
    assert load_config(rewritten) == config


@pytest.mark.parametrize(("text", "message"), [
    ("Train: {epoch: 3}", r"fold\.yaml: unknown key Train\.epoch; did you mean 'epochs'"),
    ("train: {epochs: 3}", r"unknown section 'train'; did you mean 'Train'"),
    ("Train: {epochs: many}", r"fold\.yaml: Train\.epochs = 'many': expected int"),
    ("Train: {epochs: true}", r"expected int"),
    ("Train: {resized_val: 1}", r"expected bool"),
    ("CLIP: {vocabulary: presents}", r"did you mean 'present'"),
    ("Method: {priors: vtp}", r"expected list"),
    ("Train: {shot: 0}", r"Train\.shot = 0: must be at least 1"),
    ("Train: [1]", r"expected `key: value` lines"),
    ("Train: {epochs: 3", r"no valid YAML"),
    ("extends: fold.yaml", r"circle"),
    ("extends: other.yaml", r"no config file .*other\.yaml"),
    ("Train: !!python/object/apply:os.system ['true']", r"no valid YAML"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, fold=text))


@pytest.mark.parametrize("override", ["Train.epochs", "epochs=3", "Train.epoch=3", "Train.epochs=x"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"override|command line"):
        load_config(write(tmp_path, fold=""), overrides=[override])


def test_shipped_configs_are_complete() -> None:
    """Every fold of every data set loads for every system and names lists that exist (those of COCO and of data sets that are
    tests alone are made by the user)."""
    assert {p.name for p in CONFIGS} >= {f"{d}_split{f}_resnet50.yaml" for d in ("pascal", "coco", "demo") for f in range(4)}
    for path in CONFIGS:
        for arch in ("PI_CLIP", "HDMNet", "PSPNet"):
            config = load_config(path, arch)
            assert path.stem.startswith(f"{path.parent.name}_split{config.Train.split}_")
            if config.Train.data_set in FACTS:
                assert config.Data.val_list.startswith(f"lists/{config.Train.data_set}/") and config.Data.min_pixels == 1
                continue
            names = read_class_names(config.Data.class_names).names
            assert len(names) == fold_of(config).num_classes
            if config.Train.data_set != "coco":
                assert Path(config.Data.train_list).is_file() and Path(config.Data.val_list).is_file()


def test_records_of_before_are_read() -> None:
    """Checkpoints and reports keep the config they were made with: the options of all systems stood in one section then."""
    fold = "config/demo/demo_split0_resnet50.yaml"
    for arch, own in (("HDMNet", {"low_fea": "layer3", "aux_weight1": 0.5}), ("IMR_HSNet", {"stages": 3, "mask_mode": "paper"})):
        now = configure(fold, arch, [f"Method.{key}={value}" for key, value in own.items()] + ["Train.validate_every=0.5"])
        old = dataclasses.asdict(now)
        del old["Train"]["validate_every"]
        old["Method"] |= {"low_fea": "layer2", "ppm_scales": None, "kshot_trans_dim": 2, "aux_weight1": 1.0, "stages": 2,
                          "mask_mode": "official"} | own  # fmt: skip
        old["Train"] |= {"SubEpoch_val": True, "evaluate": True, "rotate_min": -10.0, "rotate_max": 10.0}
        kept = copy.deepcopy(old)
        assert config_of(old, "old", options=SYSTEMS[arch].Options) == now and old == kept
        assert config_of(dataclasses.asdict(now), "new", options=SYSTEMS[arch].Options) == now
    old["Train"]["SubEpoch_val"] = False
    assert config_of(old, "old", options=SYSTEMS[arch].Options).Train.validate_every == 0
