"""Launches the Triton kernels on CUDA and ROCm devices, and under TRITON_INTERPRET=1 on the CPU.

One forward pass computes the statistics of both sides, with one exponential per score
(`gpu.fixed_shift`). What underflows, and maxima that are asked for, are computed by another kernel,
one side at a time. Backward has two forms. For D ≤ 128, a fused
kernel keeps rows of the gradient in registers and runs once per side. For larger D, W is written to
a bounded workspace, panel by panel, and the vendor's matrix product computes W·B and Wᵀ·A with fp32
accumulation: 4 matrix products in all, or 3 for rows whose exponentials the forward pass has kept
(`kept.py`). For a symmetric S half of the tiles are computed: 2 matrix products in all.

Only one program adds to an element and sums have a fixed order, so on one device the same inputs
should give the same bits. Nothing synchronises with the device, so that calls can be captured in a
CUDA graph. Both are by design: no GPU has run this yet.

With ITO_TRITON_AUTOTUNE=1 in the environment, the first call for a kernel, dtype and size (rounded
up to powers of two) times a few tiles similar to the table's and keeps the fastest. That call
synchronises, so it cannot be captured. Another process may choose another tile, which changes the
last bits of the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from math import prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpu
from ..gpu import Operands, PanelSums, RowGradient, Split, dense, is_symmetric
from ..pairs import count_positives
from ..spec import Grads, Needs, Problem, SideStats, Stats, Upstream
from . import backward, forward, kept, maxima, tiles

INTERPRETED = not isinstance(forward.sums_kernel, triton.JITFunction)
MERGE_BLOCK = 256


def describe(problem: Problem) -> str:
    plan = _Plan(problem)
    kernel = "maxima" if gpu.exact_gradient(problem) else "forward"
    text = f"{plan.arch.name}, {plan.arithmetic}: {plan.describe_tile(kernel)} scores"
    if is_symmetric(problem):
        text += ", half of them (S is symmetric)"
    if plan.gradient:
        return f"{text}; fused gradients, {plan.describe_tile('gradient')}"
    rows, cols = plan.panel_size()
    panels = f"W panels of {rows} x {cols}, {plan.describe_tile('panel')}"
    text = f"{text}; {panels}, for the vendor's matrix product"
    if rows := kept.rows(plan, kept.size(plan)):
        text += f"; W of {rows} rows from kept exponentials"
    return text


def cache_bytes(problem: Problem) -> int:
    return kept.size(_Plan(problem))


class _Plan:
    """What a call uses, independent of tensor values: architecture, arithmetic, tiles, programs."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.arch, self.processors = tiles.device(problem.a.device)
        self.arithmetic = _arithmetic(problem.a.dtype)
        if self.arithmetic not in self.arch.forward:
            self.arithmetic = "ieee"  # no 3×tf32 on this architecture
        by_ids = problem.row_ids is not None
        self.forward, self.panel = (
            (self.arch.ids if by_ids else x)[self.arithmetic]
            for x in (self.arch.forward, self.arch.panel)
        )
        self.maxima = self.arch.maxima[self.arithmetic]
        self.gradient = None
        if problem.d <= tiles.FUSED_D:
            self.gradient = self.arch.gradient.get(self.arithmetic)
            if self.gradient and self.crowded() > 2:
                self.gradient = self.arch.crowded.get(self.arithmetic, self.gradient)
        for kernel in ("forward", "panel", "gradient"):
            setattr(self, kernel, _TUNED.get(self.key(kernel), getattr(self, kernel)))

    def key(self, kernel: str) -> tuple:
        p = self.problem
        sizes = (triton.next_power_of_2(x) for x in (p.n, p.m, p.d))
        return kernel, self.arch.name, p.a.dtype, self.arithmetic, p.row_ids is not None, *sizes

    def describe_tile(self, kernel: str) -> str:
        m, n, k, warps, stages = getattr(self, kernel)
        source = "tuned" if self.key(kernel) in _TUNED else "from the table"
        return f"{m} x {n} x {k}, {warps} warps, {stages} stages ({source})"

    def crowded(self, softplus: bool = False) -> int:
        """How many kinds of options take registers beside those of the plain losses."""
        p = self.problem
        biased = p.row_bias is not None or p.col_bias is not None
        masks = p.exclude_self + (p.positives == "lse") + (softplus and p.row_ids is not None)
        return masks + (p.scale.ndim > 0 or p.row_limit is not None or biased)

    def panel_size(self) -> tuple[int, int]:
        p = self.problem
        return tiles.panel(
            p.n, p.m, p.d, gpu.PANEL_BYTES // p.a.element_size(), self.processors, is_symmetric(p)
        )

    def split(self, triangle: bool = True) -> Split:
        p, tile = self.problem, self.forward
        return gpu.split(p.n, p.m, tile.m, tile.n, self.processors, triangle and is_symmetric(p))


_TUNED: dict[tuple, tiles.Tile] = {}


def _autotuned(choose: Callable[..., str]) -> Callable:
    """Decorate a function of a problem so that it autotunes the tile of a kernel.

    choose: returns the name of the kernel that the function runs, given its plan and arguments; ""
        for one that is not tuned.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(problem: Problem, *args):
            if os.environ.get("ITO_TRITON_AUTOTUNE") == "1":
                plan = _Plan(problem)
                kernel = choose(plan, *args)
                key = plan.key(kernel)
                if kernel and key not in _TUNED:
                    times = {}
                    try:
                        for tile in tiles.tuning_candidates(getattr(plan, kernel)):
                            _TUNED[key] = tile
                            # a tile may need more shared memory than the device has
                            with suppress(OutOfResources), _device_context(problem.a.device):
                                times[tile] = _milliseconds(lambda: function(problem, *args))
                    finally:
                        del _TUNED[key]
                    _TUNED[key] = min(times, key=times.get)
            return function(problem, *args)

        return run

    return decorate


def _kernel_of_backward(plan: _Plan, *args) -> str:
    """Panels from kept exponentials, the last argument, have no tile to tune."""
    return "gradient" if plan.gradient else "" if isinstance(args[-1], Tensor) else "panel"


_autotuned_forward = _autotuned(
    lambda plan, *_: "" if gpu.needs_maxima(plan.problem) else "forward"
)
_autotuned_softplus = _autotuned(lambda plan: "forward")
_autotuned_backward = _autotuned(_kernel_of_backward)


def _milliseconds(run: Callable[[], object]) -> float:
    if INTERPRETED:  # times are meaningless: equal ones keep the first tile, the table's
        return 0.0
    return triton.testing.do_bench(run, return_mode="median")


def _arithmetic(dtype: torch.dtype) -> str:
    """The arithmetic of the scores, in forward and backward, and of a fused gradient.

    For fp32 it follows `torch.set_float32_matmul_precision`: "highest" is ieee; "high" is 3×tf32,
    which has nearly the accuracy of fp32 on tensor cores; "medium" is tf32. Outside the fused
    gradient, the products W·B and Wᵀ·A are PyTorch's own, and on a GPU tf32 at "high" too.
    """
    if dtype != torch.float32:
        return "half"
    modes = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
    return modes[gpu.matmul_precision()]


def _counts(problem: Problem, op: Operands) -> tuple[Tensor, Tensor]:
    """The numbers of positives of the rows and of the columns."""
    p = problem
    rows, cols = count_positives(op.row_ids, op.col_ids), count_positives(op.col_ids, op.row_ids)
    if p.exclude_self:
        first, last = max(0, -p.diagonal), min(p.n, p.m - p.diagonal)
        if first < last:
            row, col = slice(first, last), slice(first + p.diagonal, last + p.diagonal)
            self_pairs = ((op.row_ids[row] == op.col_ids[col]) & (op.row_ids[row] >= 0)).long()
            rows[row] -= self_pairs
            cols[col] -= self_pairs
    return rows, cols


# Launches. The members of these structs have the names of the kernels' arguments and are passed one
# by one: Triton would specialise numbers in a tuple and compile for every batch size.


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
        cls, plan: _Plan, op: Operands, tile: tiles.Tile, k: int, transposed: bool = False
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
    """The split of work. `row_groups` is in `Statistics`: only `logsumexp_kernel` takes it."""

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
    """The arguments for computing W from S: see `gpu.SideWeights`."""

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
        """The two kinds of a kernel, one of which does nothing. Softplus and fp32 have one."""
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


def _launch(kernel, programs: int, *structs: tuple) -> None:
    arguments = {name: x for struct in structs for name, x in struct._asdict().items()}
    with _device_context(next(x for x in arguments.values() if isinstance(x, Tensor)).device):
        kernel[(programs,)](**arguments, **tiles.COMPILE)


def _device_context(device: torch.device) -> AbstractContextManager:
    """Make the device of the tensors the current one for a launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Forward.


@_autotuned_forward
def logsumexp_forward(problem: Problem, cache: Tensor | None = None) -> Stats:
    """cache: memory of `cache_bytes` for exponentials that are kept for the gradients."""
    p, plan, op = problem, _Plan(problem), Operands.of(problem)
    if gpu.needs_maxima(p):
        return gpu.both_sides(p, lambda: _maxima(plan, op, False), lambda: _maxima(plan, op, True))
    symmetric, by_ids = is_symmetric(p), p.row_ids is not None
    rows, cols = (True, True) if symmetric else (p.rows, p.cols)
    split, tile = plan.split(), plan.forward
    fields = 2 if by_ids and p.positives else 1

    def slots(groups: int, length: int) -> Tensor:
        return op.a.new_empty((fields, groups, length), dtype=torch.float32).zero_()

    row_slots = slots(split.col_groups, p.n) if rows else None
    col_slots = row_slots if symmetric else slots(split.row_groups, p.m) if cols else None
    pair_scores = None
    if not by_ids and not p.exclude_self:  # even if not requested: one kernel variant less
        pair_scores = op.a.new_empty(p.n, dtype=torch.float32)
    parts = plan.arch.parts(tile, "forward", plan.crowded())
    memory = exponentials = None
    if cache is not None:
        memory = kept.Kept.of(plan, cache)
        exponentials, pair_scores = memory.exponentials, memory.pair_scores
        if plan.arch.tma:
            block = [tile.m, tile.n // parts]
            exponentials = TensorDescriptor(
                exponentials, list(exponentials.shape), list(exponentials.stride()), block
            )
    shift = gpu.fixed_shift(p, op)
    sums = Sums(
        shift=shift,
        row_slots=row_slots,
        col_slots=col_slots,
        pair_scores=pair_scores,
        cache=exponentials,
        stride_cache=memory and memory.exponentials.stride(0),
        cached_rows=memory and memory.rows,
        row_groups=split.row_groups,
        ROWS=rows,
        COLS=cols,
        POSITIVES=p.positives if p.positives and by_ids else "none",
        EXCLUDE_POSITIVES=p.exclude_positives,
        TRIANGLE=symmetric,
        BLOCK_K=tile.k,
        KEPT=plan.arch.kept_rows(tile, plan.arithmetic),
        PARTS=parts,
    )
    scores = Scores.of(plan, op, tile, tile.k)
    _launch(forward.sums_kernel, split.programs, scores, Groups.of(split), sums)

    counts = _counts(p, op) if fields == 2 else (None, None)

    def merged(transposed: bool) -> SideStats:
        slots = col_slots if transposed else row_slots
        _, groups, length = slots.shape
        out = p.new_side(length)
        underflowed = torch.empty_like(out.max, dtype=torch.int8)
        merge = Merge(
            slots=slots,
            pair_scores=pair_scores if p.positives else None,
            counts=counts[transposed],
            ids=op.col_ids if transposed else op.row_ids,
            shift=shift,
            max_out=out.max,
            logsum_out=out.logsum,
            pos_out=out.pos,
            underflowed=underflowed,
            length=length,
            groups=groups,
            offset=-p.diagonal if transposed else 0,
            first_pair=max(0, -p.diagonal),
            last_pair=min(p.n, p.m - p.diagonal),
            BIASED=p.row_bias is not None or p.col_bias is not None,
            POSITIVES=p.positives or "none",
        )
        _launch(forward.merge_kernel, triton.cdiv(length, MERGE_BLOCK), merge)
        return _maxima(plan, op, transposed, underflowed, out)

    return gpu.both_sides(p, lambda: merged(False), lambda: merged(True))


def _maxima(
    plan: _Plan,
    op: Operands,
    transposed: bool,
    underflowed: Tensor | None = None,
    out: SideStats | None = None,
) -> SideStats:
    """The statistics of one side with true maxima: of all rows, or in `out` of those that have
    underflowed."""
    p, tile = plan.problem, plan.maxima
    op = op.transposed() if transposed else op
    n = op.a.shape[0]
    out = p.new_side(n) if out is None else out
    maximum = Maxima(
        underflowed=underflowed,
        max_out=out.max,
        logsum_out=out.logsum,
        pos_out=out.pos,
        neg_max_out=out.neg_max,
        POSITIVES=p.positives or "none",
        EXCLUDE_POSITIVES=p.exclude_positives,
        BLOCK_K=tile.k,
    )
    scores = Scores.of(plan, op, tile, tile.k, transposed)
    _launch(maxima.maxima_kernel, triton.cdiv(n, tile.m), scores, maximum)
    return out


@_autotuned_softplus
def softplus_forward(problem: Problem) -> Tensor:
    plan, op = _Plan(problem), Operands.of(problem)
    split, tile = plan.split(triangle=False), plan.forward
    slots = op.a.new_empty((split.col_groups, problem.n), dtype=torch.float32)
    scores = Scores.of(plan, op, tile, tile.k)
    rows = SoftplusRows(slots, tile.k)
    _launch(forward.softplus_kernel, split.programs, scores, Groups.of(split), rows)
    return slots.sum(0)


# Backward.


@_autotuned_backward
def logsumexp_backward(
    problem: Problem,
    stats: Stats,
    upstream: Upstream,
    needs: Needs,
    cache: Tensor | None = None,
) -> Grads:
    call = gpu.Backward.of_logsumexp(problem, stats, upstream)
    return _backward(call, needs, cache=cache)


@_autotuned_backward
def softplus_backward(problem: Problem, u: Tensor, needs: Needs) -> Grads:
    return _backward(gpu.Backward.of_softplus(problem, u), needs)


@_autotuned_backward
def softplus_both(problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
    """The row sums, and the gradients for an upstream gradient `u` that is known in advance.

    The scores are computed once less than in two calls: 3 matrix products in panels, 4 fused.

    Softmax has no such pass, because its W needs complete row sums. It keeps exponentials instead
    (`kept.py`).
    """
    if is_symmetric(problem) and not _Plan(problem).gradient:
        # the panels of a symmetric S are half of all: 2.5 matrix products instead of 3
        return softplus_forward(problem), softplus_backward(problem, u, needs)
    values = problem.scale.new_zeros(problem.n)
    return values, _backward(gpu.Backward.of_softplus(problem, u), needs, values)


def _backward(
    call: gpu.Backward, needs: Needs, values: Tensor | None = None, cache: Tensor | None = None
) -> Grads:
    """values: the tensor to which the row sums of softplus are added, or None."""
    plan = _Plan(call.problem)
    if plan.gradient:
        return _fused_gradients(call, plan, needs, values)
    return _panel_gradients(call, plan, needs, values, cache)


def _fused_gradients(
    call: gpu.Backward,
    plan: _Plan,
    needs: Needs,
    values: Tensor | None = None,
    kinds: list[Weights] | None = None,
) -> Grads:
    p, tile = call.problem, plan.gradient
    block_d = max(16, triton.next_power_of_2(p.d))
    together = p.b is None and not call.symmetric  # the gradients of both sides are added
    norm, factor = call.scaling()
    kinds = kinds or Weights.of(call, norm)

    def run(call: gpu.Backward, transposed: bool, needs: Needs) -> RowGradient:
        op, n = call.op, call.op.a.shape[0]
        grad = None
        if needs.a:
            grad = op.a.new_empty(n, p.d, dtype=torch.float32 if together else None)
        sums = [
            op.a.new_empty(n, dtype=torch.float32) if x else None
            for x in (needs.scale, needs.row_bias)
        ]
        row_values = None if transposed else values
        if not any(needs) and row_values is None:
            return RowGradient(grad, *sums)
        gradient = Gradient(
            factor=op.scale.new_ones(()) if factor is None else factor,
            grad=grad,
            stride_grad=p.d,
            scale_sums=sums[0],
            row_sums=sums[1],
            softplus_sums=row_values,
            BLOCK_D=block_d,
        )
        scores = Scores.of(plan, op, tile, block_d, transposed)
        for weights in kinds:
            weights = weights.transposed() if transposed else weights
            _launch(backward.gradient_kernel, triton.cdiv(n, tile.m), scores, weights, gradient)
        return RowGradient(grad, *gpu.restored(sums, norm))

    # the kernel has already multiplied by the factor
    return gpu.fused_gradients(call, needs, run, factor=None)


def _panel_gradients(
    call: gpu.Backward, plan: _Plan, needs: Needs, values: Tensor | None, cache: Tensor | None
) -> Grads:
    norm, factor = call.scaling()
    scale_of_products = call.op.scale.ndim == 0 and (needs.a or needs.b)
    sums_needed = needs._replace(scale=needs.scale and not scale_of_products)
    memory = kept.Kept.of(plan, cache) if cache is not None and (needs.a or needs.b) else None
    run = _panel_run(call, plan, sums_needed, Weights.of(call, norm), values, norm, memory=memory)
    # the kernels store whole tiles without masks, so the workspace covers whole tiles
    size, tile = plan.panel_size(), (plan.panel.m, plan.panel.n)
    if memory:
        tile = tuple(map(max, tile, kept.BLOCK))
    return gpu.panel_gradients(call, needs, size, tile, run, factor, scale_of_products)


def _panel_run(
    call: gpu.Backward,
    plan: _Plan,
    needs: Needs,
    kinds: list[Weights],
    values: Tensor | None = None,
    norm: Tensor | None = None,
    panel_factor: Tensor | None = None,
    memory: kept.Kept | None = None,
) -> Callable[[slice, slice, Tensor | None], PanelSums]:
    """The function that writes a panel and returns its sums.

    memory: exponentials of the first rows, which spare these their matrix product unless sums have
        underflowed.
    """
    like, tile = call.op.a, plan.panel
    if memory:
        pair_weights = memory.pair_weights(call.problem, kinds[0].row_weights, kinds[0].col_weights)

    def reweight(rows: slice, cols: slice, workspace: Tensor) -> None:
        reweighting = Reweight(
            cache=memory.exponentials,
            pair_weights=pair_weights,
            underflowed=kinds[0].underflowed,
            row_weights=kinds[0].row_weights,
            col_weights=kinds[0].col_weights,
            panel=workspace,
            n=rows.stop,
            m=cols.stop,
            stride_cache=memory.exponentials.stride(0),
            stride_panel=workspace.stride(0),
            diagonal=call.problem.diagonal,
            panel_row=rows.start,
            panel_col=cols.start,
        )
        sizes = (rows.stop - rows.start, cols.stop - cols.start)
        programs = prod(map(triton.cdiv, sizes, kept.BLOCK))
        _launch(backward.reweight_kernel, programs, reweighting)

    crowded = plan.crowded(call.softplus) + (panel_factor is not None)
    parts = [plan.arch.parts(tile, "panel", crowded, exact=not kind.FIXED) for kind in kinds]
    scores = Scores.of(plan, call.op, tile, tile.k)

    def run(rows: slice, cols: slice, workspace: Tensor | None) -> PanelSums:
        n, m = rows.stop - rows.start, cols.stop - cols.start
        grid = triton.cdiv(n, tile.m), triton.cdiv(m, tile.n)
        row_slots = grid[1] * max(parts), n
        sums = PanelSums.new(like, needs, row_slots, (grid[0], m))
        if min(parts) < max(parts):  # the kind that works may leave slots as they are
            for x in (sums.scale, sums.row):
                if x is not None:
                    x.zero_()
        softplus_sums = None
        if values is not None:
            softplus_sums = like.new_empty(row_slots, dtype=torch.float32)
        panel = Panel(
            panel_factor=panel_factor,
            panel=workspace,
            stride_panel=0 if workspace is None else workspace.stride(0),
            panel_row=rows.start,
            panel_col=cols.start,
            scale_sums=sums.scale,
            row_sums=sums.row,
            col_sums=sums.col,
            softplus_sums=softplus_sums,
            BLOCK_K=tile.k,
            PARTS=max(parts),
        )
        programs = grid[0] * grid[1]
        if plan.arch.tma:  # each program loads its next tile while it reduces the current one
            programs = min(programs, 2 * plan.processors)
        panel_scores = scores._replace(n=rows.stop, m=cols.stop)
        for weights, number in zip(kinds, parts, strict=True):
            if memory and weights.FIXED and rows.stop <= memory.rows:
                reweight(rows, cols, workspace)
                continue
            own = panel._replace(PARTS=number)
            _launch(backward.weights_kernel, programs, panel_scores, weights, own)
        if values is not None:
            values[rows] += softplus_sums.sum(0)
        return PanelSums(*gpu.restored(sums, norm))

    return run
