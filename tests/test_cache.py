"""What evaluation keeps: the same bits with and without, in any batch, from disk, after damage."""

import logging
from pathlib import Path

import pytest
import torch

from model.clip import Clip
from model.clip.load import clip_from_state
from model.few_shot.bam import BAM
from model.few_shot.hdmnet import HDMNet
from model.few_shot.memo import Memo
from model.few_shot.pfenet import PFENet
from model.few_shot.system import FewShot
from tests.make import clip_episode, keyed, only, pi_clip, small_clip, small_system
from util.cache import TensorCache, digest, free_memory, nbytes, open_cache
from util.errors import UserError

CPU = torch.device("cpu")


def systems() -> list[FewShot]:
    state = small_clip().state_dict()
    clip: Clip = clip_from_state({**state, "visual.positional_embedding": state["visual.positional_embedding"] * 20})
    return [pi_clip(clip, 2), *(small_system(2, system=cls).eval() for cls in (HDMNet, BAM, PFENet))]


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("system", systems(), ids=lambda s: type(s).__name__)
def test_same_bits_with_and_without(system: FewShot, fixed: bool, tmp_path: Path) -> None:
    made = keyed(clip_episode(shot=2))
    system.remember(TensorCache(0), fixed)
    plain = system.predict(made, baselines=True)
    system.remember(TensorCache(2**30, tmp_path), fixed)
    calls = []
    hook = system.encoder.register_forward_hook(lambda *_: calls.append(1))
    cold, warm = system.predict(made, baselines=True), system.predict(made, baselines=True)
    once = 3 + 6 * (1 + system.masks_support)  # every query and support once; where supports are masked, also without the mask
    assert len(calls) == once
    system.remember(TensorCache(0, tmp_path), fixed)  # a later run: from disk alone
    later = system.predict(made, baselines=True)
    assert len(calls) == once
    for other in (cold, warm, later):
        assert torch.equal(plain.final, other.final)
        assert all(torch.equal(plain.maps[k], other.maps[k]) for k in plain.maps)
        assert all(torch.equal(plain.baselines[k], other.baselines[k]) for k in plain.baselines)
    hook.remove()
    again = system.predict(only(made, [2, 0]), baselines=True)  # another batch: what is kept has the same bits
    assert all(torch.equal(plain.maps[k][[2, 0]], again.maps[k]) for k in plain.maps if k in ("vtp", "vvp"))


def test_content_is_the_key() -> None:
    system, made = small_system(1).eval(), keyed(clip_episode())
    system.remember(TensorCache(2**30), fixed_head=True)
    before = system.predict(made).final
    made.support_mask = 1 - made.support_mask.clamp(max=1)
    assert not torch.equal(system.predict(keyed(made)).final, before)
    with torch.no_grad():
        system.encoder.stages[0][0].weight.mul_(2)
    system.remember(system.memo.cache, fixed_head=True)  # other weights: the old entries are not theirs
    fresh = small_system(1).eval()
    fresh.remember(TensorCache(0), fixed_head=True)
    assert not torch.equal(system.features(made).query.middle, fresh.features(made).query.middle)
    fresh.remember(system.memo.cache, fixed_head=True)
    with torch.no_grad():
        fresh.head.down_query[0].weight.mul_(2)
    other = fresh.predict(made).final
    fresh.remember(system.memo.cache, fixed_head=True)  # another head, too
    assert not torch.equal(fresh.predict(made).final, other)


def test_precision_is_part_of_the_key(tmp_path: Path) -> None:
    """What bf16 computed is no answer in fp32; bits of another type are another content."""
    memo = Memo(TensorCache(2**20, tmp_path), "weights")

    def rows() -> torch.Tensor:
        return memo.rows("part", ["a"], CPU, lambda _: {"x": torch.ones(1, 2, 2) @ torch.full((1, 2, 2), 1.001)})["x"]

    with torch.autocast("cpu", torch.bfloat16):
        low = rows()
    assert low.dtype == torch.bfloat16 and rows().dtype == torch.float32
    x = torch.arange(4, dtype=torch.float32)
    assert digest({"x": x}) != digest({"x": x.view(torch.int32)})


def test_training_keeps_nothing() -> None:
    system = small_system(1).train()
    system.remember(cache := TensorCache(2**30), fixed_head=False)
    system.losses(clip_episode())
    assert cache.size == cache.hits == cache.misses == 0


def test_budget() -> None:
    cache = TensorCache(1000)
    rows = {name: {"x": torch.full((100,), float(i))} for i, name in enumerate("abc")}  # 400 bytes each
    for name in "aab":
        cache.put(name, rows[name])
    assert cache.get("a", CPU) and cache.get("b", CPU) and cache.size == 800
    cache.put("c", rows["c"])
    kept = {name: entry for name in "abc" if (entry := cache.get(name, CPU)) is not None}
    assert len(kept) == 2 and "c" in kept and cache.size == 800
    assert all(torch.equal(entry["x"], rows[name]["x"]) for name, entry in kept.items())
    cache.put("huge", {"x": torch.zeros(1000)})
    assert cache.get("huge", CPU) is None and cache.size == 800
    row = cache.put("row", {"x": torch.zeros(50, 2)[3]})
    assert nbytes(row) == row["x"].untyped_storage().nbytes() == 8  # the batch behind it is let go


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "swapped"])
def test_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    cache = TensorCache(0, tmp_path)
    for name in "ab":
        cache.put(name, {"x": torch.arange(100.0) + ord(name)})
    path, other = cache._path("a"), cache._path("b")
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-5], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "empty": b"",
                      "swapped": other.read_bytes()}[damage])  # fmt: skip
    assert cache.get("a", CPU) is None and cache.get("b", CPU) is not None
    cache.put("a", {"x": torch.arange(100.0)})
    assert torch.equal(cache.get("a", CPU)["x"], torch.arange(100.0))
    assert not [p for p in tmp_path.rglob(".*")]


def test_the_budget_follows_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory(CPU)
    assert 0 < free < 2**44
    assert open_cache(1.5, "", CPU).budget == 3 * 2**29
    monkeypatch.setattr("util.cache.free_memory", lambda _: 800)
    assert open_cache(None, "", CPU).budget == 400 and open_cache(None, "", CPU, 0.25).budget == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert open_cache(None, "", CPU).budget == 100
    monkeypatch.setattr("util.cache.CGROUP", tmp_path)  # a container
    (tmp_path / "memory.max").write_text(f"{2**28 + 7}")
    (tmp_path / "memory.current").write_text("7\n")
    assert free_memory(CPU) == 2**28


def test_a_cache_says_what_it_lacked() -> None:
    cache = TensorCache(500)
    for name in "abcab":  # 400 bytes each
        cache.put(name, {"x": torch.ones(100)})
    assert cache.wanted == 1200 and "Runtime.cache_gb" in cache.verdict()
    fits = TensorCache(1200)
    for name in "abcab":
        fits.put(name, {"x": torch.ones(100)})
    assert fits.verdict() == ""


def test_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Runtime.cache_dir"):
        open_cache(1, str(tmp_path / "file/folder"), CPU)
    cache = TensorCache(1000, tmp_path / "file")  # as if it became unwritable later
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cache.put("a", {"x": torch.ones(3)})["x"], torch.ones(3))
    assert "only reads it" in caplog.text and cache.get("a", CPU) is not None
