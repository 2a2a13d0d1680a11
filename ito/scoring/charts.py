"""Charts of a report as inline SVG: lines over training steps, and a map of points."""

import html
import math
from collections.abc import Sequence

from ito.cli import one_line

COLOURS = ("#2463a8", "#c4572b", "#3d8a4f", "#7a4fa3", "#a88b24", "#28a0ae", "#c2417c", "#6b4226")
COLOURS += ("#8cb82b", "#777777")
POINTS = 300  # per line: more cannot be distinguished at this width
WIDTH, HEIGHT = 320, 190
Point = tuple[float, float]


def escaped(text: object, limit: int = 2000) -> str:
    """Any value as text of a page or of an attribute's value: without markup and control
    characters."""
    return html.escape(one_line(str(text), limit))


def lines(title: str, series: dict[str, list[Point]]) -> str:
    """A chart of lines over training steps; "" if there is no finite point.

    Of a line with more than POINTS points, every nth is drawn, including the last.
    """
    drawn = {name: thin([p for p in line if math.isfinite(p[1])]) for name, line in series.items()}
    points = [point for line in drawn.values() for point in line]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1
    low, high = (f(y for _, y in points) for f in (min, max))
    step = round_step((max(high, 0) - min(low, 0)) or 1)
    bottom, top = math.floor(min(low, 0) / step) * step, math.ceil(max(high, 0) / step) * step
    top = top if top > bottom else bottom + step
    many = len(drawn) > 1
    left, above = 46, 44 if many else 26
    inner_width, inner_height = WIDTH - left - 10, HEIGHT - above - 22

    def place(x: float, y: float) -> str:
        down = above + (1 - (y - bottom) / (top - bottom)) * inner_height
        return f"{left + x / right * inner_width:.1f},{down:.1f}"

    parts = [svg(title), f'<text x="2" y="14" font-weight="600">{escaped(title)}</text>']
    for n in range(round((top - bottom) / step) + 1):
        value = bottom + n * step
        y = place(0, value).split(",")[1]
        parts.append(
            f'<path d="M{left},{y}H{WIDTH - 10}" stroke="#e4e4e0"/>'
            f'<text x="{left - 5}" y="{float(y) + 4:.1f}" text-anchor="end" fill="#666">'
            f"{value:.6g}</text>"
        )
    base = HEIGHT - 6
    parts.append(f'<text x="{left}" y="{base}" fill="#666">0</text>')
    parts.append(
        f'<text x="{WIDTH - 10}" y="{base}" text-anchor="end" fill="#666">step {right:g}</text>'
    )
    at = 2.0
    for n, (name, line) in enumerate(drawn.items()):
        colour = COLOURS[n % len(COLOURS)]
        if len(line) == 1:
            x, y = place(*line[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        path = " ".join(place(x, y) for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if many:
            parts.append(f'<text x="{at:.0f}" y="31" fill="{colour}">{escaped(name)}</text>')
            at += 12 + 6.2 * len(name)
    return "".join([*parts, "</svg>"])


def points(title: str, groups: dict[str, tuple[Sequence[Point], Sequence[str], str]]) -> str:
    """A map; `groups[name]` has points, their names (shown on hover) and the marker "o" or "x"."""
    every = [p for place, _, _ in groups.values() for p in place]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    above = 24 + 15 * ((len(groups) + 1) // 2)
    scale = (WIDTH - 16) / max(right - left, high - low, 1e-9)
    height = above + 16 + (high - low) * scale
    parts = [svg(title, height), f'<text x="2" y="14" font-weight="600">{escaped(title)}</text>']
    for n, (name, (place, names, mark)) in enumerate(groups.items()):
        colour = COLOURS[n % len(COLOURS)]
        x, y = 2 + n % 2 * WIDTH // 2, 31 + n // 2 * 15
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escaped(name)}</text>')
        parts.append(
            f'<g fill="{colour}" stroke="none" opacity="0.65">'
            if mark == "o"
            else f'<g fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.65">'
        )
        for (x, y), about in zip(place, names, strict=True):
            cx, cy = WIDTH / 2 + (x - (left + right) / 2) * scale, above + 8 + (high - y) * scale
            about = f"<title>{escaped(about)}</title>"
            cross = f"M{cx - 2.4:.1f},{cy - 2.4:.1f}l4.8,4.8m0,-4.8l-4.8,4.8"
            parts.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.6">{about}</circle>'
                if mark == "o"
                else f'<path d="{cross}">{about}</path>'
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def svg(title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(title)}" '
        'font-family="system-ui, sans-serif" font-size="11">'
    )


def thin(line: list[Point]) -> list[Point]:
    every = -(-len(line) // POINTS) or 1
    return line[::-1][::every][::-1]


def round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that the span has three to seven steps."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return max(step for step in (power, 2 * power, 5 * power) if step <= span / 3 * 1.0001)
