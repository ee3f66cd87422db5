"""Protocols: how episodes are made and scored, under a name and a hash. A result without its protocol is not a result.

A protocol is a file of config keys, config/protocol/NAME.yaml, which `Test_Finetune.protocol` picks (`auto`: as the
system's paper did). Results whose hashes are equal can be compared. What decides the score of given predictions is hashed once
more in six parts (`PARTS`), so that two protocols show what they share (spec "protocols" section 6).
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
                                           "class": "a class, then an image of it; supports may repeat",
                                           "cycle": "class after class, then an image of it; supports may repeat"}),
    "Test_Finetune.generator": ("drawn by", {"ours": "ours", "workers": "Python's random in loader workers (PFENet)",
                                             "numpy": "numpy's legacy generator (HSNet)",
                                             "fold": "one generator a fold (FSS-SAM3)"}),
    "Test_Finetune.draw_workers": ("loader workers of the draw", {}),
    "Train.augment": ("augmentation", {True: "yes", False: "none"}),
    "Train.antialias": ("antialiased", {True: "yes", False: "no"}),
    "Train.crop": ("training resize", {True: "random crop", False: "squash"}),
    "Train.val_size": ("side", {}),
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
    "Data.support_pixels": ("smallest object of a support", {}),
    "Data.pair_lists": ("pair lists of a folder, hash", {}),
    "Test_Finetune.ann_type": ("support annotation", {}),
    "Test_Finetune.grid": ("scored on", {"original": "the pixels of the file", "square": "the network's square, truth squashed",
                                         "letterbox": "a square on the longer side, the rest void"}),
    "Test_Finetune.void": ("void pixels", {"ignore": "do not count", "background": "count as background"}),
    "Test_Finetune.mean": ("mean over", {"m0": "all classes of the fold, one never drawn counts 0 (M0)",
                                         "m1": "the classes that were drawn (M1)"}),
    "Test_Finetune.test_num": ("episodes per seed", {}),
    "Test_Finetune.seeds": ("seeds", {}),
    "Test_Finetune.episodes": ("episodes of a file, hash", {}),
    "Test_Finetune.classes": ("classes of a file, hash", {}),
    "Method.bank": ("text bank of a file, hash", {}),
}  # fmt: skip


# Keys that name a file, whose content counts: what the file is of.
FILES = {"Test_Finetune.episodes": "episodes", "Test_Finetune.classes": "classes", "Method.bank": "text bank",
         "Data.pair_lists": "pair lists"}  # fmt: skip
# Keys added later, with the values that all protocols had before: a hash counts them only where they differ.
LATER = {"Method.offset": 0.1, "Train.draw": "image", "Train.augment": True, "Train.antialias": False,
         "Test_Finetune.generator": "ours", "Test_Finetune.draw_workers": 0, "Data.support_pixels": 0,
         "Test_Finetune.grid": "original", "Test_Finetune.void": "ignore", "Test_Finetune.mean": "m0"}  # fmt: skip
# The side belongs to a system, unless a protocol fixes it.
IF_FIXED = ("Train.val_size",)
PARTS = {  # all else is of the training, the texts and the annotation
    "candidate index": ("Train.use_split_coco", "Data.min_pixels", "Data.support_pixels", "Data.pair_lists"),
    "draw and generator": ("Train.draw", "Test_Finetune.generator", "Test_Finetune.draw_workers", "Test_Finetune.episodes"),
    "episodes and seeds": ("Test_Finetune.test_num", "Test_Finetune.seeds"),
    "input resize": ("Train.resized_val", "Train.antialias", "Train.val_size"),
    "score grid and void": ("Test_Finetune.grid", "Test_Finetune.void"),
    "mean": ("Test_Finetune.mean",),
}


@dataclass(frozen=True)
class Protocol:
    """The effective values of a config under the name they come from."""

    name: str  # that of the file, with " but Section.key=value, ..." where the config differs from it
    values: dict[str, Any]  # Section.key -> value

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def parts(self) -> dict[str, str]:
        """Return part -> hash of its effective values, 8 hex digits; protocols that share a part share its hash."""
        values = LATER | self.values
        chosen = {part: json.dumps({key: values.get(key) for key in keys}) for part, keys in PARTS.items()}
        return {part: hashlib.sha256(text.encode()).hexdigest()[:8] for part, text in chosen.items()}

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
    name = config.Test_Finetune.protocol
    layer = protocol_layer(name, config.Train.data_set)
    fixed = {f"{section}.{key}": value for section, keys in layer.items() for key, value in keys.items()}
    values = {key: value for key, value in values.items() if value is not None and (key not in LATER or value != LATER[key])
              and (key not in IF_FIXED or key in fixed)}  # fmt: skip
    if config.Test_Finetune.episodes:
        del values["Test_Finetune.test_num"], values["Test_Finetune.seeds"]
    files = {key: found for key in FILES if (found := lookup(config, key))}
    read = {key: content(Path(file), key, config.Train.data_set) for key, file in files.items()}
    values |= {key: hashlib.sha256(found).hexdigest()[:16] for key, found in read.items()}
    changed = [f"{key}={value}" for key, value in (LATER | values).items() if fixed.get(key, LATER.get(key, value)) != value
               and (coco or key != "Train.use_split_coco")]
    changed += [f"{FILES[key]} of {file}" for key, file in files.items()]
    return Protocol(name + (f" but {', '.join(changed)}" if changed else ""), values)


def content(path: Path, key: str, data_set: str) -> bytes:
    """Return the bytes of the file that a key names; of pair lists, a folder, those of the data set's validation, one by one."""
    try:
        files = sorted((path / data_set / "val").iterdir()) if key == "Data.pair_lists" else [path]
        return b"".join(file.read_bytes() for file in files)
    except OSError as error:
        made = {"Test_Finetune.episodes": "; `python -m util.data export` writes such a file",
                "Data.pair_lists": "; give the folder data/splits of HSNet's repository"}.get(key, "")  # fmt: skip
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

