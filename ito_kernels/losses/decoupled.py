"""Decoupled losses: a positive is compared with the negatives, not with the other positives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from .batch import Batch, make_batch
from .common import not_yet
from .pairs import equal_ids
from .precision import inner, take, without_autocast

# Pairs are gathered 2^22 elements at a time, 16 MiB in fp32, of each side.
GATHERED = 1 << 22


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

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Yeh et al. 2022 (Decoupled contrastive learning).
    """
    batch = make_batch(
        queries, keys, logit_scale, query_ids, key_ids, symmetric, backend, group, chunk_size
    )
    weights = {}
    for side in batch.directions:
        k, negatives = batch.positives(side), batch.candidates(side) - batch.positives(side)
        u = ((k > 0) & (negatives > 0)) * _share(batch, side)
        weights[f"{side}_weights"] = u, -u / k.clamp(min=1)
    return batch.logsumexp(
        positives="linear",
        exclude_positives=True,
        cols=symmetric,
        return_stats=False,
        **weights,
    )


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
    `decoupled_contrastive_loss`. The positive pairs are gathered a panel at a time: time O(P·D)
    for P of them beside the passes over S, memory O((N + M)·D) and 16 bytes a pair, which with few
    large groups is much. With ids their number is asked of the device: one wait, and a graph break
    in torch.compile. bf16 and fp16 features are computed in fp32, because positives and negatives
    meet outside the kernels.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Feeney and Hughes 2023 (SINCERE).
    """
    not_yet(group=group, chunk_size=chunk_size)
    batch = make_batch(
        queries, keys, logit_scale, query_ids, key_ids, symmetric, backend, promote=True
    )
    weights = {
        side: _share(batch, side) / batch.positives(side).clamp(min=1) for side in batch.directions
    }
    return softmax_over_negatives(batch, weights)


def softmax_over_negatives(batch: Batch, weights: dict[str, Tensor]) -> Tensor:
    """Σ over directions, anchors i and positives p of weight_i · softplus(log Σ_neg exp S - S_ip).

    weights: one for each anchor of a direction, (N,) or (M,).
    """
    with without_autocast(batch.queries.device):
        found = batch.statistics(exclude_positives=True)
        log_negatives = [x.logsum + x.max for x in found.values()]
        weights = [weights[side] for side in found]
        total = 0
        for rows, cols in equal_ids(batch, max(1, GATHERED // batch.queries.shape[1])):
            total = total + checkpoint(
                _panel,
                *(batch.queries, batch.keys, batch.scale, rows, cols, log_negatives, weights),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        # also where there is no pair at all: a gradient of 0, and what is not finite shows
        return total + 0 * sum(x.masked_fill(x == -torch.inf, 0).sum() for x in log_negatives)


def _panel(queries, keys, scale, rows, cols, log_negatives, weights) -> Tensor:
    """The pairs (rows, cols), in each direction."""
    scale = take(scale, rows) if scale.ndim else scale
    scores = scale * inner(take(queries, rows), take(keys, cols))
    total = 0
    for anchor, others, weight in zip((rows, cols), log_negatives, weights, strict=False):
        # torch's default threshold of 20 returns x itself beyond it, off by 2e-9
        terms = softplus(take(others, anchor) - scores, threshold=40)
        total = total + (take(weight, anchor) * terms).sum()
    return total


def _share(batch: Batch, side: str) -> Tensor:
    """What an anchor's loss is multiplied by in the mean, of both directions where symmetric."""
    ids = batch.ids(side)
    number = len(batch.features(side))
    if ids is not None:
        number = batch.whole.sum((ids >= 0).sum()).clamp(min=1)
    return batch.scale.new_full((), 0.5 if batch.symmetric else 1.0) / number
