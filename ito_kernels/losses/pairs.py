"""Positives as a list of pairs: their scores, and what they leave as negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from .batch import OTHER, Batch, Direction
from .panels import Mask, log_sums
from .precision import inner, take


class Positives:
    """What no ids can say (multi-label data, graphs, mixtures): P pairs (row, column) of a batch,
    and their weights (1 by default; a pair with a weight of 0 is no positive). Memory O(P·D).

    With a group rows are this rank's and columns are everyone's, whose keys are gathered.
    """

    def __init__(self, batch: Batch, rows: Tensor, cols: Tensor, weights: Tensor | None):
        self.batch, self.rows, self.cols = batch, rows, cols
        keys = batch.whole.rows(batch.keys)
        scale = batch.scale[rows] if batch.scale.ndim else batch.scale
        self.scores = scale * inner(take(batch.queries, rows), take(keys, cols))
        self.weights = torch.ones_like(self.scores) if weights is None else weights
        if batch.exclude_self:
            self.weights = self.weights.masked_fill(rows + batch.diagonal == cols, 0)

    def of(self, side: str, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per anchor: the total weight k, Σ w·(S - shift) / k and log Σ w·e^(S - shift)."""
        scores = self._scores(side, shift)
        k = self._add(side, self.weights)
        mean = self._add(side, self.weights * scores) / torch.where(k == 0, 1, k)
        return k, mean, self._log_sum(side, scores, self.weights)

    def log_sum(self, side: str, shift: Tensor) -> Tensor:
        """log Σ e^(S - shift) over the pairs of each anchor, each once whatever its weight."""
        ordered, order = self._codes("row").sort(stable=True)
        once = ordered >= 0
        once[1:] &= ordered[1:] != ordered[:-1]
        once = torch.empty_like(once).index_copy_(0, order, once)
        return self._log_sum(side, self._scores(side, shift), once.to(shift.dtype))

    def negatives(self, side: str, powers: tuple[float, ...]) -> Negatives:
        """Of everything that is no positive."""
        batch, row, whole = self.batch, side == "row", self.batch.whole
        a, b = batch.features(side), whole.rows(batch.features(OTHER[side]))
        scale, bias = batch.scale.expand(len(batch.queries)), batch.bias(side)
        mask = Mask(
            None,
            None,
            batch.row_limit if row else batch.col_limit,
            pairs=self._codes(side),
            exclude_self=batch.exclude_self,
            diagonal=whole.numbers(0 if row else 1).start,
        )
        top, number, sums = log_sums(
            *(a, b, scale[:, None] if row else whole.rows(scale)),
            *(None if bias is None else whole.rows(bias), mask, powers),
        )
        logs = {p: Direction(p * top, x, None, None) for p, x in zip(powers, sums, strict=True)}
        return Negatives(logs, number)

    def _codes(self, side: str) -> Tensor:
        """Each pair as one number, in order of this rank's anchors; -1 for what has no weight and
        for the anchors of other ranks."""
        whole, mine = self.batch.whole, self.batch.whole.numbers(0 if side == "row" else 1)
        anchors, others, weights = self.rows + whole.numbers(0).start, self.cols, self.weights
        if side == "col":  # whose pairs are with rows of any rank
            anchors, others, weights = (whole.rows(x) for x in (others, anchors, weights))
        code = (anchors - mine.start) * self.batch.number(OTHER[side]) + others
        own = (anchors >= mine.start) & (anchors < mine.stop)
        return torch.where(own & (weights != 0), code, -1)

    def _scores(self, side: str, shift: Tensor) -> Tensor:
        whole, bias = self.batch.whole, self.batch.bias(side)
        shift = shift if side == "row" else whole.rows(shift)
        scores = self.scores - take(shift, self._anchors(side))
        return scores if bias is None else scores + take(whole.rows(bias), self.cols)

    def _anchors(self, side: str) -> Tensor:
        return self.rows if side == "row" else self.cols

    def _all(self, side: str, x: Tensor, value: float) -> Tensor:
        """Memory for one number of each anchor: of this rank's rows, of everyone's columns."""
        number = len(self.batch.queries) if side == "row" else self.batch.number("col")
        return x.new_full((number,), value)

    def _add(self, side: str, values: Tensor) -> Tensor:
        """The sum over the pairs of each of this rank's anchors."""
        whole, anchors = self.batch.whole, self._anchors(side)
        total = self._all(side, values, 0).index_put((anchors,), values, accumulate=True)
        return total if side == "row" else whole.mine(whole.shared_sum(total))

    def _log_sum(self, side: str, scores: Tensor, weights: Tensor) -> Tensor:
        """log Σ w·e^score per anchor."""
        whole, anchors, counted = self.batch.whole, self._anchors(side), weights != 0
        found = scores.detach().masked_fill(~counted, -torch.inf)
        top = self._all(side, scores, -torch.inf).scatter_reduce(0, anchors, found, "amax")
        top = finite_shift(top if side == "row" else whole.largest(top))
        exp = torch.where(counted, scores - take(top, anchors), 0).exp()
        total = self._add(side, weights * exp)
        own = top if side == "row" else whole.mine(top)
        return torch.where(total > 0, total, 1).log() + own


class Negatives(NamedTuple):
    """The statistics of p·S by p, and how many negatives each anchor has."""

    sums: dict[float, Direction]
    number: Tensor
