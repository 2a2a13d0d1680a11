"""InfoNCE with any number of positives per anchor.

For an anchor i with positives P_i and negatives N_i,

    loss_i = log D_i - T_i

The denominator D_i is Σ e^S over the candidates of all pools, or Σ e^S over P_i plus the reweighted
negatives. The target T_i is the mean of S over P_i, or the logarithm of the mean or of the sum of
e^S over P_i. Both are computed relative to `shift`, a constant close to the largest score, so that
their difference keeps its digits.

If the options allow it, one call of the primitive computes the loss and, in the forward pass, its
gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, global_ranges, same_on_every_rank
from ..similarity.spec import Problem, SideUpstream, Upstream, as_autocast_problem
from .batch import Arguments, check_arguments, same_scale_shape_on_all_ranks
from .common import normalize_rows
from .margin import apply_margin
from .options import Options, check_options, localize_pairs
from .pools import (
    CombinedPools,
    HardNegatives,
    InBatchCandidates,
    QueueCandidates,
    UnpairedCandidates,
)
from .positive_pairs import PositivePairs, PositivesAsCandidates, PositivesById, PositivesByPair
from .precision import has_half_values, to_accumulate_dtype, to_autocast_dtype, without_autocast
from .reweighting import debiased, hardness_weighted
from .scores import Scores


@same_on_every_rank
def multi_positive_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    positives: str = "mean",
    symmetric: bool = True,
    exclude_self: bool = False,
    empty: str = "zero",
    in_batch: bool = True,
    equal_ids: str = "positive",
    label_smoothing: float = 0.0,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    key_bias: Tensor | None = None,
    positive_pairs: Tensor | None = None,
    positive_weights: Tensor | None = None,
    queue: Tensor | None = None,
    queue_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_type: str = "absolute",
    margin_on: str = "all",
    guide_queries: Tensor | None = None,
    guide_keys: Tensor | None = None,
    debias: float | Tensor | None = None,
    hardness: float | None = None,
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | Any:  # Any: the pair of return_stats; callers need no cast
    """Contrastive loss of queries against keys, with in-batch negatives.

    With S = logit_scale · queries · keysᵀ, D_i = Σ_j exp S_ij and the k_i positives P_i of query i,
    the loss of a query is

        "mean"  log D_i - (1/k_i) Σ_{j ∈ P_i} S_ij             L_out of SupCon
        "in"    log D_i - log Σ_{j ∈ P_i} exp(S_ij) + log k_i  L_in of SupCon
        "sum"   log D_i - log Σ_{j ∈ P_i} exp(S_ij)            MIL-NCE

    The loss of a key is the same along its column, with its own number of positives. S is never
    formed: memory is O((N + M)·D). Below, a pass over S computes every score once, and a panel is a
    block of rows of S.

    Args:
        queries, keys: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked
            backends), L2-normalised unless `normalize`.
        logit_scale: the multiplier itself (1 / temperature), not its logarithm: a number, a 0-d
            tensor (or of shape (1,)), or an (N,) tensor with one scale per query.
        query_ids, key_ids: (N,) and (M,) integers; equal ids are positives. Pass both or neither. A
            missing one defaults to the row numbers 0 to N - 1 and needs N = M: with query_ids
            alone, key query_ids_i is the positive of query i. A negative id marks a padded row: it
            is no anchor, no candidate and no part of the mean, and its features are not read.
        positives: "mean", "in" or "sum", as above.
        symmetric: average the losses of query→key and key→query. False: query→key only.
        exclude_self: leave out the pairs (i, i), for queries and keys from the same tower. Needs
            N = M. Without ids the pairs (i, i) are the only positives: the loss is then 0.
        empty: an anchor without a positive counts as 0 in the mean ("zero") or is left out of the
            mean ("drop"; the mean of no anchors is 0).
        label_smoothing: ε from 0 to 1: (1 - ε)·loss + ε·(log D_i - mean of S over all candidates of
            i), as in `F.cross_entropy`.
        query_weights, key_weights: (N,) and (M,), without gradient. Each anchor's loss is
            multiplied by its weight, and the mean divides by the sum of the weights.
        key_bias: (M,), added to the scores of each key in query→key. With q_j the sampling
            frequency of key j, -log q_j is the logQ correction.
        positive_pairs, positive_weights: (P, 2) integers, pairs (i, j), and (P,) weights. They
            replace the ids where positives are not a partition. The mean over P_i becomes a
            weighted mean, of S ("mean") or of exp S ("in"). A pair that is listed twice counts
            twice as a positive and once in D_i. A pair with weight 0 is a negative. Memory O(P·D).
            Checking the numbers synchronises with the device. With debias or hardness, the
            negatives are summed in PyTorch, a panel of rows at a time, on every backend.
        in_batch: with False, the other keys of the batch are not negatives. The candidates of a
            query are its positives, the queue and its hard negatives (MoCo). Needs `queue` or
            `hard_negatives`, and symmetric=False. Without ids and without a group it takes no pass
            over S; otherwise one, or two with positives="mean".
        equal_ids: "positive", as above. With "ignore" only key i is a positive of query i, and all
            other pairs with equal ids are left out, in both directions. Such pairs are accidental
            hits of recommenders or repeated captions. Needs N = M. If query i or key i is padded,
            neither is an anchor.
        queue, queue_ids: (Q, D) keys without gradient and (Q,) integers: further negatives for
            query→key. A queue key with the id of a query (without query_ids: its row number) is no
            candidate of that query; one with a negative id is no candidate at all.
        hard_negatives, hard_negative_ids: (N, K, D), with gradient, and (N, K) integers: further
            negatives of their own query only, for query→key. One with the id of its query is no
            candidate. A negative id is padding, for queries with fewer than K.
        false_negative_margin: m. A negative is left out of D_i if its inner product with the anchor
            exceeds that of the anchor's most similar positive by more than m. This applies to the
            queue and the hard negatives too. In key→query the key is the anchor. It takes one or
            two more passes over S, none with symmetric=False; with debias or hardness, one more per
            direction to count the remaining negatives. With ids it synchronises with the device.
            label_smoothing is over the remaining candidates. Their sum is computed in PyTorch, a
            panel of rows at a time, on every backend; so is D in key→query with a logit_scale per
            query.
        margin_type: "absolute", as above; with "relative" the margin is m times the absolute value
            of the inner product of the anchor and its most similar positive.
        margin_on: "all" negatives, or those "in_batch" only: not the queue and the hard negatives.
        guide_queries, guide_keys: (N, E) and (M, E), without gradient: embeddings of another model.
            The margin compares their inner products instead (GISTEmbed). It then does not apply to
            the queue and the hard negatives, for which there are no guide embeddings. The scores
            are computed in PyTorch, a panel of rows at a time, on every backend.
        debias: 0 ≤ τ⁺ < 1, the proportion of negatives that are false, a number or (N,). The
            negatives' part of D_i becomes max{(Σ_neg exp S - n·τ⁺·mean_pos exp S) / (1 - τ⁺),
            n·exp(-logit_scale)} with n negatives. Both directions; τ⁺ per query needs N = M.
        hardness: β ≥ 0. Negatives are weighted by exp(βS), divided by its mean over the negatives,
            before `debias` is applied. Both directions. Three passes over S instead of one.
        hardness_mode, hardness_strength: a kind of negatives, and α ≥ 0. Negatives of that kind
            have the score S_ij + α·<q_i, k_j>, whose second term has no gradient (LLaVE,
            EmbeddingGemma). The kinds are "in_batch", the other keys of the batch, in both
            directions; "hard", the hard negatives; and "all", which includes the queue.
            sentence-transformers' names are accepted too. "in_batch" and "all" take one pass over S
            without ids and group, otherwise three. With a logit_scale per query, S is computed in
            PyTorch, a panel of rows at a time.
        normalize: L2-normalise queries, keys, queue, hard negatives and the guide's rows first.
        reduction: "mean" or "sum" over the anchors, averaged over both directions if symmetric; or
            "none", which returns (N,), if symmetric the pair (N,), (M,).
        return_stats: also return a dict of tensors without gradient. `row_loss`, `row_lse` (N,),
            `col_loss`, `col_lse` (M,): losses without the weights, and log D. `row_accuracy`,
            `col_accuracy` and `positive_score`: means over the anchors with a positive; an anchor
            counts as accurate if a positive has a larger score than every negative.
            `hardest_negative_score`: the mean over the queries with a negative. These four are over
            the candidates of the batch, scores in units of S. `col_*` is None unless symmetric.
            With positive_pairs the accuracies and `hardest_negative_score` are None: the kernels
            find them by ids.
        group: a process group or a one-dimensional DeviceMesh. The batch is that of all its ranks:
            each passes its local rows and gets the global loss. After averaging over ranks (DDP,
            FSDP) gradients are those of one process on the whole batch. Ids are compared across
            ranks and default to global row numbers; means divide by global counts. Results per
            anchor are those of the local rows. `queue` and `hard_negatives` are local too: only
            with the same queue on all ranks does the loss equal that of one process.
            `positive_pairs` are global row numbers, each pair passed by the rank of its query. See
            `ito_kernels.distributed`.
        chunk_size: with a group, the number of keys of all ranks that are gathered at a time; by
            default 512 per rank, at least 32,768 and at most 131,072.
        backend: see `ito_kernels.backends()`; None chooses automatically. A function compiled by
            torch.compile keeps the backend that it was compiled with, whatever `use_backend` and
            ITO_BACKEND are set to later.

    With `debias`, `hardness`, `hardness_mode`, `equal_ids="ignore"`, `positive_pairs`, `queue`,
    `hard_negatives` or a guide, half precision features are computed in fp32, because the loss is a
    difference of results of several passes. The same holds for symmetric=True with both
    `false_negative_margin` and a logit_scale per query.

    Returns:
        The loss, a 0-d fp32 tensor (fp64 for fp64 features), or as `reduction` says. With
        `return_stats` the pair (loss, dict).

    Raises:
        TypeError, ValueError: an argument is invalid, or two arguments cannot be combined. The
            message names them. Raised before any kernel runs.
        RuntimeError: the requested backend cannot run here.

    Sources: van den Oord et al. 2018, eq. 4 (InfoNCE); Khosla et al. 2020, eq. 2 and 3 (SupCon);
    Miech et al. 2020 (MIL-NCE, whose one denominator has the negatives of both directions); Szegedy
    et al. 2016, section 7 (label_smoothing); He et al. 2020, eq. 1 (queue, in_batch); Yi et al.
    2019 (logQ correction); Zhang et al. 2025 (Qwen3 Embedding: false_negative_margin); Solatorio
    2024 (GISTEmbed: guide); Chuang et al. 2020 (debias); Robinson et al. 2021 (hardness, which is
    combined with debias there); Lan et al. 2025, eq. 5, and Schechter Vera et al. 2025
    (EmbeddingGemma) (hardness_mode). docs/losses.md lists the differences.
    """
    args = check_arguments(
        queries,
        keys,
        logit_scale,
        group,
        chunk_size,
        backend,
        ids=(query_ids, key_ids),
        allow_unequal_rows=positive_pairs is not None,
    )
    options = Options(
        positives=positives,
        symmetric=symmetric,
        exclude_self=exclude_self,
        empty=empty,
        normalize=normalize,
        reduction=reduction,
        return_stats=return_stats,
        in_batch=in_batch,
        equal_ids=equal_ids,
        label_smoothing=label_smoothing,
        query_weights=query_weights,
        key_weights=key_weights,
        key_bias=key_bias,
        positive_pairs=positive_pairs,
        positive_weights=positive_weights,
        queue=queue,
        queue_ids=queue_ids,
        hard_negatives=hard_negatives,
        hard_negative_ids=hard_negative_ids,
        false_negative_margin=false_negative_margin,
        margin_type=margin_type,
        margin_on=margin_on,
        guide_queries=guide_queries,
        guide_keys=guide_keys,
        debias=debias,
        hardness=hardness,
        hardness_mode=hardness_mode,
        hardness_strength=hardness_strength,
    )
    return infonce(args, options)


def infonce(args: Arguments, options: Options) -> Tensor | tuple:
    """`multi_positive_infonce` for arguments that `check_arguments` has returned. Checks the
    options."""
    o = check_options(options, args)
    if o.positive_pairs is not None:
        n, m = len(args.queries), len(args.keys)
        o = localize_pairs(o, *global_ranges(n, m, args.group, args.queries.device))
    batch = args.global_batch()
    args = args.with_batch_ids(batch)
    if o.normalize:
        args = args.with_normalized_rows()
        if o.hard_negatives is not None and args.query_ids is not None:
            padded = (args.query_ids < 0)[:, None, None]  # may hold any values
            o = o._replace(hard_negatives=o.hard_negatives.masked_fill(padded, 0))
        o = o.map_extra_candidates(lambda x: torch.nn.functional.normalize(x, dim=-1))
        if o.guide_queries is not None:
            o = o._replace(
                guide_queries=normalize_rows(o.guide_queries, args.query_ids),
                guide_keys=normalize_rows(o.guide_keys, args.key_ids),
            )
    if not o.single_pass or o.reduction == "none":
        return _multi_pass_infonce(o, args, batch)

    queries, keys, scale = args[:3]
    scores = None
    if args.query_ids is not None or o.exclude_self or o.return_stats:
        scores = Scores(batch, queries, keys, scale, o.symmetric, o.exclude_self, args.backend)
    positives = "linear" if o.positives == "mean" else "lse"
    problem = Problem(
        queries,
        None if keys is queries else keys,
        scale,
        row_ids=args.query_ids,
        col_ids=args.key_ids,
        positives=positives,
        exclude_self=o.exclude_self,
        cols=o.symmetric,
        hardest=o.return_stats,
        exact_max=o.return_stats,
    )
    weights, log_counts = _statistics_weights(o, args, scores)
    problem = as_autocast_problem(problem)
    result = batch.logsumexp_of(problem, weights, o.return_stats, args.backend)
    loss, stats = result if o.return_stats else (result, None)
    if o.positives == "in":
        loss = loss + batch.all_reduce_loss(log_counts)
    if not o.return_stats:
        return loss
    with torch.no_grad():
        scores.store_pass(stats, positives)
        anchors = {side: anchor_losses(o, scores, side) for side in scores.directions}
        return loss, _diagnostics(o, scores, anchors, positives)


def _statistics_weights(
    o: Options, args: Arguments, scores: Scores | None
) -> tuple[Upstream, Tensor | float]:
    """The weights of logsum and pos in the loss, and the term of log k for positives="in".

    scores: None if each anchor has one positive and no statistics are asked for.
    """
    share = 0.5 if o.symmetric else 1.0
    if args.query_ids is None and not o.exclude_self:  # each anchor has one positive
        u = share / args.queries.size(0) if o.reduction == "mean" else share
        row = SideUpstream(u, -u)
        return Upstream(row, row if o.symmetric else SideUpstream()), 0.0
    row, log_counts = _side_weights(o, scores, "row", share)
    if not o.symmetric:
        return Upstream(row), log_counts
    if args.query_ids is args.key_ids:
        return Upstream(row, row), 2 * log_counts
    col, col_log_counts = _side_weights(o, scores, "col", share)
    return Upstream(row, col), log_counts + col_log_counts


def _side_weights(
    o: Options, scores: Scores, side: str, share: float
) -> tuple[SideUpstream, Tensor | float]:
    """`_statistics_weights` of one direction, whose losses are multiplied by `share`.

    Both statistics are relative to the row maximum, which cancels. An anchor without a positive has
    weight 0, but its statistics are still part of the sum, so that NaN and infinity reach the loss.
    """
    k = scores.positive_counts(side)
    number = 1
    if o.reduction == "mean":
        number = scores.anchor_count(side)
        if o.empty == "drop":
            number = scores.global_batch.all_reduce_sum((k > 0).sum()).clamp(min=1)
        number = torch.as_tensor(number, dtype=k.dtype, device=k.device)
    u, divisor = k.clamp(max=1) * (share / number), k.clamp(min=1)
    weights = SideUpstream(u, -u / divisor if o.positives == "mean" else -u)
    return weights, (u * divisor.log()).sum() if o.positives == "in" else 0.0


def _multi_pass_infonce(
    o: Options, args: Arguments, batch: GlobalBatch | LocalBatch
) -> Tensor | tuple:
    """InfoNCE with any options, as a composition of several calls of the primitive."""
    queries, keys, scale = args[:3]
    shape_matters = o.false_negative_margin is not None or o.boost("in_batch")
    if shape_matters and isinstance(batch, GlobalBatch):
        scale = same_scale_shape_on_all_ranks(scale, batch, len(queries))
    o = o.map_extra_candidates(to_autocast_dtype)
    same = keys is queries
    queries, keys = to_autocast_dtype(queries), to_autocast_dtype(keys)
    half_values = False
    if o.needs_accumulate_dtype(scale):
        half_values = has_half_values(queries)
        queries, keys = to_accumulate_dtype(queries), to_accumulate_dtype(keys)
    keys = queries if same else keys
    scores = Scores(
        *(batch, queries, keys, scale, o.symmetric, o.exclude_self, args.backend, o.key_bias),
        half_values=half_values,
    )
    with without_autocast(queries.device):
        positives = None
        if o.single_pass and o.return_stats:  # "none": one pass for losses and diagnostics
            positives = "linear" if o.positives == "mean" else "lse"
            scores.statistics(positives=positives, hardest=True)
        pairs = _positive_pairs(o, scores)
        limited = scores if o.false_negative_margin is None else apply_margin(scores, o, pairs)
        negatives = _negatives_apart(o, limited)
        anchors = {
            side: anchor_losses(o, limited, side, pairs, negatives) for side in scores.directions
        }
        weights = {"row": o.query_weights, "col": o.key_weights}
        losses = tuple(_reduce(o, scores, side, x, weights[side]) for side, x in anchors.items())
        loss = losses[0]
        if o.symmetric:
            loss = losses if o.reduction == "none" else 0.5 * (losses[0] + losses[1])
        return (loss, _diagnostics(o, scores, anchors, positives)) if o.return_stats else loss


class AnchorLosses(NamedTuple):
    """The results for the anchors of one direction.

    loss: 0 for an anchor without a positive. k: the number or the weight of its positives.
    log_d: log D, without shift. positive_score: the mean score of the positives, only with
    `positive_pairs` and equal_ids="ignore". The last two are for `return_stats`.
    """

    loss: Tensor
    k: Tensor
    log_d: Tensor | None = None
    positive_score: Tensor | None = None


def _positive_pairs(o: Options, scores: Scores) -> PositivePairs | None:
    """The positives as pairs, or None if the kernels find them by ids.

    Without ids, positives whose scores are needed apart from the negatives' are the pairs (i, i):
    this saves a pass over S.
    """
    if o.positive_pairs is not None:
        return PositivePairs(scores, *o.positive_pairs, o.positive_weights)
    guided = o.guide_queries is not None
    apart = o.hardness or o.boost("in_batch") or not o.in_batch or guided
    if o.equal_ids == "ignore" or (apart and scores.query_ids is None):
        return PositivePairs.of_rows(scores)
    return None


def _negatives_apart(o: Options, scores: Scores) -> Scores | None:
    """The scores of the batch's negatives where they differ from `scores`, else None."""
    boost, ignore = o.boost("in_batch"), o.equal_ids == "ignore"
    # The kernels cannot exempt listed pairs from the limits. With a guide, positives and panels are
    # computed in different ways: a small loss keeps its digits only if no panel has positives.
    limited = o.false_negative_margin is not None and o.positive_pairs is not None
    if not (boost or ignore or limited or scores.guide is not None):
        return None
    if ignore:  # the positives are (i, i), whatever their ids
        scores = replace(scores, exclude_self=True)
    return scores.boosted(boost) if boost else scores


def candidate_pools(
    o: Options,
    scores: Scores,
    side: str,
    pairs: PositivePairs | None,
    negatives: Scores | None,
    positives: PositivesById | PositivesByPair,
) -> CombinedPools:
    """The candidates whose exponentials the denominator sums: all of them, or only the negatives if
    these are reweighted."""
    apart = negatives is not None or o.reweights_negatives  # negatives apart from the positives
    pools = []
    if not o.reweights_negatives and (apart or not o.in_batch):
        pools.append(PositivesAsCandidates(positives))
    if o.in_batch:
        if apart and o.positive_pairs is not None:
            totals = o.label_smoothing > 0
            pools.append(UnpairedCandidates(negatives or scores, pairs, side, o.powers, totals))
        elif negatives is not None:
            kind = "linear" if o.label_smoothing else None
            options = {"positives": kind, "exclude_positives": True}
            pools.append(InBatchCandidates(negatives, side, **options))
        else:
            # the same arguments as in `positives`, so that one pass serves both
            kind = "linear" if o.positives == "mean" and not o.reweights_negatives else "lse"
            kind = None if pairs or o.hardness else kind
            options = {"positives": kind, "exclude_positives": apart}
            pools.append(InBatchCandidates(scores, side, **options))
    if o.margin_on == "in_batch" or scores.guide is not None:
        scores = replace(scores, row_limit=None)
    if side == "row" and o.queue is not None:
        pools.append(QueueCandidates(scores, o.queue, o.queue_ids, o.boost("queue")))
    if side == "row" and o.hard_negatives is not None:
        ids, boost = o.hard_negative_ids, o.boost("hard")
        pools.append(HardNegatives(scores, o.hard_negatives, ids, boost))
    return CombinedPools(pools, scores.ids(side))


def anchor_losses(
    o: Options,
    scores: Scores,
    side: str,
    pairs: PositivePairs | None = None,
    negatives: Scores | None = None,
) -> AnchorLosses:
    """log D - T for each anchor of a direction.

    negatives: the scores of the batch's negatives, if they differ from `scores`.
    """
    if pairs:
        positives = PositivesByPair(pairs, side)
    else:
        positives = PositivesById(scores, side, o.reweights_negatives and o.in_batch)
    candidates = candidate_pools(o, scores, side, pairs, negatives, positives)
    # without in_batch, the batch's largest score may be far above those of the candidates
    shift = candidates.reference_shift(o.powers[-1]) if o.in_batch else positives.reference_shift()
    k = positives.count()
    has_positive = k > 0
    if o.positives == "mean":
        target = positives.mean(shift)
    else:
        target = positives.log_sum(shift) - (_log_or_zero(k) if o.positives == "in" else 0)

    log_sums = [candidates.log_sum(p, shift) for p in o.powers]
    if o.reweights_negatives:
        number = candidates.count()
        log_negatives = hardness_weighted(*log_sums, number) if o.hardness else log_sums[0]
        if o.debias is not None:
            log_mean = positives.log_sum(shift) - _log_or_zero(k)
            floor = -scores.scale - shift
            log_negatives = debiased(log_negatives, log_mean, number, o.debias, floor)
        log_positives = torch.where(has_positive, positives.log_sum_unweighted(shift), 0)
        log_d = torch.logaddexp(log_positives, log_negatives)
    else:
        (log_d,) = log_sums

    if o.label_smoothing:
        total, number = candidates.total(shift)
        uniform_target = total / number.clamp(min=1)
        target = (1 - o.label_smoothing) * target + o.label_smoothing * uniform_target
    # NaN reaches the loss even from an anchor without a positive
    loss = torch.where(has_positive | log_d.isnan(), log_d - target, 0)
    if not o.return_stats:
        return AnchorLosses(loss, k)
    listed = o.positive_pairs is not None or o.equal_ids == "ignore"
    score = positives.mean(shift) + shift if listed else None
    return AnchorLosses(loss, k, log_d + shift, score)


def _log_or_zero(k: Tensor) -> Tensor:
    """log k, 0 for k = 0."""
    return torch.where(k > 0, k, 1).log()


def _reduce(
    o: Options, scores: Scores, side: str, anchors: AnchorLosses, weights: Tensor | None
) -> Tensor:
    ids, batch = scores.ids(side), scores.global_batch
    if weights is not None and ids is not None:
        weights = weights.masked_fill(ids < 0, 0)  # padded rows may have any weight
    loss = anchors.loss if weights is None else anchors.loss * weights
    if o.reduction == "none":
        return loss
    if o.reduction == "sum":
        return batch.all_reduce_loss(loss.sum())
    weights = torch.ones_like(anchors.k) if weights is None else weights
    if o.empty == "drop" or o.equal_ids == "ignore":  # with "ignore", only padding has no positive
        weights = weights.masked_fill(anchors.k <= 0, 0)
    elif ids is not None:
        weights = weights.masked_fill(ids < 0, 0)
    number = batch.all_reduce_sum(weights.sum())
    return batch.all_reduce_loss(loss.sum()) / torch.where(number == 0, 1, number)


@torch.no_grad()
def _diagnostics(
    o: Options, scores: Scores, anchors: dict[str, AnchorLosses], positives: str | None = None
) -> dict:
    """The dict of `return_stats`.

    The accuracies and the hardest negative are those of the batch, without the options' weights.
    With positives as pairs they are None: the kernels find negatives by ids.

    positives: "linear" or "lse" if a pass with that kind of positives and with the hardest
        negatives is cached in `scores`.
    """
    out = dict.fromkeys(
        f"{side}_{name}" for side in ("row", "col") for name in ("loss", "lse", "accuracy")
    )
    all_reduce_mean, rows, statistics = scores.global_batch.all_reduce_mean, anchors["row"], None
    if o.equal_ids == "ignore":  # (i, i) is no negative, whatever its ids
        scores = replace(scores, exclude_self=True)
    if o.positive_pairs is None:
        statistics = scores.statistics(positives=positives or "linear", hardest=True)
    for side, x in anchors.items():
        out[f"{side}_loss"], out[f"{side}_lse"] = x.loss.detach(), x.log_d.detach()
        if statistics:
            best = statistics[side].max if x.positive_score is None else x.positive_score
            correct = best > statistics[side].neg_max
            out[f"{side}_accuracy"] = all_reduce_mean(correct.to(x.loss.dtype), x.k > 0)
    out["hardest_negative_score"] = None
    score = rows.positive_score
    if statistics and score is None:
        row = statistics["row"]
        pos = row.pos
        if positives == "lse":  # "lse" does not give the mean score: one more forward pass
            pos = scores.logsumexp(positives="linear", cols=False).row_pos
        score = pos / rows.k.clamp(min=1) + row.max
    if statistics:
        row = statistics["row"]
        out["hardest_negative_score"] = all_reduce_mean(row.neg_max, row.neg_max != -torch.inf)
    out["positive_score"] = all_reduce_mean(score, rows.k > 0)
    return out
