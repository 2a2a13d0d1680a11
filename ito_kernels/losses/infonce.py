"""InfoNCE with any number of positives per anchor.

For an anchor i with positives P_i and negatives N_i,

    loss_i = log D_i - T_i

D_i, the denominator: Σ e^S over the candidates of all pools, or Σ e^S over P_i plus the reweighted
negatives. T_i, the target: the mean of S over P_i, or the logarithm of the mean or of the sum of
e^S over P_i. Both are relative to `shift`, a constant beside the largest score, where digits do not
cancel. Without options that need more it is one call of the primitive, with gradients formed in the
forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, global_ranges, same_on_every_rank
from ..similarity.spec import Problem, SideUpstream, Upstream, as_autocast_problem
from .batch import Arguments, check_arguments
from .margin import with_margin
from .options import Options, check_options, placed_pairs
from .pools import HardNegatives, InBatch, Queue, Union, Unlisted
from .positive_pairs import Listed, Pairs, SameId
from .precision import accumulated, as_autocast, without_autocast
from .reweighting import debiased, hard
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
    label_smoothing: float = 0.0,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    key_bias: Tensor | None = None,
    positive_pairs: Tensor | None = None,
    positive_weights: Tensor | None = None,
    queue: Tensor | None = None,
    queue_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    false_negative_margin: float | None = None,
    debias: float | Tensor | None = None,
    hardness: float | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple:
    """Contrastive loss of queries against keys, with in-batch negatives.

    With S = logit_scale · queries · keysᵀ, D_i = Σ_j exp S_ij and the k_i positives P_i of
    query i, a query's loss is

        "mean"  log D_i - (1/k_i) Σ_{j ∈ P_i} S_ij             L_out of SupCon
        "in"    log D_i - log Σ_{j ∈ P_i} exp(S_ij) + log k_i  L_in of SupCon
        "sum"   log D_i - log Σ_{j ∈ P_i} exp(S_ij)            MIL-NCE

    and a key's is the same along the columns, with its own number of positives k'_j. S is never
    formed: memory is O((N + M)·D).

    Args:
        queries, keys: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked
            backends), L2-normalised unless `normalize`.
        logit_scale: the multiplier itself (1 / temperature), not its logarithm: a number, a 0-d
            tensor or an (N,) tensor.
        query_ids, key_ids: (N,) and (M,) integers; equal ids are positives. Each defaults to the
            row number, then N must equal M. A negative id is a padded row: no anchor, no candidate,
            no part of the mean; its features are not looked at.
        positives: "mean", "in" or "sum", as above.
        symmetric: average query→key and key→query; else query→key alone.
        exclude_self: leave out the pairs (i, i): for queries and keys of one tower. Needs N = M,
            and ids: without them (i, i) are the only positives, and the loss is 0.
        empty: an anchor without a positive counts as 0 in the mean ("zero"), or is left out of
            it ("drop"; 0 if none is left).
        label_smoothing: ε, a number from 0 to 1: (1 - ε)·loss + ε·(log D_i - mean of S over all
            candidates of i), as `F.cross_entropy`.
        query_weights, key_weights: (N,) and (M,): each anchor's loss is multiplied by its weight,
            and the mean divides by their sum. Constants.
        key_bias: (M,), added to the scores of each key: -log q_j corrects for the frequency of
            keys that are sampled (logQ). For query→key.
        positive_pairs, positive_weights: (P, 2) integers, pairs (i, j) in place of the ids where
            positives are no partition, and (P,) weights: P_i becomes a weighted mean, of S ("mean")
            or of exp S ("in"). A pair that is listed twice counts twice as a positive and once in
            D_i; one with a weight of 0 is a negative. Memory O(P·D). With debias or hardness their
            negatives are summed in PyTorch, a panel of rows at a time, whatever the backend.
        queue, queue_ids: (Q, D) keys without gradient, further negatives for query→key, and (Q,)
            integers: those with a query's id are left out of it, those with a negative id of all.
        hard_negatives: (N, K, D), further negatives of their own query alone, with gradient. For
            query→key.
        false_negative_margin: m: a candidate that is no positive leaves D_i if its inner product
            with the anchor is above that of the anchor's largest positive by more than m. Queue
            and hard negatives too; in key→query with the key as the anchor. One or two more passes
            over S, or none with symmetric=False; and one for each direction with debias or
            hardness, which need the number of those that are left. label_smoothing is over those
            that are left: their sum, and in key→query with one logit_scale for each query D too,
            are formed in PyTorch, a panel of rows at a time, whatever the backend.
        debias: τ⁺ < 1, the share of negatives that are false, a number or (N,). The negatives' part
            of D_i becomes max{(Σ_neg exp S - n·τ⁺·mean_pos exp S) / (1 - τ⁺), n·exp(-logit_scale)}
            with n the number of negatives. Both directions (a τ⁺ per query: then N = M).
        hardness: β ≥ 0: negatives are weighted by exp(βS), relative to the mean of exp(βS) over
            them, before they are debiased. Both directions. Three passes over S instead of one.
        normalize: L2-normalise queries, keys, queue and hard negatives first.
        reduction: "mean" over the anchors, "sum", or "none": (N,), as a pair (N,), (M,) where
            symmetric.
        return_stats: also return a dict without gradients: `row_loss`, `row_lse` (N,), `col_loss`,
            `col_lse` (M,), without the weights, with log D as lse; means over the anchors with a
            positive: `row_accuracy`, `col_accuracy` (the largest score of the anchor is
            a positive's; a tie with a negative counts as wrong) and `positive_score`;
            `hardest_negative_score`, the mean over the queries that have a negative. The last four
            are of the batch, in units of S. `col_*` is None unless symmetric; with positive_pairs
            so are the accuracies and the hardest negative, which the kernels find by ids.
        backend: see `ito_kernels.backends()`; None chooses. What torch.compile has compiled keeps
            the backend it was compiled with, whatever `use_backend` and ITO_BACKEND say later.

        group: a process group or a one-dimensional DeviceMesh: the batch is that of all its ranks,
            each of which gives its own rows and gets the global loss, with gradients that are
            those of one process on the whole batch once averaged over ranks (DDP, FSDP). Ids
            count across ranks and default to global row numbers; means divide by global counts;
            what is per anchor is this rank's, `queue` and `hard_negatives` too: it is for one queue
            on all ranks that the loss is that of one process. `positive_pairs` are global row
            numbers, each pair given by the rank of its query. See `ito_kernels.distributed`.
        chunk_size: with a group: how many keys of all ranks are gathered at a time.

        With `debias`, `hardness`, `positive_pairs`, `queue` or `hard_negatives`, and if symmetric
        with `false_negative_margin` and one logit_scale for each query, half precision is computed
        in fp32: parts of several passes cancel.

    Returns:
        The loss, a 0-d fp32 tensor (fp64 for fp64 features), or as `reduction` says; with
        `return_stats` a pair of it and the dict.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before any kernel runs, or
            two that have no meaning together.
        RuntimeError: the backend asked for cannot run here.

    Sources: van den Oord et al. 2018 (InfoNCE); Khosla et al. 2020, eq. 2 and 3 (SupCon);
    Miech et al. 2020 (MIL-NCE); He et al. 2020 (queue); Yi et al. 2019 (logQ correction); Chuang et
    al. 2020 (debias); Robinson et al. 2021 (hardness).
    """
    given = check_arguments(
        queries,
        keys,
        logit_scale,
        group,
        chunk_size,
        backend,
        ids=(query_ids, key_ids),
        unequal=positive_pairs is not None,
    )
    options = Options(
        positives=positives,
        symmetric=symmetric,
        exclude_self=exclude_self,
        empty=empty,
        normalize=normalize,
        reduction=reduction,
        return_stats=return_stats,
        label_smoothing=label_smoothing,
        query_weights=query_weights,
        key_weights=key_weights,
        key_bias=key_bias,
        positive_pairs=positive_pairs,
        positive_weights=positive_weights,
        queue=queue,
        queue_ids=queue_ids,
        hard_negatives=hard_negatives,
        false_negative_margin=false_negative_margin,
        debias=debias,
        hardness=hardness,
    )
    return infonce(given, options)


def infonce(given: Arguments, options: Options) -> Tensor | tuple:
    """`multi_positive_infonce` of arguments that have passed the door; options are checked here."""
    o = check_options(options, given)
    if o.positive_pairs is not None:
        n, m = len(given.queries), len(given.keys)
        o = placed_pairs(o, *global_ranges(n, m, given.group, given.queries.device))
    batch = given.global_batch()
    given = given.with_ids_of(batch)
    if o.normalize:
        given = given.normalized()
        o = o.with_candidates(lambda x: torch.nn.functional.normalize(x, dim=-1))
    if not o.plain or o.reduction == "none":
        return _by_pools(o, given, batch)

    queries, keys, scale = given[:3]
    scores = Scores(batch, queries, keys, scale, o.symmetric, o.exclude_self, given.backend)
    kind = "linear" if o.positives == "mean" else "lse"
    problem = Problem(
        queries,
        None if keys is queries else keys,
        scale,
        row_ids=given.query_ids,
        col_ids=given.key_ids,
        positives=kind,
        exclude_self=o.exclude_self,
        cols=o.symmetric,
        hardest=o.return_stats,
    )
    row_weights, log_counts = _weights(o, scores, "row")
    col_weights = SideUpstream()
    if o.symmetric and given.query_ids is given.key_ids:
        col_weights, log_counts = row_weights, 2 * log_counts
    elif o.symmetric:
        col_weights, of_cols = _weights(o, scores, "col")
        log_counts = log_counts + of_cols
    found = batch.logsumexp_of(
        as_autocast_problem(problem),
        Upstream(row_weights, col_weights),
        o.return_stats,
        given.backend,
    )
    loss, stats = found if o.return_stats else (found, None)
    if o.positives == "in":
        loss = loss + batch.all_reduce_loss(log_counts)
    if not o.return_stats:
        return loss
    with torch.no_grad():
        scores.keep(stats, kind)
        anchors = {side: log_d_minus_t(o, scores, side) for side in scores.directions}
        return loss, _diagnostics(scores, anchors, kind)


def _weights(o: Options, scores: Scores, side: str) -> tuple[SideUpstream, Tensor | float]:
    """Of logsum and pos in the loss, relative to the maximum, where digits do not cancel, and what
    log k adds for "in". Statistics that are not finite show in the sum even with a weight of 0."""
    share = 0.5 if o.symmetric else 1.0
    if scores.query_ids is None and not o.exclude_self:  # each anchor has one positive
        n = scores.features(side).size(0)
        u = scores.scale.new_full((n,), share / n if o.reduction == "mean" else share)
        return SideUpstream(u, -u), 0.0
    k = scores.positives(side)
    number = 1
    if o.reduction == "mean":
        number = scores.anchors(side)
        if o.empty == "drop":
            number = scores.global_batch.all_reduce_sum((k > 0).sum()).clamp(min=1)
        number = torch.as_tensor(number, dtype=k.dtype, device=k.device)
    u, several = k.clamp(max=1) * (share / number), k.clamp(min=1)
    weights = SideUpstream(u, -u / several if o.positives == "mean" else -u)
    return weights, (u * several.log()).sum() if o.positives == "in" else 0.0


def _by_pools(o: Options, given: Arguments, batch: GlobalBatch | LocalBatch) -> Tensor | tuple:
    """With every option, as a composition of calls of the primitive."""
    queries, keys, scale = given[:3]
    if o.false_negative_margin is not None and isinstance(batch, GlobalBatch):
        scale = _of_one_kind(scale, batch, len(queries))
    o = o.with_candidates(as_autocast)
    same = keys is queries
    queries, keys = as_autocast(queries), as_autocast(keys)
    if o.meets_outside(scale):  # the kernels: what cancels there was rounded before
        queries, keys = accumulated(queries), accumulated(keys)
    keys = queries if same else keys
    scores = Scores(
        *(batch, queries, keys, scale, o.symmetric, o.exclude_self, given.backend, o.key_bias)
    )
    with without_autocast(queries.device):
        known = None
        if o.plain and o.return_stats:  # one pass for the losses and for what is beside them
            known = "linear" if o.positives == "mean" else "lse"
            scores.statistics(positives=known, hardest=True)
        limited = scores if o.false_negative_margin is None else with_margin(scores, o)
        pairs = _pairs(o, limited)
        anchors = {side: log_d_minus_t(o, limited, side, pairs) for side in scores.directions}
        weights = {"row": o.query_weights, "col": o.key_weights}
        losses = tuple(_reduced(o, scores, side, x, weights[side]) for side, x in anchors.items())
        loss = losses[0]
        if o.symmetric:
            loss = losses if o.reduction == "none" else 0.5 * (losses[0] + losses[1])
        return (loss, _diagnostics(scores, anchors, known)) if o.return_stats else loss


def _of_one_kind(scale: Tensor, batch: GlobalBatch, queries: int) -> Tensor:
    """One for each query on all ranks or on none, which choose their collectives by it: a scale of
    shape (1,) reads as 0-d, also that of a rank with one query."""
    per_query = batch.all_reduce_max(scale.new_tensor(float(scale.ndim))) > 0
    return scale.expand(queries) if per_query else scale


class Anchors(NamedTuple):
    """One direction's anchors: their losses, 0 without a positive; the number (or weight) of their
    positives; for the statistics log D, absolute, and with pairs their mean score."""

    loss: Tensor
    k: Tensor
    log_d: Tensor | None = None
    positive: Tensor | None = None


def _pairs(o: Options, scores: Scores) -> Pairs | None:
    """The positives as pairs, where they are given as such or a pass over S would be for the
    diagonal alone; None where the kernels find them by ids."""
    if o.positive_pairs is not None:
        return Pairs(scores, *o.positive_pairs, o.positive_weights)
    if o.hardness and scores.query_ids is None:
        rows = torch.arange(len(scores.queries), device=scores.queries.device)
        return Pairs(scores, rows, rows, None)
    return None


def pools_of(o: Options, scores: Scores, side: str, pairs: Pairs | None) -> Union:
    """The candidates that D sums: all of them, or the negatives if those are reweighted."""
    if o.reweighted and o.positive_pairs is not None:  # whose negatives the kernels cannot tell
        pools = [Unlisted(pairs, side, o.powers)]
    else:
        kind = "linear" if o.positives == "mean" and not o.reweighted else "lse"
        kind = None if pairs or o.hardness else kind
        pools = [InBatch(scores, side, positives=kind, exclude_positives=o.reweighted)]
    if side == "row" and o.queue is not None:
        pools.append(Queue(scores, o.queue, o.queue_ids))
    if side == "row" and o.hard_negatives is not None:
        pools.append(HardNegatives(scores, o.hard_negatives))
    return Union(pools, scores.ids(side))


def log_d_minus_t(o: Options, scores: Scores, side: str, pairs: Pairs | None = None) -> Anchors:
    candidates = pools_of(o, scores, side, pairs)
    positives = Listed(pairs, side) if pairs else SameId(scores, side, o.reweighted)
    shift = candidates.largest(o.powers[-1])
    k = positives.number()
    some = k > 0
    if o.positives == "mean":
        target = positives.mean(shift)
    else:
        target = positives.log_sum(shift) - (_log(k) if o.positives == "in" else 0)

    logs = [candidates.log_sum(p, shift) for p in o.powers]
    if o.reweighted:
        number = candidates.number()
        negatives = hard(*logs, number) if o.hardness else logs[0]
        if o.debias is not None:
            mean = positives.log_sum(shift) - _log(k)
            negatives = debiased(negatives, mean, number, o.debias, -scores.scale - shift)
        log_d = torch.logaddexp(torch.where(some, positives.once(shift), 0), negatives)
    else:
        (log_d,) = logs

    if o.label_smoothing:
        total, number = candidates.total(shift)
        even = total / number.clamp(min=1)
        target = (1 - o.label_smoothing) * target + o.label_smoothing * even
    # NaN shows even where there is no positive
    loss = torch.where(some | log_d.isnan(), log_d - target, 0)
    if not o.return_stats:
        return Anchors(loss, k)
    listed = o.positive_pairs is not None
    return Anchors(loss, k, log_d + shift, positives.mean(shift) + shift if listed else None)


def _log(k: Tensor) -> Tensor:
    return torch.where(k > 0, k, 1).log()


def _reduced(
    o: Options, scores: Scores, side: str, anchors: Anchors, weights: Tensor | None
) -> Tensor:
    ids, batch = scores.ids(side), scores.global_batch
    if weights is not None and ids is not None:
        weights = weights.masked_fill(ids < 0, 0)  # padding may hold anything
    loss = anchors.loss if weights is None else anchors.loss * weights
    if o.reduction == "none":
        return loss
    if o.reduction == "sum":
        return batch.all_reduce_loss(loss.sum())
    weights = torch.ones_like(anchors.k) if weights is None else weights
    if o.empty == "drop":
        weights = weights.masked_fill(anchors.k <= 0, 0)
    elif ids is not None:
        weights = weights.masked_fill(ids < 0, 0)
    number = batch.all_reduce_sum(weights.sum())
    return batch.all_reduce_loss(loss.sum()) / torch.where(number == 0, 1, number)


@torch.no_grad()
def _diagnostics(scores: Scores, anchors: dict[str, Anchors], known: str | None = None) -> dict:
    """Without the options' weights. Which scores are hardest and which win is a matter of the
    batch alone; where positives are pairs the kernels cannot tell them, and it stays unknown.

    known: the kind of positives in a pass that has been made with the hardest negatives.
    """
    out = dict.fromkeys(
        f"{side}_{what}" for side in ("row", "col") for what in ("loss", "lse", "accuracy")
    )
    all_reduce_mean, rows, found = scores.global_batch.all_reduce_mean, anchors["row"], None
    if rows.positive is None:
        found = scores.statistics(positives=known or "linear", hardest=True)
    for side, x in anchors.items():
        out[f"{side}_loss"], out[f"{side}_lse"] = x.loss.detach(), x.log_d.detach()
        if found:
            right = found[side].max > found[side].neg_max
            out[f"{side}_accuracy"] = all_reduce_mean(right.to(x.loss.dtype), x.k > 0)
    out["hardest_negative_score"] = None
    positive = rows.positive
    if found:
        at = found["row"]
        pos = at.pos
        if known == "lse":  # which does not give their mean: one more forward pass
            pos = scores.logsumexp(positives="linear", cols=False).row_pos
        positive = pos / rows.k.clamp(min=1) + at.max
        out["hardest_negative_score"] = all_reduce_mean(at.neg_max, at.neg_max != -torch.inf)
    out["positive_score"] = all_reduce_mean(positive, rows.k > 0)
    return out
