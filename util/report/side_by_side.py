"""Page about two results on the same episodes: their difference, by class, by episode, and by cause of failure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.files import atomic
from util.report import figures, page, summary
from util.score.causes import CAUSES, NAMES, causes
from util.score.statistics import Comparison, bootstrap
from util.score.table import EpisodeTable, read_episodes

LARGEST = 10  # episodes of the table, in each direction
PICTURES = 8
PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")  # the only source of a picture


def read_gallery(folder: Path, of: str) -> dict[tuple[int, int], dict]:
    """Read (seed, episode) -> card with embedded pictures from folder/gallery.json; {} where it is missing or of another run.

    Raises UserError for a malformed file, and for a picture that is not inside it: a foreign one may point anywhere.
    """
    file = folder / "gallery.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["of"] != of:
            return {}
        return {(int(found["seed"]), card["number"]): card for card in map(_checked, found["cards"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        kind = type(error).__name__
        raise UserError(f"{file}: malformed ({kind}: {str(error)[:200]}); test again, or delete it: the page then has no "
                        "pictures") from error


def _checked(card: Mapping) -> dict:
    """Return the parts of a card that a page uses. Raises ValueError or the like for what `write_report` does not write."""
    panels = [{"caption": str(panel["caption"]), "uri": panel["uri"]} for panel in card["panels"]]
    for panel in panels:
        if not isinstance(panel["uri"], str) or not PICTURE.fullmatch(panel["uri"]):
            raise ValueError(f"the picture {panel['caption']!r} of episode {card['number']} is no embedded PNG or JPEG")
    return {"number": int(card["number"]), "subtitle": str(card["subtitle"]), "panels": panels}


def write(file: Path, a: Mapping, b: Mapping, comparison: Comparison, galleries: Sequence[Mapping]) -> None:
    """Write the page, whole or not at all.

    Args:
        a, b: two comparable results, and the comparison (`util.score.statistics.compare`).
        galleries: those of a and b, see `read_gallery`; an episode is shown where both have its pictures.
    """
    with atomic(file) as path:
        path.write_text(render(a, b, comparison, galleries), encoding="utf-8")


def render(a: Mapping, b: Mapping, comparison: Comparison, galleries: Sequence[Mapping]) -> str:
    """Render the page as text; arguments as for `write`."""
    pair, episodes = (a, b), (read_episodes(a), read_episodes(b))
    names = [f"{letter} ({result['system']})" for letter, result in zip("AB", pair, strict=True)]
    mark = next((result["mark"] for result in pair if result.get("mark")), "")
    rows = [summary.class_rows({**r, "interval": bootstrap(e)}) for r, e in zip(pair, episodes, strict=True)]
    told = all(e.spread is not None for e in episodes)
    found = [_causes(e) for e in episodes]
    ious = [e.counts[:, 0] / e.counts[:, 1] for e in episodes]
    difference = ious[1] - ious[0]

    def line(i: int) -> dict:
        first = episodes[0]
        return {"seed": int(first.seed[i]), "number": int(first.number[i]), "class": summary.class_name(a, int(first.cls[i])),
                "a": ious[0][i], "b": ious[1][i], "difference": difference[i], "causes": [f[i] for f in found]}  # fmt: skip

    order = np.argsort(difference, kind="stable")
    drawn = {"classes": figures.class_bars(dict(zip(names, rows, strict=True)), mark),
             "cases": figures.scatter(*ious, names, mark, summary.cases(a))}  # fmt: skip
    view = {
        "title": f"{a['system']} and {b['system']}", "names": names, "mark": mark, "comparison": comparison,
        "pair": [{"letter": x, "about": summary.title(r), "result": r} for x, r in zip("AB", pair, strict=True)],
        "runs": summary.runs(a), "cases": summary.cases(a), "dense": summary.dense(a), "protocol": summary.protocol(a),
        "figures": {name: figures.svg(figure, f"IoU by {name}") for name, figure in drawn.items()},
        "better": [line(i) for i in order[::-1][:LARGEST] if difference[i] > 0],
        "worse": [line(i) for i in order[:LARGEST] if difference[i] < 0],
        "causes": {name: [int((f == name).sum()) for f in found] for name in NAMES} if told else {}, "rule": CAUSES,
    }  # fmt: skip
    position = {key: i for i, key in enumerate(zip(episodes[0].seed.tolist(), episodes[0].number.tolist(), strict=True))}
    shared = sorted(set(position).intersection(*galleries), key=lambda key: (-abs(difference[position[key]]), key))
    cards = [_card(line(position[key]), *(gallery[key] for gallery in galleries)) for key in shared[:PICTURES]]
    return page.render("compare.html.j2", view, lambda side: cards)


def _causes(episodes: EpisodeTable) -> np.ndarray:
    """Return the name of the cause of every episode; "" in older reports without causes."""
    if episodes.spread is None:
        return np.full(len(episodes), "", object)
    return np.array(NAMES, object)[causes(episodes.counts, episodes.spread)]


def _card(line: Mapping, a: Mapping, b: Mapping) -> dict:
    """Return the card of an episode: support, query and truth, which both share, and the prediction of each."""
    own = ("prediction", "errors")
    panels = [p for p in a["panels"] if p["caption"].startswith("support") or p["caption"] in ("query", "image", "truth")]
    for letter, card in (("A", a), ("B", b)):
        panels += [p | {"caption": f"{letter}: {p['caption']}"} for p in card["panels"] if p["caption"] in own]
    return {"title": f"{line['class']}, IoU {100 * line['a']:.1f} and {100 * line['b']:.1f}", "panels": panels,
            "subtitle": a["subtitle"]}  # fmt: skip
