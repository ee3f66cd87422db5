"""Learning curves on record, figures for papers, and the page about two results."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.make.reports import card, result, self_contained
from util import cli
from util.report import figures
from util.report.__main__ import main
from util.report.write import write_report
from util.run import curves
from util.run.log import RunLog
from util.score import statistics as stats
from util.score.causes import NAMES, tally
from util.score.statistics import bootstrap
from util.score.table import COLUMNS, QUERY, SPREAD, read_episodes


def full(hits: int = 40, old: bool = False, **extra) -> dict:
    """A result with everything that test.py writes; `old`: as it was before the causes."""
    names = {1: "aeroplane", 2: "bicycle <b>", 3: "$bird$_1"}
    rows = []
    for seed in range(3):
        for i in range(30):
            hit = (hits + 7 * i) % 100
            row = (seed, i, 1 + i % 3, hit, 100, 300, 400, i % 20, hit + 30 * (hit < 70), 25 * (i % 2 and hit < 70), 4)
            rows.append(" ".join(str(int(x)) for x in (row[:8] if old else row)))
    columns = [*COLUMNS, QUERY] if old else [*COLUMNS, QUERY, *SPREAD]
    given = result(classes=names, protocol={"name": "published"}, protocol_hash="f00", date="2030-01-01",
                   episodes={"hash": "abc", "columns": " ".join(columns), "rows": rows})  # fmt: skip
    read = read_episodes(given)
    interval = bootstrap(read, 100)
    if old:
        return given | {"interval": {k: interval[k] for k in ("miou", "fb_iou")}} | extra
    for seed in given["seeds"]:
        seed["prior_quality"] = {"vtp": [0.1 * k for k in range(9)], "vvp": [0.3] * 9}
    steps = list(range(10, 210, 10))
    run = {"train": {"step": steps, "main": [1 / s for s in steps], "rate": [1e-4] * 20},
           "validation": {"step": [100, 200], "miou": [0.2, None]}}  # fmt: skip
    return given | {"interval": interval, "causes": tally(read.cls, read.counts, read.spread), "other_classes": {4: "cat & dog"},
                    "curves": {"PI-CLIP": run, "base learner": run | {"validation": {}}}} | extra  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Exit code and output of `python -m util.report ...`."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        cli.run(main)
    except SystemExit as end:
        return int(end.code), "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_curves_go_on_where_the_run_does(tmp_path: Path) -> None:
    """Killed after step 40 (and within a line), resumed at 30 whose validation had not been closed."""
    file = tmp_path / curves.FILE
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.rewind({"train": 0, "validation": 0})  # a fresh run: nothing is there yet
        assert not file.exists()
        for step in (10, 20, 30, 40):
            log.scalars({"main": 1 / step, "rate": np.float32(0.5)}, step, "train")
        log.scalars({"miou": 0.25}, 15, "validation")
        log.scalars({"miou": 0.5}, 30, "validation")
    whole = file.read_text()
    with file.open("a") as lines:
        lines.write('{"group": "train", "step": 50, "val')
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.rewind({"train": 30, "validation": 15})
        log.scalars({"miou": 0.5}, 30, "validation")
        log.scalars({"main": 1 / 40, "rate": 0.5}, 40, "train")
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    found = curves.read(file)
    assert found["train"] == {"step": [10, 20, 30, 40], "main": [0.1, 0.05, 1 / 30, 0.025], "rate": [0.5] * 4}
    assert found["validation"] == {"step": [15, 30], "miou": [0.25, 0.5]}
    with RunLog(tmp_path, stream=io.StringIO(), main=False) as log:  # another rank
        log.rewind({})
    assert curves.read(file) == found
    with RunLog(tmp_path, stream=io.StringIO()) as log:  # Train.resume=none
        log.rewind({"train": 0, "validation": 0})
    assert curves.read(file) == {} == curves.read(tmp_path / "missing")


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    file = tmp_path / curves.FILE
    for step in range(1, 1001):
        curves.append(file, "train", step, {"main": step} | ({"late": 1.0} if step > 500 else {})
                      | ({"rare": 2.0} if step % 5 == 0 else {}))  # fmt: skip
    found = curves.read(file)["train"]
    assert len(found["step"]) == curves.POINTS and found["step"] == found["main"] == sorted(found["main"])
    assert found["step"][0] == 2.5 and found["step"][-1] == 999  # the means of the first four and of the last three
    assert found["late"][0] is None and found["late"][-1] == 1 and {*found["rare"]} == {2, None}


def test_figures_command(tmp_path: Path, monkeypatch, capsys) -> None:
    write_report(tmp_path, full(), [])
    code, text = command(monkeypatch, capsys, "figures", tmp_path)
    names = ["causes", "classes", "curves", "curves-base-learner", "priors"]
    assert code == 0 and "no figure" not in text
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(f"{n}.{k}" for n in names for k in ("pdf", "png"))
    for name in names:
        pdf = (tmp_path / f"figures/{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"/Subtype /Image" not in pdf  # TrueType inside, vectors
        width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf).group(1))
        assert width / 72 * 2.54 == pytest.approx(8.5, abs=0.01)
        with Image.open(tmp_path / f"figures/{name}.png") as image:
            assert image.width == int(figures.WIDTH * figures.DPI) and len(set(image.convert("L").getdata())) > 10


def test_older_reports_tell_what_they_can(tmp_path: Path, monkeypatch, capsys) -> None:
    write_report(tmp_path / "old", full(old=True), [])
    code, text = command(monkeypatch, capsys, "figures", tmp_path / "old")
    assert code == 0 and "no figure of curves, causes, priors" in text
    assert [p.name for p in sorted((tmp_path / "old/figures").iterdir())] == ["classes.pdf", "classes.png"]
    page = (tmp_path / "old/report.html").read_text()
    assert "aeroplane" in page and "Why episodes fail" not in page and "Training" not in page
    write_report(tmp_path / "new", full(60), [])
    files = [tmp_path / name / "report.json" for name in ("old", "new")]
    code, text = command(monkeypatch, capsys, "compare", *files, "--html", tmp_path / "both.html")
    assert code == 0 and "B - A" in text
    assert "Why episodes fail" not in (tmp_path / "both.html").read_text()


def test_page_has_the_new_parts(tmp_path: Path) -> None:
    page = write_report(tmp_path, full(), [card("best"), card("missed"), card("part")]).read_text()
    assert self_contained(page) and page.count("<svg") == 4
    for text in ("Why episodes fail", "cat &amp; dog <b>", "Training: base learner.", "95 %</th>", ">Failures<", "best 20.0"):
        assert text in page, text
    assert page.index("<h2>Episodes") < page.index("<h3>best") < page.index("<h2>Failures") < page.index("<h3>missed")
    ids = [set(re.findall(r'id="([mp][0-9a-f]{9,})"', svg)) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    assert all(ids) and sum(map(len, ids)) == len(set.union(*ids))  # what figures refer to by name is their own
    assert all(colour not in page.split("<main>")[1] for colour in figures.VARIABLES)  # colours follow the page
    assert any("$bird$_1" in svg for svg in re.findall(r"<svg.*?</svg>", page, re.S))  # no formula
    marked = write_report(tmp_path, full(mark="[random CLIP]"), []).read_text()
    assert all("[random CLIP]" in svg for svg in re.findall(r"<svg.*?</svg>", marked, re.S))


@pytest.mark.parametrize("pictures", [True, False])
def test_side_by_side(tmp_path: Path, monkeypatch, capsys, pictures: bool) -> None:
    cards = [card("best"), card("first")]
    cards[0].number, cards[1].number = 3, 11
    write_report(tmp_path / "a", full(40), cards)
    write_report(tmp_path / "b", full(45, system="HDMNet"), cards[1:] if pictures else [])
    files = [tmp_path / name / "report.json" for name in "ab"]
    code, text = command(monkeypatch, capsys, "compare", *files, "--html", tmp_path / "out/both.html")
    page = (tmp_path / "out/both.html").read_text()
    assert code == 0 and "page:" in text and self_contained(page) and len(page) < 10_000_000
    assert page.count("<svg") == 2 and "B (HDMNet)" in page and "Why episodes fail" in page
    found = stats.compare(*map(stats.load_result, files))
    assert f"{100 * found.difference:+.2f}" in page and f"{100 * found.interval[1]:+.2f}" in page
    assert ("Episodes that both galleries show" in page) == pictures
    assert page.count("<article") == int(pictures) and page.count("data:image/jpeg") == (7 if pictures else 0)
    table = page.split("B is better")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in table.split("<tr>")[2:]]
    differences = [float(row[4]) for row in rows]
    assert len(rows) == 10 and differences == sorted(differences, reverse=True) and differences[0] == 5.0
    causes = re.findall(r'class="note">A (.*?), B (.*?)</div>', table)
    assert len(causes) == 10 and set(sum(causes, ())) <= set(NAMES)


def test_pictures_of_another_run_are_not_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    shown = [card("best")]
    shown[0].number = 3
    for name in "ab":
        write_report(tmp_path / name, full(40), shown)
    foreign = json.loads((tmp_path / "a/gallery.json").read_text()) | {"of": "0" * 16}
    files = [tmp_path / name / "report.json" for name in "ab"]
    (tmp_path / "b/gallery.json").write_text(json.dumps(foreign))
    assert command(monkeypatch, capsys, "compare", *files, "--html", tmp_path / "both.html")[0] == 0
    assert "<article" not in (tmp_path / "both.html").read_text()


def test_foreign_reports(tmp_path: Path, monkeypatch, capsys) -> None:
    """Names of curves become file names, titles become attributes, galleries become pictures: of this folder, text, embedded."""
    curves_of = full()["curves"]["base learner"]
    names = {name: curves_of for name in ('../../../../paper', 'a" onload="alert(1)', "\\1")}
    write_report(tmp_path / "deep/in/a", full(curves=names), [])
    code, text = command(monkeypatch, capsys, "figures", tmp_path / "deep/in/a")
    written = {path.relative_to(tmp_path / "deep/in/a").parts[0] for path in tmp_path.rglob("*.pdf")}
    assert code == 0 and written == {"figures"} and "curves-paper.pdf" in text
    page = (tmp_path / "deep/in/a/report.html").read_text()
    assert 'onload="' not in page and "a&#34; onload" in page.replace("&quot;", "&#34;")
    write_report(tmp_path / "deep/in/a", full(curves={"a/b": curves_of, "a:b": curves_of}), [])
    code, text = command(monkeypatch, capsys, "figures", tmp_path / "deep/in/a")
    assert code == 2 and "rename its curves" in text

    shown = [card("best")]
    shown[0].number = 3
    for name in "ab":
        write_report(tmp_path / name, full(40), shown)
    files = [tmp_path / name / "report.json" for name in "ab"]
    whole = json.loads((tmp_path / "b/gallery.json").read_text())
    picture = whole["cards"][0]["panels"][0]["uri"]
    for source in ("http://example.org/a.png", "data:image/svg+xml;base64,AAAA", "data:text/html;base64,AAAA", picture + "\n", 5):
        whole["cards"][0]["panels"][0]["uri"] = source
        (tmp_path / "b/gallery.json").write_text(json.dumps(whole))
        code, text = command(monkeypatch, capsys, "compare", *files, "--html", tmp_path / "c.html")
        assert code == 2 and "gallery.json: malformed" in text and "no embedded PNG or JPEG" in text, source
    for content in ("{", "5", json.dumps(whole | {"cards": [5]}), json.dumps(whole | {"cards": None})):
        (tmp_path / "b/gallery.json").write_text(content)
        code, text = command(monkeypatch, capsys, "compare", *files, "--html", tmp_path / "c.html")
        assert code == 2 and "gallery.json: malformed" in text and not (tmp_path / "c.html").exists(), content


def test_wrong_input_of_the_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    write_report(tmp_path / "a", full(), [])
    write_report(tmp_path / "b", full(shot=5), [])
    a, b = (tmp_path / name / "report.json" for name in "ab")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/report.json").write_text('{"system": "S"}')
    for arguments, says in [
        (("figures", tmp_path / "nowhere"), "nowhere/report.json: cannot be read"),
        (("figures", tmp_path / "c"), "c/report.json: no report of an evaluation: it lacks data_set, split"),
        (("compare", a, a, "--html", tmp_path), "is a folder"),
        (("compare", a, tmp_path / "c/report.json", "--html", tmp_path / "x.html"), "c/report.json: the report has no protocol"),
    ]:
        code, text = command(monkeypatch, capsys, *arguments)
        assert code == 2 and says in text and "Traceback" not in text
    code, text = command(monkeypatch, capsys, "compare", a, b, "--html", tmp_path / "x.html")
    assert code == 1 and "shot: 1 and 5" in text and not (tmp_path / "x.html").exists()


def test_many_episodes_do_not_make_a_large_figure() -> None:
    rng = np.random.default_rng(0)
    for n in (200, 50_000):
        a, b = rng.random((2, n))
        assert len(figures.svg(figures.scatter(a, b, ("A", "B")), "episodes")) < 500_000


@pytest.mark.parametrize(
    ("row", "says"),
    [("1 0 1 5 10 3 4 0 4 0 0", "intersection <= predicted"), ("1 0 1 5 10 3 4 0 11 0 0", "predicted <= union"),
     ("1 0 1 5 10 3 4 0 7 3 4", "on_others <= predicted"), ("1 0 1 5 10 3 4 0 7 -1 4", "0 <= on_others")],
)  # fmt: skip
def test_malformed_spread(row: str, says: str) -> None:
    episodes = {"hash": "a", "columns": " ".join([*COLUMNS, QUERY, *SPREAD]), "rows": [row]}
    with pytest.raises(stats.UserError, match=says):
        read_episodes({"episodes": episodes})


def test_curves_of_one_point() -> None:
    """One validation and one step: axes begin at 0, points are drawn as points, and no label lies over a curve."""
    figure = figures.learning_curves({"train": {"step": [10], "main": [0.5], "rate": [1e-4]},
                                      "validation": {"step": [200], "miou": [0.2]}})  # fmt: skip
    loss, miou, rate = figure.axes
    assert rate.get_xlim() == (0, 206) and miou.get_ylim() == (0, 26) and loss.lines[0].get_marker() == "o"
    assert "best 20.0 at iteration 200" in [text.get_text() for text in miou.get_legend().get_texts()] and not miou.texts
    priors = figures.prior_curves({"vtp": [0.1 * k for k in range(9)]}, 0.5)
    assert not priors.axes[0].texts and "final mask 50.0" in [text.get_text() for text in priors.legends[0].get_texts()]
