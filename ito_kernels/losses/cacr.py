"""Contrastive attraction and contrastive repulsion (CACR)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.dispatch import check_name
from ..similarity.panelwise import panelwise_sum
from .batch import check_arguments
from .options import Options, check_number, check_options
from .precision import without_autocast


@same_on_every_rank
def cacr_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    t_positive: float = 1.0,
    t_negative: float = 0.9,
    exclude_self: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive attraction and contrastive repulsion.

        L = mean_i Σ_{p ∈ P_i} π⁺_ip c_ip  -  mean_i Σ_{j ∉ P_i} π⁻_ij c_ij
        c_ij = ‖q_i - k_j‖² = 2 - 2<q_i, k_j>
        π⁺_ip ∝ exp(t⁺ c_ip) over the positives,   π⁻_ij ∝ exp(-t⁻ c_ij) over the negatives

    Distant positives and close negatives get larger weights. The first mean is over the anchors
    with a positive, the second over those with a negative. Gradients flow through the weights π
    too. The primitive cannot express these weights: the scores are computed in PyTorch, a panel of
    rows at a time, on every backend.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised; bf16 and fp16 are computed in fp32.
        query_ids, key_ids: as in `multi_positive_infonce`.
        t_positive, t_negative: t⁺ and t⁻, 0 or more; 0 gives equal weights.
        exclude_self: (i, i) is neither positive nor negative, for queries and keys from the same
            tower. Needs N = M. Without ids no positives are left, and the first mean is 0.
        group, chunk_size: as in `multi_positive_infonce`.
        backend: its name is checked, but it has no effect.

    Returns a 0-d fp32 tensor (fp64 for fp64 features), 0 without positives and negatives. Raises as
    `multi_positive_infonce`.
    Source: Zheng et al. 2021 (CACR), L_CA + L_CR, with the squared distance as its cost; the
    defaults are those of the authors' CIFAR-10 experiments. Its anchors draw K positives and M
    negatives; here all of the batch are used.
    """
    t_positive = check_number("t_positive", t_positive, 0, math.inf)
    t_negative = check_number("t_negative", t_negative, 0, math.inf)
    if backend is not None:
        check_name(backend)
    args = check_arguments(
        queries, keys, 1.0, group, chunk_size, "reference", ids=(query_ids, key_ids)
    )
    check_options(Options(exclude_self=exclude_self), args)
    scores = args.scores(symmetric=False, exclude_self=exclude_self)
    batch, a = scores.global_batch, scores.queries
    query_ids, key_ids = scores.query_ids, scores.key_ids
    if query_ids is None:
        query_ids = key_ids = torch.arange(len(a), device=a.device)
    with without_autocast(a.device):
        b, key_ids = batch.all_gather_rows(scores.keys), batch.all_gather_rows(key_ids)
        a, b = (x.masked_fill((i < 0)[:, None], 0) for x, i in ((a, query_ids), (b, key_ids)))
        k = scores.positive_counts("row")
        negatives = (scores.candidate_counts("row") - k).masked_fill(query_ids < 0, 0)
        counts = (batch.all_reduce_sum((x > 0).sum()).clamp(min=1) for x in (k, negatives))
        shares = tuple((x > 0) / c.to(a.dtype) for x, c in zip((k, negatives), counts, strict=True))

        padded, first_self = key_ids < 0, scores.diagonal
        columns = torch.arange(len(key_ids), device=a.device)

        def panel(dot: Tensor, rows: Tensor) -> tuple:
            """The panel's part of the loss and the gradient of its inner products."""
            different = query_ids[rows, None] != key_ids
            excluded = padded
            if first_self is not None:
                excluded = padded | (columns == rows[:, None] + first_self)
            attraction, attraction_grad = _expected_cost(
                dot, t_positive, different | excluded, shares[0][rows, None]
            )
            repulsion, repulsion_grad = _expected_cost(
                dot, -t_negative, ~different | excluded, shares[1][rows, None]
            )
            return attraction - repulsion, (attraction_grad.sub_(repulsion_grad),)

        loss = panelwise_sum(panel, a, b)
        return batch.all_reduce_loss(loss).to(a.dtype)


def _expected_cost(dot: Tensor, t: float, mask: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i share_i Σ_j π_ij c_ij and its gradient, with c = 2 - 2·dot and π_ij ∝ exp(t c_ij) over
    the pairs that `mask` does not leave out.

    The gradient with respect to `dot` is -2·share_i · π_ij (1 + t (c_ij - Σ_j π_ij c_ij)).
    """
    weights = (-2 * t * dot).masked_fill_(mask, -torch.inf).softmax(1)
    weights.masked_fill_(share == 0, 0)  # the softmax of a row without pairs is NaN
    mean = torch.linalg.vecdot(weights, dot)[:, None]
    grad = weights.mul_((dot - mean).mul_(4 * t * share).sub_(2 * share))
    return (share * (2 - 2 * mean)).sum(), grad
