"""Triton kernels of the backward pass: panels of W = ∂L/∂S for the vendor's matrix products, and
the fused gradient for small D. Both can also compute the forward value of softplus.

With the shift T of `gpu.fixed_shift` and E = 2^(S·log2 e - T), W is E·(u_i + v_j) except at
positives. If any row or column has underflowed, all of W is computed with two exponentials per
score. Both kinds of a kernel are launched. `underflowed`, on the device, tells each of them whether
to return at once.
"""

import triton
import triton.language as tl

from . import scores
from .scores import LOG2E


@triton.jit
def _pair(x, first, SIZE: tl.constexpr):
    """Both columns of the rows [first : first + SIZE] of `gpu.padded_pairs`, 0 without a tensor.

    Both are loaded at once and without a mask. A vector shorter than the number of threads is
    loaded by every thread in the layout of the scores: with masks and 64-bit indices 64 loads, 67
    more registers and 200 more instructions at 128 columns.
    """
    if x is None:
        zero = tl.zeros([SIZE], tl.float32)
        return zero, zero
    else:
        base = x + 2 * tl.cast(first, tl.int64)
        return tl.split(
            tl.load(base + (2 * tl.arange(0, SIZE)[:, None] + tl.arange(0, 2)[None, :]))
        )


@triton.jit
def _leaves(underflowed, FIXED: tl.constexpr):
    """Whether the other kind of this kernel computes the gradient. Softplus has one kind."""
    if underflowed is None:
        return False
    else:
        return (tl.load(underflowed) != 0) == FIXED


@triton.jit
def _sigmoid_weights(acc, x, row_weights, col_weights, row_ids, col_ids, row0, col0, n, m,
                     diagonal, SELF: tl.constexpr):  # fmt: skip
    """W of a tile for softplus. x: the result of `signed_exponents`."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    u, _zero = _pair(row_weights, row0, BLOCK_M)
    w = scores.sigmoid(x) * u[:, None]
    if col_weights is not None:
        v, _zero = _pair(col_weights, col0, BLOCK_N)
        w = scores.sigmoid(x) * (u[:, None] + v[None, :])
    row_label, col_label = scores.labels(row_ids, col_ids, row0, col0, BLOCK_M, BLOCK_N)
    if scores.is_special(row_ids, row_label, col_label, row0, col0, n, m, diagonal, SELF, True,
                         BLOCK_M, BLOCK_N):  # fmt: skip
        positive, _kept = scores.classify(
            row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
        )
        w = tl.where(positive, -w, w)
    return w


@triton.jit
def _softmax_weights(acc, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift,
                     row_weights, col_weights, row_shifts, col_shifts, row0, col0, n, m, diagonal,
                     SCALE: tl.constexpr, POSITIVES: tl.constexpr, SELF: tl.constexpr,
                     EXCLUDE_POSITIVES: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """W of a tile for logsumexp, from its inner products."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    # All vectors are loaded first. They pass through shared memory; at the barrier of a later load
    # both the inner products and W would be alive and spill.
    u, alpha = _pair(row_weights, row0, BLOCK_M)
    v, beta = _pair(col_weights, col0, BLOCK_N)
    row_label, col_label = scores.labels(row_ids, col_ids, row0, col0, BLOCK_M, BLOCK_N)
    UNIT: tl.constexpr = LOG2E if FIXED else 1.0
    x = scores.exponents(acc, scale, row_bias, col_bias, shift, rows, cols, n, m, SCALE, UNIT)
    if FIXED:
        all_pairs = tl.exp2(x) * (u[:, None] + v[None, :])
    else:
        row_max, row_pos = _pair(row_shifts, row0, BLOCK_M)
        col_max, col_pos = _pair(col_shifts, col0, BLOCK_N)
        all_pairs = tl.zeros_like(x)
        if row_shifts is not None:
            all_pairs += tl.exp2((x - row_max[:, None]) * LOG2E) * u[:, None]
        if col_shifts is not None:
            all_pairs += tl.exp2((x - col_max[None, :]) * LOG2E) * v[None, :]
    w = all_pairs
    LIMITED: tl.constexpr = row_limit is not None or col_limit is not None
    if LIMITED:
        w = tl.where(scores.above_limit(acc, row_limit, col_limit, rows, cols, n, m), 0.0, w)
    if scores.is_special(row_ids, row_label, col_label, row0, col0, n, m, diagonal, SELF,
                         EXCLUDE_POSITIVES or LIMITED or POSITIVES != "none", BLOCK_M,
                         BLOCK_N):  # fmt: skip
        positive, kept = scores.classify(
            row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
        )
        w = tl.where(kept, w, 0.0)
        if EXCLUDE_POSITIVES:
            w = tl.where(positive, 0.0, w)
        else:
            if LIMITED:
                w = tl.where(positive, all_pairs, w)
        if POSITIVES != "none":
            of_positives = alpha[:, None] + beta[None, :]
            if POSITIVES == "lse":
                x = scores.exponents(
                    acc, scale, row_bias, col_bias, shift, rows, cols, n, m, SCALE, UNIT
                )
                if FIXED:
                    of_positives *= tl.exp2(x)
                else:
                    of_positives = tl.zeros_like(x)
                    if row_shifts is not None:
                        row_x = (x - row_max[:, None]) - row_pos[:, None]
                        of_positives += tl.exp2(row_x * LOG2E) * alpha[:, None]
                    if col_shifts is not None:
                        col_x = (x - col_max[None, :]) - col_pos[None, :]
                        of_positives += tl.exp2(col_x * LOG2E) * beta[None, :]
            w += tl.where(positive, of_positives, 0.0)
    return w


@triton.jit
def _weights(acc, row0, col0, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit,
             shift, row_weights, col_weights, row_shifts, col_shifts, n, m, diagonal,
             SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
             SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
             FIXED: tl.constexpr):  # fmt: skip
    """W of a tile, and the arguments of softplus, from its inner products."""
    if SOFTPLUS:
        x = scores.signed_exponents(
            acc, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, row0, col0, n,
            m, diagonal, SCALE, SELF,
        )  # fmt: skip
        w = _sigmoid_weights(acc, x, row_weights, col_weights, row_ids, col_ids, row0, col0, n, m,
                             diagonal, SELF)  # fmt: skip
        return w, x
    else:
        w = _softmax_weights(
            acc, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift,
            row_weights, col_weights, row_shifts, col_shifts, row0, col0, n, m, diagonal, SCALE,
            POSITIVES, SELF, EXCLUDE_POSITIVES, FIXED,
        )  # fmt: skip
        return w, acc


@triton.jit
def _store_sums(sums, group, length, index, values):
    """Store the sums of a tile in the slot of its group of the other side."""
    tl.store(sums + group.to(tl.int64) * length + index, values, mask=index < length)


@triton.jit
def _write_weights(
    acc, tile_m, tile_n, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift,
    row_weights, col_weights, row_shifts, col_shifts, n, m, diagonal,
    panel_factor, panel, scale_sums, row_sums, col_sums, softplus_sums, panel_row, panel_col,
    stride_panel, SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
    SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, FIXED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store one tile of the panel and its sums, from the tile's inner products `acc`."""
    score = (
        scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift, row_weights,
        col_weights, row_shifts, col_shifts, n, m, diagonal,
    )  # fmt: skip
    if PARTS > 1:
        out = (
            panel_factor, panel, scale_sums, row_sums, col_sums, softplus_sums, panel_row,
            panel_col, stride_panel,
        )  # fmt: skip
        left, right = scores.split_columns(acc)
        _write_weights(left, tile_m, 2 * tile_n, *score, *out, SCALE, SOFTPLUS, POSITIVES, SELF,
                       EXCLUDE_POSITIVES, FIXED, BLOCK_M, BLOCK_N // 2, PARTS // 2)  # fmt: skip
        _write_weights(right, tile_m, 2 * tile_n + 1, *score, *out, SCALE, SOFTPLUS,
                       POSITIVES, SELF, EXCLUDE_POSITIVES, FIXED, BLOCK_M, BLOCK_N // 2,
                       PARTS // 2)  # fmt: skip
    else:  # needed: Triton compiles the code behind a `return` too
        tile_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        tile_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # panels begin at multiples of 128: the compiler loads ids in pairs
        row0 = tl.multiple_of(panel_row + tile_m * BLOCK_M, 16)
        col0 = tl.multiple_of(panel_col + tile_n * BLOCK_N, 16)
        w, x = _weights(acc, row0, col0, *score, SCALE, SOFTPLUS, POSITIVES, SELF,
                        EXCLUDE_POSITIVES, FIXED)  # fmt: skip
        if softplus_sums is not None:
            _store_sums(softplus_sums, tile_n, n - panel_row, tile_rows,
                        tl.sum(scores.softplus(x), 1))  # fmt: skip
        if scale_sums is not None:
            _store_sums(scale_sums, tile_n, n - panel_row, tile_rows, tl.sum(w * acc, 1))
        if row_sums is not None:
            _store_sums(row_sums, tile_n, n - panel_row, tile_rows, tl.sum(w, 1))
        if col_sums is not None:
            _store_sums(col_sums, tile_m, m - panel_col, tile_cols, tl.sum(w, 0))
        if panel is not None:
            if SCALE == "row":
                w *= scores.load_vector(scale, panel_row + tile_rows, n, 0.0)[:, None]
            if panel_factor is not None:
                w *= tl.load(panel_factor)
            first = tl.cast(tile_m * BLOCK_M, tl.int64) * stride_panel + tile_n * BLOCK_N
            at = tl.arange(0, BLOCK_M)[:, None] * stride_panel + tl.arange(0, BLOCK_N)[None, :]
            tl.store(panel + first + at, w.to(panel.dtype.element_ty))


@triton.jit
def _quotient(x, reciprocal):
    """⌊x / y⌋ of integers 0 ≤ x < 2^22, from 1 / y."""
    return ((x.to(tl.float32) + 0.5) * reciprocal).to(tl.int32)


@triton.jit(do_not_specialize=[*scores.SIZES, "panel_row", "panel_col"])
def weights_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift, underflowed,
    row_weights, col_weights, row_shifts, col_shifts,
    panel_factor, panel, scale_sums, row_sums, col_sums, softplus_sums,
    n, m, d, stride_a, stride_b, diagonal, panel_row, panel_col, stride_panel,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
    SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, FIXED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write a panel of W, rounded to the panel's dtype, for the vendor's matrix products. With a
    scale per row it is scale·W. With a `panel_factor`, one number, W is multiplied by it.

    The panel has the rows [panel_row : n] and the columns [panel_col : m]. With P programs, each
    computes every P-th tile. The memory of the panel covers whole tiles, so that stores need no
    mask: they are then 16 bytes wide instead of 2.

    FIXED: whether the weights of rows and columns are `gpu.SideWeights.fixed`; else they are
        `exact` and need the shifts.
    scale_sums, row_sums, col_sums, softplus_sums: sums of the unrounded W, or None. Σ_j W·<a, b>
        and Σ_j W as [part of a column tile][row of the panel], Σ_i W as [row tile][column of the
        panel], and the forward value of softplus in the shape of row_sums.
    PARTS: the number of parts in which the columns of a tile are processed.
    """
    if _leaves(underflowed, FIXED):
        return
    T = 0.0
    if shift is not None:
        T = tl.load(shift)
    factor = scores.load_one(scale, SCALE, LOG2E if FIXED else 1.0)
    rest = (
        factor, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, T,
        row_weights, col_weights, row_shifts, col_shifts, n, m, diagonal,
        panel_factor, panel, scale_sums, row_sums, col_sums, softplus_sums, panel_row, panel_col,
        stride_panel,
    )  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(n - panel_row, BLOCK_M), tl.cdiv(m - panel_col, BLOCK_N)
    # Bands of eight tiles: programs that run at the same time share columns in the L2 cache. A
    # division of integers takes 29 instructions. Multiplying by the reciprocal is exact below 2^22
    # tiles; a panel has at most 2^15.
    last, last_height = (tiles_m - 1) // 8, (tiles_m - 1) % 8 + 1
    of_band, of_last = 1 / (8 * tiles_n).to(tl.float32), 1 / last_height.to(tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tile, tile_m, tile_n, k = first - programs, 0, 0, k_steps  # those of the previous step
    for _ in tl.range(0, tl.cdiv(tiles_m * tiles_n - first, programs) * k_steps):
        if k == k_steps:
            k = 0
            tile += programs
            band = _quotient(tile, of_band)
            inside = tile - band * 8 * tiles_n
            if band == last:
                tile_n = _quotient(inside, of_last)
                tile_m = band * 8 + inside - tile_n * last_height
            else:
                tile_n = inside // 8
                tile_m = band * 8 + inside % 8
        row0, col0 = panel_row + tile_m * BLOCK_M, panel_col + tile_n * BLOCK_N
        acc = scores.multiply(
            acc, k, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
        )  # fmt: skip
        k += 1
        if k == k_steps:
            _write_weights(acc, tile_m, tile_n, *rest, SCALE, SOFTPLUS, POSITIVES, SELF,
                           EXCLUDE_POSITIVES, FIXED, BLOCK_M, BLOCK_N, PARTS)  # fmt: skip
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit(do_not_specialize=["m", "n", "diagonal", "panel_row", "panel_col"])
def reweight_kernel(
    cache, pair_weights, underflowed, row_weights, col_weights, panel, n, m, stride_cache,
    stride_panel, diagonal, panel_row, panel_col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The panel of `weights_kernel` from kept exponentials, without a matrix product.

    pair_weights: W at the column i + diagonal of row i, in fp32: the difference of nearly equal
    terms, which E in bf16 would not give.
    """
    if _leaves(underflowed, True):
        return
    tiles_n = tl.cdiv(m - panel_col, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    row0, col0 = panel_row + tile_m * BLOCK_M, panel_col + tile_n * BLOCK_N
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = tl.cast(row0, tl.int64) * stride_cache + col0
    e = tl.load(cache + first + (i[:, None] * stride_cache + j[None, :])).to(tl.float32)
    u, _alpha = _pair(row_weights, row0, BLOCK_M)
    v, _beta = _pair(col_weights, col0, BLOCK_N)
    w = e * (u[:, None] + v[None, :])
    first = row0 + diagonal
    if (col0 < first + BLOCK_M) & (first < col0 + BLOCK_N):
        here = (row0 + i < n)[:, None] & (col0 + j[None, :] == first + i[:, None])
        w = tl.where(here, tl.load(pair_weights + row0 + i)[:, None], w)
    first = tl.cast(tile_m * BLOCK_M, tl.int64) * stride_panel + tile_n * BLOCK_N
    at = i[:, None] * stride_panel + j[None, :]
    tl.store(panel + first + at, w.to(panel.dtype.element_ty))


@triton.jit(do_not_specialize=scores.SIZES)
def gradient_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, shift, underflowed,
    row_weights, col_weights, row_shifts, col_shifts,
    factor, grad, scale_sums, row_sums, softplus_sums,
    n, m, d, stride_a, stride_b, stride_grad, diagonal,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
    SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, FIXED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of `a`, scale·W·B, for small D. Its rows stay in registers; W is not stored.
    With the sides exchanged it computes the gradient of b.

    factor: the factor of W·B, without a scale per row or column.
    scale_sums, row_sums, softplus_sums: if not None, Σ_j W·<a, b>, Σ_j W and the forward value of
        softplus for each row.
    """
    if _leaves(underflowed, FIXED):
        return
    T = 0.0
    if shift is not None:
        T = tl.load(shift)
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    score_scale = scores.load_one(scale, SCALE, LOG2E if FIXED else 1.0)
    x = scores.features(a, row0, n, d, stride_a, BLOCK_M, BLOCK_D, EVEN_D, TMA)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_total = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    softplus_total = tl.zeros([BLOCK_M], tl.float32)
    for col0 in tl.range(0, m, BLOCK_N):
        y = scores.features(b, col0, m, d, stride_b, BLOCK_N, BLOCK_D, EVEN_D, TMA)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = scores.dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
        w, s = _weights(
            acc, row0, col0, score_scale, row_bias, col_bias, row_ids, col_ids, row_limit,
            col_limit, T, row_weights, col_weights, row_shifts, col_shifts, n, m, diagonal, SCALE,
            SOFTPLUS, POSITIVES, SELF, EXCLUDE_POSITIVES, FIXED,
        )  # fmt: skip
        if softplus_sums is not None:
            softplus_total += tl.sum(scores.softplus(s), 1)
        if scale_sums is not None:
            scale_total += tl.sum(w * acc, 1)
        if row_sums is not None:
            row_total += tl.sum(w, 1)
        if grad is not None:
            if SCALE == "col":
                cols = col0 + tl.arange(0, BLOCK_N)
                w *= scores.load_vector(scale, cols, m, 0.0)[None, :]
            total = scores.dot(w.to(y.dtype), y, total, PRECISION, INTERPRETED)

    inside = rows < n
    if scale_sums is not None:
        tl.store(scale_sums + rows, scale_total, mask=inside)
    if row_sums is not None:
        tl.store(row_sums + rows, row_total, mask=inside)
    if softplus_sums is not None:
        tl.store(softplus_sums + rows, softplus_total, mask=inside)
    if grad is not None:
        total *= tl.load(factor)
        if SCALE == "row":
            total *= scores.load_vector(scale, rows, n, 0.0)[:, None]
        k = tl.arange(0, BLOCK_D)
        at = grad + rows.to(tl.int64)[:, None] * stride_grad + k[None, :]
        tl.store(at, total.to(grad.dtype.element_ty), mask=inside[:, None] & (k < d)[None, :])
