"""Models to share: one file with everything but CLIP, and a model card beside it.

    python -m model.predict.share export exp/demo/PI_CLIP/split0/resnet50/snapshot/best.safetensors --out pi_clip_demo.safetensors
    python -m model.predict.share export SNAPSHOT --out FILE.safetensors --push USER/REPO      # to a hub, through huggingface_hub
    python -m model.predict.share pull USER/REPO --out FOLDER

The file holds the trained head and the base learner (or backbone) that it was trained with; its metadata the config, the names of
the classes, the hashes of all frozen parts (CLIP stays in its own file, CLIP.clip_path) and the result of test.py where there is
one. `load_predictor`, predict.py --weights and Test_Finetune.weight take it.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from model.build import recorded
from model.predict.dense_predictor import DensePredictor, load_predictor
from model.predict.predictor import Predictor
from util import ROOT, cli
from util.config import Config
from util.errors import UserError
from util.files import atomic, load_tensors
from util.report.summary import label
from util.report.write import check_keys, text_table
from util.run.checkpoint import EXPORT, read_meta, save_weights
from util.score.statistics import read_result

RESULT = ("date", "protocol", "protocol_hash", "mean", "sd", "interval", "leak_free", "baselines", "warnings", "environment")
CARD = """---
library_name: pytorch
pipeline_tag: image-segmentation
tags: [{tag}]
{index}---

# {system}, {data_set} {setting}

{does}

{facts}

## Use

```sh
python predict.py --weights {file}{options} --query photos/ --out found
```

```python
{code}
```

## Result

{table}
"""
# An absolute path of two names or more, of any system, within a text; a URL is none.
NAME = r"""[^\s,;:'"()\[\]{}<>|\\/]+"""
ABSOLUTE = re.compile(rf"(?<![\w:/.~\\])(?:~[\w.-]*|[A-Za-z]:)?[\\/](?:{NAME}[\\/])+({NAME})")
FEW_SHOT = """from model.predict.predictor import Predictor

predictor = Predictor.from_checkpoint("{file}")
predictor.set_support("a.jpg"{argument})
mask = predictor.predict("b.jpg").mask"""
DENSE = """from model.predict.dense_predictor import DensePredictor

predictor = DensePredictor.from_checkpoint("{file}"){argument}
label = predictor.predict("b.jpg").label  # numbers of predictor.classes"""
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
    predictor = load_predictor(snapshot, device="cpu")  # checks that all frozen parts are those of the training
    names, fold, system, meta = predictor.names, predictor.fold, predictor.system, read_meta(snapshot)
    if EXPORT in meta:
        raise UserError(f"{snapshot} is an exported file already")
    report, told = result_of(snapshot)
    config = recorded(snapshot)
    own = [str(snapshot.absolute().parent), *_absolute(dataclasses.asdict(config))]  # their names may hold spaces
    report = scrubbed(report, own)
    meta |= {
        EXPORT: 1, "config": portable(config), "classes": [names.names, names.texts, fold.novel, fold.base],
        "result": {key: report[key] for key in RESULT if key in report},
        "notes": [*system.warnings, *([note] if note else [])], "note": note,
    }  # fmt: skip
    meta = scrubbed(meta, own)
    tensors = {name: tensor for name, tensor in system.state_dict().items() if not name.startswith("clip.")}
    if half:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        system.load_state_dict(system.state_dict() | tensors)
        meta |= {"frozen": system.frozen_hashes(), "notes": [*meta["notes"], HALF]}
    save_weights(out, tensors, meta)
    card = out.with_suffix(".md")
    with atomic(card) as temporary:
        count = sum(tensor.numel() for tensor in tensors.values())
        temporary.write_text(model_card(out.name, predictor, meta, report, count), encoding="utf-8")
    return [*told, f"{out}: {out.stat().st_size / 2**20:.1f} MiB; model card {card}"]


def portable(config: Config) -> dict[str, Any]:
    """Return a config without paths of one machine: data and frozen weights of the training are not needed again."""
    content = dataclasses.asdict(config)
    content["Data"] = {"min_pixels": config.Data.min_pixels, "images": config.Data.images}
    content["Method"] |= {"pre_weight": "auto", "backbone_weight": "none"} | ({"cams": []} if "cams" in content["Method"] else {})
    clip = Path(config.CLIP.clip_path).expanduser()
    if clip.is_absolute():
        content["CLIP"]["clip_path"] = str(clip.relative_to(ROOT) if clip.is_relative_to(ROOT) else Path("initmodel", clip.name))
    del content["Runtime"]
    return content


def scrubbed(value: Any, own: Sequence[str] = ()) -> Any:
    """Return JSON values whose texts name no folder of this machine: of an absolute path the last name stays.

    own: absolute paths that may occur in a text; others are found by their form.
    """
    if isinstance(value, dict):
        return {key: scrubbed(item, own) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item, own) for item in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{ROOT}/", "")
    for path in sorted(own, key=len, reverse=True):
        value = value.replace(path, Path(path).name)
    return ABSOLUTE.sub(r"\1", value)


def _absolute(value: Any) -> list[str]:
    """Return all absolute paths among the texts of nested values."""
    if isinstance(value, dict | list | tuple):
        return [path for item in (value.values() if isinstance(value, dict) else value) for path in _absolute(item)]
    return [value] if isinstance(value, str) and len(Path(value).parts) > 1 and Path(value).is_absolute() else []


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


def model_card(file: str, predictor: Predictor | DensePredictor, meta: dict[str, Any], report: dict[str, Any], count: int) -> str:
    """Write the model card: Markdown with the header that hubs read."""
    few_shot = isinstance(predictor, Predictor)
    says = few_shot_card(file, meta, predictor) if few_shot else dense_card(file, meta, predictor.system.reads_text)
    facts = [f"- backbone {meta['backbone']} (width {meta['width']}), {count / 1e6:.1f} M parameters", *says.pop("facts"),
             *(f"- frozen {name}: `{digest}`" for name, digest in meta["frozen"].items())]  # fmt: skip
    if "clip" in meta["frozen"]:
        facts.append(f"- CLIP is not inside: it comes from `{meta['config']['CLIP']['clip_path']}`, checked by that hash")
    table = f"```\n{text_table(report)}\n```" if report else "Not tested yet."
    return CARD.format_map(meta | says | {"file": file, "facts": "\n".join([*facts, *(f"- {note}" for note in meta["notes"])]),
                                          "table": table, "index": model_index(file, says, report)})  # fmt: skip


def model_index(file: str, says: dict[str, Any], report: dict[str, Any]) -> str:
    """Return the result as hubs read it (YAML `model-index`, percent); "" where there is none."""
    if not report:
        return ""
    name = f"{report['system']} {Path(file).stem}"
    metrics = [{"type": "mean_iou" if key == "miou" else key, "name": label(key), "value": round(100 * report["mean"][key], 2)}
               for key in ("miou", "hiou", "fb_iou") if report["mean"].get(key) is not None]  # fmt: skip
    result = {"task": {"type": "image-segmentation", "name": says["tag"].replace("-", " ")},
              "dataset": {"type": report["data_set"], "name": f"{report['data_set']}, {says['setting']}",
                          "args": {"protocol": report["protocol"]["name"], "hash": report["protocol_hash"]}},
              "metrics": metrics}  # fmt: skip
    return yaml.safe_dump({"model-index": [{"name": name, "results": [result]}]}, sort_keys=False, allow_unicode=True)


def few_shot_card(file: str, meta: dict[str, Any], predictor: Predictor) -> dict[str, Any]:
    """Return what the card says of a system that looks for what examples show."""
    train, text, masks = meta["config"]["Train"], predictor.takes_text, predictor.needs_masks
    return {
        "tag": "few-shot-segmentation", "setting": f"fold {meta['split']}, {train['shot']}-shot",
        "does": f"Segments a class from one or a few {'annotated examples' if masks else 'examples and its name'}.",
        "facts": [f"- images at {train['val_size']} pixels; priors: {', '.join(meta['priors']) or 'none'}",
                  f"- trained on the base classes of fold {meta['split']} of {meta['data_set']}; checkpoint chosen by: "
                  f"{meta['selection']}"],
        "options": " --support a.jpg" + " --mask a.png" * masks + ' --text "what it is"' * text,
        "code": FEW_SHOT.format(file=file, argument=', "a.png"' * masks + ', text="what it is"' * text),
    }  # fmt: skip


def dense_card(file: str, meta: dict[str, Any], reads_text: bool) -> dict[str, Any]:
    """Return what the card says of a system that labels every pixel. reads_text: it takes other classes, too."""
    names, *_, base = meta["classes"]
    new = [name for c, name in enumerate(names, start=1) if c not in base]
    chosen = '\npredictor.set_classes(["cat", "dog", "sofa"])  # or leave it out' * reads_text
    return {
        "tag": "semantic-segmentation", "setting": f"{len(names)} classes",
        "does": "Labels every pixel with one of its classes" + (", or of other names." if reads_text else "."),
        "facts": [f"- trained on {meta['data_set']}; checkpoint chosen by: {meta['selection']}", f"- classes: {', '.join(names)}",
                  *([f"- without labels in training: {', '.join(new)}"] if new else [])],
        "options": ' --classes "cat, dog, sofa"' * reads_text,
        "code": DENSE.format(file=file, argument=chosen),
    }  # fmt: skip


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
