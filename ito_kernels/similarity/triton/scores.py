"""A tile of S = scale·a·bᵀ + biases inside a Triton kernel, and the kinds of its pairs.

Scores are accumulated in fp32 and never stored. Padding and rows beyond the end carry a bias of
-inf, so the common tile needs no masks: exp(-inf) and σ(-inf) are 0. Tiles that hold positives or
self pairs are found by their position or by comparing ids, and take a branch of their own.

`n`, `m` and `d` are run-time numbers, never specialised: one compilation serves every batch size.
An absent pointer is None, which Triton treats as a constant.
"""

# No `from __future__ import annotations`: Triton reads the `tl.constexpr` annotations. Nested `if`s
# stay nested in the kernels: Triton decides one on constants at compile time, a conjunction at run
# time.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Integers that change from call to call: specialising on 1 or on multiples of 16 would recompile.
SIZES = ["n", "m", "d", "diagonal"]


@triton.jit
def exp(x, shift, EXACT: tl.constexpr):
    """e^(x - shift). EXACT rounds x - shift first, so that e^0 is 1; else one FMA, whose error of
    |x|·2^-24 is far below that of a bf16 or fp16 score."""
    if EXACT:
        return tl.exp2((x - shift) * LOG2E)
    else:
        return tl.exp2(x * LOG2E - shift * LOG2E)


@triton.jit
def finite(x):
    """x with 0 for -inf: nothing allowed, and -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def softplus(s):
    return tl.maximum(s, 0.0) + _log1p_unit(tl.exp2(tl.abs(s) * -LOG2E))


@triton.jit
def sigmoid(s):
    """σ(s), by the exponential that softplus takes: where both are computed, it is computed once"""
    t = tl.exp2(tl.abs(s) * -LOG2E)
    return tl.where(s >= 0, 1.0, t) / (1.0 + t)


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


# ---- features


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
def features(x, row0, length, d, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
             EVEN_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Features [row0 : row0 + ROWS] over all of D, 0 beyond it."""
    if TMA:
        return x.load([row0, 0])
    else:
        return _load(_pointers(x, row0, length, stride, ROWS, BLOCK_D), 0, d, BLOCK_D, EVEN_D)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # it multiplies the raw bits of bf16; products of fp16, bf16 are exact in fp32
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def steps(d, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Calls of `multiply` that make up a tile's inner products."""
    if TMA:
        return tl.cdiv(d, BLOCK_K)
    else:
        return 1


@triton.jit
def multiply(acc, step, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             TMA: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """A tile's inner products: with descriptors a step of BLOCK_K of them, so that one loop goes
    over tiles and steps and loads for the next tile run while this one is reduced; with pointers,
    which would have to be set up again in every step, all of D."""
    if TMA:
        k = step * BLOCK_K
        acc = dot(a.load([row0, k]), tl.trans(b.load([col0, k])), acc, PRECISION, INTERPRETED)
    else:
        x_at = _pointers(a, row0, n, stride_a, BLOCK_M, BLOCK_K)
        y_at = _pointers(b, col0, m, stride_b, BLOCK_N, BLOCK_K)
        for k in tl.range(0, d, BLOCK_K):
            x, y = _load(x_at, k, d, BLOCK_K, EVEN_D), _load(y_at, k, d, BLOCK_K, EVEN_D)
            acc = dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
            x_at += BLOCK_K
            y_at += BLOCK_K
    return acc


@triton.jit
def halves(tile):
    """A tile's left and right columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), [0, 2, 1]))


# ---- scores


@triton.jit
def vector(pointer, index, length, other):
    """A vector's entries at `index`, `other` beyond the end."""
    return tl.load(pointer + index, mask=index < length, other=other)


@triton.jit
def side(bias, ids, index, length, PADDING: tl.constexpr):
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
def row_side(scale, bias, ids, rows, n, SCALE_PER_ROW: tl.constexpr):
    """The rows' scale, and their `side`."""
    added, identity = side(bias, ids, rows, n, -1)
    if SCALE_PER_ROW:
        row_scale = vector(scale, rows, n, 0.0)
    else:
        row_scale = tl.load(scale) + tl.zeros_like(added)
    return row_scale, added, identity


@triton.jit
def affine(acc, scale, row_added, col_added):
    """S from the inner products."""
    return acc * scale[:, None] + col_added[None, :] + row_added[:, None]


# ---- kinds of pairs


@triton.jit
def is_special(row_ids, row_identity, col_identity, row0, col0, diagonal,
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
def classify(row_ids, row_identity, col_identity, rows, cols, n, m, diagonal,
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
def limited(s, products, limit, special, row_ids, row_identity, col_identity, rows, cols, n, m,
            diagonal, SELF: tl.constexpr):  # fmt: skip
    """S, -inf at pairs that are not positive and have an inner product above `limit`, which
    broadcasts against the tile."""
    beyond = products > limit
    if special:
        positive, _ = classify(
            row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
        )
        beyond = beyond & (positive == 0)
    return tl.where(beyond, float("-inf"), s)


@triton.jit
def signed(s, special, row_ids, row_identity, col_identity, rows, cols, n, m, diagonal,
           SELF: tl.constexpr):  # fmt: skip
    """What softplus is taken of: S, -S at positives, -inf at what is excluded."""
    if special:
        positive, excluded = classify(
            row_ids, row_identity, col_identity, rows, cols, n, m, diagonal, SELF
        )
        s = tl.where(excluded, float("-inf"), tl.where(positive, -s, s))
    return s
