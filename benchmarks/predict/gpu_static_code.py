"""Reads the machine code of kernels and predicts their times, for both compilers.

A compiled kernel is a row, a dict with at least

    arch, kernel, element (bytes), registers, shared (bytes)
    tile: rows, columns, depth of a step, warps, stages
    per_step: instructions of one thread in a step of the loop over D, by family
    per_tile: instructions of one thread in a tile outside of these steps, by family
    ahead: whether the next tile is loaded while the current one is reduced
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia as nvidia

MATRIX = {
    "sm_80": ("HMMA",),
    "sm_86": ("HMMA",),
    "sm_89": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCHMMA", "UTCMMA", "HMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("v_mfma",),
}
# (registers, KiB of shared memory, threads) of a processor; each block reserves 1 KiB
LIMITS = dict.fromkeys(("sm_86", "sm_89", "sm_120"), (65536, 100, 1536))
LIMITS |= {"sm_80": (65536, 164, 2048), "sm_90": (65536, 228, 2048), "sm_100": (65536, 228, 2048)}


class Chip(NamedTuple):
    """Published dense rates of a GPU, per clock and processor unless stated otherwise."""

    arch: str
    processors: int
    clock: float  # GHz, boost
    matrix: float  # bf16 FLOP
    lanes: int  # of all other instructions
    special: int  # lanes of exp2, reciprocal
    shuffles: int  # lanes
    l2: float  # bytes; A100: 5,120 per clock for the chip (white paper); the others are assumed
    memory: float  # GB/s of the chip
    source: str


CHIPS = {
    "A100 SXM": Chip("sm_80", 108, 1.41, 2048, 128, 16, 32, 5120 / 108, 2039, "A100 white paper"),
    "H100 SXM": Chip("sm_90", 132, 1.83, 4096, 128, 16, 32, 5120 / 132, 3350,
                     "H100 white paper; L2 rate assumed equal to A100's per clock"),
    "MI300X": Chip("gfx942", 304, 2.1, 2048, 64, 16, 32, 64, 5300,
                   "CDNA 3 white paper; 64 bytes per clock and CU from L2"),
}  # fmt: skip
# The fraction of the peak that the vendor's matrix products reach at these sizes: an assumption.
VENDOR_SHARE = 0.75


def run_tool(tool: str, *arguments: str) -> str:
    """Run a program of the CUDA toolkit that Triton contains. Returns its standard output."""
    path = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def functions(sass: str) -> dict[str, tuple[list, dict]]:
    """Parse the output of nvdisasm: {symbol: ([(instruction, its labels)], {label: position})}. A
    branch with a condition is "@BRA"."""
    out = {}
    for part in re.split(r"\n\s*\.section\s+\.text\.", sass)[1:]:
        symbol = re.match(r"[\w$]+", part)[0]
        code, labels = [], {}
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line):
                condition = "@" if found[1] and found[2].startswith("BRA") else ""
                labels_of = re.findall(r"\.L_x_\d+", found[3])
                code.append((condition + found[2].rstrip(";"), labels_of))
        out[symbol] = code, labels
    return out


def family(op: str) -> str:
    """The family of an instruction: HMMA.16816.F32.BF16 → HMMA. All special functions are one
    family."""
    if op.startswith("MUFU"):
        return "special"
    if re.match(r"v_(exp|log|rcp|sqrt)_f32", op):
        return "special"
    if op.startswith("v_mfma"):
        return "v_mfma"
    return op.split(".")[0]


def loops(code: list, labels: dict) -> list[range]:
    """The loops of a kernel: ranges of code whose last instruction branches to the first."""
    return [
        range(labels[target], at + 1)
        for at, (_, targets) in enumerate(code)
        for target in targets
        if target in labels and labels[target] <= at
    ]


def programs(row: dict) -> int:
    """The number of blocks per processor that registers, shared memory and threads allow. On AMD
    the number of waves per SIMD that registers allow."""
    if row["arch"] not in LIMITS:
        return min(8, max(1, 512 // max(row["registers"], 1)))
    registers, shared, max_threads = LIMITS[row["arch"]]
    threads = row["tile"][3] * 32
    granted = -(-row["registers"] // 8) * 8 * threads
    return min(
        registers // granted, shared * 1024 // (row["shared"] + 1024), max_threads // threads
    )


# Predictions.


def units(row: dict, chip: Chip, d: int, output_bytes: int) -> dict[str, float]:
    """The clocks that one tile takes on each unit of a processor."""
    m, n, k, warps, _ = row["tile"]
    step, tile = Counter(row["per_step"]), Counter(row["per_tile"])
    steps = -(-d // k)
    ops = Counter({op: c * steps for op, c in step.items()}) + tile
    width = 64 if row["arch"].startswith("gfx") else 32
    threads = warps * width
    ordinary = sum(c for op, c in ops.items() if op not in MATRIX[row["arch"]])
    epilogue = sum(tile.values())
    shuffles = sum(c for op, c in ops.items() if op in ("SHFL", "ds_bpermute_b32"))
    return {
        "matrix": 2 * m * n * d / chip.matrix,
        "issue": ordinary * threads / chip.lanes,
        "special": ops["special"] * threads / chip.special,
        "shuffle": shuffles * threads / chip.shuffles,
        "L2": (m + n) * d * row["element"] / chip.l2,
        "memory": m * n * output_bytes / (chip.memory / chip.clock / chip.processors),
        "epilogue": max(epilogue * threads / chip.lanes, tile["special"] * threads / chip.special),
    }


def tile_clocks(row: dict, chip: Chip, d: int, output_bytes: int) -> tuple[float, float, str]:
    """The clocks of one tile on one processor, their lower bound, and the limiting unit.

    If only one program fits on the processor, the reduction of a tile starts after its matrix
    instructions. Only loads of the next tile overlap with it, if the kernel loads ahead, for as
    many steps as the pipeline has stages.
    """
    clocks = units(row, chip, d, output_bytes)
    alone = clocks.pop("epilogue")
    limit = max(clocks, key=clocks.get)
    least = clocks[limit]
    if programs(row) != 1:
        return least, least, limit
    _, _, k, _, stages = row["tile"]
    ahead = min(1, (stages - 1) / -(-d // k)) if row["ahead"] else 0
    loads = clocks.pop("L2")
    return max(max(clocks.values()), clocks["matrix"] + alone,
               loads + max(0, alone - ahead * loads)), least, limit  # fmt: skip


def predict(rows: list[dict], parts: dict, chips: list[str]) -> list[dict]:
    """The predicted times of forward and backward in bf16 with N = M.

    parts: the kernels of each loss as (name of the part, kernel, bytes written per score).
    """
    out = []
    find = {(r["arch"], r["kernel"]): r for r in rows}
    for loss, name, size, d in product(parts, chips, (32768, 65536), (512, 768)):
        chip = CHIPS[name]
        if any((chip.arch, kernel) not in find for _, kernel, _ in parts[loss]):
            continue
        unit = 2 * size * size * d
        peak = chip.matrix * chip.processors * chip.clock * 1e9
        products = 2 * unit / (peak * VENDOR_SHARE)
        row = {"loss": loss, "chip": name, "n": size, "d": d}
        total = overlapped = products
        for part, kernel, written in parts[loss]:
            code = find[(chip.arch, kernel)]
            clocks, least, limit = tile_clocks(code, chip, d, written)
            tiles = size / code["tile"][0] * size / code["tile"][1] / chip.processors
            seconds = tiles / chip.clock * 1e-9
            row |= {f"{part}_ms": 1e3 * clocks * seconds, f"{part}_limit": limit}
            total, overlapped = total + clocks * seconds, overlapped + least * seconds
        out.append(row | {
            "units": 2 + len(parts[loss]),
            "products_ms": 1e3 * products, "total_ms": 1e3 * total,
            "overlapped_ms": 1e3 * overlapped,
        })  # fmt: skip
    return out
