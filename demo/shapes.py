"""The twenty things of the demo world, as polygons.

A shape is a function of a random generator: every call returns another individual of its kind, as a list of parts drawn
in order; coordinates lie roughly in [-1, 1] x [-1, 1], y pointing down. A part has a role (BODY, TRIM, DETAIL), not a
colour: who paints decides that, so that colour and texture never give a class away.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

BODY, TRIM, DETAIL = 0, 1, 2
Points = np.ndarray  # n 2, float


class Part(NamedTuple):
    role: int
    polygons: list[Points]


# --- pencils ----------------------------------------------------------------------------------------------------------


def poly(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=float)


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def arc(cx: float, cy: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> Points:
    """40 2: points of an ellipse from `start` to `stop` degrees (0 right, 90 down)."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([cx + rx * np.cos(angle), cy + (rx if ry is None else ry) * np.sin(angle)], axis=1)


def stroke(points: Iterable[Iterable[float]], width: float) -> list[Points]:
    """A line of the given width with round ends and joints, as overlapping polygons."""
    line = np.array(list(points), dtype=float)
    pieces = [arc(x, y, width / 2) for x, y in line]
    for a, b in zip(line[:-1], line[1:], strict=True):
        normal = np.array([a[1] - b[1], b[0] - a[0]]) / (np.hypot(*(b - a)) + 1e-9) * width / 2
        pieces.append(np.stack([a + normal, b + normal, b - normal, a - normal]))
    return pieces


def turned(points: Points, degrees: float) -> Points:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


# --- things -----------------------------------------------------------------------------------------------------------


def star(rng: np.random.Generator) -> list[Part]:
    n, inner = rng.integers(5, 7), rng.uniform(0.4, 0.52)
    angle = np.pi * np.arange(2 * n) / n - np.pi / 2
    radius = np.where(np.arange(2 * n) % 2, inner, 1.0)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return [Part(BODY, [outline])] + [Part(TRIM, [outline * 0.5])] * int(rng.random() < 0.4)


def fish(rng: np.random.Generator) -> list[Part]:
    tall, tail = rng.uniform(0.38, 0.58), rng.uniform(0.35, 0.6)
    fins = [
        poly((0.35, 0), (1.05, -tail), (0.9, 0), (1.05, tail)),
        poly((-0.25, -tall * 0.8), (0.3, -tall - 0.28), (0.3, -0.1)),
    ]
    gill = stroke(arc(-0.55, 0, 0.22, tall * 0.6, -60, 60), 0.06)
    return [Part(TRIM, fins), Part(BODY, [arc(-0.2, 0, 0.8, tall)]), Part(DETAIL, [*gill, arc(-0.68, -0.1, 0.09)])]


def tree(rng: np.random.Generator) -> list[Part]:
    tiers, half = rng.integers(2, 5), rng.uniform(0.55, 0.75)
    top, width = np.linspace(-1, 0.0, tiers), np.linspace(0.6 * half, half, tiers)
    low = np.minimum(top + 1.9 / tiers, 0.62)
    crown = [poly((0, a), (w, b), (-w, b)) for a, b, w in zip(top, low, width, strict=True)]
    return [Part(TRIM, [box(-0.14, 0.5, 0.14, 1)]), Part(BODY, crown)]


def house(rng: np.random.Generator) -> list[Part]:
    eaves, ridge, door = rng.uniform(-0.25, 0), rng.uniform(-1, -0.75), rng.choice([-0.35, 0, 0.35])
    chimney = [box(0.35, -0.85, 0.58, -0.2)] if rng.random() < 0.6 else []
    roof = [poly((-0.98, eaves), (0, ridge), (0.98, eaves))]
    holes = [box(door - 0.15, 0.35, door + 0.15, 0.9)]
    holes += [box(x - 0.14, 0.12, x + 0.14, 0.4) for x in (-0.48, 0.48) if abs(x - door) > 0.3]
    return [
        Part(TRIM, chimney),
        Part(BODY, [box(-0.75, eaves - 0.02, 0.75, 0.9)]),
        Part(TRIM, roof),
        Part(DETAIL, holes),
    ]


def key(rng: np.random.Generator) -> list[Part]:
    radius, thick, teeth = rng.uniform(0.3, 0.38), rng.uniform(0.15, 0.2), rng.integers(2, 4)
    ring = stroke(arc(-0.62, 0, radius), thick)
    bits = [box(x - 0.1, 0, x, rng.uniform(0.3, 0.42)) for x in 0.98 - 0.24 * np.arange(teeth)]
    return [Part(BODY, ring + stroke([(-0.62 + radius, 0), (0.92, 0)], thick) + bits)]


def mug(rng: np.random.Generator) -> list[Part]:
    taper, top = rng.uniform(0, 0.12), rng.uniform(-0.8, -0.6)
    body = poly((-0.8, top), (0.42, top), (0.42 - taper, 0.8), (-0.8 + taper, 0.8))
    band = poly((-0.76, 0.1), (0.38, 0.1), (0.37, 0.35), (-0.75, 0.35))
    handle = stroke(arc(0.4, 0.02, 0.45, 0.42, -85, 85), 0.16)
    return (
        [Part(TRIM, handle), Part(BODY, [body])]
        + [Part(TRIM, [band])] * int(rng.random() < 0.4)
        + [Part(DETAIL, [arc(-0.19, top, 0.61, 0.13)])]
    )


def mushroom(rng: np.random.Generator) -> list[Part]:
    tall, stem = rng.uniform(0.75, 1.0), rng.uniform(0.2, 0.32)
    stalk = poly((-stem, 0), (stem, 0), (stem * 1.35, 0.95), (-stem * 1.35, 0.95))
    spots = [arc(x, y * tall, r) for x, y, r in ((-0.5, -0.25, 0.14), (0.05, -0.55, 0.17), (0.52, -0.22, 0.12))]
    return [Part(TRIM, [stalk]), Part(BODY, [arc(0, 0.1, 0.98, tall, 180, 360)]), Part(DETAIL, spots)]


def ladder(rng: np.random.Generator) -> list[Part]:
    rungs, foot, head, thick = (
        rng.integers(4, 6),
        rng.uniform(0.42, 0.52),
        rng.uniform(0.3, 0.4),
        rng.uniform(0.15, 0.19),
    )
    rails = [stroke([(s * head, -1), (s * foot, 1)], thick) for s in (-1, 1)]
    steps = [stroke([(-foot * 0.85, y), (foot * 0.85, y)], thick) for y in np.linspace(-0.72, 0.72, rungs)]
    return [Part(TRIM, sum(steps, [])), Part(BODY, sum(rails, []))]


def heart(rng: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 60)
    y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    outline = np.stack([16 * np.sin(t) ** 3, y * rng.uniform(0.9, 1.1)], axis=1) / 16
    return [Part(BODY, [outline])] + [Part(TRIM, [outline * 0.6 - (0, 0.03)])] * int(rng.random() < 0.4)


def umbrella(rng: np.random.Generator) -> list[Part]:
    lobes, tall = rng.integers(3, 6), rng.uniform(0.75, 0.95)
    edge = np.linspace(1, -1, lobes + 1)
    scallops = [arc((a + b) / 2, -0.05, (a - b) / 2, 0.14, 0, -180) for a, b in zip(edge[:-1], edge[1:], strict=True)]
    canopy = np.concatenate([arc(0, -0.05, 1, tall, 180, 360), *scallops])
    side = rng.choice([-1, 1])
    hook = arc(side * 0.17, 0.78, 0.17, 0.2, 180 if side > 0 else 0, 0 if side > 0 else 180)
    ribs = sum((stroke([(0, -0.05 - tall), (x * 0.98, -0.12)], 0.05) for x in edge[1:-1]), [])
    pole = stroke([(0, -tall - 0.15), (0, 0.78), *hook], 0.12)
    return [Part(TRIM, pole), Part(BODY, [canopy]), Part(DETAIL, ribs)]


def anchor(rng: np.random.Generator) -> list[Part]:
    thick, reach, bar = rng.uniform(0.17, 0.22), rng.uniform(0.65, 0.85), rng.uniform(0.35, 0.5)
    arms = stroke(arc(0, 0.2, reach, 0.68, 10, 170), thick)
    flukes = [
        poly((s * (reach + 0.22), 0.42), (s * (reach - 0.25), 0.42), (s * (reach + 0.02), -0.02)) for s in (-1, 1)
    ]
    ring = stroke(arc(0, -0.78, 0.17), thick * 0.75)
    return [
        Part(BODY, ring + stroke([(0, -0.6), (0, 0.85)], thick) + arms + flukes),
        Part(TRIM, stroke([(-bar, -0.35), (bar, -0.35)], thick)),
    ]


def bottle(rng: np.random.Generator) -> list[Part]:
    half, neck, shoulder = rng.uniform(0.32, 0.42), rng.uniform(0.11, 0.16), rng.uniform(-0.3, -0.1)
    body = poly(
        (-neck, -0.85),
        (neck, -0.85),
        (neck, shoulder - 0.2),
        (half, shoulder + 0.12),
        (half, 0.93),
        (half - 0.07, 1),
        (-half + 0.07, 1),
        (-half, 0.93),
        (-half, shoulder + 0.12),
        (-neck, shoulder - 0.2),
    )
    return [
        Part(BODY, [body]),
        Part(DETAIL, [box(-half, 0.25, half, 0.65)]),
        Part(TRIM, [box(-neck - 0.03, -1, neck + 0.03, -0.82)]),
    ]


def flower(rng: np.random.Generator) -> list[Part]:
    n, far, wide = rng.integers(5, 8), rng.uniform(0.36, 0.42), rng.uniform(0.19, 0.24)
    centre = np.array([0, -0.4])
    petals = [turned(arc(far, 0, 0.27, wide), 360 * i / n) + centre for i in range(n)]
    leaves = [turned(arc(s * 0.24, 0, 0.24, 0.11), -s * 35) + (0, 0.7) for s in (-1, 1)]
    return [
        Part(TRIM, stroke([(0, -0.3), (0, 1)], 0.13) + leaves),
        Part(BODY, petals),
        Part(DETAIL, [arc(*centre, 0.2)]),
    ]


def boat(rng: np.random.Generator) -> list[Part]:
    bow, mast = rng.uniform(0.2, 0.35), rng.uniform(-0.1, 0.2)
    hull = poly((-0.95, 0.42), (0.95, 0.42), (0.95 - bow, 0.92), (-0.95 + bow, 0.92))
    sails = [
        poly((mast + 0.07, -0.95), (mast + 0.07, 0.3), (0.9, 0.3)),
        poly((mast - 0.07, -0.7), (mast - 0.07, 0.3), (-0.7, 0.3)),
    ]
    return [Part(DETAIL, stroke([(mast, -0.95), (mast, 0.45)], 0.1)), Part(BODY, [hull]), Part(TRIM, sails)]


def butterfly(rng: np.random.Generator) -> list[Part]:
    high, low = rng.uniform(0.42, 0.52), rng.uniform(0.3, 0.4)
    upper = [turned(arc(s * 0.52, 0, 0.5, high * 0.75), s * -35) + (0, -0.1) for s in (-1, 1)]
    lower = [turned(arc(s * 0.42, 0, 0.38, low * 0.85), s * 40) + (0, 0.15) for s in (-1, 1)]
    eyes = [arc(s * 0.5, -0.45, 0.13) for s in (-1, 1)]
    feelers = sum((stroke([(0, -0.4), (s * 0.12, -0.75), (s * 0.3, -0.92)], 0.06) for s in (-1, 1)), [])
    return [Part(TRIM, lower), Part(BODY, upper), Part(DETAIL, eyes + feelers + [arc(0, 0.05, 0.1, 0.55)])]


def rocket(rng: np.random.Generator) -> list[Part]:
    half, flame = rng.uniform(0.26, 0.34), rng.uniform(0.8, 1.0)
    nose = arc(0, -0.1, half, 0.9, 0, -180)
    body = np.concatenate([poly((half * 0.7, 0.55), (half, 0.1)), nose, poly((-half, 0.1), (-half * 0.7, 0.55))])
    fins = [poly((s * half * 0.9, 0.05), (s * 0.68, 0.5), (s * 0.62, 0.8), (s * half * 0.6, 0.55)) for s in (-1, 1)]
    fire = [poly((-half * 0.55, 0.55), (0, flame), (half * 0.55, 0.55))]
    return [Part(DETAIL, fire), Part(TRIM, fins), Part(BODY, [body]), Part(DETAIL, [arc(0, -0.3, half * 0.5)])]


def hammer(rng: np.random.Generator) -> list[Part]:
    thick, height = rng.uniform(0.2, 0.26), rng.uniform(0.32, 0.42)
    top, low = -0.9, -0.9 + height
    head = poly(
        (-0.72, top - 0.04),
        (-0.45, top - 0.04),
        (-0.45, top + 0.04),
        (0.25, top),
        (0.8, low + 0.14),
        (0.66, low + 0.1),
        (0.25, low),
        (-0.45, low - 0.04),
        (-0.45, low + 0.04),
        (-0.72, low + 0.04),
    )
    return [Part(TRIM, stroke([(0, -0.6), (0, 0.9)], thick)), Part(BODY, [head])]


def lamp(rng: np.random.Generator) -> list[Part]:
    rim, crown, drop = rng.uniform(0.65, 0.8), rng.uniform(0.28, 0.42), rng.uniform(-0.15, 0.05)
    shade = poly((-crown, -0.95), (crown, -0.95), (rim, drop), (-rim, drop))
    foot = arc(0, 0.95, 0.48, 0.26, 180, 360)
    return [
        Part(TRIM, stroke([(0, drop - 0.1), (0, 0.85)], 0.13) + [foot]),
        Part(BODY, [shade]),
        Part(DETAIL, [arc(0, drop + 0.06, 0.12)]),
    ]


def snowman(rng: np.random.Generator) -> list[Part]:
    low, mid = rng.uniform(0.46, 0.54), rng.uniform(0.3, 0.36)
    balls = [arc(0, 1 - low, low), arc(0, 1 - 2 * low - mid * 0.6, mid)]
    face = 1 - 2 * low - mid * 0.6
    hat = [
        box(-0.36, face - mid - 0.02, 0.36, face - mid + 0.1),
        box(-0.22, face - mid - 0.38, 0.22, face - mid + 0.05),
    ]
    dots = [arc(s * 0.11, face - 0.04, 0.05) for s in (-1, 1)] + [arc(0, y, 0.06) for y in (0.3, 0.52, 0.74)]
    return [
        Part(BODY, balls),
        Part(TRIM, hat),
        Part(DETAIL, dots + [poly((0, face + 0.04), (0.3, face + 0.1), (0, face + 0.14))]),
    ]


def crown(rng: np.random.Generator) -> list[Part]:
    spikes, valley = rng.integers(3, 6), rng.uniform(0.0, 0.2)
    tips = np.stack([np.linspace(-0.9, 0.9, spikes), np.full(spikes, -0.55)], axis=1)
    zigzag = np.insert(tips, range(1, spikes), (tips[:-1] + tips[1:]) / 2 * (1, 0) + (0, valley), axis=0)
    gems = [arc(x, 0.57, 0.09) for x in (-0.4, 0, 0.4)]
    pearls = [arc(x, y, 0.12) for x, y in tips]
    return [
        Part(BODY, [poly((-0.75, 0.4), *zigzag, (0.75, 0.4))]),
        Part(TRIM, [box(-0.75, 0.38, 0.75, 0.75), *pearls]),
        Part(DETAIL, gems),
    ]


Shape = Callable[[np.random.Generator], list[Part]]

# Class c (1..20, the PNG value) is entry c - 1; fold f is entries 5f .. 5f+4, a row. Relatives sit in different folds:
# tree, umbrella and lamp are a cap on a stem; house, boat and rocket a triangle on a body; key, anchor and hammer bars.
SHAPES: tuple[Shape, ...] = (
    *(star, fish, tree, house, key),
    *(mug, mushroom, ladder, heart, umbrella),
    *(anchor, bottle, flower, boat, butterfly),
    *(rocket, hammer, lamp, snowman, crown),
)
NAMES: tuple[str, ...] = tuple(shape.__name__ for shape in SHAPES)
