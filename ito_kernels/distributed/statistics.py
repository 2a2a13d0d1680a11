"""Partial statistics of rows and columns, their merge, and the all-to-all of column statistics."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Problem, SideStats
from .chunks import Chunk
from .collectives import Started, all_to_all
from .sharding import Sharding


class PartialStats(NamedTuple):
    """The fields of `SideStats`, over a part of the pairs.

    count: the number of positives if `pos` is a sum: if `max` changes by x, `pos` changes by
        count·x. None if `pos` is a logarithm.
    """

    max: Tensor
    logsum: Tensor
    pos: Tensor | None
    neg_max: Tensor | None
    count: Tensor | None

    @property
    def stats(self) -> SideStats:
        return SideStats(self.max, self.logsum, self.pos, self.neg_max)

    def merged(self, other: PartialStats) -> PartialStats:
        maximum = torch.maximum(self.max, other.max)
        x, y = self._relative_to(maximum), other._relative_to(maximum)
        pos, count, neg_max = x.pos, x.count, x.neg_max
        if count is not None:
            pos, count = pos + y.pos, count + y.count
        elif pos is not None:
            pos = torch.logaddexp(pos, y.pos)
        if neg_max is not None:
            neg_max = torch.maximum(neg_max, y.neg_max)
        return PartialStats(maximum, torch.logaddexp(x.logsum, y.logsum), pos, neg_max, count)

    def _relative_to(self, maximum: Tensor) -> PartialStats:
        shift = finite_shift(self.max) - finite_shift(maximum)
        pos = self.pos
        if pos is not None:
            pos = pos + (shift if self.count is None else self.count * shift)
        return self._replace(logsum=self.logsum + shift, pos=pos)

    @staticmethod
    def union(parts: list[PartialStats]) -> PartialStats:
        return reduce(PartialStats.merged, parts)


def count_pairs(problem: Problem) -> tuple[Tensor, Tensor]:
    """The numbers of positives of each row and of each column."""
    rows = count_positives(problem.row_ids, problem.col_ids)
    cols = count_positives(problem.col_ids, problem.row_ids)
    if problem.exclude_self:
        first = -problem.diagonal  # the row whose self pair is in column 0
        ids = problem.row_ids[first : first + problem.m]
        same = ((ids == problem.col_ids[: len(ids)]) & (ids >= 0)).long()
        rows[first : first + len(ids)] -= same
        cols[: len(ids)] -= same
    return rows.to(problem.accumulate), cols.to(problem.accumulate)


class ColumnStats:
    """Statistics of all ranks' columns over this rank's rows. An all-to-all turns them into those
    of this rank's columns over all ranks' rows."""

    def __init__(self, shards: Sharding, problem: Problem):
        self.shards, self.number, self.present = shards, len(problem.b), []
        self.sent = problem.scale.new_empty(0)  # (owner, statistic, column)

    def add(self, chunk: Chunk, at: slice, part: PartialStats) -> None:
        """Store the statistics of the columns `at` of a chunk, which may have several owners."""
        vectors = [x for x in part if x is not None]
        if not self.present:
            self.present = [x is not None for x in part]
            shape = (self.shards.size, len(vectors), self.shards.col.max_count)
            self.sent = self.sent.new_empty(shape)
        first, step = chunk.owners.start, chunk.step
        owners = slice(first + at.start // step, first + at.stop // step)
        for i, x in enumerate(vectors):
            self.sent[owners, i, chunk.part] = x.view(-1, step)

    def all_to_all(self) -> PartialStats:
        name, arrived = "all-to-all of column statistics", torch.empty_like(self.sent)
        arrived = Started(name, all_to_all, arrived, self.sent, self.shards.group).wait()
        return PartialStats.union(
            [
                PartialStats(*(next(vectors) if x else None for x in self.present))
                for vectors in map(iter, arrived[:, :, : self.number].clone())
            ]
        )
