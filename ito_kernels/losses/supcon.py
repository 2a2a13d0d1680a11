"""Losses of one tower: every embedding is an anchor, and all the others are its candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import check_chunk_size, global_rows, same_on_every_rank
from ..similarity import similarity_logsumexp
from ..similarity.spec import (
    accumulate_dtype,
    check_features,
    check_ids,
    check_pair,
    check_scale,
    scalar,
)
from .common import check_choice, scale_from_temperature
from .infonce import multi_positive_infonce


@same_on_every_rank
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    empty: str = "zero",
    *,
    positives: str = "mean",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss.

        L_out = mean_i [ logsumexp_{j ≠ i} S_ij - (1/k_i) Σ_{j ∈ P_i} S_ij ]
        L_in  = mean_i [ logsumexp_{j ≠ i} S_ij - log (1/k_i) Σ_{j ∈ P_i} exp S_ij ]

    with S = features · featuresᵀ / temperature and P_i the k_i other rows that share the label of
    row i. S is never formed.

    Args:
        features: (N, D), L2-normalised; several views of a sample are rows with one label.
        labels: (N,) integers; a negative label is a padded row that takes no part.
        temperature: a number, a 0-d tensor or an (N,) tensor.
        base_temperature: where given, the loss is multiplied by temperature / base_temperature, as
            in the authors' code; the factor is 1 otherwise.
        empty: a row without a positive counts as 0 in the mean ("zero") or is left out ("drop").
        positives: "mean" for L_out, "in" for L_in.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Khosla et al. 2020 (SupCon), eq. 2 and 3.
    """
    check_choice("positives", positives, ("mean", "in"))
    check_features("features", features)
    labels = check_ids("labels", labels, len(features), "features", features.device)
    scale = scale_from_temperature(temperature, features)
    factor = _factor(temperature, base_temperature, features)
    loss = multi_positive_infonce(
        features,
        features,
        scale,
        query_ids=labels,
        key_ids=labels,
        positives=positives,
        symmetric=False,
        exclude_self=True,
        empty=empty,
        group=group,
        chunk_size=chunk_size,
        backend=backend,
    )
    return loss if factor is None else loss * factor


def _factor(
    temperature: float | Tensor, base_temperature: float | None, like: Tensor
) -> Tensor | None:
    """temperature / base_temperature, where there is one."""
    if base_temperature is None:
        return None
    if isinstance(temperature, Tensor):
        temperature = scalar(temperature)
    if isinstance(temperature, Tensor) and temperature.ndim != 0:
        raise ValueError(
            "base_temperature needs one temperature for all rows,"
            f" got one of shape {tuple(temperature.shape)}"
        )
    return temperature / check_scale("base_temperature", base_temperature, like)


@same_on_every_rank
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of two views.

        L = (1/2N) Σ_i [ logsumexp_{j ≠ i} S_ij - S_i,p(i) ],   S = z · zᵀ / temperature

    over the 2N rows z = [z1; z2], with p(i) the other view of row i. S is never formed.

    Args:
        z1, z2: (N, D), L2-normalised; row i of both is the same sample.
        temperature: a number or a 0-d tensor.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    check_pair("z1", z1, "z2", z2)
    if len(z1) != len(z2):
        raise ValueError(f"z1 and z2 must have as many rows, got {len(z1)} and {len(z2)}")
    check_chunk_size(chunk_size)
    scale = scale_from_temperature(temperature, z1)
    if scale.ndim:
        raise ValueError(f"temperature must be a number or 0-d, got shape {tuple(scale.shape)}")
    z = torch.cat([z1, z2])
    if group is not None:
        ids = global_rows(len(z1), group, z.device).repeat(2)
        return multi_positive_infonce(
            z,
            z,
            scale,
            query_ids=ids,
            key_ids=ids,
            symmetric=False,
            exclude_self=True,
            group=group,
            chunk_size=chunk_size,
            backend=backend,
        )
    ids = torch.arange(len(z1), device=z.device).repeat(2)
    share = torch.full((len(z),), 1 / len(z), dtype=accumulate_dtype(z.dtype), device=z.device)
    # every row has one positive: nothing to count, which is half of supcon_loss's time at N = 64
    return similarity_logsumexp(
        z,
        z,
        scale,
        row_ids=ids,
        col_ids=ids,
        positives="linear",
        exclude_self=True,
        cols=False,
        row_weights=(share, -share),
        return_stats=False,
        backend=backend,
    )
