"""The candidates of InfoNCE, in pools: the batch, a queue of keys, hard negatives of each query.

A pool holds candidates for the anchors of one direction. Per anchor it returns

    log_sum(power, shift)   log Σ_j e^{power·(S_ij - shift_i)}, -inf without candidates
    count()                 the number of candidates
    total(shift)            Σ_j (S_ij - shift_i) and the number of candidates, for label smoothing

A new kind of candidate is a class here and a line in `infonce.candidate_pools`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..similarity import similarity_logsumexp
from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Stats
from .masked import Mask, unmasked_sums
from .positive_pairs import PositivePairs
from .precision import logaddexp, multiply_gradient, to_accumulate_dtype
from .scores import Direction, Scores


class InBatchCandidates:
    """The candidates of the batch; with `exclude_positives` only its negatives.

    statistics_options: arguments of `Scores.statistics`. They are those of the pass that computes
    the positives' scores, so that one pass serves both.
    """

    def __init__(self, scores: Scores, side: str, **statistics_options):
        self.scores, self.side, self.statistics_options = scores, side, statistics_options
        self.negatives_only = statistics_options.get("exclude_positives", False)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        return self._direction(power).log_sum(power, shift)

    def count(self) -> Tensor:
        number = self.scores.candidate_counts(self.side)
        return number - self.scores.positive_counts(self.side) if self.negatives_only else number

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        total, number = self.scores.score_sums(self.side)
        total = total - number * shift
        if self.negatives_only:  # `positives` is "linear" in the pass that was asked for
            k = self.scores.positive_counts(self.side)
            total = total - k * self._direction(1.0).positive_statistic(shift, k)
            number = number - k
        return total, number

    def reference_shift(self, power: float) -> Tensor:
        """A constant close to the largest score of each anchor, 0 without candidates."""
        direction = self._direction(power)
        return direction.shift if power == 1 else direction.shift / power

    def _direction(self, power: float) -> Direction:
        return self.scores.statistics(power, **self.statistics_options)[self.side]


class UnpairedCandidates:
    """The pairs of the batch that are not in a list of positive pairs.

    No kernel takes such a list: the sums are computed in PyTorch, a panel of rows at a time.
    powers: the exponents for which `log_sum` will be called. totals: whether `total` will be.
    """

    def __init__(
        self,
        scores: Scores,
        pairs: PositivePairs,
        side: str,
        powers: tuple[float, ...],
        totals: bool = False,
    ):
        self.powers = powers
        statistics = scores.unpaired_statistics(pairs.linear_indices(), powers, totals)[side]
        self.max, self.number, self.log_sums, self.total_score = statistics

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        return self.log_sums[self.powers.index(power)] + power * (self.max - shift)

    def count(self) -> Tensor:
        return self.number

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.total_score - self.number * shift, self.number

    def reference_shift(self, power: float) -> Tensor:
        return finite_shift(self.max)


class QueueCandidates:
    """Keys of earlier batches, without gradient. Keys with the id of a query are no candidates of
    that query.

    queue: (Q, D). queue_ids: (Q,), or None if no key of the queue has the id of a query.
    boost: as in `Scores`.
    """

    def __init__(self, scores: Scores, queue: Tensor, queue_ids: Tensor | None, boost: float = 0.0):
        if boost:  # as in `Scores.boosted`; without gradient of the keys, also a scale per query
            factor = (scores.scale / (scores.scale + boost)).detach().reshape(-1, 1)
            queries = multiply_gradient(scores.queries, factor)
            scores = replace(scores, queries=queries, scale=scores.scale + boost)
        self.scores, self.has_ids = scores, queue_ids is not None
        self.queue = queue.detach().to(scores.queries.dtype)
        n, device, ids = len(scores.queries), queue.device, scores.query_ids
        if self.has_ids:
            self.row_ids = torch.arange(n, device=device) if ids is None else ids
            self.col_ids = queue_ids
        else:  # id 0 for every query and 1 for every key: no positives; padding keeps its id
            zeros = torch.zeros(n, dtype=torch.long, device=device)
            self.row_ids = zeros if ids is None else ids.clamp(max=0)
            self.col_ids = torch.ones(len(queue), dtype=torch.long, device=device)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        stats = self._statistics(power, exclude_positives=True)
        # NaN if the queue is infinite. Otherwise e^-inf = 0, or a limit on e^inf, would hide that.
        rows = self.queue.masked_fill((self.col_ids < 0)[:, None], 0)
        infinite = 0 * rows.sum().to(shift)
        return stats.row_logsum + (stats.row_max - power * shift) + infinite

    def count(self) -> Tensor:
        if self.scores.row_limit is not None:  # as in Scores.candidate_counts
            with torch.no_grad():
                zeros = self._statistics(0.0, exclude_positives=True)
                return (zeros.row_logsum + zeros.row_max).exp().round()
        same = count_positives(self.row_ids, self.col_ids)
        return ((self.col_ids >= 0).sum() - same).to(self.scores.scale.dtype)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scores.scale
        keys = to_accumulate_dtype(self.queue).masked_fill((self.col_ids < 0)[:, None], 0)
        rows = to_accumulate_dtype(self.scores.queries)
        rows = rows.masked_fill((self.row_ids < 0)[:, None], 0)
        if self.scores.row_limit is not None:
            limit = self.scores.row_limit
            mask = Mask(self.row_ids, self.col_ids, limit, exclude_positives=True)
            ones = torch.ones_like(keys[:, :1])
            sums = unmasked_sums(rows, keys, mask, torch.cat([keys, ones], 1))
            number = sums[:, -1]
            return scale * (rows * sums[:, :-1]).sum(1) - number * shift, number
        number = self.count()
        total = scale * (rows * keys.sum(0)).sum(1) - number * shift
        if self.has_ids:
            stats = self._statistics(1.0, positives="linear")
            same = count_positives(self.row_ids, self.col_ids)
            total = total - (stats.row_pos + same * finite_shift(stats.row_max))
        return total, number

    def _statistics(self, power: float, **options) -> Stats:
        return similarity_logsumexp(
            self.scores.queries,
            self.queue,
            power * self.scores.scale,
            row_ids=self.row_ids,
            col_ids=self.col_ids,
            row_limit=self.scores.row_limit,
            cols=False,
            exact_max=False,
            half_values=self.scores.half_values,
            backend=self.scores.backend,
            **options,
        )


class HardNegatives:
    """K keys for each query, (N, K, D). They are candidates of that query only.

    ids: (N, K), or None. A key with the id of its query, or a negative id, is no candidate.
    boost: as in `Scores`.
    """

    def __init__(
        self, scores: Scores, hard_negatives: Tensor, ids: Tensor | None, boost: float = 0.0
    ):
        rows = to_accumulate_dtype(scores.queries)
        if scores.query_ids is not None:  # padded rows may contain any values
            padded = (scores.query_ids < 0)[:, None]
            rows = rows.masked_fill(padded, 0)
            hard_negatives = hard_negatives.masked_fill(padded[:, :, None], 0)
        products = torch.bmm(to_accumulate_dtype(hard_negatives), rows[:, :, None]).squeeze(2)
        products = products.masked_fill(products == -torch.inf, torch.nan)  # shows in the loss
        self.excluded = torch.zeros_like(products, dtype=torch.bool)
        if ids is not None:
            own = scores.query_ids
            own = torch.arange(len(ids), device=ids.device) if own is None else own
            self.excluded = (ids < 0) | (ids == own[:, None])
        if scores.row_limit is not None:
            above = (products > scores.row_limit[:, None]) & (products != torch.inf)
            self.excluded = self.excluded | above
        scaled = scores.scale.reshape(-1, 1) * products
        if boost:
            scaled = scaled + boost * products.detach()
        self.values = scaled.masked_fill(self.excluded, -torch.inf)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        scores = power * (self.values - shift[:, None])
        empty = (scores == -torch.inf).all(1)  # the gradient of logsumexp would be NaN
        total = scores.masked_fill(empty[:, None], 0).logsumexp(1)
        return total.masked_fill(empty, -torch.inf)

    def count(self) -> Tensor:
        return (~self.excluded).sum(1).to(self.values.dtype)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        scores = (self.values - shift[:, None]).masked_fill(self.excluded, 0)
        return scores.sum(1), self.count()


class CombinedPools:
    """Several pools as one.

    ids: the ids of the anchors. An anchor with a negative id has no candidates.
    """

    def __init__(self, pools: list, ids: Tensor | None):
        self.pools, self.ids = pools, ids

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        total, *more = (pool.log_sum(power, shift) for pool in self.pools)
        for x in more:
            total = logaddexp(total, x)
        return total

    def count(self) -> Tensor:
        number = sum(pool.count() for pool in self.pools)
        return number if self.ids is None else number.masked_fill(self.ids < 0, 0)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        totals, numbers = zip(*(pool.total(shift) for pool in self.pools), strict=True)
        return sum(totals), sum(numbers)

    def reference_shift(self, power: float) -> Tensor:
        """The reference shift of the first pool, used for all of them."""
        return self.pools[0].reference_shift(power)
