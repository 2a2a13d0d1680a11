"""Candidates of the queries beyond the batch: a queue of keys, and hard negatives of each query.

All are negatives. Both give, for each query and relative to a constant `shift` (N,) of the scores:
log Σ exp(power·(S - shift)) over its candidates, their number, and Σ (S - shift) with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity import similarity_logsumexp
from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Stats
from .batch import Batch
from .options import Options
from .panels import Mask, sums_of_rest
from .precision import accumulated


def extra_candidates(batch: Batch, o: Options) -> list[Queue | HardNegatives]:
    extra = []
    if o.queue is not None:
        extra.append(Queue(batch, o.queue, o.queue_ids))
    if o.hard_negatives is not None:
        extra.append(HardNegatives(batch, o.hard_negatives))
    return extra


class Queue:
    """Keys of earlier batches, without gradient; those with the id of a query are left out of it.

    queue: (Q, D). queue_ids: (Q,), or None if no key of the queue belongs to any query.
    """

    def __init__(self, batch: Batch, queue: Tensor, queue_ids: Tensor | None):
        self.batch, self.alike = batch, queue_ids is not None
        self.queue = queue.detach().to(batch.queries.dtype)
        n, device, ids = len(batch.queries), queue.device, batch.query_ids
        if self.alike:
            self.rows = torch.arange(n, device=device) if ids is None else ids
            self.cols = queue_ids
        else:
            zeros = torch.zeros(n, dtype=torch.long, device=device)
            self.rows = zeros if ids is None else ids.clamp(max=0)  # padding stays padding
            self.cols = torch.ones(len(queue), dtype=torch.long, device=device)

    def _statistics(self, power: float, **flags) -> Stats:
        return similarity_logsumexp(
            self.batch.queries,
            self.queue,
            power * self.batch.scale,
            row_ids=self.rows,
            col_ids=self.cols,
            row_limit=self.batch.row_limit,
            cols=False,
            backend=self.batch.backend,
            **flags,
        )

    def logsumexp(self, power: float, shift: Tensor) -> Tensor:
        stats = self._statistics(power, exclude_positives=True)
        return stats.row_logsum + (stats.row_max - power * shift)

    def number(self) -> Tensor:
        if self.batch.row_limit is not None:  # as in Batch.candidates
            with torch.no_grad():
                return self._statistics(0.0, exclude_positives=True).row_logsum.exp().round()
        same = count_positives(self.rows, self.cols)
        return ((self.cols >= 0).sum() - same).to(self.batch.scale.dtype)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        keys = accumulated(self.queue).masked_fill((self.cols < 0)[:, None], 0)
        rows = accumulated(self.batch.queries).masked_fill((self.rows < 0)[:, None], 0)
        if self.batch.row_limit is not None:
            mask = Mask(self.rows, self.cols, self.batch.row_limit, exclude_positives=True)
            ones = torch.ones_like(keys[:, :1])
            sums = sums_of_rest(rows, keys, mask, torch.cat([keys, ones], 1))
            number = sums[:, -1]
            return self.batch.scale * (rows * sums[:, :-1]).sum(1) - number * shift, number
        number = self.number()
        total = self.batch.scale * (rows * keys.sum(0)).sum(1) - number * shift
        if self.alike:
            stats = self._statistics(1.0, positives="linear")
            same = count_positives(self.rows, self.cols)
            total = total - (stats.row_pos + same * finite_shift(stats.row_max))
        return total, number


class HardNegatives:
    """K keys for each query, candidates of that query alone: (N, K, D)."""

    def __init__(self, batch: Batch, hard_negatives: Tensor):
        rows = accumulated(batch.queries)
        if batch.query_ids is not None:  # padding may hold anything
            padded = (batch.query_ids < 0)[:, None]
            rows = rows.masked_fill(padded, 0)
            hard_negatives = hard_negatives.masked_fill(padded[:, :, None], 0)
        products = torch.bmm(accumulated(hard_negatives), rows[:, :, None])
        products = products.squeeze(2)
        self.beyond = torch.zeros_like(products, dtype=torch.bool)
        if batch.row_limit is not None:
            self.beyond = products > batch.row_limit[:, None]
        scores = batch.scale.reshape(-1, 1) * products
        self.scores = scores.masked_fill(self.beyond, -torch.inf)

    def logsumexp(self, power: float, shift: Tensor) -> Tensor:
        scores = power * (self.scores - shift[:, None])
        nothing = (scores == -torch.inf).all(1)  # whose gradient would be NaN
        total = scores.masked_fill(nothing[:, None], 0).logsumexp(1)
        return total.masked_fill(nothing, -torch.inf)

    def number(self) -> Tensor:
        return (~self.beyond).sum(1)

    def total(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        scores = (self.scores - shift[:, None]).masked_fill(self.beyond, 0)
        return scores.sum(1), self.number()
