"""Launches the Triton kernels on CUDA and ROCm devices, and under TRITON_INTERPRET=1 on the CPU.

One forward pass computes the statistics of both sides, with one exponential per score
(`gpu.fixed_shift`). Another kernel computes sums that underflow, and maxima that are asked for, one
side at a time. Backward has two forms. For D ≤ 128, a fused kernel keeps rows of the gradient in
registers and runs once per side. For larger D, W is written to a bounded workspace, panel by panel,
and the vendor's matrix product computes W·B and Wᵀ·A with fp32 accumulation: 4 matrix products in
all, or 3 for rows whose exponentials the forward pass has kept (`kept.py`). For a symmetric S half
of the tiles are computed: 2 matrix products in all.

Only one program adds to an element and sums have a fixed order, so on one device the same inputs
should give the same bits. Nothing synchronises with the device, so that calls can be captured in a
CUDA graph. Both are by design: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpu
from ..gpu import Operands, PanelSums, RowGradient, is_symmetric
from ..pairs import count_positives
from ..spec import Grads, Needs, Problem, SideStats, Stats, Upstream
from . import backward, forward, kept, launches, maxima
from .launches import (
    MERGE_BLOCK,
    Gradient,
    Groups,
    Maxima,
    Merge,
    Panel,
    Reweight,
    Scores,
    SoftplusRows,
    Sums,
    Weights,
)
from .plan import Plan, autotuned_backward, autotuned_forward, autotuned_softplus


def describe(problem: Problem) -> str:
    plan = Plan(problem)
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
    return kept.size(Plan(problem))


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


# Forward.


@autotuned_forward
def logsumexp_forward(problem: Problem, cache: Tensor | None = None) -> Stats:
    """cache: memory of `cache_bytes` for exponentials that are kept for the gradients."""
    p, plan, op = problem, Plan(problem), Operands.of(problem)
    if gpu.needs_maxima(p):
        return gpu.both_sides(
            p, lambda: maxima_of_side(plan, op, False), lambda: maxima_of_side(plan, op, True)
        )
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
    crowded = plan.crowded() + (p.exclude_positives and not by_ids)
    parts = plan.arch.parts(tile, "forward", crowded)
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
    launches.launch(forward.sums_kernel, split.programs, scores, Groups.of(split), sums)

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
        launches.launch(forward.merge_kernel, triton.cdiv(length, MERGE_BLOCK), merge)
        return maxima_of_side(plan, op, transposed, underflowed, out)

    return gpu.both_sides(p, lambda: merged(False), lambda: merged(True))


def maxima_of_side(
    plan: Plan,
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
    launches.launch(maxima.maxima_kernel, triton.cdiv(n, tile.m), scores, maximum)
    return out


@autotuned_softplus
def softplus_forward(problem: Problem) -> Tensor:
    plan, op = Plan(problem), Operands.of(problem)
    split, tile = plan.split(triangle=False), plan.forward
    slots = op.a.new_empty((split.col_groups, problem.n), dtype=torch.float32)
    scores = Scores.of(plan, op, tile, tile.k)
    rows = SoftplusRows(slots, tile.k)
    launches.launch(forward.softplus_kernel, split.programs, scores, Groups.of(split), rows)
    return slots.sum(0)


# Backward.


@autotuned_backward
def logsumexp_backward(
    problem: Problem,
    stats: Stats,
    upstream: Upstream,
    needs: Needs,
    cache: Tensor | None = None,
) -> Grads:
    call = gpu.Backward.of_logsumexp(problem, stats, upstream)
    return _backward(call, needs, cache=cache)


@autotuned_backward
def softplus_backward(problem: Problem, u: Tensor, needs: Needs) -> Grads:
    return _backward(gpu.Backward.of_softplus(problem, u), needs)


@autotuned_backward
def softplus_both(problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
    """The row sums, and the gradients for an upstream gradient `u` that is known in advance.

    The scores are computed once less than in two calls: 3 matrix products in panels, 4 fused.

    Softmax has no such pass, because its W needs complete row sums. It keeps exponentials instead
    (`kept.py`).
    """
    if is_symmetric(problem) and not Plan(problem).gradient:
        # the panels of a symmetric S are half of all: 2.5 matrix products instead of 3
        return softplus_forward(problem), softplus_backward(problem, u, needs)
    values = problem.scale.new_zeros(problem.n)
    return values, _backward(gpu.Backward.of_softplus(problem, u), needs, values)


def _backward(
    call: gpu.Backward, needs: Needs, values: Tensor | None = None, cache: Tensor | None = None
) -> Grads:
    """values: the tensor to which the row sums of softplus are added, or None."""
    plan = Plan(call.problem)
    if plan.gradient:
        return fused_gradients(call, plan, needs, values)
    return _panel_gradients(call, plan, needs, values, cache)


def fused_gradients(
    call: gpu.Backward,
    plan: Plan,
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
            programs = triton.cdiv(n, tile.m)
            launches.launch(backward.gradient_kernel, programs, scores, weights, gradient)
        return RowGradient(grad, *gpu.restored(sums, norm))

    # the kernel has already multiplied by the factor
    return gpu.fused_gradients(call, needs, run, factor=None)


def _panel_gradients(
    call: gpu.Backward, plan: Plan, needs: Needs, values: Tensor | None, cache: Tensor | None
) -> Grads:
    norm, factor = call.scaling()
    scale_of_products = call.op.scale.ndim == 0 and (needs.a or needs.b)
    sums_needed = needs._replace(scale=needs.scale and not scale_of_products)
    memory = kept.Kept.of(plan, cache) if cache is not None and (needs.a or needs.b) else None
    run = panel_run(call, plan, sums_needed, Weights.of(call, norm), values, norm, memory=memory)
    # the kernels store whole tiles without masks, so the workspace covers whole tiles
    size, tile = plan.panel_size(), (plan.panel.m, plan.panel.n)
    if memory:
        tile = tuple(map(max, tile, kept.BLOCK))
    return gpu.panel_gradients(call, needs, size, tile, run, factor, scale_of_products)


def panel_run(
    call: gpu.Backward,
    plan: Plan,
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
        launches.launch(backward.reweight_kernel, programs, reweighting)

    crowded = plan.crowded(call.softplus) + (panel_factor is not None)
    parts = [plan.arch.parts(tile, "panel", crowded, exact=not kind.FIXED) for kind in kinds]
    scores = Scores.of(plan, call.op, tile, tile.k)

    def run(rows: slice, cols: slice, workspace: Tensor | None) -> PanelSums:
        n, m = rows.stop - rows.start, cols.stop - cols.start
        grid = triton.cdiv(n, tile.m), triton.cdiv(m, tile.n)
        row_slots = grid[1] * max(parts), n
        sums = PanelSums.new(like, needs, row_slots, (grid[0], m))
        if min(parts) < max(parts):  # the kind with fewer parts leaves some slots unwritten
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
            launches.launch(backward.weights_kernel, programs, panel_scores, weights, own)
        if values is not None:
            values[rows] += softplus_sums.sum(0)
        return PanelSums(*gpu.restored(sums, norm))

    return run
