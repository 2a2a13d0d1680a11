"""Plots the scaling model: step time over GPUs, step time over chunk sizes, and memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from plot import EAGER, GRID, INK, MUTED, OURS, OURS_OTHER, STYLE, THEIRS, TITLES
from scaling_model import (
    ALL_RANKS,
    BATCHES,
    LEAST_ROWS,
    Gpu,
    Step,
    best_chunk,
    chunk_sizes,
    compute_seconds,
    open_clip_memory,
    panel,
    size,
    step_seconds,
)

SHOWN = (BATCHES[0], BATCHES[2], BATCHES[4])  # global batches
SHADES = (OURS_OTHER, OURS, INK)
CHUNKED = ((64, 1 << 19), (4096, 1 << 22), (512, 1 << 22))  # GPUs, batch
MEMORY_ROWS = 1024


def draw(gpu: Gpu, dim: int, loss: str, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 5.2), dpi=160, layout="constrained")
        over_ranks, over_chunks, memory = figure.subplots(1, 3)
        _over_ranks(over_ranks, gpu, dim, loss)
        _over_chunks(over_chunks, gpu, dim, loss)
        _memory(memory, dim, loss)
        left = {"x": 0.01, "ha": "left"}
        figure.suptitle(
            f"Predicted, not measured: {TITLES.get(loss, loss)} on {gpu.name.upper()}, D = {dim},"
            " bf16, forward + backward",
            fontsize=14,
            fontweight="bold",
            **left,
        )
        figure.supxlabel(
            "Kernels: gpu_model.py. Network: published rates, NCCL's cost model. Left: solid is"
            " the step with the best chunk size, dotted its kernels alone; where they part,"
            " communication has taken over.\nMiddle: the dot is the chunk size to choose, the cross"
            f" the default. Right: {MEMORY_ROWS:,} rows for each GPU; the loss alone, without the"
            " encoders.",
            fontsize=9,
            color=MUTED,
            **left,
        )
        figure.savefig(path)


def _over_ranks(ax: Axes, gpu: Gpu, dim: int, loss: str) -> None:
    ax.set_title("Step time over the number of GPUs")
    for batch, colour in zip(SHOWN, SHADES, strict=True):
        all_steps = [Step(ranks, batch // ranks, dim, loss=loss) for ranks in ALL_RANKS]
        steps = [
            step._replace(chunk=best_chunk(step, gpu))
            for step in all_steps
            if step.rows >= LEAST_ROWS
        ]
        ranks = [step.ranks for step in steps]
        times = [1e3 * step_seconds(step, gpu) for step in steps]
        ax.plot(ranks, times, color=colour, linewidth=2.2)
        alone = [1e3 * compute_seconds(step, gpu) for step in steps]
        ax.plot(ranks, alone, color=colour, linewidth=1.3, linestyle=":")
        _name(ax, ranks[-1], times[-1], f"B = {_count(batch)}", colour, batch == SHOWN[0])
    _log(ax, ALL_RANKS[::3], "GPUs", _ms)
    ax.set_xlim(right=ALL_RANKS[-1] * 6)


def _over_chunks(ax: Axes, gpu: Gpu, dim: int, loss: str) -> None:
    ax.set_title("Step time over the chunk size")
    ticks = set()
    for (ranks, batch), colour in zip(CHUNKED, SHADES, strict=True):
        step = Step(ranks, batch // ranks, dim, loss=loss)
        sizes = chunk_sizes(step)
        times = [1e3 * step_seconds(step._replace(chunk=chunk), gpu) for chunk in sizes]
        ax.plot(sizes, times, color=colour, linewidth=2.2)
        chosen = best_chunk(step, gpu)
        ax.plot(chosen, times[sizes.index(chosen)], "o", color=colour, markersize=7)
        ax.plot(
            step.chunks()[0].keys, 1e3 * step_seconds(step, gpu), "x", color=colour, markersize=8
        )
        _name(ax, sizes[-1], times[-1], f"{ranks:,} GPUs\nB = {_count(batch)}", colour)
        ticks.update(sizes)
    _log(ax, [2048, 1 << 14, 1 << 17, 1 << 20], "keys in a chunk", _ms)
    ax.set_xlim(right=max(ticks) * 12)


def _memory(ax: Axes, dim: int, loss: str) -> None:
    ax.set_title("Memory over the global batch")
    batches = [1 << k for k in range(15, 23)]
    steps = [Step(batch // MEMORY_ROWS, MEMORY_ROWS, dim, loss=loss) for batch in batches]
    tenth = [step._replace(chunk=max(1 << 15, step.batch // 8)) for step in steps]
    lines = (
        ("open_clip", [open_clip_memory(s, False) for s in steps], THEIRS, 1.3),
        ("open_clip,\nlocal_loss", [open_clip_memory(s, True) for s in steps], EAGER, 1.3),
        ("chunks of B / 8", [s.memory() + panel(s) for s in tenth], OURS_OTHER, 2.2),
        ("default chunks", [s.memory() + panel(s) for s in steps], OURS, 2.2),
    )
    for name, values, colour, width in lines:
        ax.plot(batches, values, color=colour, linewidth=width)
        _name(ax, batches[-1], values[-1], name, colour)
    _log(ax, batches[::2], "global batch", lambda y, _: size(y))
    ax.set_yticks([1 << k for k in range(28, 50, 4)])
    ax.set_xlim(right=batches[-1] * 9)


def _name(ax: Axes, x: float, y: float, text: str, colour: str, below: bool = False) -> None:
    at = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    ax.annotate(text, (x, y), (6, -8 if below else 2), color=colour, **at)


def _log(ax: Axes, ticks: list[int], label: str, format_y) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ticks, [_count(x) for x in ticks])
    ax.yaxis.set_major_formatter(FuncFormatter(format_y))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color=GRID)
    ax.set_xlabel(label)


def _ms(y: float, _) -> str:
    return f"{y:g} ms" if y < 1000 else f"{y / 1000:g} s"


def _count(x: int) -> str:
    return f"{x >> 20}M" if x >= 1 << 20 else f"{x >> 10}K" if x >= 1 << 13 else f"{x:,}"
