"""Attraction and repulsion as two expectations, each under a distribution over its own kind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..similarity.pairs import finite_shift
from .batch import make_batch
from .common import mean_where, not_yet
from .decoupled import GATHERED
from .options import check_number
from .pairs import equal_ids
from .precision import inner, logaddexp, take, without_autocast
from .soft import attention


def cacr_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    t_positive: float = 1.0,
    t_negative: float = 0.9,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive attraction and contrastive repulsion.

        L = mean_i Σ_{p ∈ P_i} π⁺_ip c_ip  -  mean_i Σ_{j ∉ P_i} π⁻_ij c_ij
        c_ij = ‖q_i - k_j‖² = 2 - 2<q_i, k_j>
        π⁺_ip ∝ exp(t⁺ c_ip) over the positives,   π⁻_ij ∝ exp(-t⁻ c_ij) over the negatives

    The farther a positive and the nearer a negative, the more it counts. The expectation over the
    negatives is attention of q to k, from which the positives' part is subtracted: its error is
    that of fp32 divided by the share of the negatives in the attention, so t⁻ must be moderate.
    Means over the anchors that have a positive, and over those that have a negative. Gradients go
    through the weights π too.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised; bf16 and fp16 are computed in fp32.
        query_ids, key_ids: as in `multi_positive_infonce`. P positive pairs are gathered a panel
            at a time: time O(P·D), memory O((N + M)·D).
        t_positive, t_negative: t⁺ and t⁻, from 0 to 10.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Zheng et al. 2021 (CACR); the defaults are those of the authors' CIFAR experiments.
    """
    not_yet(group=group, chunk_size=chunk_size)
    t_positive = check_number("t_positive", t_positive, 0, 10)
    if check_number("t_negative", t_negative, 0, 10) == 0:
        raise ValueError("t_negative must be greater than 0, got 0")
    batch = make_batch(
        queries, keys, 2.0 * t_negative, query_ids, key_ids, False, backend, promote=True
    )
    with without_autocast(queries.device):
        found = batch.statistics(positives="lse", exclude_positives=True)["row"]
        top = finite_shift(found.max)
        log_negatives, log_sum = found.logsum + top, logaddexp(found.logsum, found.pos) + top
        k = batch.positives("row")
        negatives = batch.candidates("row") - k
        a, b = batch.queries, batch.keys
        if batch.query_ids is not None:
            a = a.masked_fill((batch.query_ids < 0)[:, None], 0)
            b = b[batch.key_ids >= 0]
            negatives = negatives.masked_fill(batch.query_ids < 0, 0)

        sums = [torch.zeros_like(k) for _ in range(3)]
        for rows, cols in equal_ids(batch, max(1, GATHERED // queries.shape[1])):
            panel = checkpoint(
                _panel,
                *(batch.queries, batch.keys, rows, cols, batch.scale, log_sum, t_positive),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            sums = [x + y for x, y in zip(sums, panel, strict=True)]
        weight, cost, positive_part = sums
        attraction = cost / torch.where(k > 0, weight, 1)

        share = (log_negatives - finite_shift(log_sum)).exp()
        everything = inner(a, attention(batch.scale * a, b, b)) if len(b) else torch.zeros_like(k)
        score = (everything - positive_part) / torch.where(negatives > 0, share, 1)
        return mean_where(attraction, k > 0) - mean_where(2 - 2 * score, negatives > 0)


def _panel(queries, keys, rows, cols, scale, log_sum, t) -> tuple[Tensor, Tensor, Tensor]:
    """Per anchor, over the pairs (rows, cols): Σ exp(t c), Σ exp(t c)·c and what they add to the
    attention, Σ exp(S - log_sum)·<q, k>. c is at most 4."""
    score = inner(take(queries, rows), take(keys, cols))
    cost = 2 - 2 * score
    weight = (t * (cost - 4)).exp()
    part = (scale * score - take(log_sum, rows)).exp() * score

    def add(values: Tensor) -> Tensor:
        return torch.zeros_like(log_sum).index_put((rows,), values, accumulate=True)

    return add(weight), add(weight * cost), add(part)
