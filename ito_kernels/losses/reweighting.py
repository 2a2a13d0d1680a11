"""The reweighted negatives of the denominator: hardness weighting and debiasing.

All sums are passed as logarithms, (N,), of scores from which a constant per anchor was subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hardness_weighted(log_weights: Tensor, log_weighted: Tensor, number: Tensor) -> Tensor:
    """log Σ_j w_j e^{S_j} over the negatives, with w_j = e^{βS_j} / mean_j e^{βS_j}.

    Args:
        log_weights: log Σ_j e^{βS_j}.
        log_weighted: log Σ_j e^{(1+β)S_j}.
        number: the number of negatives.

    Returns (N,), -inf for an anchor without negatives.
    Source: Robinson et al. 2021, as in the authors' code: the partition function is the mean over
    the batch's negatives.
    """
    has_negatives = number > 0
    log_weighted = torch.where(has_negatives, log_weighted, 0)
    log_weights = torch.where(has_negatives, log_weights, 0)
    total = log_weighted - log_weights + number.clamp(min=1).log()
    return torch.where(has_negatives, total, -torch.inf)


def debiased(
    log_negatives: Tensor, log_positive: Tensor, number: Tensor, prior: Tensor, floor: Tensor
) -> Tensor:
    """log max{ (Σ e^{S⁻} - number·τ⁺·mean e^{S⁺}) / (1 - τ⁺), number·e^floor }.

    Args:
        log_negatives: log Σ e^{S⁻} over the negatives.
        log_positive: the log of the mean of e^{S⁺} over the positives.
        number: the number of negatives.
        prior: τ⁺, 0-d or (N,).
        floor: the smallest possible score, 0-d or (N,).

    Returns (N,), -inf for an anchor without negatives.
    Source: Chuang et al. 2020, the estimator g, with M the number of positives of the anchor.
    """
    has_negatives = number > 0
    log_number = number.clamp(min=1).log()
    log_negatives = torch.where(has_negatives, log_negatives, 0)
    log_false = log_number + prior.log() + log_positive
    true_fraction = 1 - (log_false - log_negatives).clamp(max=0).exp()
    clamped = true_fraction <= 0  # False for NaN, so that NaN reaches the loss
    log_true = torch.where(clamped, 1, true_fraction).log()
    log_true = log_negatives + log_true - torch.log1p(-prior)
    floor = log_number + floor
    log_true = torch.where(clamped, floor, torch.maximum(log_true, floor))
    return torch.where(has_negatives, log_true, -torch.inf)
