"""What the backends for GPUs share on the host: tensors as kernels read them, the split of work,
and the gradients, once the kernels of a side or of a panel have run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Grads, Needs, Problem, SideStats, SideUpstream, Stats, Upstream

PANEL_BYTES = 256 << 20  # of one W panel: docs/gpu-static.md
# fp16 W is multiplied up to this: 4 terms of it stay below 65,504, and a softmax entry of 1/N keeps
# its 11 bits down to 1e-8
FP16_TOP = 4096.0


# ---- tensors


class Operands(NamedTuple):
    """Dense vectors, features on 16-byte boundaries, ids as int32; b is a where they are one."""

    a: Tensor
    b: Tensor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> Operands:
        p = problem
        a = _features(p.a, p.row_ids)
        shared = p.b is None and (p.row_ids is None or is_symmetric(p))
        b = a if shared else _features(p.a if p.b is None else p.b, p.col_ids)
        vectors = (dense(x) for x in (p.scale, p.row_bias, p.col_bias))
        return cls(a, b, *vectors, *_ranks(p))

    def exchanged(self) -> Operands:
        a, b, scale, row_bias, col_bias, row_ids, col_ids = self
        return Operands(b, a, scale, col_bias, row_bias, col_ids, row_ids)


def is_symmetric(problem: Problem) -> bool:
    """Whether S and the masks are symmetric. A limit is of rows alone. Ids are compared by place:
    values would need a wait for the device."""
    p = problem
    if p.b is not None or p.scale.ndim or p.row_bias is not None or p.col_bias is not None:
        return False
    if p.row_limit is not None or p.diagonal != 0:
        return False
    return p.row_ids is None or (
        p.row_ids.data_ptr() == p.col_ids.data_ptr() and p.row_ids.stride() == p.col_ids.stride()
    )


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _features(x: Tensor, ids: Tensor | None) -> Tensor:
    """Features with rows on 16-byte boundaries, as tensor descriptors and 16-byte loads want them.

    Padded rows, which may hold anything, become 0: in a matrix product 0 · NaN would spread.
    """
    step = 16 // x.element_size()
    aligned = x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0
    if ids is None and aligned:
        return x
    rows, d = x.shape
    out = x.new_empty(rows, -(-d // step) * step)[:, :d]
    if ids is None:
        return out.copy_(x)
    return torch.where((ids >= 0)[:, None], x, x.new_zeros(()), out=out)


def _ranks(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 with the same equalities, negative for padding: half the comparisons of int64.

    An id's rank is its place among the sorted column ids, M for a row's that is not there.
    """
    p = problem
    if p.row_ids is None:
        return None, None
    order = p.col_ids.sort().values
    cols = torch.searchsorted(order, p.col_ids)
    cols = torch.where(p.col_ids < 0, -1, cols).int()
    if is_symmetric(p):
        return cols, cols
    rows = torch.searchsorted(order, p.row_ids)
    found = order[rows.clamp(max=p.m - 1)] == p.row_ids
    return torch.where(p.row_ids < 0, -1, torch.where(found, rows, p.m)).int(), cols


def accumulate(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x @ y, accumulated in fp32 whatever the dtype of x and y."""
    if x.dtype == torch.float32 or not x.is_cuda:
        out.addmm_(x.float(), y.float())
    else:
        torch.addmm(out, x, y, out_dtype=torch.float32, out=out)


# ---- the split of work


class Split(NamedTuple):
    """Row tiles × column tiles, cut into groups: one program for each pair of groups."""

    row_tiles: int  # of a group
    col_tiles: int
    row_groups: int
    col_groups: int
    triangle: bool  # only pairs with row group ≤ column group

    @property
    def programs(self) -> int:
        if self.triangle:
            return self.row_groups * (self.row_groups + 1) // 2
        return self.row_groups * self.col_groups


@lru_cache(maxsize=256)
def split(n: int, m: int, tile_rows: int, tile_cols: int, processors: int, triangle: bool) -> Split:
    """The split with the least work on the busiest processor, then the fewest groups.

    Statistics are kept per row and group of columns, and per column and group of rows: memory is
    O((N + M)·√processors), and nothing is shared between programs.
    """
    if triangle:
        # groups of both sides must cover the same rows
        unit = max(tile_rows, tile_cols)
        units = -(-n // unit)

        def cost(groups: int) -> tuple[int, int]:
            waves = -(-(groups * (groups + 1) // 2) // processors)
            return waves * (-(-units // groups)) ** 2, groups

        most = min(units, 2 * isqrt(2 * processors) + 1)
        size = -(-units // min(range(1, most + 1), key=cost))
        groups = -(-units // size)
        return Split(size * unit // tile_rows, size * unit // tile_cols, groups, groups, True)
    tiles_m, tiles_n = -(-n // tile_rows), -(-m // tile_cols)

    def cut(groups: int) -> Split:
        row_tiles = -(-tiles_m // groups)
        col_tiles = -(-tiles_n // min(tiles_n, processors // groups))
        row_groups, col_groups = -(-tiles_m // row_tiles), -(-tiles_n // col_tiles)
        return Split(row_tiles, col_tiles, row_groups, col_groups, False)

    cuts = [cut(groups) for groups in range(1, min(tiles_m, processors) + 1)]
    return min(cuts, key=lambda s: (s.row_tiles * s.col_tiles, s.row_groups + s.col_groups))


# ---- forward


def both_sides(
    problem: Problem, row: Callable[[], SideStats], col: Callable[[], SideStats]
) -> Stats:
    """The statistics that are wanted, from what merges a side's. Those of a symmetric S are the
    same for both sides."""
    symmetric = is_symmetric(problem)
    rows = row() if problem.rows or symmetric else None
    cols = None
    if problem.cols:
        cols = col() if not symmetric else SideStats(*map(_copied, rows))
    return Stats(rows if problem.rows else None, cols)


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


# ---- backward


class Side(NamedTuple):
    """What backward knows of one side. Without statistics: the rows of softplus, or nothing."""

    upstream: SideUpstream = SideUpstream()
    stats: SideStats = SideStats(None, None)

    def added_to(self, other: Side) -> Side:
        """Of a symmetric S: dA takes (W + Wᵀ)·A, and W + Wᵀ is the W of a problem whose two sides
        have the same statistics and the sum of both sides' upstream vectors."""

        def first(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return y if x is None else x

        def total(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return first(x, y) if x is None or y is None else x + y

        return Side(
            SideUpstream(*map(total, self.upstream, other.upstream)),
            SideStats(*map(first, self.stats, other.stats)),
        )

    def vectors(self) -> Vectors:
        u, alpha = map(_fp32, self.upstream)
        top, logsum, pos = map(_fp32, (self.stats.max, self.stats.logsum, self.stats.pos))
        factors = None
        if top is not None and (u is not None or alpha is not None):
            factor = torch.zeros_like(top) if u is None else u * torch.exp(-logsum)
            empty = top == -torch.inf
            factors = torch.stack([top.masked_fill(empty, 0), factor.masked_fill(empty, 0)], 1)
        return Vectors(u, factors, alpha, pos)


class Vectors(NamedTuple):
    """A side as kernels take it. factors: (shift, factor) in one tensor, with upstream·softmax =
    factor·e^(S - shift); none for softplus."""

    u: Tensor | None = None
    factors: Tensor | None = None
    alpha: Tensor | None = None
    pos: Tensor | None = None


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class Backward(NamedTuple):
    """What the two shapes of backward, fused and in panels, are told."""

    problem: Problem
    op: Operands
    row: Vectors
    col: Vectors
    symmetric: bool  # W + Wᵀ is computed, from `row` alone
    softplus: bool
    norm: Tensor | None  # W is divided by it

    @classmethod
    def of_logsumexp(cls, problem: Problem, stats: Stats, upstream: Upstream) -> Backward:
        row = Side(upstream.row, stats.row) if problem.rows else Side()
        col = Side(upstream.col, stats.col) if problem.cols else Side()
        return cls._of(problem, row, col, softplus=False)

    @classmethod
    def of_softplus(cls, problem: Problem, u: Tensor) -> Backward:
        return cls._of(problem, Side(SideUpstream(u)), Side(), softplus=True)

    @classmethod
    def _of(cls, problem: Problem, row: Side, col: Side, softplus: bool) -> Backward:
        symmetric = is_symmetric(problem)
        if symmetric:
            row = col = row.added_to(col)
        norm = _norm(problem, row, col) if problem.a.dtype == torch.float16 else None
        vectors = row.vectors(), col.vectors()
        return cls(problem, Operands.of(problem), *vectors, symmetric, softplus, norm)

    def exchanged(self) -> Backward:
        """Of the transposed matrix; the problem itself stays."""
        return self._replace(op=self.op.exchanged(), row=self.col, col=self.row)


def _norm(problem: Problem, row: Side, col: Side) -> Tensor:
    """A divisor that brings scale·W, of the order of 1/N², into the range of fp16."""
    vectors = (*row.upstream, *col.upstream)
    tops = [x.abs().max().float() for x in vectors if x is not None]
    top = torch.stack(tops).max() * problem.scale.abs().max() / FP16_TOP
    return torch.where((top > 0) & top.isfinite(), top, 1.0)


class RowGradient(NamedTuple):
    """Of the rows of a call: dA, Σ_j W·<a, b>, Σ_j W. None where not wanted."""

    grad: Tensor | None
    scale_sums: Tensor | None
    row_sums: Tensor | None


def fused_gradients(
    call: Backward,
    needs: Needs,
    run: Callable[[Backward, bool, Needs], RowGradient],
    norm: Tensor | None,
) -> Grads:
    """The gradients where a kernel keeps rows of them in registers: once for each side.

    run: the kernel, of a call, whether that is `exchanged`, and which of a, scale and row_bias are
    wanted. norm: what its gradients are still divided by.
    """
    dtype, same = call.problem.a.dtype, call.problem.b is None
    if call.symmetric:
        out = run(call, False, Needs(a=needs.a, scale=needs.scale))
        scale = None if out.scale_sums is None else out.scale_sums * 0.5
        return Grads(_rounded(out.grad, dtype, norm), None, call.problem.scale_grad(scale))
    together = needs.a and same  # both sides' gradients meet in one tensor
    row = run(call, False, Needs(a=needs.a, scale=needs.scale, row_bias=needs.row_bias))
    col = run(call.exchanged(), True, Needs(a=needs.b or together, row_bias=needs.col_bias))
    grad_a, grad_b = row.grad, col.grad
    if together:
        grad_a, grad_b = grad_a + grad_b, None
    return Grads(
        _rounded(grad_a, dtype, norm),
        _rounded(grad_b, dtype, norm),
        call.problem.scale_grad(row.scale_sums),
        row.row_sums,
        col.row_sums,
    )


class PanelSums(NamedTuple):
    """Of a panel's W, [slot][row or column]: Σ_j W·<a, b>, Σ_j W, Σ_i W. None where not wanted."""

    scale: Tensor | None
    row: Tensor | None
    col: Tensor | None

    @classmethod
    def new(
        cls, like: Tensor, needs: Needs, rows: tuple[int, int], cols: tuple[int, int]
    ) -> PanelSums:
        """rows, cols: slots and length."""

        def new(shape: tuple[int, int], wanted: bool) -> Tensor | None:
            return like.new_empty(shape, dtype=torch.float32) if wanted else None

        return cls(new(rows, needs.scale), new(rows, needs.row_bias), new(cols, needs.col_bias))


def panel_gradients(
    call: Backward,
    needs: Needs,
    size: tuple[int, int],
    tile: tuple[int, int],
    run: Callable[[slice, slice, Tensor | None], PanelSums],
) -> Grads:
    """The gradients by W, panel by panel, and the vendor's matrix product.

    size: rows and columns of a panel. run: the kernel that writes scale·W of the rows and columns
    of a panel into the workspace, in whole tiles.
    """
    p, op = call.problem, call.op

    def zeros(*shape: int) -> Tensor:
        return op.a.new_zeros(shape, dtype=torch.float32)

    grad_a = zeros(p.n, p.d) if needs.a else None
    grad_b = grad_a if p.b is None else zeros(p.m, p.d) if needs.b else None
    scale = zeros(p.n) if needs.scale else None
    row_bias = zeros(p.n) if needs.row_bias else None
    col_bias = zeros(p.m) if needs.col_bias else None
    workspace = None
    if needs.a or needs.b:
        workspace = op.a.new_empty([-(-x // y) * y for x, y in zip(size, tile, strict=True)])
    height, width = size

    for row0 in range(0, p.n, height):
        rows = slice(row0, min(row0 + height, p.n))
        for col0 in range(row0 if call.symmetric else 0, p.m, width):
            cols = slice(col0, min(col0 + width, p.m))
            sums = run(rows, cols, workspace)
            diagonal = call.symmetric and row0 == col0
            if scale is not None:
                # W + Wᵀ has every pair twice; panels off the diagonal stand for two
                scale[rows].add_(sums.scale.sum(0), alpha=0.5 if diagonal else 1.0)
            if row_bias is not None:
                row_bias[rows] += sums.row.sum(0)
            if col_bias is not None:
                col_bias[cols] += sums.col.sum(0)
            if workspace is None:
                continue
            weights = workspace[: rows.stop - rows.start, : cols.stop - cols.start]
            if grad_a is not None:
                accumulate(grad_a[rows], weights, op.b[cols])
            if grad_b is not None and not diagonal:
                accumulate(grad_b[cols], weights.T, op.a[rows])

    dtype = p.a.dtype
    grad_a = _rounded(grad_a, dtype, call.norm)
    grad_b = None if p.b is None else _rounded(grad_b, dtype, call.norm)
    return Grads(grad_a, grad_b, p.scale_grad(scale), row_bias, col_bias)


def _rounded(x: Tensor | None, dtype: torch.dtype, norm: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    x = x if norm is None else x * norm
    return x.to(dtype, memory_format=torch.contiguous_format)
