"""The scores of a batch, direction by direction: their statistics, and how many take part.

A direction is named by its anchors: "row" for the queries, "col" for the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, check_chunk_size, global_rows, whole_batch
from ..similarity.pairs import count_positives, finite_shift
from ..similarity.spec import Stats, check_ids, check_pair, check_scale
from .common import check_flags
from .panels import Mask, log_sums, sums_of_rest
from .precision import accumulated, as_autocast, inner

OTHER = {"row": "col", "col": "row"}


class Direction(NamedTuple):
    """The statistics of one direction, as in `Stats`."""

    max: Tensor
    logsum: Tensor
    pos: Tensor | None
    neg_max: Tensor | None


@dataclass
class Batch:
    """S = scale·queries·keysᵀ, plus, in the queries' direction alone, the bias of each key.

    A limit leaves out, in its anchors' direction, negatives with a larger inner product. With a
    group all tensors are this rank's rows, and whatever is counted or summed is that of `whole`.
    """

    whole: GlobalBatch | LocalBatch
    queries: Tensor
    keys: Tensor
    scale: Tensor
    symmetric: bool
    backend: str | None
    exclude_self: bool = False
    key_bias: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def query_ids(self) -> Tensor | None:
        return self.whole.query_ids

    @property
    def key_ids(self) -> Tensor | None:
        return self.whole.key_ids

    @property
    def diagonal(self) -> int | None:
        """Among all keys, where the self pairs begin that are left out."""
        return self.whole.numbers(0).start if self.exclude_self else None

    @property
    def directions(self) -> tuple[str, ...]:
        return ("row", "col") if self.symmetric else ("row",)

    def features(self, side: str) -> Tensor:
        return self.queries if side == "row" else self.keys

    def number(self, side: str) -> int:
        """Of everyone's rows on a side, padding included."""
        return self.whole.count(0 if side == "row" else 1)

    def ids(self, side: str) -> Tensor | None:
        return self.query_ids if side == "row" else self.key_ids

    def bias(self, side: str) -> Tensor | None:
        return self.key_bias if side == "row" else None

    def statistics(self, power: float = 1.0, **what) -> dict[str, Direction]:
        """Of power·S, for each direction."""
        call = partial(self.logsumexp, power, **what)
        if self.key_bias is None and self.row_limit is None:
            stats = call(cols=self.symmetric)
        else:  # what only one direction has takes a call of its own
            bias = None if self.key_bias is None else power * self.key_bias
            stats = call(cols=False, col_bias=bias, row_limit=self.row_limit)
            if self.symmetric and self.col_limit is None:
                stats = Stats(*stats[:4], *call(rows=False)[4:])
            elif self.symmetric and self.scale.ndim:
                stats = Stats(*stats[:4], *self._limited_columns(power, **what))
            elif self.symmetric:
                stats = Stats(*stats[:4], *self._swapped().statistics(power, **what)["row"])
        found = {"row": Direction(*stats[:4]), "col": Direction(*stats[4:])}
        return {side: found[side] for side in self.directions}

    def logsumexp(self, power: float = 1.0, **what) -> Stats | Tensor:
        """The primitive, of power·S without bias and limits."""
        return self.whole.similarity_logsumexp(
            self.queries,
            self.keys,
            power * self.scale,
            row_ids=self.query_ids,
            col_ids=self.key_ids,
            exclude_self=self.exclude_self,
            backend=self.backend,
            **what,
        )

    def _swapped(self) -> Batch:
        """The keys' direction as the queries'."""
        return replace(
            self,
            queries=self.keys,
            keys=self.queries,
            whole=self.whole.swapped(),
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
        scale = power * self.whole.rows(self.scale)
        top, _, (logsum,) = log_sums(a, b, scale, None, mask, (1.0,))
        if positives is None:
            return Direction(top, logsum, None, None)
        stats = self.logsumexp(
            power, rows=False, positives=positives, exclude_positives=exclude_positives
        )
        number = self.positives("col") if positives == "linear" else 1
        pos = stats.col_pos + number * (finite_shift(stats.col_max) - finite_shift(top))
        return Direction(top, logsum, pos, None)

    def _masked(self, exclude_positives: bool = False) -> tuple[Tensor, Tensor, Mask]:
        """These queries, everyone's keys, and which of them each query is not compared with."""
        whole, row_ids, col_ids = self.whole, self.query_ids, self.key_ids
        a, b = accumulated(self.queries), accumulated(whole.rows(self.keys))
        if row_ids is not None:  # padding may hold anything
            col_ids = whole.rows(col_ids)
            a, b = (x.masked_fill((i < 0)[:, None], 0) for x, i in ((a, row_ids), (b, col_ids)))
        mask = Mask(
            row_ids,
            col_ids,
            self.row_limit,
            exclude_self=self.exclude_self,
            exclude_positives=exclude_positives,
            diagonal=whole.numbers(0).start,
        )
        return a, b, mask

    def _limited(self, side: str) -> bool:
        return (self.row_limit if side == "row" else self.col_limit) is not None

    def positives(self, side: str) -> Tensor:
        """k, the number of keys (queries) with the id of each anchor."""
        if self.query_ids is None:
            return self.scale.new_full((len(self.features(side)),), 0 if self.exclude_self else 1)
        ids, others = self.ids(side), self.ids(OTHER[side])
        k = count_positives(ids, self.whole.everyones(others))
        if self.exclude_self:
            k = k - ((ids == others) & (ids >= 0)).long()
        return k.to(self.scale.dtype)

    def candidates(self, side: str) -> Tensor:
        """How many keys (queries) each anchor is compared with."""
        if self._limited(side):
            # only the kernels see which are left: with all scores 0 the sum counts them
            batch = self if side == "row" else self._swapped()
            with torch.no_grad():
                batch = replace(batch, scale=self.scale.new_ones(()))
                return batch.statistics(0.0)["row"].logsum.exp().round()
        n, m = len(self.features(side)), len(self.features(OTHER[side]))
        others = self.ids(OTHER[side])
        number = self.scale.new_full((n,), m if others is None else 0)
        if others is not None:
            number = number + (self.whole.everyones(others) >= 0).sum()
        if self.exclude_self:
            number = number - (1 if others is None else (others >= 0).to(number.dtype))
        return number

    def mean(self, side: str, losses: Tensor) -> Tensor:
        """Of one direction's anchors, padding left out."""
        ids = self.ids(side)
        where = torch.ones_like(losses, dtype=torch.bool) if ids is None else ids >= 0
        return self.whole.mean_where(losses, where)

    def total(self, side: str) -> tuple[Tensor, Tensor]:
        """Σ S over the candidates of each anchor and their number, in O((N + M)·D)."""
        bias = self.bias(side)
        if bias is not None and self.key_ids is not None:
            bias = bias.masked_fill(self.key_ids < 0, 0)
        if self._limited(side):
            return self._limited_total(side, bias)

        def clean(x: Tensor, ids: Tensor | None) -> Tensor:
            x = accumulated(x)
            return x if ids is None else x.masked_fill((ids < 0)[:, None], 0)

        rows = self.scale.reshape(-1, 1) * clean(self.queries, self.query_ids)
        cols = clean(self.keys, self.key_ids)
        mine, others = (rows, cols) if side == "row" else (cols, rows)
        total = (mine * self.whole.shared_sum(others.sum(0))).sum(1)
        if self.exclude_self:
            total = total - inner(rows, cols)
        if bias is not None:
            everyones = self.whole.shared_sum(bias.sum())
            total = total + everyones - (bias if self.exclude_self else 0)
        return total, self.candidates(side)

    def _limited_total(self, side: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Linear in the other side's rows: only the mask takes products of all pairs."""
        mine, others, mask = (self if side == "row" else self._swapped())._masked()
        a, b = mine, others
        if side == "row":
            mine = self.scale.reshape(-1, 1) * mine
        else:
            others = self.whole.rows(self.scale.expand(len(self.queries)))[:, None] * others
        ones = others.new_ones(len(others))
        bias = torch.zeros_like(ones) if bias is None else self.whole.rows(bias)
        sums = sums_of_rest(a, b, mask, torch.cat([others, bias[:, None], ones[:, None]], 1))
        return (mine * sums[:, :-2]).sum(1) + sums[:, -2], sums[:, -1].detach()


def make_batch(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    symmetric: bool,
    backend: str | None,
    group=None,
    chunk_size: int | None = None,
    promote: bool = False,
) -> Batch:
    """A checked batch. `promote`: bf16 and fp16 features in fp32, those of autocast too."""
    check_chunk_size(chunk_size)
    check_flags(symmetric=symmetric)
    queries, keys = check_pair("queries", queries, "keys", keys)
    scale = check_scale("logit_scale", logit_scale, queries)
    n, m, device = len(queries), len(keys), queries.device
    if n != m and (query_ids is None or key_ids is None):
        raise ValueError(
            f"query_ids and key_ids are needed where queries and keys differ in number: got"
            f" {n} queries, {m} keys and no {'query_ids' if query_ids is None else 'key_ids'}"
        )
    if query_ids is not None or key_ids is not None:
        rows = global_rows(n, group, device)
        query_ids = rows if query_ids is None else query_ids
        key_ids = rows if key_ids is None else key_ids
        query_ids = check_ids("query_ids", query_ids, n, "queries", device)
        key_ids = check_ids("key_ids", key_ids, m, "keys", device)
    if promote:
        same = keys is queries
        queries = accumulated(as_autocast(queries))
        keys = queries if same else accumulated(as_autocast(keys))
    whole = whole_batch(group, queries, keys, query_ids, key_ids, chunk_size)
    return Batch(whole, queries, keys, scale, symmetric, backend)
