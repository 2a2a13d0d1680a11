"""Statistics of the scores S = scale·queries·keysᵀ for each direction of a loss.

A direction (`side` in the code) is named by its anchors: "row" for query→key, whose anchors are the
queries, and "col" for key→query.
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
from .masked import Mask, MaskedStatistics, masked_statistics, unmasked_sums
from .precision import multiply_gradient, row_dot, to_accumulate_dtype

OTHER_SIDE = {"row": "col", "col": "row"}


class Direction(NamedTuple):
    """The statistics of one direction, as in `SideStats`. shift: `max`, 0 where that is -inf."""

    max: Tensor
    shift: Tensor
    logsum: Tensor
    pos: Tensor | None = None
    neg_max: Tensor | None = None

    @classmethod
    def from_stats(cls, stats: Stats, side: str) -> Direction:
        maximum, *rest = stats.row if side == "row" else stats.col
        return cls(maximum, finite_shift(maximum), *rest)

    def log_sum(self, power: float, shift: Tensor) -> Tensor:
        """log Σ e^{power·(S - shift)}, if these are the statistics of power·S."""
        if shift is self.shift and power == 1:  # the same value, without three operations
            return self.logsum
        return self.logsum + (self.max - power * shift)

    def positive_statistic(self, shift: Tensor, k: Tensor | None = None) -> Tensor:
        """`pos` relative to another shift.

        k: the number of positives, for `pos` that is a sum: the mean over them is returned.
        """
        pos = self.pos if k is None else self.pos / k.clamp(min=1)
        return pos if shift is self.shift else pos + (self.shift - shift)


@dataclass(eq=False)
class Scores:
    """The scores S, which are never formed.

    key_bias: (M,), added to the scores in the direction "row" only.
    row_limit, col_limit: (N,) and (M,). In its direction, an anchor's negatives with an inner
        product above its limit are left out.
    guide: (N, E) and (M, E), constants. The limits apply to their inner products.
    boost: α. S has the further term α·queries·keysᵀ, without gradient. See `boosted`.
    query_sets: (N, K), several ids of each query, which `masked_statistics` takes instead of one.
    half_values: whether the features, in the accumulate dtype, are values of bf16 or fp16.

    With a group, all tensors hold this rank's rows; counts and sums are over the global batch. The
    results of the primitive are cached. One call computes both directions where it can.
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
    guide: tuple[Tensor, Tensor] | None = None
    boost: float = 0.0
    query_sets: Tensor | None = None
    half_values: bool = False
    _pass_cache: dict = field(init=False, default_factory=dict)

    @property
    def query_ids(self) -> Tensor | None:
        return self.global_batch.query_ids

    @property
    def key_ids(self) -> Tensor | None:
        return self.global_batch.key_ids

    @property
    def diagonal(self) -> int | None:
        """The global column of row 0's self pair; None if self pairs are not left out."""
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
        """The number of rows of a side on all ranks, padding included."""
        return self.global_batch.global_count(side)

    def boosted(self, strength: float) -> Scores:
        """The scores S + strength·sg(queries·keysᵀ), where sg stops the gradient.

        They are those at scale + strength, with features whose gradients are multiplied by
        scale / (scale + strength). With a scale per query, the gradients of the keys have no common
        factor: the statistics are computed in PyTorch, a panel at a time.
        """
        if self.scale.ndim:
            return replace(self, boost=strength)
        factor, same = (self.scale / (self.scale + strength)).detach(), self.keys is self.queries
        queries = multiply_gradient(self.queries, factor)
        keys = queries if same else multiply_gradient(self.keys, factor)
        return replace(self, queries=queries, keys=keys, scale=self.scale + strength)

    # Passes over S.

    def logsumexp(self, power: float = 1.0, **options) -> Stats | Tensor:
        """Call the primitive for power·S, without the bias, the limits and the boost. The maxima
        serve as shifts only, unless the hardest negatives are asked for."""
        return self.global_batch.similarity_logsumexp(
            self.queries,
            self.keys,
            self.scale if power == 1 else power * self.scale,
            row_ids=self.query_ids,
            col_ids=self.key_ids,
            exclude_self=self.exclude_self,
            exact_max=options.get("hardest", False),
            half_values=self.half_values,
            backend=self.backend,
            **options,
        )

    def statistics(
        self,
        power: float = 1.0,
        positives: str | None = None,
        exclude_positives: bool = False,
        hardest: bool = False,
    ) -> dict[str, Direction]:
        """The statistics of power·S, by direction. Cached."""
        key = power, positives, exclude_positives
        by_side = self._pass_cache.get(key)
        if by_side is None or (hardest and by_side["row"].neg_max is None):
            options = {"positives": positives, "exclude_positives": exclude_positives}
            options |= {"hardest": True} if hardest else {}
            by_side = self._pass_cache[key] = self._statistics(power, **options)
        return by_side

    def store_pass(self, stats: Stats, positives: str) -> None:
        """Cache the statistics of a pass over S that included the positives."""
        by_side = {side: Direction.from_stats(stats, side) for side in self.directions}
        self._pass_cache[1.0, positives, False] = by_side

    def _statistics(self, power: float, **options) -> dict[str, Direction]:
        call = partial(self.logsumexp, power, **options)
        if self.guide is not None or self.boost:
            return self._in_panels(self.directions, power, **options)
        if self.key_bias is None and self.row_limit is None:
            stats = call(cols=self.symmetric)
            return {side: Direction.from_stats(stats, side) for side in self.directions}
        # The bias and the limits differ between the directions: one call for each.
        bias = None if self.key_bias is None else power * self.key_bias
        stats = call(cols=False, col_bias=bias, row_limit=self.row_limit)
        by_side = {"row": Direction.from_stats(stats, "row")}
        if self.symmetric and self.col_limit is None:
            by_side["col"] = Direction.from_stats(call(rows=False), "col")
        elif self.symmetric and self.scale.ndim:
            by_side |= self._in_panels(("col",), power, **options)
        elif self.symmetric:
            by_side["col"] = self._transposed()._statistics(power, **options)["row"]
        return by_side

    def _transposed(self) -> Scores:
        """Sᵀ, with the direction "col" of S as its only direction "row"."""
        return replace(
            self,
            queries=self.keys,
            keys=self.queries,
            global_batch=self.global_batch.swapped(),
            symmetric=False,
            key_bias=None,
            row_limit=self.col_limit,
            col_limit=None,
            guide=self.guide and self.guide[::-1],
        )

    def _in_panels(
        self,
        sides: tuple[str, ...],
        power: float,
        positives: str | None = None,
        exclude_positives: bool = False,
    ) -> dict[str, Direction]:
        """The statistics where no kernel computes them: with limits of a guide, with a boost, or
        with both a limit per key and a scale per query.

        The logsumexp is computed in PyTorch, a panel at a time. No limit leaves out a positive, so
        a kernel computes the positives.
        """
        scores = self
        if power != 1:
            bias = None if self.key_bias is None else power * self.key_bias
            scale, boost = power * self.scale, power * self.boost
            scores = replace(self, scale=scale, key_bias=bias, boost=boost)
        by_side = {
            side: Direction(x.max, finite_shift(x.max), x.log_sums[0])
            for side, x in scores.masked_statistics(sides, (1.0,), exclude_positives).items()
        }
        if positives is None:
            return by_side
        unlimited = replace(scores, row_limit=None, col_limit=None, guide=None, boost=0.0)
        options = {"positives": positives, "exclude_positives": exclude_positives}
        if sides == ("col",):
            stats = unlimited.logsumexp(rows=False, **options)
            of_kernel = {"col": Direction.from_stats(stats, "col")}
        else:
            of_kernel = unlimited.statistics(**options)
        for side, x in by_side.items():
            number = self.positive_counts(side) if positives == "linear" else 1
            pos = of_kernel[side].pos + number * (of_kernel[side].shift - x.shift)
            by_side[side] = x._replace(pos=pos)
        return by_side

    def masked_statistics(
        self,
        sides: tuple[str, ...],
        powers: tuple[float, ...],
        exclude_positives: bool = False,
        pairs: Tensor | None = None,
        totals: bool = False,
    ) -> dict[str, MaskedStatistics]:
        """`masked.masked_statistics` of this rank's anchors.

        pairs: linear indices of further pairs to leave out, each of a local row.
        """
        batch, bias = self.global_batch, self.key_bias
        a, b, mask = self._masked_operands(exclude_positives, pairs)
        if bias is not None:
            if self.key_ids is not None:  # padded keys may have any bias
                bias = bias.masked_fill(self.key_ids < 0, 0)
            bias = batch.all_gather_rows(bias)
        scale = self.scale.expand(len(a)).contiguous()
        by_side = masked_statistics(a, b, scale, bias, mask, powers, sides, self.boost, totals)
        if "col" in by_side:
            by_side["col"] = self._of_all_rows(by_side["col"], powers)
        return by_side

    def unpaired_statistics(
        self, pairs: Tensor, powers: tuple[float, ...], totals: bool
    ) -> dict[str, MaskedStatistics]:
        """The statistics of all pairs except `pairs`, linear indices. Cached: call it with one list
        of pairs only."""
        key = "unpaired", powers
        if key not in self._pass_cache:
            self._pass_cache[key] = self.masked_statistics(
                self.directions, powers, pairs=pairs, totals=totals
            )
        return self._pass_cache[key]

    def _of_all_rows(
        self, columns: MaskedStatistics, powers: tuple[float, ...]
    ) -> MaskedStatistics:
        """Merge the column statistics, which each rank has over its own rows, into those over all
        ranks' rows. Return them for this rank's columns."""
        batch = self.global_batch
        if isinstance(batch, LocalBatch):
            return columns
        maximum, number = batch.all_reduce_max(columns.max), batch.all_reduce_sum(columns.number)
        shift = finite_shift(maximum)
        log_sums = [
            (log_sum + p * (columns.max - shift)).exp()
            for p, log_sum in zip(powers, columns.log_sums, strict=True)
        ]
        sums = batch.all_reduce_sum(torch.stack(log_sums))
        sums = torch.where(number > 0, sums, 1).log().masked_fill(number == 0, -torch.inf)
        total = batch.all_reduce_sum(columns.total)
        return MaskedStatistics(*(batch.local_columns(x) for x in (maximum, number, sums, total)))

    def _masked_operands(
        self, exclude_positives: bool = False, pairs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Mask]:
        """The local queries, the keys of all ranks, and the mask of their excluded pairs."""
        batch, row_ids, col_ids = self.global_batch, self.query_ids, self.key_ids
        a, b, guide = self.queries, self.keys, self.guide
        if row_ids is not None:  # padded rows may contain any values

            def without_padding(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                padding = (row_ids < 0)[:, None], (self.key_ids < 0)[:, None]
                return x.masked_fill(padding[0], 0), y.masked_fill(padding[1], 0)

            a, b = without_padding(a, b)
            guide = guide and without_padding(*guide)
            col_ids = batch.all_gather_rows(col_ids)
        if guide is not None:  # NaN where the guide is not finite: it must reach the loss
            a, b = (x + 0 * g.sum(1, keepdim=True) for x, g in zip((a, b), guide, strict=True))
        a, b = to_accumulate_dtype(a), to_accumulate_dtype(batch.all_gather_rows(b))
        mask = Mask(
            row_ids if self.query_sets is None else self.query_sets,
            col_ids,
            self.row_limit,
            pairs=pairs,
            exclude_self=self.exclude_self,
            exclude_positives=exclude_positives,
            diagonal=batch.local_range("row").start,
            col_limit=None if self.col_limit is None else batch.all_gather_rows(self.col_limit),
            guide=guide and (guide[0], batch.all_gather_rows(guide[1])),
        )
        return a, b, mask

    # Counts and sums. Only with limits do they take a pass over S.

    def positive_counts(self, side: str) -> Tensor:
        """k, the number of positives of each anchor."""
        if ("positives", side) not in self._pass_cache:
            self._pass_cache["positives", side] = self._positive_counts(side)
        return self._pass_cache["positives", side]

    def _positive_counts(self, side: str) -> Tensor:
        if self.query_ids is None:
            return self.scale.new_full((len(self.features(side)),), 0 if self.exclude_self else 1)
        if side == "col" and self.query_ids is self.key_ids:
            return self.positive_counts("row")
        ids, others = self.ids(side), self.ids(OTHER_SIDE[side])
        k = count_positives(ids, self.global_batch.global_ids(OTHER_SIDE[side]))
        if self.exclude_self and ids is others:  # one of its positives is the row itself
            k = (k - 1).clamp_(min=0)
        elif self.exclude_self:
            k = k - ((ids == others) & (ids >= 0)).long()
        return k.to(self.scale.dtype)

    def candidate_counts(self, side: str) -> Tensor:
        """The number of candidates of each anchor, positives included."""
        if self.limit(side) is not None:
            # Only a pass over S evaluates the limits. At power 0 all scores are 0, and the sum of
            # their exponentials is the number of candidates.
            scores = self if side == "row" else self._transposed()
            with torch.no_grad():
                scores = replace(scores, scale=self.scale.new_ones(()))
                zeros = scores.statistics(0.0)["row"]
                return (zeros.logsum + zeros.max).exp().round()
        n, m = len(self.features(side)), len(self.features(OTHER_SIDE[side]))
        others = self.ids(OTHER_SIDE[side])
        number = self.scale.new_full((n,), m if others is None else 0)
        if others is not None:
            number = number + (self.global_batch.global_ids(OTHER_SIDE[side]) >= 0).sum()
        if self.exclude_self:
            number = number - (1 if others is None else (others >= 0).to(number.dtype))
        return number

    def anchor_count(self, side: str) -> Tensor | int:
        """The number of anchors on all ranks, without padding."""
        ids = self.ids(side)
        if ids is None:
            return self.features(side).size(0)
        return self.global_batch.all_reduce_sum((ids >= 0).sum()).clamp(min=1)

    def mean(self, side: str, losses: Tensor) -> Tensor:
        """The mean of `losses` over the anchors of all ranks, without padding."""
        ids = self.ids(side)
        where = torch.ones_like(losses, dtype=torch.bool) if ids is None else ids >= 0
        return self.global_batch.all_reduce_mean(losses, where)

    def score_sums(self, side: str) -> tuple[Tensor, Tensor]:
        """Σ S over the candidates of each anchor, and the number of candidates. Without limits in
        O((N + M)·D) operations."""
        bias = self.bias(side)
        if bias is not None and self.key_ids is not None:
            bias = bias.masked_fill(self.key_ids < 0, 0)
        if self.limit(side) is not None:
            return self._limited_score_sums(side, bias)

        def without_padding(x: Tensor, ids: Tensor | None) -> Tensor:
            x = to_accumulate_dtype(x)
            return x if ids is None else x.masked_fill((ids < 0)[:, None], 0)

        all_reduce_sum = self.global_batch.all_reduce_sum
        rows = self.scale.reshape(-1, 1) * without_padding(self.queries, self.query_ids)
        cols = without_padding(self.keys, self.key_ids)
        anchors, others = (rows, cols) if side == "row" else (cols, rows)
        total = (anchors * all_reduce_sum(others.sum(0))).sum(1)
        if self.exclude_self:
            total = total - row_dot(rows, cols)
        if bias is not None:
            total = total + all_reduce_sum(bias.sum()) - (bias if self.exclude_self else 0)
        return total, self.candidate_counts(side)

    def _limited_score_sums(self, side: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`score_sums` with limits.

        The sum is linear in the rows of the other side; all inner products are needed only for the
        mask.
        """
        batch = self.global_batch
        a, b, mask = (self if side == "row" else self._transposed())._masked_operands()
        anchors, others = a, b
        if side == "row":
            anchors = self.scale.reshape(-1, 1) * a
        else:
            others = batch.all_gather_rows(self.scale.expand(len(self.queries)))[:, None] * b
        ones = others.new_ones(len(others))
        bias = torch.zeros_like(ones) if bias is None else batch.all_gather_rows(bias)
        sums = unmasked_sums(a, b, mask, torch.cat([others, bias[:, None], ones[:, None]], 1))
        return (anchors * sums[:, :-2]).sum(1) + sums[:, -2], sums[:, -1].detach()
