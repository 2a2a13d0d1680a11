"""Masks of positive and of excluded pairs, for a block of rows against all columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import _native
from .spec import Problem, can_skip_dispatcher


class Pairs(NamedTuple):
    """Boolean masks (rows, M).

    positive: equal ids and not excluded.
    excluded: padding, self pairs under `exclude_self`, negatives above `row_limit`. All other pairs
              are positive or negative.
    masked:   the pairs that max and logsum leave out: `excluded`, and under `exclude_positives` the
              positives too.
    """

    positive: Tensor
    excluded: Tensor
    masked: Tensor


def classify(problem: Problem, dot: Tensor, start: int = 0, stop: int | None = None) -> Pairs:
    """The masks of rows [start, stop).

    dot: the inner products of these rows with all columns.
    """
    stop = problem.n if stop is None else stop
    device = problem.a.device
    row = torch.arange(start, stop, device=device)[:, None]
    col = torch.arange(problem.m, device=device)[None, :]
    self_pair = col == row + problem.diagonal
    if problem.row_ids is None:
        positive = self_pair
        excluded = torch.zeros_like(self_pair)
    else:
        row_ids, col_ids = problem.row_ids[start:stop, None], problem.col_ids[None, :]
        positive = row_ids == col_ids
        excluded = (row_ids < 0) | (col_ids < 0)
    if problem.exclude_self:
        excluded = excluded | self_pair
    positive = positive & ~excluded
    if problem.row_limit is not None:
        excluded = excluded | (~positive & (dot > problem.row_limit[start:stop, None]))
    return Pairs(positive, excluded, positive | excluded if problem.exclude_positives else excluded)


def features(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both sides in the accumulate dtype, with padded rows set to 0.

    Padded rows may contain any values. 0 · NaN would spread them to the gradients of other rows.
    """

    def without_padding(x: Tensor, ids: Tensor | None) -> Tensor:
        x = x.to(problem.accumulate)
        return x if ids is None else x.masked_fill((ids < 0)[:, None], 0)

    a = without_padding(problem.a, problem.row_ids)
    if problem.b is None and problem.row_ids is problem.col_ids:
        return a, a
    return a, without_padding(problem.a if problem.b is None else problem.b, problem.col_ids)


def finite_shift(maximum: Tensor) -> Tensor:
    """`maximum` with -inf replaced by 0. A row without pairs would otherwise give -inf - -inf."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def count_positives(ids: Tensor, other_ids: Tensor) -> Tensor:
    """The number of `other_ids` that equal ids_i, 0 for padding. O((N + M) log M) operations."""
    native = ids.is_cpu and ids.dtype == other_ids.dtype == torch.int64
    if native and _native is not None and can_skip_dispatcher((ids, other_ids)):
        counts = ids.new_empty(ids.shape)
        _native.cpu_count_equal((ids.shape[0], other_ids.shape[0], ids, other_ids, counts))
        return counts
    ordered = other_ids.sort().values
    end = torch.searchsorted(ordered, ids, right=True)
    return (end - torch.searchsorted(ordered, ids)).masked_fill(ids < 0, 0)
