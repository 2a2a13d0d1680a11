"""Decoupled losses: the denominator of a positive leaves out the other positives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from .batch import check_arguments
from .common import check_flags
from .infonce import infonce
from .options import Options
from .precision import without_autocast
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
        queries, keys: (N, D) and (M, D), L2-normalised.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        query_ids, key_ids: (N,) and (M,) integers; equal ids are positives. Each defaults to the
            row number, which needs N = M. A negative id marks a padded row, which is ignored.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Yeh et al. 2022 (Decoupled contrastive learning).
    """
    check_flags(symmetric=symmetric)
    args = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    scores = Scores(args.global_batch(), *args[:3], symmetric, backend=backend)
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
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax loss in which the denominator of a positive is itself plus the negatives.

        L = mean_i (1/k_i) Σ_{p ∈ P_i} [ log(exp S_ip + Σ_{j ∉ P_i} exp S_ij) - S_ip ]
          = mean_i (1/k_i) Σ_{p ∈ P_i} softplus(log Σ_{j ∉ P_i} exp S_ij - S_ip)

    Arguments, `symmetric` and anchors without positives or negatives are as in
    `decoupled_contrastive_loss`. In addition to the passes over S, the scores of the positives are
    computed once more, in tiles of the matrix sorted by id: memory is O((N + M)·D) for any number
    of positives. With ids it synchronises with the device once. bf16 and fp16 features are computed
    in fp32, because positives and negatives are combined outside the kernels.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Feeney and Hughes 2023 (SINCERE).
    """
    check_flags(symmetric=symmetric)
    args = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    if query_ids is None and key_ids is None:  # one positive per anchor: this is InfoNCE
        return infonce(args, Options(symmetric=symmetric))
    scores = args.scores(symmetric)
    weights = {
        side: _share(scores, side) / scores.positive_counts(side).clamp(min=1)
        for side in scores.directions
    }
    return softmax_over_negatives(scores, weights)


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
