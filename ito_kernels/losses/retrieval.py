"""Losses for retrieval: shared hard negatives, and several captions of one item."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import global_row_numbers, same_on_every_rank
from ..similarity.spec import check_tensor
from .batch import Names, check_arguments
from .infonce import infonce
from .options import Options

MNRL = Names("queries", "positives", "scale")


@same_on_every_rank
def mnrl_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    scale: float | Tensor = 20.0,
    *,
    normalize: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiple negatives ranking loss.

        L = mean_i [ logsumexp_j S_ij - S_ii ],   S = scale · queries · [positives; negatives]ᵀ

    The candidates of every query are all positives and all negatives of the batch. S is never
    formed.

    Args:
        queries, positives: (N, D); row i of both is a positive pair.
        negatives: (N, D), or (N, K, D) for K negatives per query.
        scale: 1 / temperature: a number, a 0-d tensor or an (N,) tensor.
        normalize: L2-normalise everything first (cosine similarity). False: inner products.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Henderson et al. 2017, eq. 4; the defaults are those of sentence-transformers.
    """
    args = check_arguments(queries, positives, scale, group, chunk_size, backend, names=MNRL)
    options = Options(symmetric=False, normalize=normalize)
    if negatives is None:
        return infonce(args, options)
    n = len(args.queries)
    negatives = check_tensor("negatives", negatives)
    if negatives.ndim not in (2, 3) or len(negatives) != n:
        raise ValueError(
            f"negatives must have shape (N, D) or (N, K, D) with N = {n}, got"
            f" {tuple(negatives.shape)}"
        )
    keys = torch.cat(
        [args.keys, args.check_features_like_queries("negatives", negatives.flatten(0, -2))]
    )
    rows = global_row_numbers(len(keys), group, keys.device)
    return infonce(args._replace(keys=keys, query_ids=rows[:n], key_ids=rows), options)


@same_on_every_rank
def one_to_k_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of an item and its K captions, for example in K languages. All are positives.

        L = mean_i [ log Σ_jl exp S_ijl - (1/K) Σ_k S_iik ],   S_ijl = logit_scale · <q_i, k_jl>

    with one denominator over all captions of all items. With `symmetric`, the mean of this and of
    the InfoNCE of the captions against the items.

    Args:
        queries: (N, D), L2-normalised.
        keys: (N, K, D), L2-normalised: the K captions of each item.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Nie et al. 2024 (CCRK, 1-to-K contrastive learning).
    """
    keys = check_tensor("keys", keys)
    args = check_arguments(
        queries,
        keys.flatten(0, 1) if keys.ndim == 3 else keys,
        logit_scale,
        group,
        chunk_size,
        backend,
        allow_unequal_rows=True,
    )
    n = len(args.queries)
    if keys.ndim != 3 or len(keys) != n:
        raise ValueError(f"keys must have shape (N, K, D) with N = {n}, got {tuple(keys.shape)}")
    rows = global_row_numbers(n, group, keys.device)
    args = args._replace(query_ids=rows, key_ids=rows.repeat_interleave(keys.shape[1]))
    return infonce(args, Options(symmetric=symmetric))
