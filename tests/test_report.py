"""What people see of a run: the report, its pictures, the log."""

import io
import json
import re
import sys

import numpy as np
import pytest

from tests.make.reports import NAMES, card, result, self_contained
from util import cli
from util.report.__main__ import main
from util.report.summary import summarise
from util.report.viz import COLOURS, contact_sheet, error_map, heatmap, overlay
from util.report.write import choose, text_table, write_report
from util.run.log import RunLog


def test_summarise():
    mean, sd = summarise([{"seed": 1, "episodes": 9, "miou": 0.2}, {"seed": 2, "episodes": 9, "miou": 0.4}])
    assert mean == {"miou": pytest.approx(0.3)}
    assert sd == {"miou": pytest.approx(0.02**0.5)}  # ddof 1
    assert summarise([{"seed": 1, "miou": 0.2}])[1] == {"miou": 0}


def test_report_is_whole_and_self_contained(tmp_path):
    given = result(baselines={"all foreground": {"miou": 0.123}}, time={"seconds": 12.5})
    page = write_report(tmp_path, given, [card("best"), card("worst")]).read_text()
    for text in ("aeroplane", "bicycle &lt;b&gt;", "bird", "&lt;query&gt;.jpg", "all foreground", "12.3", "vocabulary"):
        assert text in page
    assert "51.0 <small>± 1.00</small>" in page  # mIoU: 50, 51, 52
    assert self_contained(page)
    assert page.count("data:image/jpeg") == 12
    assert 'role="alert"' not in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gallery.json", "gallery.png", "report.html", "report.json"]
    write_report(tmp_path, given, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]  # no pictures of another run


def test_json_round_trips(tmp_path):
    given = result()
    write_report(tmp_path, given, [])
    back = json.loads((tmp_path / "report.json").read_text())
    assert back["classes"] == {str(k): v for k, v in NAMES.items()}
    assert back["seeds"][2]["per_class"]["3"] == pytest.approx(0.62)
    assert back["mean"] == pytest.approx(given["mean"]) and back["sd"] == pytest.approx(given["sd"])
    assert back["seeds"][0]["base_miou"] is None and "base_miou" not in back["mean"]  # NaN is no JSON and no score
    write_report(tmp_path / "again", back, [])
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == back


@pytest.mark.parametrize("seeds", [1, 3])
def test_disqualified_scores_are_marked_everywhere(tmp_path, seeds):
    given = result(seeds, warnings=["CLIP weights are random & untrained"], mark="[random CLIP]",
                   baselines={"all foreground": {"miou": 0.123, "fb_iou": 0.3}})
    page = write_report(tmp_path, given, [card("best")]).read_text()
    assert "CLIP weights are random &amp; untrained" in page and 'role="alert"' in page
    body = page.split("<main>")[1]
    blocks = re.findall(r'<tr.*?</tr>|<div class="tile box">.*?</div></div>|<article.*?</article>', body, re.S)
    scored = [block for block in blocks if re.search(r">\d+\.\d|<article", block)]
    assert len(scored) == 4 + 4 + 2 + 1 + (3 if seeds > 1 else 0)  # tiles, classes, baselines, card, seeds
    assert all('class="mark"' in block for block in scored)
    scored = [line for line in text_table(given).splitlines() if re.search(r"\d\.\d", line)]
    assert len(scored) == 3 + 4 + 1 and all(line.endswith("[random CLIP]") for line in scored)
    assert "[random" not in text_table(result())


def test_contents_and_parts(tmp_path):
    """Every entry of the contents leads to a part that folds; below its own baselines a result says so."""
    given = result(baselines={"everything foreground": {"miou": 0.6, "fb_iou": 0.4}})
    page = write_report(tmp_path, given, [card("best")]).read_text()
    assert re.findall(r'<a href="#([^"]+)"', page) == re.findall(r'<details class="part" id="([^"]+)"', page)
    assert "below its own baselines" in page and "everything foreground (60.0)" in page
    assert text_table(given).startswith("WARNING: with mIoU 51.0 this system")
    assert "below its own" not in text_table(result(baselines={"a": {"miou": 0.4}}))


def leak_free_result(**extra) -> dict:
    return result(
        protocol={"name": "pi-clip", "resize": "squash"}, protocol_hash="c0ffee", interval={"miou": [0.481, 0.533]},
        leak_free={"mean": {"miou": 0.412, "fb_iou": 0.6}, "sd": {"miou": 0.004, "fb_iou": 0.001},
                   "differences": ["text vocabulary: target instead of <present>", "weights: last epoch"]}, **extra)  # fmt: skip


def test_interval_protocol_and_leak_free_scores_are_shown(tmp_path):
    lines = text_table(leak_free_result()).splitlines()
    assert lines[1] == "  protocol pi-clip (c0ffee)"
    assert next(line for line in lines if line.startswith("  mIoU")).endswith("51.00 ±  1.00  95 %: 48.10 to 53.30")
    leak_free = [line for line in lines if line.startswith("  leak-free")]
    assert re.search(r"mIoU +41\.20 ±  0\.40  \(text vocabulary: .* <present>; weights: last epoch\)$", leak_free[0])
    assert re.search(r"FB-IoU +60\.00 ±  0\.10$", leak_free[1]) and len(leak_free) == 2
    page = write_report(tmp_path, leak_free_result(), []).read_text()
    for text in ("protocol pi-clip (c0ffee)", "95 %: 48.10 to 53.30", "Without leaks", "41.20", "-9.80", "of &lt;present&gt;"):
        assert text in page
    plain_page = write_report(tmp_path, result(), []).read_text()
    assert not any(text in plain_page for text in ("Without leaks", "95 %", "protocol pi-clip"))
    page = write_report(tmp_path, leak_free_result(mark="[random CLIP]"), []).read_text()
    block = page.split("Without leaks")[1].split("</table>")[0]
    assert block.count('class="mark"') == 4  # two scores, both ways
    lines = text_table(leak_free_result(mark="[random CLIP]")).splitlines()
    assert all(line.endswith("[random CLIP]") for line in lines if re.search(r"\d\.\d", line))


def test_compare_command(tmp_path, monkeypatch, capsys):
    counts = {"hash": "abc", "columns": "seed number class intersection union background_intersection background_union"}
    files = {}
    for name, hits in {"a": 40, "b": 60}.items():
        rows = [f"{s} {i} {1 + i % 3} {hits + i} 100 90 120" for s in range(3) for i in range(30)]
        write_report(tmp_path / name, leak_free_result(episodes=counts | {"rows": rows}), [])
        files[name] = tmp_path / name / "report.json"
    other = json.loads(files["b"].read_text()) | {"shot": 5}
    files |= {name: tmp_path / f"{name}.json" for name in ("other", "old", "text", "missing")}
    files["other"].write_text(json.dumps(other))
    files["old"].write_text(json.dumps(result(), default=str))
    files["text"].write_text("{")

    def run(a: str, b: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["report", "compare", str(files[a]), str(files[b])])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        return int(end.value.code), "".join(capsys.readouterr())

    code, text = run("a", "b")
    assert code == 0 and "+20.00 points" in text and text.endswith(": significant\n")
    assert run("a", "a")[0] == 0
    code, text = run("a", "other")
    assert code == 1 and "shot: 1 and 5" in text
    for name, says in {"old": "older reports", "text": "no valid JSON", "missing": "cannot be read"}.items():
        code, text = run("a", name)
        assert code == 2 and str(files[name]) in text and says in text


def test_page_stays_small(tmp_path):
    cards = [card("best", side=473) for _ in range(25)]  # noise, the worst case for JPEG
    assert 1_000_000 < write_report(tmp_path, result(), cards).stat().st_size < 10_000_000


def test_missing_keys_are_named(tmp_path):
    given = result()
    del given["protocol"]
    with pytest.raises(ValueError, match="protocol"):
        write_report(tmp_path, given, [])


def test_choose():
    ious = [0.5, 0.9, 0.1, 0.7, 0.3, 0.6, 0.2]
    assert choose(ious, 2) == {"best": [1, 3], "median": [5, 0], "worst": [2, 6]}
    picked = sum(choose(ious[:5], 3).values(), [])
    assert len(picked) == len(set(picked)) == 3


def test_pictures_paint_what_the_masks_say():
    image = np.full((20, 30, 3), 100, np.uint8)
    truth, pred = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    truth[:10, :10], pred[5:15, :10], truth[:, 25:] = 1, 1, 255
    errors = error_map(pred, truth)
    for (y, x), name in {(7, 5): "prediction", (2, 5): "miss", (12, 5): "false alarm", (3, 27): "not counted"}.items():
        assert np.abs(errors[y, x].astype(int) - COLOURS[name]).max() < 40, name
    painted = (overlay(image, truth) != image).any(-1)
    assert np.array_equal(painted, truth == 1)  # 255 is not painted
    with pytest.raises(ValueError, match="mask"):
        overlay(image, truth[:5])
    ramp = heatmap(np.array([[-3.0, np.nan], [5.0, 1.0]]), image)
    assert ramp.shape == image.shape and ramp[-1, 0].sum() > ramp[-1, -1].sum() > ramp[0, 0].sum()
    assert np.ptp(heatmap(np.full((3, 3), 7.0), image)) < 20  # constant: low everywhere
    assert contact_sheet([[("a", image)], [("b", image), ("c", image)]]).shape[2] == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_lines_and_progress(tmp_path):
    for stream in (io.StringIO(), Terminal()):
        folder = tmp_path / type(stream).__name__
        with RunLog(folder, stream=stream) as log:
            with log.progress(5, "epoch 1", start=3) as bar:
                for loss in (0.5, 0.25):
                    bar.step(images=4, losses={"main": loss, "kl": 1.0}, lr=1e-4)
                log.info("half way 100%")
            log.scalars({"loss": 0.5}, step=1, group="train")
        written = (folder / "train.log").read_text()
        assert "half way 100%" in written and "epoch 1  5/5  loss 1.2500 (main 0.250, kl 1.000)  lr 1.00e-04" in written
        assert "\r" not in written and ("\r" in stream.getvalue()) == stream.isatty()
        assert list((folder / "events").iterdir())


def test_other_ranks_are_silent(tmp_path, capfd):
    with RunLog(tmp_path / "run", main=False) as log, log.progress(2) as bar:
        bar.step()
        log.warning("not here")
        log.scalars({"loss": 1.0}, step=1)
    assert not (tmp_path / "run").exists() and capfd.readouterr() == ("", "")
