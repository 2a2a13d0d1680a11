"""The candidates of InfoNCE, in pools: the batch, a queue of keys, hard negatives of each query.

A pool is candidates of the anchors of one direction. It answers, per anchor,

    log_sum(power, shift)   log Σ_j e^{power·(S_ij - shift_i)}, -inf without candidates
    number()                how many candidates there are
    total(shift)            Σ_j (S_ij - shift_i) with their number, for label smoothing

A new kind of candidate is a class here and a line in `infonce.pools_of`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity import similarity_logsumexp
from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Stats
from .masked import Mask, log_sums, sums_of_rest
from .positive_pairs import Pairs
from .precision import accumulated, logaddexp
from .scores import OTHER, Direction, Scores


class InBatch:
    """The batch's candidates, or under `exclude_positives` those of them that are negatives.

    positives: what the pass is asked for beside, so that it is the one that the positives use.
    """

    def __init__(self, scores: Scores, side: str, **what):
        self.scores, self.side, self.what = scores, side, what
        self.negatives = what.get("exclude_positives", False)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        return self._found(power).log_sum(power, shift)

    def number(self) -> Tensor:
        number = self.scores.candidates(self.side)
        return number - self.scores.positives(self.side) if self.negatives else number

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        total, number = self.scores.total(self.side)
        return total - number * shift, number

    def largest(self, power: float) -> Tensor:
        """A score beside the largest, 0 without candidates."""
        found = self._found(power)
        return found.shift if power == 1 else found.shift / power

    def _found(self, power: float) -> Direction:
        return self.scores.statistics(power, **self.what)[self.side]


class Unlisted:
    """All of the batch that is not in a list of positive pairs: what no kernel can tell, found in
    panels. powers: those at which sums will be asked for."""

    def __init__(self, pairs: Pairs, side: str, powers: tuple[float, ...]):
        scores, batch, row = pairs.batch, pairs.batch.global_batch, side == "row"
        a, b = scores.features(side), batch.all_gather_rows(scores.features(OTHER[side]))
        scale, bias = scores.scale.expand(len(scores.queries)), scores.bias(side)
        mask = Mask(
            None,
            None,
            scores.limit(side),
            pairs=pairs.codes(side),
            exclude_self=scores.exclude_self,
            diagonal=batch.local_range(side).start,
        )
        scale = scale[:, None] if row else batch.all_gather_rows(scale)
        bias = None if bias is None else batch.all_gather_rows(bias)
        self.powers = powers
        self.top, self.left, self.sums = log_sums(a, b, scale, bias, mask, powers)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        return self.sums[self.powers.index(power)] + power * (self.top - shift)

    def number(self) -> Tensor:
        return self.left

    def largest(self, power: float) -> Tensor:
        return finite_shift(self.top)


class Queue:
    """Keys of earlier batches, without gradient; those with the id of a query are left out of it.

    queue: (Q, D). queue_ids: (Q,), or None if no key of the queue belongs to any query.
    """

    def __init__(self, scores: Scores, queue: Tensor, queue_ids: Tensor | None):
        self.scores, self.alike = scores, queue_ids is not None
        self.queue = queue.detach().to(scores.queries.dtype)
        n, device, ids = len(scores.queries), queue.device, scores.query_ids
        if self.alike:
            self.rows = torch.arange(n, device=device) if ids is None else ids
            self.cols = queue_ids
        else:
            zeros = torch.zeros(n, dtype=torch.long, device=device)
            self.rows = zeros if ids is None else ids.clamp(max=0)  # padding stays padding
            self.cols = torch.ones(len(queue), dtype=torch.long, device=device)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        stats = self._statistics(power, exclude_positives=True)
        return stats.row_logsum + (stats.row_max - power * shift)

    def number(self) -> Tensor:
        if self.scores.row_limit is not None:  # as in Scores.candidates
            with torch.no_grad():
                return self._statistics(0.0, exclude_positives=True).row_logsum.exp().round()
        same = count_positives(self.rows, self.cols)
        return ((self.cols >= 0).sum() - same).to(self.scores.scale.dtype)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scores.scale
        keys = accumulated(self.queue).masked_fill((self.cols < 0)[:, None], 0)
        rows = accumulated(self.scores.queries).masked_fill((self.rows < 0)[:, None], 0)
        if self.scores.row_limit is not None:
            mask = Mask(self.rows, self.cols, self.scores.row_limit, exclude_positives=True)
            ones = torch.ones_like(keys[:, :1])
            sums = sums_of_rest(rows, keys, mask, torch.cat([keys, ones], 1))
            number = sums[:, -1]
            return scale * (rows * sums[:, :-1]).sum(1) - number * shift, number
        number = self.number()
        total = scale * (rows * keys.sum(0)).sum(1) - number * shift
        if self.alike:
            stats = self._statistics(1.0, positives="linear")
            same = count_positives(self.rows, self.cols)
            total = total - (stats.row_pos + same * finite_shift(stats.row_max))
        return total, number

    def _statistics(self, power: float, **flags) -> Stats:
        return similarity_logsumexp(
            self.scores.queries,
            self.queue,
            power * self.scores.scale,
            row_ids=self.rows,
            col_ids=self.cols,
            row_limit=self.scores.row_limit,
            cols=False,
            backend=self.scores.backend,
            **flags,
        )


class HardNegatives:
    """K keys for each query, candidates of that query alone: (N, K, D)."""

    def __init__(self, scores: Scores, hard_negatives: Tensor):
        rows = accumulated(scores.queries)
        if scores.query_ids is not None:  # padding may hold anything
            padded = (scores.query_ids < 0)[:, None]
            rows = rows.masked_fill(padded, 0)
            hard_negatives = hard_negatives.masked_fill(padded[:, :, None], 0)
        products = torch.bmm(accumulated(hard_negatives), rows[:, :, None]).squeeze(2)
        self.beyond = torch.zeros_like(products, dtype=torch.bool)
        if scores.row_limit is not None:
            self.beyond = products > scores.row_limit[:, None]
        self.scores = (scores.scale.reshape(-1, 1) * products).masked_fill(self.beyond, -torch.inf)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        scores = power * (self.scores - shift[:, None])
        nothing = (scores == -torch.inf).all(1)  # whose gradient would be NaN
        total = scores.masked_fill(nothing[:, None], 0).logsumexp(1)
        return total.masked_fill(nothing, -torch.inf)

    def number(self) -> Tensor:
        return (~self.beyond).sum(1)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        scores = (self.scores - shift[:, None]).masked_fill(self.beyond, 0)
        return scores.sum(1), self.number()


class Union:
    """Several pools as one. ids: of the anchors; those with a negative one have no candidates."""

    def __init__(self, pools: list, ids: Tensor | None):
        self.pools, self.ids = pools, ids

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        total, *more = (pool.log_sum(power, shift) for pool in self.pools)
        for x in more:
            total = logaddexp(total, x)
        return total

    def number(self) -> Tensor:
        number = sum(pool.number() for pool in self.pools)
        return number if self.ids is None else number.masked_fill(self.ids < 0, 0)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        totals, numbers = zip(*(pool.total(shift) for pool in self.pools), strict=True)
        return sum(totals), sum(numbers)

    def largest(self, power: float) -> Tensor:
        """A score beside the largest of the first pool, to which all are relative."""
        return self.pools[0].largest(power)
