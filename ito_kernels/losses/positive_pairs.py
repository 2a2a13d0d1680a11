"""The positives of InfoNCE: the keys with an anchor's id, or pairs in a list.

`PositivesById` and `PositivesByPair` return, for the anchors of one direction,

    count()                    the number of positives, or the sum of their weights
    mean(shift)                the weighted mean of S - shift over the positives
    log_sum(shift)             log Σ w·e^{S - shift} over the positives, 0 without any
    log_sum_unweighted(shift)  the same with every distinct pair once and weight 1: the positives'
                               part of the denominator
    sum_unweighted(shift)      Σ (S - shift) and their number, likewise of the distinct pairs
    reference_shift()          a constant close to the scores of the positives
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from .precision import row_dot, take_rows
from .scores import Scores


class PositivesById:
    """The keys whose id equals that of the anchor.

    exclude_positives: whether the pass that `log_sum` shares with the denominator leaves the
        positives out of max and logsum. `pos` always has them.
    """

    def __init__(self, scores: Scores, side: str, exclude_positives: bool):
        self.scores, self.side, self.exclude_positives = scores, side, exclude_positives

    def count(self) -> Tensor:
        return self.scores.positive_counts(self.side)

    def mean(self, shift: Tensor) -> Tensor:
        if self.exclude_positives and self.scores.query_ids is None:
            return self.log_sum(shift)  # without ids there is at most one positive
        statistics = self.scores.statistics(positives="linear", exclude_positives=False)
        return statistics[self.side].positive_statistic(shift, self.count())

    def log_sum(self, shift: Tensor) -> Tensor:
        exclude = self.exclude_positives
        statistics = self.scores.statistics(positives="lse", exclude_positives=exclude)
        return torch.where(self.count() > 0, statistics[self.side].positive_statistic(shift), 0)

    log_sum_unweighted = log_sum

    def sum_unweighted(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(shift) * self.count(), self.count()

    def reference_shift(self) -> Tensor:
        zero = torch.zeros_like(self.scores.statistics(positives="lse")[self.side].shift)
        return self.log_sum(zero).detach()


class PositivePairs:
    """P positive pairs (row, column) with weights, for positives that no ids can express:
    multi-label data, graphs, mixtures. Memory O(P·D).

    weights: 1 by default. A pair with weight 0 is not a positive.

    With a group, rows are this rank's local row numbers. Columns are global: the keys of all ranks
    are gathered.

    padding: which pairs have a padded row or column, whose features may be NaN; None for none.
    """

    def __init__(
        self,
        scores: Scores,
        rows: Tensor,
        cols: Tensor,
        weights: Tensor | None,
        padding: Tensor | None = None,
    ):
        self.scores, self.rows, self.cols, self.padding = scores, rows, cols, padding
        scale = scores.scale[rows] if scores.scale.ndim else scores.scale
        self.pair_scores = scale * self.inner_products(scores.queries, scores.keys)
        self.weights = torch.ones_like(self.pair_scores) if weights is None else weights
        if padding is not None:
            self.weights = self.weights.masked_fill(padding, 0)
        if scores.exclude_self:
            self.weights = self.weights.masked_fill(rows + scores.diagonal == cols, 0)

    @classmethod
    def of_rows(cls, scores: Scores) -> PositivePairs:
        """Row i of the queries and row i of the keys, unless one of the two is padded."""
        rows = torch.arange(len(scores.queries), device=scores.queries.device)
        padding = None
        if scores.query_ids is not None:
            padding = (scores.query_ids < 0) | (scores.key_ids < 0)
        start = scores.global_batch.local_range("row").start
        return cls(scores, rows, rows + start, None, padding)

    def anchors(self, side: str) -> Tensor:
        return self.rows if side == "row" else self.cols

    def inner_products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The inner product of each pair, (P,). queries, keys: this rank's, of any width."""
        a = take_rows(queries, self.rows)
        b = take_rows(self.scores.global_batch.all_gather_rows(keys), self.cols)
        if self.padding is not None:
            a, b = (x.masked_fill(self.padding[:, None], 0) for x in (a, b))
        return row_dot(a, b)

    def linear_indices(self) -> Tensor:
        """row · (number of columns) + column for each pair, -1 for pairs with weight 0."""
        index = self.rows * self.scores.global_batch.global_count("col") + self.cols
        return torch.where(self.weights != 0, index, -1)


class PositivesByPair:
    """Positives in a list of pairs, for the anchors of one direction."""

    def __init__(self, pairs: PositivePairs, side: str):
        self.pairs, self.side = pairs, side
        self.batch, self.anchors = pairs.scores.global_batch, pairs.anchors(side)
        self._count = self._sum_per_anchor(pairs.weights)

    def count(self) -> Tensor:
        return self._count

    def mean(self, shift: Tensor) -> Tensor:
        k = self.count()
        total = self._sum_per_anchor(self.pairs.weights * self._shifted_scores(shift))
        return total / torch.where(k == 0, 1, k)

    def log_sum(self, shift: Tensor) -> Tensor:
        return self._log_sum(shift, self.pairs.weights)

    def log_sum_unweighted(self, shift: Tensor) -> Tensor:
        return self._log_sum(shift, self._distinct())

    def sum_unweighted(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        distinct = self._distinct()
        total = self._sum_per_anchor(distinct * self._shifted_scores(shift))
        return total, self._sum_per_anchor(distinct)

    def reference_shift(self) -> Tensor:
        return self.mean(torch.zeros_like(self._count)).detach()

    def _distinct(self) -> Tensor:
        """1 for the first of equal pairs, 0 for the others and for pairs with weight 0."""
        ordered, order = self.pairs.linear_indices().sort(stable=True)
        first = ordered >= 0
        first[1:] &= ordered[1:] != ordered[:-1]
        first = torch.empty_like(first).index_copy_(0, order, first)
        return first.to(self._count.dtype)

    def _shifted_scores(self, shift: Tensor) -> Tensor:
        """S - shift of each pair."""
        bias, padding = self.pairs.scores.bias(self.side), self.pairs.padding
        shift = shift if self.side == "row" else self.batch.all_gather_rows(shift)
        scores = self.pairs.pair_scores - take_rows(shift, self.anchors)
        if bias is None:
            return scores
        bias = take_rows(self.batch.all_gather_rows(bias), self.pairs.cols)
        return scores + (bias if padding is None else bias.masked_fill(padding, 0))

    def _full_per_anchor(self, x: Tensor, value: float) -> Tensor:
        """A vector filled with `value`: one element per local row, or per column of all ranks."""
        row, scores = self.side == "row", self.pairs.scores
        return x.new_full((len(scores.queries) if row else self.batch.global_count("col"),), value)

    def _sum_per_anchor(self, values: Tensor) -> Tensor:
        """The sum of `values` over the pairs of each of this rank's anchors."""
        total = self._full_per_anchor(values, 0)
        total = total.index_put((self.anchors,), values, accumulate=True)
        if self.side == "row":
            return total
        return self.batch.local_columns(self.batch.all_reduce_sum(total))

    def _log_sum(self, shift: Tensor, weights: Tensor) -> Tensor:
        """log Σ w·e^(S - shift) per anchor."""
        row, scores, counted = self.side == "row", self._shifted_scores(shift), weights != 0
        masked = scores.detach().masked_fill(~counted, -torch.inf)
        maximum = self._full_per_anchor(scores, -torch.inf)
        maximum = maximum.scatter_reduce(0, self.anchors, masked, "amax")
        maximum = finite_shift(maximum if row else self.batch.all_reduce_max(maximum))
        exp = torch.where(counted, scores - take_rows(maximum, self.anchors), 0).exp()
        total = self._sum_per_anchor(weights * exp)
        maximum = maximum if row else self.batch.local_columns(maximum)
        return torch.where(total > 0, total, 1).log() + maximum


class PositivesAsCandidates:
    """The positives as a pool of candidates (see `pools`), apart from the batch's negatives."""

    def __init__(self, positives: PositivesById | PositivesByPair):
        self.positives = positives

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        assert power == 1, "reweighting sums the negatives alone"
        log_sum = self.positives.log_sum_unweighted(shift)
        return torch.where(self.positives.count() > 0, log_sum, -torch.inf)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.positives.sum_unweighted(shift)

    def reference_shift(self, power: float) -> Tensor:
        return self.positives.reference_shift()
