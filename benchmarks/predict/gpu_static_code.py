"""Reads the machine code of kernels, for both compilers. `gpu_model.py` predicts times from it.

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
from pathlib import Path

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


def run_tool(tool: str, *arguments: str) -> str:
    """Run a program of the CUDA toolkit that Triton contains. Returns its standard output."""
    import triton.backends.nvidia as nvidia

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
                condition = "@" if found[1] and found[2].startswith(("BRA", "EXIT")) else ""
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


def blocks(row: dict) -> int:
    """The number of blocks that a processor holds at once, by registers, shared memory and
    threads. MI300X: 4 units of 512 registers per lane, 64 KiB of shared memory."""
    if row["arch"] not in LIMITS:
        waves = 4 * (512 // row["registers"])
        return max(1, min(waves // row["tile"][3], (64 << 10) // row["shared"]))
    registers, shared, max_threads = LIMITS[row["arch"]]
    threads = row["tile"][3] * 32
    granted = -(-row["registers"] // 8) * 8 * threads
    return min(
        registers // granted, shared * 1024 // (row["shared"] + 1024), max_threads // threads
    )
