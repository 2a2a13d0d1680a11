"""Decoupled losses: a positive is compared with the negatives, not with the other positives."""

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
    """InfoNCE whose denominator leaves the positives out.

        L = mean_i [ log Σ_{j ∉ P_i} exp S_ij - (1/k_i) Σ_{j ∈ P_i} S_ij ]

    with S = logit_scale · queries · keysᵀ and the k_i positives P_i of query i; where symmetric the
    mean of this and the same along the columns. S is never formed. An anchor without positives or
    without negatives contributes 0.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        query_ids, key_ids: (N,) and (M,) integers, equal for positives; each defaults to the row
            number, then N must equal M. A negative id is a padded row that takes no part.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Yeh et al. 2022 (Decoupled contrastive learning).
    """
    check_flags(symmetric=symmetric)
    given = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    scores = Scores(given.global_batch(), *given[:3], symmetric, backend=backend)
    weights = {}
    for side in scores.directions:
        k, negatives = scores.positives(side), scores.candidates(side) - scores.positives(side)
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
    """Multi-label softmax: each positive has a denominator of itself and the negatives.

        L = mean_i (1/k_i) Σ_{p ∈ P_i} [ log(exp S_ip + Σ_{j ∉ P_i} exp S_ij) - S_ip ]
          = mean_i (1/k_i) Σ_{p ∈ P_i} softplus(log Σ_{j ∉ P_i} exp S_ij - S_ip)

    Arguments, the symmetric form and anchors without positives or negatives as in
    `decoupled_contrastive_loss`. The positives' scores are computed once more beside the passes
    over S, in tiles that hold them: memory O((N + M)·D) whatever their number. With ids one wait
    for the device. bf16 and fp16 features are computed in fp32, because positives and negatives
    meet outside the kernels.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Feeney and Hughes 2023 (SINCERE).
    """
    check_flags(symmetric=symmetric)
    given = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    if query_ids is None and key_ids is None:  # each positive is alone: this is InfoNCE
        return infonce(given, Options(symmetric=symmetric))
    scores = given.scores(symmetric)
    weights = {
        side: _share(scores, side) / scores.positives(side).clamp(min=1)
        for side in scores.directions
    }
    return softmax_over_negatives(scores, weights)


def softmax_over_negatives(scores: Scores, weights: dict[str, Tensor]) -> Tensor:
    """Σ over directions, anchors i and positives p of weight_i · softplus(log Σ_neg exp S - S_ip).

    scores: with ids. weights: one for each anchor of a direction, (N,) or (M,).
    """
    with without_autocast(scores.queries.device):
        found = scores.statistics(exclude_positives=True)
        log_negatives = {side: x.logsum + x.max for side, x in found.items()}
        batch = scores.global_batch
        of_rows, of_cols = softplus_sums(
            scores.queries,
            batch.all_gather_rows(scores.keys),
            scores.query_ids,
            batch.all_gather_rows(scores.key_ids),
            scores.scale,
            log_negatives["row"],
            batch.all_gather_rows(log_negatives["col"]) if scores.symmetric else None,
            scores.diagonal,
        )
        sums = {"row": of_rows}
        if scores.symmetric:  # of all ranks' columns, over these rows
            sums["col"] = batch.local_columns(batch.all_reduce_sum(of_cols))
        total = 0
        for side, x in log_negatives.items():
            # also of an anchor without a positive: what is not finite shows
            shown = 0 * x.masked_fill(x == -torch.inf, 0)
            total = total + (weights[side] * sums[side] + shown).sum()
        return batch.all_reduce_loss(total)


def _share(scores: Scores, side: str) -> Tensor:
    """What an anchor's loss is multiplied by in the mean, of both directions where symmetric."""
    return scores.scale.new_full((), 0.5 if scores.symmetric else 1.0) / scores.anchors(side)
