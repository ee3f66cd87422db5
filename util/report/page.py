"""Make one HTML page from a template and pictures: a file of bounded size, without scripts or outside resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2

from util.report.viz import COLOURS, Card, fit, jpeg_data_uri

PAGE_BYTES = 8_000_000
SIDES = (320, 240, 180, 120, 80)  # heights of the pictures in pixels, tried in turn


def render(template: str, view: Mapping, pictures: Callable[[int], object]) -> str:
    """Render the page. The template gets `pictures(side)`; the side shrinks until the page is below PAGE_BYTES."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"percent": lambda x, digits=1: f"{100 * x:.{digits}f}", "shown": shown}
    environment.globals["legend"] = {name: f"rgb{rgb}" for name, rgb in COLOURS.items()}
    for side in SIDES:
        page = environment.get_template(template).render(view, pictures=pictures(side))
        if len(page.encode()) < PAGE_BYTES:
            break
    return page


def embedded(cards: Sequence[Card], side: int) -> list[dict]:
    """Return the cards with their pictures as data URIs, at most `side` pixels tall."""
    return [
        {"number": card.number, "group": card.group, "title": card.title, "subtitle": card.subtitle,
         "panels": [{"caption": caption, "uri": jpeg_data_uri(fit(image, min(side, image.shape[0])))}
                    for caption, image in card.panels]}
        for card in cards
    ]  # fmt: skip


def shown(value: object) -> str:
    """Format a value of the protocol or the environment for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)
