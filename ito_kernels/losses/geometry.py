"""Alignment and uniformity, the two terms that a contrastive loss combines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.dispatch import check_name
from .batch import Names, check_arguments
from .precision import to_accumulate_dtype, without_autocast

UNIFORM, ALIGN = Names("x", "x", "t"), Names("x", "y", "alpha")


@same_on_every_rank
def uniformity_loss(
    x: Tensor,
    t: float = 2.0,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Uniformity: the logarithm of the mean Gaussian potential of all pairs.

        L = log mean_{i ≠ j} exp(-t‖x_i - x_j‖²)

    computed as a logsumexp of 2t·x·xᵀ - t‖x_i‖² - t‖x_j‖², which is never formed.

    Args:
        x: (N, D) with N ≥ 2, usually L2-normalised. bf16 and fp16 are computed in fp32, because
            the gradients of the inner products and of the norms cancel outside the kernels.
        t: a number greater than 0.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: Wang and Isola 2020, eq. 7, without the pairs (i, i).
    """
    args = check_arguments(x, x, t, group, chunk_size, backend, names=UNIFORM)
    t = args.scale
    if t.ndim:
        raise ValueError(f"t must be a number or a 0-d tensor, got shape {tuple(t.shape)}")
    scores = args.scores()
    batch, x, n = scores.global_batch, scores.queries, scores.global_count("col")
    if n < 2:
        raise ValueError(f"x must have at least 2 rows, got {n}: uniformity is a mean over pairs")
    with without_autocast(x.device):
        norms = -t * x.square().sum(1)
        stats = batch.similarity_logsumexp(
            x,
            x,
            2 * t,
            row_bias=norms,
            col_bias=norms,
            row_ids=batch.query_ids,
            col_ids=batch.key_ids,
            exclude_self=True,
            cols=False,
            backend=backend,
        )
        potential = (stats.row_max + stats.row_logsum).logsumexp(0, keepdim=True)
        return batch.all_gather_rows(potential).logsumexp(0) - math.log(n * (n - 1))


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
    """Alignment: the mean distance of positives, mean_i ‖x_i - y_i‖^alpha.

    Args:
        x, y: (N, D), usually L2-normalised; row i of both is a positive pair.
        alpha: a number greater than 0. Equal rows have a gradient of 0 for every alpha.
        group, chunk_size: as in `multi_positive_infonce`.
        backend: its name is checked, but it has no effect: there is no similarity matrix.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: Wang and Isola 2020, eq. 6.
    """
    if backend is not None:
        check_name(backend)
    args = check_arguments(x, y, alpha, group, chunk_size, "reference", names=ALIGN)
    square = (to_accumulate_dtype(args.queries) - to_accumulate_dtype(args.keys)).square().sum(1)
    nonzero = square != 0  # the root has no derivative at 0
    powers = torch.where(nonzero, torch.where(nonzero, square, 1) ** (alpha / 2), 0)
    batch = args.global_batch()
    return batch.all_reduce_loss(powers.sum()) / batch.global_count("col")
