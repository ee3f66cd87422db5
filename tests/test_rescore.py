"""The same predictions under each rule: means worked out by hand, intervals, folds, old reports, console and page."""

import json
import sys

import pytest

from tests.make.counted import row, table
from tests.make.reports import result
from util import cli
from util.errors import UserError
from util.report.__main__ import main
from util.report.write import text_table, write_report
from util.score.rescore import LABELS, rescore
from util.score.statistics import pooled
from util.score.table import EpisodeTable


def scored(found: EpisodeTable, **extra) -> dict:
    return result(episodes=found.to_json(), protocol_hash="c0ffee", **extra)


def by_name(results: list[dict]) -> dict[str, dict]:
    return {line["name"]: line for line in rescore(results)["rows"]}


def test_means_by_hand() -> None:
    rows = [row(0, 1, 0, 10, 20), row(1, 1, 1, 30, 40, area=300), row(2, 2, 2, 5, 50, original_void_foreground=10)]
    given = scored(EpisodeTable.of("hash", {0: rows}))  # three classes in the fold, one never drawn
    found = {name: line["value"] for name, line in by_name([given]).items()}
    first, second = 40 / 60, 5 / 50
    assert found["file's pixels, void ignored"] == found[LABELS["m0"]] == pytest.approx((first + second) / 3)
    assert found[LABELS["m1"]] == pytest.approx((first + second) / 2)
    assert found["file's pixels, void is background"] == pytest.approx((first + 5 / 60) / 3)
    assert found[LABELS["episode"]] == pytest.approx(((0.5 + 0.75) / 2 + second) / 3)
    assert found[LABELS["area"]] == pytest.approx(((0.5 * 100 + 0.75 * 300) / 400 + second) / 3)
    assert found[LABELS["share"]] == pytest.approx(((10 / 100 + 30 / 300) / (20 / 100 + 40 / 300) + second) / 3)
    background = (80 + 60 + 50) / (90 + 70 + 95)
    assert found[LABELS["fb"]] == pytest.approx((45 / 110 + background) / 2)
    assert found[LABELS["fb_mean"]] == pytest.approx(((first + second) / 3 + background) / 2)
    flag = rescore([given])["flags"][0]
    assert (flag["episodes"], flag["queries"], flag["never"], flag["few"]) == (3, 3, [3], {1: 2, 2: 1})


def test_the_headline_is_the_score_of_today_and_has_an_interval() -> None:
    found = table()
    rows = by_name([scored(found)])
    headline = rows["file's pixels, void ignored"]
    assert headline["value"] == pytest.approx(pooled(found)["miou"], abs=1e-12) and headline["difference"] == 0
    low, high = headline["interval"]
    assert low < headline["value"] < high
    void = rows["file's pixels, void is background"]
    assert void["difference"] < 0 and void["difference_interval"][1] < 0  # paired: narrower than the two intervals
    assert void["difference_interval"][1] - void["difference_interval"][0] < (high - low) / 2
    changed = scored(found, config={"Test_Finetune": {"grid": "letterbox", "void": "background", "mean": "m1"}})
    assert rescore([changed])["headline"] == "letterbox square, void is background, M1"
    assert rescore([changed])["rows"][0]["value"] == void["value"]  # the letterbox of a square image has no padding


def test_folds() -> None:
    few, many = table(classes=2), table(classes=3)
    a = scored(few) | {"classes": {1: "a", 2: "b"}}
    b = scored(many) | {"split": 1}
    rows = by_name([a, b])
    means = pooled(few)["miou"], pooled(many)["miou"]
    assert rows[LABELS["folds"]]["value"] == pytest.approx(sum(means) / 2)
    assert rows[LABELS["classes"]]["value"] == pytest.approx((2 * means[0] + 3 * means[1]) / 5)
    with pytest.raises(UserError, match="same split"):
        rescore([a, a])
    with pytest.raises(UserError, match="their shot differs: 1, 5"):
        rescore([a, b | {"shot": 5}])


def test_command_and_page(tmp_path, monkeypatch, capsys) -> None:
    given = scored(table(classes=2), mark="[random CLIP]")
    given |= {"rules": rescore([given])}
    assert "never drawn: bird" in text_table(given) and "under M1" in text_table(given)
    page = write_report(tmp_path / "new", given, []).read_text()
    assert 'id="under-each-rule">' in page and "never drawn: bird" in page and LABELS["fb_mean"] in page  # closed at first
    write_report(tmp_path / "old", result(), [])
    shorter = given["episodes"] | {"columns": " ".join(given["episodes"]["columns"].split()[:11]),
                                   "rows": [" ".join(text.split()[:11]) for text in given["episodes"]["rows"]]}  # fmt: skip
    write_report(tmp_path / "one", given | {"episodes": shorter}, [])

    def run(name: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["report", "rules", str(tmp_path / name / "report.json")])
        try:
            cli.run(main)
        except SystemExit as end:
            return end.code, "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    code, text = run("new")
    assert code == 0 and "60 episodes of 15 different query images" in text and "never drawn: bird" in text
    assert sum("%" not in line and "[random CLIP]" in line for line in text.splitlines()) == len(given["rules"]["rows"])
    assert text.splitlines()[-1].startswith("In a paper: mIoU") and "(c0ffee): file's pixels, void ignored, M0" in text
    for name, says in {"old": "no counts of single episodes", "one": "the counts of one rule alone: evaluate again"}.items():
        code, text = run(name)
        assert code == 2 and str(tmp_path / name) in text and says in text
    assert json.loads((tmp_path / "new/report.json").read_text())["episodes"] == given["episodes"]  # kept as whole numbers
