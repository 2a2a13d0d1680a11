"""InfoNCE with negatives weighted by the clusters of query and key."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from ..distributed import same_on_every_rank
from ..similarity.spec import check_ids, check_tensor
from .batch import check_arguments
from .common import check_flags
from .options import check_value_range
from .precision import row_dot, without_autocast
from .scores import Direction

# Stands for log 0, the bias of a negative with weight 0: below any score. A maximum below its half
# means that all negatives have weight 0.
LEFT_OUT = -1e30


@same_on_every_rank
def cluster_weighted_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor,
    weights: Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    symmetric: bool = True,
    include_positives: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE with negatives weighted by a table over pairs of clusters.

        L = mean_i [ log(Σ_{p ∈ P_i} exp S_ip + Σ_{j ∉ P_i} w[c_i, c_j] exp S_ij)
                     - (1/k_i) Σ_{p ∈ P_i} S_ip ]

    with S = logit_scale · queries · keysᵀ. With `symmetric`, the mean of this and of the same loss
    along the columns. log w is a bias of rank C: it is computed as C more columns of the features,
    and no matrix is formed. An anchor without a positive contributes 0. Without
    `include_positives` the denominator is that of the weighted negatives alone, and an anchor
    without a negative of weight above 0 contributes 0 too.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised; bf16 and fp16 are computed in fp32.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        query_clusters, key_clusters: (N,) and (M,) integers from 0 to C - 1.
        weights: w, (C, C), 0 or more: w[cluster of the query, cluster of the key]. Its positive
            elements have a gradient. Negatives with weight 0 are left out.
        query_ids, key_ids: as in `multi_positive_infonce`.
        include_positives: whether the denominator has the positives, as above.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Yu et al. 2023 (MEOW), its loss with weighted negatives: include_positives=False (there
    w_ii = 0) and symmetric=False. There w_ij is the number of clusterings in which i and j differ;
    w may be any table here.
    """
    check_flags(symmetric=symmetric, include_positives=include_positives)
    args = check_arguments(
        queries, keys, logit_scale, group, chunk_size, backend, ids=(query_ids, key_ids)
    )
    device = args.queries.device
    rows = check_ids("query_clusters", query_clusters, len(args.queries), "queries", device)
    cols = check_ids("key_clusters", key_clusters, len(args.keys), "keys", device)
    weights = check_tensor("weights", weights, "a (C, C) tensor")
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"weights must be a (C, C) tensor, got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"weights must have a floating-point dtype, got {weights.dtype}")
    check_value_range("weights", weights.detach())
    if device.type == "cpu" and not torch.compiler.is_compiling():
        for name, x in (("query_clusters", rows), ("key_clusters", cols)):
            if not 0 <= int(x.min()) <= int(x.max()) < len(weights):
                raise ValueError(
                    f"{name} must be from 0 to {len(weights) - 1}, got {int(x.min())} to"
                    f" {int(x.max())}"
                )
    scores = args.scores(symmetric)
    with without_autocast(device):
        dtype = scores.queries.dtype
        weights = weights.to(dtype)
        # the bias of weight 0 becomes a feature, which must be finite
        bias = torch.where(weights > 0, torch.where(weights > 0, weights, 1).log(), LEFT_OUT)
        key_columns = one_hot(cols, len(weights)).to(dtype)
        # The scale is in the features: divided by a small one, the bias would hide their products.
        # Padding, which may be NaN, is not in the gradient of the scale.
        features = scores.queries
        if scores.query_ids is not None:
            features = features.masked_fill((scores.query_ids < 0)[:, None], 0)
        weighted = replace(
            scores,
            queries=torch.cat([scores.scale.reshape(-1, 1) * features, bias[rows]], 1),
            keys=torch.cat([scores.keys, key_columns], 1),
            scale=torch.ones_like(scores.scale),
            half_values=False,
        )
        negatives = weighted.statistics(exclude_positives=True)
        losses = []
        if query_ids is None and key_ids is None:
            # the positive of row i is key i: its scores need no pass over S
            positive = scores.scale * row_dot(scores.queries, scores.keys)
            for side, x in negatives.items():
                difference = x.logsum + (x.max - positive)
                if include_positives:
                    terms = softplus(difference, threshold=40)
                else:
                    terms = torch.where(_has_negatives(x), difference, 0)
                losses.append(scores.mean(side, terms))
            return sum(losses) / len(losses)
        means = scores.statistics(positives="linear")
        sums = scores.statistics(positives="lse") if include_positives else means
        for side, direction in sums.items():
            shift, k = direction.shift, scores.positive_counts(side)
            denominator = negatives[side].logsum + (negatives[side].max - shift)
            counted = k > 0
            if include_positives:
                pos = torch.where(counted | direction.logsum.isnan(), direction.pos, 0)
                denominator = torch.logaddexp(pos, denominator)
            else:
                counted = counted & _has_negatives(negatives[side])
            counted = counted | direction.logsum.isnan()  # NaN reaches the loss from any anchor
            loss = denominator - means[side].pos / k.clamp(min=1)
            losses.append(scores.mean(side, torch.where(counted, loss, 0)))
        return sum(losses) / len(losses)


def _has_negatives(negatives: Direction) -> Tensor:
    """Whether an anchor has a negative with a weight above 0. True where a score is NaN."""
    return ~(negatives.max < LEFT_OUT / 2)
