"""A tile of S = scale·a·bᵀ + biases inside a Triton kernel, and the masks of its pairs.

Scores are accumulated in fp32 and never stored. Most tiles need no masks. Those that contain
positives, self pairs or padding, or extend beyond the end, are "special": they are recognised by
position or by comparing ids, and take a separate branch.

`n`, `m` and `d` are run-time values and never specialised, so that one compilation serves every
batch size. A missing pointer is None, which Triton treats as a constant.
"""

# No `from __future__ import annotations`: Triton reads the `tl.constexpr` annotations. Nested `if`s
# in the kernels stay nested: Triton evaluates an `if` on constants at compile time, but a
# conjunction of them at run time.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Integers that differ between calls. Specialising on 1 or on multiples of 16 would recompile.
SIZES = ["n", "m", "d", "diagonal"]


@triton.jit
def softplus(x):
    """softplus of x·log 2."""
    return tl.maximum(x, 0.0) * LN2 + _log1p_unit(tl.exp2(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """σ(x·log 2) from the same exponential as softplus, so that both together compute it once."""
    t = tl.exp2(-tl.abs(x))
    return tl.where(x >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def _log1p_unit(t):
    """log(1 + t) for t in [0, 1], with a relative error of 3e-8.

    log2(1 + t) would lose the digits of small t, and so the sum of many small terms.
    """
    p = 0.005232688 * t - 0.029505214
    p = p * t + 0.07822591
    p = p * t - 0.13663243
    p = p * t + 0.19106005
    p = p * t - 0.24842982
    p = p * t + 0.33319098
    p = p * t - 0.49999493
    p = p * t + 0.99999994
    return p * t


# Features.


@triton.jit
def _tile_pointers(x, row0, length, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers to the features [row0 : row0 + ROWS, 0 : BLOCK_K].

    Rows beyond the end point to the last row, which saves a mask in the inner loop.
    """
    rows = tl.minimum(row0 + tl.arange(0, ROWS), length - 1).to(tl.int64)
    return x + rows[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _load_tile(pointers, k0, d, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr):
    """Load a tile of features, 0 beyond D."""
    if EVEN_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k0 + tl.arange(0, BLOCK_K) < d)[None, :], other=0.0)


@triton.jit
def features(x, row0, length, d, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
             EVEN_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Load the features [row0 : row0 + ROWS, 0 : BLOCK_D], 0 beyond D."""
    if TMA:
        return x.load([row0, 0])
    else:
        return _load_tile(
            _tile_pointers(x, row0, length, stride, ROWS, BLOCK_D), 0, d, BLOCK_D, EVEN_D
        )


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    # The interpreter multiplies the raw bits of bf16. Products of fp16 or bf16 are exact in fp32.
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def steps(d, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """The number of calls of `multiply` that compute the inner products of a tile."""
    if TMA:
        return tl.cdiv(d, BLOCK_K)
    else:
        return 1


@triton.jit
def multiply(acc, step, a, b, row0, col0, n, m, d, stride_a, stride_b, EVEN_D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             TMA: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Add to the inner products `acc` of a tile.

    With tensor descriptors it adds one step of BLOCK_K. One loop runs over tiles and steps, so that
    the next tile is loaded while the current one is reduced. With pointers, which would be computed
    again in every step, it adds all of D.
    """
    if TMA:
        k = step * BLOCK_K
        acc = dot(a.load([row0, k]), tl.trans(b.load([col0, k])), acc, PRECISION, INTERPRETED)
    else:
        x_at = _tile_pointers(a, row0, n, stride_a, BLOCK_M, BLOCK_K)
        y_at = _tile_pointers(b, col0, m, stride_b, BLOCK_N, BLOCK_K)
        for k in tl.range(0, d, BLOCK_K):
            x, y = _load_tile(x_at, k, d, BLOCK_K, EVEN_D), _load_tile(y_at, k, d, BLOCK_K, EVEN_D)
            acc = dot(x, tl.trans(y), acc, PRECISION, INTERPRETED)
            x_at += BLOCK_K
            y_at += BLOCK_K
    return acc


@triton.jit
def split_columns(tile):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def join_columns(left, right):
    """A tile from the halves of its columns."""
    M: tl.constexpr = left.shape[0]
    N: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [M, 2 * N])


# Scores.


@triton.jit
def load_vector(pointer, index, length, other):
    """The elements of a vector at `index`, `other` beyond the end."""
    return tl.load(pointer + index, mask=index < length, other=other)


@triton.jit
def load_one(scale, SCALE: tl.constexpr, UNIT: tl.constexpr):
    """A scale that is one number as that number times UNIT, once for a program; the pointer to one
    per row or column."""
    if SCALE == "one":
        return tl.load(scale) * UNIT
    else:
        return scale


@triton.jit
def exponents(acc, scale, row_bias, col_bias, shift, rows, cols, n, m, SCALE: tl.constexpr,
              UNIT: tl.constexpr):  # fmt: skip
    """S·UNIT - shift of a tile from its inner products: without biases one FMA.

    scale: the result of `load_one`. SCALE: the scale is "one" number, or one per "row" or "col".
    """
    if SCALE == "one":
        factor = scale
    if SCALE == "row":
        factor = load_vector(scale, rows, n, 0.0)[:, None] * UNIT
    if SCALE == "col":
        factor = load_vector(scale, cols, m, 0.0)[None, :] * UNIT
    x = acc * factor - shift
    if row_bias is not None:
        x += load_vector(row_bias, rows, n, 0.0)[:, None] * UNIT
    if col_bias is not None:
        x += load_vector(col_bias, cols, m, 0.0)[None, :] * UNIT
    return x


@triton.jit
def labels(row_ids, col_ids, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The ids of the rows and columns of a tile, or without ids their indices. An id is -1 for
    padding and beyond the end, where `gpu.Operands` stores it: the loads need no mask."""
    if row_ids is None:
        return row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    else:
        return (tl.load(row_ids + row0 + tl.arange(0, BLOCK_M)),
                tl.load(col_ids + col0 + tl.arange(0, BLOCK_N)))  # fmt: skip


# Masks.


@triton.jit
def is_special(row_ids, row_label, col_label, row0, col0, n, m, diagonal,
               SELF: tl.constexpr, POSITIVE: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """Whether the tile contains a positive (if POSITIVE), a self pair or padding, or extends beyond
    the end."""
    first = row0 + diagonal
    crossed = (col0 < first + BLOCK_M) & (first < col0 + BLOCK_N)
    if row_ids is None:
        ragged = (row0 + BLOCK_M > n) | (col0 + BLOCK_N > m)
        if SELF or POSITIVE:
            return ragged | crossed
        else:
            return ragged
    else:
        # 0 if any pair of labels is equal, negative if exactly one is -1
        found = tl.min(row_label[:, None] ^ col_label[None, :]) <= 0
        if SELF:
            found = found | crossed
        return found


@triton.jit
def classify(row_ids, row_label, col_label, rows, cols, n, m, diagonal,
             SELF: tl.constexpr):  # fmt: skip
    """The masks (positive, kept) of a tile. Padding, self pairs that are left out and what lies
    beyond the end are in neither."""
    # Compare cols with rows + diagonal. The difference rows - cols would be a loop invariant of the
    # size of a tile, which the compiler hoists out of the loop and spills.
    partner = rows + diagonal
    partner = tl.where((rows < n) & (partner < m), partner, -1)
    self_pair = cols[None, :] == partner[:, None]
    if row_ids is None:
        positive = self_pair
        kept = (rows < n)[:, None] & (cols < m)[None, :]
    else:
        kept = (row_label >= 0)[:, None] & (col_label >= 0)[None, :]
        positive = kept & (row_label[:, None] == col_label[None, :])
    if SELF:
        return positive & (self_pair == 0), kept & (self_pair == 0)
    else:
        return positive, kept


@triton.jit
def above_limit(acc, row_limit, col_limit, rows, cols, n, m):
    """Whether the inner products exceed the limit of their row or column."""
    if row_limit is not None:
        return acc > load_vector(row_limit, rows, n, 0.0)[:, None]
    else:
        return acc > load_vector(col_limit, cols, m, 0.0)[None, :]


@triton.jit
def signed_exponents(acc, scale, row_bias, col_bias, row_ids, col_ids, row_limit, col_limit, row0,
                     col0, n, m, diagonal, SCALE: tl.constexpr, SELF: tl.constexpr):  # fmt: skip
    """The arguments of softplus times log2 e: S at negatives, -S at positives, -inf elsewhere."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    x = exponents(acc, scale, row_bias, col_bias, 0.0, rows, cols, n, m, SCALE, LOG2E)
    row_label, col_label = labels(row_ids, col_ids, row0, col0, BLOCK_M, BLOCK_N)
    LIMITED: tl.constexpr = row_limit is not None or col_limit is not None
    signed = x
    if LIMITED:
        above = above_limit(acc, row_limit, col_limit, rows, cols, n, m)
        signed = tl.where(above, float("-inf"), x)
    if is_special(row_ids, row_label, col_label, row0, col0, n, m, diagonal, SELF, True, BLOCK_M,
                  BLOCK_N):  # fmt: skip
        positive, kept = classify(row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF)
        signed = tl.where(positive, -x, tl.where(kept, signed, float("-inf")))
    return signed
