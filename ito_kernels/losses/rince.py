"""Robust InfoNCE (RINCE): a loss for data in which some positives are wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.spec import is_number
from .batch import PAIRED, check_arguments
from .common import check_flags
from .options import check_number
from .precision import row_dot, without_autocast


@same_on_every_rank
def rince_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    q: float,
    lam: float,
    symmetric: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Robust InfoNCE: false positives with a low score count less than in InfoNCE.

        L = mean_i [ -exp(q·S_ii) / q + (lam · Σ_j exp S_ij)^q / q ]

    with S = logit_scale · queries · keysᵀ. With `symmetric`, the mean of this and of the same loss
    along the columns. S is never formed. For q → 0 the gradient is that of InfoNCE; with q = 1 it
    is that of an exponential loss, which is robust against noise.

    The loss grows like exp(q · logit_scale). It overflows in fp32 only if q · S exceeds 88, even
    where e^S itself would overflow. It can be negative.

    Args:
        queries, keys: (N, D), L2-normalised; row i of both is a positive pair. bf16 and fp16 are
            computed in fp32, because positives and negatives are combined outside the kernels.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        q: greater than 0, at most 1. The authors' commands use 0.1 (SimCLR) and 0.6 (MoCo v3), with
            lam = 0.01.
        lam: λ, the weight of all candidates: 0 or more, finite. The paper has λ ≤ 1; with 0 only
            the term of the positives remains.
        symmetric: also take the keys as anchors.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). For N = 1, where there are no negatives, it
    is (lam^q - 1) · exp(q·S) / q. Raises as `multi_positive_infonce`.
    Source: Chuang et al. 2022 (RINCE), L_RINCE with q and λ; the paper has one direction.
    """
    if not is_number(q):
        raise TypeError(f"q must be a number, got {type(q).__name__}")
    if not 0 < q <= 1:
        raise ValueError(f"q must be greater than 0 and at most 1, got {q}")
    lam = check_number("lam", lam, 0, math.inf)
    check_flags(symmetric=symmetric)
    args = check_arguments(queries, keys, logit_scale, group, chunk_size, backend, names=PAIRED)
    scores = args.scores(symmetric, exclude_self=True)
    log_lam = math.log(lam) if lam else -math.inf
    with without_autocast(scores.queries.device):
        positive = scores.scale * row_dot(scores.queries, scores.keys)
        losses = []
        for side, negatives in scores.statistics().items():
            # log Σ_j e^S_ij - S_ii, from the negatives alone, so that a small one keeps its digits
            # (the gradient of softplus would overflow with a large upstream gradient)
            log_ratio = negatives.logsum + (negatives.max - positive)
            gap = torch.logaddexp(torch.zeros_like(log_ratio), log_ratio)
            losses.append(scores.mean(side, _difference(positive, gap + log_lam, q)))
        return sum(losses) / len(losses)


def _difference(x: Tensor, gap: Tensor, q: float) -> Tensor:
    """(e^{q·(x + gap)} - e^{q·x}) / q, with the larger of the two powers as a factor."""
    up = gap.clamp(min=0)
    down = gap - up
    factor = torch.expm1(q * down) - torch.expm1(-q * up)  # one of the two is 0
    return (q * (x + up)).exp() * factor / q
