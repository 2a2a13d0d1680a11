"""Predicts the time of a loss and its gradients on a GPU, in bf16, as a range.

    python benchmarks/predict/gpu_model.py            writes the tables of docs/gpu-static.md again
    python benchmarks/predict/gpu_model.py --print    prints them

The instructions of the kernels come from machine code (`results/gpu_static.json`, which
`gpu_static.py` writes), the rates from CHIPS and ASSUMPTIONS, each with its source. Every
assumption has a fast and a slow end. A range is from all fast ends together to all slow ends
together; its middle is the mean of both. Nothing here has run on a GPU. `gpu_first_run.py` puts
what it measures beside these numbers.

A tile takes on its processor the longest of matrix instructions, issue of the instructions of the
loop, and reading the features from L2. What follows the loop comes after it, or partly beside the
loop of another block if the processor holds two. Stores to memory are partly hidden.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from gpu_static_code import MATRIX, blocks
from published import PUBLISHED, Published

from ito_kernels.similarity import gpu
from ito_kernels.similarity.triton import tiles

ROOT = Path(__file__).parents[2]
STATIC = Path(__file__).parent / "results" / "gpu_static.json"
PUBLISHED_KERNELS = STATIC.with_name("published_kernels.json")
PAGE = ROOT / "docs" / "gpu-static.md"
ENDS = ("fast", "slow")
N, DIMS = 65536, (512, 768)  # of the tables
VENDOR_TILE = (128, 256)  # of the vendor's matrix product, for whole waves


class Range(NamedTuple):
    """The two ends of an assumption, or of a prediction in milliseconds."""

    fast: float
    slow: float

    @property
    def middle(self) -> float:
        return (self.fast + self.slow) / 2

    def __str__(self) -> str:
        digits = 0 if self.slow >= 20 else 1
        fast, slow = (f"{x:.{digits}f}" for x in self)
        return fast if fast == slow else f"{fast} to {slow}"


class Assumption(NamedTuple):
    what: str
    ends: Range
    source: str


# Of every chip.
ASSUMPTIONS = {
    "vendor": Assumption(
        "the vendor's product, share of the best product measured on the chip", Range(0.91, 0.735),
        "H100, of 794.5 TFLOP/s: 720 at the shapes of language models (SemiAnalysis, 2024), 584"
        " reported for 65,536 × 1,024 × 1,024 on a page that was not found again",
    ),
    "memory": Assumption(
        "memory rate, share of the data sheet's", Range(0.85, 0.66),
        "gpu-benches, reading and writing: A100 1.73 of 2.04 TB/s, H200 3.17 of 4.8",
    ),
    "issue": Assumption("share of the issue slots used", Range(0.85, 0.60), "a guess"),
    "special": Assumption("rate of exp2 reached, of 16 per clock", Range(0.90, 0.80), "a guess"),
    "hidden": Assumption(
        "share of the stores, and of adding gradients, that is hidden", Range(1.0, 0.5), "a guess"
    ),
    "beside": Assumption(
        "two blocks on a processor: share of the shorter of loop and rest that is hidden",
        Range(1.0, 0.5), "a guess",
    ),
}  # fmt: skip


class Chip(NamedTuple):
    """A GPU. Rates per clock are those of one processor; l2, loop and best are of the chip."""

    arch: str
    processors: int
    peak: float  # TFLOP/s in bf16, dense
    lanes: int  # of all instructions but matrix ones, per clock
    special: int  # lanes of exp2, reciprocal, per clock
    shuffles: int  # lanes per clock
    memory: float  # TB/s of the data sheet
    best: float  # TFLOP/s of the best matrix product measured
    loop: Range  # TFLOP/s of a Triton loop over D without what follows a tile
    l2: Range  # TB/s
    clock: Range  # GHz under this load
    sources: str


CHIPS = {
    "A100 SXM": Chip(
        "sm_80", 108, 312, 128, 16, 32, 2.04, 271.2,
        Range(0.70 * 312, 0.55 * 312), Range(5.4, 4.0), Range(1.41, 1.30),
        "white paper; loop: a guess, 55 to 70 % of the peak; L2: gpu-benches, 5.4 up to 28 MB, 4.0"
        " at 31 MB; clock: 1.41 held under load (Chips and Cheese), 1.30 a guess",
    ),
    "H100 SXM": Chip(
        "sm_90", 132, 989, 128, 16, 32, 3.35, 794.5,
        Range(666, 505), Range(9.7, 6.9), Range(1.755, 1.60),
        "data sheet; loop: 666 is a Triton product with tensor descriptors at K = 4,096"
        " (tritonbench, pull request 894, its GPU not named), 505 a guess; L2: gpu-benches, 9.7 on"
        " an H200, 6.9 on an H100 PCIe; clock: a guess",
    ),
    "H200 SXM": Chip(
        "sm_90", 132, 989, 128, 16, 32, 4.8, 794.5,
        Range(666, 505), Range(9.7, 6.9), Range(1.755, 1.60), "data sheet; the rest as H100",
    ),
    "B200": Chip(
        "sm_100", 148, 2250, 128, 16, 32, 8.0, 1745,
        Range(0.55 * 2250, 0.35 * 2250), Range(9.7 * 148 / 132, 6.9 * 148 / 132), Range(1.85, 1.50),
        "data sheet; loop: a guess, 35 to 55 % of the peak without warp specialisation; L2: a"
        " guess, as H100 per processor; clock: a guess",
    ),
    "MI300X": Chip(
        "gfx942", 304, 1307, 64, 16, 32, 5.3, 668.4,
        Range(0.40 * 1307, 0.25 * 1307), Range(34.4, 11.9), Range(2.1, 1.4),
        "data sheet; loop: a guess, 25 to 40 % of the peak; L2: 34.4 is 128 bytes per clock and"
        " channel (CDNA 3 white paper), 11.9 the Infinity Cache (Chips and Cheese); clock: a guess",
    ),
}  # fmt: skip
BEST_SOURCE = (
    "best product measured: the table of maximum achievable matmul FLOPS in Stas Bekman's Machine"
    " Learning Engineering (A100, H100 and H200, B200, MI300X)"
)


class Pass(NamedTuple):
    """One kernel over all scores. kernel: its row in the machine code. moved: bytes of memory that
    it reads or writes per score."""

    name: str
    kernel: str
    moved: int


class Design(NamedTuple):
    """How a loss and its gradients are computed. vendor: matrix products by the vendor's library.
    scaled: bytes per score that a pass without matrix products reads and writes."""

    passes: tuple[Pass, ...]
    vendor: int
    scaled: int = 0

    @property
    def products(self) -> int:
        return len(self.passes) + self.vendor


# A design is shown if its kernels are in the machine code.
DESIGNS = {
    "CLIP": Design((Pass("forward", "forward clip", 0), Pass("W", "panel clip", 2)), 2),
    "CLIP, exponentials kept": Design((Pass("forward", "forward clip kept", 2),), 2, 4),
    "SigLIP": Design((Pass("W", "panel siglip", 2),), 2),
    "CLIP, CUDA kernels": Design(
        (Pass("forward", "cuda forward", 0), Pass("W", "cuda panel", 2)), 2
    ),
}


def load(path: Path = STATIC) -> dict[tuple[str, str], dict]:
    """The kernels in bf16, by architecture and name. The CUDA kernels are there for the A100 only:
    Hopper reaches its published rate only with wgmma instructions, which they do not use."""
    kernels = json.loads(path.read_text())["kernels"]
    rows = {(r["arch"], r["kernel"]): r for r in kernels["triton"] if r["arithmetic"] == "half"}
    for r in kernels["cuda"]:
        if (r["arch"], r["arithmetic"]) == ("sm_80", "bf16"):
            rows["sm_80", f"cuda {r['kernel']}"] = r
    return rows


# One end.


def share(name: str, end: str) -> float:
    return getattr(ASSUMPTIONS[name].ends, end)


def per_clock(chip: Chip, rate: float, end: str) -> float:
    """What a processor does in a clock of what the chip does 10¹² times a second."""
    return rate * 1e3 / (chip.processors * getattr(chip.clock, end))


def loop_and_rest(row: dict, chip: Chip, d: int, end: str) -> tuple[float, float, float]:
    """The clocks of a tile: of its loop over D, of what follows it, and of its reads from L2."""
    m, n, k, warps, _ = row["tile"]
    threads = warps * (64 if row["arch"].startswith("gfx") else 32)
    step, tile = (
        Counter({op: c for op, c in row[x].items() if op not in MATRIX[row["arch"]]})
        for x in ("per_step", "per_tile")
    )
    lanes = chip.lanes * share("issue", end)
    shuffles = tile["SHFL"] + tile["ds_bpermute_b32"]
    loads = (m + n) * d * row["element"] / per_clock(chip, getattr(chip.l2, end), end)
    loop = max(
        2 * m * n * d * row.get("products", 1) / per_clock(chip, getattr(chip.loop, end), end),
        step.total() * -(-d // k) * threads / lanes,
    )
    rest = max(
        tile.total() * threads / lanes,
        tile["special"] * threads / (chip.special * share("special", end)),
        shuffles * threads / chip.shuffles,
    )
    return loop, rest, loads


def tile_clocks(row: dict, chip: Chip, d: int, moved: int, end: str) -> float:
    """The clocks that a processor needs for a tile."""
    m, n, k, _, stages = row["tile"]
    loop, rest, loads = loop_and_rest(row, chip, d, end)
    if blocks(row) > 1:
        loop = max(loop, loads)
        clocks = loop + rest - share("beside", end) * min(loop, rest)
    else:
        # only reads for the next tile run beside the rest, for as many steps as there are stages
        ahead = min(1, (stages - 1) / -(-d // k)) if row["ahead"] else 0
        clocks = max(loop, loads - min(rest, ahead * loads)) + rest
    rate = per_clock(chip, chip.memory * share("memory", end), end)
    stores = m * n * moved / rate
    return max(stores, clocks + (1 - share("hidden", end)) * stores)


def waves(work: int, places: int) -> float:
    """How much longer the busiest place works than all would if they shared the work evenly."""
    return -(-work // places) * places / work


def pass_ms(row: dict, chip: Chip, n: int, d: int, moved: int, end: str) -> float:
    """The milliseconds of one kernel over n × n scores."""
    rows, cols = row["tile"][:2]
    places = chip.processors * blocks(row)
    if row["kernel"].startswith("forward"):
        split = gpu.split(n, n, rows, cols, places, False)
        tiles_of_one = split.row_tiles * split.col_tiles * -(-split.programs // places)
    else:  # panel by panel
        high, wide = panel(chip, n, d)
        number = math.ceil(n / high) * math.ceil(n / wide)
        tiles_of_one = number * -(-math.ceil(high / rows) * math.ceil(wide / cols) // places)
    clocks = tiles_of_one * blocks(row) * tile_clocks(row, chip, d, moved, end)
    return clocks / getattr(chip.clock, end) * 1e-6


def panel(chip: Chip, n: int, d: int) -> tuple[int, int]:
    return tiles.panel(n, n, d, gpu.PANEL_BYTES // 2, chip.processors, False)


def vendor_ms(chip: Chip, m: int, n: int, k: int, end: str) -> float:
    """The milliseconds of the vendor's product of m × k by k × n, in whole waves."""
    high, wide = VENDOR_TILE
    rate = chip.best * share("vendor", end) * 1e12
    longer = waves(math.ceil(m / high) * math.ceil(n / wide), chip.processors)
    return 2e3 * m * n * k / rate * longer


def memory_ms(chip: Chip, nbytes: float, end: str) -> float:
    return nbytes / (chip.memory * share("memory", end)) * 1e-9


def gradients_ms(design: Design, chip: Chip, n: int, d: int, end: str) -> float:
    """The vendor's products, panel by panel, with gradients that are read and written in fp32."""
    high, wide = panel(chip, n, d)
    number = math.ceil(n / high) * math.ceil(n / wide)
    one = vendor_ms(chip, high, d, wide, end) + (design.vendor - 1) * vendor_ms(
        chip, wide, d, high, end
    )
    # panels at the edge are smaller: their share of the whole
    products = one * n * n / (high * wide)
    added = number * (high + wide) * d * 4 * 2
    return products + (1 - share("hidden", end)) * memory_ms(chip, added, end)


def parts(design: Design, chip: Chip, n: int, d: int, rows: dict) -> dict[str, Range]:
    """The predicted milliseconds of each part of a design. Raises ValueError for a kernel of which
    no loop was found in the machine code: its time would be far too short."""
    for p in design.passes:
        row = rows[chip.arch, p.kernel]
        if not (row.get("per_step") and row.get("per_tile")):
            raise ValueError(f"{p.kernel} on {chip.arch}: no loop over steps and tiles was found")

    def both(function, *args) -> Range:
        return Range(*(function(*args, end) for end in ENDS))

    out = {
        p.name: both(pass_ms, rows[chip.arch, p.kernel], chip, n, d, p.moved) for p in design.passes
    }
    if design.scaled:
        out["W"] = both(memory_ms, chip, design.scaled * n * n)
    return out | {"products": both(gradients_ms, design, chip, n, d)}


def total(times: dict[str, Range]) -> Range:
    return Range(sum(x.fast for x in times.values()), sum(x.slow for x in times.values()))


def available(rows: dict, chip: Chip) -> dict[str, Design]:
    return {
        name: design
        for name, design in DESIGNS.items()
        if all((chip.arch, p.kernel) in rows for p in design.passes)
    }


# Published figures of other packages.


def published_ms(figure: Published, rows: dict) -> Range:
    """What the model says of another package's figure."""
    chip, f = CHIPS[figure.chip], figure
    ends = []
    for end in ENDS:
        ms = sum(vendor_ms(chip, *shape, end) * number for shape, number in f.vendor)
        ms += memory_ms(chip, f.moved * f.n * f.m, end)
        for kernel, d, times in f.kernels:
            row = rows[kernel]
            tile = row["tile"]
            places = chip.processors * blocks(row)
            number = math.ceil(f.n / tile[0]) * math.ceil(f.m / tile[1])
            if row["whole_rows"]:  # a block takes all columns of its rows
                per_place = -(-math.ceil(f.n / tile[0]) // places) * math.ceil(f.m / tile[1])
            else:
                per_place = -(-number // places)
            clocks = times * per_place * blocks(row) * tile_clocks(row, chip, d, 0, end)
            ms += clocks / getattr(chip.clock, end) * 1e-6
        ends.append(ms)
    return Range(*ends)


# Tables.


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def prediction_table(rows: dict) -> str:
    lines = []
    for (name, design), (chip_name, chip), d in (
        (x, c, d) for x in DESIGNS.items() for c in CHIPS.items() for d in DIMS
    ):
        if name not in available(rows, chip):
            continue
        times = parts(design, chip, N, d, rows)
        whole = total(times)
        rate = design.products * 2 * N * N * d / chip.peak * 1e-9
        share_of_peak = [f"{100 * rate / x:.0f}" for x in (whole.slow, whole.fast)]
        cells = [str(times[x]) if x in times else "–" for x in ("forward", "W", "products")]
        lines.append([
            name, chip_name, f"{d:,}", *cells, f"**{whole}**", f"{whole.middle:.0f}",
            " to ".join(share_of_peak) + " %", str(design.products),
        ])  # fmt: skip
    head = ["loss", "GPU", "D", "forward", "W", "vendor's products", "in all", "middle",
            "of the peak", "products"]  # fmt: skip
    return table(head, lines)


def tile_table(rows: dict) -> str:
    """Both tiles of the H100."""
    chip, lines = CHIPS["H100 SXM"], []
    for kernel, moved in (("forward clip", 0), ("panel clip", 2)):
        for name in (kernel, f"{kernel}, two blocks"):
            if (row := rows.get((chip.arch, name))) is None:
                continue
            m, n, k, warps, stages = row["tile"]
            times = [
                str(Range(*(pass_ms(row, chip, N, d, moved, end) for end in ENDS))) for d in DIMS
            ]
            need = (m + n) * row["element"] / (2 * m * n)
            lines.append([
                kernel.split()[0].replace("panel", "W"),
                f"{m} × {n} × {k}, {warps} warps, {stages} stages",
                str(blocks(row)), str(row["registers"]), str(row["spills"]),
                f"{1e3 * need:.1f}", *times,
            ])  # fmt: skip
    head = ["kernel", "tile", "blocks", "registers", "spills", "TB/s of L2 per PFLOP/s",
            *(f"ms, D = {d:,}" for d in DIMS)]  # fmt: skip
    return table(head, lines)


def assumption_table() -> str:
    lines = [
        [a.what, f"{a.ends.fast:.2f}", f"{a.ends.slow:.2f}", a.source] for a in ASSUMPTIONS.values()
    ]
    return table(["of every GPU", "fast", "slow", "source"], lines)


def chip_table() -> str:
    def ends(x: Range, digits: int) -> str:
        return " to ".join(f"{y:.{digits}f}" for y in x)

    lines = [
        [
            name, str(c.processors), f"{c.peak:,}", f"{c.best:,.0f}", ends(c.loop, 0),
            f"{c.memory:g}", ends(c.l2, 1), ends(c.clock, 2), c.sources,
        ]
        for name, c in CHIPS.items()
    ]  # fmt: skip
    head = ["GPU", "processors", "peak, TFLOP/s", "best product measured", "loop, TFLOP/s",
            "memory, TB/s", "L2, TB/s", "GHz", "sources"]  # fmt: skip
    return table(head, lines)


def published_table() -> str:
    models = all_published()
    lines = [
        [f.name, f.what, f.chip, f"{f.ms:g}", str(x), f"{f.ms / x.middle:.2f}", f.remark]
        for f, x in zip(PUBLISHED, models, strict=True)
    ]
    head = ["package", "what", "GPU", "published ms", "model ms", "published / middle", "remark"]
    return f"{table(head, lines)}\n\n{fill(too_fast(), 100)}"


def all_published() -> list[Range]:
    rows = json.loads(PUBLISHED_KERNELS.read_text())
    return [published_ms(f, rows) for f in PUBLISHED]


def too_fast() -> str:
    """How far the published times of whole contrastive losses are above the model's middle."""
    ratios = [
        f.ms / x.middle for f, x in zip(PUBLISHED, all_published(), strict=True) if f.contrastive
    ]
    low, high = (f"{100 * (x - 1):.0f}" for x in (min(ratios), max(ratios)))
    return (
        f"The published times of two packages that compute contrastive losses are {low} to {high} %"
        " above the middle of what the same model says of them: expect the slow half of the ranges."
    )


def blocks_of_page(rows: dict) -> dict[str, str]:
    """What stands between the marks of docs/gpu-static.md."""
    return {
        "times": prediction_table(rows),
        "tiles": tile_table(rows),
        "assumptions": f"{assumption_table()}\n\n{chip_table()}\n\n{BEST_SOURCE}.",
        "published": published_table(),
    }


def page_on_speed(rows: dict) -> str:
    """What docs/speed.md says of these predictions."""

    def ms(design: str) -> list[Range]:
        return [
            total(parts(DESIGNS[design], CHIPS[chip], N, d, rows))
            for chip, d in (("H100 SXM", 512), ("H100 SXM", 768), ("A100 SXM", 512))
        ]

    first, second, third = ms("CLIP, exponentials kept")
    without = ", ".join(map(str, ms("CLIP")))
    return (
        f"For CLIP at N = {N:,} in bf16 the Triton kernels are predicted to need {first} ms at"
        f" D = 512 and {second} ms at D = 768 on an H100, and {third} ms at D = 512 on an A100,"
        f" with {2e-9 * N * N:.1f} GB of kept exponentials; without them {without} ms. {too_fast()}"
    )


def written(page: str, texts: dict[str, str]) -> str:
    """The page with the texts between their marks."""
    for name, text in texts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="write no file")
    options = parser.parse_args()
    rows = load()
    texts = blocks_of_page(rows)
    if options.print:
        print("\n\n".join(texts.values()))
    else:
        PAGE.write_text(written(PAGE.read_text(), texts))
    print(f"\ndocs/speed.md says: {page_on_speed(rows)}")


if __name__ == "__main__":
    main()
