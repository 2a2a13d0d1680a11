"""Plots the report of scale.py: time and extra memory over N, beside N² and the memory's bound."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from plot import EAGER, MIB, MUTED, OURS, STYLE, format_mib


def draw(rows: list[dict], path: Path) -> None:
    """Write a picture with a panel for each D."""
    dims = sorted({row["d"] for row in rows})
    last = rows[-1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5 * len(dims), 5), dpi=160, layout="constrained")
        for ax, d in zip(figure.subplots(1, len(dims), squeeze=False).flat, dims, strict=True):
            _panel(ax, sorted((row for row in rows if row["d"] == d), key=lambda row: row["n"]))
        left = {"x": 0.01, "ha": "left"}
        figure.suptitle(
            "CLIP, fp32, forward + backward: time grows with N², memory with N",
            fontsize=14,
            fontweight="bold",
            **left,
        )
        figure.supxlabel(
            f"{last['cpu']}, {last['threads']} threads, torch {last['torch']}, {last['date'][:10]}."
            " Extra memory: peak beyond inputs and gradients.\nDashed: the time of the largest N,"
            " scaled with N²; the bound of the memory, 12·N·D bytes, vectors, kept scores and the"
            " tiles in work.",
            fontsize=9,
            color=MUTED,
            **left,
        )
        figure.savefig(path)


def _panel(ax: Axes, rows: list[dict]) -> None:
    sizes, seconds = [row["n"] for row in rows], [row["seconds"] for row in rows]
    ax.set_title(f"D = {rows[0]['d']}")
    quadratic = [seconds[-1] * (n / sizes[-1]) ** 2 for n in sizes]
    _lines(ax, "seconds", OURS, sizes, seconds, quadratic)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    memory = ax.twinx()
    measured = [math.nan if row["extra_bytes"] is None else row["extra_bytes"] for row in rows]
    bounds = [row["bound_bytes"] for row in rows]
    _lines(memory, "extra memory", EAGER, sizes, measured, bounds)
    memory.set_yscale("log", base=2)
    memory.set_ylim(4 * MIB, 2 * bounds[-1])
    memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_mib(value / MIB, _)))
    ax.set_xscale("log", base=2)  # of both
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.set_xlabel("N")
    for axis in (ax.xaxis, ax.yaxis, memory.yaxis):
        axis.set_minor_locator(NullLocator())


def _lines(
    ax: Axes, label: str, colour: str, sizes: list[int], measured: list[float], dashed: list[float]
) -> None:
    ax.plot(sizes, measured, color=colour, marker="o", linewidth=2.2)
    ax.plot(sizes, dashed, color=colour, linestyle="--", linewidth=1)
    ax.set_ylabel(label, color=colour)
