"""The losses of CLIP and SigLIP: paired images and texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import same_on_every_rank
from ..similarity.spec import accumulate_dtype, cast, check_tensor, scalar
from .batch import Names, check_arguments
from .common import REDUCTIONS, check_choice, check_flags
from .infonce import infonce, multi_positive_infonce
from .options import Options

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
) -> Tensor | tuple:
    """Symmetric InfoNCE of images and texts. Row i of both is a positive pair.

        L = ½ · mean_i [ logsumexp_j S_ij - S_ii ] + ½ · mean_j [ logsumexp_i S_ij - S_jj ]

    with S = logit_scale · image_features · text_featuresᵀ, which is never formed.

    Args:
        image_features, text_features: (N, D), L2-normalised.
        logit_scale: the multiplier itself, not its logarithm: a number, a 0-d or an (N,) tensor.
        query_ids, key_ids, group, chunk_size, backend, options: as in `multi_positive_infonce`,
            whose queries are the images.

    Returns the loss and raises errors as `multi_positive_infonce` does; TypeError for an unknown
    option.
    Source: Radford et al. 2021 (CLIP), fig. 3.
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
    return infonce(args, Options(**options))


@same_on_every_rank
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sigmoid loss over all pairs of an image and a text.

        L = (1/N) Σ_ij softplus(-y_ij · S_ij),   S = logit_scale · images · textsᵀ + logit_bias

    with y_ij = 1 where the ids are equal and -1 elsewhere. S is never formed.

    Args:
        image_features, text_features: (N, D) and (M, D), L2-normalised unless `normalize`.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        logit_bias: a number or a 0-d tensor.
        image_ids, text_ids: (N,) and (M,) integers; equal ids are positives. Each defaults to the
            row number, which needs N = M. A negative id marks a padded row, which is ignored.
        normalize: L2-normalise both sides first.
        reduction: "mean": the sum over pairs divided by the number of images N (not by N·M);
            "sum": the sum over pairs; "none": (N,), the sum over the texts for each image.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features); (N,) for "none".

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it. Raised before any
            kernel runs.
        RuntimeError: the requested backend cannot run here.

    Source: Zhai et al. 2023 (SigLIP), eq. 1.
    """
    check_flags(normalize=normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    args = check_arguments(
        image_features,
        text_features,
        logit_scale,
        group,
        chunk_size,
        backend,
        ids=(image_ids, text_ids),
        names=SIGLIP,
    )
    bias = _check_bias(logit_bias, args.queries)
    batch = args.global_batch()
    args = args.with_batch_ids(batch)
    if normalize:
        args = args.with_normalized_rows()
    images, texts, scale, image_ids, text_ids, *_ = args
    number = n = len(images)
    if image_ids is not None:
        number = batch.all_reduce_sum((image_ids >= 0).sum()).clamp(min=1)  # without padding
    weights = None
    if reduction != "none":
        weights = torch.ones(n, dtype=bias.dtype, device=images.device)
        if reduction == "mean":
            weights /= number
    return batch.similarity_softplus(
        images,
        texts,
        scale,
        row_bias=bias.expand(n),
        row_ids=image_ids,
        col_ids=text_ids,
        row_weights=weights,
        backend=backend,
    )


def _check_bias(bias: object, like: Tensor) -> Tensor:
    dtype = accumulate_dtype(like.dtype)
    if isinstance(bias, Tensor):
        bias = check_tensor("logit_bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"logit_bias must have a floating-point dtype, got {bias.dtype}")
        bias = scalar(bias)
        if bias.ndim != 0:
            raise ValueError(
                f"logit_bias must be a number or a 0-d tensor, got shape {tuple(bias.shape)}"
            )
        if bias.device != like.device:
            raise ValueError(f"logit_bias must be on {like.device}, got {bias.device}")
        return cast(bias, dtype)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise TypeError(f"logit_bias must be a number or a tensor, got {type(bias).__name__}")
    if not -math.inf < bias < math.inf:
        raise ValueError(f"logit_bias must be finite, got {bias}")
    return torch.full((), float(bias), dtype=dtype, device=like.device)
