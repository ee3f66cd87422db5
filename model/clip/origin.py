"""Facts about CLIP weights that are not in the tensors: activation, width of the attention heads, pixel statistics.

Tensors of equal shape run with QuickGELU (OpenAI, MetaCLIP, DFN) or with GELU (most of LAION and DataComp), and heads are 64
wide but for ViT-H (80), g (88), bigG (104) and e (112). Nothing is guessed. The first known of these decides: the
sha256 of the file or its published name, OpenAI's metadata inside, `open_clip_config.json` beside
the file, the option `CLIP.activation`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from util.errors import UserError

OPENAI_METADATA = ("input_resolution", "context_length", "vocab_size")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # names that open_clip gives on the hub
ACTIVATIONS = {True: "quick_gelu", False: "gelu"}
FOREIGN = ("timm_model_name", "hf_model_name", "hf_tokenizer_name", "multimodal_cfg")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Origin:
    """Known facts about weights; None: not known.

    Attributes:
        source: where they come from, for messages.
        config: sizes as in open_clip's model config; None: read from the shapes.
        heads_known: whether the width of the heads is known.
        statistics: mean and std of the pixels in 0..1 units.
    """

    source: str = ""
    quick_gelu: bool | None = None
    config: dict[str, Any] | None = None
    heads_known: bool = False
    statistics: Statistics | None = None

    def decided(self, option: str, name: str) -> "Origin":
        """Return the origin, completed by the option `CLIP.activation`.

        Raises:
            UserError: activation or heads stay unknown, or the option contradicts what is known.
        """
        known = self
        if option != "auto":
            asked = option == ACTIVATIONS[True]
            if self.quick_gelu is not None and asked != self.quick_gelu:
                raise UserError(f"CLIP.activation = {option}, but {name} was trained with {ACTIVATIONS[self.quick_gelu]} "
                                f"({self.source}); leave the option away")
            known = replace(self, quick_gelu=asked)
        if known.quick_gelu is None:
            raise UserError(
                f"CLIP.clip_path: {name} does not say whether it was trained with GELU (most of LAION and DataComp) or QuickGELU "
                "(OpenAI, MetaCLIP, DFN), and with the wrong one all numbers are wrong. Put its open_clip_config.json beside it, "
                "or name it by the hub (CLIP.clip_path=ViT-B-16/laion2b_s34b_b88k downloads it with its activation; "
                "hf-hub:ORGANISATION/NAME too), or say CLIP.activation=gelu or CLIP.activation=quick_gelu")
        if not known.heads_known:
            raise UserError(
                f"CLIP.clip_path: {name} has the sizes of no model that open_clip lists, and the width of its attention heads "
                "cannot be read off the weights. Put its open_clip_config.json beside it, or name it by the hub "
                "(CLIP.clip_path=hf-hub:ORGANISATION/NAME)")
        return known


OPENAI = Origin("OpenAI's", True, heads_known=True)


def origin_of(path: Path, state: Mapping[str, Tensor]) -> Origin:
    """Return the known facts about a file in OpenAI or open_clip naming.

    Raises:
        UserError: a state dict in transformers' naming, or a config beside it that describes another kind of model.
    """
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        raise transformers(path)
    beside, known = _beside(path), _published(path)
    if all(key in state for key in OPENAI_METADATA):
        known = known or Origin("OpenAI's metadata is inside", True)
        return replace(known, heads_known=True)  # OpenAI's own code takes 64
    if beside and known:
        return replace(beside, source=known.source, quick_gelu=known.quick_gelu)
    return beside or known or Origin()


def transformers(path: Path) -> UserError:
    """Return the error for a model of the transformers library."""
    return UserError(f"CLIP.clip_path: {path} is a CLIP of the transformers library, whose tensors have other names and which is "
                     f"not read. Take the open_clip file of the same model ({' or '.join(WEIGHTS)}, with open_clip_config.json), "
                     "or name the model by the hub (CLIP.clip_path=ViT-B-16-quickgelu/openai, or hf-hub:ORGANISATION/NAME)")


def is_transformers(config: object) -> bool:
    """Return whether the content of a config.json is the transformers library's."""
    return isinstance(config, dict) and "embed_dim" not in config and bool(
        {"model_type", "architectures", "transformers_version"} & set(config))  # fmt: skip


def check_hub(model: str, tag: str) -> None:
    """Check a hub name MODEL/TAG before anything is downloaded.

    Raises:
        UserError: the name gives another activation than that of the weights' training.
    """
    config, weights = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    twin = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
    fits = weights or open_clip.get_pretrained_cfg(twin, tag)
    if not config or not fits:
        return  # the error lists the names
    trained, built = bool(fits.get("quick_gelu")), bool(config.get("quick_gelu"))
    if trained != built:
        right = f"write CLIP.clip_path={twin}/{tag}" if open_clip.get_model_config(twin) else "no name of open_clip has both"
        raise UserError(f"CLIP.clip_path = {model}/{tag}: {model} runs {ACTIVATIONS[built]}, the weights {tag} were trained with "
                        f"{ACTIVATIONS[trained]}, and with the wrong one all numbers are wrong; {right}")


def check_parts(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError where a model config names another tower or tokenizer than CLIP's own."""
    parts = {**config, **config.get("vision_cfg", {}), **config.get("text_cfg", {})}
    if foreign := [key for key in FOREIGN if parts.get(key)]:
        raise UserError(f"CLIP.clip_path: {name} is no plain CLIP ({', '.join(f'{key}: {parts[key]}' for key in foreign)}); only "
                        "CLIP's own image and text towers with its own tokenizer are known here")


def listed(sizes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model of open_clip's list with these sizes (a config that `model.clip.load` reads off a state dict), or None."""

    def shape(config: Mapping[str, Any]) -> tuple:
        vision, text = config["vision_cfg"], config["text_cfg"]
        layers = vision.get("layers")
        return (config["embed_dim"], vision.get("width"), tuple(layers) if isinstance(layers, list) else layers,
                vision.get("patch_size"), text.get("width"), text.get("layers"), text.get("vocab_size"))  # fmt: skip

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        parts = {**config, **config["vision_cfg"], **config["text_cfg"]}
        if not any(parts.get(key) for key in FOREIGN) and shape(config) == shape(sizes):
            return config
    return None


def _beside(path: Path) -> Origin | None:
    """Read open_clip_config.json in the folder of a file; None where there is none."""
    file = path.parent / "open_clip_config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        check_parts(config, str(file))
        quick = bool(config.get("quick_gelu", False))  # open_clip's own default
        statistics = tuple(pixels["mean"]), tuple(pixels["std"])
    except UserError:
        raise
    except KeyError as error:
        if error.args[0] not in ("mean", "std"):
            raise UserError(f"CLIP.clip_path: {file} is no config of open_clip: it has no {error}") from error
        statistics = None
    except Exception as error:  # no JSON, another layout
        raise UserError(f"CLIP.clip_path: {file} is no config of open_clip ({type(error).__name__}: {error})") from error
    return Origin(f"{file.name} beside it", quick, {**config, "quick_gelu": quick}, True, statistics)


def _published(path: Path) -> Origin | None:
    """Look a file up in open_clip's list of published weights: by its sha256, else by its name or that of its folders."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = {path.name.lower(), path.stem.lower(), *(place.name.lower() for place in list(path.absolute().parents)[:3])}
    by_name, doubt = None, False
    for model, tag in open_clip.list_pretrained():
        weights = open_clip.get_pretrained_cfg(model, tag)
        url, hub = weights.get("url") or "", (weights.get("hf_hub") or "").strip("/").lower()
        quick, statistics = bool(weights.get("quick_gelu")), None
        if weights.get("mean") and weights.get("std"):
            statistics = tuple(weights["mean"]), tuple(weights["std"])
        file_name = url.rpartition("/")[2].lower()
        known = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.\w+$", url)
        prefix = known and (known[1] or known[2])
        found = Origin(f"it is {model}/{tag}", quick, statistics=statistics)
        if prefix and digest.startswith(prefix):
            return found
        if by_name is None and hub and names & {hub.rpartition("/")[2], "models--" + hub.replace("/", "--")}:
            by_name = replace(found, source=f"its name is that of {model}/{tag}")
        elif by_name is None and file_name and file_name in names:
            by_name, doubt = replace(found, source=f"its name is that of {model}/{tag}"), bool(prefix)
    if doubt:
        warnings.warn(f"CLIP.clip_path: {path}: {by_name.source}, its sha256 is not; by the name alone it is run with "
                      f"{ACTIVATIONS[by_name.quick_gelu]}", stacklevel=2)
    return by_name
