"""Models to share: one file with everything but CLIP, and a model card beside it.

    python -m model.predict.share export exp/demo/PI_CLIP/split0/resnet50/snapshot/best.safetensors --out pi_clip_demo.safetensors
    python -m model.predict.share export SNAPSHOT --out FILE.safetensors --push USER/REPO      # to a hub, through huggingface_hub
    python -m model.predict.share pull USER/REPO --out FOLDER

The file holds the trained head and the base learner (or backbone) that it was trained with; its metadata the config, the names of
the classes, the hashes of all frozen parts (CLIP stays in its own file, CLIP.clip_path) and the result of test.py where there is
one. `Predictor.from_checkpoint`, predict.py --weights and Test_Finetune.weight take it.
"""

import argparse
import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from model.backbone.pspnet import PSPNet
from model.build import build_system, load_weights, recorded, system_class
from model.few_shot.system import FewShot
from model.predict.predictor import trained_on
from util import cli
from util.config import Config
from util.errors import UserError
from util.files import ROOT, atomic, load_tensors
from util.report.write import check_keys, text_table
from util.run.checkpoint import EXPORT, read_meta, save_weights
from util.run.place import Experiment
from util.score.statistics import read_result

RESULT = ("date", "protocol", "protocol_hash", "mean", "sd", "interval", "leak_free", "baselines", "warnings", "environment")
CARD = """---
library_name: pytorch
pipeline_tag: image-segmentation
tags: [few-shot-segmentation]
---

# {system}, {data_set} fold {split}, {shot}-shot

Segments a class from one or a few annotated examples.

- backbone {backbone} (width {width}), images at {size} pixels, {count:.1f} M parameters
- priors: {priors}
- trained on the base classes of fold {split} of {data_set}; checkpoint chosen by: {selection}
{more}

## Use

```sh
python predict.py --weights {file} --support a.jpg --mask a.png{option} --query photos/ --out found
```

```python
from model.build import recorded
from model.predict.predictor import Predictor

predictor = Predictor.from_checkpoint("{file}")
predictor.set_support("a.jpg", "a.png"{argument})
mask = predictor.predict("b.jpg").mask
```

## Result

{table}
"""
DENSE = """---
library_name: pytorch
pipeline_tag: image-segmentation
tags: [semantic-segmentation]
---

# {system}, {data_set}, {setting}

Gives each pixel one of the named classes. The file holds what was trained, {count:.1f} M parameters, and not CLIP.

- backbone {backbone}, images at {size} pixels
- labels in training: {seen}
- without labels: {unseen}
- checkpoint chosen by: {selection}
{more}

## Use

```sh
python predict.py --weights {file}{option} --query photos/ --out found
sh test.sh EXP DATASET GPUS Test_Finetune.weight={file}     # ARCH={system}, with the config of its training
```

## Result

{table}
"""
HALF = "weights rounded to half precision; the result is of those before"
LATER = 60.0  # seconds by which a report may be older than its checkpoint: a copied folder has the times of the copying


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    out = commands.add_parser("export", help="write one file with a model card beside it")
    out.add_argument("snapshot", type=Path, help="snapshot/best.safetensors of a run")
    out.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    out.add_argument("--note", default="", help="text for its users; predictors show it")
    out.add_argument("--half", action="store_true", help="round to 16 bits: half the size")
    out.add_argument("--push", metavar="USER/REPO", help="then upload both to this repository of the hub")
    into = commands.add_parser("pull", help="download what was pushed")
    into.add_argument("repository", metavar="USER/REPO")
    into.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    if given.command == "pull":
        print("\n".join(map(str, pull(given.repository, given.out))))
        return
    hub = _hub() if given.push else None  # before the work, when it is missing
    for line in export(given.snapshot, given.out, given.half, given.note):
        print(line)
    if hub:
        print(push(hub, given.out, given.push))


def export(snapshot: Path, out: Path, half: bool = False, note: str = "") -> list[str]:
    """Write `out` and its model card; return messages for the user.

    half: round all weights but CLIP's to fp16; computations stay fp32. note: text for users.

    Raises:
        UserError: `out` is no .safetensors, the checkpoint or a frozen part of its training is missing, the disk is full.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the file is a safetensors one, call it {out.with_suffix('.safetensors')}")
    if snapshot.suffix != ".safetensors":
        raise UserError(f"{snapshot}: give the .safetensors file of a run; published checkpoints are handed on as they are")
    if not snapshot.is_file():
        raise UserError(f"no such checkpoint: {snapshot}")
    meta = read_meta(snapshot)
    if EXPORT in meta:
        raise UserError(f"{snapshot} is an exported file already")
    config, arch = recorded(snapshot), meta["system"]
    if issubclass(system_class(arch), PSPNet):
        raise UserError(f"{snapshot} is a base learner (ARCH={arch}); give a few-shot system, which has it inside")
    fold, names = trained_on(config, meta)
    system = build_system(arch, config, fold, names)
    load_weights(system, config, Experiment.of_checkpoint(snapshot, arch, config), snapshot)  # checks all frozen parts, too
    report, told = result_of(snapshot)
    meta |= {
        EXPORT: 1, "config": portable(config), "classes": [names.names, names.texts, fold.novel, fold.base],
        "result": {key: report[key] for key in RESULT if key in report},
        "notes": [*system.warnings, *([note] if note else [])], "note": note,
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in system.state_dict().items() if not name.startswith("clip.")}
    if half:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        system.load_state_dict(system.state_dict() | tensors)
        meta |= {"frozen": system.frozen_hashes(), "notes": [*meta["notes"], HALF]}
    save_weights(out, tensors, meta)
    card = out.with_suffix(".md")
    with atomic(card) as temporary:
        temporary.write_text(model_card(out.name, meta, report, sum(t.numel() for t in tensors.values())), encoding="utf-8")
    return [*told, f"{out}: {out.stat().st_size / 2**20:.1f} MiB; model card {card}"]


def portable(config: Config) -> dict[str, Any]:
    """Return a config without paths of one machine: data and frozen weights of the training are not needed again."""
    content = dataclasses.asdict(config)
    content["Data"] = {"min_pixels": config.Data.min_pixels, "images": config.Data.images}
    content["Method"] |= {"pre_weight": "auto", "backbone_weight": "none"}
    clip = Path(config.CLIP.clip_path)
    if clip.is_absolute() and clip.is_relative_to(ROOT):
        content["CLIP"]["clip_path"] = str(clip.relative_to(ROOT))
    del content["Runtime"]
    return content


def result_of(snapshot: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the report of test.py on this checkpoint, or {} and the reason.

    Raises:
        UserError: the report is damaged.
    """
    file = snapshot.parent.parent / "result/report.json"
    if not file.is_file():
        return {}, [f"no result inside: there is no {file} (test.py makes it)"]
    report = read_result(file, check_keys)
    tested = snapshot.with_name(Path(report.get("checkpoint") or "nothing").name)
    if tested != snapshot and not (tested.is_file() and same_tensors(tested, snapshot)):  # of a run to its end, best may be last
        return {}, [f"no result inside: {file} is about {report.get('checkpoint')}"]
    if file.stat().st_mtime < snapshot.stat().st_mtime - LATER:
        return {}, [f"no result inside: {file} is older than the checkpoint; run test.py again"]
    return report, []


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_tensors(a), load_tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def model_card(file: str, meta: dict[str, Any], report: dict[str, Any], count: int) -> str:
    """Write the model card: Markdown with the header that hubs read."""
    config = meta["config"]
    frozen = [f"- frozen {name}: `{digest}`" for name, digest in meta["frozen"].items()]
    if "clip" in meta["frozen"]:
        frozen.append(f"- CLIP is not inside: it comes from `{config['CLIP']['clip_path']}`, checked by that hash")
    common = {
        "file": file, "size": config["Train"]["val_size"], "count": count / 1e6,
        "more": "\n".join([*frozen, *(f"- {note}" for note in meta["notes"])]),
        "table": f"```\n{text_table(report)}\n```" if report else "Not tested yet.",
    }  # fmt: skip
    if not issubclass(system_class(meta["system"]), FewShot):
        names, _, novel, base = meta["classes"]
        return DENSE.format_map({"selection": config["Train"]["selection"], "setting": "image-level labels"} | meta | common | {
            "seen": ", ".join(names[c - 1] for c in base), "unseen": ", ".join(names[c - 1] for c in novel) or "none",
            "option": ' --classes "cat, dog"' if "setting" in meta else "",
        })  # fmt: skip
    says = "vtp" in meta["priors"]
    return CARD.format_map(meta | common | {
        "shot": config["Train"]["shot"], "priors": ", ".join(meta["priors"]) or "none",
        "option": ' --text "what it is"' if says else "", "argument": ', text="what it is"' if says else "",
    })  # fmt: skip


def push(hub: ModuleType, file: Path, repository: str) -> str:
    """Upload an exported file, and its card as README.md; return the address.

    Raises:
        UserError: what the hub says against it.
    """
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repository)
        api.upload_file(path_or_fileobj=file.with_suffix(".md"), path_in_repo="README.md", repo_id=repository)
    except Exception as error:  # of the hub and of the network; the local files exist all the same
        raise UserError(f"--push {repository}: {error}. {file} is written; are you logged in (`hf auth login`)?") from error
    return f"pushed to {repository}"


def pull(repository: str, folder: Path) -> list[Path]:
    """Download the exported files of a repository into a folder; its other files stay.

    Raises:
        UserError: what the hub says against it, or there is no exported file in the repository.
    """
    hub = _hub()
    try:
        hub.snapshot_download(repository, local_dir=folder, allow_patterns=["*.safetensors", "README.md"])
    except Exception as error:  # of the hub and of the network
        raise UserError(f"pull {repository}: {error}") from error
    files = [file for file in sorted(folder.glob("*.safetensors")) if EXPORT in read_meta(file)]
    if not files:
        raise UserError(f"{repository} has no exported file (`python -m model.predict.share export` makes them)")
    return files


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("--push and pull need huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


if __name__ == "__main__":
    cli.run(main)
