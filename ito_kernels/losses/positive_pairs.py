"""The positives of InfoNCE: the keys with an anchor's id, or pairs in a list.

Both answer, for the anchors of one direction,

    number()          how many positives there are, or their weight
    mean(shift)       the mean of S - shift over them
    log_sum(shift)    log Σ e^{S - shift} over them, 0 without any, weighted where there are weights
    once(shift)       the same with each pair once, whatever its weight: their part of D
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from .precision import inner, take
from .scores import OTHER, Scores


class SameId:
    """exclude_positives: whether the pass of D, which gives log_sum too, leaves them out."""

    def __init__(self, scores: Scores, side: str, exclude_positives: bool):
        self.scores, self.side, self.exclude_positives = scores, side, exclude_positives

    def number(self) -> Tensor:
        return self.scores.positives(self.side)

    def mean(self, shift: Tensor) -> Tensor:
        if self.exclude_positives and self.scores.query_ids is None:
            return self.log_sum(shift)  # of one positive at most
        found = self.scores.statistics(positives="linear", exclude_positives=False)[self.side]
        return found.positive(shift, self.number())

    def log_sum(self, shift: Tensor) -> Tensor:
        found = self.scores.statistics(positives="lse", exclude_positives=self.exclude_positives)
        return torch.where(self.number() > 0, found[self.side].positive(shift), 0)

    once = log_sum


class Pairs:
    """What no ids can say (multi-label data, graphs, mixtures): P pairs (row, column) of a batch,
    and their weights (1 by default; a pair with a weight of 0 is no positive). Memory O(P·D).

    With a group rows are this rank's and columns are all ranks', whose keys are gathered.
    """

    def __init__(self, batch: Scores, rows: Tensor, cols: Tensor, weights: Tensor | None):
        self.batch, self.rows, self.cols = batch, rows, cols
        keys = batch.global_batch.all_gather_rows(batch.keys)
        scale = batch.scale[rows] if batch.scale.ndim else batch.scale
        self.scores = scale * inner(take(batch.queries, rows), take(keys, cols))
        self.weights = torch.ones_like(self.scores) if weights is None else weights
        if batch.exclude_self:
            self.weights = self.weights.masked_fill(rows + batch.diagonal == cols, 0)

    def anchors(self, side: str) -> Tensor:
        return self.rows if side == "row" else self.cols

    def codes(self, side: str) -> Tensor:
        """Each pair as one number, in order of this rank's anchors; -1 for what has no weight and
        for the anchors of other ranks."""
        batch = self.batch.global_batch
        local, first_row = batch.local_range(side), batch.local_range("row").start
        anchors, others, weights = self.rows + first_row, self.cols, self.weights
        if side == "col":  # whose pairs are with rows of any rank
            anchors, others = batch.all_gather_rows(others), batch.all_gather_rows(anchors)
            weights = batch.all_gather_rows(weights)
        code = (anchors - local.start) * batch.global_count(OTHER[side]) + others
        is_local = (anchors >= local.start) & (anchors < local.stop)
        return torch.where(is_local & (weights != 0), code, -1)


class Listed:
    """Pairs, for the anchors of one direction."""

    def __init__(self, pairs: Pairs, side: str):
        self.pairs, self.side = pairs, side
        self.batch, self.anchors = pairs.batch.global_batch, pairs.anchors(side)
        self._number = self._add(pairs.weights)

    def number(self) -> Tensor:
        return self._number

    def mean(self, shift: Tensor) -> Tensor:
        k = self.number()
        return self._add(self.pairs.weights * self._scores(shift)) / torch.where(k == 0, 1, k)

    def log_sum(self, shift: Tensor) -> Tensor:
        return self._log_sum(shift, self.pairs.weights)

    def once(self, shift: Tensor) -> Tensor:
        ordered, order = self.pairs.codes("row").sort(stable=True)
        first = ordered >= 0
        first[1:] &= ordered[1:] != ordered[:-1]
        first = torch.empty_like(first).index_copy_(0, order, first)
        return self._log_sum(shift, first.to(shift.dtype))

    def _scores(self, shift: Tensor) -> Tensor:
        """S - shift of each pair."""
        bias = self.pairs.batch.bias(self.side)
        shift = shift if self.side == "row" else self.batch.all_gather_rows(shift)
        scores = self.pairs.scores - take(shift, self.anchors)
        if bias is None:
            return scores
        return scores + take(self.batch.all_gather_rows(bias), self.pairs.cols)

    def _all(self, x: Tensor, value: float) -> Tensor:
        """Memory for one number of each anchor: of this rank's rows, of all ranks' columns."""
        row, pairs = self.side == "row", self.pairs.batch
        return x.new_full((len(pairs.queries) if row else self.batch.global_count("col"),), value)

    def _add(self, values: Tensor) -> Tensor:
        """The sum over the pairs of each of this rank's anchors."""
        total = self._all(values, 0).index_put((self.anchors,), values, accumulate=True)
        if self.side == "row":
            return total
        return self.batch.local_columns(self.batch.all_reduce_sum(total))

    def _log_sum(self, shift: Tensor, weights: Tensor) -> Tensor:
        """log Σ w·e^(S - shift) per anchor."""
        row, scores, counted = self.side == "row", self._scores(shift), weights != 0
        found = scores.detach().masked_fill(~counted, -torch.inf)
        top = self._all(scores, -torch.inf).scatter_reduce(0, self.anchors, found, "amax")
        top = finite_shift(top if row else self.batch.all_reduce_max(top))
        exp = torch.where(counted, scores - take(top, self.anchors), 0).exp()
        total = self._add(weights * exp)
        top = top if row else self.batch.local_columns(top)
        return torch.where(total > 0, total, 1).log() + top
