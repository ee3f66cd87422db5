"""What every system of the table must do, whoever wrote it: a new one is covered by its line in SYSTEMS.

Data is a hundred scenes of the demo, batches come from the system's own task, widths and sides are small.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import SYSTEMS, System, configure, needs_clip, open_system, system_class
from model.predict.predictor import Predictor
from model.predict.share import export
from model.system import Frozen, Prediction
from model.verify import first_difference, trace_all
from tests.make import CONFIG, ROOT, make, star
from util.config import Config
from util.data.episodes import Batch, collate
from util.errors import UserError
from util.files import load_tensors
from util.report.gallery import gallery
from util.run import checkpoint
from util.run.checkpoint import Progress
from util.run.distributed import Context
from util.run.identity import identity
from util.run.log import RunLog
from util.run.place import Experiment
from util.run.preflight import Start, inspect
from util.score.episodes import FewShotTask
from util.score.open_vocabulary import OpenVocabularyTask
from util.score.table import read_episodes
from util.score.task import How, Task
from util.score.weak import WeakTask
from util.score.zero_shot import ZeroShotTask

CPU = torch.device("cpu")
SIDE = 65
FEW, SOME = 6, 12  # episodes that are evaluated, images of a dense task's list
SMALL = ["Method.backbone_weight=none", "Test_Finetune.test_num=30", "Test_Finetune.seeds=[321]",
         "Data.min_pixels=100", "Train.workers=0"]  # fmt: skip
# Where a task other than few-shot segmentation finds its config, and what is small there. A family of systems adds its line.
KINDS: dict[type, tuple[str, list[str]]] = {
    WeakTask: ("config/demo/demo_weak_vit8.yaml", ["Method.long_side=64", "Method.static_steps=1"]),
    ZeroShotTask: ("config/demo/demo_inductive_vit8.yaml", ["Method.crop=64", "Method.stride=48", "Method.prompts=2"]),
    OpenVocabularyTask: ("config/demo/demo_open_vit8.yaml", ["Method.crop=64", "Method.stride=48"]),
}
FEW_SHOT = [arch for arch, cls in SYSTEMS.items() if issubclass(cls.task, FewShotTask)]


class World:
    """Builds systems on the demo's scenes, each once; what is handed out is a copy."""

    def __init__(self, scenes: Path, folder: Path):
        self.scenes, self.short, self.build = scenes, folder / "short.txt", cache(self._build)
        self.short.write_text("".join((scenes / "list.txt").read_text().splitlines(keepends=True)[:SOME]))

    def file(self, arch: str) -> tuple[str, list[str]]:
        """The config of a system, and what is small there."""
        return KINDS.get(system_class(arch).task, (CONFIG, ["Method.width=8"]))

    def config(self, arch: str, *more: str, side: int = SIDE) -> Config:
        whole = self.scenes / "list.txt"
        data = [f"Data.data_root={self.scenes}", f"Data.train_list={whole}",
                f"Data.val_list={whole if issubclass(system_class(arch).task, FewShotTask) else self.short}"]  # fmt: skip
        sides = [f"Train.train_h={side}", f"Train.val_size={side}"]
        file, small = self.file(arch)
        known = {f.name for f in fields(system_class(arch).Options)}
        own = [text for text in small if text[: text.index("=")].removeprefix("Method.") in known]
        return configure(file, arch, [*SMALL, *data, *sides, *own, *more])

    def test(self, task: Task, count: int) -> tuple[int, Any]:
        """Seed and the first samples of it; a dense task takes all of its list."""
        seed, test = next(iter(task.tests().items()))
        return seed, replace(test, count=count if isinstance(task, FewShotTask) else len(test.data))

    def _build(self, arch: str, shot: int, seed: int, side: int) -> tuple[System, Task]:
        torch.manual_seed(seed)
        return open_system(arch, self.config(arch, f"Train.shot={shot}", side=side))

    def __call__(self, arch: str, shot: int = 1, seed: int = 0, side: int = SIDE) -> tuple[System, Task]:
        system, task = self.build(arch, shot, seed, side)
        return copy.deepcopy(system), task


@pytest.fixture(scope="module")
def world(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for module in ("util.data.source", "model.build"):
            patch.setattr(f"{module}.CACHE", tmp_path_factory.mktemp("cache"))
        yield World(scenes, tmp_path_factory.mktemp("lists"))


every = pytest.mark.parametrize("arch", SYSTEMS)
few_shot = pytest.mark.parametrize("arch", FEW_SHOT)


def batch_of(task: Task, numbers: range = range(2)) -> Batch:
    """Samples of the training, as a step gets them."""
    data = task.training()
    return collate([data[i] for i in numbers])


def trains(system: System) -> bool:
    return any(p.requires_grad for p in system.trained.parameters())


def step(system: System, optimizer: torch.optim.Optimizer, batch: Batch, number: int = 0) -> dict[str, Tensor]:
    losses = system.train().losses(batch, number)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    return losses


def check(prediction: Prediction, batch: Batch, classes: int) -> None:
    """Shapes, types and ranges of everything that programs use."""
    final = prediction.final
    assert final.shape[:2] == (len(batch), classes) and final.ndim == 4
    tensors = {"final": final, "meta": prediction.meta, "base": prediction.base, "votes": prediction.votes}
    for name, value in (tensors | prediction.maps | prediction.variants).items():
        if value is not None:
            assert value.dtype == torch.float32 and not value.requires_grad and torch.isfinite(value).all(), name
            assert len(value) == len(batch)
    assert set(prediction.priors) <= set(prediction.maps)
    for name, value in prediction.maps.items():
        assert value.ndim == 3, name
        if name in prediction.priors:
            assert 0 <= value.min() and value.max() <= 1, name
    assert all(mask.dtype == torch.bool and mask.ndim == 3 for mask in prediction.baselines.values())


@every
def test_a_step_trains_what_is_trained_and_nothing_else(world: World, arch: str) -> None:
    system, task = world(arch)
    batch, config = batch_of(task), world.config(arch)
    if not trains(system):
        with pytest.raises(UserError):
            system.losses(batch)
        return
    trained = {id(p) for p in system.trained.parameters()}
    frozen, buffers = system.frozen_hashes(), {k: v.clone() for k, v in system.state_dict().items() if not k.startswith("head.")}
    optimizer = system.optimizer(config.Train)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= trained
    before = {name: p.detach().clone() for name, p in system.trained.named_parameters()}
    losses = step(system, optimizer, batch)
    assert losses and all(value.dtype == torch.float32 and value.ndim == 0 for value in losses.values())
    assert all(torch.isfinite(value) for value in losses.values()) and sum(losses.values()) > 0
    for name, p in system.named_parameters():
        if id(p) not in trained:
            assert not p.requires_grad and p.grad is None, name
        elif p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name  # one without would stop DDP
    moved = [name for name, p in system.trained.named_parameters() if not torch.equal(p, before[name])]
    assert moved and system.frozen_hashes() == frozen
    assert all(torch.equal(value, system.state_dict()[name]) for name, value in buffers.items())
    assert not any(m.training for child in system.children() if isinstance(child, Frozen) for m in child.modules())


@every
def test_evaluation_and_its_rows(world: World, arch: str, tmp_path: Path) -> None:
    """As test.py does it: through the task, to JSON and back."""
    system, task = world(arch)
    seed, test = world.test(task, FEW)
    with RunLog(tmp_path, main=False) as log:
        scores = task.evaluate(system.eval().predict, test, How(Context(CPU), log, batch=2 if arch in FEW_SHOT else 1))
    assert 0 <= scores.record[task.headline] <= 1 and scores.record["episodes"] == test.count
    assert set(scores.record.get("prior_quality", {})) == set(system.prior_names or ())
    table = task.table({seed: scores})
    back = read_episodes({"episodes": table.to_json()})
    for name in ("seed", "number", "cls", "counts", "query", "spread"):
        assert np.array_equal(getattr(back, name), getattr(table, name)), name
    assert (back.hash, back.dense, len(back)) == (table.hash, table.dense, len(scores.rows))


@every
def test_odd_sizes(world: World, arch: str) -> None:
    system, task = world(arch, side=78)
    if trains(system):
        assert all(torch.isfinite(value) for value in system.train().losses(batch_of(task)).values())
    sample = world.test(task, FEW)[1].data[3]
    prediction = system.eval().predict(sample, baselines=True)
    check(prediction, sample, len(getattr(task, "channels", (0, 1))))
    labels, truth = prediction.decide(0, sample.placed[0]), sample.truth(0)
    assert labels.shape == truth.shape and labels.dtype == torch.int64
    assert 0 <= labels.min() and labels.max() < prediction.final.shape[1]


@every
def test_a_sample_alone_is_what_it_is_in_a_batch(world: World, arch: str) -> None:
    system, task = world(arch)
    both = system.eval().predict(batch_of(task)).final
    for i in range(2):
        alone = system.predict(batch_of(task, range(i, i + 1))).final
        torch.testing.assert_close(alone[0], both[i], rtol=1e-3, atol=1e-4)


@every
def test_bf16_is_fp32_but_for_rounding(world: World, arch: str) -> None:
    system, task = world(arch)
    batch = batch_of(task)
    plain = system.eval().predict(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = system.predict(batch)
    check(rough, batch, plain.final.shape[1])
    assert (rough.final.softmax(1) - plain.final.softmax(1)).abs().mean() < 0.01
    if trains(system):
        torch.manual_seed(1)
        losses = system.train().losses(batch)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            rough_losses = system.losses(batch)
        assert all(value.dtype == torch.float32 for value in rough_losses.values())
        torch.testing.assert_close(sum(rough_losses.values()), sum(losses.values()), rtol=0.05, atol=0)


def tampered(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """States that do not fit: one tensor is missing, surplus, of another shape."""
    name = max(state, key=lambda key: state[key].numel())
    return {"missing": {k: v for k, v in state.items() if k != name}, "surplus": state | {"extra.weight": torch.zeros(1)},
            "shape": state | {name: state[name].flatten()[:-1]}}  # fmt: skip


def check_refused(load: Callable[[dict[str, Tensor], str], Any], system: System, state: dict[str, Tensor]) -> None:
    """Every tampered state is refused with its name, and nothing of it is taken over."""
    before = {key: value.clone() for key, value in system.state_dict().items()}
    for wrong in tampered(state).values():
        wrong = {k: torch.zeros_like(v) for k, v in wrong.items()}
        with pytest.raises(UserError, match="FILE.*nothing was loaded"):
            load(wrong, "FILE")
        assert all(torch.equal(value, before[key]) for key, value in system.state_dict().items())


@every
def test_saved_weights_are_loaded_whole_or_not_at_all(world: World, arch: str, tmp_path: Path) -> None:
    (system, task), (other, _) = world(arch), world(arch, seed=1)
    file, meta = tmp_path / "best.safetensors", identity(arch, system.facts, world.config(arch))
    if not system.trained_state():
        return
    checkpoint.save_weights(file, system.trained_state(), meta)
    checkpoint.check_identity(file, checkpoint.read_meta(file), meta)
    frozen = {k: v for k, v in system.state_dict().items() if not k.startswith("head.")}
    other.load_state_dict(frozen, strict=False)
    batch = batch_of(task)
    expected = system.eval().predict(batch).final
    assert not torch.equal(other.eval().predict(batch).final, expected)
    other.load_trained(load_tensors(file), "FILE")
    assert torch.equal(other.predict(batch).final, expected)
    check_refused(other.load_trained, other, system.trained_state())


@every
def test_published_names(world: World, arch: str) -> None:
    """Each tensor has a name of its own in the published checkpoint, which goes in whole or not at all."""
    system, _ = world(arch)
    if not trains(system):
        return
    own = {ours: name for ours in system.state_dict() if (name := system.official_name(ours)) is not None}
    assert len(set(own.values())) == len(own)
    state = {own[k]: v + 1 if v.is_floating_point() else v for k, v in system.state_dict().items() if k in own}
    wanted = {ours: state[name].clone() for ours, name in own.items()}
    system.import_official({f"module.{name}": value for name, value in state.items()})
    assert all(torch.equal(system.state_dict()[ours], value) for ours, value in wanted.items())
    check_refused(system.import_official, system, state)


@every
def test_resumed_training_is_the_same_to_the_bit(world: World, arch: str, tmp_path: Path) -> None:
    """Two steps, a resume point, a third; against a fresh system that goes on from the point."""
    system, task = world(arch)
    if not trains(system):
        return
    batch, train = batch_of(task), world.config(arch).Train
    torch.manual_seed(3)
    optimizer = system.optimizer(train)
    for number in range(2):
        step(system, optimizer, batch, number)
    checkpoint.save_resume(tmp_path, system.trained_state(), {}, optimizer, checkpoint.rng_state(CPU), Progress(step=2))
    step(system, optimizer, batch, 2)
    other, _ = world(arch)
    torch.manual_seed(4)
    _, weights, state, damaged = checkpoint.load_resume(tmp_path)
    other.load_trained(weights, "point")
    again = other.optimizer(train)
    again.load_state_dict(state["optimizer"])
    checkpoint.set_rng_state(state["rng"], CPU)
    step(other, again, batch, Progress(**state["progress"]).step)
    theirs, ours = other.trained_state(), system.trained_state()
    assert not damaged and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for name in ("param_groups", "state"):
        assert repr(again.state_dict()[name]) == repr(optimizer.state_dict()[name])


@every
def test_verify_and_gallery_see_what_is_scored(world: World, arch: str, tmp_path: Path) -> None:
    """Under bf16, and where shots vote with two of them."""
    system, task = world(arch, 2 if arch in FEW_SHOT else 1)
    _, test = world.test(task, 2)
    context = Context(CPU, precision="bf16")
    with RunLog(tmp_path, main=False) as log:
        rows = [row for row in task.evaluate(system.eval().predict, test, How(context, log)).rows if row.number == 1]
    first, second = trace_all(system, test.data, 2, context)[1], trace_all(system, test.data, 2, context)[1]
    assert first_difference(first, second) == (None, True) and [*first][0] == "data" and len(first) >= 3
    pixels, card = first["metric"]["pixels"], gallery(system, test.data, {"": [1]}, task.names.names, context)[0]
    if arch in FEW_SHOT:
        assert pixels == [*rows[0].counts] and card.title.endswith(f"IoU {100 * rows[0].counts.iou:.1f}")
        return
    counts = dict(zip(task.channels, np.array(pixels).reshape(-1, 2)[::-1].tolist(), strict=True))
    assert {row.cls: [*row.counts[:2]] for row in rows} == {c: n for c, n in counts.items() if n[1] and c in task.classes}
    assert card.title.endswith(f"IoU {100 * np.mean([i / u for i, u in counts.values() if u]):.1f}")


@few_shot
def test_several_shots(world: World, arch: str) -> None:
    (_, one), (system, task) = world(arch), world(arch, 2)
    batch = batch_of(task)
    if trains(system):
        assert all(torch.isfinite(value) for value in system.train().losses(batch).values())
    prediction = system.eval().predict(batch)
    check(prediction, batch, 2)
    assert prediction.votes is None or prediction.votes.shape[:3] == (2, 2, 2)
    with pytest.raises(UserError, match="1 shots.*built for 2"):
        system.predict(batch_of(one))


@pytest.mark.parametrize("arch", [arch for arch in FEW_SHOT if SYSTEMS[arch].facts.trained])
def test_an_exported_file_finds_the_same(world: World, arch: str, scenes: Path, tmp_path: Path) -> None:
    _, snapshot = make(tmp_path, arch)
    export(snapshot, tmp_path / "shared.safetensors")
    images, masks = star(scenes)
    found = []
    for file in (snapshot, tmp_path / "shared.safetensors"):
        predictor = Predictor.from_checkpoint(file, device="cpu")
        predictor.set_support(images[0], masks[0], "star")
        found.append(predictor.predict(images[1]))
    assert np.array_equal(found[0].score, found[1].score) and found[0].score.std() > 0


@every
def test_a_line_in_the_table_is_all_that_a_check_before_the_start_asks_for(
    world: World, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the table knows a system by its name: under another one it passes too."""
    monkeypatch.setitem(SYSTEMS, "Another", SYSTEMS[arch])
    cls, made = SYSTEMS[arch], world.config(arch)
    config = world.config("Another", "Train.before=run", f"CLIP.clip_size={made.CLIP.clip_size}", "Train.batch_size_val=1")
    place = Experiment.from_config_path("Another", world.file("Another")[0], config.Runtime.output)
    start = Start(config, place, cls.facts, cls.task, needs_clip("Another", config))
    assert [finding for finding in inspect(start, read=True) if not finding.ok] == []
