"""The batch of one process, with the interface of that of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.primitive import logsumexp_of, softplus_of
from ..similarity.spec import Problem, SideUpstream, Stats, Upstream, as_autocast_problem


class LocalBatch:
    """What `GlobalBatch` is without a group: everyone's rows are these, and there is no one to sum
    with. Ids may be None."""

    def __init__(
        self,
        sizes: tuple[int, int],
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ):
        self.sizes, self.query_ids, self.key_ids = sizes, query_ids, key_ids

    def numbers(self, side: int) -> range:
        return range(self.sizes[side])

    def count(self, side: int) -> int:
        return self.sizes[side]

    def with_ids(self, query_ids: Tensor, key_ids: Tensor) -> LocalBatch:
        return LocalBatch(self.sizes, query_ids, key_ids)

    def swapped(self) -> LocalBatch:
        return LocalBatch(self.sizes[::-1], self.key_ids, self.query_ids)

    def same(self, x: Tensor) -> Tensor:
        return x

    # of arguments that a loss has checked: to check them again takes 10 µs
    logsumexp_of = staticmethod(logsumexp_of)

    everyones = sum = shared_sum = largest = first = rows = mine = same

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
        **what,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """The primitive, of arguments that a loss has checked: to check them again takes 10 µs."""
        problem = as_autocast_problem(Problem(a, None if b is a else b, scale, **what))
        weights = Upstream(SideUpstream(*row_weights), SideUpstream(*col_weights))
        return logsumexp_of(problem, weights, return_stats, backend)

    def similarity_softplus(
        self,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        *,
        row_weights: Tensor | None = None,
        backend: str | None = None,
        **what,
    ) -> Tensor:
        """As `similarity_logsumexp`."""
        problem = as_autocast_problem(Problem(a, None if b is a else b, scale, **what))
        return softplus_of(problem, row_weights, backend)

    def mean_where(self, x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x, 0).sum() / where.sum().clamp(min=1)
