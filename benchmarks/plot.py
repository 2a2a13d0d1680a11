"""Plots a benchmark report: time of every loss in units of one GEMM, and extra memory over N."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS, OURS_OTHER, THEIRS, EAGER = "#e4572e", "#f3a683", "#a9b4c2", "#5c6b7f"
MIB = 1 << 20
TITLES = {
    "clip": "CLIP",
    "multi_positive": "Multi-positive InfoNCE, 4 per id",
    "siglip": "SigLIP",
    "nt_xent": "NT-Xent, 2N rows",
    "supcon": "SupCon, 2N rows",
}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


def draw(report: dict, dtype: str, path: Path) -> None:
    """Write a picture of the results for one dtype: bars for the largest N, memory for all N."""
    rows = [row for row in report["rows"] if row["dtype"] == dtype]
    largest = max(row["n"] for row in rows)
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    by_loss = {x: [r for r in rows if (r["loss"], r["n"]) == (x, largest)] for x in losses}
    memory = [
        row
        for row in rows + report["memory"]
        if (row["loss"], row["dtype"]) == (losses[0], dtype) and row["extra_bytes"]
    ]
    columns = min(3, len(losses) + 1)
    lines = math.ceil((len(losses) + 1) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * columns, 3.1 * lines + 0.7), dpi=160, layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        most = max(len(bars) for bars in by_loss.values())
        for ax, (loss, bars) in zip(axes, by_loss.items(), strict=False):
            _bars(ax, bars, _best(bars))
            ax.set_ylim(most - 0.4, -0.6)  # bars have the same thickness in all panels
            ax.set_title(TITLES.get(loss, loss))
        ax = axes[len(losses)]
        ax.set_title(f"{TITLES.get(losses[0], losses[0])}: extra memory")
        if memory:
            _memory(ax, memory, _best(by_loss[losses[0]]))
        for ax in axes[len(losses) + 1 :]:
            ax.set_axis_off()
        left = {"x": 0.01, "ha": "left"}
        figure.suptitle(
            f"Forward + backward: N = {largest}, D = {rows[0]['d']}, {dtype}",
            fontsize=14,
            fontweight="bold",
            **left,
        )
        figure.supxlabel(
            f"{report.get('gpu', report['cpu'])}, {report['threads']} CPU threads, torch"
            f" {report['torch']}, {report['date'][:10]}. Bars: time in units of one torch.mm of the"
            " same shape, measured in the same run; faster: than eager; limit: the products"
            " that are needed, at the processor's multiply-add peak.\nExtra memory: peak beyond"
            " inputs and gradients, whose own size is the grey area.",
            fontsize=9,
            color=MUTED,
            **left,
        )
        figure.savefig(path)


def _best(rows: list[dict]) -> str | None:
    """The fastest backend of this library, which is highlighted."""
    ours = [row for row in rows if row["contender"].startswith("ito")]
    return min(ours, key=lambda row: row["units"])["contender"] if ours else None


def _colour(name: str, best: str | None) -> str:
    if name == "eager":
        return EAGER
    if not name.startswith("ito"):
        return THEIRS
    return OURS if name == best else OURS_OTHER


def _bars(ax: Axes, rows: list[dict], best: str | None) -> None:
    names, units = [row["contender"] for row in rows], [row["units"] for row in rows]
    bars = ax.barh(names, units, color=[_colour(name, best) for name in names], height=0.72)
    ax.bar_label(bars, [_label(row) for row in rows], padding=4, fontsize=9, color=INK)
    ax.set_xlim(0, max(units) * 1.6)
    ax.xaxis.set_major_locator(NullLocator())
    ax.spines["bottom"].set_visible(False)


def _label(row: dict) -> str:
    """The bar's length, and in brackets the speed relative to eager and the share of the limit."""
    about = []
    if (row["vs_eager"] or 0) >= 1.05:
        about.append(f"{row['vs_eager']:.1f}× faster")
    if row.get("share_of_limit"):
        about.append(f"{row['share_of_limit']:.0%} of limit")
    return f"{row['units']:.1f}" + (f"  ({', '.join(about)})" if about else "")


def _memory(ax: Axes, rows: list[dict], best: str | None) -> None:
    sizes = sorted({row["n"] for row in rows})
    item = {"fp32": 4, "bf16": 2, "fp16": 2}[rows[0]["dtype"]]
    features = [4 * n * rows[0]["d"] * item / MIB for n in sizes]
    ends = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((r["n"], r["extra_bytes"] / MIB) for r in rows if r["contender"] == name)
        ours, colour = name == best, _colour(name, best)
        ax.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.6 if ours else 1.3,
            color=colour,
            zorder=3 if ours else 2,
        )
        ends.append((*points[-1], name, colour if name.startswith("ito") else EAGER))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    low, high = ax.get_ylim()
    ax.fill_between(sizes, features, low, color=GRID, zorder=0, linewidth=0)
    ax.set_ylim(low, high)
    ax.set_xticks(sizes, [f"N = {sizes[0]}", *map(str, sizes[1:])])
    ax.set_yticks([2.0**k for k in range(-4, 30, 2) if low <= 2.0**k <= high])
    ax.yaxis.set_major_formatter(FuncFormatter(format_mib))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color=GRID)
    _label_ends(ax, ends)


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Label the lines at their ends (x, y, name, colour), at least one line of text apart."""
    to_axes = ax.transData + ax.transAxes.inverted()
    floor = -1.0
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = to_axes.transform((x, y))
        floor = max(at[1], floor + 0.065)
        ax.annotate(
            name,
            xy=at,
            xytext=(1.04, floor),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8},
        )


def format_mib(mib: float, _) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"
