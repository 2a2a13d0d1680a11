"""Targets that are not positives and negatives: every key is one to a degree.

Of a target distribution q the loss needs Σ_j q_ij S_ij alone, and neither q nor S is ever formed:
where q is linear in an embedding this is a product of D × D_c matrices, where it is a softmax it is
attention, whose weights are constants. Target and logsumexp meet outside the kernels: bf16 and fp16
are computed in fp32.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..distributed import check_chunk_size, whole_batch
from ..similarity.panelwise import panelwise_sum
from ..similarity.spec import check_features, check_pair, check_scale
from .batch import Batch
from .options import check_number
from .precision import accumulated, as_autocast, inner, without_autocast


def cwcl_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    reference: Tensor,
    symmetric: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Continuously weighted contrastive loss: the more alike two items, the more positive.

        L = mean_i [ logsumexp_j S_ij - Σ_j w_ij S_ij / Σ_j w_ij ],   w_ij = ½ + ½<c_i, c_j>

    with S = logit_scale · queries · keysᵀ and the embedding c of a frozen model. Time of the second
    term: O(N·D·D_c).

    Args:
        queries, keys: (N, D), L2-normalised; row i of both belongs together.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        reference: (N, D_c), c, L2-normalised; takes no gradient.
        symmetric: average with the same along the columns.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Srinivasa et al. 2023 (CWCL).
    """
    batch = _paired(queries, keys, logit_scale, symmetric, backend, group, chunk_size)
    c = _target("reference", reference, len(queries), batch)
    with without_autocast(queries.device):
        everyones = batch.whole.shared_sum
        weight = 0.5 * (batch.number("row") + (c * everyones(c.sum(0))).sum(1))

        def target(mine: Tensor, others: Tensor) -> Tensor:
            weighted = c @ everyones(c.T @ others)  # Σ_j <c_i, c_j> other_j
            scores = 0.5 * (mine * (everyones(others.sum(0)) + weighted)).sum(1) / weight
            return _mean(batch, scores)

        scaled = batch.scale.reshape(-1, 1) * batch.queries
        targets = target(scaled, batch.keys)
        if symmetric:
            targets = 0.5 * (targets + target(batch.keys, scaled))
        logsum, shift = _mean_logsumexp(batch)
        return logsum + (shift - targets).to(logsum.dtype)


def soft_target_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    target_queries: Tensor,
    target_keys: Tensor,
    target_scale: float | Tensor,
    alpha: float = 1.0,
    symmetric: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy against the softmax of other embeddings: distillation, momentum teachers.

        L = mean_i [ logsumexp_j S_ij - Σ_j q_ij S_ij ]
        q_ij = alpha · softmax_j(target_scale · <c_i, e_j>) + (1 - alpha) · [i = j]

    with S = logit_scale · queries · keysᵀ; where symmetric the mean of this and the same along the
    columns, with the softmax over i. Σ_j q_ij S_ij is attention of c to e with the keys as values.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised. N must equal M unless alpha = 1.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        target_queries, target_keys: (N, D_c) and (M, D_c), c and e, L2-normalised; no gradient.
        target_scale: the teacher's multiplier: a number or a 0-d tensor; no gradient.
        alpha: the share of the soft targets, from 0 to 1.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Li et al. 2021 (ALBEF), eq. 6.
    """
    alpha = check_number("alpha", alpha, 0, 1)
    batch = _paired(
        queries, keys, logit_scale, symmetric, backend, group, chunk_size, square=alpha < 1
    )
    check_pair("target_queries", target_queries, "target_keys", target_keys)
    c = _target("target_queries", target_queries, len(queries), batch)
    e = _target("target_keys", target_keys, len(keys), batch)
    scale = check_scale("target_scale", target_scale, c).detach()
    if scale.ndim:
        raise ValueError(f"target_scale must be one for all, got shape {tuple(scale.shape)}")
    with without_autocast(queries.device):
        scaled = batch.scale.reshape(-1, 1) * batch.queries
        targets = 0
        if alpha > 0:
            targets = alpha * _soft_scores(batch, scaled, scale * c, e)
        if alpha < 1:  # in both directions
            one_hot = _mean(batch, inner(scaled, batch.keys))
            targets = targets + (1 - alpha) * one_hot
        logsum, shift = _mean_logsumexp(batch)
        return logsum + (shift - targets).to(logsum.dtype)


def _mean(batch: Batch, x: Tensor, side: str = "row") -> Tensor:
    """Of everyone's anchors."""
    return batch.whole.sum(x.sum(dtype=torch.float64)) / batch.number(side)


def _mean_logsumexp(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean logsumexp of S as two parts, the second a constant in fp64: at a scale of 100 it
    and the targets lose two digits of fp32 where they cancel."""
    share = 0.5 if batch.symmetric else 1.0
    weights = {}
    for side in batch.directions:
        weight = batch.scale.new_full((len(batch.features(side)),), share / batch.number(side))
        weights[f"{side}_weights"] = weight, None
    logsum, stats = batch.logsumexp(cols=batch.symmetric, **weights)
    maxima = {"row": stats.row_max, "col": stats.col_max}
    return logsum, share * sum(_mean(batch, maxima[side], side) for side in batch.directions)


def _soft_scores(batch: Batch, a: Tensor, c: Tensor, e: Tensor) -> Tensor:
    """mean_i Σ_j q_ij <a_i, b_j>, and where symmetric the mean of it and of the columns', with q
    the softmax of c·eᵀ and b the keys. q has no gradient: 4 matrix products give both directions
    and all gradients."""
    whole = batch.whole
    share = 0.5 if batch.symmetric else 1.0
    of_columns = ()
    if batch.symmetric:
        with torch.no_grad():
            stats = replace(batch, queries=c, keys=e, scale=c.new_ones(())).logsumexp(rows=False)
            top = whole.rows(stats.col_max)
            logsum = whole.rows(stats.col_logsum) + math.log(batch.number("col") / share)
            of_columns = top, logsum
    e, n = whole.rows(e), batch.number("row")

    def panel(scores: Tensor, rows: Tensor, a: Tensor, b: Tensor, *of_columns: Tensor) -> tuple:
        weights = scores.softmax(1).mul_(share / n)
        if of_columns:
            top, logsum = of_columns
            weights += scores.sub_(top).sub_(logsum).exp_()
        of_a = weights @ b
        return (of_a * a).sum(), (None, of_a, weights.T @ a, *(None for _ in of_columns))

    b = whole.rows(batch.keys)
    return whole.sum(panelwise_sum(panel, c, e, row_args=(a,), key_args=(b, *of_columns)))


def _paired(
    queries, keys, logit_scale, symmetric, backend, group, chunk_size, square=True
) -> Batch:
    """The batch, without ids: all that counts is that rows belong together where `square`."""
    check_chunk_size(chunk_size)
    queries, keys = check_pair("queries", queries, "keys", keys)
    n, m = len(queries), len(keys)
    if square and n != m:
        raise ValueError(f"queries and keys must have as many rows, got {n} and {m}")
    scale = check_scale("logit_scale", logit_scale, queries)
    queries, keys = (accumulated(as_autocast(x)) for x in (queries, keys))
    whole = whole_batch(group, queries, keys, chunk_size=chunk_size)
    return Batch(whole, queries, keys, scale, symmetric, backend)


def _target(name: str, x: object, rows: int, batch: Batch) -> Tensor:
    """A frozen embedding in the dtype of the computation."""
    x = check_features(name, x)
    if len(x) != rows:
        raise ValueError(f"{name} must have {rows} rows, got {len(x)}")
    if x.device != batch.queries.device:
        raise ValueError(f"{name} must be on {batch.queries.device}, got {x.device}")
    return x.detach().to(batch.queries.dtype)
