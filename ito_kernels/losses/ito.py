"""The loss of ITO: alignment of several views and captions, plus fusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import global_row_numbers, same_on_every_rank
from ..similarity.spec import check_ids, check_tensor
from .batch import Names, check_arguments
from .common import check_0d, check_choice
from .equal_captions import fusion_without_equal, pooled
from .infonce import infonce
from .options import Options

ITO, FUSED = Names("image_views", "text"), Names("fused_views", "fused_views", "fusion_scale")


@same_on_every_rank(stacked=("image_views", "text", "fused_views"))
def ito_loss(
    image_views: Tensor,
    text: Tensor,
    fused_views: Tensor | None,
    logit_scale: float | Tensor,
    *,
    lambda_fusion: float = 2.0,
    denominator: str = "pair",
    fusion_scale: float | Tensor | None = None,
    caption_ids: Tensor | None = None,
    fused_ids: Tensor | None = None,
    equal_ids: str = "positive",
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

    With `caption_ids` t, captions of different items may be equal:

    "pair":   image i and text j are positives of each other if t_cj = t_ci.
    "pooled": caption (c, j) and the images of item i are positives of each other if t_cj is one of
              t_1i … t_Ci.
    L_fusion: the positives are the pairs of items with equal `fused_ids`.

    With equal_ids="ignore", such pairs of different items are left out: they are neither positives
    nor candidates.

    All features are L2-normalised; their dtypes are those of `multi_positive_infonce`.

    Args:
        image_views: (V, N, D), V augmented views of N items.
        text: (N, D), or (C, N, D) for C captions of each item.
        fused_views: (F, N, D) with F ≥ 2: views fused with the text. May be None if lambda_fusion
            is 0. If given with lambda_fusion = 0, L_fusion is reported without gradient.
        logit_scale: 1 / temperature, not its log, of all terms: a number or a 0-d tensor.
        denominator: "pair" or "pooled", the form of L_align.
        fusion_scale: the multiplier of L_fusion, if it has its own: a number or a 0-d tensor.
        caption_ids: integers of the shape of `text` without D; equal ids are equal captions. A
            negative id marks a caption that is missing: it is no anchor and no candidate. "pair"
            leaves out its image in that caption's softmax, "pooled" an image without any caption.
        fused_ids: (N,) integers, by default the first of `caption_ids`. A negative id is padding.
        equal_ids: "positive" or "ignore", what equal ids of different items mean.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns:
        (L, {"align": L_align, "fusion": L_fusion}), 0-d fp32 tensors (fp64 for fp64 features).

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it.
        RuntimeError: the requested backend cannot run here.

    Source: "Images and Texts as One", arXiv 2603.02767, with two views and denominator="pair".
    Equal captions and `fusion_scale` are not in it.
    """
    check_choice("denominator", denominator, ("pair", "pooled"))
    check_choice("equal_ids", equal_ids, ("positive", "ignore"))
    views = _check_views("image_views", image_views, "V")
    text_shape = tuple(check_tensor("text", text).shape[:-1])
    if text.ndim == 2:
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
    check_0d("logit_scale", args.scale)
    n, device = views.shape[1], views.device
    if caption_ids is not None:
        caption_ids = _check_caption_ids(caption_ids, text_shape, device)
    fused = None
    if fused_views is None:
        if lambda_fusion > 0:
            raise ValueError(f"fused_views is needed for lambda_fusion = {lambda_fusion}")
        for name, value in (("fusion_scale", fusion_scale), ("fused_ids", fused_ids)):
            if value is not None:
                raise ValueError(f"{name} needs fused_views, which is missing")
    else:
        fused_views = _check_views("fused_views", fused_views, "F", like=views, any_width=True)
        if len(fused_views) < 2:
            raise ValueError(f"fused_views must hold at least 2 views, got {len(fused_views)}")
        h = fused_views.flatten(0, 1)
        scale = args.scale if fusion_scale is None else fusion_scale
        fused = check_arguments(h, h, scale, *shared, names=FUSED)
        check_0d("fusion_scale", fused.scale)
        if fused_ids is not None:
            fused_ids = check_ids("fused_ids", fused_ids, n, "fused_views", device)
        elif caption_ids is not None:
            fused_ids = caption_ids[0]
    items = global_row_numbers(n, group, device)

    if denominator == "pair":
        ids = [None] * len(captions) if caption_ids is None else caption_ids
        pairs = [
            infonce(
                args._replace(queries=x, keys=y, query_ids=t, key_ids=t),
                Options(equal_ids=equal_ids),
            )
            for x in views
            for y, t in zip(captions, ids, strict=True)
        ]
        align = torch.stack(pairs).mean()
    elif caption_ids is None or (equal_ids == "positive" and len(captions) == 1):
        ids = items if caption_ids is None else caption_ids[0]
        flat = args._replace(
            queries=views.flatten(0, 1),
            keys=captions.flatten(0, 1),
            query_ids=ids.repeat(len(views)),
            key_ids=ids.repeat(len(captions)),
        )
        align = infonce(flat, Options())
    else:
        align = pooled(args, views, captions, caption_ids, equal_ids)

    if fused is None:
        return align, {"align": align, "fusion": torch.zeros_like(align)}
    with torch.set_grad_enabled(torch.is_grad_enabled() and lambda_fusion > 0):
        if equal_ids == "ignore" and fused_ids is not None:
            fusion = fusion_without_equal(fused, fused_views, fused_ids)
        else:
            ids = (items if fused_ids is None else fused_ids).repeat(len(fused_views))
            fused = fused._replace(query_ids=ids, key_ids=ids)
            fusion = infonce(fused, Options(symmetric=False, exclude_self=True))
    total = align + lambda_fusion * fusion if lambda_fusion > 0 else align
    return total, {"align": align, "fusion": fusion}


def _check_caption_ids(ids: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as int64 (C, N)."""
    ids = check_tensor("caption_ids", ids, "a tensor of integers")
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"caption_ids must have shape {shape}, one id for each caption of text, got"
            f" {tuple(ids.shape)}"
        )
    flat = check_ids("caption_ids", ids.reshape(-1), ids.numel(), "text", device)
    return flat.view(-1, shape[-1])


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
