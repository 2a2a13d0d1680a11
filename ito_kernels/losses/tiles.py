"""Sums over the pairs with equal ids, a tile of scores at a time.

When both sides are sorted by id, the positives of consecutive rows lie in consecutive columns. They
are covered by dense tiles of the sorted matrix, computed by matrix products. This is efficient for
many small groups and for a few large ones. A list of the pairs is never formed: with 4 classes it
would have N·M / 4 entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..similarity.op import first_order_only

# A tile holds 4 MiB of fp32 scores. If 4 rows share each id, a tile of 256 rows uses 1 in 64 of its
# scores; at N = 4096 all tiles together are 1/16 of the work of one N × M product.
ROWS, COLS = 256, 4096


def softplus_sums(
    a: Tensor,
    b: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    scale: Tensor,
    log_row: Tensor,
    log_col: Tensor | None,
    diagonal: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums of softplus over the positives of each row and of each column of S = scale·a·bᵀ.

        row_i = Σ_{p ∈ P_i} softplus(log_row_i - S_ip)
        col_j = Σ_{p ∈ P_j} softplus(log_col_j - S_pj)

    Args:
        a, b, scale, log_row, log_col: (N, D), (M, D), 0-d or (N,), (N,), (M,) or None; fp32 or
            fp64, with gradients.
        row_ids, col_ids: (N,) and (M,); equal ids are positives, negative ids padding.
        diagonal: leave out the pairs (i, i + diagonal); None leaves out none.

    Returns row (N,) and col (M,); col is None without log_col.
    """
    rows, cols = _softplus_sums(
        a, b, scale.expand(len(a)).contiguous(), log_row, log_col, row_ids, col_ids, diagonal
    )
    return rows, None if log_col is None else cols


@torch.no_grad()
def largest_positives(
    a: Tensor, b: Tensor, row_ids: Tensor, col_ids: Tensor, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """The largest <a_i, b_j> over the positives of each row (N,) and of each column (M,), -inf
    without positives."""
    return _largest_positives(a, b, row_ids, col_ids, diagonal)


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    dot: Tensor  # inner products, 0 where `not_positive`
    not_positive: Tensor


class _SortedSide(NamedTuple):
    """Rows or columns, sorted by id. order: their numbers in the batch."""

    order: Tensor
    ids: Tensor
    x: Tensor

    @classmethod
    def sort(cls, x: Tensor, ids: Tensor) -> _SortedSide:
        ids, order = ids.sort(stable=True)
        return cls(order, ids, x[order].masked_fill_((ids < 0)[:, None], 0))  # padding may be NaN

    def restore(self, x: Tensor) -> Tensor:
        """Return x, (N,) or (N, D), from sorted order to the order of the batch."""
        return torch.empty_like(x).index_copy_(0, self.order, x)


def _tiles(rows: _SortedSide, cols: _SortedSide, diagonal: int | None) -> Iterator[_Tile]:
    """The tiles that cover all positives. Synchronises with the device once, to read which columns
    have the ids of a row block."""
    first = torch.arange(0, len(rows.ids), ROWS, device=rows.ids.device)
    last = (first + (ROWS - 1)).clamp(max=len(rows.ids) - 1)
    begin = torch.searchsorted(cols.ids, rows.ids[first].clamp(min=0))
    end = torch.searchsorted(cols.ids, rows.ids[last], right=True)
    for first_row, first_col, end_col in torch.stack([first, begin, end], 1).tolist():
        row_block = slice(first_row, first_row + ROWS)
        for start in range(first_col, end_col, COLS):
            col_block = slice(start, min(start + COLS, end_col))
            not_positive = rows.ids[row_block, None] != cols.ids[col_block]
            if diagonal is not None:
                not_positive |= rows.order[row_block, None] + diagonal == cols.order[col_block]
            dot = rows.x[row_block] @ cols.x[col_block].T
            yield _Tile(row_block, col_block, dot.masked_fill_(not_positive, 0), not_positive)


# Custom operators: torch.compile does not trace into them, so that the synchronisation inside
# causes no graph break.


@torch.library.custom_op("ito_kernels::largest_positives", mutates_args=())
def _largest_positives(
    a: Tensor, b: Tensor, row_ids: Tensor, col_ids: Tensor, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    rows, cols = _SortedSide.sort(a, row_ids), _SortedSide.sort(b, col_ids)
    row_max, col_max = (x.new_full((len(x),), -torch.inf) for x in (a, b))
    for tile in _tiles(rows, cols, diagonal):
        dot = tile.dot.masked_fill_(tile.not_positive, -torch.inf)
        row_max[tile.rows] = torch.maximum(row_max[tile.rows], dot.amax(1))
        col_max[tile.cols] = torch.maximum(col_max[tile.cols], dot.amax(0))
    return rows.restore(row_max), cols.restore(col_max)


@_largest_positives.register_fake
def _(a, b, row_ids, col_ids, diagonal):
    return a.new_empty(len(a)), b.new_empty(len(b))


@torch.library.custom_op("ito_kernels::softplus_positives", mutates_args=())
def _softplus_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    log_row: Tensor,
    log_col: Tensor | None,
    row_ids: Tensor,
    col_ids: Tensor,
    diagonal: int | None,
) -> tuple[Tensor, Tensor]:
    """Without log_col the column sums are 0."""
    rows, cols = _SortedSide.sort(a, row_ids), _SortedSide.sort(b, col_ids)
    scale, log_row = scale[rows.order], log_row[rows.order]
    log_col = None if log_col is None else log_col[cols.order]
    row_sums, col_sums = a.new_zeros(len(a)), b.new_zeros(len(b))
    for tile in _tiles(rows, cols, diagonal):
        scores = scale[tile.rows, None] * tile.dot
        # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
        terms = softplus(log_row[tile.rows, None] - scores, threshold=40)
        row_sums[tile.rows] += terms.masked_fill_(tile.not_positive, 0).sum(1)
        if log_col is not None:
            terms = softplus(log_col[tile.cols] - scores, threshold=40)
            col_sums[tile.cols] += terms.masked_fill_(tile.not_positive, 0).sum(0)
    return rows.restore(row_sums), cols.restore(col_sums)


@_softplus_sums.register_fake
def _(a, b, scale, log_row, log_col, row_ids, col_ids, diagonal):
    return torch.empty_like(log_row), b.new_empty(len(b))


@torch.library.custom_op("ito_kernels::softplus_positives_backward", mutates_args=())
def _softplus_grads(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    log_row: Tensor,
    log_col: Tensor | None,
    row_ids: Tensor,
    col_ids: Tensor,
    diagonal: int | None,
    row_grad: Tensor,
    col_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a, b, scale, log_row and log_col.

    row_grad, col_grad: the upstream gradients of the row and column sums.
    """
    rows, cols = _SortedSide.sort(a, row_ids), _SortedSide.sort(b, col_ids)
    scale, log_row, row_grad = (x[rows.order] for x in (scale, log_row, row_grad))
    if log_col is not None:
        log_col, col_grad = log_col[cols.order], col_grad[cols.order]
    grad_a, grad_b = torch.zeros_like(rows.x), torch.zeros_like(cols.x)
    grad_scale, grad_log_row = torch.zeros_like(scale), torch.zeros_like(scale)
    grad_log_col = b.new_zeros(len(b))
    for tile in _tiles(rows, cols, diagonal):
        row_scale, not_positive = scale[tile.rows, None], tile.not_positive
        scores = row_scale * tile.dot
        # the derivative of softplus is the sigmoid
        weights = (log_row[tile.rows, None] - scores).sigmoid_().mul_(row_grad[tile.rows, None])
        weights.masked_fill_(not_positive, 0)
        grad_log_row[tile.rows] += weights.sum(1)
        if log_col is not None:
            col_weights = (log_col[tile.cols] - scores).sigmoid_().mul_(col_grad[tile.cols])
            grad_log_col[tile.cols] += col_weights.masked_fill_(not_positive, 0).sum(0)
            weights += col_weights
        grad_scale[tile.rows] -= (weights * tile.dot).sum(1)
        weights *= row_scale
        grad_a[tile.rows].addmm_(weights, cols.x[tile.cols], alpha=-1)
        grad_b[tile.cols].addmm_(weights.T, rows.x[tile.rows], alpha=-1)
    return (
        rows.restore(grad_a),
        cols.restore(grad_b),
        rows.restore(grad_scale),
        rows.restore(grad_log_row),
        cols.restore(grad_log_col),
    )


@_softplus_grads.register_fake
def _(a, b, scale, log_row, log_col, row_ids, col_ids, diagonal, row_grad, col_grad):
    return (*(torch.empty_like(x) for x in (a, b, scale, log_row)), b.new_empty(len(b)))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.diagonal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, row_grad: Tensor, col_grad: Tensor) -> tuple:
    first_order_only()
    a, b, scale, log_row, log_col, row_ids, col_ids = ctx.saved_tensors
    *grads, grad_log_col = _softplus_grads(
        *(a, b, scale, log_row, log_col, row_ids, col_ids, ctx.diagonal),
        *(row_grad, col_grad),
    )
    return *grads, None if log_col is None else grad_log_col, None, None, None


_softplus_sums.register_autograd(_backward, setup_context=_setup_context)
