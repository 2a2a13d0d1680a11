"""The losses of CLIP and SigLIP: paired images and texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import check_chunk_size, same_on_every_rank, whole_batch
from ..similarity.spec import (
    accumulate_dtype,
    cast,
    check_ids,
    check_pair,
    check_scale,
    check_tensor,
    scalar,
)
from .common import REDUCTIONS, check_choice, check_flags, normalized
from .infonce import multi_positive_infonce


@same_on_every_rank
def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, **options
) -> Tensor | tuple:
    """Symmetric InfoNCE of images and texts: row i of one belongs to row i of the other.

        L = ½ · mean_i [ logsumexp_j S_ij - S_ii ] + ½ · mean_j [ logsumexp_i S_ij - S_jj ]

    with S = logit_scale · image_features · text_featuresᵀ, which is never formed.

    Args:
        image_features, text_features: (N, D), L2-normalised.
        logit_scale: the multiplier itself, not its logarithm: a number, a 0-d or an (N,) tensor.
        options: those of `multi_positive_infonce`; the images are its queries.

    Returns and raises as `multi_positive_infonce`. Source: Radford et al. 2021 (CLIP), fig. 3.
    """
    check_pair("image_features", image_features, "text_features", text_features)
    n, m = image_features.size(0), text_features.size(0)  # len() takes 0.4 µs
    if n != m and not {"query_ids", "key_ids", "positive_pairs"} & options.keys():
        raise ValueError(
            "image_features and text_features must have as many rows, unless query_ids and key_ids"
            f" or positive_pairs say what belongs together: got {n} and {m}"
        )
    return multi_positive_infonce(image_features, text_features, logit_scale, **options)


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
    """Sigmoid loss of every image with every text.

        L = (1/N) Σ_ij softplus(-y_ij · S_ij),   S = logit_scale · images · textsᵀ + logit_bias

    with y_ij = 1 where the ids are equal and -1 elsewhere. S is never formed.

    Args:
        image_features, text_features: (N, D) and (M, D), L2-normalised unless `normalize`.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        logit_bias: a number or a 0-d tensor.
        image_ids, text_ids: (N,) and (M,) integers; equal ids are positives. Each defaults to the
            row number, then N must equal M. A negative id is a padded row that takes no part.
        reduction: "mean": the sum over pairs divided by the number of images N (not by N·M);
            "sum": over pairs; "none": (N,), each image's sum over the texts.
        backend: see `ito_kernels.backends()`; None chooses.

        group, chunk_size: as in `multi_positive_infonce`: the images and texts of all ranks.

    Returns a 0-d fp32 tensor (fp64 for fp64 features), (N,) for "none".

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before any kernel runs.
        RuntimeError: the backend asked for cannot run here.

    Source: Zhai et al. 2023 (SigLIP), eq. 1.
    """
    check_chunk_size(chunk_size)
    check_flags(normalize=normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    image_features, text_features = check_pair(
        "image_features", image_features, "text_features", text_features
    )
    scale = check_scale("logit_scale", logit_scale, image_features)
    bias = _check_bias(logit_bias, image_features)
    n, m, device = len(image_features), len(text_features), image_features.device
    if n != m and (image_ids is None or text_ids is None):
        raise ValueError(
            "image_ids and text_ids are needed where images and texts differ in number:"
            f" got {n} images, {m} texts and no "
            + ("image_ids" if image_ids is None else "text_ids")
        )
    if image_ids is not None or text_ids is not None:
        rows = torch.arange(n, device=device) if group is None else None
        image_ids = rows if image_ids is None else image_ids
        text_ids = rows if text_ids is None else text_ids
        if image_ids is not None:
            image_ids = check_ids("image_ids", image_ids, n, "image_features", device)
        if text_ids is not None:
            text_ids = check_ids("text_ids", text_ids, m, "text_features", device)
    whole = whole_batch(
        group, image_features, text_features, image_ids, text_ids, chunk_size, backend
    )
    image_ids, text_ids, number = whole.query_ids, whole.key_ids, n
    if image_ids is not None:
        number = whole.sum((image_ids >= 0).sum()).clamp(min=1)  # padding does not count
    if normalize:
        image_features = normalized(image_features, image_ids)
        text_features = normalized(text_features, text_ids)
    weights = None
    if reduction != "none":
        weights = torch.ones(n, dtype=bias.dtype, device=device)
        if reduction == "mean":
            weights /= number
    return whole.similarity_softplus(
        image_features,
        text_features,
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
