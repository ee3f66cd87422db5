"""Commands about results.

    python -m util.report compare A.json B.json [--html OUT.html]     is B another than A, on the same episodes?
    python -m util.report rules RESULT.json [FOLD.json ...]           the same predictions under each published rule of scoring
    python -m util.report figures RESULT_DIR                          RESULT_DIR/figures/*.pdf and .png, for papers

`python -m model.verify RESULT.json` checks whether a result still holds.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from util import cli
from util.errors import UserError
from util.report import figures, rules, side_by_side
from util.report.write import check_keys, fingerprint
from util.score.rescore import counted
from util.score.statistics import bootstrap, compare, describe, load_result, read_result
from util.score.table import read_episodes


def main() -> None:
    """Return the exit code: 0 done, whether a difference is significant or not; 1 not comparable; 2 a wrong file."""
    parser = argparse.ArgumentParser(prog="python -m util.report", description="Reports of evaluations (report.json).")
    commands = parser.add_subparsers(required=True, dest="command")
    comparing = commands.add_parser("compare", help="is B another than A, on the same episodes?")
    comparing.add_argument("a", metavar="A.json")
    comparing.add_argument("b", metavar="B.json")
    comparing.add_argument("--html", metavar="OUT.html", type=Path, help="also write a page with both side by side")
    drawing = commands.add_parser("figures", help="figures for papers, as PDF and PNG")
    drawing.add_argument("folder", metavar="RESULT_DIR", type=Path, help="the folder of a report.json")
    scoring = commands.add_parser("rules", help="the same predictions under each published rule of scoring")
    scoring.add_argument("files", metavar="RESULT.json", nargs="+", help="a report.json; or those of several folds")
    given = parser.parse_args()
    if given.command == "rules":
        print(rules.text([read_result(file, check_rules) for file in given.files]))
    elif given.command == "figures":
        draw(given.folder)
    else:
        sys.exit(not compare_files(given.a, given.b, given.html))


def check_rules(result: Mapping) -> None:
    """Raise UserError for a result that cannot be scored under other rules."""
    check_keys(result)
    counted(result)


def compare_files(a_file: str, b_file: str, html: Path | None) -> bool:
    """Print the comparison, write the page if --html names one, and return whether the two are comparable."""
    if html is not None and html.is_dir():
        raise UserError(f"--html {html} is a folder: name a file")
    a, b = load_result(a_file), load_result(b_file)
    if html is not None:
        for file in (a_file, b_file):
            read_result(file, check_keys)
    comparison = compare(a, b)
    print(describe(comparison, a, b))
    if html is not None and comparison.comparable:
        pairs = ((a_file, a), (b_file, b))
        galleries = [side_by_side.read_gallery(Path(file).parent, fingerprint(result)) for file, result in pairs]
        side_by_side.write(html, a, b, comparison, galleries)
        print(f"page: {html}")
    return comparison.comparable


def draw(folder: Path) -> None:
    """Write the figures of folder/report.json to folder/figures."""
    result = read_result(folder / "report.json", check_keys)
    if result.get("episodes") and "per_class" not in (result.get("interval") or {}):  # an older report: computed from the rows
        result["interval"] = bootstrap(read_episodes(result))
    found = figures.of(result)
    if len({figures.slug(name) for name in found}) < len(found):
        raise UserError(f"{folder / 'report.json'}: two of its figures have one file name ({', '.join(found)}); "
                        "rename its curves")
    for name, figure in found.items():
        for path in figures.save(folder / "figures", name, figure):
            print(path)
    if absent := [name for name in ("curves", "causes", "priors") if name not in found]:
        print(f"no figure of {', '.join(absent)}: this report does not have them")


if __name__ == "__main__":
    cli.run(main)
