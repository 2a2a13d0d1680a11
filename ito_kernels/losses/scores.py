"""S = scale·queries·keysᵀ and what is known of it, direction by direction.

A direction is named by its anchors: "row" for the queries, "col" for the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch
from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Stats
from .masked import Mask, log_sums, sums_of_rest
from .precision import accumulated, inner

OTHER = {"row": "col", "col": "row"}


class Direction(NamedTuple):
    """The statistics of one direction, as in `Stats`. shift: `max`, 0 where it is -inf."""

    max: Tensor
    shift: Tensor
    logsum: Tensor
    pos: Tensor | None = None
    neg_max: Tensor | None = None

    @classmethod
    def of(cls, stats: Stats, side: str) -> Direction:
        top, *rest = stats.row if side == "row" else stats.col
        return cls(top, finite_shift(top), *rest)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        """Of power·(S - shift), where these are the statistics of power·S."""
        if shift is self.shift and power == 1:  # the same number, without three operations
            return self.logsum
        return self.logsum + (self.max - power * shift)

    def positive(self, shift: Tensor, k: Tensor | None = None) -> Tensor:
        """`pos` relative to another shift; with k, the number of positives, their mean of it."""
        pos = self.pos if k is None else self.pos / k.clamp(min=1)
        return pos if shift is self.shift else pos + (self.shift - shift)


@dataclass(eq=False)
class Scores:
    """S, which is never formed, plus in the queries' direction alone the bias of each key.

    A limit leaves out, in its anchors' direction, negatives with a larger inner product. With a
    group all tensors are this rank's rows, and whatever is counted or summed is that of
    `global_batch`. Each call of the primitive serves both directions, and is made once.
    """

    global_batch: GlobalBatch | LocalBatch
    queries: Tensor
    keys: Tensor
    scale: Tensor
    symmetric: bool
    exclude_self: bool = False
    backend: str | None = None
    key_bias: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None
    _passes: dict = field(init=False, default_factory=dict)

    @property
    def query_ids(self) -> Tensor | None:
        return self.global_batch.query_ids

    @property
    def key_ids(self) -> Tensor | None:
        return self.global_batch.key_ids

    @property
    def diagonal(self) -> int | None:
        """Among all keys, where the self pairs begin that are left out."""
        return self.global_batch.local_range("row").start if self.exclude_self else None

    @property
    def directions(self) -> tuple[str, ...]:
        return ("row", "col") if self.symmetric else ("row",)

    def features(self, side: str) -> Tensor:
        return self.queries if side == "row" else self.keys

    def ids(self, side: str) -> Tensor | None:
        return self.query_ids if side == "row" else self.key_ids

    def bias(self, side: str) -> Tensor | None:
        return self.key_bias if side == "row" else None

    def limit(self, side: str) -> Tensor | None:
        return self.row_limit if side == "row" else self.col_limit

    def global_count(self, side: str) -> int:
        """Of all ranks' rows on a side, padding included."""
        return self.global_batch.global_count(side)

    # ---- passes over S

    def logsumexp(self, power: float = 1.0, **what) -> Stats | Tensor:
        """The primitive, of power·S without bias and limits."""
        return self.global_batch.similarity_logsumexp(
            self.queries,
            self.keys,
            self.scale if power == 1 else power * self.scale,
            row_ids=self.query_ids,
            col_ids=self.key_ids,
            exclude_self=self.exclude_self,
            backend=self.backend,
            **what,
        )

    def statistics(
        self,
        power: float = 1.0,
        positives: str | None = None,
        exclude_positives: bool = False,
        hardest: bool = False,
    ) -> dict[str, Direction]:
        """Of power·S, for each direction. The same pass is made once."""
        key = power, positives, exclude_positives
        found = self._passes.get(key)
        if found is None or (hardest and found["row"].neg_max is None):
            what = {"positives": positives, "exclude_positives": exclude_positives}
            what |= {"hardest": True} if hardest else {}
            found = self._passes[key] = self._statistics(power, **what)
        return found

    def keep(self, stats: Stats, positives: str) -> None:
        """What a pass of S with all positives has found."""
        found = {side: Direction.of(stats, side) for side in self.directions}
        self._passes[1.0, positives, False] = found

    def _statistics(self, power: float, **what) -> dict[str, Direction]:
        call = partial(self.logsumexp, power, **what)
        if self.key_bias is None and self.row_limit is None:
            stats = call(cols=self.symmetric)
            return {side: Direction.of(stats, side) for side in self.directions}
        # what only one direction has takes a call of its own
        bias = None if self.key_bias is None else power * self.key_bias
        stats = call(cols=False, col_bias=bias, row_limit=self.row_limit)
        found = {"row": Direction.of(stats, "row")}
        if self.symmetric and self.col_limit is None:
            found["col"] = Direction.of(call(rows=False), "col")
        elif self.symmetric and self.scale.ndim:
            found["col"] = self._limited_columns(power, **what)
        elif self.symmetric:
            found["col"] = self._swapped()._statistics(power, **what)["row"]
        return found

    def _swapped(self) -> Scores:
        """The keys' direction as the queries'."""
        return replace(
            self,
            queries=self.keys,
            keys=self.queries,
            global_batch=self.global_batch.swapped(),
            symmetric=False,
            key_bias=None,
            row_limit=self.col_limit,
            col_limit=None,
        )

    def _limited_columns(
        self, power: float, positives: str | None = None, exclude_positives: bool = False
    ) -> Direction:
        """The keys' direction with a limit for each key and a scale for each query, which no kernel
        has: the logsumexp in panels. The positives, which no limit leaves out, are a kernel's."""
        a, b, mask = self._swapped()._masked(exclude_positives=exclude_positives)
        scale = power * self.global_batch.all_gather_rows(self.scale)
        top, _, (logsum,) = log_sums(a, b, scale, None, mask, (1.0,))
        if positives is None:
            return Direction(top, finite_shift(top), logsum)
        stats = self.logsumexp(
            power, rows=False, positives=positives, exclude_positives=exclude_positives
        )
        number = self.positives("col") if positives == "linear" else 1
        shift = finite_shift(top)
        pos = stats.col_pos + number * (finite_shift(stats.col_max) - shift)
        return Direction(top, shift, logsum, pos)

    def _masked(self, exclude_positives: bool = False) -> tuple[Tensor, Tensor, Mask]:
        """These queries, all ranks' keys, and which of them each query is not compared with."""
        batch, row_ids, col_ids = self.global_batch, self.query_ids, self.key_ids
        a, b = accumulated(self.queries), accumulated(batch.all_gather_rows(self.keys))
        if row_ids is not None:  # padding may hold anything
            col_ids = batch.all_gather_rows(col_ids)
            a, b = (x.masked_fill((i < 0)[:, None], 0) for x, i in ((a, row_ids), (b, col_ids)))
        mask = Mask(
            row_ids,
            col_ids,
            self.row_limit,
            exclude_self=self.exclude_self,
            exclude_positives=exclude_positives,
            diagonal=batch.local_range("row").start,
        )
        return a, b, mask

    # ---- numbers and sums, without a pass

    def positives(self, side: str) -> Tensor:
        """k, the number of keys (queries) with the id of each anchor."""
        if ("positives", side) not in self._passes:
            self._passes["positives", side] = self._positives(side)
        return self._passes["positives", side]

    def _positives(self, side: str) -> Tensor:
        if self.query_ids is None:
            return self.scale.new_full((len(self.features(side)),), 0 if self.exclude_self else 1)
        if side == "col" and self.query_ids is self.key_ids:
            return self.positives("row")
        ids, others = self.ids(side), self.ids(OTHER[side])
        k = count_positives(ids, self.global_batch.global_ids(OTHER[side]))
        if self.exclude_self:
            k = k - ((ids == others) & (ids >= 0)).long()
        return k.to(self.scale.dtype)

    def candidates(self, side: str) -> Tensor:
        """How many keys (queries) each anchor is compared with."""
        if self.limit(side) is not None:
            # only the kernels see which are left: with all scores 0 the sum counts them
            scores = self if side == "row" else self._swapped()
            with torch.no_grad():
                scores = replace(scores, scale=self.scale.new_ones(()))
                return scores.statistics(0.0)["row"].logsum.exp().round()
        n, m = len(self.features(side)), len(self.features(OTHER[side]))
        others = self.ids(OTHER[side])
        number = self.scale.new_full((n,), m if others is None else 0)
        if others is not None:
            number = number + (self.global_batch.global_ids(OTHER[side]) >= 0).sum()
        if self.exclude_self:
            number = number - (1 if others is None else (others >= 0).to(number.dtype))
        return number

    def anchors(self, side: str) -> Tensor | int:
        """How many there are, padding left out."""
        ids = self.ids(side)
        if ids is None:
            return self.features(side).size(0)
        return self.global_batch.all_reduce_sum((ids >= 0).sum()).clamp(min=1)

    def mean(self, side: str, losses: Tensor) -> Tensor:
        """Of one direction's anchors, padding left out."""
        ids = self.ids(side)
        where = torch.ones_like(losses, dtype=torch.bool) if ids is None else ids >= 0
        return self.global_batch.all_reduce_mean(losses, where)

    def total(self, side: str) -> tuple[Tensor, Tensor]:
        """Σ S over the candidates of each anchor and their number, in O((N + M)·D)."""
        bias = self.bias(side)
        if bias is not None and self.key_ids is not None:
            bias = bias.masked_fill(self.key_ids < 0, 0)
        if self.limit(side) is not None:
            return self._limited_total(side, bias)

        def clean(x: Tensor, ids: Tensor | None) -> Tensor:
            x = accumulated(x)
            return x if ids is None else x.masked_fill((ids < 0)[:, None], 0)

        all_reduce_sum = self.global_batch.all_reduce_sum
        rows = self.scale.reshape(-1, 1) * clean(self.queries, self.query_ids)
        cols = clean(self.keys, self.key_ids)
        anchors, others = (rows, cols) if side == "row" else (cols, rows)
        total = (anchors * all_reduce_sum(others.sum(0))).sum(1)
        if self.exclude_self:
            total = total - inner(rows, cols)
        if bias is not None:
            total = total + all_reduce_sum(bias.sum()) - (bias if self.exclude_self else 0)
        return total, self.candidates(side)

    def _limited_total(self, side: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Linear in the other side's rows: only the mask takes products of all pairs."""
        batch = self.global_batch
        a, b, mask = (self if side == "row" else self._swapped())._masked()
        anchors, others = a, b
        if side == "row":
            anchors = self.scale.reshape(-1, 1) * a
        else:
            others = batch.all_gather_rows(self.scale.expand(len(self.queries)))[:, None] * b
        ones = others.new_ones(len(others))
        bias = torch.zeros_like(ones) if bias is None else batch.all_gather_rows(bias)
        sums = sums_of_rest(a, b, mask, torch.cat([others, bias[:, None], ones[:, None]], 1))
        return (anchors * sums[:, :-2]).sum(1) + sums[:, -2], sums[:, -1].detach()
