"""Alignment and uniformity: the two properties of a contrastive loss, each on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import check_chunk_size, same_on_every_rank, whole_batch
from ..similarity.dispatch import check_name
from ..similarity.spec import check_features, check_pair, check_scale
from .precision import accumulated, as_autocast, without_autocast


@same_on_every_rank
def uniformity_loss(
    x: Tensor,
    t: float = 2.0,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """How evenly embeddings spread: the logarithm of their mean Gaussian potential.

        L = log mean_{i ≠ j} exp(-t‖x_i - x_j‖²)

    as one logsumexp of 2t·x·xᵀ - t‖x_i‖² - t‖x_j‖², which is never formed.

    Args:
        x: (N, D) with N ≥ 2, usually L2-normalised. bf16 and fp16 are computed in fp32: the
            attraction of near neighbours meets that of the norms outside the kernels.
        t: a number greater than 0.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError for an argument that does not fit, by name.
    Source: Wang and Isola 2020, eq. 7, without the pairs (i, i).
    """
    check_chunk_size(chunk_size)
    x = check_features("x", x)
    t = check_scale("t", t, x)
    if t.ndim:
        raise ValueError(f"t must be a number or a 0-d tensor, got shape {tuple(t.shape)}")
    whole = whole_batch(group, x, x, chunk_size=chunk_size, backend=backend)
    n = whole.count(1)
    if n < 2:
        raise ValueError(f"x must have at least 2 rows: uniformity is of pairs, got {n}")
    x = accumulated(as_autocast(x))
    with without_autocast(x.device):
        norms = -t * x.square().sum(1)
        stats = whole.similarity_logsumexp(
            x,
            x,
            2 * t,
            row_bias=norms,
            col_bias=norms,
            row_ids=whole.query_ids,
            col_ids=whole.key_ids,
            exclude_self=True,
            cols=False,
            backend=backend,
        )
        potential = (stats.row_max + stats.row_logsum).logsumexp(0, keepdim=True)
        return whole.rows(potential).logsumexp(0) - math.log(n * (n - 1))


@same_on_every_rank
def alignment_loss(
    x: Tensor,
    y: Tensor,
    alpha: float = 2.0,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """How close positives are: mean_i ‖x_i - y_i‖^alpha.

    Args:
        x, y: (N, D), usually L2-normalised; row i of both belongs together.
        alpha: a number greater than 0. Rows that coincide have a gradient of 0 for every alpha.
        backend: a name as everywhere, without effect: there is no matrix.
        group, chunk_size: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError for an argument that does not fit, by name.
    Source: Wang and Isola 2020, eq. 6.
    """
    check_chunk_size(chunk_size)
    if backend is not None:
        check_name(backend)
    check_pair("x", x, "y", y)
    if len(x) != len(y):
        raise ValueError(f"x and y must have as many rows, got {len(x)} and {len(y)}")
    check_scale("alpha", alpha, x)
    square = (accumulated(x) - accumulated(y)).square().sum(1)
    some = square != 0  # the root has no derivative at 0
    powers = torch.where(some, torch.where(some, square, 1) ** (alpha / 2), 0)
    whole = whole_batch(group, x, y, chunk_size=chunk_size, backend="reference")
    return whole.sum(powers.sum()) / whole.count(1)
