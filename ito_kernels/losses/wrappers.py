"""A loss on several representations: prefixes of one embedding, or several heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.spec import check_tensor, is_number


@same_on_every_rank
def matryoshka_loss(
    loss: Callable[..., Tensor],
    *features: Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    **options,
) -> Tensor:
    """A loss summed over prefixes of the embeddings, so that each prefix can be used alone.

        L = Σ_d w_d · loss(x[:, :d], y[:, :d], …)

    Args:
        loss: takes `features` and `options` and returns a tensor, e.g. `clip_loss`.
        features: the features of the loss, (…, D) each, in a dtype that `loss` takes.
        dims: the prefix widths d, from 1 to D.
        weights: w, one number for each width; 1 by default.
        normalize: L2-normalise each prefix. A prefix of a unit vector is not a unit vector.
        options: further arguments of the loss, such as `logit_scale`.

    Returns what `loss` returns, weighted and summed over the widths.
    Raises TypeError or ValueError for invalid dims or weights, and what `loss` raises.
    Source: Kusupati et al. 2022 (Matryoshka representation learning), eq. 1, which is for
    classifiers and does not normalise the prefixes.
    """
    _check("matryoshka_loss", loss, features)
    width = min(x.shape[-1] for x in features)
    if isinstance(dims, int):
        raise TypeError(f"dims must be a sequence of widths, got the number {dims}")
    if not len(dims) or not all(isinstance(d, int) and 1 <= d <= width for d in dims):
        raise ValueError(f"dims must be widths from 1 to {width}, got {dims}")
    weights = [1.0] * len(dims) if weights is None else weights
    if not isinstance(weights, Sequence) or not all(map(is_number, weights)):
        raise TypeError(f"weights must be a sequence of numbers, got {weights!r}")
    if len(weights) != len(dims):
        raise ValueError(f"weights must be one for each of {len(dims)} dims, got {len(weights)}")
    total = 0
    for d, weight in zip(dims, weights, strict=True):
        prefixes = [x[..., :d] for x in features]
        if normalize:
            prefixes = [torch.nn.functional.normalize(x, dim=-1) for x in prefixes]
        total = total + weight * loss(*prefixes, **options)
    return total


@same_on_every_rank(stacked=("features",), free=("logit_scale",))
def multi_head_loss(
    loss: Callable[..., Tensor], *features: Tensor, logit_scale: Tensor, **options
) -> Tensor:
    """The mean of a loss over several projection heads, each with its own scale.

        L = mean_h loss(x[h], y[h], …, logit_scale[h])

    Args:
        loss: takes `features`, `logit_scale` and `options` and returns a tensor.
        features: (H, N, D) each, L2-normalised, in a dtype that `loss` takes.
        logit_scale: (H,), or (H, N) for a scale per head and query.
        options: further arguments of the loss.

    Returns a 0-d tensor.
    Raises TypeError or ValueError if the features or the scales do not have H heads, and what
    `loss` raises.
    Source: Wang et al. 2024 (AMCL), without its regulariser of the temperatures, which depends on
    how they are learned.
    """
    _check("multi_head_loss", loss, features)
    heads = len(features[0])
    for i, x in enumerate(features):
        if x.ndim != 3 or len(x) != heads:
            raise ValueError(f"features {i} must have shape ({heads}, N, D), got {tuple(x.shape)}")
    logit_scale = check_tensor("logit_scale", logit_scale)
    if logit_scale.ndim not in (1, 2) or len(logit_scale) != heads:
        raise ValueError(
            f"logit_scale must have shape ({heads},) or ({heads}, N), got"
            f" {tuple(logit_scale.shape)}"
        )
    return torch.stack(
        [
            loss(*(x[h] for x in features), logit_scale=logit_scale[h], **options)
            for h in range(heads)
        ]
    ).mean()


def _check(name: str, loss: object, features: tuple) -> None:
    if not callable(loss):
        raise TypeError(f"loss must be a function of the features, got {type(loss).__name__}")
    if not features:
        raise TypeError(f"{name} needs the features of the loss as positional arguments")
    for i, x in enumerate(features):
        if check_tensor(f"features {i}", x, "a tensor (..., D)").ndim == 0:
            raise TypeError(f"features {i} must be a tensor (..., D), got a 0-d one")
