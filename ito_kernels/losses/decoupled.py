"""Decoupled losses: the denominator of a positive leaves out the other positives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import global_ranges, same_on_every_rank
from .batch import Arguments, check_arguments
from .infonce import infonce
from .options import Options, check_options, localize_pairs
from .pools import UnpairedCandidates
from .positive_pairs import PositivePairs, PositivesByPair
from .precision import take_rows, without_autocast
from .scores import Scores
from .tiles import softplus_sums


@same_on_every_rank
def decoupled_contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    symmetric: bool = True,
    exclude_self: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE with a denominator of the negatives only.

        L = mean_i [ log Σ_{j ∉ P_i} exp S_ij - (1/k_i) Σ_{j ∈ P_i} S_ij ]

    with S = logit_scale · queries · keysᵀ and the k_i positives P_i of query i. With `symmetric`,
    the mean of this and of the same loss along the columns. S is never formed. An anchor without
    positives or without negatives contributes 0.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised; dtypes as in `multi_positive_infonce`.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        query_ids, key_ids: (N,) and (M,) integers; equal ids are positives. Pass both, or none: the
            default of each is the row numbers 0 to N - 1, which needs N = M. A negative id marks a
            padded row, which is ignored.
        symmetric: average with the same loss along the columns. False: query→key only.
        exclude_self: (i, i) is neither positive nor negative, for queries and keys from the same
            tower. Needs N = M. Without ids no positives are left: the loss is then 0.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Yeh et al. 2022 (Decoupled contrastive learning), eq. 6. Its two views z1 and z2 are
    queries = keys = [z1; z2] with the items' numbers as ids, exclude_self=True and symmetric=False.
    The paper sums over the 2N anchors; this function takes the mean.
    """
    args = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    check_options(Options(symmetric=symmetric, exclude_self=exclude_self), args)
    scores = Scores(args.global_batch(), *args[:3], symmetric, exclude_self, backend)
    weights = {}
    for side in scores.directions:
        k, negatives = (
            scores.positive_counts(side),
            scores.candidate_counts(side) - scores.positive_counts(side),
        )
        u = ((k > 0) & (negatives > 0)) * _share(scores, side)
        weights[f"{side}_weights"] = u, -u / k.clamp(min=1)
    return scores.logsumexp(
        positives="linear",
        exclude_positives=True,
        cols=symmetric,
        return_stats=False,
        **weights,
    )


@same_on_every_rank
def decoupled_softmax_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    symmetric: bool = True,
    exclude_self: bool = False,
    positive_pairs: Tensor | None = None,
    positive_weights: Tensor | None = None,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax loss in which the denominator of a positive is itself plus the negatives.

        L = mean_i (1/k_i) Σ_{p ∈ P_i} [ log(exp S_ip + Σ_{j ∉ P_i} exp S_ij) - S_ip ]
          = mean_i (1/k_i) Σ_{p ∈ P_i} softplus(log Σ_{j ∉ P_i} exp S_ij - S_ip)

    The first arguments, `symmetric`, `exclude_self` and anchors without positives or negatives are
    as in `decoupled_contrastive_loss`. In addition to the passes over S, the scores of the
    positives are computed once more, in tiles of the matrix sorted by id: memory is O((N + M)·D)
    for any number of positives. With ids it synchronises with the device once. bf16 and fp16
    features are computed in fp32, because positives and negatives are combined outside the kernels.

    Args:
        queries, keys, logit_scale, query_ids, key_ids: as in `decoupled_contrastive_loss`.
        symmetric, exclude_self, group, chunk_size, backend: as in `decoupled_contrastive_loss`.
        positive_pairs, positive_weights: (P, 2) integers, pairs (i, j), and (P,) weights, which
            replace the ids; N and M may differ. For rows only: they need symmetric=False. The mean
            over P_i becomes a weighted mean. A pair that is listed twice counts twice as a
            positive. A pair with weight 0 is a negative. Memory O(P·D). The negatives are summed in
            PyTorch, a panel of rows at a time, on every backend.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`, and
    ValueError for pairs with symmetric=True.
    Source: Feeney and Hughes 2023 (SINCERE). Its classes are queries = keys with the labels as ids,
    exclude_self=True and symmetric=False. There every anchor has a positive.
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
        symmetric=symmetric,
        exclude_self=exclude_self,
        positive_pairs=positive_pairs,
        positive_weights=positive_weights,
    )
    options = check_options(options, args)
    if positive_pairs is not None:
        if symmetric:
            raise ValueError("positive_pairs are for rows only: use symmetric=False, got True")
        return _softmax_over_unpaired(options, args)
    if query_ids is None and key_ids is None:  # one positive per anchor: this is InfoNCE
        return infonce(args, options)
    scores = args.scores(symmetric, exclude_self)
    weights = {
        side: _share(scores, side) / scores.positive_counts(side).clamp(min=1)
        for side in scores.directions
    }
    return softmax_over_negatives(scores, weights)


def _softmax_over_unpaired(o: Options, args: Arguments) -> Tensor:
    """The loss of the rows for positives in a list: the negatives are all other keys."""
    n, m, device = len(args.queries), len(args.keys), args.queries.device
    o = localize_pairs(o, *global_ranges(n, m, args.group, device))
    scores = args.scores(symmetric=False, exclude_self=o.exclude_self)
    with without_autocast(device):
        pairs = PositivePairs(scores, *o.positive_pairs, o.positive_weights)
        negatives = UnpairedCandidates(scores, pairs, "row", (1.0,))
        shift = negatives.reference_shift(1.0)
        log_negatives = negatives.log_sum(1.0, shift)
        k = PositivesByPair(pairs, "row").count()
        weights = pairs.weights / take_rows(torch.where(k > 0, k, 1), pairs.rows)
        positives = pairs.pair_scores - take_rows(shift, pairs.rows)
        # NaN or +inf reaches the loss even from an anchor without a positive
        not_finite = 0 * log_negatives.masked_fill(log_negatives == -torch.inf, 0)
        terms = softplus(take_rows(log_negatives, pairs.rows) - positives, threshold=40)
        total = (weights * terms).sum() + not_finite.sum()
        return scores.global_batch.all_reduce_loss(total) / scores.anchor_count("row")


def softmax_over_negatives(scores: Scores, weights: dict[str, Tensor]) -> Tensor:
    """Σ weight_i · softplus(log Σ_{j ∉ P_i} exp S_ij - S_ip) over the directions, their anchors i
    and the positives p of i.

    scores: scores with ids. weights: for each direction the weights of its anchors, (N,) or (M,).
    """
    with without_autocast(scores.queries.device):
        statistics = scores.statistics(exclude_positives=True)
        log_negatives = {side: x.logsum + x.max for side, x in statistics.items()}
        batch = scores.global_batch
        row_sums, col_sums = softplus_sums(
            scores.queries,
            batch.all_gather_rows(scores.keys),
            scores.query_ids,
            batch.all_gather_rows(scores.key_ids),
            scores.scale,
            log_negatives["row"],
            batch.all_gather_rows(log_negatives["col"]) if scores.symmetric else None,
            scores.diagonal,
        )
        sums = {"row": row_sums}
        if scores.symmetric:  # sums of all ranks' columns over this rank's rows
            sums["col"] = batch.local_columns(batch.all_reduce_sum(col_sums))
        total = 0
        for side, x in log_negatives.items():
            # NaN or +inf reaches the loss even from an anchor without a positive
            not_finite = 0 * x.masked_fill(x == -torch.inf, 0)
            total = total + (weights[side] * sums[side] + not_finite).sum()
        return batch.all_reduce_loss(total)


def _share(scores: Scores, side: str) -> Tensor:
    """The weight of an anchor's loss in the mean over anchors and directions."""
    return scores.scale.new_full((), 0.5 if scores.symmetric else 1.0) / scores.anchor_count(side)
