"""Which rows of the global batch each rank holds, and their ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..similarity.spec import Problem
from .chunks import Chunk, Transport, flat
from .collectives import all_gathered, padded_to
from .transport import TRANSPORTS, default_chunk_size


@dataclass(frozen=True, eq=False)
class SideShards:
    """The shards of one side of the similarity matrix: its rows (queries) or columns (keys).

    counts: the number of rows of each rank.
    local: the global row numbers of this rank's rows. Global row numbers follow the order of ranks.
    ids: those of this rank's rows, (n,).
    all_ids: those of all ranks' rows, (ranks, max_count), padded with -1.
    """

    counts: list[int]
    local: range
    ids: Tensor | None = None
    all_ids: Tensor | None = None

    @classmethod
    def of(cls, counts: list[int], rank: int) -> SideShards:
        first = sum(counts[:rank])
        return cls(counts, range(first, first + counts[rank]))

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def max_count(self) -> int:
        return max(self.counts)

    def numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.local.start, self.local.stop, device=device)

    def with_ids(self, name: str, ids: Tensor, group: dist.ProcessGroup) -> SideShards:
        all_ids = all_gathered(name, padded_to(self.max_count, ids, -1), group)
        return replace(self, ids=ids, all_ids=all_ids)


@dataclass(frozen=True, eq=False)
class Sharding:
    """The shards of both sides on the ranks of a group."""

    group: dist.ProcessGroup
    rank: int
    row: SideShards
    col: SideShards
    transport_name: str
    chunk_size: int | None

    @property
    def size(self) -> int:
        return len(self.row.counts)

    def side(self, name: str) -> SideShards:
        """The shards of the side 'row' or 'col'."""
        return self.row if name == "row" else self.col

    def with_ids(self, row_ids: Tensor, col_ids: Tensor) -> Sharding:
        """The same rows with other ids. If both are the same tensor, it is gathered once."""
        row = self.row.with_ids("query ids", row_ids, self.group)
        if col_ids is row_ids:
            col = replace(self.col, ids=col_ids, all_ids=row.all_ids)
        else:
            col = self.col.with_ids("key ids", col_ids, self.group)
        return replace(self, row=row, col=col)

    def swapped(self) -> Sharding:
        """The same with rows and columns exchanged."""
        return replace(self, row=self.col, col=self.row)

    def transport(self) -> Transport:
        chunk_size = self.chunk_size or default_chunk_size(self.size)
        kind = TRANSPORTS[self.transport_name]
        return kind(self.group, self.col.max_count, chunk_size)

    def blocks(self, problem: Problem, chunk: Chunk) -> Iterator[tuple[slice, Problem]]:
        """Split the problem of this rank's rows with the keys of a chunk into blocks.

        problem.col_bias: the biases of all ranks' keys, (ranks, max_count).

        Yields (range of keys in the chunk, problem of these keys). There is one block, except with
        `exclude_self`, where there are up to three: only this rank's own keys have self pairs.
        """
        owners, part, keys = chunk
        ids = flat(self.col.all_ids[owners, part])
        bias = None if problem.col_bias is None else flat(problem.col_bias[owners, part])
        local = tuple((self.rank - owners.start + i) * chunk.step for i in (0, 1))
        with_local = problem.exclude_self and self.rank in range(owners.start, owners.stop)
        bounds = (0, *local, len(keys)) if with_local else (0, len(keys))
        for low, high in pairwise(bounds):
            if low == high:
                continue
            is_local = with_local and (low, high) == local
            yield (
                slice(low, high),
                problem._replace(
                    b=keys[low:high],
                    col_bias=None if bias is None else bias[low:high],
                    col_ids=ids[low:high],
                    exclude_self=is_local,
                    diagonal=-part.start if is_local else 0,  # row i is column i - part.start here
                ),
            )
