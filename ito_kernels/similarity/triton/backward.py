"""Triton kernels of the backward pass: panels of W = ∂L/∂S for the vendor's matrix products, and
the fused gradient for small D. Both can also compute the forward value of softplus.
"""

# ruff: noqa: SIM102

import triton
import triton.language as tl

from . import scores
from .scores import LOG2E


@triton.jit
def _factors(x, index, length):
    """(shift, factor) with upstream·softmax = factor·e^(S - shift), from an (N, 2) tensor.

    Both are loaded at once. A vector shorter than the number of threads would be loaded by every
    thread in the layout of the scores: 64 loads and 67 more registers at 128 columns.
    """
    pair = tl.arange(0, 2)[None, :]
    at = x + index.to(tl.int64)[:, None] * 2 + pair
    return tl.split(tl.load(at, mask=(index < length)[:, None] & (pair >= 0), other=0.0))


@triton.jit
def _sigmoid_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m, diagonal,
                     u, v, SELF: tl.constexpr):  # fmt: skip
    """W = ∂L/∂S of a tile for softplus. s: the result of `signed_scores`."""
    row_u, col_v = 0.0, 0.0
    if u is not None:
        row_u = scores.load_vector(u, rows, n, 0.0)[:, None]
    if v is not None:
        col_v = scores.load_vector(v, cols, m, 0.0)[None, :]
    w = (row_u + col_v) * scores.sigmoid(s)
    if special:
        positive, _ = scores.classify(
            row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
        )
        w = tl.where(positive, -w, w)
    return w


@triton.jit
def _softmax_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m, diagonal,
                     u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
                     POSITIVES: tl.constexpr, SELF: tl.constexpr,
                     EXCLUDE_POSITIVES: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """W = ∂L/∂S of a tile for logsumexp.

    All vectors are loaded first. They pass through shared memory; at the barrier of a later load
    both S and W would be alive and spill.
    """
    row_u, row_shift, col_v, col_shift = 0.0, 0.0, 0.0, 0.0
    if row_factors is not None:
        row_shift, row_u = _factors(row_factors, rows, n)
        row_shift, row_u = row_shift[:, None], row_u[:, None]
    if col_factors is not None:
        col_shift, col_v = _factors(col_factors, cols, m)
        col_shift, col_v = col_shift[None, :], col_v[None, :]
    w = tl.zeros_like(s)
    if POSITIVES == "lse":
        if special:
            positive, _ = scores.classify(
                row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
            )
            if alpha is not None:
                w += _lse_term(s, positive, row_shift,
                               scores.load_vector(alpha, rows, n, 0.0)[:, None],
                               scores.load_vector(row_pos, rows, n, 0.0)[:, None])  # fmt: skip
            if beta is not None:
                w += _lse_term(s, positive, col_shift,
                               scores.load_vector(beta, cols, m, 0.0)[None, :],
                               scores.load_vector(col_pos, cols, m, 0.0)[None, :])  # fmt: skip
    if EXCLUDE_POSITIVES or SELF:
        if special:
            positive, excluded = scores.classify(
                row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
            )
            if EXCLUDE_POSITIVES:
                s = tl.where(positive | excluded, float("-inf"), s)
            else:
                s = tl.where(excluded, float("-inf"), s)
    if row_factors is not None:
        w += scores.exp(s, row_shift, EXACT) * row_u
    if col_factors is not None:
        w += scores.exp(s, col_shift, EXACT) * col_v
    if POSITIVES == "linear":
        if special:
            positive, _ = scores.classify(
                row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
            )
            row_term, col_term = 0.0, 0.0
            if alpha is not None:
                row_term = scores.load_vector(alpha, rows, n, 0.0)[:, None]
            if beta is not None:
                if row_ids is None:  # one positive per row: a row vector takes fewer registers
                    partner = rows + diagonal
                    inside = (partner >= 0) & (partner < m)
                    col_term = tl.load(beta + partner, mask=inside, other=0.0)[:, None]
                else:
                    col_term = scores.load_vector(beta, cols, m, 0.0)[None, :]
            w += tl.where(positive, row_term + col_term, 0.0)
    return w


@triton.jit
def _lse_term(s, positive, shift, upstream, pos):
    """upstream·e^((S - shift) - pos) at positives, 0 elsewhere."""
    return tl.where(positive, upstream * tl.exp2(((s - shift) - pos) * LOG2E), 0.0)


@triton.jit
def _add_sums(sums, group, length, index, values):
    """Store the sums of a tile in the slot of its group of the other side."""
    tl.store(sums + group.to(tl.int64) * length + index, values, mask=index < length)


@triton.jit
def _write_weights(
    acc, tile_m, tile_n, scale, row_bias, col_bias, row_ids, col_ids, row_limit,
    u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
    norm, panel, scale_sums, row_sums, col_sums, softplus_sums,
    n, m, diagonal, panel_row, panel_col, stride_panel, SCALE_PER_ROW: tl.constexpr,
    SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr, SELF: tl.constexpr,
    EXCLUDE_POSITIVES: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store one tile of the panel and its sums, from the tile's inner products `acc`."""
    if PARTS > 1:
        left, right = scores.split_columns(acc)
        rest = (
            scale, row_bias, col_bias, row_ids, col_ids, row_limit,
            u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
            norm, panel, scale_sums, row_sums, col_sums, softplus_sums,
            n, m, diagonal, panel_row, panel_col, stride_panel,
        )  # fmt: skip
        _write_weights(left, tile_m, 2 * tile_n, *rest, SCALE_PER_ROW, SOFTPLUS, POSITIVES, SELF,
                       EXCLUDE_POSITIVES, EXACT, BLOCK_M, BLOCK_N // 2, PARTS // 2)  # fmt: skip
        _write_weights(right, tile_m, 2 * tile_n + 1, *rest, SCALE_PER_ROW, SOFTPLUS, POSITIVES,
                       SELF, EXCLUDE_POSITIVES, EXACT, BLOCK_M, BLOCK_N // 2,
                       PARTS // 2)  # fmt: skip
        return
    tile_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    panel_rows, panel_cols = n - panel_row, m - panel_col
    rows, cols = panel_row + tile_rows, panel_col + tile_cols
    row0, col0 = panel_row + tile_m * BLOCK_M, panel_col + tile_n * BLOCK_N
    row_scale, row_offset, row_label = scores.load_row_side(
        scale, row_bias, row_ids, rows, n, SCALE_PER_ROW
    )
    col_offset, col_label = scores.load_side(col_bias, col_ids, cols, m, -2)
    s = scores.scale_and_offset(acc, row_scale, row_offset, col_offset)

    special = False
    if SELF or EXCLUDE_POSITIVES or SOFTPLUS or POSITIVES != "none" or row_limit is not None:
        special = scores.is_special(row_ids, row_label, col_label, row0, col0, diagonal,
                                    SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
    if row_limit is not None:
        limit = scores.load_vector(row_limit, rows, n, 0.0)[:, None]
        s = scores.apply_limit(s, acc, limit, special, row_ids, row_label, col_label, rows, cols,
                           n, m, diagonal, SELF)  # fmt: skip
    if SOFTPLUS:
        s = scores.signed_scores(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                          diagonal, SELF)  # fmt: skip
        if softplus_sums is not None:
            _add_sums(softplus_sums, tile_n, panel_rows, tile_rows, tl.sum(scores.softplus(s), 1))
        w = _sigmoid_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                             diagonal, u, v, SELF)  # fmt: skip
    else:
        w = _softmax_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                             diagonal, u, row_factors, alpha, row_pos, v, col_factors, beta,
                             col_pos, POSITIVES, SELF, EXCLUDE_POSITIVES, EXACT)  # fmt: skip

    if scale_sums is not None:
        _add_sums(scale_sums, tile_n, panel_rows, tile_rows, tl.sum(w * acc, 1))
    if row_sums is not None:
        _add_sums(row_sums, tile_n, panel_rows, tile_rows, tl.sum(w, 1))
    if col_sums is not None:
        _add_sums(col_sums, tile_m, panel_cols, tile_cols, tl.sum(w, 0))
    if panel is not None:
        factor = row_scale
        if norm is not None:
            factor = factor / tl.load(norm)
        at = panel + tile_rows.to(tl.int64)[:, None] * stride_panel + tile_cols[None, :]
        tl.store(at, (w * factor[:, None]).to(panel.dtype.element_ty))


@triton.jit(do_not_specialize=[*scores.SIZES, "panel_row", "panel_col"])
def weights_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit,
    u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
    norm, panel, scale_sums, row_sums, col_sums, softplus_sums,
    n, m, d, stride_a, stride_b, diagonal, panel_row, panel_col, stride_panel,
    EVEN_D: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SOFTPLUS: tl.constexpr,
    POSITIVES: tl.constexpr, SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write a panel of scale·W, rounded to the panel's dtype, for the vendor's matrix products.

    The panel has the rows [panel_row : n] and the columns [panel_col : m]. With P programs, each
    computes every P-th tile. The memory of the panel covers whole tiles, so that stores need no
    mask: they are then 16 bytes wide instead of 2.

    norm: a divisor of W that keeps fp16 in range.
    scale_sums, row_sums, col_sums, softplus_sums: sums of the unrounded W, or None. Σ_j W·<a, b>
        and Σ_j W as [part of a column tile][row of the panel], Σ_i W as [row tile][column of the
        panel], and the forward value of softplus in the shape of row_sums.
    PARTS: the number of parts in which the columns of a tile are processed.
    """
    rest = (
        scale, row_bias, col_bias, row_ids, col_ids, row_limit,
        u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
        norm, panel, scale_sums, row_sums, col_sums, softplus_sums,
        n, m, diagonal, panel_row, panel_col, stride_panel,
    )  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(n - panel_row, BLOCK_M), tl.cdiv(m - panel_col, BLOCK_N)
    first, programs = tl.program_id(0), tl.num_programs(0)
    k_steps = scores.steps(d, BLOCK_K, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tile, tile_m, tile_n, k = first - programs, 0, 0, k_steps  # those of the previous step
    for _ in tl.range(0, tl.cdiv(tiles_m * tiles_n - first, programs) * k_steps):
        if k == k_steps:
            k = 0
            tile += programs
            # bands of eight tiles: programs that run at the same time share columns in the L2 cache
            band = tile // (8 * tiles_n)
            height = tl.minimum(tiles_m - band * 8, 8)
            tile_m = band * 8 + (tile % (8 * tiles_n)) % height
            tile_n = (tile % (8 * tiles_n)) // height
        row0, col0 = panel_row + tile_m * BLOCK_M, panel_col + tile_n * BLOCK_N
        acc = scores.multiply(
            acc, k, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D,
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, INTERPRETED,
        )  # fmt: skip
        k += 1
        if k == k_steps:
            _write_weights(acc, tile_m, tile_n, *rest, SCALE_PER_ROW, SOFTPLUS, POSITIVES, SELF,
                           EXCLUDE_POSITIVES, EXACT, BLOCK_M, BLOCK_N, PARTS)  # fmt: skip
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit(do_not_specialize=scores.SIZES)
def gradient_kernel(
    a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit,
    u, row_factors, alpha, row_pos, v, col_factors, beta, col_pos,
    norm, grad, scale_sums, row_sums, softplus_sums,
    n, m, d, stride_a, stride_b, stride_grad, diagonal,
    EVEN_D: tl.constexpr, SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, POSITIVES: tl.constexpr,
    SELF: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of `a`, scale·W·B, for small D. Its rows stay in registers; W is not stored.

    With the sides exchanged it computes the gradient of b, and the limit is `col_limit`.

    SCALE: the scale is "one" number, or one per "row" or per "col".
    scale_sums, row_sums, softplus_sums: if not None, Σ_j W·<a, b>, Σ_j W and the forward value of
        softplus for each row.
    """
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_offset, row_label = scores.load_side(row_bias, row_ids, rows, n, -1)
    row_scale = tl.zeros_like(row_offset) + 1.0
    if SCALE == "one":
        row_scale *= tl.load(scale)
    if SCALE == "row":
        row_scale = scores.load_vector(scale, rows, n, 0.0)
    inverse = 1.0
    if norm is not None:
        inverse = 1.0 / tl.load(norm)
    x = scores.features(a, row0, n, d, stride_a, BLOCK_M, BLOCK_D, EVEN_D, TMA)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_total = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    softplus_total = tl.zeros([BLOCK_M], tl.float32)

    for col0 in tl.range(0, m, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        y = scores.features(b, col0, m, d, stride_b, BLOCK_N, BLOCK_D, EVEN_D, TMA)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = scores.dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
        products = acc
        col_offset, col_label = scores.load_side(col_bias, col_ids, cols, m, -2)
        if SCALE == "col":
            acc *= scores.load_vector(scale, cols, m, 0.0)[None, :]
        s = scores.scale_and_offset(acc, row_scale, row_offset, col_offset)
        special = False
        LIMITED: tl.constexpr = row_limit is not None or col_limit is not None
        if SELF or EXCLUDE_POSITIVES or SOFTPLUS or POSITIVES != "none" or LIMITED:
            special = scores.is_special(row_ids, row_label, col_label, row0, col0, diagonal,
                                        SELF, True, BLOCK_M, BLOCK_N)  # fmt: skip
        if LIMITED:
            if row_limit is not None:
                limit = scores.load_vector(row_limit, rows, n, 0.0)[:, None]
            else:
                limit = scores.load_vector(col_limit, cols, m, 0.0)[None, :]
            s = scores.apply_limit(s, products, limit, special, row_ids, row_label, col_label,
                               rows, cols, n, m, diagonal, SELF)  # fmt: skip
        if SOFTPLUS:
            s = scores.signed_scores(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                              diagonal, SELF)  # fmt: skip
            if softplus_sums is not None:
                softplus_total += tl.sum(scores.softplus(s), 1)
            w = _sigmoid_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                                 diagonal, u, v, SELF)  # fmt: skip
        else:
            w = _softmax_weights(s, special, row_ids, row_label, col_label, rows, cols, n, m,
                                 diagonal, u, row_factors, alpha, row_pos, v, col_factors, beta,
                                 col_pos, POSITIVES, SELF, EXCLUDE_POSITIVES, EXACT)  # fmt: skip
        if scale_sums is not None:
            scale_total += tl.sum(w * acc, 1)
        if row_sums is not None:
            row_total += tl.sum(w, 1)
        if grad is not None:
            factor = row_scale * inverse
            w *= factor[:, None]
            if SCALE == "col":
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
        if norm is not None:
            total *= tl.load(norm)
        k = tl.arange(0, BLOCK_D)
        at = grad + rows.to(tl.int64)[:, None] * stride_grad + k[None, :]
        tl.store(at, total.to(grad.dtype.element_ty), mask=inside[:, None] & (k < d)[None, :])
