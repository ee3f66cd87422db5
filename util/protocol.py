"""Protocols: how episodes are made and scored, under a name and a hash. A result without its protocol is not a result.

A protocol is a file of config keys, config/protocol/NAME.yaml, which `Test_Finetune.protocol` picks (`auto`: as the
system's paper did). Results whose hashes are equal can be compared.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from util.config import STRICT, Config, protocol_layer
from util.errors import UserError

KEYS = {  # key -> its words in a report, and those of its values
    "Train.use_split_coco": ("folds", {True: "interleaved", False: "contiguous"}),
    "Train.filter_novel": ("training images", {True: "without novel objects (BAM)", False: "novel objects are background"}),
    "Train.draw": ("episodes start from", {"image": "an image", "pair": "an (image, class) pair; supports may repeat",
                                           "class": "a class, then an image of it; supports may repeat"}),
    "Train.augment": ("augmentation", {True: "yes", False: "none"}),
    "Train.antialias": ("antialiased", {True: "yes", False: "no"}),
    "Train.crop": ("training resize", {True: "random crop", False: "squash"}),
    "Train.resized_val": ("resize", {True: "squash", False: "letterbox"}),
    "Train.selection": ("checkpoint", {"novel": "best mIoU on the novel classes (a leak, as published)",
                                       "base": "best mIoU on base classes in held-out images", "last": "last epoch"}),
    "CLIP.vocabulary": ("text vocabulary", {"present": "classes in the query's annotation (a leak, as published)",
                                            "target": "the target alone", "base+target": "base classes and the target",
                                            "all": "all classes"}),
    "Method.static_steps": ("steps before attention is filtered (RFM)", {}),
    "Method.statistics": ("pixel statistics", {"clip": "CLIP's", "imagenet": "ImageNet's (not CLIP's, as published)"}),
    "Method.setting": ("setting", {
        "inductive": "inductive: names and labels of the seen classes; pixels of unseen objects count as no class",
        "transductive": "transductive: all names, guessed labels for the pixels of unseen classes; which pixels these are is "
                        "read from the ground truth (a leak, as published)",
        "transductive-strict": "transductive: all names, guessed labels where no seen class is labelled; no label of an "
                               "unseen class is read",
        "full": "full: labels of all classes; seen and unseen are those of the other settings"}),
    "Method.inference": ("inference", {"slide": "windows, their scores averaged", "whole": "the whole image at once"}),
    "Method.offset": ("taken from scores of seen classes", {}),
    "Method.background": ("words of the background", {}),
    "Method.scale": ("scale of the cosines", {}),
    "Method.threshold": ("background below the probability", {}),
    "Method.area": ("smallest share of the foreground", {}),
    "Method.pamr": ("rounds of refinement (PAMR)", {}),
    "Data.min_pixels": ("smallest object", {}),
    "Test_Finetune.ann_type": ("support annotation", {}),
    "Test_Finetune.test_num": ("episodes per seed", {}),
    "Test_Finetune.seeds": ("seeds", {}),
    "Test_Finetune.episodes": ("episodes of a file, hash", {}),
    "Test_Finetune.classes": ("classes of a file, hash", {}),
    "Method.bank": ("text bank of a file, hash", {}),
}  # fmt: skip


# Keys that name a file, whose content counts: what the file is of.
FILES = {"Test_Finetune.episodes": "episodes", "Test_Finetune.classes": "classes", "Method.bank": "text bank"}
# Keys added later, with the values that all protocols had before: a hash counts them only where they differ.
LATER = {"Method.offset": 0.1, "Train.draw": "image", "Train.augment": True, "Train.antialias": False}


@dataclass(frozen=True)
class Protocol:
    """The effective values of a config under the name they come from."""

    name: str  # that of the file, with " but Section.key=value, ..." where the config differs from it
    values: dict[str, Any]  # Section.key -> value

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:12]

    def describe(self, text_prior: bool = True, says: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Describe the protocol in lines for people; a leak is named as one.

        Args:
            text_prior: whether the system reads class texts.
            says: what keys mean for a task where that differs from few-shot episodes; "": nothing.
        """
        lines = {"name": self.name, "hash": self.hash}
        for key, value in self.values.items():
            words, meaning = KEYS[key]
            if key == "CLIP.vocabulary" and not text_prior:
                value, meaning = "no text is read", {}
            if key in says and value != "last":
                value, meaning = says[key], {}
            if value == "":
                continue
            lines[words] = str(value) if isinstance(value, list) else str(meaning.get(value, value))
        return lines


def of(config: Config) -> Protocol:
    """Return the protocol of a config: its effective values and their name."""
    coco = config.Train.data_set == "coco"  # which alone has two styles of folds
    values = {key: lookup(config, key) for key in KEYS if key not in FILES}
    values["Train.use_split_coco"] = values["Train.use_split_coco"] and coco
    values = {key: value for key, value in values.items() if value is not None and (key not in LATER or value != LATER[key])}
    if config.Test_Finetune.episodes:
        del values["Test_Finetune.test_num"], values["Test_Finetune.seeds"]
    files = {key: found for key in FILES if (found := lookup(config, key))}
    values |= {key: hashlib.sha256(read_bytes(Path(file), key)).hexdigest()[:16] for key, file in files.items()}
    name = config.Test_Finetune.protocol
    layer = protocol_layer(name, config.Train.data_set)
    fixed = {f"{section}.{key}": value for section, keys in layer.items() for key, value in keys.items()}
    changed = [f"{key}={value}" for key, value in (LATER | values).items() if fixed.get(key, LATER.get(key, value)) != value
               and (coco or key != "Train.use_split_coco")]
    changed += [f"{FILES[key]} of {file}" for key, file in files.items()]
    return Protocol(name + (f" but {', '.join(changed)}" if changed else ""), values)


def read_bytes(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        made = "; `python -m util.data export` writes such a file" if key == "Test_Finetune.episodes" else ""
        raise UserError(f"{key} = {path}: {error.strerror}{made}") from error


def lookup(config: Config, key: str) -> Any:
    """The value of a key; None where the system has no such option."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name, None)


def without_leaks(config: Config, text_prior: bool, last_epoch: bool) -> tuple[Config, list[str]]:
    """Return the config without the leaks of a paper's protocol, and the differences as texts (none where nothing leaks).

    Args:
        text_prior: whether the system reads class texts.
        last_epoch: whether the weights of the last epoch are available (a published checkpoint is the best epoch).
    """
    train, clip, differences = config.Train, config.CLIP, []
    if text_prior and clip.vocabulary == "present":
        strict = protocol_layer(STRICT, train.data_set)["CLIP"]["vocabulary"]
        clip = dataclasses.replace(clip, vocabulary=strict)
        differences.append(f"text vocabulary {strict} instead of present")
    if train.selection == "novel" and last_epoch:
        train = dataclasses.replace(train, selection="last")
        differences.append("last epoch instead of the best on novel classes")
    return dataclasses.replace(config, Train=train, CLIP=clip), differences

