"""The losses of CLIP and SigLIP: paired images and texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import GlobalBatch, LocalBatch, global_ranges, same_on_every_rank
from ..similarity.spec import accumulate_dtype, cast, check_tensor, scalar
from .batch import Arguments, Names, check_arguments
from .common import REDUCTIONS, check_0d, check_choice, check_flags
from .infonce import infonce, multi_positive_infonce
from .masked import Mask, masked_softplus_sums
from .options import PLAIN, Options, check_anchor_weights, check_options, localize_pairs
from .precision import row_dot, take_rows, without_autocast

FEATURES = ("image_features", "text_features")
CLIP = Names(*FEATURES, query_ids="query_ids", key_ids="key_ids")
SIGLIP = Names(*FEATURES, query_ids="image_ids", key_ids="text_ids", row_nouns=("images", "texts"))


@same_on_every_rank(options_of=multi_positive_infonce)
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
    **options,
) -> Tensor | Any:  # Any: the pair of return_stats; callers need no cast
    """Symmetric InfoNCE of images and texts. Row i of both is a positive pair.

        L = ½ · mean_i [ logsumexp_j S_ij - S_ii ] + ½ · mean_j [ logsumexp_i S_ij - S_jj ]

    with S = logit_scale · image_features · text_featuresᵀ, which is never formed.

    Args:
        image_features, text_features: (N, D), L2-normalised; dtypes as in `multi_positive_infonce`.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per image.
        query_ids, key_ids, group, chunk_size, backend, options: as in `multi_positive_infonce`,
            whose queries are the images.

    Returns the loss and raises errors as `multi_positive_infonce` does; TypeError for an unknown
    option.
    Source: Radford et al. 2021 (CLIP), fig. 3. The options are not in it.
    """
    for name in options:
        if name not in Options._fields:
            raise TypeError(f"clip_loss() got an unexpected keyword argument {name!r}")
    args = check_arguments(
        image_features,
        text_features,
        logit_scale,
        group,
        chunk_size,
        backend,
        ids=(query_ids, key_ids),
        names=CLIP,
        allow_unequal_rows=options.get("positive_pairs") is not None,
    )
    return infonce(args, Options(**options) if options else PLAIN)


@same_on_every_rank
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positive_pairs: Tensor | None = None,
    positive_weights: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sigmoid loss over all pairs of an image and a text.

        L = (1/N) Σ_ij w_ij · softplus(-y_ij · S_ij)
        S = logit_scale · images · textsᵀ + logit_bias

    with y_ij = 1 where the ids are equal and -1 elsewhere. S is never formed. The weights w_ij are
    image_weights_i · text_weights_j, 1 by default; those of a positive in `positive_pairs` are
    multiplied by its weight.

    Args:
        image_features, text_features: (N, D) and (M, D), L2-normalised unless `normalize`; dtypes
            as in `multi_positive_infonce`.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per image.
        logit_bias: a number or a 0-d tensor; None is no bias.
        image_ids, text_ids: (N,) and (M,) integers; equal ids are positives. Pass both, or none:
            the default of each is the row numbers 0 to N - 1, which needs N = M. A negative id
            marks a padded row, which is ignored.
        positive_pairs, positive_weights: (P, 2) integers, pairs (image, text), and (P,) weights,
            without gradient. They replace the ids where positives are not a partition. The weights
            of a pair that is listed twice add up, each 1 by default. A pair with weight 0 is left
            out: it is neither positive nor negative. Memory O(P·D).
        image_weights, text_weights: (N,) and (M,), 0 or more, without gradient. Weight 0 leaves out
            all terms of the row. They do not change the divisor N.
        normalize: L2-normalise both sides first.
        reduction: "mean": the sum over pairs divided by the number of images N (not by N·M);
            "sum": the sum over pairs; "none": (N,), the sum over the texts for each image.
        group, chunk_size, backend: as in `multi_positive_infonce`. With a group, pairs are global
            row numbers, each passed by the rank of its image.

    With `positive_pairs` or `text_weights`, which no kernel supports, the scores are computed in
    PyTorch, a panel of rows at a time, on every backend, bf16 and fp16 features in fp32.

    Returns a 0-d fp32 tensor (fp64 for fp64 features); (N,) for "none".

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it. Raised before any
            kernel runs.
        RuntimeError: the requested backend cannot run here.

    Source: Zhai et al. 2023 (SigLIP), section 3.2, for one positive per image, with the sign of the
    bias in its Algorithm 1. Several positives and all weights are not in the source.
    """
    check_flags(normalize=normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    if positive_pairs is not None and not (image_ids is text_ids is None):
        raise ValueError("positive_pairs replace image_ids and text_ids: give one of the two")
    args = check_arguments(
        image_features,
        text_features,
        logit_scale,
        group,
        chunk_size,
        backend,
        ids=(image_ids, text_ids),
        names=SIGLIP,
        allow_unequal_rows=positive_pairs is not None,
    )
    images, texts = args.queries, args.keys
    bias = None if logit_bias is None else _check_bias(logit_bias, images)
    image_weights = _check_weights("image_weights", image_weights, images, args.query_ids)
    text_weights = _check_weights("text_weights", text_weights, texts, args.key_ids)
    options = Options(positive_pairs=positive_pairs, positive_weights=positive_weights)
    if positive_pairs is not None or positive_weights is not None:
        options = check_options(options, args)
        ranges = global_ranges(len(images), len(texts), group, images.device)
        options = localize_pairs(options, *ranges)
    batch = args.global_batch()
    args = args.with_batch_ids(batch)
    if normalize:
        args = args.with_normalized_rows()
    number = n = len(images)
    if args.query_ids is not None:
        number = batch.all_reduce_sum((args.query_ids >= 0).sum()).clamp(min=1)  # without padding
    weights = image_weights
    if reduction != "none":
        if weights is None:
            weights = 1.0 if args.query_ids is None else args.scale.new_ones(n)
        if reduction == "mean":
            weights = weights / number
    if positive_pairs is not None or text_weights is not None:
        rows = _weighted_rows(options, args, batch, bias, text_weights)
        rows = rows if weights is None else rows * weights
        return rows if reduction == "none" else batch.all_reduce_loss(rows.sum())
    rows = batch.similarity_softplus(
        args.queries,
        args.keys,
        args.scale,
        row_bias=None if bias is None else bias.expand(n),
        row_ids=args.query_ids,
        col_ids=args.key_ids,
        row_weights=None if reduction == "none" else weights,
        backend=backend,
    )
    return rows * weights if reduction == "none" and weights is not None else rows


def _weighted_rows(
    o: Options,
    args: Arguments,
    batch: GlobalBatch | LocalBatch,
    bias: Tensor | None,
    text_weights: Tensor | None,
) -> Tensor:
    """Σ_j w_ij · softplus(-y_ij · S_ij) for each image, (N,), without the weights of the images.

    Pairs in a list are left out of the panels, and their terms are added. To sum all pairs as
    negatives first and correct the positives by softplus(-S) - softplus(S) would lose all digits
    of a positive with a large score.
    """
    args = args.in_accumulate_dtype()
    a, row_ids, col_ids = args.queries, args.query_ids, args.key_ids
    with without_autocast(a.device):
        b = batch.all_gather_rows(args.keys)
        scale = args.scale.expand(len(a))
        bias = scale.new_zeros(()) if bias is None else bias
        if text_weights is None:
            text_weights = scale.new_ones(len(args.keys))
        text_weights = batch.all_gather_rows(text_weights)
        if o.positive_pairs is None:
            if row_ids is not None:  # padded rows may contain any values
                col_ids = batch.all_gather_rows(col_ids)
                a, b = (x.masked_fill((i < 0)[:, None], 0) for x, i in ((a, row_ids), (b, col_ids)))
            mask = Mask(row_ids, col_ids)
            return masked_softplus_sums(a, b, scale, bias, text_weights, mask)
        rows, cols = o.positive_pairs
        mask = Mask(None, None, pairs=rows * len(b) + cols)
        sums = masked_softplus_sums(a, b, scale, bias, text_weights, mask)
        scores = scale[rows] * row_dot(take_rows(a, rows), take_rows(b, cols)) + bias
        weights = text_weights[cols]
        if o.positive_weights is not None:
            weights = weights * o.positive_weights
        terms = weights * softplus(-scores, threshold=40)
        return sums.index_put((rows,), terms, accumulate=True)


def _check_weights(
    name: str, weights: object, features: Tensor, ids: Tensor | None
) -> Tensor | None:
    """The weights, 0 for padding."""
    if weights is None:
        return None
    weights = check_anchor_weights(name, weights, features, ids)
    return weights if ids is None else weights.masked_fill(ids < 0, 0)


def _check_bias(bias: object, like: Tensor) -> Tensor:
    dtype = accumulate_dtype(like.dtype)
    if isinstance(bias, Tensor):
        bias = check_tensor("logit_bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"logit_bias must have a floating-point dtype, got {bias.dtype}")
        bias = scalar(bias)
        check_0d("logit_bias", bias)
        if bias.device != like.device:
            raise ValueError(f"logit_bias must be on {like.device}, got {bias.device}")
        return cast(bias, dtype)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise TypeError(f"logit_bias must be a number or a tensor, got {type(bias).__name__}")
    if not -math.inf < bias < math.inf:
        raise ValueError(f"logit_bias must be finite, got {bias}")
    return torch.full((), float(bias), dtype=dtype, device=like.device)
