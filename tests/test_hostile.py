"""Weights made to do harm: nothing in them is run, no memory is taken for what they only claim, and a UserError names the file.

Archives, annotations, configs and pictures: test_hostile_data.py.
"""

import io
import json
import os
import pickle
import re
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.clip import load
from model.clip.load import clip_from_state, load_clip
from tests.make import TEXT, VISION, small_clip
from util.errors import UserError
from util.files import load_state, save_json
from util.run import checkpoint

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]  # torch's

# ---- weights: code in them


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def zipped(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("pack", [zipped, legacy, pickle.dumps])
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.safetensors"])
def test_pickles_are_not_run(tmp_path: Path, name: str, pack: Callable[[object], bytes]) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(pack({"state_dict": {"a": torch.zeros(1)}, "b": Touch(canary)}))
    for read in (load_state, lambda p: load_clip(str(p))):
        with pytest.raises(UserError, match=name):
            read(path)
    if pack is zipped:  # a resume point whose sums are right
        folder = tmp_path / "resume"
        folder.mkdir()
        for suffix in (".safetensors", ".pt"):
            (folder / f"1{suffix}").write_bytes(path.read_bytes())
        save_json(folder / "1.json", {suffix: checkpoint._digest(folder / f"1{suffix}") for suffix in (".safetensors", ".pt")})
        with pytest.raises(UserError, match=r"1\.json is damaged"):
            checkpoint.load_resume(tmp_path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Touch(canary)))
    assert canary.exists()  # so it does what it says


def test_code_of_torchscript_is_not_run(tmp_path: Path) -> None:
    """OpenAI's archive is opened after its sha256 only; any other, which may run code as it is opened, never."""
    canary, path = tmp_path / "canary", tmp_path / "ViT-B-16.pt"

    class Writes(torch.nn.Module):
        def __init__(self, where: str):
            super().__init__()
            self.where = where

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.where, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.where = state[0]
            self.training = state[1]
            torch.save(torch.zeros(1), self.where)

    torch.jit.save(torch.jit.script(Writes(str(canary))), path)
    assert not canary.exists()
    for read, says in ((load_state, "damaged, or holds more"), (lambda p: load_clip(str(p)), "sha256")):
        with pytest.raises(UserError, match=rf"ViT-B-16\.pt.* {says}"):
            read(path)
    assert not canary.exists()
    torch.jit.load(path)
    assert canary.exists()


# ---- weights: lies


def rewritten(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file with its members changed and compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return file.getvalue()


def claims(numbers: int) -> Callable[[str, bytes], bytes]:
    """Lets `zipped({"a": torch.zeros(5)})` hold so many numbers."""
    return lambda name, old: old.replace(b"K\x05", b"J" + struct.pack("<i", numbers)) if name.endswith("data.pkl") else old


def tarred(name: str) -> bytes:
    """The kind of file that torch wrote before 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


FIVE = zipped({"a": torch.zeros(5)})
LARGE = 2**28  # bytes
LIES: dict[str, Callable[[], bytes]] = {
    "bomb": lambda: rewritten(
        FIVE, lambda name, old: bytes(LARGE) if name.endswith("data/0") else claims(LARGE // 4)(name, old), zipfile.ZIP_DEFLATED
    ),
    "more numbers than there are": lambda: rewritten(FIVE, claims(10**8)),
    "one number a trillion times": lambda: zipped({"a": torch.zeros(1).expand(10**12)}),
    "sparse": lambda: zipped({"a": torch.zeros(3).to_sparse()}),
    "without values": lambda: zipped({"a": torch.zeros(3, device="meta")}),
    "complex": lambda: zipped({"a": torch.zeros(3, dtype=torch.complex64)}),
    "unnamed": lambda: zipped({1: torch.zeros(3)}),
    "no tensors": lambda: zipped({"a": 5}),
    "one tensor": lambda: zipped(torch.zeros(3)),
    "directory of the zip": lambda: FIVE.replace(b"PK\1\2", b"XXXX"),
    "no torch file": lambda: rewritten(FIVE, lambda name, old: b"x"),
    "old tar": lambda: tarred("storages"),
    "text": lambda: b"hello",
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_weights(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(LIES[lie]())
    start = time.monotonic()
    for read in (load_state, lambda p: load_clip(str(p))):
        with pytest.raises(UserError, match=r"weights\.pth"):
            read(path)
    assert time.monotonic() - start < 5
    if lie == "bomb":
        assert path.stat().st_size < LARGE / 500
        with pytest.raises(UserError, match="unpacks to more than its size"):
            load_state(path)


@pytest.mark.parametrize("content", [FIVE, legacy({"a": torch.zeros(5)})], ids=["zip", "legacy"])
def test_truncated_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    for size in range(0, len(content), 50):
        path.write_bytes(content[:size])
        for read in (load_state, lambda p: load_clip(str(p))):
            with pytest.raises(UserError, match=r"weights\.pth"):
                read(path)


def safe(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: list[int], offsets: list[int], kind: str = "F32") -> dict:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("content", [
    b"", b"\1\2", safe(b"{}", size=2**63), safe(b"{}", size=100), safe(b"{no"), safe(b'{"a":' + b"[" * 10**5),
    safe(b'{"\xff":1}'),
    safe(tensor([2], [0, 8]), b"1234"), safe(tensor([2], [8, 0]), bytes(8)), safe(tensor([10**18], [0, 8]), bytes(8)),
    safe(tensor([2**62, 4], [0, 0])), safe(tensor([0, 2**63], [0, 0])), safe(tensor([-1], [0, 4]), bytes(4)),
    safe(tensor([2], [0, 8]) | {"b": tensor([2], [0, 8])["a"]}, bytes(8)), safe({"__metadata__": [1]}),
    *(safe(tensor([8], [0, 8], kind), bytes(8)) for kind in ("F99", "F8_E8M0")), safe(tensor([1], [0, 8], "C64"), bytes(8)),
], ids=range(18))  # fmt: skip
def test_lying_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    for read in (load_state, lambda p: load_clip(str(p))):
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            read(path)
    try:
        assert checkpoint.read_meta(path) == {}
    except UserError as error:
        assert "weights.safetensors" in str(error)


def test_folders_are_no_weights(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=name):
            load_state(tmp_path / name)


# ---- weights: what is no CLIP


@pytest.fixture(scope="module")
def clip_state() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in small_clip().state_dict().items() if key != "attn_mask"}


def test_states_that_describe_no_clip(clip_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    clip_from_state(clip_state)
    layers, build = [], load._build
    monkeypatch.setattr(load, "_build", lambda config: layers.append(config["text_cfg"]["layers"]) or build(config))
    wrong = [{**clip_state, f"transformer.resblocks.{name}": torch.zeros(1)} for name in ("500.x", "x.y", "-5.z")]
    wrong.append({k: v for k, v in clip_state.items() if "resblocks" not in k})
    for key in ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "token_embedding.weight",
                "text_projection"):  # fmt: skip
        wrong.append({k: v for k, v in clip_state.items() if k != key})
        wrong += [{**clip_state, key: torch.zeros(shape)} for shape in ((), (0,), (3,), (0, 3, 0, 0), (1, 1, 1, 1, 1))]
    for state in wrong:
        with pytest.raises(UserError, match=r"CLIP\.clip_path: mine"):
            clip_from_state(state, "mine")
    assert max(layers) < 10  # one tensor of a block 500 does not make 501 blocks


GOOD = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.mark.parametrize("config", [
    "{", "[" * 10**5, "[]", "9" * 5000, {}, {**GOOD, "vision_cfg": None}, {**GOOD, "embed_dim": -1},
    {**GOOD, "embed_dim": 10**15}, {**GOOD, "vision_cfg": {**VISION, "other": 1}},
    {**GOOD, "vision_cfg": {**VISION, "patch_size": 0}},
    {**GOOD, "text_cfg": {**TEXT, "heads": 0}}, {**GOOD, "text_cfg": {**TEXT, "layers": 1}},
], ids=range(12))  # fmt: skip
def test_configs_that_describe_no_clip(tmp_path: Path, clip_state: dict[str, torch.Tensor], config: object) -> None:
    save_file(clip_state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=rf"CLIP\.clip_path: {tmp_path}"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize(("content", "says"), [
    (b"<!DOCTYPE html><html><head><title>Virus scan warning</title>", "web page"), (b"\n\n<html lang=en>", "web page"),
    (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer"),
    (b'{"error": "Invalid username or password."}', r"text and not weights, it begins with .*Invalid username"),
    (b"Entry not found", "text and not weights"), (b"\x1b[31mred\x1b[0m \0\1\2", "damaged"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_a_download_leaves_instead_of_weights(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is .*{says}") as caught:
        load_state(tmp_path / name)
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)
