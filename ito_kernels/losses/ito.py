"""The loss of ITO: alignment of several views and captions, plus fusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import global_row_numbers, same_on_every_rank
from ..similarity.spec import check_tensor
from .batch import Names, check_arguments
from .common import check_choice
from .infonce import infonce
from .options import Options

ITO, FUSED = Names("image_views", "text"), Names("fused_views", "fused_views")


@same_on_every_rank(stacked=("image_views", "text", "fused_views"))
def ito_loss(
    image_views: Tensor,
    text: Tensor,
    fused_views: Tensor | None,
    logit_scale: float | Tensor,
    *,
    lambda_fusion: float = 2.0,
    denominator: str = "pair",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_align + lambda_fusion · L_fusion.

    L_align, "pair":   the mean over views v and captions c of the CLIP loss of x^v and y^c. Each
                       (v, c) has its own softmax.
    L_align, "pooled": one multi-positive softmax of all V·N images and all C·N captions (L_out,
                       both directions). The positives are the pairs of the same item.
    L_fusion:          L_out over the F·N fused embeddings without self pairs. The positives are the
                       pairs of the same item. At F = 2 this is NT-Xent.

    All features are L2-normalised.

    Args:
        image_views: (V, N, D), V augmented views of N items.
        text: (N, D), or (C, N, D) for C captions of each item.
        fused_views: (F, N, D) with F ≥ 2: views fused with the text. May be None if lambda_fusion
            is 0. If given with lambda_fusion = 0, L_fusion is reported without gradient.
        logit_scale: the multiplier itself, shared by all terms: a number or a 0-d tensor.
        denominator: "pair" or "pooled", the form of L_align.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns:
        (L, {"align": L_align, "fusion": L_fusion}), 0-d fp32 tensors (fp64 for fp64 features).

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it.

    Source: "Images and Texts as One", arXiv 2603.02767, with two views and denominator="pair".
    """
    check_choice("denominator", denominator, ("pair", "pooled"))
    views = _check_views("image_views", image_views, "V")
    if check_tensor("text", text).ndim == 2:
        text = text.unsqueeze(0)
    captions = _check_views("text", text, "C", like=views)
    if (
        isinstance(lambda_fusion, bool)
        or not isinstance(lambda_fusion, (int, float))
        or not (math.isfinite(lambda_fusion) and lambda_fusion >= 0)
    ):
        raise ValueError(f"lambda_fusion must be a number of at least 0, got {lambda_fusion!r}")
    shared = group, chunk_size, backend
    args = check_arguments(views[0], captions[0], logit_scale, *shared, names=ITO)
    if args.scale.ndim:
        raise ValueError(
            f"logit_scale must be a number or a 0-d tensor, got shape {tuple(args.scale.shape)}"
        )
    fused = None
    if fused_views is None:
        if lambda_fusion > 0:
            raise ValueError(f"fused_views is needed for lambda_fusion = {lambda_fusion}")
    else:
        fused_views = _check_views("fused_views", fused_views, "F", like=views, any_width=True)
        if len(fused_views) < 2:
            raise ValueError(f"fused_views must hold at least 2 views, got {len(fused_views)}")
        h = fused_views.flatten(0, 1)
        fused = check_arguments(h, h, args.scale, *shared, names=FUSED)
    items = global_row_numbers(views.shape[1], group, views.device)

    if denominator == "pair":
        pairs = [
            infonce(args._replace(queries=x, keys=y), Options()) for x in views for y in captions
        ]
        align = torch.stack(pairs).mean()
    else:
        pooled = args._replace(
            queries=views.flatten(0, 1),
            keys=captions.flatten(0, 1),
            query_ids=items.repeat(len(views)),
            key_ids=items.repeat(len(captions)),
        )
        align = infonce(pooled, Options())

    if fused is None:
        return align, {"align": align, "fusion": torch.zeros_like(align)}
    ids = items.repeat(len(fused_views))
    with torch.set_grad_enabled(torch.is_grad_enabled() and lambda_fusion > 0):
        fused = fused._replace(query_ids=ids, key_ids=ids)
        fusion = infonce(fused, Options(symmetric=False, exclude_self=True))
    total = align + lambda_fusion * fusion if lambda_fusion > 0 else align
    return total, {"align": align, "fusion": fusion}


def _check_views(
    name: str, x: object, count: str, like: Tensor | None = None, any_width: bool = False
) -> Tensor:
    x = check_tensor(name, x)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name} must have shape ({count}, N, D), got {tuple(x.shape)}")
    if like is not None and (
        x.shape[1] != like.shape[1] or (x.shape[2] != like.shape[2] and not any_width)
    ):
        raise ValueError(
            f"{name} must have {like.shape[1]} items"
            + ("" if any_width else f" of width {like.shape[2]}")
            + f" like image_views, got {tuple(x.shape)}"
        )
    return x
