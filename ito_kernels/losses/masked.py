"""What InfoNCE needs of the scores that the kernels do not give, on `panelwise`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from ..similarity.panelwise import panelwise


class Mask(NamedTuple):
    """Which pairs are no candidates. Constants alone: autograd keeps it for backward.

    row_ids, col_ids: padding takes no part, and positives, equal ids, none under
        `exclude_positives`; without ids (i, i + diagonal) is positive.
    row_limit: pairs that are not positive leave where their inner product is above it.
    exclude_self: (i, i + diagonal) takes no part. pairs: i·M + j of others that take none, -1 for
        nothing.
    """

    row_ids: Tensor | None
    col_ids: Tensor | None
    row_limit: Tensor | None = None
    pairs: Tensor | None = None
    exclude_self: bool = False
    exclude_positives: bool = False
    diagonal: int = 0

    def __call__(self, rows: Tensor, dot: Tensor) -> Tensor:
        """Of a panel, by its row numbers and inner products."""
        masked = []
        if self.pairs is not None:
            # their places in the panel, of all others the place behind it
            size = dot.numel()
            place = self.pairs - rows[0] * dot.shape[1]
            here = (self.pairs >= 0) & (place >= 0) & (place < size)
            listed = torch.zeros(size + 1, dtype=torch.bool, device=dot.device)
            listed.scatter_(0, torch.where(here, place, size), True)
            masked.append(listed[:-1].view(dot.shape))
        if self.row_ids is not None:
            ids = self.row_ids[rows, None]
            masked.append((ids < 0) | (self.col_ids < 0))
        if self.exclude_self:
            masked.append(self._diagonal(rows, dot))
        if self.row_limit is not None or self.exclude_positives:
            positive = self._positive(rows, dot)
        if self.row_limit is not None:
            beyond = dot > self.row_limit[rows, None]
            masked.append(beyond if positive is None else beyond.logical_and_(~positive))
        if self.exclude_positives:
            masked.append(positive)
        if not masked:
            return torch.zeros_like(dot, dtype=torch.bool)
        total = masked[0]
        for mask in masked[1:]:
            total.logical_or_(mask)
        return total

    def _positive(self, rows: Tensor, dot: Tensor) -> Tensor | None:
        if self.row_ids is not None:
            return self.row_ids[rows, None] == self.col_ids
        return self._diagonal(rows, dot) if self.pairs is None else None

    def _diagonal(self, rows: Tensor, dot: Tensor) -> Tensor:
        columns = torch.arange(dot.shape[1], device=dot.device)
        return columns == rows[:, None] + self.diagonal


def log_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mask: Callable[[Tensor, Tensor], Tensor],
    powers: tuple[float, ...],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of S = scale·a·bᵀ + bias without some pairs: the rows' maximum, -inf where nothing is left,
    the number that are left, and for each power p log Σ_j exp(p·(S_ij - max_i)), (N,) each.

    scale: (N, 1) or (M,); bias: (M,) or None. mask: takes the row numbers and inner products of a
    panel and says which pairs are left out. Maximum and number are constants.
    """

    def scored(dot: Tensor, masked: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
        scores = dot * scale
        for x in bias:
            scores += x
        return scores.masked_fill_(masked, -torch.inf)

    def function(dot: Tensor, rows: Tensor, *given: Tensor) -> Tensor:
        masked = mask(rows, dot)
        scores = scored(dot, masked, *given)
        top, number = scores.amax(1), dot.shape[1] - masked.sum(1)
        scores.sub_(finite_shift(top)[:, None])
        sums = [(p * scores).exp_().sum(1).log_() for p in powers]
        return torch.stack([top, number.to(top.dtype), *sums], 1)

    def gradient(grad: Tensor, value: Tensor, dot: Tensor, rows: Tensor, *given: Tensor) -> tuple:
        scale, shift = given[0], finite_shift(value)
        scores = scored(dot, mask(rows, dot), *given).sub_(shift[:, :1])
        weights = torch.zeros_like(scores)
        for p, of_rows, by in zip(powers, shift.T[2:], grad.T[2:], strict=True):
            terms = (p * scores).sub_(of_rows[:, None]).exp_()
            weights.addcmul_(terms, p * by[:, None])
        of_bias = [weights.sum(0) for _ in given[1:]]
        if scale.ndim == 2:
            of_scale = torch.linalg.vecdot(weights, dot)[:, None]
        else:
            of_scale = dot.mul_(weights).sum(0)
        return weights.mul_(scale), of_scale, *of_bias

    of_keys = () if bias is None else (bias,)
    row_args, key_args = ((scale,), of_keys) if scale.ndim == 2 else ((), (scale, *of_keys))
    found = panelwise(function, a, b, row_args=row_args, key_args=key_args, gradient=gradient)
    top, number, *sums = found.unbind(1)
    return top.detach(), number.detach(), sums


def sums_of_rest(
    a: Tensor, b: Tensor, mask: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """Σ_j x_j over the columns that are left to each row of a·bᵀ: (N, C) of an x of (M, C), which
    alone has gradients."""

    def rest(dot: Tensor, rows: Tensor) -> Tensor:
        return mask(rows, dot).logical_not_().to(dot.dtype)

    def function(dot: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        return rest(dot, rows) @ x

    def gradient(grad: Tensor, _, dot: Tensor, rows: Tensor, x: Tensor) -> tuple:
        return None, rest(dot, rows).T @ grad

    return panelwise(function, a.detach(), b.detach(), key_args=(x,), gradient=gradient)
