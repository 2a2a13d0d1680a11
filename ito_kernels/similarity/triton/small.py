"""The plain loss of a small batch and its gradients in few launches.

A launch takes about 5 µs, and the scores of 1,000 rows less. So for up to `LARGEST` rows the
statistics of each side come from one launch of `maxima_kernel`. Two such launches compute the
scores once more than `sums_kernel`, but need no shift, no slots, no merging, and no second kernel
for sums that underflow. One more launch computes the loss and the gradient's weights from the
statistics. W fits one panel, so its products are the gradients. Forward and backward of `clip_loss`
are 12 launches, 11 where the gradient is fused.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu
from ..gpu import Operands
from ..spec import Grads, Needs, Problem, SideStats, Stats, Upstream
from . import host, launches
from .launches import Weights
from .plan import Plan
from .scores import LOG2E

LARGEST = 6000  # rows and columns
PLAIN = Problem._field_defaults | {"positives": "linear"}


def fits(problem: Problem, upstream: Upstream) -> bool:
    """Whether `both` computes this: two matrices, one scale, no options, and for all rows the same
    weight. Not in fp16, whose gradients are formed in the backward pass."""
    p = problem
    if p.b is None or p.scale.ndim or p.a.dtype == torch.float16 or max(p.n, p.m) > LARGEST:
        return False
    if any(isinstance(x, Tensor) for side in upstream for x in side):
        return False
    free = ("diagonal", "cols", "exact_max")
    return all(x is PLAIN[k] or k in free for k, x in p._asdict().items() if k in PLAIN)


@triton.jit
def _combine_side(maximum, logsum, pos, weights, shifts, u, alpha, length, start,
                  BLOCK: tl.constexpr):  # fmt: skip
    index = start + tl.arange(0, BLOCK)
    inside = index < length
    zero = tl.zeros([BLOCK], tl.float32)
    log = tl.load(logsum + index, mask=inside, other=0.0)
    top = tl.load(maximum + index, mask=inside, other=0.0)
    of_positives = tl.load(pos + index, mask=inside, other=0.0)
    pair = index[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(weights + pair, tl.join(tl.where(inside, tl.exp2(-log * LOG2E) * u, 0.0),
                                     tl.where(inside, zero + alpha, 0.0)))  # fmt: skip
    tl.store(shifts + pair, tl.join(top, of_positives))
    return tl.sum(log * u + of_positives * alpha, 0)


@triton.jit(do_not_specialize=["n", "m"])
def combine_kernel(
    row_max, row_logsum, row_pos, col_max, col_logsum, col_pos,
    row_weights, col_weights, row_shifts, col_shifts, totals, u, alpha, v, beta, n, m,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From the statistics of both sides: their parts of the loss, one number for each program, and
    `gpu.SideWeights.exact` and `shifts`."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(n, BLOCK)
    if program < row_programs:
        total = _combine_side(row_max, row_logsum, row_pos, row_weights, row_shifts, u, alpha, n,
                              program * BLOCK, BLOCK)  # fmt: skip
        tl.store(totals + program, total)
    else:
        if col_max is not None:
            total = _combine_side(col_max, col_logsum, col_pos, col_weights, col_shifts, v, beta, m,
                                  (program - row_programs) * BLOCK, BLOCK)  # fmt: skip
            tl.store(totals + program, total)


class Combine(NamedTuple):
    row_max: Tensor
    row_logsum: Tensor
    row_pos: Tensor
    col_max: Tensor | None
    col_logsum: Tensor | None
    col_pos: Tensor | None
    row_weights: Tensor
    col_weights: Tensor | None
    row_shifts: Tensor
    col_shifts: Tensor | None
    totals: Tensor
    u: float
    alpha: float
    v: float
    beta: float
    n: int
    m: int
    BLOCK: int = gpu.ALIGNED_ROWS
    num_warps: int = 4


def both(
    problem: Problem, with_stats: bool, upstream: Upstream, needs: Needs
) -> tuple[Tensor, Stats, Grads]:
    """`Backend.logsumexp_both` for what `fits`."""
    p, plan, op = problem, Plan(problem), Operands.of(problem)
    stats = Stats(
        host.maxima_of_side(plan, op, transposed=False),
        host.maxima_of_side(plan, op, transposed=True) if p.cols else None,
    )
    row, col = (SideStats(None, None) if x is None else x for x in stats)

    def pairs(length: int) -> Tensor:
        blocks = triton.cdiv(length, gpu.ALIGNED_ROWS)
        return p.scale.new_empty((blocks * gpu.ALIGNED_ROWS, 2))

    weights = Weights(
        shift=None,
        underflowed=None,
        row_weights=pairs(p.n),
        col_weights=pairs(p.m) if p.cols else None,
        row_shifts=pairs(p.n),
        col_shifts=pairs(p.m) if p.cols else None,
        SOFTPLUS=False,
        POSITIVES="linear",
        EXCLUDE_POSITIVES=False,
        FIXED=False,
    )
    programs = triton.cdiv(p.n, gpu.ALIGNED_ROWS) + p.cols * triton.cdiv(p.m, gpu.ALIGNED_ROWS)
    totals = p.scale.new_empty(programs)
    numbers = (float(x or 0) for side in upstream for x in side)
    combine = Combine(*row[:3], *col[:3], *weights[2:6], totals, *numbers, p.n, p.m)
    launches.launch(combine_kernel, programs, combine)
    grads = Grads()
    if any(needs):
        call = gpu.Backward(p, op, gpu.Side(), gpu.Side(), symmetric=False, softplus=False)
        if plan.gradient:
            grads = host.fused_gradients(call, plan, needs, kinds=[weights])
        else:
            grads = _one_panel(call, plan, needs, weights)
    return totals.sum(), stats if with_stats else Stats(), grads


def _one_panel(call: gpu.Backward, plan: Plan, needs: Needs, weights: Weights) -> Grads:
    """The gradients from one panel that has all of scale·W."""
    p, op, tile = call.problem, call.op, plan.panel
    panel = None
    if needs.a or needs.b:
        panel = op.a.new_empty(triton.cdiv(p.n, tile.m) * tile.m, triton.cdiv(p.m, tile.n) * tile.n)
    run = host.panel_run(call, plan, needs, [weights], panel_factor=op.scale)
    sums = run(slice(0, p.n), slice(0, p.m), panel)
    w = None if panel is None else panel[: p.n, : p.m]
    return Grads(
        w @ op.b if needs.a else None,
        w.T @ op.a if needs.b else None,
        sums.scale.sum() if needs.scale else None,
    )
