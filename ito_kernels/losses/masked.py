"""Sums over the scores for masks that no kernel supports, on `panelwise`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..similarity.pairs import finite_shift
from ..similarity.panelwise import panelwise


class Mask(NamedTuple):
    """Which pairs (i, j) are left out. It holds only constants, so autograd can keep it for
    backward.

    row_ids, col_ids: a pair with a negative id is left out. Equal ids are positives; without ids
        the positive of row i is column i + diagonal.
    row_limit: negatives with an inner product above it are left out.
    guide: features of rows and columns, (N, E) and (M, E). The limits compare their inner products
        instead.
    pairs: linear indices i·M + j of further pairs to leave out; negative entries are ignored.
    exclude_self: leave out (i, i + diagonal).
    exclude_positives: leave out the positives.
    """

    row_ids: Tensor | None
    col_ids: Tensor | None
    row_limit: Tensor | None = None
    pairs: Tensor | None = None
    exclude_self: bool = False
    exclude_positives: bool = False
    diagonal: int = 0
    guide: tuple[Tensor, Tensor] | None = None

    def __call__(self, rows: Tensor, dot: Tensor) -> Tensor:
        """The mask of a panel, True where a pair is left out.

        rows: the row numbers of the panel. dot: its inner products.
        """
        masked = []
        if self.pairs is not None:
            # scatter into a flat panel with one more element, which takes the pairs of other panels
            size = dot.numel()
            position = self.pairs - rows[0] * dot.shape[1]
            in_panel = (self.pairs >= 0) & (position >= 0) & (position < size)
            listed = torch.zeros(size + 1, dtype=torch.bool, device=dot.device)
            listed.scatter_(0, torch.where(in_panel, position, size), True)
            masked.append(listed[:-1].view(dot.shape))
        if self.row_ids is not None:
            ids = self.row_ids[rows, None]
            masked.append((ids < 0) | (self.col_ids < 0))
        if self.exclude_self:
            masked.append(self._diagonal(rows, dot))
        if self.row_limit is not None or self.exclude_positives:
            positive = self.positives(rows, dot)
        if self.row_limit is not None:
            guided = dot if self.guide is None else self.guide[0][rows] @ self.guide[1].T
            above = guided > self.row_limit[rows, None]
            masked.append(above if positive is None else above.logical_and_(~positive))
        if self.exclude_positives:
            masked.append(positive)
        if not masked:
            return torch.zeros_like(dot, dtype=torch.bool)
        total = masked[0]
        for mask in masked[1:]:
            total.logical_or_(mask)
        return total

    def positives(self, rows: Tensor, dot: Tensor) -> Tensor | None:
        """The positives of a panel; None if they are `pairs`, which are left out."""
        if self.row_ids is not None:
            return self.row_ids[rows, None] == self.col_ids
        return self._diagonal(rows, dot) if self.pairs is None else None

    def _diagonal(self, rows: Tensor, dot: Tensor) -> Tensor:
        columns = torch.arange(dot.shape[1], device=dot.device)
        return columns == rows[:, None] + self.diagonal


def masked_log_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mask: Callable[[Tensor, Tensor], Tensor],
    powers: tuple[float, ...],
    boost: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Row statistics of S = scale·a·bᵀ + bias over the pairs that `mask` does not leave out.

    Args:
        scale: (N, 1) or (M,). bias: (M,) or None.
        mask: called with the row numbers and inner products of a panel; True leaves a pair out.
        powers: exponents p.
        boost: α; S has the further term α·a·bᵀ without gradient.

    Returns the maximum of each row (N,), -inf for a row without pairs; the number of its pairs
    (N,); and for each p log Σ_j exp(p·(S_ij - max_i)), (N,). Only the last have gradients.
    """

    def masked_scores(dot: Tensor, masked: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
        scores = dot * (scale + boost if boost else scale)
        for x in bias:
            scores += x
        return scores.masked_fill_(masked, -torch.inf)

    def function(dot: Tensor, rows: Tensor, *scale_and_bias: Tensor) -> Tensor:
        masked = mask(rows, dot)
        scores = masked_scores(dot, masked, *scale_and_bias)
        maximum, number = scores.amax(1), dot.shape[1] - masked.sum(1)
        scores.sub_(finite_shift(maximum)[:, None])
        sums = [(p * scores).exp_().sum(1).log_() for p in powers]
        return torch.stack([maximum, number.to(maximum.dtype), *sums], 1)

    def gradient(
        grad: Tensor, value: Tensor, dot: Tensor, rows: Tensor, *scale_and_bias: Tensor
    ) -> tuple:
        scale, shift = scale_and_bias[0], finite_shift(value)
        scores = masked_scores(dot, mask(rows, dot), *scale_and_bias).sub_(shift[:, :1])
        weights = torch.zeros_like(scores)
        for p, log_sum, grad_log_sum in zip(powers, shift.T[2:], grad.T[2:], strict=True):
            terms = (p * scores).sub_(log_sum[:, None]).exp_()
            weights.addcmul_(terms, p * grad_log_sum[:, None])
        grad_bias = [weights.sum(0) for _ in scale_and_bias[1:]]
        if scale.ndim == 2:
            grad_scale = torch.linalg.vecdot(weights, dot)[:, None]
        else:
            grad_scale = dot.mul_(weights).sum(0)
        return weights.mul_(scale), grad_scale, *grad_bias

    biases = () if bias is None else (bias,)
    row_args, key_args = ((scale,), biases) if scale.ndim == 2 else ((), (scale, *biases))
    statistics = panelwise(function, a, b, row_args=row_args, key_args=key_args, gradient=gradient)
    maximum, number, *sums = statistics.unbind(1)
    return maximum.detach(), number.detach(), sums


def unmasked_sums(
    a: Tensor, b: Tensor, mask: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """Σ_j x_j over the columns j of a·bᵀ that `mask` does not leave out, for every row.

    x: (M, C). Returns (N, C). Only x has a gradient.
    """

    def unmasked(dot: Tensor, rows: Tensor) -> Tensor:
        return mask(rows, dot).logical_not_().to(dot.dtype)

    def function(dot: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        return unmasked(dot, rows) @ x

    def gradient(grad: Tensor, _, dot: Tensor, rows: Tensor, x: Tensor) -> tuple:
        return None, unmasked(dot, rows).T @ grad

    return panelwise(function, a.detach(), b.detach(), key_args=(x,), gradient=gradient)


def masked_softplus_sums(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, mask: Mask
) -> Tensor:
    """Σ_j weights_j · softplus(±S_ij) for every row of S = scale·a·bᵀ + bias, (N,), over the pairs
    that `mask` does not leave out: softplus(-S) at its positives, else softplus(S).

    scale: (N,). bias: 0-d. weights: (M,), without gradient.
    """

    def signed_scores(dot: Tensor, rows: Tensor, scale: Tensor, bias: Tensor) -> tuple:
        positive = mask.positives(rows, dot)
        sign = 1 if positive is None else 1 - 2 * positive.to(dot.dtype)
        scores = (dot * scale[:, None]).add_(bias).mul_(sign)
        return scores.masked_fill_(mask(rows, dot), -torch.inf), sign

    def function(dot: Tensor, rows: Tensor, scale: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        scores, _ = signed_scores(dot, rows, scale, bias)
        # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
        return softplus(scores, threshold=40) @ weights

    def gradient(
        grad: Tensor,
        _,
        dot: Tensor,
        rows: Tensor,
        scale: Tensor,
        bias: Tensor,
        weights: Tensor,
    ) -> tuple:
        scores, sign = signed_scores(dot, rows, scale, bias)
        # the derivative of softplus is the sigmoid
        grads = scores.sigmoid_().mul_(sign).mul_(weights).mul_(grad[:, None])
        grad_scale, grad_bias = torch.linalg.vecdot(grads, dot), grads.sum()
        return grads.mul_(scale[:, None]), grad_scale, grad_bias, None

    key_args = (bias, weights)
    return panelwise(function, a, b, row_args=(scale,), key_args=key_args, gradient=gradient)
