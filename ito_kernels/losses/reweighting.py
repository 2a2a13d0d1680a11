"""Negatives that count otherwise than in a softmax: harder ones more, false ones less.

Everything is a logarithm relative to a constant `shift` (N,) of the scores, one value per anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hard(log_weights: Tensor, log_weighted: Tensor, number: Tensor) -> Tensor:
    """log Σ_j w_j e^{S_j} over the negatives, with w_j = e^{βS_j} / mean e^{βS}.

    log_weights: log Σ e^{βS}. log_weighted: log Σ e^{(1+β)S}. number: of negatives; -inf for none.
    Source: Robinson et al. 2021, with the batch's own partition function.
    """
    some = number > 0
    weighted = torch.where(some, log_weighted, 0) - torch.where(some, log_weights, 0)
    return torch.where(some, weighted + number.clamp(min=1).log(), -torch.inf)


def debiased(
    log_negatives: Tensor, log_positive: Tensor, number: Tensor, prior: Tensor, floor: Tensor
) -> Tensor:
    """log of max{ (Σ e^{S⁻} - number·τ⁺·e^{S⁺}) / (1 - τ⁺), number·e^floor }.

    log_negatives: log Σ e^{S⁻}. log_positive: log of the mean e^{S⁺}. prior: τ⁺, 0-d or one per
    anchor. floor: the least score that there can be. -inf without negatives.
    Source: Chuang et al. 2020, with M the number of positives of the anchor.
    """
    some = number > 0
    log_number = number.clamp(min=1).log()
    log_negatives = torch.where(some, log_negatives, 0)
    false = log_number + prior.log() + log_positive
    rest = 1 - (false - log_negatives).clamp(max=0).exp()  # the share that is not false
    clamped = rest <= 0  # not so for NaN, which must not be lost
    true = log_negatives + torch.where(clamped, 1, rest).log() - torch.log1p(-prior)
    floor = log_number + floor
    log_true = torch.where(clamped, floor, torch.maximum(true, floor))
    return torch.where(some, log_true, -torch.inf)
