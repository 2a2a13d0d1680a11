"""Losses with soft targets: every key is a positive with a weight q_ij.

The targets enter the loss only as Σ_j q_ij S_ij, so neither q nor S is formed. If q is linear in
embeddings of width D_c, this sum is a product of D × D_c matrices. If q is a softmax, it is
attention with constant weights. The sum and the logsumexp are combined outside the kernels: bf16
and fp16 features are computed in fp32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.panelwise import panelwise_sum
from ..similarity.spec import check_pair, check_scale
from .batch import PAIRED, check_arguments
from .common import check_0d, check_flags
from .options import check_number
from .precision import row_dot, without_autocast
from .scores import Scores


@same_on_every_rank
def cwcl_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    reference: Tensor,
    symmetric: bool | str = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Continuously weighted contrastive loss: similar items are weighted as positives.

        L = mean_i [ logsumexp_j S_ij - Σ_j w_ij S_ij / Σ_j w_ij ],   w_ij = ½ + ½<c_i, c_j>

    with S = logit_scale · queries · keysᵀ and embeddings c of a frozen model. The second term takes
    O(N·D·D_c) operations.

    Args:
        queries, keys: (N, D), L2-normalised; row i of both is a positive pair; dtypes as in
            `multi_positive_infonce` (bf16 and fp16 are computed in fp32).
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        reference: c, (N, D_c), L2-normalised; gets no gradient.
        symmetric: False: query→key only. True: average with the same loss along the columns.
            "infonce": average with InfoNCE along the columns, where only query j is a positive of
            key j.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Srinivasa et al. 2023 (CWCL), L_CWCL. Its total loss is symmetric="infonce", with the
    frozen tower's embeddings as `reference`; symmetric=True is not in the source.
    """
    if not (isinstance(symmetric, bool) or symmetric == "infonce"):
        raise TypeError(f"symmetric must be True, False or 'infonce', got {symmetric!r}")
    args = check_arguments(queries, keys, logit_scale, group, chunk_size, backend, names=PAIRED)
    c = args.check_constant_features("reference", reference, len(args.queries))
    scores = args.scores(symmetric=bool(symmetric))
    with without_autocast(c.device):
        all_reduce_sum = scores.global_batch.all_reduce_sum
        weight = 0.5 * (scores.global_count("row") + (c * all_reduce_sum(c.sum(0))).sum(1))

        def target(anchors: Tensor, others: Tensor) -> Tensor:
            weighted = c @ all_reduce_sum(c.T @ others)  # Σ_j <c_i, c_j> other_j
            terms = 0.5 * (anchors * (all_reduce_sum(others.sum(0)) + weighted)).sum(1) / weight
            return _mean(scores, terms)

        scaled = scores.scale.reshape(-1, 1) * scores.queries
        targets = target(scaled, scores.keys)
        if symmetric == "infonce":
            targets = 0.5 * (targets + _mean(scores, row_dot(scaled, scores.keys)))
        elif symmetric:
            targets = 0.5 * (targets + target(scores.keys, scaled))
        logsum, shift = _mean_logsumexp(scores, _anchor_weights(scores))
        return logsum + (shift - targets).to(logsum.dtype)


@same_on_every_rank
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
    """Cross-entropy with the softmax of a teacher's embeddings as targets.

        L = mean_i [ logsumexp_j S_ij - Σ_j q_ij S_ij ]
        q_ij = alpha · softmax_j(target_scale · <c_i, e_j>) + (1 - alpha) · [i = j]

    with S = logit_scale · queries · keysᵀ. With `symmetric`, the mean of this and of the same loss
    along the columns, with the softmax over i. The anchors of the columns' loss are the first N
    keys: key i belongs to query i, and further keys, such as a queue, are candidates only.
    Σ_j q_ij S_ij is computed as attention of c to e with the keys as values. Uses: distillation,
    momentum teachers.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised; dtypes as in `multi_positive_infonce` (bf16
            and fp16 are computed in fp32). M must be at least N unless alpha = 1. With a group, the
            first keys of each rank belong to its queries.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        target_queries, target_keys: c and e, (N, D_c) and (M, D_c), L2-normalised; no gradient.
        target_scale: the teacher's multiplier: a number or a 0-d tensor; no gradient.
        alpha: the weight of the soft targets, from 0 to 1.
        symmetric: as above. False: query→key only.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Li et al. 2021 (ALBEF), eq. 6, with cross-entropy instead of KL divergence, which has
    the same gradient. There each direction has the other tower's queue as its further candidates;
    that is the mean of two calls with symmetric=False.
    """
    alpha = check_number("alpha", alpha, 0, 1)
    check_flags(symmetric=symmetric)
    args = check_arguments(
        queries,
        keys,
        logit_scale,
        group,
        chunk_size,
        backend,
        names=PAIRED,
        allow_unequal_rows=True,
    )
    n, m = len(args.queries), len(args.keys)
    if alpha < 1 and m < n:
        raise ValueError(
            "keys must have at least as many rows as queries unless alpha is 1: key i belongs to"
            f" query i; got {m} keys, {n} queries and alpha = {alpha}"
        )
    check_pair("target_queries", target_queries, "target_keys", target_keys)
    c = args.check_constant_features("target_queries", target_queries, n)
    e = args.check_constant_features("target_keys", target_keys, m)
    scale = check_scale("target_scale", target_scale, c).detach()
    check_0d("target_scale", scale)
    scores = args.scores(symmetric)
    with without_autocast(c.device):
        weights = _anchor_weights(scores)
        scaled = scores.scale.reshape(-1, 1) * scores.queries
        targets = 0
        if alpha > 0:
            targets = alpha * _soft_scores(scores, weights, scaled, scale * c, e)
        if alpha < 1:  # the one-hot part is the same in both directions
            one_hot = _mean(scores, row_dot(scaled, scores.keys[:n]))
            targets = targets + (1 - alpha) * one_hot
        logsum, shift = _mean_logsumexp(scores, weights)
        return logsum + (shift - targets).to(logsum.dtype)


def _mean(scores: Scores, x: Tensor) -> Tensor:
    """The mean over the queries of all ranks."""
    total = scores.global_batch.all_reduce_loss(x.sum(dtype=torch.float64))
    return total / scores.global_count("row")


def _anchor_weights(scores: Scores) -> dict[str, Tensor]:
    """For each direction the share of each anchor's loss in the mean, (N,) and (M,), fp64.

    The anchors of key→query are the first keys of every rank, one for each of its queries. Further
    keys have weight 0.
    """
    weights = {}
    for side in scores.directions:
        number = len(scores.features(side))
        is_anchor = torch.arange(number, device=scores.queries.device) < len(scores.queries)
        total = scores.global_batch.all_reduce_sum(is_anchor.sum())
        weights[side] = is_anchor.double() / (len(scores.directions) * total)
    return weights


def _mean_logsumexp(scores: Scores, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean logsumexp of S as a sum of two parts: the means of logsum and of the maxima.

    The second is a constant in fp64. At a scale of 100, the difference of logsumexp and targets
    would lose two digits in fp32.
    """
    options = {f"{side}_weights": (x.to(scores.scale.dtype), None) for side, x in weights.items()}
    logsum, stats = scores.logsumexp(cols=scores.symmetric, **options)
    maxima = {"row": stats.row_max, "col": stats.col_max}
    shift = sum((x * maxima[side]).sum() for side, x in weights.items())
    return logsum, scores.global_batch.all_reduce_loss(shift)


def _soft_scores(
    scores: Scores, weights: dict[str, Tensor], a: Tensor, c: Tensor, e: Tensor
) -> Tensor:
    """Σ_i weight_i Σ_j q_ij <a_i, b_j> with q the softmax of c·eᵀ and b the keys; if symmetric,
    plus the same along the columns.

    q is constant for autograd. 3 matrix products give both directions and all gradients.
    """
    batch, col_args = scores.global_batch, ()
    if scores.symmetric:
        with torch.no_grad():
            teacher = replace(scores, queries=c, keys=e, scale=c.new_ones(()), half_values=False)
            stats = teacher.logsumexp(rows=False)
            col_args = stats.col_max, stats.col_logsum, weights["col"].to(c.dtype)
            col_args = tuple(map(batch.all_gather_rows, col_args))
    b, row_weights = batch.all_gather_rows(scores.keys), weights["row"].to(c.dtype)

    def panel(
        dot: Tensor, rows: Tensor, a: Tensor, weight: Tensor, b: Tensor, *col_args: Tensor
    ) -> tuple:
        weights = dot.softmax(1).mul_(weight[:, None])
        if col_args:
            maximum, logsum, col_weight = col_args
            weights += dot.sub_(maximum).sub_(logsum).exp_().mul_(col_weight)
        grad_a = weights @ b
        no_gradient = (None for _ in col_args)
        return (grad_a * a).sum(), (None, grad_a, None, weights.T @ a, *no_gradient)

    e = batch.all_gather_rows(e)
    total = panelwise_sum(panel, c, e, row_args=(a, row_weights), key_args=(b, *col_args))
    return batch.all_reduce_loss(total)
