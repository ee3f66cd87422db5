"""Load CLIP weights from a local file, a folder, or a hub name."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from model.clip.origin import (
    OPENAI,
    OPENAI_METADATA,
    WEIGHTS,
    Origin,
    Statistics,
    check_hub,
    check_parts,
    is_transformers,
    listed,
    origin_of,
    transformers,
)  # fmt: skip
from model.clip.resnet import ResNetTower
from model.clip.text import TextEncoder
from model.clip.trunk import ClipTrunk
from model.ops import Pixels
from util.errors import UserError
from util.files import load_state, local_path, zip_members

# The TorchScript archives we open: OpenAI's ViT-B-16.pt and RN50.pt. Such archives carry code, so any other is refused.
OPENAI_VIT_B_16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
OPENAI_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"


def _archive(source: str | Path) -> tuple[str, str]:
    """Return the name of a source's OpenAI archive, and its place."""
    name, digest = ("RN50", OPENAI_RN50) if "RN50" in str(source) else ("ViT-B-16", OPENAI_VIT_B_16)
    return name, f"https://openaipublic.azureedge.net/clip/models/{digest}/{name}.pt"


def _where(source: str | Path) -> str:
    """Say what to do where OpenAI's archive is missing or damaged."""
    name, url = _archive(source)
    return (f"Put OpenAI's {name}.pt there ({url}), or set CLIP.clip_path={name}-quickgelu/openai to download "
            "the same weights through open_clip, or CLIP.clip_path=random for a dry run without meaning")


class Clip(nn.Module):
    """A CLIP model in its two halves. Its owner freezes it (`model.system.Frozen`)."""

    def __init__(self, clip: CLIP, known_ids: Tensor | None = None, random: bool = False, statistics: Statistics | None = None):
        super().__init__()
        if not isinstance(clip.visual, (VisionTransformer, ModifiedResNet)):
            raise UserError("CLIP.clip_path: only ViT image towers and OpenAI's ResNets are known here; this one is "
                            f"{type(clip.visual).__name__}")
        self.visual = ClipTrunk(clip.visual) if isinstance(clip.visual, VisionTransformer) else ResNetTower(clip.visual)
        if statistics and isinstance(self.visual, ClipTrunk):  # of the pixels, where they are not CLIP's own
            self.visual.pixels["clip"] = Pixels(*statistics)
        elif statistics:
            self.visual.normalise = Pixels(*statistics)
        clip.visual = None  # each tensor has one home
        self.text = TextEncoder(clip, known_ids)
        self.random = random

    @property
    def settings(self) -> str:
        """Settings that change results besides the tensors: activation, width of the heads."""
        return self.text.settings + (f" {self.visual.blocks[0].attn.head_dim}" if isinstance(self.visual, ClipTrunk) else "")

    @property
    def logit_scale(self) -> Tensor:
        return self.text.clip.logit_scale


def load_clip(source: str, resnet: bool = False, activation: str = "auto") -> Clip:
    """Builds CLIP from `CLIP.clip_path`.

    Args:
        source: OpenAI's `ViT-B-16.pt` or `RN50.pt` (TorchScript; the sha256 is checked before it is opened); any `.pt`, `.pth`,
            `.bin` or `.safetensors` state dict in OpenAI or open_clip naming; a folder with open_clip_config.json and the
            weights, or with our `config.json` and `model.safetensors`; `random` (deterministic weights of ViT-B/16); else a hub
            name `MODEL/PRETRAINED` or `hf-hub:...` that open_clip downloads.
        resnet: whether a ResNet image tower (RN50) is accepted.
        activation: auto, quick_gelu or gelu (`CLIP.activation`): decides for a file whose activation is not known otherwise.
    Raises:
        UserError: missing file, unknown archive, weights that do not fit, activation or width of the heads unknown, a hub name
        whose activation is not that of its weights, a ResNet that is not accepted.
    """
    clip = _load(source, activation)
    if not resnet and not isinstance(clip.visual, ClipTrunk):
        raise UserError(f"CLIP.clip_path = {source}: only ViT image towers give patch tokens and attention; this one is a ResNet")
    return clip


def _load(source: str, activation: str = "auto") -> Clip:
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Clip(_build(open_clip.get_model_config("ViT-B-16-quickgelu")), random=True)
    path = local_path(source)
    if path is None:
        return _from_hub(source, activation)
    if path.is_dir():
        return _from_folder(path, activation)
    if path.is_file():
        return _from_file(path, activation)
    raise UserError(f"CLIP.clip_path: no file {source}. {_where(source)}")


def _from_hub(source: str, activation: str) -> Clip:
    name, _, tag = source.partition("/") if not source.startswith("hf-hub:") else (source, "", "")
    if tag:
        check_hub(name, tag)
    try:
        with _no_log():
            config = open_clip.get_model_config(name) or {}
            model = open_clip.create_model(name, pretrained=tag or None, precision="fp32", require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many kinds; the user needs one answer
        raise UserError(f"CLIP.clip_path: {source!r} is neither a file nor could it be downloaded. Without network, fetch "
                        f"{_archive(source)[1]} elsewhere, put it into initmodel/ and name that file ({error})") from error
    check_parts(config, source)
    Origin("the hub", bool(config.get("quick_gelu")), heads_known=True).decided(activation, source)
    pixels = getattr(model.visual, "preprocess_cfg", {})
    return Clip(model, statistics=(pixels["mean"], pixels["std"]) if {"mean", "std"} <= set(pixels) else None)


def _from_file(path: Path, activation: str) -> Clip:
    state = _bare(_read_openai_archive(path) if _is_torchscript(path) else load_state(path))
    origin = origin_of(path, state)
    quick = activation != "gelu" if origin.quick_gelu is None else origin.quick_gelu
    clip = clip_from_state(state, path.name, replace(origin, quick_gelu=quick))  # whether it is a CLIP comes first
    heads_known = origin.heads_known or listed(_sizes(state)) is not None
    replace(origin, heads_known=heads_known).decided(activation, str(path))
    return clip


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Silence the hub's client, which logs every retry twice; the cause is in the error that it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def clip_from_state(state: Mapping[str, Tensor], name: str = "state dict", origin: Origin = OPENAI) -> Clip:
    """Build a CLIP from a state dict in OpenAI or open_clip naming; sizes come from the origin's config, else from the shapes.

    Extra metadata keys of OpenAI's archive are ignored; a missing or unexpected tensor is an error, never a partial load.

    Args:
        origin: facts that are not in the tensors; OpenAI's QuickGELU and heads by default.
    """
    state = {key: value.float() for key, value in _bare(state).items() if key not in (*OPENAI_METADATA, "attn_mask")}
    image = "visual.attnpool.c_proj.weight" if "visual.layer1.0.conv1.weight" in state else "visual.proj"
    missing = [k for k in ("visual.conv1.weight", image, "text_projection", "token_embedding.weight") if k not in state]
    if missing:
        raise UserError(f"CLIP.clip_path: {name} holds no CLIP ViT, {', '.join(missing)} not found")

    with _described(name):
        clip = _build(_config(state, origin))
        clip.load_state_dict(state, strict=True)
    return Clip(clip, statistics=origin.statistics)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of DistributedDataParallel and of open_clip's CustomTextCLIP from keys."""
    return {key.removeprefix("module.").removeprefix("text."): value for key, value in state.items()}


def _config(state: Mapping[str, Tensor], origin: Origin) -> dict:
    """open_clip's config of weights: the origin's, else their sizes, with the heads and the MLP of the listed model they fit."""
    if origin.config is not None:
        return origin.config
    sizes = _sizes(state)
    known = listed(sizes) or {"vision_cfg": {}, "text_cfg": {}}
    text = {**sizes["text_cfg"], **known["text_cfg"], "context_length": sizes["text_cfg"]["context_length"]}
    return {"embed_dim": sizes["embed_dim"], "vision_cfg": {**known["vision_cfg"], **sizes["vision_cfg"]}, "text_cfg": text,
            "quick_gelu": origin.quick_gelu}  # fmt: skip


def _sizes(state: Mapping[str, Tensor]) -> dict:
    """Read open_clip's config off the shapes of a state dict in OpenAI naming; text heads are 64 wide, as in all models."""

    def depth(prefix: str) -> int:
        return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})

    width, _, patch, _ = state["visual.conv1.weight"].shape
    if "visual.proj" in state:
        side, layers = round((len(state["visual.positional_embedding"]) - 1) ** 0.5), depth("visual.transformer.resblocks.")
        image = {"image_size": side * patch, "layers": layers, "width": width, "patch_size": patch}
    else:
        side = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        layers = [depth(f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        image = {"image_size": 32 * side, "layers": layers, "width": 2 * width, "patch_size": None}
    vocabulary, text_width = state["token_embedding.weight"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": image,
        "text_cfg": {"context_length": len(state["positional_embedding"]), "vocab_size": vocabulary, "width": text_width,
                     "heads": text_width // 64, "layers": depth("transformer.resblocks.")},
    }  # fmt: skip


def clip_tensors(clip: Clip) -> dict[str, Tensor]:
    """Return CLIP's tensors under their OpenAI names."""
    visual = {f"visual.{key}": value for key, value in clip.visual.visual.state_dict().items()}
    return visual | clip.text.clip.state_dict()


def without_clip(tensors: Mapping[str, Tensor], clip: Clip, name: str) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint that are not CLIP's. CLIP's, under any attribute, must equal the CLIP in
    use (to fp16, as published code stores them).

    Raises:
        UserError: another CLIP; `name` is the checkpoint's.
    """
    own, rest, differing = clip_tensors(clip), {}, []
    for key, value in tensors.items():
        parts = key.split(".")
        bare = next((k for i in range(len(parts)) if (k := ".".join(parts[i:])) in own), None)
        if bare is None:
            rest[key] = value
        elif value.shape != own[bare].shape or not torch.equal(value.half(), own[bare].half()):
            differing.append(key)
    if differing:
        raise UserError(f"{name} was trained with another CLIP than CLIP.clip_path gives: {len(differing)} tensors differ "
                        f"({', '.join(differing[:3])}); nothing was loaded")
    return rest


def _build(config: dict) -> CLIP:
    return CLIP(
        config["embed_dim"],
        vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=CLIPTextCfg(**config["text_cfg"]),
        quick_gelu=config["quick_gelu"],
    )


@contextlib.contextmanager
def _described(name: str) -> Iterator[None]:
    """Turn the many errors of weights or a config that describe no CLIP into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"CLIP.clip_path: {name} does not fit the CLIP it describes ({type(error).__name__}: {error})") from error


def _from_folder(folder: Path, activation: str) -> Clip:
    """open_clip's folder, or our own: a tiny CLIP keeps only the embedding rows of its words: token_embedding.{rows, ids}."""
    if weights := next((folder / file for file in WEIGHTS if (folder / file).is_file()), None):
        return _from_file(weights, activation)
    with _described(str(folder)):
        config = folder / "config.json"
        config = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    if is_transformers(config):
        raise transformers(folder)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"CLIP.clip_path: {folder} has no {file}; a CLIP folder holds config.json and model.safetensors, or "
                            f"open_clip_config.json and {WEIGHTS[0]}")
    state = {key: value if value.dtype == torch.int32 else value.float()
             for key, value in load_state(folder / "model.safetensors").items()}
    ids = state.pop("token_embedding.ids", None)
    with _described(str(folder)):
        clip = _build(config)
        if ids is not None:
            table = torch.zeros_like(clip.token_embedding.weight)
            table[ids.long()] = state.pop("token_embedding.rows")
            state["token_embedding.weight"] = table
        clip.load_state_dict(state, strict=True)
    Origin(f"{folder}/config.json", bool(config["quick_gelu"]), heads_known=True).decided(activation, str(folder))
    return Clip(clip, known_ids=ids)


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives are zip files with a `constants.pkl` beside their code."""
    return any(member.filename.endswith("/constants.pkl") for member in zip_members(path))


def _read_openai_archive(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in (OPENAI_VIT_B_16, OPENAI_RN50):
        raise UserError(
            f"CLIP.clip_path: {path} is a TorchScript archive with sha256 {digest[:12]}..., not OpenAI's ViT-B-16.pt "
            f"({OPENAI_VIT_B_16[:12]}...). Archives can run code, so only that one (and RN50.pt) is opened; the download "
            f"may be damaged. {_where(path)}"
        )
    return torch.jit.load(path, map_location="cpu").state_dict()
