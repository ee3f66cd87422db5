"""Several processes (gloo, CPU) give what one gives: the same weights after training, the same counts in evaluation."""

import os
import signal
from pathlib import Path

import pytest
import torch

from model.few_shot.bam import BAM
from model.few_shot.hdmnet import HDMNet
from model.few_shot.pfenet import PFENet
from model.few_shot.system import FewShot
from model.ops import Dropout
from model.predict.text_predictor import choose_precision
from model.system import Prediction
from tests.make import only, random_episode, small_system
from tests.make.runs import CPU, in_processes
from util.config import Runtime, Train
from util.data.episodes import Episode, EpisodeDataset, EpisodeList
from util.data.folds import fold, read_class_names
from util.data.index import Record, build_index, scan
from util.data.loading import RangeSampler
from util.data.transforms import ValTransform
from util.errors import UserError
from util.run import distributed
from util.run.distributed import Context, Termination
from util.run.log import RunLog
from util.score.episodes import evaluate_episodes
from util.score.task import How

SYSTEMS = [HDMNet, BAM, PFENet]


def three_steps(context: Context) -> list[dict[str, torch.Tensor]]:
    """Each system after three training steps on global batches of four 2-shot episodes, in float64."""
    return [_three_steps(cls, context) for cls in SYSTEMS]


def _three_steps(cls: type[FewShot], context: Context) -> dict[str, torch.Tensor]:
    system = small_system(2, system=cls).double().train()
    optimizer = system.optimizer(Train(base_lr=1e-2))
    torch.manual_seed(5)
    if context.world > 1:
        system.distribute(CPU)
    for step in range(3):
        batch = random_episode(batch=12, shot=2)
        batch.query_mask[:, : 20 * step] = 255  # ranks see different numbers of labelled pixels
        batch.query_mask[::3] = 255
        rows = next(iter(RangeSampler(4 * step, 4 * step + 4, 4, context, drop_last=True)))
        optimizer.zero_grad()
        sum(system.losses(only(batch, rows)).values()).backward()
        optimizer.step()
    return {name: value for name, value in system.trained_state().items() if value.is_floating_point()}


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone, together = three_steps(Context(CPU)), in_processes(2, tmp_path, three_steps)
    for cls, one, *two in zip(SYSTEMS, alone, *together, strict=True):
        start = small_system(2, system=cls).double().trained_state()
        assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)  # it did train
        for name in one:
            for other in two:
                torch.testing.assert_close(other[name], one[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_of_a_batch_is_that_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dropout = torch.ones(6, 5, 3, 3), Dropout(0.4)
    torch.manual_seed(0)
    whole = dropout(x)
    assert 0.4 < (whole > 0).float().mean() < 0.8 and whole.max() == 1 / 0.6
    for rank in range(3):
        monkeypatch.setattr("model.ops.processes", lambda rank=rank: (rank, 3))
        torch.manual_seed(0)
        assert torch.equal(dropout(x[:2]), whole[2 * rank : 2 * rank + 2])
    monkeypatch.undo()
    by_channel = Dropout(0.4, channels=True)(x).flatten(2)
    assert (by_channel == by_channel[..., :1]).all() and 0 < (by_channel == 0).float().mean() < 1
    assert torch.equal(Dropout(0.4).eval()(x), x)


class Evaluate:
    """Episodes over a folder of images; the prediction is a made-up function of each query."""

    def __init__(self, root: Path, records: list[Record], folder: Path, batch: int):
        self.root, self.records, self.folder, self.batch = root, records, folder, batch

    def __call__(self, context: Context) -> dict:
        f = fold("pascal", 0)
        episodes = EpisodeList(build_index(self.records, f.novel, False, 500), 1, seed=3)
        data = EpisodeDataset(episodes, f, self.root, ValTransform(65, squash=True), num_classes=20, clip_size=None, patch=1,
                              evaluation=True)  # fmt: skip

        def predict(episode: Episode) -> Prediction:
            guess = (episode.query[:, 0] > 128 + 40 * (episode.number % 3)[:, None, None]).float()
            return Prediction(torch.stack([1 - guess, guess], 1), maps={"vtp": episode.query[:, 0] / 255}, priors=("vtp",))

        with RunLog(self.folder, "log", main=context.main) as log:
            found = evaluate_episodes(predict, data, 11, f, How(context, log, self.batch))
        scores, rows = found.record, found.rows
        return {"miou": scores["miou"], "fb_iou": scores["fb_iou"], "priors": scores["prior_quality"],
                "rows": [[r.number, r.cls, *r.counts, *r.spread] for r in rows]}


def test_sharded_evaluation_counts_the_same(tmp_path: Path, block, write_voc) -> None:
    """11 episodes among three processes: some get fewer than others."""
    labels = {f"im{i}": block((50, 40 + i), (1 + i % 2, 900)) for i in range(7)}
    root, _ = write_voc(labels)
    records = [Record(f"JPEGImages/{n}.jpg", f"SegmentationClassAug/{n}.png", *x.shape, {int(x.flat[0]): 900}, (int(x.flat[0]),))
               for n, x in labels.items()]  # fmt: skip
    one = Evaluate(root, records, tmp_path, batch=4)(Context(CPU))
    assert [row[0] for row in one["rows"]] == list(range(11)) and 0 < one["miou"] < 1 and len(one["priors"]["vtp"]) == 9
    for found in in_processes(3, tmp_path, Evaluate(root, records, tmp_path, batch=2)):
        assert found == one


def disagree(context: Context) -> str:
    try:
        context.agree({"code": "same", "data": f"of {context.rank}"})
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.slow
def test_processes_with_other_data_are_stopped(tmp_path: Path) -> None:
    for found in in_processes(2, tmp_path, disagree):
        assert "data (process 1: of 1, process 0: of 0)" in found and "code" not in found


def test_labels_are_read_in_parallel_after_a_handler_was_set(tmp_path: Path, block, write_voc) -> None:
    """A handler for SIGTERM that workers inherit would keep a pool of them from ending."""
    root, list_file = write_voc({f"im{i}": block((8, 8), (1, 5)) for i in range(1000)})
    names = read_class_names(Path(__file__).parents[1] / "lists/pascal/classes.txt")
    with Termination(Context(CPU)) as termination:
        for attempt in range(3):
            assert len(scan(root, list_file, names, tmp_path / str(attempt), workers=2)) == 1000
        assert not termination.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_batch_that_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="global batch of 8 .* 3 processes"):
        RangeSampler(0, 10, 8, Context(CPU, 0, 3), drop_last=True)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_needs_a_processor_that_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512 a convolution in bf16 takes some 100 times as long as in fp32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    threads = torch.get_num_threads()
    asked = Runtime(precision="bf16", threads=threads)
    if has:
        assert distributed.start(0, asked).precision == choose_precision("bf16", torch.device("cpu")) == "bf16"
        return
    with pytest.raises(UserError, match="Runtime.precision=bf16: this processor has no fast bfloat16.*use fp32"):
        distributed.start(0, asked)
    with pytest.raises(UserError, match="precision bf16: this processor has no fast bfloat16"):
        choose_precision("bf16", torch.device("cpu"))
    assert choose_precision(None, torch.device("cpu")) == "fp32"
