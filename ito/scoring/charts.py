"""Where the parts of a report's figures are: lines over training steps, and a map of points.

`report.html` draws them. Coordinates are in units of the drawing, from its upper left corner.
"""

import math
from collections import Counter
from collections.abc import Sequence

POINTS = 300  # per line: more cannot be distinguished at this width
COLOURS = 10  # that pages.css has
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 190, 46, 22, 158
Point = tuple[float, float]


def lines(
    title: str, y_name: str, about: str, series: dict[str, list[Point]], log: bool = False
) -> list[dict]:
    """A chart of lines over training steps; [] if there is no finite point.

    log: a logarithmic axis, if all values are above 0. Of a line with more than POINTS points,
    every nth is drawn, including the last.
    """
    drawn = {name: thin([p for p in line if math.isfinite(p[1])]) for name, line in series.items()}
    drawn = {name: line for name, line in drawn.items() if line}
    values = [y for line in drawn.values() for _, y in line]
    if not values:
        return []
    log = log and min(values) > 0
    ticks = (log_ticks if log else even_ticks)(min(values), max(values))
    scale = math.log10 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    last = max(x for line in drawn.values() for x, _ in line) or 1

    def across(x: float) -> float:
        return round(LEFT + x / last * (WIDTH - 10 - LEFT), 1)

    def down(y: float) -> float:
        return round(TOP + (high - scale(y)) / (high - low) * (BOTTOM - TOP), 1)

    steps = [x for x in even_ticks(0, last) if x < 0.85 * last]
    return [
        {
            "title": title,
            "about": about,
            "told": "; ".join(f"{n}, {x[0][1]:.3g} to {x[-1][1]:.3g}" for n, x in drawn.items()),
            "y_name": f"{y_name}, logarithmic" if log else y_name,
            "x_name": "step",
            "y_ticks": [(down(y), f"{y:.6g}") for y in ticks],
            "x_ticks": [(across(x), f"{x:.6g}") for x in [*steps, last]],
            "legend": [(name, n % COLOURS, "━") for n, name in enumerate(drawn) if len(drawn) > 1],
            "lines": [
                (n % COLOURS, [(across(x), down(y)) for x, y in line])
                for n, line in enumerate(drawn.values())
            ],
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - 10,
            "bottom": BOTTOM,
        }
    ]


def points(title: str, about: str, groups: dict[str, tuple[Sequence[Point], Sequence[str], str]]):
    """A map; `groups[name]` has points, their names (shown on hover) and the marker "●" or "×"."""
    every = [p for place, _, _ in groups.values() for p in place]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    scale = (WIDTH - 16) / max(right - left, high - low, 1e-9)
    middle, top = WIDTH / 2 - (left + right) / 2 * scale, 8 + high * scale
    return {
        "title": title,
        "about": about,
        "width": WIDTH,
        "height": round(16 + (high - low) * scale, 1),
        "legend": [(name, n % COLOURS, groups[name][2]) for n, name in enumerate(groups)],
        "points": [
            (n % COLOURS, mark, *(round(c, 1) for c in (middle + x * scale, top - y * scale)), name)
            for n, (place, names, mark) in enumerate(groups.values())
            for (x, y), name in zip(place, names, strict=True)
        ],
    }


def most_frequent(labels: Sequence[str]) -> list[str]:
    """Each label, in the order of the alphabet, or "other" for those that have no colour left."""
    kept = {label for label, _ in Counter(labels).most_common(COLOURS - 1)}
    kept = set(labels) if len(set(labels)) <= COLOURS else kept
    return [label if label in kept else "other" for label in labels]


def thin(line: list[Point]) -> list[Point]:
    every = -(-len(line) // POINTS) or 1
    return line[::-1][::every][::-1]


def even_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from below both 0 and `low` to above `high`; the
    span has three to seven steps."""
    low, high = min(low, 0), max(high, 0)
    span = (high - low) or 1
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = max(step for step in (power, 2 * power, 5 * power) if step <= span / 3 * 1.0001)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most nine of them, from below `low` to above `high`; within two decades
    their double and fivefold too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = -(-(last - first) // 7)
    parts = (1, 2, 5) if last - first <= 2 else (1,)
    ends = range(first, last + every, every)
    ticks = [part * 10.0**n for n in ends for part in parts]
    below = max((tick for tick in ticks if tick <= low), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above] if below < above else ticks
