"""Triton kernels of the forward pass with one exponential per score: row and column statistics, and
row sums of softplus.

With the shift T of `gpu.fixed_shift`, statistics are plain sums of E = 2^(S·log2 e - T). Each
program adds to its own slots. `merge_kernel` or a sum combines the slots in a fixed order, so that
the same inputs give the same bits.
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
        # the square root may be rounded up or down
        col -= (col * (col + 1) // 2 > pid).to(tl.int32)
        col += ((col + 1) * (col + 2) // 2 <= pid).to(tl.int32)
        return pid - col * (col + 1) // 2, col
    else:
        return pid // col_groups, pid % col_groups


@triton.jit
def _add(sums, index, values, length):
    """Add to this program's slot: one thread adds to an element, tile after tile, so the order is
    fixed. Unlike a load and a store, an addition in memory waits for nothing."""
    tl.atomic_add(sums + index, values, mask=index < length, sem="relaxed", scope="cta")


@triton.jit
def _fold_rows(e, KEPT: tl.constexpr):
    """Column sums of a tile by groups of rows, (KEPT, columns). Rows that are added up lie in
    registers of one thread, so nothing moves between threads: see `tiles.Arch.kept_rows`."""
    M: tl.constexpr = e.shape[0]
    N: tl.constexpr = e.shape[1]
    if KEPT == M:
        return e
    else:
        if KEPT == 1:
            return tl.expand_dims(tl.sum(e, 0), 0)
        else:
            pieces = tl.reshape(e, [M // (2 * KEPT), KEPT // 8, 2, 8, N])
            return tl.reshape(tl.sum(tl.sum(pieces, 2), 0), [KEPT, N])


@triton.jit
def _add_tile(
    acc, col_total, row0, col0, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit,
    shift, row_slots, row_pos, col_pos, pair_scores, cache, stride_cache, cached_rows, n, m,
    diagonal, with_cols,
    SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEPT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Add the exponentials of a tile to the sums, from its inner products `acc`. Returns the
    column sums, which stay in registers."""
    if PARTS > 1:
        rest = (
            scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift, row_slots,
            row_pos, col_pos, pair_scores, cache, stride_cache, cached_rows, n, m, diagonal,
            with_cols,
        )  # fmt: skip
        left, right = scores.split_columns(acc)
        left_total, right_total = scores.split_columns(col_total)
        left_total = _add_tile(
            left, left_total, row0, col0, *rest, SCALE, ROWS, COLS, POSITIVES, SELF,
            EXCLUDE_POSITIVES, TMA, BLOCK_M, BLOCK_N // 2, KEPT, PARTS // 2,
        )  # fmt: skip
        right_total = _add_tile(
            right, right_total, row0, col0 + BLOCK_N // 2, *rest, SCALE, ROWS, COLS,
            POSITIVES, SELF, EXCLUDE_POSITIVES, TMA, BLOCK_M, BLOCK_N // 2, KEPT, PARTS // 2,
        )  # fmt: skip
        return scores.join_columns(left_total, right_total)
    else:  # needed: Triton compiles the code behind a `return` too
        LIMITED: tl.constexpr = row_limit is not None or col_limit is not None
        # whether the statistics depend on which pairs are positive
        POSITIVE: tl.constexpr = (
            EXCLUDE_POSITIVES or POSITIVES != "none" or pair_scores is not None or LIMITED
        )  # fmt: skip
        rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        x = scores.exponents(acc, scale, row_bias, col_bias, shift, rows, cols, n, m, SCALE, LOG2E)
        if LIMITED:
            above = scores.above_limit(acc, row_limit, col_limit, rows, cols, n, m)
        row_label, col_label = scores.labels(row_ids, col_ids, row0, col0, BLOCK_M, BLOCK_N)
        if scores.is_special(
            row_ids, row_label, col_label, row0, col0, n, m, diagonal, SELF, POSITIVE, BLOCK_M,
            BLOCK_N,
        ):  # fmt: skip
            positive, kept = scores.classify(row_ids, row_label, col_label, rows, cols, n, m,
                                             diagonal, SELF)  # fmt: skip
            if LIMITED:
                above = above & (positive == 0)
            if pair_scores is not None:
                target = rows + diagonal
                here = (target >= col0) & (target < tl.minimum(col0 + BLOCK_N, m))
                found = tl.sum(tl.where(positive, x, 0.0), 1)
                tl.store(pair_scores + rows, found, mask=here & (rows < n))
            if POSITIVES != "none":
                of_positives = tl.where(positive, tl.exp2(x) if POSITIVES == "lse" else x, 0.0)
                if ROWS:
                    _add(row_pos, rows, tl.sum(of_positives, 1), n)
                if COLS:
                    if with_cols:
                        _add(col_pos, cols, tl.sum(of_positives, 0), m)
            if EXCLUDE_POSITIVES:
                kept = kept & (positive == 0)
            x = tl.where(kept, x, float("-inf"))
        if LIMITED:
            x = tl.where(above, float("-inf"), x)
        e = tl.exp2(x)
        if cache is not None:  # before the sums: behind them, a part of the tile spills
            if TMA:  # a descriptor writes nothing beyond its last row
                cache.store([row0, col0], e.to(tl.bfloat16))
            else:
                if row0 < cached_rows:  # the memory covers whole tiles
                    at = tl.arange(0, BLOCK_M)[:, None] * stride_cache + tl.arange(0, BLOCK_N)
                    first = tl.cast(row0, tl.int64) * stride_cache + col0
                    tl.store(cache + first + at, e.to(tl.bfloat16))
        if ROWS:
            _add(row_slots, rows, tl.sum(e, 1), n)
        if COLS:
            col_total += _fold_rows(e, KEPT)
        return col_total


NUMBERS = [*scores.SIZES, "row_tiles", "col_tiles", "row_groups", "col_groups", "cached_rows"]


@triton.jit(do_not_specialize=NUMBERS)
def sums_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift, row_slots,
    col_slots, pair_scores, cache, stride_cache, cached_rows,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, row_groups, col_groups,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    TRIANGLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KEPT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Row and column sums of E, and of the positives, in one pass.

    A program processes one group of `row_tiles` row tiles and one of `col_tiles` column tiles. It
    walks the rows of one column tile after the other: the columns' sums stay in registers, those of
    the rows are added to the program's slot. Slots are [field][group of the other side][row or
    column] and start at 0; no two programs write to the same one. The fields are Σ E, and by ids Σ
    over the positives: of S·log2 e - T for "linear", of E for "lse".

    Without ids, S·log2 e - T of the positive of each row is stored in `pair_scores`.
    cache: memory in bf16 for E of the first `cached_rows` rows, or None. It covers whole tiles.
    TRIANGLE: for a symmetric S. Only pairs of groups with row ≤ column are computed, and both sides
    share the slots. The groups on the diagonal are computed in full and write only their rows.
    """
    row_group, col_group = _pair_of_groups(tl.program_id(0), col_groups, TRIANGLE)
    with_cols = True
    if TRIANGLE:
        with_cols = row_group != col_group
    row_pos, col_pos = row_slots, col_slots
    if ROWS:
        row_slots += tl.cast(col_group, tl.int64) * n
        row_pos = row_slots + tl.cast(col_groups, tl.int64) * n
    if COLS:
        col_slots += tl.cast(row_group, tl.int64) * m
        col_pos = col_slots + tl.cast(row_groups, tl.int64) * m
    first_row = row_group * row_tiles * BLOCK_M
    last_row = tl.minimum(first_row + row_tiles * BLOCK_M, n)
    first_col = col_group * col_tiles * BLOCK_N
    last_col = tl.minimum(first_col + col_tiles * BLOCK_N, m)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    T = tl.load(shift)
    factor = scores.load_one(scale, SCALE, LOG2E)
    for col0 in tl.range(first_col, last_col, BLOCK_N):
        col_total = tl.zeros([KEPT, BLOCK_N], tl.float32)
        # one loop over tiles and steps of D: loads of the next tile overlap with this reduction
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        row0, k = first_row, 0
        for _ in tl.range(0, tl.cdiv(last_row - first_row, BLOCK_M) * k_steps):
            acc = scores.multiply(
                acc, k, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            k += 1
            if k == k_steps:
                col_total = _add_tile(
                    acc, col_total, row0, col0, factor, row_bias, col_bias, row_ids, col_ids,
                    row_limit, col_limit, T, row_slots, row_pos, col_pos, pair_scores, cache,
                    stride_cache, cached_rows, n, m, diagonal, with_cols, SCALE, ROWS, COLS,
                    POSITIVES, SELF, EXCLUDE_POSITIVES, TMA, BLOCK_M, BLOCK_N, KEPT, PARTS,
                )  # fmt: skip
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                row0 += BLOCK_M
                k = 0
        if COLS:
            if with_cols:
                cols = col0 + tl.arange(0, BLOCK_N)
                tl.store(col_slots + cols, tl.sum(col_total, 0), mask=cols < m)


@triton.jit(do_not_specialize=["length", "groups", "offset", "first_pair", "last_pair"])
def merge_kernel(
    slots, pair_scores, counts, ids, shift, max_out, logsum_out, pos_out,
    underflowed, length, groups, offset, first_pair, last_pair, LEAST: tl.constexpr,
    BIASED: tl.constexpr, POSITIVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of one side from the sums of all groups of the other side, in the order of the
    groups, and which of them have underflowed.

    counts: the numbers of positives. Without ids, S·log2 e - T of the positive of element i is
    pair_scores[i + offset], if that index is in [first_pair, last_pair).
    BIASED: whether there are biases, so that exponentials can underflow also with T = 0.

    The power of two below Σ E stands for the maximum.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    T = tl.load(shift)
    total = tl.zeros([BLOCK], tl.float32)
    of_positives = tl.zeros([BLOCK], tl.float32)
    at = slots + index
    for _ in range(groups):
        total += tl.load(at, mask=inside, other=0.0)
        if counts is not None:
            of_positives += tl.load(at + groups.to(tl.int64) * length, mask=inside, other=0.0)
        at += length
    valid = inside
    if ids is not None:
        valid = valid & (tl.load(ids + index, mask=inside, other=-1) >= 0)
    empty = (total == 0.0) | (valid == 0)
    top = tl.where(empty, 0.0, tl.floor(tl.log2(total)))
    # in fp64: at a score of 200, half an ulp of the shift would be an error of 1e-5 of the softmax
    power = tl.where(empty, 0.0, (T + tl.zeros_like(top)).to(tl.float64) + top)
    maximum = (power * LN2).to(tl.float32)
    rest = (power - maximum.to(tl.float64) * LOG2E).to(tl.float32)  # lost by rounding maximum
    logsum = (tl.log2(total * tl.exp2(-top)) + rest) * LN2
    tl.store(max_out + index, tl.where(empty, float("-inf"), maximum), mask=inside)
    tl.store(logsum_out + index, tl.where(empty, float("-inf"), logsum), mask=inside)
    top = tl.where(empty, -T, top) - rest  # the shift of positives, less T
    least = LEAST
    if not BIASED:  # with T = 0 no exponential is below 2^-87
        least = tl.where(T > 0, LEAST, 0.0)
    lost = total < least
    if POSITIVES != "none":
        count = tl.zeros([BLOCK], tl.float32)
        if counts is not None:
            count = tl.load(counts + index, mask=inside, other=0).to(tl.float32)
        if pair_scores is not None:
            source = index + offset
            paired = (source >= first_pair) & (source < last_pair)
            of_positives = tl.load(pair_scores + source, mask=inside & paired, other=0.0)
            count = paired.to(tl.float32)
        if POSITIVES == "lse":
            if pair_scores is None:
                lost = lost | ((of_positives < least) & (count > 0))
                of_positives = tl.log2(of_positives)
            of_positives = tl.where(count > 0, of_positives - top, float("-inf"))
        else:
            of_positives -= count * top
        tl.store(pos_out + index, of_positives * LN2, mask=inside)
    tl.store(underflowed + index, (lost & valid).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=[*scores.SIZES, "row_tiles", "col_tiles", "col_groups"])
def softplus_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, row_slots,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, col_groups,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, SELF: tl.constexpr, TMA: tl.constexpr,
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
    factor = scores.load_one(scale, SCALE, LOG2E)
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        col0, k = first_col, 0
        for _ in tl.range(0, tl.cdiv(last_col - first_col, BLOCK_N) * k_steps):
            acc = scores.multiply(
                acc, k, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            k += 1
            if k == k_steps:
                x = scores.signed_exponents(
                    acc, factor, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, row0,
                    col0, n, m, diagonal, SCALE, SELF,
                )  # fmt: skip
                total += tl.sum(scores.softplus(x), 1)
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                col0 += BLOCK_N
                k = 0
        tl.store(row_slots + rows, total, mask=rows < n)
