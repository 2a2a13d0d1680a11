"""Triton kernel of the statistics with true maxima. It computes one side at a time, so each score
takes one exponential per side.

It is for the sums of `forward.py` that have underflowed, and for statistics whose maximum is asked
for.
"""

import triton
import triton.language as tl

from . import scores
from .scores import LN2, LOG2E


@triton.jit
def _finite(x):
    """x with -inf replaced by 0: -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _add_exponentials(x, top, total):
    """The maximum and Σ e^(x - maximum) of each row, with those of a tile."""
    new = tl.maximum(top, tl.max(x, 1))
    shift = _finite(new)
    total *= tl.exp2((top - shift) * LOG2E)
    return new, total + tl.sum(tl.exp2((x - shift[:, None]) * LOG2E), 1)


@triton.jit(do_not_specialize=scores.SIZES)
def maxima_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, underflowed,
    max_out, logsum_out, pos_out, neg_max_out, n, m, d, stride_a, stride_b, diagonal,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, POSITIVES: tl.constexpr, SELF: tl.constexpr,
    EXCLUDE_POSITIVES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The statistics of the rows of a tile. With the sides exchanged those of columns.

    underflowed: which rows to compute, or None for all. A tile without any leaves at once.
    """
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    wanted = rows < n
    if underflowed is not None:
        wanted = tl.load(underflowed + rows, mask=wanted, other=0) != 0
        if tl.max(wanted.to(tl.int32), 0) == 0:
            return
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    pos_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    of_positives = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    neg_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    LIMITED: tl.constexpr = row_limit is not None or col_limit is not None
    factor = scores.load_one(scale, SCALE, 1.0)
    for col0 in tl.range(0, m, BLOCK_N):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, scores.steps(d, BLOCK_K, TMA)):
            acc = scores.multiply(
                acc, k, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
        cols = col0 + tl.arange(0, BLOCK_N)
        x = scores.exponents(acc, factor, row_bias, col_bias, 0.0, rows, cols, n, m, SCALE, 1.0)
        row_label, col_label = scores.labels(row_ids, col_ids, row0, col0, BLOCK_M, BLOCK_N)
        positive, kept = scores.classify(
            row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
        )
        if LIMITED:
            above = scores.above_limit(acc, row_limit, col_limit, rows, cols, n, m)
            kept = kept & (positive | (above == 0))
        if POSITIVES == "linear":
            of_positives += tl.sum(tl.where(positive, x, 0.0), 1)
            count += tl.sum(positive.to(tl.float32), 1)
        if POSITIVES == "lse":
            pos_x = tl.where(positive, x, float("-inf"))
            pos_top, of_positives = _add_exponentials(pos_x, pos_top, of_positives)
        x = tl.where(kept, x, float("-inf"))
        if neg_max_out is not None or EXCLUDE_POSITIVES:
            negative = tl.where(positive, float("-inf"), x)
            neg_max = tl.maximum(neg_max, tl.max(negative, 1))
            if EXCLUDE_POSITIVES:
                x = negative
        top, total = _add_exponentials(x, top, total)

    shift = _finite(top)
    tl.store(max_out + rows, top, mask=wanted)
    tl.store(logsum_out + rows, tl.log2(total) * LN2, mask=wanted)
    if POSITIVES == "linear":
        tl.store(pos_out + rows, of_positives - count * shift, mask=wanted)
    if POSITIVES == "lse":
        pos = pos_top - shift + tl.log2(of_positives) * LN2
        tl.store(pos_out + rows, pos, mask=wanted)
    if neg_max_out is not None:
        tl.store(neg_max_out + rows, neg_max, mask=wanted)
