"""Triton kernels of the forward pass: row and column statistics, and row sums of softplus.

Each program writes to its own slots. `merge_kernel` or a sum combines the slots in a fixed order,
so that the same inputs give the same bits.
"""

# ruff: noqa: SIM102

import triton
import triton.language as tl

from . import scores
from .scores import LN2, LOG2E


@triton.jit
def _pair_of_groups(pid, col_groups, TRIANGLE: tl.constexpr):
    """The row group and the column group of a program.

    TRIANGLE: only the pairs with row group ≤ column group.
    """
    if TRIANGLE:
        col = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) * 0.5).to(tl.int32)
        col -= (col * (col + 1) // 2 > pid).to(
            tl.int32
        )  # the square root may be rounded up or down
        col += ((col + 1) * (col + 2) // 2 <= pid).to(tl.int32)
        return pid - col * (col + 1) // 2, col
    else:
        return pid // col_groups, pid % col_groups


@triton.jit
def _update_statistics(
    acc, col0, row_max, total, pos, row_neg_max, row0, rows, row_scale, row_offset, row_label,
    col_bias, row_ids, col_ids, row_limit, col_slots, pair_scores, n, m, diagonal, col_field,
    with_cols, rows_done,
    ROWS: tl.constexpr, COLS: tl.constexpr, POSITIVES: tl.constexpr, SELF: tl.constexpr,
    EXCLUDE_POSITIVES: tl.constexpr, HARDEST: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of a tile, from its inner products `acc`.

    Returns the updated statistics of the rows. Those of the columns are updated in their slot.
    """
    if PARTS > 1:
        left, right = scores.split_columns(acc)
        rest = (
            row0, rows, row_scale, row_offset, row_label, col_bias, row_ids, col_ids, row_limit,
            col_slots, pair_scores, n, m, diagonal, col_field, with_cols, rows_done,
        )  # fmt: skip
        row_max, total, pos, row_neg_max = _update_statistics(
            left, col0, row_max, total, pos, row_neg_max, *rest, ROWS, COLS, POSITIVES, SELF,
            EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
        return _update_statistics(
            right, col0 + BLOCK_N // 2, row_max, total, pos, row_neg_max, *rest, ROWS, COLS,
            POSITIVES, SELF, EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
    cols = col0 + tl.arange(0, BLOCK_N)
    # whether the statistics depend on which pairs are positive
    POSITIVE: tl.constexpr = (
        EXCLUDE_POSITIVES or HARDEST or POSITIVES != "none" or pair_scores is not None
        or row_limit is not None
    )  # fmt: skip
    col_offset, col_label = scores.load_side(col_bias, col_ids, cols, m, -2)
    s = scores.scale_and_offset(acc, row_scale, row_offset, col_offset)

    special = False
    tile_neg = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SELF or POSITIVE:
        special = scores.is_special(row_ids, row_label, col_label, row0, col0,
                                    diagonal, SELF, POSITIVE, BLOCK_M,
                                    BLOCK_N)  # fmt: skip
        if row_limit is not None:
            limit = scores.load_vector(row_limit, rows, n, 0.0)[:, None]
            s = scores.apply_limit(s, acc, limit, special, row_ids, row_label, col_label, rows,
                                   cols, n, m, diagonal, SELF)  # fmt: skip
        if special:
            positive, excluded = scores.classify(
                row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
            )
            if POSITIVES != "none" or pair_scores is not None:
                # the mask is last used here: kept across the reduction it would spill
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
                        _update_column_positives(masked, col_slots + 2 * col_field, cols, m,
                                           POSITIVES)  # fmt: skip
            if HARDEST:
                negative = tl.where(positive | excluded, float("-inf"), s)
                tile_neg = tl.max(negative, 1)
                if COLS:
                    if with_cols:
                        _update_maxima(col_slots + 3 * col_field, cols, m, tl.max(negative, 0))
            if EXCLUDE_POSITIVES:
                s = tl.where(positive | excluded, float("-inf"), s)
            elif SELF:
                s = tl.where(excluded, float("-inf"), s)

    if ROWS:
        tile_max = tl.max(s, 1)
        if HARDEST:
            row_neg_max = tl.maximum(row_neg_max, tl.where(special, tile_neg, tile_max))
        new = tl.maximum(row_max, tile_max)
        shift = scores.finite_shift(new)
        total = total * scores.exp(row_max, shift, EXACT)
        total += tl.sum(scores.exp(s, shift[:, None], EXACT), 1)
        row_max = new
    if COLS:
        if with_cols:
            _update_columns(s, special, col_slots, cols, m, col_field, rows_done,
                         HARDEST, EXACT)  # fmt: skip
    return row_max, total, pos, row_neg_max


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

    A program processes one group of `row_tiles` row tiles and one of `col_tiles` column tiles. The
    statistics of a row tile stay in registers while it runs over the columns. Those of the columns
    are updated in the program's slot. Slots are [field][group of the other side][row or column]; no
    two programs write to the same slot. The fields are max, sum, pos and neg_max.

    POSITIVES: the statistics of positives by ids. Without ids, the score of the positive of each
    row is stored in `pair_scores`.
    TRIANGLE: for a symmetric S. Only pairs of groups with row ≤ column are computed, and both sides
    share the slots. The groups on the diagonal are computed in full and write only their rows.
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
        row_scale, row_offset, row_label = scores.load_row_side(
            scale, row_bias, row_ids, rows, n, SCALE_PER_ROW
        )
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        pos = tl.full([BLOCK_M], float("-inf") if POSITIVES == "lse" else 0.0, tl.float32)
        row_neg_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

        rest = (
            row0, rows, row_scale, row_offset, row_label, col_bias, row_ids, col_ids, row_limit,
            col_slots, pair_scores, n, m, diagonal, col_field, with_cols, row0 - first_row,
        )  # fmt: skip
        # one loop over tiles and steps of D: loads of the next tile overlap with this reduction
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(0, tl.cdiv(last_col - first_col, BLOCK_N) * k_steps):
            col0 = first_col + step // k_steps * BLOCK_N
            acc = scores.multiply(
                acc, step % k_steps, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            if step % k_steps == k_steps - 1:
                row_max, total, pos, row_neg_max = _update_statistics(
                    acc, col0, row_max, total, pos, row_neg_max, *rest, ROWS, COLS, POSITIVES, SELF,
                    EXCLUDE_POSITIVES, HARDEST, EXACT, BLOCK_M, BLOCK_N, PARTS,
                )  # fmt: skip
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

        if ROWS:
            inside = rows < n
            tl.store(row_slots + rows, row_max, mask=inside)
            tl.store(row_slots + row_field + rows, total, mask=inside)
            if POSITIVES != "none":
                tl.store(row_slots + 2 * row_field + rows, pos, mask=inside)
            if HARDEST:
                tl.store(row_slots + 3 * row_field + rows, row_neg_max, mask=inside)
        # the next row tile reads column slots that other threads of this program have written
        tl.debug_barrier()


@triton.jit
def _update_columns(s, special, slots, cols, m, field, rows_done, HARDEST: tl.constexpr,
                 EXACT: tl.constexpr):  # fmt: skip
    """Update the maxima and sums of the columns in their slot.

    rows_done: the number of rows processed before. If it is 0, the slot has not been written yet.
    """
    inside = cols < m
    written = inside & (tl.zeros_like(cols) + rows_done > 0)
    old = tl.load(slots + cols, mask=written, other=float("-inf"))
    total = tl.load(slots + field + cols, mask=written, other=0.0)
    tile_max = tl.max(s, 0)
    new = tl.maximum(old, tile_max)
    shift = scores.finite_shift(new)
    total = total * scores.exp(old, shift, EXACT) + tl.sum(scores.exp(s, shift[None, :], EXACT), 0)
    tl.store(slots + cols, new, mask=inside)
    tl.store(slots + field + cols, total, mask=inside)
    if HARDEST:
        if special == 0:
            _update_maxima(slots + 3 * field, cols, m, tile_max)


@triton.jit
def _update_maxima(slots, cols, m, value):
    """Update the maxima in a slot in place."""
    old = tl.load(slots + cols, mask=cols < m, other=float("-inf"))
    tl.store(slots + cols, tl.maximum(old, value), mask=cols < m)


@triton.jit
def _update_column_positives(masked, slots, cols, m, POSITIVES: tl.constexpr):
    pos = tl.load(slots + cols, mask=cols < m, other=0.0)
    tl.store(slots + cols, _add_positives(masked, pos, 0, POSITIVES), mask=cols < m)


@triton.jit
def _add_positives(masked, pos, AXIS: tl.constexpr, POSITIVES: tl.constexpr):
    """Add a tile to the sum or to the logsumexp of the positives."""
    if POSITIVES == "linear":
        pos += tl.sum(masked, AXIS)
    if POSITIVES == "lse":
        new = tl.maximum(pos, tl.max(masked, AXIS))
        shift = scores.finite_shift(new)
        spread = tl.expand_dims(shift, AXIS)
        total = tl.exp2((pos - shift) * LOG2E) + tl.sum(tl.exp2((masked - spread) * LOG2E), AXIS)
        pos = shift + tl.log2(total) * LN2
    return pos


@triton.jit(do_not_specialize=["length", "groups", "offset", "first_pair", "last_pair"])
def merge_kernel(
    slots, pair_scores, counts, max_out, logsum_out, pos_out, neg_max_out, length, groups,
    offset, first_pair, last_pair,
    IDS: tl.constexpr, POSITIVES: tl.constexpr, HARDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all groups of the other side, in the order of the groups.

    counts: the numbers of positives. Without ids, the score of the positive of element i is
    pair_scores[i + offset], if that index is in [first_pair, last_pair).
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    field = groups.to(tl.int64) * length
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    pos = tl.full([BLOCK], float("-inf") if POSITIVES == "lse" else 0.0, tl.float32)
    negative_maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    at = slots + index
    for _ in range(groups):
        other = tl.load(at, mask=inside, other=float("-inf"))
        other_total = tl.load(at + field, mask=inside, other=0.0)
        new = tl.maximum(maximum, other)
        shift = scores.finite_shift(new)
        total = total * scores.exp(maximum, shift, True) + other_total * scores.exp(
            other, shift, True
        )
        maximum = new
        if IDS and POSITIVES == "linear":
            pos += tl.load(at + 2 * field, mask=inside, other=0.0)
        if IDS and POSITIVES == "lse":
            x = tl.load(at + 2 * field, mask=inside, other=float("-inf"))
            shift = scores.finite_shift(tl.maximum(pos, x))
            pos = shift + tl.log2(scores.exp(pos, shift, True) + scores.exp(x, shift, True)) * LN2
        if HARDEST:
            negative_maximum = tl.maximum(
                negative_maximum, tl.load(at + 3 * field, mask=inside, other=float("-inf"))
            )
        at += length
    tl.store(max_out + index, maximum, mask=inside)
    tl.store(logsum_out + index, tl.log2(total) * LN2, mask=inside)
    shift = scores.finite_shift(maximum)
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
        tl.store(neg_max_out + index, negative_maximum, mask=inside)


@triton.jit(do_not_specialize=[*scores.SIZES, "row_tiles", "col_tiles", "col_groups"])
def softplus_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, row_slots,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, col_groups,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SELF: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(±S), in one slot per column group."""
    row_group, col_group = _pair_of_groups(tl.program_id(0), col_groups, False)
    row_slots += col_group.to(tl.int64) * n
    first_row = row_group * row_tiles * BLOCK_M
    last_row = tl.minimum(first_row + row_tiles * BLOCK_M, n)
    first_col = col_group * col_tiles * BLOCK_N
    last_col = tl.minimum(first_col + col_tiles * BLOCK_N, m)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        row_scale, row_offset, row_label = scores.load_row_side(
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
                col_offset, col_label = scores.load_side(col_bias, col_ids, cols, m, -2)
                s = scores.scale_and_offset(acc, row_scale, row_offset, col_offset)
                special = scores.is_special(row_ids, row_label, col_label, row0, col0,
                                            diagonal, SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
                if row_limit is not None:
                    limit = scores.load_vector(row_limit, rows, n, 0.0)[:, None]
                    s = scores.apply_limit(s, acc, limit, special, row_ids, row_label, col_label,
                                       rows, cols, n, m, diagonal, SELF)  # fmt: skip
                s = scores.signed_scores(s, special, row_ids, row_label, col_label, rows, cols, n,
                                         m, diagonal, SELF)  # fmt: skip
                total += tl.sum(scores.softplus(s), 1)
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        tl.store(row_slots + rows, total, mask=rows < n)
