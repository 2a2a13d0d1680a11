"""Alignment and uniformity: the two properties of a contrastive loss, each on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.dispatch import check_name
from .batch import Names, check_arguments
from .precision import accumulated, without_autocast

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
    given = check_arguments(x, x, t, group, chunk_size, backend, names=UNIFORM)
    t = given.scale
    if t.ndim:
        raise ValueError(f"t must be a number or a 0-d tensor, got shape {tuple(t.shape)}")
    scores = given.scores()
    batch, x, n = scores.global_batch, scores.queries, scores.global_count("col")
    if n < 2:
        raise ValueError(f"x must have at least 2 rows: uniformity is of pairs, got {n}")
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
    if backend is not None:
        check_name(backend)
    given = check_arguments(x, y, alpha, group, chunk_size, "reference", names=ALIGN)
    square = (accumulated(given.queries) - accumulated(given.keys)).square().sum(1)
    some = square != 0  # the root has no derivative at 0
    powers = torch.where(some, torch.where(some, square, 1) ** (alpha / 2), 0)
    batch = given.global_batch()
    return batch.all_reduce_loss(powers.sum()) / batch.global_count("col")
