"""Tile shapes of the Triton kernels for each architecture, and the size of W panels.

Chosen from machine code, not from timings: `benchmarks/predict/gpu_static.py` compiles entries
in a few variants, fails if one of these spills, and predicts the time. docs/gpu-static.md names
other variants that spill.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, isqrt
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def around(tile: Tile) -> list[Tile]:
    """The tiles that autotuning tries, the table's first: shorter, narrower, another pipeline."""
    return [
        tile,
        tile._replace(m=tile.m // 2),
        tile._replace(n=tile.n // 2),
        tile._replace(m=tile.m // 2, warps=tile.warps // 2),
        tile._replace(stages=tile.stages + 1),
    ]


class Arch(NamedTuple):
    """Tiles of one architecture, by arithmetic: "half" (bf16, fp16) and the three of fp32.

    tma: features come through tensor descriptors (Hopper and later), else through pointers.
    forward, panel: the statistics and the W panels, where the positives are given by position.
    ids: both, where they are given by ids: comparing and summing them takes registers.
    gradient: the fused gradient, D ≤ FUSED_D, where k is unused; not for every arithmetic.
    """

    name: str
    tma: bool
    forward: dict[str, Tile]
    panel: dict[str, Tile]
    ids: dict[str, Tile]
    gradient: dict[str, Tile]

    def parts(self, tile: Tile, softplus: bool = False) -> int:
        """By how many parts of its columns a tile is reduced. With 128 scores per thread, the
        columns' vectors, 3 registers for each of 32 columns, spill unless they come 8 at a time;
        loss and gradient of softplus together do so with 64."""
        threads = tile.warps * (64 if self.name == "gfx942" else 32)
        return 4 if tile.m * tile.n >= (64 if softplus else 128) * threads else 1


# Up to here the gradient's rows fit the registers. W would cost 6 bytes of memory traffic for
# 6·D operations: below D = 128 that is slower than computing S once more.
FUSED_D = 128


# fp32: ieee runs on the ordinary units. 3×tf32 holds each operand twice, as a large and a small
# part, so it gets the smallest tile.
IEEE, TF32X3 = Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 8, 3)
FP32 = {"tf32": Tile(128, 64, 32, 8, 3), "tf32x3": TF32X3, "ieee": IEEE}
FP32_IDS = FP32 | {"tf32": Tile(64, 64, 32, 8, 3)}
GRADIENT = {
    "half": Tile(64, 32, 0, 4, 2),
    "tf32": Tile(32, 32, 0, 4, 2),  # 3×tf32 and ieee spill at any size: they take panels
}

ARCHS = {
    # 128 × 128 asks L2 for 32 bytes of operands per clock, of the 47 that it gives: a wider tile
    # gains nothing. Eight warps: 64 scores per thread leave room for the column vectors; the 128
    # of four warps spill.
    "sm_80": Arch(
        "sm_80",
        False,
        forward={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        panel={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        ids={"half": Tile(64, 64, 64, 8, 3)} | FP32_IDS,
        gradient=GRADIENT,
    ),
    # The matrix unit is twice as fast and L2 is not: 256 × 128 asks it for 48 bytes per clock, of
    # about 39, where 128 × 128 would ask for 64. Four stages: 192 KiB, so that a quarter of the
    # next tile at D = 768 is loaded while one is reduced.
    "sm_90": Arch(
        "sm_90",
        True,
        forward={"half": Tile(256, 128, 64, 8, 4)} | FP32,
        panel={"half": Tile(256, 128, 64, 8, 4)} | FP32,
        ids={"half": Tile(128, 64, 64, 8, 3)} | FP32_IDS,
        gradient=GRADIENT | {"half": Tile(64, 64, 0, 4, 2)},
    ),
    # Scores come from tensor memory with a row per thread, so column vectors take a register per
    # column: 128 columns spill in the forward kernel (211), 64 with ids (40).
    "sm_100": Arch(
        "sm_100",
        True,
        forward={"half": Tile(128, 64, 64, 8, 4)} | FP32,
        panel={"half": Tile(128, 128, 64, 8, 3)} | FP32,
        ids={"half": Tile(128, 32, 64, 8, 3)} | FP32_IDS | {"ieee": TF32X3},
        gradient=GRADIENT,
    ),
    # 64 KiB of shared memory: two stages of 128 × 128 × 64. No 3×tf32 there.
    "gfx942": Arch(
        "gfx942",
        False,
        forward={"half": Tile(128, 128, 64, 8, 2), "tf32": FP32["tf32"], "ieee": IEEE},
        panel={"half": Tile(128, 128, 64, 8, 2), "tf32": FP32["tf32"], "ieee": IEEE},
        ids={"half": Tile(128, 64, 64, 8, 2), "tf32": FP32_IDS["tf32"], "ieee": IEEE},
        gradient=GRADIENT,
    ),
}


def interpreter() -> Arch:
    """It takes as long for a large tile as for a small one."""
    same = dict.fromkeys(("half", "tf32", "tf32x3", "ieee"), Tile(128, 128, 128, 4, 1))
    return Arch("interpreter", False, same, same, same, same)


@lru_cache(maxsize=32)
def device(device: torch.device) -> tuple[Arch, int]:
    """The architecture's tiles and the number of processors."""
    if device.type == "cpu":
        return interpreter(), 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return ARCHS["gfx942"], properties.multi_processor_count
    # 8.6 to 8.9 and 12.0 have 100 KiB of shared memory, which the tiles of 8.0 fit; only 9.0 has
    # warp-group and only 10.x has fifth-generation matrix instructions
    name = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return ARCHS[name], properties.multi_processor_count


def panel(n: int, m: int, d: int, elements: int, processors: int, square: bool) -> tuple[int, int]:
    """Rows and columns of a W panel of at most `elements` (or one tile of 128 × 128).

    Square panels cost the least traffic of gradients that are read and written once per panel. The
    side is such that the vendor's usual tiles of 128 × 256 fill the processors: at D = 768 on 132
    of them, 88 × 3 tiles are 2 full waves where 90 × 3 would take 3.
    """
    side = max(128, isqrt(elements) // 128 * 128)
    wave = 128 * processors // gcd(processors, -(-d // 256))
    if side >= wave:
        side = side // wave * wave
    if square:
        return min(side, n), min(side, n)
    rows = min(side, n)
    return rows, min(m, max(128, elements // rows // 128 * 128) if rows < side else side)
