"""A tile of S = scale·a·bᵀ + biases inside a Triton kernel, and the masks of its pairs.

Scores are accumulated in fp32 and never stored. Padded rows and rows beyond the end get an offset
of -inf. Most tiles then need no masks, because exp(-inf) and σ(-inf) are 0. Tiles that contain
positives or self pairs are "special": they are recognised by position or by comparing ids, and take
a separate branch.

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
def exp(x, shift, EXACT: tl.constexpr):
    """e^(x - shift).

    EXACT: compute x - shift first, so that e^0 is 1. Otherwise one FMA with an error of |x|·2^-24,
    which is far below that of a bf16 or fp16 score.
    """
    if EXACT:
        return tl.exp2((x - shift) * LOG2E)
    else:
        return tl.exp2(x * LOG2E - shift * LOG2E)


@triton.jit
def finite_shift(x):
    """x with -inf replaced by 0: -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def softplus(s):
    return tl.maximum(s, 0.0) + _log1p_unit(tl.exp2(tl.abs(s) * -LOG2E))


@triton.jit
def sigmoid(s):
    """σ(s) from the same exponential as softplus, so that both together compute it once."""
    t = tl.exp2(tl.abs(s) * -LOG2E)
    return tl.where(s >= 0, 1.0, t) / (1.0 + t)


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

    Rows beyond the end point to the last row, which saves a mask in the inner loop. The scores of
    such rows get an offset of -inf.
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
    if INTERPRETED:  # it multiplies the raw bits of bf16; products of fp16, bf16 are exact in fp32
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


# Scores.


@triton.jit
def load_vector(pointer, index, length, other):
    """The elements of a vector at `index`, `other` beyond the end."""
    return tl.load(pointer + index, mask=index < length, other=other)


@triton.jit
def load_side(bias, ids, index, length, PADDING: tl.constexpr):
    """The offsets and the labels of the rows or columns of a tile.

    offset: the bias, -inf for padding and beyond the end. label: the id, or the index without ids.
    Padding gets the label PADDING, which differs between rows and columns and so never matches.
    """
    inside = index < length
    label = index
    if ids is not None:
        label = tl.load(ids + index, mask=inside, other=-1)
        inside = inside & (label >= 0)
        label = tl.where(inside, label, PADDING)
    offset = tl.zeros_like(index).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + index, mask=inside, other=0.0)
    return tl.where(inside, offset, float("-inf")), label


@triton.jit
def load_row_side(scale, bias, ids, rows, n, SCALE_PER_ROW: tl.constexpr):
    """The scale, the offsets and the labels of the rows of a tile."""
    offset, label = load_side(bias, ids, rows, n, -1)
    if SCALE_PER_ROW:
        row_scale = load_vector(scale, rows, n, 0.0)
    else:
        row_scale = tl.load(scale) + tl.zeros_like(offset)
    return row_scale, offset, label


@triton.jit
def scale_and_offset(acc, scale, row_offset, col_offset):
    """The scores of a tile from its inner products."""
    return acc * scale[:, None] + col_offset[None, :] + row_offset[:, None]


# Masks.


@triton.jit
def is_special(row_ids, row_label, col_label, row0, col0, diagonal,
               SELF: tl.constexpr, POSITIVE: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """Whether the tile contains a positive or a self pair, by ids or by position."""
    first = row0 + diagonal
    diagonal_crosses = (col0 < first + BLOCK_M) & (first < col0 + BLOCK_N)
    if row_ids is None:
        return diagonal_crosses
    else:
        found = False
        if POSITIVE:  # the minimum of the unsigned xor is 0 if any pair of labels is equal
            different = row_label[:, None] ^ col_label[None, :]
            found = tl.min(tl.min(different.to(tl.uint32, bitcast=True), 1), 0) == 0
        if SELF:
            found = found | diagonal_crosses
        return found


@triton.jit
def classify(row_ids, row_label, col_label, rows, cols, n, m, diagonal,
             SELF: tl.constexpr):  # fmt: skip
    """The masks (positive, excluded) of a tile. Padding and pairs beyond the end are in neither."""
    # Compare cols with rows + diagonal. The difference rows - cols would be a loop invariant of the
    # size of a tile, which the compiler hoists out of the loop and spills.
    partner = rows + diagonal
    partner = tl.where((rows < n) & (partner < m), partner, -1)
    self_pair = cols[None, :] == partner[:, None]
    if row_ids is None:  # noqa: SIM108 (Triton decides an `if` at compile time)
        positive = self_pair
    else:
        positive = row_label[:, None] == col_label[None, :]
    if SELF:
        return positive & (self_pair == 0), self_pair
    else:
        return positive, tl.zeros_like(self_pair)


@triton.jit
def apply_limit(s, products, limit, special, row_ids, row_label, col_label, rows, cols, n, m,
            diagonal, SELF: tl.constexpr):  # fmt: skip
    """The scores with -inf at negatives whose inner product is above `limit`.

    limit: (rows, 1) or (1, columns).
    """
    above = products > limit
    if special:
        positive, _ = classify(row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF)
        above = above & (positive == 0)
    return tl.where(above, float("-inf"), s)


@triton.jit
def signed_scores(s, special, row_ids, row_label, col_label, rows, cols, n, m, diagonal,
                  SELF: tl.constexpr):  # fmt: skip
    """The arguments of softplus: S at negatives, -S at positives, -inf at excluded pairs."""
    if special:
        positive, excluded = classify(
            row_ids, row_label, col_label, rows, cols, n, m, diagonal, SELF
        )
        s = tl.where(excluded, float("-inf"), tl.where(positive, -s, s))
    return s
