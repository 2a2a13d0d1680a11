"""Positives as a list of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from .batch import Batch
from .precision import inner, take


class Positives:
    """What no ids can say (multi-label data, graphs, mixtures): P pairs (row, column) of a batch,
    and their weights (1 by default). Memory O(P·D)."""

    def __init__(self, batch: Batch, rows: Tensor, cols: Tensor, weights: Tensor | None):
        self.batch, self.rows, self.cols = batch, rows, cols
        scale = batch.scale[rows] if batch.scale.ndim else batch.scale
        self.scores = scale * inner(take(batch.queries, rows), take(batch.keys, cols))
        self.weights = torch.ones_like(self.scores) if weights is None else weights
        if batch.exclude_self:
            self.weights = self.weights.masked_fill(rows == cols, 0)

    def of(self, side: str, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per anchor: the total weight k, Σ w·(S - shift) / k and log Σ w·e^(S - shift)."""
        anchor, bias = (self.rows if side == "row" else self.cols), self.batch.bias(side)
        scores = self.scores - shift[anchor]
        if bias is not None:
            scores = scores + bias[self.cols]

        def add(values: Tensor) -> Tensor:
            return torch.zeros_like(shift).index_put((anchor,), values, accumulate=True)

        counted = self.weights != 0
        found = scores.detach().masked_fill(~counted, -torch.inf)
        top = finite_shift(
            torch.full_like(shift, -torch.inf).scatter_reduce(0, anchor, found, "amax")
        )
        exp = torch.where(counted, scores - top[anchor], 0).exp()
        k, sum_of_exp = add(self.weights), add(self.weights * exp)
        log_sum = torch.where(sum_of_exp > 0, sum_of_exp, 1).log() + top
        return k, add(self.weights * scores) / torch.where(k == 0, 1, k), log_sum
