"""Sums over the positive pairs that equal ids name, a tile of scores at a time.

With both sides sorted by id, the positives of a run of rows lie in a run of columns: dense tiles of
the sorted matrix hold them all, and matrix products serve many small groups as well as few large
ones. No list of pairs is made, which with 4 classes would have N·M / 4 entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..similarity.op import first_order_only

# A tile holds 4 MiB of fp32 scores. Of 256 rows with groups of 4 it uses 1 in 64, which at N = 4096
# is 1/16 of the work of one N × M product.
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
    """Σ_p softplus(log_row_i - S_ip) of each row's positives (N,), and where log_col is given
    Σ_p softplus(log_col_j - S_pj) of each column's (M,), with S = scale·a·bᵀ.

    a, b, scale (0-d or (N,)), log_row (N,) and log_col (M,) are fp32 or fp64 and have gradients.
    diagonal: leave out the pairs (i, i + diagonal); None: leave out none.
    """
    rows, cols = _softplus_sums(
        a, b, scale.expand(len(a)).contiguous(), log_row, log_col, row_ids, col_ids, diagonal
    )
    return rows, None if log_col is None else cols


@torch.no_grad()
def largest(
    a: Tensor, b: Tensor, row_ids: Tensor, col_ids: Tensor, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """The largest <a_i, b_j> of the positives of each row and of each column, -inf without one."""
    return _largest(a, b, row_ids, col_ids, diagonal)


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    dot: Tensor  # inner products, 0 where not positive
    other: Tensor  # where not positive


class _Side(NamedTuple):
    """Rows or columns in the order of their ids."""

    order: Tensor
    ids: Tensor
    x: Tensor

    @classmethod
    def of(cls, x: Tensor, ids: Tensor) -> _Side:
        ids, order = ids.sort(stable=True)
        return cls(order, ids, x[order].masked_fill_((ids < 0)[:, None], 0))  # padding may be NaN

    def restore(self, x: Tensor) -> Tensor:
        """x, (N,) or (N, D) in the order of the ids, in the order of the batch."""
        return torch.empty_like(x).index_copy_(0, self.order, x)


def _tiles(rows: _Side, cols: _Side, diagonal: int | None) -> Iterator[_Tile]:
    """Waits for the device, once: which columns go with which rows is a matter of ids' values."""
    first = torch.arange(0, len(rows.ids), ROWS, device=rows.ids.device)
    last = (first + (ROWS - 1)).clamp(max=len(rows.ids) - 1)
    begin = torch.searchsorted(cols.ids, rows.ids[first].clamp(min=0))
    end = torch.searchsorted(cols.ids, rows.ids[last], right=True)
    for first_row, first_col, end_col in torch.stack([first, begin, end], 1).tolist():
        at = slice(first_row, first_row + ROWS)
        for start in range(first_col, end_col, COLS):
            to = slice(start, min(start + COLS, end_col))
            other = rows.ids[at, None] != cols.ids[to]
            if diagonal is not None:
                other |= rows.order[at, None] + diagonal == cols.order[to]
            dot = rows.x[at] @ cols.x[to].T
            yield _Tile(at, to, dot.masked_fill_(other, 0), other)


# ---- as operators: torch.compile leaves them whole, and the wait inside them breaks no graph


@torch.library.custom_op("ito_kernels::largest_positives", mutates_args=())
def _largest(
    a: Tensor, b: Tensor, row_ids: Tensor, col_ids: Tensor, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    rows, cols = _Side.of(a, row_ids), _Side.of(b, col_ids)
    top_row, top_col = (x.new_full((len(x),), -torch.inf) for x in (a, b))
    for tile in _tiles(rows, cols, diagonal):
        dot = tile.dot.masked_fill_(tile.other, -torch.inf)
        top_row[tile.rows] = torch.maximum(top_row[tile.rows], dot.amax(1))
        top_col[tile.cols] = torch.maximum(top_col[tile.cols], dot.amax(0))
    return rows.restore(top_row), cols.restore(top_col)


@_largest.register_fake
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
    """The columns' sums are 0 without log_col."""
    rows, cols = _Side.of(a, row_ids), _Side.of(b, col_ids)
    scale, log_row = scale[rows.order], log_row[rows.order]
    log_col = None if log_col is None else log_col[cols.order]
    row_sums, col_sums = a.new_zeros(len(a)), b.new_zeros(len(b))
    for tile in _tiles(rows, cols, diagonal):
        scores = scale[tile.rows, None] * tile.dot
        # torch's default threshold of 20 returns x itself beyond it, off by 2e-9
        terms = softplus(log_row[tile.rows, None] - scores, threshold=40)
        row_sums[tile.rows] += terms.masked_fill_(tile.other, 0).sum(1)
        if log_col is not None:
            terms = softplus(log_col[tile.cols] - scores, threshold=40)
            col_sums[tile.cols] += terms.masked_fill_(tile.other, 0).sum(0)
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
    """Of a, b, scale, log_row and log_col, given those of the rows' and of the columns' sums."""
    rows, cols = _Side.of(a, row_ids), _Side.of(b, col_ids)
    scale, log_row, row_grad = (x[rows.order] for x in (scale, log_row, row_grad))
    if log_col is not None:
        log_col, col_grad = log_col[cols.order], col_grad[cols.order]
    grad_a, grad_b = torch.zeros_like(rows.x), torch.zeros_like(cols.x)
    grad_scale, grad_log_row = torch.zeros_like(scale), torch.zeros_like(scale)
    grad_log_col = b.new_zeros(len(b))
    for tile in _tiles(rows, cols, diagonal):
        by_row, others = scale[tile.rows, None], tile.other
        scores = by_row * tile.dot
        # the slope of softplus is the sigmoid
        weights = (log_row[tile.rows, None] - scores).sigmoid_().mul_(row_grad[tile.rows, None])
        weights.masked_fill_(others, 0)
        grad_log_row[tile.rows] += weights.sum(1)
        if log_col is not None:
            more = (log_col[tile.cols] - scores).sigmoid_().mul_(col_grad[tile.cols])
            grad_log_col[tile.cols] += more.masked_fill_(others, 0).sum(0)
            weights += more
        grad_scale[tile.rows] -= (weights * tile.dot).sum(1)
        weights *= by_row
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


def _differentiate(ctx, row_grad: Tensor, col_grad: Tensor) -> tuple:
    first_order_only()
    a, b, scale, log_row, log_col, row_ids, col_ids = ctx.saved_tensors
    *grads, of_log_col = _softplus_grads(
        *(a, b, scale, log_row, log_col, row_ids, col_ids, ctx.diagonal),
        *(row_grad, col_grad),
    )
    return *grads, None if log_col is None else of_log_col, None, None, None


_softplus_sums.register_autograd(_differentiate, setup_context=_setup_context)
