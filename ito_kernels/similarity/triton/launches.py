"""The kernels' arguments, and their launch.

The members of the structs have the names of the kernels' arguments and are passed one by one:
Triton would specialise numbers in a tuple and compile for every batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpu
from ..gpu import Operands, Split, dense
from . import kept, tiles
from .plan import INTERPRETED, Plan, device_context

MERGE_BLOCK = 256


class Scores(NamedTuple):
    """The arguments for computing a tile of S."""

    a: Tensor | TensorDescriptor
    b: Tensor | TensorDescriptor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    row_limit: Tensor | None
    col_limit: Tensor | None
    n: int
    m: int
    d: int
    stride_a: int
    stride_b: int
    diagonal: int
    EVEN_D: bool
    SCALE: str
    SELF: bool
    TMA: bool
    PRECISION: str
    INTERPRETED: bool
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls, plan: Plan, op: Operands, tile: tiles.Tile, k: int, transposed: bool = False
    ) -> Scores:
        """k: the columns of features that are loaded at a time. transposed: whether `op` is that of
        the transposed matrix."""
        p, tma = plan.problem, plan.arch.tma
        limit, sides = dense(p.row_limit), ("row", "col")

        def source(x: Tensor, rows: int) -> Tensor | TensorDescriptor:
            if not tma:
                return x
            return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, k])

        return cls(
            a=source(op.a, tile.m),
            b=source(op.b, tile.n),
            scale=op.scale,
            row_bias=op.row_bias,
            col_bias=op.col_bias,
            row_ids=op.row_ids,
            col_ids=op.col_ids,
            row_limit=None if transposed else limit,
            col_limit=limit if transposed else None,
            n=op.a.shape[0],
            m=op.b.shape[0],
            d=op.a.shape[1],
            stride_a=op.a.stride(0),
            stride_b=op.b.stride(0),
            diagonal=-p.diagonal if transposed else p.diagonal,
            EVEN_D=op.a.shape[1] % k == 0,
            SCALE="one" if op.scale.ndim == 0 else sides[transposed],
            SELF=p.exclude_self,
            TMA=tma,
            PRECISION=plan.arithmetic if p.a.dtype == torch.float32 else "ieee",
            INTERPRETED=INTERPRETED,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


class Groups(NamedTuple):
    """The split of work. `row_groups` is in `Sums`: only `sums_kernel` takes it."""

    row_tiles: int
    col_tiles: int
    col_groups: int

    @classmethod
    def of(cls, split: Split) -> Groups:
        return cls(split.row_tiles, split.col_tiles, split.col_groups)


class Sums(NamedTuple):
    shift: Tensor
    row_slots: Tensor | None
    col_slots: Tensor | None
    pair_scores: Tensor | None
    cache: Tensor | TensorDescriptor | None
    stride_cache: int | None
    cached_rows: int | None
    row_groups: int
    ROWS: bool
    COLS: bool
    POSITIVES: str
    EXCLUDE_POSITIVES: bool
    TRIANGLE: bool
    BLOCK_K: int
    KEPT: int
    PARTS: int


class SoftplusRows(NamedTuple):
    row_slots: Tensor
    BLOCK_K: int


class Merge(NamedTuple):
    slots: Tensor
    pair_scores: Tensor | None
    counts: Tensor | None
    ids: Tensor | None
    shift: Tensor
    max_out: Tensor
    logsum_out: Tensor
    pos_out: Tensor | None
    underflowed: Tensor
    length: int
    groups: int
    offset: int
    first_pair: int
    last_pair: int
    BIASED: bool
    POSITIVES: str
    LEAST: float = gpu.LEAST
    BLOCK: int = MERGE_BLOCK


class Maxima(NamedTuple):
    underflowed: Tensor | None
    max_out: Tensor
    logsum_out: Tensor
    pos_out: Tensor | None
    neg_max_out: Tensor | None
    POSITIVES: str
    EXCLUDE_POSITIVES: bool
    BLOCK_K: int


class Weights(NamedTuple):
    """The arguments for computing W from S: see `gpu.Weights` and `gpu.SideWeights`."""

    shift: Tensor | None
    underflowed: Tensor | None
    row_weights: Tensor | None
    col_weights: Tensor | None
    row_shifts: Tensor | None
    col_shifts: Tensor | None
    SOFTPLUS: bool
    POSITIVES: str
    EXCLUDE_POSITIVES: bool
    FIXED: bool

    @classmethod
    def of(cls, call: gpu.Backward, norm: Tensor | None) -> list[Weights]:
        """For both kinds of a kernel, one of which returns at once. Softplus and fp32 have one."""
        p, weights = call.problem, call.weights(norm)
        options = {
            "SOFTPLUS": call.softplus,
            "POSITIVES": p.positives or "none",
            "EXCLUDE_POSITIVES": p.exclude_positives,
        }

        def of(name: str) -> list[Tensor | None]:
            return [side and getattr(side, name) for side in (weights.row, weights.col)]

        fixed = cls(*weights[:2], *of("fixed"), None, None, FIXED=True, **options)
        if call.softplus:
            return [fixed]
        alone = gpu.exact_gradient(p)
        underflowed = None if alone else weights.underflowed
        exact = cls(None, underflowed, *of("exact"), *of("shifts"), FIXED=False, **options)
        return [exact] if alone else [fixed, exact]

    def transposed(self) -> Weights:
        return self._replace(
            row_weights=self.col_weights,
            col_weights=self.row_weights,
            row_shifts=self.col_shifts,
            col_shifts=self.row_shifts,
        )


class Panel(NamedTuple):
    panel_factor: Tensor | None
    panel: Tensor | None
    stride_panel: int
    panel_row: int
    panel_col: int
    scale_sums: Tensor | None
    row_sums: Tensor | None
    col_sums: Tensor | None
    softplus_sums: Tensor | None
    BLOCK_K: int
    PARTS: int


class Reweight(NamedTuple):
    cache: Tensor
    pair_weights: Tensor
    underflowed: Tensor
    row_weights: Tensor | None
    col_weights: Tensor | None
    panel: Tensor
    n: int
    m: int
    stride_cache: int
    stride_panel: int
    diagonal: int
    panel_row: int
    panel_col: int
    BLOCK_M: int = kept.BLOCK[0]
    BLOCK_N: int = kept.BLOCK[1]
    num_warps: int = 4


class Gradient(NamedTuple):
    factor: Tensor
    grad: Tensor | None
    stride_grad: int
    scale_sums: Tensor | None
    row_sums: Tensor | None
    softplus_sums: Tensor | None
    BLOCK_D: int


def launch(kernel, programs: int, *structs: tuple) -> None:
    arguments = {name: x for struct in structs for name, x in struct._asdict().items()}
    with device_context(next(x for x in arguments.values() if isinstance(x, Tensor)).device):
        kernel[(programs,)](**arguments, **tiles.COMPILE)
