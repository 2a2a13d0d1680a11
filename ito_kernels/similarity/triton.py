"""Triton kernels, on CUDA and ROCm devices; on CPU tensors under `TRITON_INTERPRET=1`.

Forward is one pass for both sides' statistics. Backward has two shapes. For D ≤ 128 a fused kernel
keeps rows of the gradient in registers, once per side. For larger D, W goes panel by panel into a
bounded workspace, and the vendor's matrix product does W·B and Wᵀ·A with fp32 accumulation: 4
matrix products in all. Where S is symmetric, half of its tiles are computed: 2 products in all.

Nothing waits for the device and no atomics are used: the same inputs give the same bits, and calls
can be captured in a CUDA graph.

Environment: ITO_TRITON_AUTOTUNE=1 times a few tiles around the table's and keeps the fastest, once
for each kernel, dtype and size up to the next power of two. That first call waits for the device,
so it cannot be captured; another process may choose another tile, with other last bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_backward, triton_forward
from . import triton_tiles as tiles
from .operands import Operands, accumulate, dense, is_symmetric
from .spec import Grads, Needs, Problem, Stats, Upstream

INTERPRETED = not isinstance(triton_forward.logsumexp_kernel, triton.JITFunction)
PANEL_BYTES = 256 << 20  # of one W panel: docs/gpu-static.md has the traffic at other sizes
MERGE_BLOCK = 256
# fp16 W is multiplied up to this: 4 terms of it stay below 65,504, and a softmax entry of 1/N keeps
# its 11 bits down to 1e-8
FP16_TOP = 4096.0


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.a.dtype == torch.float64:
        return False, "fp64 is computed by the reference and chunked backends"
    if problem.a.device.type == "cpu" and not INTERPRETED:
        return False, "CPU tensors need TRITON_INTERPRET=1 in the environment"
    if problem.a.device.type not in ("cpu", "cuda"):
        return False, f"no tiles for {problem.a.device.type} devices"
    if max(problem.n, problem.m) >= 2**31 - 2**9:
        return False, "row numbers do not fit 32 bits"
    return True, "a GPU" if problem.a.is_cuda else "TRITON_INTERPRET=1"


def describe(problem: Problem) -> str:
    plan = _Plan(problem)
    text = f"{plan.arch.name}, {plan.arithmetic}: {plan.words('forward')} scores"
    if is_symmetric(problem):
        text += ", half of them (S is symmetric)"
    if plan.gradient:
        return f"{text}; fused gradients, {plan.words('gradient')}"
    rows, cols = plan.panel_size()
    panels = f"W panels of {rows} x {cols}, {plan.words('panel')}"
    return f"{text}; {panels}, for the vendor's matrix product"


class _Plan:
    """What does not depend on the values: architecture, arithmetic, tiles, programs."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.arch, self.processors = tiles.device(problem.a.device)
        self.arithmetic = _arithmetic(problem.a.dtype)
        if self.arithmetic not in self.arch.forward:
            self.arithmetic = "ieee"  # where there is no 3×tf32
        by_ids = problem.row_ids is not None
        self.forward, self.panel = (
            (self.arch.ids if by_ids else x)[self.arithmetic]
            for x in (self.arch.forward, self.arch.panel)
        )
        self.gradient = None
        if problem.d <= tiles.FUSED_D:
            self.gradient = self.arch.gradient.get(self.arithmetic)
        for kernel in ("forward", "panel", "gradient"):
            setattr(self, kernel, _TUNED.get(self.key(kernel), getattr(self, kernel)))

    def key(self, kernel: str) -> tuple:
        p = self.problem
        sizes = (triton.next_power_of_2(x) for x in (p.n, p.m, p.d))
        return kernel, self.arch.name, p.a.dtype, self.arithmetic, p.row_ids is not None, *sizes

    def words(self, kernel: str) -> str:
        m, n, k, warps, stages = getattr(self, kernel)
        source = "tuned" if self.key(kernel) in _TUNED else "from the table"
        return f"{m} x {n} x {k}, {warps} warps, {stages} stages ({source})"

    def panel_size(self) -> tuple[int, int]:
        p = self.problem
        return tiles.panel(
            p.n, p.m, p.d, PANEL_BYTES // p.a.element_size(), self.processors, is_symmetric(p)
        )

    def split(self, triangle: bool = True) -> tiles.Split:
        p, tile = self.problem, self.forward
        return tiles.split(p.n, p.m, tile, self.processors, triangle and is_symmetric(p))

    def options(self, tile: tiles.Tile) -> dict:
        """Arguments that all kernels take and that follow from the plan."""
        p = self.problem
        return {
            "SELF": p.exclude_self,
            "TMA": self.arch.tma,
            "PRECISION": self.arithmetic if p.a.dtype == torch.float32 else "ieee",
            "INTERPRETED": INTERPRETED,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


_TUNED: dict[tuple, tiles.Tile] = {}


def _tunes(choose: Callable[[_Plan], str]) -> Callable:
    """The decorated function of a problem runs a kernel, `choose(plan)`, whose tile is tuned."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(problem: Problem, *args):
            if os.environ.get("ITO_TRITON_AUTOTUNE") == "1":
                plan = _Plan(problem)
                kernel = choose(plan)
                key = plan.key(kernel)
                if key not in _TUNED:
                    times = {}
                    try:
                        for tile in tiles.around(getattr(plan, kernel)):
                            _TUNED[key] = tile
                            # a tile may ask for more shared memory than there is
                            with suppress(OutOfResources), _on(problem.a.device):
                                times[tile] = _milliseconds(lambda: function(problem, *args))
                    finally:
                        del _TUNED[key]
                    _TUNED[key] = min(times, key=times.get)
            return function(problem, *args)

        return run

    return decorate


_tunes_forward = _tunes(lambda plan: "forward")
_tunes_backward = _tunes(lambda plan: "gradient" if plan.gradient else "panel")


def _milliseconds(run: Callable[[], object]) -> float:
    if INTERPRETED:  # its times say nothing: the table's tile, which comes first, is kept
        return 0.0
    return triton.testing.do_bench(run, return_mode="median")


def _arithmetic(dtype: torch.dtype) -> str:
    """fp32 follows `torch.set_float32_matmul_precision`: "highest" is ieee, "high" 3×tf32, which
    keeps nearly all digits on the tensor cores, "medium" tf32."""
    if dtype != torch.float32:
        return "half"
    modes = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
    return modes[torch.get_float32_matmul_precision()]


def _counts(problem: Problem, op: Operands) -> tuple[Tensor, Tensor]:
    """The numbers of positives of rows and columns, from their ranks."""
    p = problem

    def count(ids: Tensor, others: Tensor) -> Tensor:
        order = others.sort().values
        above = torch.searchsorted(order, ids, right=True)
        return (above - torch.searchsorted(order, ids)).masked_fill(ids < 0, 0)

    rows, cols = count(op.row_ids, op.col_ids), count(op.col_ids, op.row_ids)
    if p.exclude_self:
        first, last = max(0, -p.diagonal), min(p.n, p.m - p.diagonal)
        if first < last:
            row, col = slice(first, last), slice(first + p.diagonal, last + p.diagonal)
            itself = ((op.row_ids[row] == op.col_ids[col]) & (op.row_ids[row] >= 0)).long()
            rows[row] -= itself
            cols[col] -= itself
    return rows, cols


def _sources(plan: _Plan, tile_rows: int, tile_cols: int, k: int, op: Operands) -> dict:
    """The features as kernel arguments: pointers, or tensor descriptors where there is TMA."""

    def source(x: Tensor, rows: int):
        if not plan.arch.tma:
            return x
        return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, k])

    return {
        "a": source(op.a, tile_rows),
        "b": source(op.b, tile_cols),
        "n": op.a.shape[0],
        "m": op.b.shape[0],
        "d": op.a.shape[1],
        "stride_a": op.a.stride(0),
        "stride_b": op.b.stride(0),
        "EVEN_D": op.a.shape[1] % k == 0,
        **dict(zip(op._fields[2:], op[2:], strict=True)),
    }


def _score_arguments(plan: _Plan, op: Operands, tile: tiles.Tile) -> dict:
    return {
        **_sources(plan, tile.m, tile.n, tile.k, op),
        **plan.options(tile),
        "BLOCK_K": tile.k,
        "row_limit": dense(plan.problem.row_limit),
        "SCALE_PER_ROW": op.scale.ndim == 1,
        "diagonal": plan.problem.diagonal,
    }


def _launch(kernel, programs: int, **arguments) -> None:
    with _on(next(x for x in arguments.values() if isinstance(x, Tensor)).device):
        kernel[(programs,)](**arguments)


def _on(device: torch.device) -> AbstractContextManager:
    """Kernels run on the device of the tensors, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- forward


@_tunes_forward
def logsumexp_forward(problem: Problem) -> Stats:
    p, plan, op = problem, _Plan(problem), Operands.of(problem)
    symmetric = is_symmetric(p)
    rows, cols = (True, True) if symmetric else (p.rows, p.cols)
    split = plan.split()

    def slots(groups: int, length: int) -> Tensor:
        out = op.a.new_empty((4, groups, length), dtype=torch.float32)
        if p.row_ids is not None and p.positives:  # tiles without positives leave these alone
            out[2].fill_(0.0 if p.positives == "linear" else -torch.inf)
        if p.hardest:
            out[3].fill_(-torch.inf)
        return out

    row_slots = slots(split.col_groups, p.n) if rows else None
    col_slots = row_slots if symmetric else slots(split.row_groups, p.m) if cols else None
    pair_scores = None
    if p.row_ids is None and not p.exclude_self:  # also where not asked for: one kernel less
        pair_scores = op.a.new_empty(p.n, dtype=torch.float32)
    _launch(
        triton_forward.logsumexp_kernel,
        split.programs,
        **_score_arguments(plan, op, plan.forward),
        **split.arguments(),
        PARTS=plan.arch.parts(plan.forward),
        row_groups=split.row_groups,
        row_slots=row_slots,
        col_slots=col_slots,
        pair_scores=pair_scores,
        ROWS=rows,
        COLS=cols,
        POSITIVES=p.positives if p.positives and p.row_ids is not None else "none",
        EXCLUDE_POSITIVES=p.exclude_positives,
        HARDEST=p.hardest,
        TRIANGLE=symmetric,
        EXACT=p.a.dtype == torch.float32,
    )

    row_counts = col_counts = None
    if p.positives == "linear" and p.row_ids is not None:
        row_counts, col_counts = _counts(p, op)

    def merged(slots: Tensor, counts: Tensor | None, offset: int) -> tuple[Tensor | None, ...]:
        _, groups, length = slots.shape
        wanted = (True, True, p.positives is not None, p.hardest)
        top, logsum, pos, neg = (slots.new_empty(length) if want else None for want in wanted)
        _launch(
            triton_forward.merge_kernel,
            triton.cdiv(length, MERGE_BLOCK),
            slots=slots,
            pair_scores=pair_scores if p.positives else None,
            counts=counts,
            top_out=top,
            logsum_out=logsum,
            pos_out=pos,
            neg_out=neg,
            length=length,
            groups=groups,
            offset=offset,
            first_pair=max(0, -p.diagonal),
            last_pair=min(p.n, p.m - p.diagonal),
            IDS=p.row_ids is not None,
            POSITIVES=p.positives or "none",
            HARDEST=p.hardest,
            BLOCK=MERGE_BLOCK,
        )
        return top, logsum, pos, neg

    row_stats = col_stats = (None,) * 4
    if rows:
        row_stats = merged(row_slots, row_counts, 0)
    if symmetric:
        col_stats = tuple(None if x is None else x.clone() for x in row_stats)
    elif cols:
        col_stats = merged(col_slots, col_counts, -p.diagonal)
    nothing = (None,) * 4
    return Stats(*(row_stats if p.rows else nothing), *(col_stats if p.cols else nothing))


@_tunes_forward
def softplus_forward(problem: Problem) -> Tensor:
    plan, op = _Plan(problem), Operands.of(problem)
    split = plan.split(triangle=False)
    slots = op.a.new_empty((split.col_groups, problem.n), dtype=torch.float32)
    _launch(
        triton_forward.softplus_kernel,
        split.programs,
        **_score_arguments(plan, op, plan.forward),
        **split.arguments(),
        row_slots=slots,
    )
    return slots.sum(0)


# ---- backward


@_tunes_backward
def logsumexp_backward(problem: Problem, stats: Stats, upstream: Upstream, needs: Needs) -> Grads:
    rows = (upstream.u, stats.row_max, stats.row_logsum, upstream.alpha, stats.row_pos)
    cols = (upstream.v, stats.col_max, stats.col_logsum, upstream.beta, stats.col_pos)
    rows = rows if problem.rows else (None,) * 5
    cols = cols if problem.cols else (None,) * 5
    return _backward(problem, rows, cols, needs, softplus=False)


@_tunes_backward
def softplus_backward(problem: Problem, u: Tensor, needs: Needs) -> Grads:
    return _backward(problem, (u, None, None, None, None), (None,) * 5, needs, softplus=True)


@_tunes_backward
def softplus_both(problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
    """The row sums and, for an upstream gradient `u` known before, the gradients, by one
    computation of the scores less: 3 matrix products in panels, 4 fused.

    There is no such pass for softmax. Its W needs complete row sums, so the scores of whole rows
    would be kept, 4 bytes each written and read: at D = 768 an H100 computes them again in less
    time (docs/gpu-static.md).
    """
    if is_symmetric(problem) and not _Plan(problem).gradient:
        # half of the panels, which hold half of the scores: 2.5 products against 3
        return softplus_forward(problem), softplus_backward(problem, u, needs)
    values = problem.scale.new_zeros(problem.n)
    side = (u, None, None, None, None)
    return values, _backward(problem, side, (None,) * 5, needs, softplus=True, values=values)


_ROW_VECTORS = ("u", "row_factors", "alpha", "row_pos")
_COL_VECTORS = ("v", "col_factors", "beta", "col_pos")


def _side_vectors(side: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """(upstream, max, logsum, upstream of pos, pos) as the kernels take it: max and logsum become
    shift and factor, with upstream·softmax = factor·e^(S - shift)."""
    u, top, logsum, alpha, pos = side
    factors = None
    if top is not None and (u is not None or alpha is not None):
        factor = torch.zeros_like(top) if u is None else u * torch.exp(-logsum)
        empty = top == -torch.inf
        factors = torch.stack([top.masked_fill(empty, 0), factor.masked_fill(empty, 0)], 1)
    return u, factors, alpha, pos


class _Backward(NamedTuple):
    """What both shapes of backward share: operands, upstream vectors of the sides, flags."""

    problem: Problem
    plan: _Plan
    op: Operands
    rows: tuple[Tensor | None, ...]  # in the order of _ROW_VECTORS
    cols: tuple[Tensor | None, ...]
    symmetric: bool  # W + Wᵀ is computed, from `rows` alone
    softplus: bool
    values: Tensor | None  # where the forward value of softplus goes too
    norm: Tensor | None

    def arguments(self) -> dict:
        p = self.problem
        rows = dict(zip(_ROW_VECTORS, self.rows, strict=True))
        cols = dict(zip(_COL_VECTORS, self.cols, strict=True))
        return {
            **rows,
            **cols,
            "norm": self.norm,
            "SOFTPLUS": self.softplus,
            "POSITIVES": p.positives or "none",
            "EXCLUDE_POSITIVES": p.exclude_positives,
            "EXACT": p.a.dtype == torch.float32,
        }


def _backward(
    problem: Problem, rows, cols, needs: Needs, softplus: bool, values: Tensor | None = None
) -> Grads:
    plan, op = _Plan(problem), Operands.of(problem)
    rows, cols = (tuple(dense(x) for x in side) for side in (rows, cols))
    symmetric = is_symmetric(problem)
    if symmetric:
        # dA takes (W + Wᵀ)·A, and W + Wᵀ is the W of a problem whose two sides have the same
        # statistics and the sum of both sides' upstream vectors
        first, second = (rows, cols) if rows[0] is not None or rows[3] is not None else (cols, rows)
        both = (
            _sum(rows[0], cols[0]),
            *(x if x is not None else y for x, y in zip(rows[1:3], cols[1:3], strict=True)),
            _sum(rows[3], cols[3]),
            first[4] if first[4] is not None else second[4],
        )
        rows = cols = both
    norm = _norm(problem, rows, cols) if problem.a.dtype == torch.float16 else None
    rows, cols = _side_vectors(rows), _side_vectors(cols)
    call = _Backward(problem, plan, op, rows, cols, symmetric, softplus, values, norm)
    if plan.gradient:
        return _fused(call, needs)
    return _panels(call, needs)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _norm(problem: Problem, rows, cols) -> Tensor:
    """A divisor that brings scale·W, of the order of 1/N², into the range of fp16."""
    vectors = [x.abs().max() for x in (rows[0], rows[3], cols[0], cols[3]) if x is not None]
    top = torch.stack([x.float() for x in vectors]).max() * problem.scale.abs().max() / FP16_TOP
    return torch.where((top > 0) & top.isfinite(), top, 1.0)


def _fused(call: _Backward, needs: Needs) -> Grads:
    p, op, plan = call.problem, call.op, call.plan
    tile = plan.gradient
    block_d = max(16, triton.next_power_of_2(p.d))
    limit = dense(p.row_limit)
    together = p.b is None and not call.symmetric  # both sides' gradients meet in one tensor

    def side(op: Operands, exchanged: bool, grad: bool, scale: bool, bias: bool):
        n = p.m if exchanged else p.n
        out = op.a.new_empty(n, p.d, dtype=torch.float32 if together else None) if grad else None
        sums = [op.a.new_empty(n, dtype=torch.float32) if x else None for x in (scale, bias)]
        values = None if exchanged else call.values
        if not (grad or scale or bias or values is not None):
            return out, *sums
        arguments = call._replace(
            rows=call.cols if exchanged else call.rows, cols=call.rows if exchanged else call.cols
        ).arguments()
        _launch(
            triton_backward.gradient_kernel,
            triton.cdiv(n, tile.m),
            **_sources(plan, tile.m, tile.n, block_d, op),
            **plan.options(tile),
            **arguments,
            grad=out,
            scale_sums=sums[0],
            row_sums=sums[1],
            softplus_sums=values,
            stride_grad=p.d,
            diagonal=-p.diagonal if exchanged else p.diagonal,
            row_limit=None if exchanged else limit,
            col_limit=limit if exchanged else None,
            SCALE="one" if op.scale.ndim == 0 else "col" if exchanged else "row",
            BLOCK_D=block_d,
        )
        return out, *sums

    if call.symmetric:
        grad, scale, _ = side(op, False, needs.a, needs.scale, False)
        return Grads(grad, None, None if scale is None else scale * 0.5)
    both = needs.a and together
    grad_a, scale, row_bias = side(op, False, needs.a, needs.scale, needs.row_bias)
    grad_b, _, col_bias = side(op.exchanged(), True, needs.b or both, False, needs.col_bias)
    if both:
        grad_a, grad_b = (grad_a + grad_b).to(p.a.dtype), None
    return Grads(grad_a, grad_b, scale, row_bias, col_bias)


def _panels(call: _Backward, needs: Needs) -> Grads:
    p, op, plan = call.problem, call.op, call.plan
    tile = plan.panel
    parts = plan.arch.parts(tile, call.softplus)
    arguments = _score_arguments(plan, op, tile) | call.arguments() | {"PARTS": parts}
    height, width = plan.panel_size()

    def zeros(*shape: int) -> Tensor:
        return op.a.new_zeros(shape, dtype=torch.float32)

    grad_a = zeros(p.n, p.d) if needs.a else None
    grad_b = grad_a if p.b is None else zeros(p.m, p.d) if needs.b else None
    scale = zeros(p.n) if needs.scale else None
    row_bias = zeros(p.n) if needs.row_bias else None
    col_bias = zeros(p.m) if needs.col_bias else None
    workspace = None
    if needs.a or needs.b:
        # whole tiles: the kernel stores them without a mask
        workspace = op.a.new_empty(
            triton.cdiv(height, tile.m) * tile.m, triton.cdiv(width, tile.n) * tile.n
        )

    for row0 in range(0, p.n, height):
        rows = slice(row0, min(row0 + height, p.n))
        for col0 in range(row0 if call.symmetric else 0, p.m, width):
            cols = slice(col0, min(col0 + width, p.m))
            size = (rows.stop - rows.start, cols.stop - cols.start)
            grid = triton.cdiv(size[0], tile.m), triton.cdiv(size[1], tile.n)
            slots = (grid[1] * parts, size[0])
            sums = {
                name: None if x is None else op.a.new_empty(shape, dtype=torch.float32)
                for name, x, shape in (
                    ("scale_sums", scale, slots),
                    ("row_sums", row_bias, slots),
                    ("col_sums", col_bias, (grid[0], size[1])),
                    ("softplus_sums", call.values, slots),
                )
            }
            programs = grid[0] * grid[1]
            if plan.arch.tma:  # a program's next tile is loaded while it reduces the one before
                programs = min(programs, 2 * plan.processors)
            _launch(
                triton_backward.weights_kernel,
                programs,
                **arguments | {"n": rows.stop, "m": cols.stop},
                **sums,
                panel=workspace,
                stride_panel=0 if workspace is None else workspace.stride(0),
                panel_row=rows.start,
                panel_col=cols.start,
            )
            diagonal = call.symmetric and row0 == col0
            if scale is not None:
                # W + Wᵀ has every pair twice; panels off the diagonal stand for two
                half = 0.5 if diagonal else 1.0
                scale[rows].add_(sums["scale_sums"].sum(0), alpha=half)
            if row_bias is not None:
                row_bias[rows] += sums["row_sums"].sum(0)
            if col_bias is not None:
                col_bias[cols] += sums["col_sums"].sum(0)
            if call.values is not None:
                call.values[rows] += sums["softplus_sums"].sum(0)
            if workspace is None:
                continue
            weights = workspace[: size[0], : size[1]]
            if grad_a is not None:
                accumulate(grad_a[rows], weights, op.b[cols])
            if grad_b is not None and not diagonal:
                accumulate(grad_b[cols], weights.T, op.a[rows])

    def rounded(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x if call.norm is None else x * call.norm).to(p.a.dtype)

    return Grads(
        rounded(grad_a), None if p.b is None else rounded(grad_b), scale, row_bias, col_bias
    )
