"""Tile shapes of the Triton kernels for each architecture, and the size of W panels.

The shapes were chosen from machine code, not from timings: `benchmarks/predict/gpu_static.py`
compiles the entries in a few variants and fails if one of these spills registers, and
`benchmarks/predict/gpu_model.py` predicts the time. docs/gpu-static.md names other variants that
spill. `benchmarks/gpu_first_run.sh` times each candidate of `tuning_candidates` on a GPU. To make
another tile permanent, write it into ARCHS; ITO_TRITON_AUTOTUNE=1 chooses it for one process.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, isqrt
from typing import NamedTuple

import torch

# One rounding for x·y + z, and one instruction. The default changes with the version of Triton.
COMPILE = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def two_blocks(tile: Tile) -> Tile:
    """Half the rows and warps, and a stage less: two blocks fit on a Hopper processor at a time
    where one of the given tile does."""
    return tile._replace(m=tile.m // 2, warps=tile.warps // 2, stages=max(1, tile.stages - 1))


def tuning_candidates(tile: Tile) -> list[Tile]:
    """The tiles that autotuning compares: the given tile first, then two blocks on a processor,
    with fewer rows, with fewer columns, with fewer warps, and with one more pipeline stage."""
    return [
        tile,
        two_blocks(tile),
        tile._replace(m=tile.m // 2),
        tile._replace(n=tile.n // 2),
        tile._replace(m=tile.m // 2, warps=tile.warps // 2),
        tile._replace(stages=tile.stages + 1),
    ]


class Arch(NamedTuple):
    """The tiles of one architecture.

    Each dict maps an arithmetic to a tile: "half" (bf16 and fp16), and for fp32 "tf32", "tf32x3"
    and "ieee".

    tma: load features through tensor descriptors (Hopper and later) instead of pointers.
    forward, panel: for the statistics and for the W panels, without ids.
    ids: for both, with ids. Comparing ids and summing over positives takes registers.
    maxima: for the statistics with true maxima.
    gradient: for the fused gradient, D ≤ FUSED_D. k is unused, and arithmetics may be missing.
    crowded: for the fused gradient with several options that take registers, if that needs another
        tile.
    """

    name: str
    tma: bool
    forward: dict[str, Tile]
    panel: dict[str, Tile]
    ids: dict[str, Tile]
    maxima: dict[str, Tile]
    gradient: dict[str, Tile]
    crowded: dict[str, Tile] = {}  # noqa: RUF012 (never changed)

    def kept_rows(self, tile: Tile, arithmetic: str) -> int:
        """How many rows of column sums the forward kernel keeps apart in registers.

        A thread has one row of eight in its part of a tile, so the others are summed by other
        threads. Adding these sums up takes 96 shuffles at 128 columns. With kept rows it is done
        once for each column tile instead of once for each tile. 1: add them up at once.
        """
        if self.name == "gfx942" or arithmetic == "ieee":
            return 1
        if self.name == "sm_100":  # a row for each thread
            return tile.m
        warps = tile.warps if self.name == "sm_90" else 4  # those that lie along the rows
        return min(8 * warps, tile.m // 2)

    def parts(self, tile: Tile, kernel: str, crowded: int = 0, exact: bool = False) -> int:
        """The number of parts in which the columns of a tile are reduced.

        With 128 scores per thread, the column vectors take 3 registers for each of 32 columns and
        spill. Tiles of 64 columns have room for them and for one option more. kernel: "forward" or
        "panel". crowded: how many options take further registers. exact: whether W takes an
        exponential for each side.
        """
        threads = tile.warps * (64 if self.name == "gfx942" else 32)
        narrow = self.name == "sm_90" and tile.n <= 64
        at_once = 64 if narrow or kernel == "forward" else 32
        at_once >>= min(2, max(0, crowded - narrow)) + exact
        return max(1, min(tile.m * tile.n // (threads * at_once), tile.n // 16))


# Up to this D the rows of the gradient fit in registers. Writing and reading W takes 6 bytes of
# memory traffic for 6·D operations: below D = 128 that is slower than computing S once more.
FUSED_D = 128


# fp32: "ieee" runs on the scalar units. 3×tf32 holds each operand twice, as a large and a small
# part, so it gets the smallest tile.
IEEE, TF32X3 = Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 8, 3)
IEEE_MAXIMA = Tile(64, 32, 16, 8, 2)
FP32 = {"tf32": Tile(128, 64, 32, 8, 3), "tf32x3": TF32X3, "ieee": IEEE}
FP32_IDS = FP32 | {"tf32": Tile(64, 64, 32, 8, 3)}
GRADIENT = {
    "half": Tile(64, 32, 0, 4, 2),
    "tf32": Tile(32, 16, 0, 4, 2),  # 3×tf32 and ieee spill at any size and use panels
}

ARCHS = {
    # 128 × 128 reads 32 bytes of operands per clock from L2, which delivers 47: a wider tile gains
    # nothing. With eight warps, 64 scores per thread leave room for the column vectors; the 128 of
    # four warps spill.
    "sm_80": Arch(
        "sm_80",
        False,
        forward={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        panel={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        ids={"half": Tile(64, 64, 64, 8, 3)} | FP32_IDS,
        maxima={"half": Tile(64, 64, 32, 8, 3)}
        | dict.fromkeys(FP32, TF32X3)
        | {"ieee": IEEE_MAXIMA},
        gradient=GRADIENT,
        crowded={"half": Tile(32, 32, 0, 4, 2)},
    ),
    # One block of 256 × 128 is a guess. It reads 48 bytes of operands from L2 per clock at the full
    # matrix rate, but nothing runs beside the reduction of a tile. Two blocks of 128 × 128
    # (`two_blocks`) hide it and read 64. docs/gpu-static.md has both predictions; the first run on
    # a GPU decides. Four stages take 192 KiB, so that at D = 768 a quarter of the next tile is
    # loaded while one is reduced.
    "sm_90": Arch(
        "sm_90",
        True,
        forward={"half": Tile(256, 128, 64, 8, 4)} | FP32,
        panel={"half": Tile(256, 128, 64, 8, 4)} | FP32,
        ids={"half": Tile(256, 64, 64, 8, 4)} | FP32_IDS,
        maxima={"half": Tile(128, 64, 64, 8, 3)} | FP32_IDS | {"ieee": IEEE_MAXIMA},
        gradient=GRADIENT | {"half": Tile(64, 64, 0, 8, 2)},
    ),
    # Scores are read from tensor memory with one row per thread, so column vectors take a register
    # per column. 128 columns spill in the forward kernel (211 instructions), 64 with ids (40).
    "sm_100": Arch(
        "sm_100",
        True,
        forward={"half": Tile(128, 64, 64, 8, 4)} | FP32,
        panel={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        ids={"half": Tile(128, 32, 64, 8, 3)} | FP32_IDS | {"ieee": TF32X3},
        maxima={
            "half": Tile(128, 32, 64, 8, 3),
            "tf32": FP32_IDS["tf32"],
            "tf32x3": Tile(64, 16, 32, 8, 3),
            "ieee": IEEE_MAXIMA,
        },
        gradient=GRADIENT,
    ),
    # 64 KiB of shared memory hold two stages of 128 × 128 × 64. There is no 3×tf32.
    "gfx942": Arch(
        "gfx942",
        False,
        forward={"half": Tile(128, 128, 64, 8, 2), "tf32": FP32["tf32"], "ieee": IEEE},
        panel={"half": Tile(128, 128, 32, 8, 2), "tf32": FP32["tf32"], "ieee": IEEE},
        ids={"half": Tile(128, 64, 64, 8, 2), "tf32": FP32_IDS["tf32"], "ieee": IEEE},
        maxima={"half": Tile(128, 64, 64, 8, 2), "tf32": FP32_IDS["tf32"], "ieee": IEEE},
        gradient=GRADIENT,
        crowded=dict.fromkeys(GRADIENT, Tile(32, 16, 0, 4, 2)),
    ),
}


def interpreter() -> Arch:
    """Large tiles: the interpreter takes as long for a large tile as for a small one."""
    same = dict.fromkeys(("half", "tf32", "tf32x3", "ieee"), Tile(128, 128, 128, 4, 1))
    return Arch("interpreter", False, same, same, same, same, same)


@lru_cache(maxsize=32)
def device(device: torch.device) -> tuple[Arch, int]:
    """The architecture of a device and its number of multiprocessors."""
    if device.type == "cpu":
        return interpreter(), 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return ARCHS["gfx942"], properties.multi_processor_count
    # Only 9.0 has warp-group and only 10.x has fifth-generation matrix instructions. All others
    # take the tiles of 8.0, which fit the 100 KiB of shared memory of 8.6 to 8.9 and 12.0.
    name = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return ARCHS[name], properties.multi_processor_count


def panel(n: int, m: int, d: int, elements: int, processors: int, square: bool) -> tuple[int, int]:
    """Rows and columns of a W panel of at most `elements` elements, at least 128 × 128.

    Gradients are read and written once per panel; square panels minimise this traffic. The size is
    chosen so that the vendor's usual tiles of 128 × 256 fill the processors: at D = 768 and 132
    processors, 88 × 3 tiles are 2 full waves, 90 × 3 tiles would take 3.

    square: return a square panel also at the edge, for a symmetric S.
    """
    side = max(128, isqrt(elements) // 128 * 128)
    wave = 128 * processors // gcd(processors, -(-d // 256))
    if side >= wave:
        side = side // wave * wave
    if square:
        return min(side, n), min(side, n)
    rows = min(side, n)
    covered = -(-rows // 256) * 256  # memory covers whole tiles, of 256 rows at most
    cols = max(128, elements // covered // 128 * 128) if rows < side else side
    return rows, min(m, cols)
