"""The batch of one process, with the interface of that of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity import similarity_logsumexp, similarity_softplus


class LocalBatch:
    """What `GlobalBatch` is without a group: everyone's rows are these, and there is no one to sum
    with. Ids may be None."""

    similarity_logsumexp = staticmethod(similarity_logsumexp)
    similarity_softplus = staticmethod(similarity_softplus)

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

    everyones = sum = shared_sum = largest = first = rows = mine = same

    def mean_where(self, x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x, 0).sum() / where.sum().clamp(min=1)
