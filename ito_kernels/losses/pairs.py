"""Positives as a list of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from .batch import Batch
from .precision import inner, take


class Positives:
    """What no ids can say (multi-label data, graphs, mixtures): P pairs of a row and a column of
    the whole batch, and their weights (1 by default). Memory O(P·D), and everyone's keys."""

    def __init__(self, batch: Batch, rows: Tensor, cols: Tensor, weights: Tensor | None):
        self.batch, self.rows, self.cols = batch, rows, cols
        keys = batch.whole.rows(batch.keys)
        scale = batch.scale[rows] if batch.scale.ndim else batch.scale
        self.scores = scale * inner(take(batch.queries, rows), take(keys, cols))
        self.weights = torch.ones_like(self.scores) if weights is None else weights
        if batch.exclude_self:
            own = rows + batch.whole.numbers(0).start == cols
            self.weights = self.weights.masked_fill(own, 0)

    def of(self, side: str, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per anchor: the total weight k, Σ w·(S - shift) / k and log Σ w·e^(S - shift)."""
        whole, bias = self.batch.whole, self.batch.bias(side)
        if side == "col":  # whose pairs are with rows of any rank
            found = self._sums(self.scores, self.cols, whole.rows(shift), whole)
            return tuple(whole.mine(x) for x in found)
        scores = self.scores if bias is None else self.scores + whole.rows(bias)[self.cols]
        return self._sums(scores, self.rows, shift, None)

    def _sums(self, scores: Tensor, anchor: Tensor, shift: Tensor, whole) -> tuple[Tensor, ...]:
        """whole: over whose ranks, if anchors have pairs on others."""
        scores = scores - shift[anchor]

        def add(values: Tensor) -> Tensor:
            return torch.zeros_like(shift).index_put((anchor,), values, accumulate=True)

        counted = self.weights != 0
        found = scores.detach().masked_fill(~counted, -torch.inf)
        top = torch.full_like(shift, -torch.inf).scatter_reduce(0, anchor, found, "amax")
        top = finite_shift(whole.largest(top) if whole else top)
        exp = torch.where(counted, scores - top[anchor], 0).exp()
        sums = torch.stack([add(self.weights * x) for x in (torch.ones_like(exp), exp, scores)])
        k, sum_of_exp, total = whole.shared_sum(sums) if whole else sums
        log_sum = torch.where(sum_of_exp > 0, sum_of_exp, 1).log() + top
        return k, total / torch.where(k == 0, 1, k), log_sum
