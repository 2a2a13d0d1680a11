"""Losses of the embeddings' geometry: alignment, uniformity, and moments of the similarities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, same_on_every_rank
from ..similarity.dispatch import check_name
from ..similarity.spec import is_number
from .batch import Names, check_arguments
from .common import check_0d
from .precision import row_dot, to_accumulate_dtype, without_autocast

UNIFORM, ALIGN = Names("x", "y", "t"), Names("x", "y", "alpha")
MOMENTS = Names("x", "y")


@same_on_every_rank
def uniformity_loss(
    x: Tensor,
    y: Tensor | None = None,
    t: float = 2.0,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Uniformity: the logarithm of the mean Gaussian potential of all pairs.

        L = log mean_{i ≠ j} exp(-t‖x_i - y_j‖²)

    computed as a logsumexp of 2t·x·yᵀ - t‖x_i‖² - t‖y_j‖², which is never formed.

    Args:
        x, y: (N, D) with N ≥ 2, usually L2-normalised. y is x by default; row i of both is a
            positive pair, which is left out. bf16 and fp16 are computed in fp32, because the
            gradients of the inner products and of the norms cancel outside the kernels.
        t: a number or a 0-d tensor greater than 0.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Wang and Isola 2020, section 4.1, L_uniform. Its expectation is over independent
    samples; here, as in the authors' code, it is the mean without the pairs (i, i). The form with
    y, for two modalities, is not in the source.
    """
    if is_number(y) or (isinstance(y, Tensor) and y.ndim == 0):
        raise TypeError(f"y must be a tensor of shape (N, D), got {y}: give t by name, as t={y}")
    y = x if y is None else y
    args = check_arguments(x, y, t, group, chunk_size, backend, names=UNIFORM)
    t = args.scale
    check_0d("t", t)
    scores = args.scores()
    batch, x, y, n = scores.global_batch, scores.queries, scores.keys, scores.global_count("col")
    if n < 2:
        raise ValueError(f"x must have at least 2 rows, got {n}: uniformity is a mean over pairs")
    with without_autocast(x.device):
        row_norms = -t * x.square().sum(1)
        col_norms = row_norms if y is x else -t * y.square().sum(1)
        stats = batch.similarity_logsumexp(
            x,
            y,
            2 * t,
            row_bias=row_norms,
            col_bias=col_norms,
            row_ids=batch.query_ids,
            col_ids=batch.key_ids,
            exclude_self=True,
            cols=False,
            exact_max=False,
            half_values=scores.half_values,
            backend=backend,
        )
        # NaN if a norm is infinite: the potential of an infinite distance is 0 and would hide it
        infinite = 0 * (row_norms.sum() + col_norms.sum())
        potential = (stats.row_max + stats.row_logsum).logsumexp(0, keepdim=True) + infinite
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
        x, y: (N, D), usually L2-normalised; row i of both is a positive pair. bf16 and fp16 are
            computed in fp32.
        alpha: a number or a 0-d tensor greater than 0. Equal rows have a gradient of 0 for every
            alpha.
        group, chunk_size: as in `multi_positive_infonce`.
        backend: its name is checked, but it has no effect: there is no similarity matrix.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: Wang and Isola 2020, section 4.1, L_align.
    """
    if backend is not None:
        check_name(backend)
    args = check_arguments(x, y, alpha, group, chunk_size, "reference", names=ALIGN)
    check_0d("alpha", args.scale)
    square = (to_accumulate_dtype(args.queries) - to_accumulate_dtype(args.keys)).square().sum(1)
    nonzero = square != 0  # the root has no derivative at 0
    powers = torch.where(nonzero, torch.where(nonzero, square, 1) ** (alpha / 2), 0)
    batch = args.global_batch()
    return batch.all_reduce_loss(powers.sum()) / batch.global_count("col")


@same_on_every_rank
def spectral_contrastive_loss(
    x: Tensor,
    y: Tensor,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Spectral contrastive loss: -2·mean_i <x_i, y_i> + mean_{i ≠ j} <x_i, y_j>².

    The second mean is computed from the (D, D) matrices of second moments, in O((N + M)·D²).

    Args:
        x, y: (N, D) with N ≥ 2; row i of both is a positive pair. They need not be normalised. bf16
            and fp16 are computed in fp32.
        group, chunk_size: as in `multi_positive_infonce`.
        backend: its name is checked, but it has no effect: there is no similarity matrix.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: HaoChen et al. 2021, section 3.2. Its expectation is over independent samples; here, as
    in the authors' code, it is the mean without the pairs (i, i). Their code also limits the norms.
    """
    batch, x, y, n = _moment_batch(x, y, group, chunk_size, backend)
    with without_autocast(x.device):
        positives = batch.all_reduce_loss(row_dot(x, y).sum()) / n
        return _mean_square_of_negatives(batch, x, y, n) - 2 * positives


@same_on_every_rank
def orthogonality_loss(
    x: Tensor,
    y: Tensor | None = None,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Global orthogonal regularisation: negatives as orthogonal as random directions.

        L = (mean_{i ≠ j} <x_i, y_j>)² + max(0, mean_{i ≠ j} <x_i, y_j>² - 1/D)

    Computed from sums and (D, D) matrices of second moments, in O((N + M)·D²).

    Args:
        x, y: (N, D) with N ≥ 2, L2-normalised; row i of both is a positive pair. y is x by default.
            bf16 and fp16 are computed in fp32.
        group, chunk_size: as in `multi_positive_infonce`.
        backend: its name is checked, but it has no effect: there is no similarity matrix.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: Zhang et al. 2017 (Learning spread-out local feature descriptors), L_gor, here over all
    i ≠ j of the batch.
    """
    batch, x, y, n = _moment_batch(x, x if y is None else y, group, chunk_size, backend)
    with without_autocast(x.device):
        total = row_dot(x, batch.all_reduce_sum(y.sum(0)).expand_as(x)).sum()
        mean = batch.all_reduce_loss(total - row_dot(x, y).sum()) / (n * (n - 1))
        square = _mean_square_of_negatives(batch, x, y, n)
        return mean.square() + torch.relu(square - 1 / x.shape[1])


def _moment_batch(
    x: Tensor, y: Tensor, group, chunk_size: int | None, backend: str | None
) -> tuple[GlobalBatch | LocalBatch, Tensor, Tensor, int]:
    """The batch, both features in the accumulate dtype, and the number of rows of all ranks."""
    if backend is not None:
        check_name(backend)
    args = check_arguments(x, y, 1.0, group, chunk_size, "reference", names=MOMENTS)
    scores = args.scores()
    n = scores.global_count("col")
    if n < 2:
        raise ValueError(f"x must have at least 2 rows, got {n}: the loss has a mean over i ≠ j")
    return scores.global_batch, scores.queries, scores.keys, n


def _mean_square_of_negatives(
    batch: GlobalBatch | LocalBatch, x: Tensor, y: Tensor, n: int
) -> Tensor:
    """mean_{i ≠ j} <x_i, y_j>²: Σ_ij <x_i, y_j>² is <XᵀX, YᵀY>."""
    moments = batch.all_reduce_sum(y.T @ y)
    total = row_dot(x @ moments, x).sum() - row_dot(x, y).square().sum()
    return batch.all_reduce_loss(total) / (n * (n - 1))
