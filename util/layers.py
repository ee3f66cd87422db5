"""Layers of a config: the YAML files that make it, each a dict {section: {key: value}}. (util/config.py puts them together.)"""

from pathlib import Path
from typing import Any

from util import ROOT
from util.errors import UserError, nearest
from util.yaml_text import parse_yaml, short

CONFIGS = ROOT / "config"
PROTOCOLS, SYSTEMS = CONFIGS / "protocol", CONFIGS / "system"  # one file per protocol; per system, its keys on every data set
TESTED = {"Data": None, "Train": ("data_set", "split", "use_split_coco", "shot"), "Test_Finetune": None}  # of the data; None: all


def names_of(path: str | Path) -> tuple[str, str, str]:
    """Return (DATASET, EXP, NET) of config/DATASET/DATASET_EXP_NET.yaml.

    Raises:
        UserError: the file has another kind of name.
    """
    path = Path(path)
    data_set = path.parent.name
    rest = path.stem.removeprefix(f"{data_set}_")
    exp, _, net = rest.partition("_")
    if rest == path.stem or not net:
        raise UserError(f"config file {path}: expected the name config/DATASET/DATASET_EXP_NET.yaml")
    return data_set, exp, net


def override(text: str) -> dict[str, dict]:
    """Parse `Section.key=value` into {section: {key: value}}."""
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot:
        raise UserError(f"override {text!r}: write Section.key=value, for instance Train.epochs=5")
    return {section: {key: parse_yaml(value, f"override {text!r}: {value!r}")}}


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """Return the file and all files that it extends, base first."""
    content = read_layer(path)
    if path.resolve() in seen:
        raise UserError(f"{path}: `extends` runs in a circle")
    base = content.pop("extends", None)
    if base is None:
        return [(path, content)]
    if not isinstance(base, str):
        raise UserError(f"{path}: `extends` must name one file")
    return [*file_layers(path.parent / base, (*seen, path.resolve())), (path, content)]


def system_layers(path: Path, arch: str | None) -> tuple[list[tuple[Path, dict]], list[tuple[Path, dict]]]:
    """What a system keeps on every data set, and its recipes beside a fold's file; empty lists where there is none."""
    exp = path.stem.removeprefix(f"{path.parent.name}_").partition("_")[0]
    system, recipes = [SYSTEMS / f"{arch}.yaml"], [path.parent / f"{arch}.yaml", path.parent / f"{arch}_{exp}.yaml"]
    return tuple([(file, read_layer(file)) for file in files if arch and file.is_file()] for files in (system, recipes))


def read_layer(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no config file {path}{_instead(path)}") from error
    except (OSError, ValueError) as error:  # a folder, no UTF-8, a name that cannot be one
        raise UserError(f"config file {path} cannot be read ({error})") from error
    return mapping(parse_yaml(text, str(path)), str(path))


def mapping(value: Any, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected `key: value` lines, found {short(value)}")
    return value


def home_file(named: str) -> Path:
    """Return the config file that Test_Finetune.trained_on names. Raises UserError where it is no such name."""
    if named.count("/") != 2:
        raise UserError(f"Test_Finetune.trained_on = {named!r}: write DATASET/EXP/NET, as pascal/split0/resnet50")
    data_set, exp, net = named.split("/")
    return CONFIGS / data_set / f"{data_set}_{exp}_{net}.yaml"


def network_layers(named: str, arch: str | None) -> list[tuple[Path, dict]]:
    """Return the layers of the network and its recipe, those of the data set it was trained on."""
    path = home_file(named)
    *bases, fold = file_layers(path)
    system, recipe = system_layers(path, arch)
    return _kept([*system, *bases, *recipe, fold], tested=False)


def data_layers(layers: list[tuple[Path, dict]]) -> list[tuple[Path, dict]]:
    """Return what layers say of the data and the test."""
    return _kept(layers, tested=True)


def _kept(layers: list[tuple[Path, dict]], tested: bool) -> list[tuple[Path, dict]]:
    """Return what layers say of the data and the test, or all the rest."""

    def keep(section: str, key: str) -> bool:
        keys = TESTED.get(section, ())
        return (keys is None or key in keys) == tested

    return [(file, {section: {key: value for key, value in mapping(values, f"{file}: {section}").items() if keep(section, key)}
                    for section, values in content.items()}) for file, content in layers]  # fmt: skip


def _instead(path: Path) -> str:
    """Say what there is in place of a config file that is missing."""
    known = {folder.name: sorted(folder.glob(f"{folder.name}_*_*.yaml")) for folder in path.parent.parent.glob("*")}
    files, sets = known.get(path.parent.name), sorted(name for name, files in known.items() if files)
    if not files:
        return meant(path.parent.name, sets) or f"; there are the data sets {', '.join(sets)}" * bool(sets)
    experiments = ", ".join(sorted({names_of(file)[1] for file in files}))
    return f"{meant(path.stem, [file.stem for file in files])}; {files[0].parent.name} has {experiments}"


def meant(name: str, known: list[str]) -> str:
    return f"; did you mean {near}?" if (near := nearest(name, known)) else ""
