"""The batch of a single process, with the interface of `GlobalBatch`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.op import logsumexp_of, softplus_of
from ..similarity.spec import Problem, SideUpstream, Stats, Upstream, as_autocast_problem


class LocalBatch:
    """The counterpart of `GlobalBatch` without a group: collectives return their input.

    Ids may be None. The primitive does not check its arguments again, which would take 10 µs: the
    loss has checked them.
    """

    def __init__(
        self,
        query_count: int,
        key_count: int,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ):
        self.query_count, self.key_count = query_count, key_count
        self.query_ids, self.key_ids = query_ids, key_ids

    def with_ids(self, query_ids: Tensor, key_ids: Tensor) -> LocalBatch:
        return LocalBatch(self.query_count, self.key_count, query_ids, key_ids)

    def swapped(self) -> LocalBatch:
        return LocalBatch(self.key_count, self.query_count, self.key_ids, self.query_ids)

    def local_range(self, side: str) -> range:
        return range(self.query_count if side == "row" else self.key_count)

    def global_count(self, side: str) -> int:
        return self.query_count if side == "row" else self.key_count

    def global_ids(self, side: str) -> Tensor | None:
        return self.query_ids if side == "row" else self.key_ids

    def _unchanged(self, x: Tensor) -> Tensor:
        return x

    local_columns = all_gather_rows = broadcast = _unchanged
    all_reduce_loss = all_reduce_sum = all_reduce_max = _unchanged

    def all_reduce_mean(self, x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x, 0).sum() / where.sum().clamp(min=1)

    logsumexp_of = staticmethod(logsumexp_of)

    def similarity_logsumexp(
        self,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        *,
        row_weights: tuple[Tensor, Tensor | None] = (None, None),
        col_weights: tuple[Tensor, Tensor | None] = (None, None),
        return_stats: bool = True,
        backend: str | None = None,
        **fields,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        problem = as_autocast_problem(Problem(a, None if b is a else b, scale, **fields))
        weights = Upstream(SideUpstream(*row_weights), SideUpstream(*col_weights))
        return logsumexp_of(problem, weights, return_stats, backend)

    def similarity_softplus(
        self,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        *,
        row_weights: Tensor | float | None = None,
        backend: str | None = None,
        **fields,
    ) -> Tensor:
        problem = as_autocast_problem(Problem(a, None if b is a else b, scale, **fields))
        return softplus_of(problem, row_weights, backend)
