"""Broken files, dead and hanging workers, poisoned losses: named, counted, never silent, never waited for."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import test as tester
from model import configure
from model.system import Prediction
from model.verify import trace_all
from util.data.episodes import EpisodeDataset, EpisodeList
from util.data.folds import fold
from util.data.index import Record, build_index
from util.data.loading import FAR, Loader, RangeSampler
from util.data.transforms import ValTransform
from util.errors import UserError
from util.run.distributed import Context
from util.run.log import RunLog
from util.score.episodes import FewShotTask, evaluate_episodes
from util.score.task import How

CPU = torch.device("cpu")


@pytest.fixture
def data(block, write_voc) -> EpisodeDataset:
    """Eight images of two classes."""
    labels = {f"im{i}": block((50, 40 + i), (1 + i % 2, 900)) for i in range(8)}
    root, _ = write_voc(labels)
    records = [Record(f"JPEGImages/{n}.jpg", f"SegmentationClassAug/{n}.png", *x.shape, {int(x.flat[0]): 900}, (int(x.flat[0]),))
               for n, x in labels.items()]  # fmt: skip
    f = fold("pascal", 0)
    return EpisodeDataset(EpisodeList(build_index(records, f.novel, False, 500), 1, seed=3), f, root,
                          ValTransform(65, squash=True), num_classes=20, clip_size=None, patch=1, evaluation=True)  # fmt: skip


def numbers(data: EpisodeDataset, folder: Path, workers: int = 0, **options) -> tuple[list[int], Loader]:
    """Episode numbers of a pass over 12 episodes in batches of 4."""
    with RunLog(folder, "log", quiet=True) as log:
        loader = Loader(data, RangeSampler(0, 12, 4, Context(CPU), drop_last=False), workers, CPU, log.warning, **options)
        return [int(n) for batch in loader for n in batch.number], loader


def broken(data: EpisodeDataset, stem: str) -> list[int]:
    """Removes an image; the numbers of the episodes that need it."""
    name = f"JPEGImages/{stem}.jpg"
    (data.root / name).unlink()
    records = data.episodes.index.records
    specs = [data.episodes.spec(i) for i in range(12)]
    return [s.number for s in specs if name in [records[p].image for p in (s.query, *s.supports)]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_file(data: EpisodeDataset, tmp_path: Path, workers: int) -> None:
    lost = broken(data, "im3")
    assert 0 < len(lost) < 12
    with pytest.raises(UserError) as error:
        numbers(data, tmp_path, workers)
    assert "im3.jpg" in str(error.value) and "Traceback" not in str(error.value)
    found, loader = numbers(data, tmp_path, workers, on_error="skip")
    assert found == [n for n in range(12) if n not in lost]
    assert [f.number for f in loader.skipped] == lost and all("im3.jpg" in f.message for f in loader.skipped)
    assert (tmp_path / "log").read_text().count("im3.jpg") == len(lost)
    first, _ = numbers(data, tmp_path, workers, on_error="skip", training=True)
    assert len(first) == 12 and [n for n in first if n < FAR] == found  # full batches, the rest in place
    assert numbers(data, tmp_path, 2 - workers, on_error="skip", training=True)[0] == first


def test_skipped_episodes_are_counted(data: EpisodeDataset, tmp_path: Path) -> None:
    lost = broken(data, "im3")

    def predict(episode):
        guess = (episode.query[:, 0] > 128).float()
        return Prediction(torch.stack([1 - guess, guess], 1))

    with RunLog(tmp_path, "log", quiet=True) as log:
        found = evaluate_episodes(predict, data, 12, data.fold, How(Context(CPU), log, batch=2, on_error="skip"))
    scores, rows = found.record, found.rows
    assert scores["episodes"] == len(rows) == 12 - len(lost) and len(scores["skipped"]) == len(lost)


def test_nothing_but_broken_files(data: EpisodeDataset, tmp_path: Path) -> None:
    for image in (data.root / "JPEGImages").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="samples in a row"):
        numbers(data, tmp_path, on_error="skip", training=True)


class Dying(EpisodeDataset):
    def __getitem__(self, i: int):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_dead_worker_ends_the_run(data: EpisodeDataset, tmp_path: Path, capsys) -> None:
    from util import cli

    data.__class__ = Dying
    started = time.monotonic()
    with pytest.raises(SystemExit) as code:
        cli.run(lambda: numbers(data, tmp_path, 2))
    assert code.value.code == 1 and time.monotonic() - started < 60
    said = capsys.readouterr().err
    assert "worker process was killed" in said and "Train.workers=0" in said and "Traceback" not in said


def test_a_missing_image_moves_no_episode(block, write_voc, tmp_path: Path, monkeypatch, caplog) -> None:
    """Missing before the lists are read: episodes are drawn over the full list, and those with the image are left out."""
    monkeypatch.chdir(Path(__file__).parents[1])
    root, file = write_voc({f"im{c}_{i}": block((60, 50), (c, 2500)) for c in range(1, 21) for i in range(3)})

    def task() -> FewShotTask:
        lists = [f"Data.{key}={file}" for key in ("train_list", "val_list")]
        sizes = ["Train.val_episodes=40", "Train.val_size=65", "Train.train_h=65", "Data.on_error=skip"]
        config = configure("config/pascal/pascal_split0_resnet50.yaml", "PFENet", [f"Data.data_root={root}", *lists, *sizes])
        return FewShotTask(config, tmp_path / "cache")

    def drawn(test) -> list[list[str]]:
        records = test.data.episodes.index.records
        specs = [test.data.episodes.spec(i) for i in range(test.count)]
        return [[records[p].image for p in (spec.query, *spec.supports)] for spec in specs]

    before, lost = drawn(task().validation()), "JPEGImages/im1_0.jpg"
    (root / lost).unlink()
    (root / "JPEGImages/im20_1.jpg").write_bytes(b"half")  # of a base class
    test = task().validation()
    assert drawn(test) == before and caplog.text.count("left out: ") == 2
    with RunLog(tmp_path, "log", quiet=True) as log:
        how = How(Context(CPU), log, on_error="skip")
        found = task().evaluate(lambda e: Prediction(torch.rand(len(e), 2, 65, 65)), test, how)
    missed = [i for i, names in enumerate(before) if lost in names]
    assert missed and [row.number for row in found.rows] == [i for i in range(40) if i not in missed]
    assert [int(text.partition(":")[0]) for text in found.record["skipped"]] == missed
    (said,) = tester.skipped([{"seed": 1} | found.record], "episodes")
    assert said.startswith(f"{len(missed)} of the 40 episodes") and lost in said and "more" not in said
    assert missed[0] == 0 and trace_all(None, test.data, 1, Context(CPU)) == [{}]
    trained = {record.image for record in task().training().episodes.index.records}
    assert len(trained) == 44 and "JPEGImages/im20_1.jpg" not in trained  # of 15 base classes

    (root / "SegmentationClassAug/im1_1.png").unlink()
    assert len(task().training().episodes.index.records) == 44
    with pytest.raises(UserError, match=r"(?s)im1_1\.png.*cannot be drawn.*take the lines out"):
        task().validation()
