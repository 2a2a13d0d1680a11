"""Triton kernels of the forward pass: row and column statistics, row sums of softplus.

Programs share nothing: each writes slots of its own, which `merge_kernel` or a sum brings together
in a fixed order, so the same inputs give the same bits.
"""

# ruff: noqa: SIM102

import triton
import triton.language as tl

from . import scores
from .scores import LN2, LOG2E


@triton.jit
def _pair_of_groups(pid, col_groups, TRIANGLE: tl.constexpr):
    """The row group and the column group of a program: all pairs, or those with row ≤ column."""
    if TRIANGLE:
        col = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) * 0.5).to(tl.int32)
        col -= (col * (col + 1) // 2 > pid).to(tl.int32)  # the square root may round either way
        col += ((col + 1) * (col + 2) // 2 <= pid).to(tl.int32)
        return pid - col * (col + 1) // 2, col
    else:
        return pid // col_groups, pid % col_groups


@triton.jit
def _add_tile(
    acc, col0, top, total, pos, neg_top, row0, rows, row_scale, row_added, row_identity,
    col_bias, row_ids, col_ids, row_limit, col_slots, pair_scores, n, m, diagonal, col_field,
    with_cols, done,
    ROWS: tl.constexpr, COLS: tl.constexpr, POSITIVES: tl.constexpr, SELF: tl.constexpr,
    EXCLUDE_POSITIVES: tl.constexpr, HARDEST: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The rows' statistics with those of a tile, from its inner products; the columns' in their
    slot."""
    if PARTS > 1:
        left, right = scores.halves(acc)
        rest = (
            row0, rows, row_scale, row_added, row_identity, col_bias, row_ids, col_ids, row_limit,
            col_slots, pair_scores, n, m, diagonal, col_field, with_cols, done,
        )  # fmt: skip
        top, total, pos, neg_top = _add_tile(
            left, col0, top, total, pos, neg_top, *rest, ROWS, COLS, POSITIVES, SELF,
            EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
        return _add_tile(
            right, col0 + BLOCK_N // 2, top, total, pos, neg_top, *rest, ROWS, COLS, POSITIVES,
            SELF, EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
    cols = col0 + tl.arange(0, BLOCK_N)
    # whether positives matter; without ids and with SELF there are none
    POSITIVE: tl.constexpr = (
        EXCLUDE_POSITIVES or HARDEST or POSITIVES != "none" or pair_scores is not None
        or row_limit is not None
    )  # fmt: skip
    col_added, col_identity = scores.side(col_bias, col_ids, cols, m, -2)
    s = scores.affine(acc, row_scale, row_added, col_added)

    special = False
    tile_neg = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SELF or POSITIVE:
        special = scores.is_special(row_ids, row_identity, col_identity, row0, col0,
                                    diagonal, SELF, POSITIVE, BLOCK_M,
                                    BLOCK_N)  # fmt: skip
        if row_limit is not None:
            limit = scores.vector(row_limit, rows, n, 0.0)[:, None]
            s = scores.limited(s, acc, limit, special, row_ids, row_identity, col_identity, rows,
                               cols, n, m, diagonal, SELF)  # fmt: skip
        if special:
            positive, excluded = scores.classify(
                row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
            )
            if POSITIVES != "none" or pair_scores is not None:
                # the mask is used up here: kept across a reduction it would spill
                masked = tl.where(positive, s, float("-inf") if POSITIVES == "lse" else 0.0)
                if pair_scores is not None:
                    target = rows + diagonal
                    here = (target >= col0) & (target < tl.minimum(col0 + BLOCK_N, m))
                    found = tl.sum(masked, 1)
                    tl.store(pair_scores + rows, found, mask=here & (rows < n))
                if ROWS:
                    pos = _add_positives(masked, pos, 1, POSITIVES)
                if COLS and POSITIVES != "none":
                    if with_cols:
                        _add_col_positives(masked, col_slots + 2 * col_field, cols, m,
                                           POSITIVES)  # fmt: skip
            if HARDEST:
                negative = tl.where(positive | excluded, float("-inf"), s)
                tile_neg = tl.max(negative, 1)
                if COLS:
                    if with_cols:
                        _raise(col_slots + 3 * col_field, cols, m, tl.max(negative, 0))
            if EXCLUDE_POSITIVES:
                s = tl.where(positive | excluded, float("-inf"), s)
            elif SELF:
                s = tl.where(excluded, float("-inf"), s)

    if ROWS:
        tile_top = tl.max(s, 1)
        if HARDEST:
            neg_top = tl.maximum(neg_top, tl.where(special, tile_neg, tile_top))
        new = tl.maximum(top, tile_top)
        shift = scores.finite(new)
        total = total * scores.exp(top, shift, EXACT)
        total += tl.sum(scores.exp(s, shift[:, None], EXACT), 1)
        top = new
    if COLS:
        if with_cols:
            _add_to_cols(s, special, col_slots, cols, m, col_field, done,
                         HARDEST, EXACT)  # fmt: skip
    return top, total, pos, neg_top


@triton.jit(do_not_specialize=[*scores.SIZES, "row_tiles", "col_tiles", "row_groups", "col_groups"])
def logsumexp_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, row_slots, col_slots,
    pair_scores,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, row_groups, col_groups,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    HARDEST: tl.constexpr, TRIANGLE: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Row and column statistics in one pass.

    A program owns one group of `row_tiles` row tiles and one of `col_tiles` column tiles. Row
    statistics of a row tile stay in registers while it walks the columns; those of the columns are
    updated in the program's own slot. Slots are [field][group of the other side][row or column];
    no two programs write the same one. Fields: max, sum, pos, neg_max.
    POSITIVES is for ids; without them the one positive of a row goes to `pair_scores`.

    TRIANGLE (a symmetric S): only pairs of groups row ≤ column; both sides share the slots, and the
    groups on the diagonal, computed in full, give their rows only.
    """
    row_group, col_group = _pair_of_groups(tl.program_id(0), col_groups, TRIANGLE)
    with_cols = True
    if TRIANGLE:
        with_cols = row_group != col_group
    row_field = tl.cast(col_groups, tl.int64) * n
    col_field = tl.cast(row_groups, tl.int64) * m
    if ROWS:
        row_slots += tl.cast(col_group, tl.int64) * n
    if COLS:
        col_slots += tl.cast(row_group, tl.int64) * m
    first_row = row_group * row_tiles * BLOCK_M
    last_row = tl.minimum(first_row + row_tiles * BLOCK_M, n)
    first_col = col_group * col_tiles * BLOCK_N
    last_col = tl.minimum(first_col + col_tiles * BLOCK_N, m)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        row_scale, row_added, row_identity = scores.row_side(
            scale, row_bias, row_ids, rows, n, SCALE_PER_ROW
        )
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        pos = tl.full([BLOCK_M], float("-inf") if POSITIVES == "lse" else 0.0, tl.float32)
        neg_top = tl.full([BLOCK_M], float("-inf"), tl.float32)

        rest = (
            row0, rows, row_scale, row_added, row_identity, col_bias, row_ids, col_ids, row_limit,
            col_slots, pair_scores, n, m, diagonal, col_field, with_cols, row0 - first_row,
        )  # fmt: skip
        # one loop over tiles and steps of D: the next tile's first loads run under this one's rest
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(0, tl.cdiv(last_col - first_col, BLOCK_N) * k_steps):
            col0 = first_col + step // k_steps * BLOCK_N
            acc = scores.multiply(
                acc, step % k_steps, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            if step % k_steps == k_steps - 1:
                top, total, pos, neg_top = _add_tile(
                    acc, col0, top, total, pos, neg_top, *rest, ROWS, COLS, POSITIVES, SELF,
                    EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N, PARTS,
                )  # fmt: skip
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

        if ROWS:
            inside = rows < n
            tl.store(row_slots + rows, top, mask=inside)
            tl.store(row_slots + row_field + rows, total, mask=inside)
            if POSITIVES != "none":
                tl.store(row_slots + 2 * row_field + rows, pos, mask=inside)
            if HARDEST:
                tl.store(row_slots + 3 * row_field + rows, neg_top, mask=inside)
        # the next row tile reads the column slots that other threads of this program wrote
        tl.debug_barrier()


@triton.jit
def _add_to_cols(s, special, slots, cols, m, field, done, HARDEST: tl.constexpr,
                 EXACT: tl.constexpr):  # fmt: skip
    """The columns' maxima and sums, brought up to date in the slot, which is unwritten before
    the first row tile: `done` rows are 0."""
    inside = cols < m
    written = inside & (tl.zeros_like(cols) + done > 0)
    old = tl.load(slots + cols, mask=written, other=float("-inf"))
    total = tl.load(slots + field + cols, mask=written, other=0.0)
    tile_top = tl.max(s, 0)
    new = tl.maximum(old, tile_top)
    shift = scores.finite(new)
    total = total * scores.exp(old, shift, EXACT) + tl.sum(scores.exp(s, shift[None, :], EXACT), 0)
    tl.store(slots + cols, new, mask=inside)
    tl.store(slots + field + cols, total, mask=inside)
    if HARDEST:
        if special == 0:
            _raise(slots + 3 * field, cols, m, tile_top)


@triton.jit
def _raise(slots, cols, m, value):
    """Maxima of a slot, in place."""
    old = tl.load(slots + cols, mask=cols < m, other=float("-inf"))
    tl.store(slots + cols, tl.maximum(old, value), mask=cols < m)


@triton.jit
def _add_col_positives(masked, slots, cols, m, POSITIVES: tl.constexpr):
    pos = tl.load(slots + cols, mask=cols < m, other=0.0)
    tl.store(slots + cols, _add_positives(masked, pos, 0, POSITIVES), mask=cols < m)


@triton.jit
def _add_positives(masked, pos, AXIS: tl.constexpr, POSITIVES: tl.constexpr):
    """The positives' sum, or their logsumexp, with a tile's added."""
    if POSITIVES == "linear":
        pos += tl.sum(masked, AXIS)
    if POSITIVES == "lse":
        new = tl.maximum(pos, tl.max(masked, AXIS))
        shift = scores.finite(new)
        spread = tl.expand_dims(shift, AXIS)
        total = tl.exp2((pos - shift) * LOG2E) + tl.sum(tl.exp2((masked - spread) * LOG2E), AXIS)
        pos = shift + tl.log2(total) * LN2
    return pos


@triton.jit(do_not_specialize=["length", "groups", "offset", "first_pair", "last_pair"])
def merge_kernel(
    slots, pair_scores, counts, top_out, logsum_out, pos_out, neg_out, length, groups,
    offset, first_pair, last_pair,
    IDS: tl.constexpr, POSITIVES: tl.constexpr, HARDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of all groups of the other side, merged in their order.

    `counts` are the numbers of positives. Without ids the score of entry i's positive is
    pair_scores[i + offset], if that index lies in [first_pair, last_pair).
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    field = groups.to(tl.int64) * length
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    pos = tl.full([BLOCK], float("-inf") if POSITIVES == "lse" else 0.0, tl.float32)
    neg = tl.full([BLOCK], float("-inf"), tl.float32)
    at = slots + index
    for _ in range(groups):
        other = tl.load(at, mask=inside, other=float("-inf"))
        other_total = tl.load(at + field, mask=inside, other=0.0)
        new = tl.maximum(top, other)
        shift = scores.finite(new)
        total = total * scores.exp(top, shift, True) + other_total * scores.exp(other, shift, True)
        top = new
        if IDS and POSITIVES == "linear":
            pos += tl.load(at + 2 * field, mask=inside, other=0.0)
        if IDS and POSITIVES == "lse":
            x = tl.load(at + 2 * field, mask=inside, other=float("-inf"))
            shift = scores.finite(tl.maximum(pos, x))
            pos = shift + tl.log2(scores.exp(pos, shift, True) + scores.exp(x, shift, True)) * LN2
        if HARDEST:
            neg = tl.maximum(neg, tl.load(at + 3 * field, mask=inside, other=float("-inf")))
        at += length
    tl.store(top_out + index, top, mask=inside)
    tl.store(logsum_out + index, tl.log2(total) * LN2, mask=inside)
    shift = scores.finite(top)
    count = tl.zeros([BLOCK], tl.float32)
    if counts is not None:
        count = tl.load(counts + index, mask=inside, other=0).to(tl.float32)
    if pair_scores is not None:
        source = index + offset
        paired = (source >= first_pair) & (source < last_pair)
        pos = tl.load(pair_scores + source, mask=inside & paired, other=pos)
        count = paired.to(tl.float32)
    if POSITIVES == "linear":
        tl.store(pos_out + index, pos - count * shift, mask=inside)
    if POSITIVES == "lse":
        tl.store(pos_out + index, pos - shift, mask=inside)
    if HARDEST:
        tl.store(neg_out + index, neg, mask=inside)


@triton.jit(do_not_specialize=[*scores.SIZES, "row_tiles", "col_tiles", "col_groups"])
def softplus_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, row_slots,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, col_groups,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SELF: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(±S), one slot for each group of columns."""
    row_group, col_group = _pair_of_groups(tl.program_id(0), col_groups, False)
    row_slots += col_group.to(tl.int64) * n
    first_row = row_group * row_tiles * BLOCK_M
    last_row = tl.minimum(first_row + row_tiles * BLOCK_M, n)
    first_col = col_group * col_tiles * BLOCK_N
    last_col = tl.minimum(first_col + col_tiles * BLOCK_N, m)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        row_scale, row_added, row_identity = scores.row_side(
            scale, row_bias, row_ids, rows, n, SCALE_PER_ROW
        )
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(0, tl.cdiv(last_col - first_col, BLOCK_N) * k_steps):
            col0 = first_col + step // k_steps * BLOCK_N
            acc = scores.multiply(
                acc, step % k_steps, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            if step % k_steps == k_steps - 1:
                cols = col0 + tl.arange(0, BLOCK_N)
                col_added, col_identity = scores.side(col_bias, col_ids, cols, m, -2)
                s = scores.affine(acc, row_scale, row_added, col_added)
                special = scores.is_special(row_ids, row_identity, col_identity, row0, col0,
                                            diagonal, SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
                if row_limit is not None:
                    limit = scores.vector(row_limit, rows, n, 0.0)[:, None]
                    s = scores.limited(s, acc, limit, special, row_ids, row_identity, col_identity,
                                       rows, cols, n, m, diagonal, SELF)  # fmt: skip
                s = scores.signed(s, special, row_ids, row_identity, col_identity, rows, cols, n, m,
                                  diagonal, SELF)  # fmt: skip
                total += tl.sum(scores.softplus(s), 1)
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        tl.store(row_slots + rows, total, mask=rows < n)
