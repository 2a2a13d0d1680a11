"""Statistics of parts of a row or column, their union, and their way to the columns' owners."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Problem, SideStats
from .chunks import Chunk
from .collectives import Started, all_to_all

if TYPE_CHECKING:
    from .batch import GlobalBatch


class Side(NamedTuple):
    """As `SideStats`; count: the number of positives, where `pos` is a sum relative to `max`."""

    max: Tensor
    logsum: Tensor
    pos: Tensor | None
    neg_max: Tensor | None
    count: Tensor | None

    @property
    def stats(self) -> SideStats:
        return SideStats(self.max, self.logsum, self.pos, self.neg_max)

    def merged(self, other: Side) -> Side:
        top = torch.maximum(self.max, other.max)
        x, y = self._relative_to(top), other._relative_to(top)
        pos, count, neg_max = x.pos, x.count, x.neg_max
        if count is not None:
            pos, count = pos + y.pos, count + y.count
        elif pos is not None:
            pos = torch.logaddexp(pos, y.pos)
        if neg_max is not None:
            neg_max = torch.maximum(neg_max, y.neg_max)
        return Side(top, torch.logaddexp(x.logsum, y.logsum), pos, neg_max, count)

    def _relative_to(self, top: Tensor) -> Side:
        shift = finite_shift(self.max) - finite_shift(top)
        pos = self.pos
        if pos is not None:
            pos = pos + (shift if self.count is None else self.count * shift)
        return self._replace(logsum=self.logsum + shift, pos=pos)

    @staticmethod
    def union(sides: list[Side]) -> Side:
        whole, *rest = sides
        for side in rest:
            whole = whole.merged(side)
        return whole


def count_pairs(problem: Problem) -> tuple[Tensor, Tensor]:
    """The number of positives of each row and column."""
    rows = count_positives(problem.row_ids, problem.col_ids)
    cols = count_positives(problem.col_ids, problem.row_ids)
    if problem.exclude_self:
        first = -problem.diagonal  # the row whose own column is the first one
        mine = problem.row_ids[first : first + problem.m]
        same = ((mine == problem.col_ids[: len(mine)]) & (mine >= 0)).long()
        rows[first : first + len(mine)] -= same
        cols[: len(mine)] -= same
    return rows.to(problem.accumulate), cols.to(problem.accumulate)


class Columns:
    """Statistics of everyone's columns over this rank's rows; then of its own over everyone's."""

    def __init__(self, whole: GlobalBatch, problem: Problem):
        self.whole, self.number, self.present = whole, len(problem.b), []
        self.sent = problem.scale.new_empty(0)  # (owner, statistic, column)

    def add(self, chunk: Chunk, at: slice, side: Side) -> None:
        """Of the columns `at` of a chunk: those of one owner or of several."""
        vectors = [x for x in side if x is not None]
        if not self.present:
            self.present = [x is not None for x in side]
            shape = (self.whole.size, len(vectors), self.whole.most_keys)
            self.sent = self.sent.new_empty(shape)
        first, step = chunk.owners.start, chunk.step
        owners = slice(first + at.start // step, first + at.stop // step)
        for i, x in enumerate(vectors):
            self.sent[owners, i, chunk.part] = x.view(-1, step)

    def exchanged(self) -> Side:
        what, arrived = "all-to-all of column statistics", torch.empty_like(self.sent)
        arrived = Started(what, all_to_all, arrived, self.sent, self.whole.group).wait()
        return Side.union(
            [
                Side(*(next(vectors) if x else None for x in self.present))
                for vectors in map(iter, arrived[:, :, : self.number].clone())
            ]
        )
