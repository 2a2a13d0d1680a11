"""The Triton kernels: forward statistics, W panels, fused gradients.

All work on tiles of S = scale·a·bᵀ + biases, computed by `_scores` with fp32 accumulation and never
stored. Padding and rows beyond the end carry a bias of -inf, so the common tile needs no masks:
exp(-inf) and σ(-inf) are 0. Tiles that hold positives or self pairs are found by their position or
by comparing ids, and take a branch of their own.

`N` and `M` are run-time numbers, never specialised: one compilation serves every batch size. An
absent pointer is None, which Triton treats as a constant.
"""

# No `from __future__ import annotations`: Triton reads the `tl.constexpr` annotations. Nested `if`s
# stay nested: Triton decides one on constants at compile time, a conjunction at run time.
# ruff: noqa: SIM102

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Integers that change from call to call: specialising on 1 or on multiples of 16 would recompile.
_SIZES = ["n", "m", "d", "diagonal"]


# ---- what all kernels share


@triton.jit
def _exp(x, shift, EXACT: tl.constexpr):
    """e^(x - shift). EXACT rounds x - shift first, so that e^0 is 1; else one FMA, whose error of
    |x|·2^-24 is far below that of a bf16 or fp16 score."""
    if EXACT:
        return tl.exp2((x - shift) * LOG2E)
    else:
        return tl.exp2(x * LOG2E - shift * LOG2E)


@triton.jit
def _finite(x):
    """x with 0 for -inf: nothing allowed, and -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _log1p_unit(t):
    """log(1 + t) for t in [0, 1], relative error 3e-8. log2(1 + t) would lose the digits of small
    t, and a sum of many small terms with them."""
    p = 0.005232688 * t - 0.029505214
    p = p * t + 0.07822591
    p = p * t - 0.13663243
    p = p * t + 0.19106005
    p = p * t - 0.24842982
    p = p * t + 0.33319098
    p = p * t - 0.49999493
    p = p * t + 0.99999994
    return p * t


@triton.jit
def _vector(pointer, index, length, other):
    """A vector's entries at `index`, `other` beyond the end."""
    return tl.load(pointer + index, mask=index < length, other=other)


@triton.jit
def _side(bias, ids, index, length, PADDING: tl.constexpr):
    """One side of a tile: what is added to its scores, -inf for padding and beyond the end; and its
    ids, there PADDING, which differs between rows and columns and so is never equal."""
    inside = index < length
    identity = index
    if ids is not None:
        identity = tl.load(ids + index, mask=inside, other=-1)
        inside = inside & (identity >= 0)
        identity = tl.where(inside, identity, PADDING)
    added = tl.zeros_like(index).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + index, mask=inside, other=0.0)
    return tl.where(inside, added, float("-inf")), identity


@triton.jit
def _pointers(x, row0, length, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of features [row0 : row0 + ROWS, 0 : BLOCK_K]. Beyond the end the last row again, instead of
    a mask in the inner loop: the scores of such rows get -inf added."""
    rows = tl.minimum(row0 + tl.arange(0, ROWS), length - 1).to(tl.int64)
    return x + rows[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _load(pointers, k0, d, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr):
    """What the pointers point to, 0 beyond D."""
    if EVEN_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k0 + tl.arange(0, BLOCK_K) < d)[None, :], other=0.0)


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # it multiplies the raw bits of bf16; products of fp16, bf16 are exact in fp32
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _inner_products(a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                    TMA: tl.constexpr, PRECISION: tl.constexpr,
                    INTERPRETED: tl.constexpr):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if TMA:
        for k in tl.range(0, d, BLOCK_K):
            x, y = a.load([row0, k]), b.load([col0, k])
            acc = _dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
    else:
        x_at = _pointers(a, row0, n, stride_a, BLOCK_M, BLOCK_K)
        y_at = _pointers(b, col0, m, stride_b, BLOCK_N, BLOCK_K)
        for k in tl.range(0, d, BLOCK_K):
            x, y = _load(x_at, k, d, BLOCK_K, EVEN_D), _load(y_at, k, d, BLOCK_K, EVEN_D)
            acc = _dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
            x_at += BLOCK_K
            y_at += BLOCK_K
    return acc


@triton.jit
def _scores(acc, scale, row_added, col_added):
    return acc * scale[:, None] + col_added[None, :] + row_added[:, None]


@triton.jit
def _special(row_ids, row_identity, col_identity, row0, col0, diagonal,
             SELF: tl.constexpr, POSITIVE: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr):  # fmt: skip
    """Whether the tile holds a pair that is not a plain negative: by ids, or by position."""
    first = row0 + diagonal
    diagonal_crosses = (col0 < first + BLOCK_M) & (first < col0 + BLOCK_N)
    if row_ids is None:
        return diagonal_crosses
    else:
        found = False
        if POSITIVE:
            different = row_identity[:, None] ^ col_identity[None, :]  # 0 is the least unsigned
            found = tl.min(tl.min(different.to(tl.uint32, bitcast=True), 1), 0) == 0
        if SELF:
            found = found | diagonal_crosses
        return found


@triton.jit
def _classify(row_ids, row_identity, col_identity, rows, cols, n, m, diagonal,
              SELF: tl.constexpr):  # fmt: skip
    """(positive, excluded) of a tile; nothing beyond the end, no padding among the positives."""
    # one side shifted, not the difference of both: that would be a loop invariant of tile size,
    # which the compiler hoists and spills
    partner = rows + diagonal
    partner = tl.where((rows < n) & (partner < m), partner, -1)
    itself = cols[None, :] == partner[:, None]
    if row_ids is None:  # noqa: SIM108 (Triton decides an `if` at compile time)
        positive = itself
    else:
        positive = row_identity[:, None] == col_identity[None, :]
    if SELF:
        return positive & (itself == 0), itself
    else:
        return positive, tl.zeros_like(itself)


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


# ---- forward


@triton.jit(do_not_specialize=[*_SIZES, "row_tiles", "col_tiles", "row_groups", "col_groups"])
def logsumexp_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_slots, col_slots, pair_scores,
    n, m, d, stride_a, stride_b, diagonal, row_tiles, col_tiles, row_groups, col_groups,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    HARDEST: tl.constexpr, TRIANGLE: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    # whether positives matter; without ids and with SELF there are none
    POSITIVE: tl.constexpr = (
        EXCLUDE_POSITIVES or HARDEST or POSITIVES != "none" or pair_scores is not None
    )

    first_row = row_group * row_tiles * BLOCK_M
    last_row = tl.minimum(first_row + row_tiles * BLOCK_M, n)
    first_col = col_group * col_tiles * BLOCK_N
    last_col = tl.minimum(first_col + col_tiles * BLOCK_N, m)
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        row_added, row_identity = _side(row_bias, row_ids, rows, n, -1)
        if SCALE_PER_ROW:
            row_scale = _vector(scale, rows, n, 0.0)
        else:
            row_scale = tl.load(scale) + tl.zeros_like(row_added)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        pos = tl.full([BLOCK_M], float("-inf") if POSITIVES == "lse" else 0.0, tl.float32)
        neg_top = tl.full([BLOCK_M], float("-inf"), tl.float32)

        for col0 in tl.range(first_col, last_col, BLOCK_N):
            cols = col0 + tl.arange(0, BLOCK_N)
            acc = _inner_products(
                a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            col_added, col_identity = _side(col_bias, col_ids, cols, m, -2)
            s = _scores(acc, row_scale, row_added, col_added)

            special = False
            tile_neg = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if SELF or POSITIVE:
                special = _special(row_ids, row_identity, col_identity, row0, col0, diagonal,
                                   SELF, POSITIVE, BLOCK_M, BLOCK_N)  # fmt: skip
                if special:
                    positive, excluded = _classify(
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
                shift = _finite(new)
                total = total * _exp(top, shift, EXACT)
                total += tl.sum(_exp(s, shift[:, None], EXACT), 1)
                top = new
            if COLS:
                if with_cols:
                    _add_to_cols(s, special, col_slots, cols, m, col_field, row0 - first_row,
                                 HARDEST, EXACT)  # fmt: skip

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
    shift = _finite(new)
    total = total * _exp(old, shift, EXACT) + tl.sum(_exp(s, shift[None, :], EXACT), 0)
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
        shift = _finite(new)
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
        shift = _finite(new)
        total = total * _exp(top, shift, True) + other_total * _exp(other, shift, True)
        top = new
        if IDS and POSITIVES == "linear":
            pos += tl.load(at + 2 * field, mask=inside, other=0.0)
        if IDS and POSITIVES == "lse":
            x = tl.load(at + 2 * field, mask=inside, other=float("-inf"))
            shift = _finite(tl.maximum(pos, x))
            pos = shift + tl.log2(_exp(pos, shift, True) + _exp(x, shift, True)) * LN2
        if HARDEST:
            neg = tl.maximum(neg, tl.load(at + 3 * field, mask=inside, other=float("-inf")))
        at += length
    tl.store(top_out + index, top, mask=inside)
    tl.store(logsum_out + index, tl.log2(total) * LN2, mask=inside)
    shift = _finite(top)
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


@triton.jit(do_not_specialize=[*_SIZES, "row_tiles", "col_tiles", "col_groups"])
def softplus_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_slots,
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
    for row0 in tl.range(first_row, last_row, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        row_added, row_identity = _side(row_bias, row_ids, rows, n, -1)
        if SCALE_PER_ROW:
            row_scale = _vector(scale, rows, n, 0.0)
        else:
            row_scale = tl.load(scale) + tl.zeros_like(row_added)
        total = tl.zeros([BLOCK_M], tl.float32)
        for col0 in tl.range(first_col, last_col, BLOCK_N):
            cols = col0 + tl.arange(0, BLOCK_N)
            acc = _inner_products(
                a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
            )  # fmt: skip
            col_added, col_identity = _side(col_bias, col_ids, cols, m, -2)
            s = _scores(acc, row_scale, row_added, col_added)
            special = _special(row_ids, row_identity, col_identity, row0, col0, diagonal,
                               SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
            if special:
                positive, excluded = _classify(
                    row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
                )
                s = tl.where(excluded, float("-inf"), tl.where(positive, -s, s))
            total += tl.sum(_softplus(s), 1)
        tl.store(row_slots + rows, total, mask=rows < n)


@triton.jit
def _softplus(s):
    return tl.maximum(s, 0.0) + _log1p_unit(tl.exp2(tl.abs(s) * -LOG2E))


# ---- backward


@triton.jit
def _factors(x, index, length):
    """(shift, factor) with upstream·softmax = factor·e^(S - shift), from an (N, 2) tensor.

    One load of both: a load shorter than the threads of a program is done by each of them in the
    layout of the scores, 64 loads and 67 more registers at 128 columns.
    """
    pair = tl.arange(0, 2)[None, :]
    at = x + index.to(tl.int64)[:, None] * 2 + pair
    return tl.split(tl.load(at, mask=(index < length)[:, None] & (pair >= 0), other=0.0))


@triton.jit
def _weights(s, special, row_ids, row_identity, col_identity, rows, cols, n, m, diagonal,
             u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
             MASKS: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
             SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """W = ∂L/∂S of a tile.

    All vectors are loaded before the tile is touched: they pass through shared memory, and behind
    such a barrier S and W would be alive, and spill, together.
    """
    row_u, row_shift, col_v, col_shift = 0.0, 0.0, 0.0, 0.0
    if SOFTPLUS:
        if u is not None:
            row_u = _vector(u, rows, n, 0.0)[:, None]
        if v is not None:
            col_v = _vector(v, cols, m, 0.0)[None, :]
        if special:
            positive, excluded = _classify(
                row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
            )
            s = tl.where(excluded, float("-inf"), tl.where(positive, -s, s))
        w = (row_u + col_v) / (1.0 + tl.exp2(s * -LOG2E))  # σ(-inf) = 1 / inf = 0
        if special:
            positive, excluded = _classify(
                row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
            )
            w = tl.where(positive, -w, w)
        return w
    else:
        if row_factors is not None:
            row_shift, row_u = _factors(row_factors, rows, n)
            row_shift, row_u = row_shift[:, None], row_u[:, None]
        if col_factors is not None:
            col_shift, col_v = _factors(col_factors, cols, m)
            col_shift, col_v = col_shift[None, :], col_v[None, :]
        w = tl.zeros_like(s)
        if POSITIVES == "lse":
            if special:
                positive, _ = _classify(
                    row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
                )
                if alpha is not None:
                    w += _lse_term(s, positive, row_shift, _vector(alpha, rows, n, 0.0)[:, None],
                                   _vector(row_pos, rows, n, 0.0)[:, None])  # fmt: skip
                if beta is not None:
                    w += _lse_term(s, positive, col_shift, _vector(beta, cols, m, 0.0)[None, :],
                                   _vector(col_pos, cols, m, 0.0)[None, :])  # fmt: skip
        if EXCLUDE_POSITIVES or SELF:
            if special:
                positive, excluded = _classify(
                    row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
                )
                if EXCLUDE_POSITIVES:
                    s = tl.where(positive | excluded, float("-inf"), s)
                else:
                    s = tl.where(excluded, float("-inf"), s)
        if row_factors is not None:
            w += _exp(s, row_shift, EXACT) * row_u
        if col_factors is not None:
            w += _exp(s, col_shift, EXACT) * col_v
        if POSITIVES == "linear":
            if special:
                positive, excluded = _classify(
                    row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
                )
                row_term, col_term = 0.0, 0.0
                if alpha is not None:
                    row_term = _vector(alpha, rows, n, 0.0)[:, None]
                if beta is not None:
                    if row_ids is None:  # one column for each row: a vector of rows takes less room
                        partner = rows + diagonal
                        inside = (partner >= 0) & (partner < m)
                        col_term = tl.load(beta + partner, mask=inside, other=0.0)[:, None]
                    else:
                        col_term = _vector(beta, cols, m, 0.0)[None, :]
                w += tl.where(positive, row_term + col_term, 0.0)
        return w


@triton.jit
def _lse_term(s, positive, shift, upstream, pos):
    """upstream·e^((S - shift) - pos) at positives, 0 elsewhere."""
    return tl.where(positive, upstream * tl.exp2(((s - shift) - pos) * LOG2E), 0.0)


@triton.jit(do_not_specialize=[*_SIZES, "panel_row", "panel_col", "panel_rows", "panel_cols"])
def weights_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids,
    u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
    norm, panel, scale_sums, row_sums, col_sums, softplus_sums,
    n, m, d, stride_a, stride_b, diagonal,
    panel_row, panel_col, panel_rows, panel_cols, stride_panel,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SOFTPLUS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A panel of scale·W, rounded to the panel's dtype, for the vendor's matrix products.

    The panel is rows [panel_row : panel_row + panel_rows], columns likewise; one program per tile.
    `norm` is a divisor that keeps fp16 in range. Of the unrounded W, where not None: `scale_sums`
    Σ_j W·<a, b> and `row_sums` Σ_j W as [column tile][row of the panel], `col_sums` Σ_i W as
    [row tile][column of the panel], and `softplus_sums`, the forward value, like `row_sums`.
    """
    # eight tiles high, so that programs that run together share columns in the L2 cache
    tiles_m, tiles_n = tl.cdiv(panel_rows, BLOCK_M), tl.cdiv(panel_cols, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    tile_m = band * 8 + (pid % (8 * tiles_n)) % height
    tile_n = (pid % (8 * tiles_n)) // height

    row0, col0 = panel_row + tile_m * BLOCK_M, panel_col + tile_n * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    # the panel's edges end the tile like the matrix's own
    last_row = tl.minimum(n, panel_row + panel_rows)
    last_col = tl.minimum(m, panel_col + panel_cols)
    acc = _inner_products(a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
                          BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED)  # fmt: skip
    row_added, row_identity = _side(row_bias, row_ids, rows, last_row, -1)
    col_added, col_identity = _side(col_bias, col_ids, cols, last_col, -2)
    if SCALE_PER_ROW:
        row_scale = _vector(scale, rows, n, 0.0)
    else:
        row_scale = tl.load(scale) + tl.zeros_like(row_added)
    s = _scores(acc, row_scale, row_added, col_added)

    MASKS: tl.constexpr = SELF or EXCLUDE_POSITIVES or SOFTPLUS or POSITIVES != "none"
    special = False
    if MASKS:
        special = _special(row_ids, row_identity, col_identity, row0, col0, diagonal,
                           SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
    if softplus_sums is not None:
        signed = s
        if special:
            positive, excluded = _classify(
                row_ids, row_identity, col_identity, rows, cols, last_row, last_col, diagonal, SELF
            )
            signed = tl.where(excluded, float("-inf"), tl.where(positive, -s, s))
        at = softplus_sums + tile_n.to(tl.int64) * panel_rows + (rows - panel_row)
        tl.store(at, tl.sum(_softplus(signed), 1), mask=rows < last_row)
    w = _weights(
        s, special, row_ids, row_identity, col_identity, rows, cols, last_row, last_col,
        diagonal, u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
        MASKS, SOFTPLUS, POSITIVES, SELF, EXCLUDE_POSITIVES, EXACT,
    )  # fmt: skip

    if scale_sums is not None:
        at = scale_sums + tile_n.to(tl.int64) * panel_rows + (rows - panel_row)
        tl.store(at, tl.sum(w * acc, 1), mask=rows < last_row)
    if row_sums is not None:
        at = row_sums + tile_n.to(tl.int64) * panel_rows + (rows - panel_row)
        tl.store(at, tl.sum(w, 1), mask=rows < last_row)
    if col_sums is not None:
        at = col_sums + tile_m.to(tl.int64) * panel_cols + (cols - panel_col)
        tl.store(at, tl.sum(w, 0), mask=cols < last_col)
    if panel is not None:
        factor = row_scale
        if norm is not None:
            factor = factor / tl.load(norm)
        at = panel + (rows - panel_row).to(tl.int64)[:, None] * stride_panel
        at += (cols - panel_col)[None, :]
        inside = (rows < last_row)[:, None] & (cols < last_col)[None, :]
        tl.store(at, (w * factor[:, None]).to(panel.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of(x, row0, length, d, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
             EVEN_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Features [row0 : row0 + ROWS] over all of D, 0 beyond it."""
    if TMA:
        return x.load([row0, 0])
    else:
        return _load(_pointers(x, row0, length, stride, ROWS, BLOCK_D), 0, d, BLOCK_D, EVEN_D)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids,
    u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
    norm, grad, scale_sums, row_sums,
    n, m, d, stride_a, stride_b, stride_grad, diagonal,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
    SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of `a`, scale·W·B, for small D: rows of it stay in registers, W is not written.

    Called with the sides exchanged it gives the gradient of the other one; `SCALE` says whose the
    scale is: "one" number, one per "row" or per "col". Also Σ_j W·<a, b> and Σ_j W, where not None.
    """
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_added, row_identity = _side(row_bias, row_ids, rows, n, -1)
    row_scale = tl.zeros_like(row_added) + 1.0
    if SCALE == "one":
        row_scale *= tl.load(scale)
    if SCALE == "row":
        row_scale = _vector(scale, rows, n, 0.0)
    inverse = 1.0
    if norm is not None:
        inverse = 1.0 / tl.load(norm)
    x = _rows_of(a, row0, n, d, stride_a, BLOCK_M, BLOCK_D, EVEN_D, TMA)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_total = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    MASKS: tl.constexpr = SELF or EXCLUDE_POSITIVES or SOFTPLUS or POSITIVES != "none"

    for col0 in tl.range(0, m, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        y = _rows_of(b, col0, m, d, stride_b, BLOCK_N, BLOCK_D, EVEN_D, TMA)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = _dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
        col_added, col_identity = _side(col_bias, col_ids, cols, m, -2)
        if SCALE == "col":
            acc *= _vector(scale, cols, m, 0.0)[None, :]
        s = _scores(acc, row_scale, row_added, col_added)
        special = False
        if MASKS:
            special = _special(row_ids, row_identity, col_identity, row0, col0, diagonal,
                               SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
        w = _weights(
            s, special, row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, u,
            row_factors, alpha, row_pos, v, col_factors, beta, col_pos, MASKS,
            SOFTPLUS, POSITIVES, SELF, EXCLUDE_POSITIVES, EXACT,
        )  # fmt: skip
        if scale_sums is not None:
            scale_total += tl.sum(w * acc, 1)
        if row_sums is not None:
            row_total += tl.sum(w, 1)
        if grad is not None:
            factor = row_scale * inverse
            w *= factor[:, None]
            if SCALE == "col":
                w *= _vector(scale, cols, m, 0.0)[None, :]
            total = _dot(w.to(y.dtype), y, total, PRECISION, INTERPRETED)

    inside = rows < n
    if scale_sums is not None:
        tl.store(scale_sums + rows, scale_total, mask=inside)
    if row_sums is not None:
        tl.store(row_sums + rows, row_total, mask=inside)
    if grad is not None:
        if norm is not None:
            total *= tl.load(norm)
        k = tl.arange(0, BLOCK_D)
        at = grad + rows.to(tl.int64)[:, None] * stride_grad + k[None, :]
        tl.store(at, total.to(grad.dtype.element_ty), mask=inside[:, None] & (k < d)[None, :])
