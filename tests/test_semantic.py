"""Dense data from files to a batch: label values, folds without novel classes, valid boxes, image-level labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model import Prediction, configure
from tests.make import ROOT
from util.data.episodes import collate
from util.data.folds import fold_of, read_label_table
from util.data.index import Record
from util.data.semantic import Images, SemanticDataset, box_of
from util.data.transforms import TrainTransform, ValTransform
from util.errors import UserError
from util.run.distributed import Context
from util.run.log import RunLog
from util.score.semantic import BaseTask, image_rows
from util.score.task import How

PASCAL = ROOT / "config/pascal/pascal_split0_resnet50.yaml"


def test_a_table_from_values_to_classes(tmp_path: Path) -> None:
    """ADE20K's rule (0 does not count, value v is class v) and COCO-Stuff's gaps; what is not named becomes no class."""
    file = tmp_path / "table.yaml"
    file.write_text("0: 255\n1: 1\n2: 2\n")
    table = read_label_table(file, 2)
    assert table.dtype == np.uint8 and table[:3].tolist() == [255, 1, 2] and (table[3:255] > 2).all() and table[255] == 255
    file.write_text("0: 0\n10: 1\n12: 2\n200: 1\n")
    assert read_label_table(file, 2)[[0, 10, 11, 12, 200]].tolist() == [0, 1, 11, 2, 1]


@pytest.mark.parametrize("text", ["1: 3", "256: 1", "1: -1", "a: 1", "1: true", "[1, 2]", "1.5: 1"])
def test_wrong_tables(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(UserError, match=r"table\.yaml: expected lines `VALUE: CLASS`"):
        read_label_table(tmp_path / "table.yaml", 2)
    with pytest.raises(UserError, match="cannot be read"):
        read_label_table(tmp_path / "none.yaml", 2)


def test_the_table_is_applied_wherever_labels_are_read(block, write_voc, tmp_path: Path) -> None:
    """In counts of the list, image-level labels, training labels and the truth at file size."""
    root, file = write_voc({"a": block((50, 60), (100, 1200), (7, 900)), "b": block((40, 44), (7, 800))})
    (tmp_path / "table.yaml").write_text("0: 0\n7: 8\n100: 6\n")
    config = configure(PASCAL, "PSPNet", [
        f"Data.data_root={root}", f"Data.train_list={file}", f"Data.val_list={file}", f"Data.label_table={tmp_path}/table.yaml",
        f"Data.class_names={ROOT}/lists/pascal/classes.txt", "Train.val_size=65"])  # fmt: skip
    task = BaseTask(config, tmp_path / "cache")
    assert [record.pixels for record in task.records("val_list")] == [{6: 1200, 8: 900}, {8: 800}]
    sample = task.validation().data[0]
    assert sample.present[0].nonzero().flatten().tolist() == [5, 7]
    channels = {task.channels.index(6), task.channels.index(8)}
    assert set(sample.truth(0).unique().tolist()) == {0, 255} | channels
    assert set(sample.label.unique().tolist()) <= {0, 255} | channels and int((sample.truth(0) == 255).sum()) == 1


def test_a_fold_without_novel_classes_sees_all(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "folds.yaml").write_text("split0: []\nsplit1: [b]\n")
    given = ["Train.data_set=mine", f"Data.class_names={tmp_path}/classes.txt"]
    full, part = (fold_of(configure(PASCAL, "PSPNet", [*given, f"Train.split={split}"])) for split in range(2))
    assert (full.base, full.novel, full.num_classes) == ((1, 2, 3), (), 3)
    assert (part.base, part.novel) == ((1, 3), (2,))


def images(root: Path, shapes: dict[str, tuple[int, int]], transform, evaluation: bool) -> SemanticDataset:
    records = [Record(f"JPEGImages/{name}.jpg", f"SegmentationClassAug/{name}.png", *hw, {6: 900}, (6,))
               for name, hw in shapes.items()]  # fmt: skip
    return SemanticDataset(records, {6: 1}, 20, root, transform, seed=3, evaluation=evaluation)


def test_valid_boxes(block, write_voc) -> None:
    """The box that shows the image: all of it when resized, less than the crop where the crop reaches beyond."""
    shapes = {"wide": (40, 90), "tall": (90, 40)}
    root, _ = write_voc({name: block(hw, (6, 900)) for name, hw in shapes.items()})
    batch = collate([images(root, shapes, ValTransform(65, squash=True), evaluation=True)[i] for i in range(2)])
    assert batch.valid.tolist() == [[0, 65, 0, 65]] * 2 and batch.present.shape == (2, 20)
    boxed = images(root, shapes, ValTransform(65, squash=False), evaluation=True)
    assert boxed[0].valid.tolist() == [[0, 24, 0, 64]] and boxed[1].valid.tolist() == [[0, 64, 0, 24]]  # multiples of 8
    crops = images(root, shapes, TrainTransform(80, 0.7, 0.8, crop=True, rotate=(0, 0)), evaluation=False)
    for i in range(8):
        top, bottom, left, right = crops[i].valid[0].tolist()
        inside = torch.zeros(80, 80, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert 0 < inside.sum() < 80 * 80 and (crops[i].label[0][~inside] == 255).all()
    assert box_of(np.zeros((3, 4), bool)) == (0, 0, 0, 0)


def test_each_pass_of_a_training_has_every_image_once(block, write_voc) -> None:
    shapes = {str(i): (40, 40 + i) for i in range(7)}
    root, _ = write_voc({name: block(hw, (6, 900)) for name, hw in shapes.items()})
    data = images(root, shapes, TrainTransform(40, 0.9, 1.1), evaluation=False)
    passes = [[int(data[7 * k + i].number) for i in range(7)] for k in range(2)]
    assert [sorted(one) for one in passes] == [[*range(7)]] * 2 and passes[0] != passes[1]
    assert torch.equal(data[3].image, data[3].image)


def test_background_is_no_object() -> None:
    """Of a class predicted on background nothing lies on others; the class with most of its pixels is named."""
    state = torch.tensor([[50, 6, 4], [0, 20, 9], [0, 3, 10]])  # truth, prediction: background, class 4, class 7
    rows = {row.cls: row for row in image_rows(3, state, (0, 4, 7))}
    assert rows[4].spread == (29, 3, 7) and rows[7].spread == (23, 9, 4) and rows[0].spread == (50, 0, 0)
    assert rows[4].counts == (20, 38, 102 - 38, 102 - 20) and rows[4].number == rows[4].query == 3


def test_images_that_cannot_be_read_are_not_counted(block, write_voc, tmp_path: Path) -> None:
    """Data.on_error=skip: an image that was missing before the list was read, like one that vanished later."""
    root, file = write_voc({name: block((40, 44), (6, 800)) for name in "abcd"})
    config = configure(PASCAL, "PSPNet", [
        f"Data.data_root={root}", f"Data.train_list={file}", f"Data.val_list={file}", "Data.on_error=skip", "Train.val_size=65",
        f"Data.class_names={ROOT}/lists/pascal/classes.txt"])  # fmt: skip
    (root / "JPEGImages/b.jpg").unlink()
    task = BaseTask(config, tmp_path / "cache")
    test = task.validation()
    (root / "JPEGImages/d.jpg").unlink()

    def predict(batch: Images) -> Prediction:
        return Prediction(torch.nn.functional.one_hot(batch.label.long().clamp(max=15), 16).movedim(3, 1).float())

    with RunLog(tmp_path, "log", quiet=True) as log:
        found = task.evaluate(predict, test, How(Context(torch.device("cpu")), log, on_error="skip"))
    assert found.record["episodes"] == 2 and len(found.record["skipped"]) == 2 and {row.number for row in found.rows} == {0, 2}
    assert [record.image[-5] for record in task.training().records] == ["a", "c"]
