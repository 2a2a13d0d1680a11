"""Losses for retrieval: shared hard negatives, and several captions of one item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from ..distributed import (
    GlobalBatch,
    LocalBatch,
    global_batch,
    global_row_numbers,
    same_on_every_rank,
)
from ..similarity.spec import check_pair, check_tensor
from .batch import Arguments, Names, check_arguments, same_scale_shape_on_all_ranks
from .common import check_choice, check_flags
from .infonce import infonce
from .margin import TOLERANCE
from .options import HARDNESS_MODES, Options, check_number
from .pools import HardNegatives
from .precision import (
    logaddexp,
    row_dot,
    to_accumulate_dtype,
    to_autocast_dtype,
    without_autocast,
)
from .scores import Direction, Scores

MNRL = Names("queries", "positives", "scale")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


class RankingOptions(NamedTuple):
    """The options of `mnrl_loss`. After `check_ranking_options` all rows of a tensor lie in its
    first dimension, the K negatives of a query one after the other, and `margin` is None or the
    margin of the guide or of the model's own cosines."""

    directions: Sequence[str] = ("query_to_doc",)
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0
    guide: Sequence[Tensor] | None = None
    margin: float | None = None
    margin_strategy: str = "absolute"
    normalize: bool = True

    def boost(self, kind: str) -> float:
        """The hardness_strength of the negatives "in_batch" or "hard"."""
        return self.hardness_strength if self.hardness_mode in (kind, "all") else 0.0


@same_on_every_rank
def mnrl_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    scale: float | Tensor = 20.0,
    *,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    guide: Sequence[Tensor] | None = None,
    margin: float | None = None,
    margin_strategy: str = "absolute",
    normalize: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiple negatives ranking loss.

        L = mean_i [ log Z_i - S_ii ],   S = scale · queries · documentsᵀ

    The documents are all positives and all negatives of the batch. Z_i is the sum of e^S over the
    candidates of query i, which `directions` names:

        query_to_doc    query i and every document
        query_to_query  query i and every other query
        doc_to_query    positive i and every query
        doc_to_doc      positive i and every document of another query

    With one direction it is the cross-entropy of the positive among the documents. No matrix of
    scores is formed.

    Args:
        queries, positives: (N, D); row i of both is a positive pair; dtypes as in
            `multi_positive_infonce`.
        negatives: (N, D), or (N, K, D) for K negatives per query, in the dtype of the queries.
        scale: 1 / temperature: a number, a 0-d tensor, or (N,), one per query. In every direction
            the scores of row i have scale_i.
        directions: the names of one or more directions, `query_to_doc` among them.
        partition_mode: "joint": Z_i is the sum over the candidates of all directions. With
            `doc_to_query` the positive pair is in it twice. "per_direction": the mean of the losses
            of the directions, each with its own sum. Only for `query_to_doc` and `doc_to_query`:
            the others have no positive pair.
        hardness_mode, hardness_strength: a kind of negatives, and α ≥ 0. Negatives of that kind
            have the score S_ij + α·<q_i, d_j>, whose second term has no gradient (LLaVE,
            EmbeddingGemma). The kinds are "in_batch", the documents of other queries; "hard", the
            negatives of query i itself; and "all". Only in `query_to_doc`. sentence-transformers'
            names are accepted too.
        margin: m. With c_i the cosine of query i and positive i, a candidate is left out of Z_i, in
            every direction, if its cosine exceeds c_i - m. A margin above 0 thus also removes
            candidates that are somewhat less similar than the positive. The sign is opposite to
            that of `false_negative_margin` in `multi_positive_infonce`. The positive pair itself
            stays. Cosines that differ only by rounding count as equal.
        margin_strategy: "absolute", as above. "relative": the margin is m·|c_i|.
        guide: (guide_queries, guide_positives), or with guide_negatives, which `negatives` need;
            (N, E), (N, E) and (N, E) or (N, K, E), without gradient: embeddings of another model.
            The margin, which is 0 if it is not given, compares their cosines instead (GISTEmbed).
            Scores are then computed in PyTorch, a panel of rows at a time, on every backend.
        normalize: L2-normalise queries, positives and negatives first (cosine similarity). False:
            inner products. The margin still compares cosines, in panels as with a guide.
        group, chunk_size, backend: as in `multi_positive_infonce`. The candidates are those of all
            ranks, negatives and guide included.

    The default, and the two directions of (query, document) pairs with "per_direction", are one
    call of `multi_positive_infonce`. Otherwise each direction takes one pass over its scores, two
    if it has negatives, and half precision features are computed in fp32. With hardness and a
    scale per query, scores are computed in panels. With N = 1 and without negatives the loss is 0
    (log 2 if the positive pair is in Z_i twice).

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`, and for
    hardness "hard" without negatives.
    Source: sentence-transformers 6.2, whose meanings and defaults the options have. Henderson et
    al. 2017, section 4.4; Li et al. 2023 (GTE, its improved contrastive loss: all directions);
    Günther et al. 2024 (Jina Embeddings 2: per_direction); Lan et al. 2025, eq. 5 (hardness
    "in_batch"); Schechter Vera et al. 2025 (EmbeddingGemma: hardness "hard"); Solatorio 2024
    (GISTEmbed: guide with all directions except doc_to_query; there positives are compared with
    positives only); Zhang et al. 2025 (Qwen3 Embedding: all directions except doc_to_query, with
    margin=-0.1; theirs also leaves out documents that equal the positive).
    """
    args = check_arguments(queries, positives, scale, group, chunk_size, backend, names=MNRL)
    o = RankingOptions(
        directions,
        partition_mode,
        hardness_mode,
        hardness_strength,
        guide,
        margin,
        margin_strategy,
        normalize,
    )
    o, negatives = check_ranking_options(o, args, negatives)
    if o.margin is None and o.hardness_mode is None:
        if o.directions == ("query_to_doc",):
            return _query_to_doc(args, negatives, normalize)
        # With a group, a scale per query of a single row is read as 0-d: paths would differ.
        pairs = negatives is None and args.scale.ndim == 0 and group is None
        if pairs and o.partition_mode == "per_direction" and len(o.directions) == 2:
            return infonce(args, Options(normalize=normalize))
    ranking = Ranking(args, negatives, o)
    losses = ranking.losses()
    return ranking.batch.all_reduce_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def _query_to_doc(args: Arguments, negatives: Tensor | None, normalize: bool) -> Tensor:
    options = Options(symmetric=False, normalize=normalize)
    if negatives is None:
        return infonce(args, options)
    keys = torch.cat([args.keys, negatives.flatten(0, 1)])
    rows = global_row_numbers(len(keys), args.group, keys.device)
    ids = {"query_ids": rows[: len(args.queries)], "key_ids": rows}
    return infonce(args._replace(keys=keys, **ids), options)


def check_ranking_options(
    o: RankingOptions, args: Arguments, negatives: object
) -> tuple[RankingOptions, Tensor | None]:
    """Check the options and the negatives, which are returned as (N, K, D).

    Raises TypeError or ValueError that names the option.
    """
    check_flags(normalize=o.normalize)
    n = len(args.queries)
    if negatives is not None:
        negatives = check_tensor("negatives", negatives)
        if negatives.ndim not in (2, 3) or len(negatives) != n:
            raise ValueError(
                f"negatives must have shape (N, D) or (N, K, D) with N = {n}, got"
                f" {tuple(negatives.shape)}"
            )
        args.check_features_like_queries("negatives", negatives.flatten(0, -2))
    o = _check_directions(o)
    o = _check_hardness(o, negatives)
    if o.guide is not None:
        o = o._replace(guide=_check_guide(o.guide, args, negatives))
    margin = 0.0 if o.margin is None and o.guide is not None else o.margin
    if margin is not None:
        margin = check_number("margin", margin, -math.inf, math.inf)
    check_choice("margin_strategy", o.margin_strategy, ("absolute", "relative"))
    if o.margin_strategy == "relative" and margin is None:
        raise ValueError("margin_strategy='relative' needs margin or guide, which are missing")
    if negatives is not None:
        negatives = negatives.reshape(n, -1, negatives.shape[-1])
    return o._replace(margin=margin), negatives


def _check_directions(o: RankingOptions) -> RankingOptions:
    if isinstance(o.directions, str) or not isinstance(o.directions, Sequence):
        raise TypeError(
            f"directions must be a sequence of names, got {type(o.directions).__name__}"
        )
    for name in o.directions:
        check_choice("directions", name, DIRECTIONS)
    if len(set(o.directions)) < len(o.directions) or "query_to_doc" not in o.directions:
        raise ValueError(
            "directions must name each direction once, with 'query_to_doc', which has the positive"
            f" pairs, among them; got {o.directions}"
        )
    check_choice("partition_mode", o.partition_mode, ("joint", "per_direction"))
    without_positive = {"query_to_query", "doc_to_doc"}.intersection(o.directions)
    if o.partition_mode == "per_direction" and without_positive:
        raise ValueError(
            "partition_mode='per_direction' needs the positive pair in every direction, which"
            f" {' and '.join(sorted(without_positive))} in directions do not have: use 'joint'"
        )
    return o._replace(directions=tuple(o.directions))


def _check_hardness(o: RankingOptions, negatives: Tensor | None) -> RankingOptions:
    strength = check_number("hardness_strength", o.hardness_strength, 0, math.inf)
    check_choice("hardness_mode", o.hardness_mode, (None, *HARDNESS_MODES))
    if o.hardness_mode is None:
        if strength:
            raise ValueError(f"hardness_strength={strength} needs hardness_mode, which is missing")
        return o
    mode = HARDNESS_MODES[o.hardness_mode]
    if mode == "hard" and negatives is None:
        raise ValueError(f"hardness_mode={o.hardness_mode!r} needs negatives, got none")
    return o._replace(hardness_mode=mode if strength else None, hardness_strength=strength)


def _check_guide(guide: object, args: Arguments, negatives: Tensor | None) -> tuple[Tensor, ...]:
    """The checked embeddings of the guide, each of two dimensions."""
    names = ("guide_queries", "guide_positives", "guide_negatives")
    if isinstance(guide, Tensor) or not isinstance(guide, Sequence):
        raise TypeError(
            "guide must be a sequence (guide_queries, guide_positives[, guide_negatives]), got"
            f" {type(guide).__name__}"
        )
    wanted = 2 if negatives is None else 3
    if len(guide) != wanted:
        have = "no negatives" if negatives is None else "negatives"
        raise ValueError(
            f"guide must have the {wanted} tensors {', '.join(names[:wanted])} with {have}, got"
            f" {len(guide)}"
        )
    rows = [len(args.queries)] * 2
    guide = [check_tensor(name, x) for name, x in zip(names, guide, strict=False)]
    if negatives is not None:
        shape = tuple(negatives.shape[:-1])
        if guide[2].shape[:-1] != shape:
            raise ValueError(
                f"guide_negatives must have shape {(*shape, 'E')} like negatives, got"
                f" {tuple(guide[2].shape)}"
            )
        guide[2] = guide[2].flatten(0, -2)
        rows.append(len(guide[2]))
    for name, x in zip(names[1:], guide[1:], strict=False):
        check_pair(names[0], guide[0], name, x)
    return tuple(
        args.check_constant_features(name, x, count)
        for name, x, count in zip(names, guide, rows, strict=False)
    )


# The pairs (anchors, candidates) of each direction whose scores are needed. The last two are those
# of sentence-transformers' GISTEmbedLoss: queries of the same rank, and positives alone.
_PAIRS = {
    "query_to_doc": (("queries", "positives"), ("queries", "negatives")),
    "query_to_query": (("queries", "queries"),),
    "doc_to_query": (("positives", "queries"),),
    "doc_to_doc": (("positives", "positives"), ("positives", "negatives")),
    "query_to_local_query": (("queries", "queries"),),
    "positive_to_positive": (("positives", "positives"),),
}


class Ranking:
    """The losses of `mnrl_loss`, one for each query, with any options.

    The kernels sum the negatives alone. Relative to the score of the positive, T, the loss is

        log Z - T = log(c + Σ e^{S - T})

    with the sum over the negatives, and c the number of directions with the positive pair. In this
    form a small loss keeps its digits.

    negatives: (N, K, D).
    """

    def __init__(self, args: Arguments, negatives: Tensor | None, options: RankingOptions):
        self.o, self.args = options, args.in_accumulate_dtype()
        self.batch = self.args.global_batch()
        self.features = {"queries": self.args.queries, "positives": self.args.keys}
        if negatives is not None:
            negatives = to_accumulate_dtype(to_autocast_dtype(negatives)).flatten(0, 1)
            self.features["negatives"] = negatives
            self.batch_of_negatives = self._make_batch_of_negatives(negatives)
        self.scale = self.args.scale
        if isinstance(self.batch, GlobalBatch):
            self.scale = same_scale_shape_on_all_ranks(
                self.scale, self.batch, len(self.args.queries)
            )

    def _make_batch_of_negatives(self, negatives: Tensor) -> GlobalBatch | LocalBatch:
        """The batch of queries and negatives. A negative has the id of its query."""
        queries, rows = self.args.queries, self.batch.query_ids
        if rows is None:
            rows = torch.arange(len(queries), device=queries.device)
        owners = rows.repeat_interleave(len(negatives) // len(rows))
        return global_batch(
            *(self.args.group, queries, negatives, rows, owners),
            *(self.args.chunk_size, self.args.backend),
        )

    def losses(self) -> Tensor:
        """The loss of each local query, (N,)."""
        with without_autocast(self.args.queries.device):
            self._prepare()
            log_sums = [self._log_sum(direction) for direction in self.o.directions]
            if self.o.partition_mode == "joint":
                positives = sum(
                    name in ("query_to_doc", "doc_to_query") for name in self.o.directions
                )
                total = reduce(logaddexp, log_sums)
                return torch.logaddexp(torch.full_like(total, math.log(positives)), total)
            losses = [torch.logaddexp(torch.zeros_like(x), x) for x in log_sums]
            return sum(losses) / len(losses)

    def _prepare(self) -> None:
        o, guide = self.o, None
        if o.guide is not None:
            guide = dict(zip(self.features, o.guide, strict=True))
        elif o.margin is not None and not o.normalize:
            guide = {name: x.detach() for name, x in self.features.items()}
        self.guide = guide and {name: unit(x, dim=1) for name, x in guide.items()}
        if o.normalize:
            self.features = {name: unit(x, dim=1) for name, x in self.features.items()}
        # what the margin compares
        self.unit = self.guide or {name: x.detach() for name, x in self.features.items()}
        queries, positives = self.features["queries"], self.features["positives"]
        self.positive_score = self.scale * row_dot(queries, positives)
        self.limit = None if o.margin is None else self._limit()
        self.symmetric = None
        in_one_pass = not o.boost("in_batch") and not self.scale.ndim
        if in_one_pass and "doc_to_query" in o.directions:
            self.symmetric = self._scores("queries", "positives", self.batch, symmetric=True)

    def _limit(self) -> Tensor:
        """The cosine above which a candidate is left out, (N,)."""
        own = row_dot(self.unit["queries"], self.unit["positives"])
        factor = own.abs() if self.o.margin_strategy == "relative" else 1.0
        return own - self.o.margin * factor + TOLERANCE * torch.finfo(own.dtype).eps

    def _scores(
        self,
        anchors: str,
        candidates: str,
        batch: GlobalBatch | LocalBatch,
        symmetric: bool = False,
    ) -> Scores:
        return Scores(
            *(batch, self.features[anchors], self.features[candidates], self.scale),
            symmetric=symmetric,
            backend=self.args.backend,
            row_limit=self.limit,
            col_limit=self.limit if symmetric else None,
            guide=self.guide and (self.guide[anchors], self.guide[candidates]),
        )

    def _log_sum(self, direction: str) -> Tensor:
        """log Σ e^{S - T} over the negatives of a direction, -inf without any."""
        log_sums = []
        for anchors, candidates in _PAIRS[direction]:
            if candidates == "negatives":
                if candidates in self.features:
                    log_sums += self._log_sums_of_negatives(anchors)
            elif self.symmetric is not None and direction in ("query_to_doc", "doc_to_query"):
                side = "row" if direction == "query_to_doc" else "col"
                statistics = self.symmetric.statistics(exclude_positives=True)
                log_sums.append(self._relative(statistics[side]))
            else:
                batch = self.batch
                if direction == "query_to_local_query":
                    batch = LocalBatch(*[len(self.features["queries"])] * 2)
                boost = self.o.boost("in_batch") if direction == "query_to_doc" else 0.0
                log_sums.append(self._of_others(self._scores(anchors, candidates, batch), boost))
        return reduce(logaddexp, log_sums)

    def _log_sums_of_negatives(self, anchors: str) -> list[Tensor]:
        """The sums over the negatives of other queries, and over those of the query itself."""
        o, batch = self.o, self.batch_of_negatives
        in_batch, hard = o.boost("in_batch"), o.boost("hard")
        of_others = self._scores(anchors, "negatives", batch)
        if anchors == "positives":
            return [self._of_others(of_others, 0.0)]
        # with ids that are never equal, a query's own negatives count like those of other queries
        unequal = batch.with_ids(batch.query_ids * 0, batch.key_ids * 0 + 1)
        of_all = self._scores(anchors, "negatives", unequal)
        if in_batch == hard:
            return [self._of_others(of_all, hard)]
        hard_negatives = self._per_query(self.features)
        ids = torch.ones_like(hard_negatives[:, :, 0], dtype=torch.long)
        if self.limit is not None:
            queries = self.unit["queries"][:, :, None]
            own = torch.bmm(self._per_query(self.unit), queries).squeeze(2)
            ids = ids.masked_fill(own > self.limit[:, None], -1)  # an id of padding leaves it out
        own = HardNegatives(replace(of_all, row_limit=None), hard_negatives, ids, hard)
        return [self._of_others(of_others, in_batch), own.log_sum(1.0, self.positive_score)]

    def _per_query(self, features: dict[str, Tensor]) -> Tensor:
        """The negatives as (N, K, D)."""
        return features["negatives"].unflatten(0, (len(features["queries"]), -1))

    def _of_others(self, scores: Scores, boost: float) -> Tensor:
        scores = scores.boosted(boost) if boost else scores
        return self._relative(scores.statistics(exclude_positives=True)["row"])

    def _relative(self, direction: Direction) -> Tensor:
        return direction.log_sum(1.0, self.positive_score)


@same_on_every_rank
def one_to_k_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of an item and its K captions, for example in K languages. All are positives.

        L = mean_i [ log Σ_jl exp S_ijl - (1/K) Σ_l S_iil ],   S_ijl = logit_scale · <q_i, k_jl>

    with one denominator over all captions of all items. With `symmetric`, the mean of this and of
    the InfoNCE of the captions against the items.

    Args:
        queries: (N, D), L2-normalised; dtypes as in `multi_positive_infonce`.
        keys: (N, K, D), L2-normalised: the K captions of each item.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        symmetric: as above. False: the items are the only anchors.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Nie et al. 2024 (CCRK, 1-to-K contrastive learning). The authors' code divides the
    captions' InfoNCE by K; here both directions have the same weight.
    """
    keys = check_tensor("keys", keys)
    args = check_arguments(
        queries,
        keys.flatten(0, 1) if keys.ndim == 3 else keys,
        logit_scale,
        group,
        chunk_size,
        backend,
        allow_unequal_rows=True,
    )
    n = len(args.queries)
    if keys.ndim != 3 or len(keys) != n:
        raise ValueError(f"keys must have shape (N, K, D) with N = {n}, got {tuple(keys.shape)}")
    rows = global_row_numbers(n, group, keys.device)
    args = args._replace(query_ids=rows, key_ids=rows.repeat_interleave(keys.shape[1]))
    return infonce(args, Options(symmetric=symmetric))
