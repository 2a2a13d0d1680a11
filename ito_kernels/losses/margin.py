"""The false-negative margin: it removes negatives that are more similar to the anchor than its
positives are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .options import Options
from .precision import row_dot, take_rows, to_accumulate_dtype
from .scores import Scores
from .tiles import largest_positives


@torch.no_grad()
def apply_margin(scores: Scores, o: Options) -> Scores:
    """Return the scores with limits that leave out each negative (i, j) of an anchor i with

        <a_i, b_j> > max_{p ∈ P_i} <a_i, b_p> + margin

    in both directions. A relative margin is multiplied by the absolute value of that maximum. An
    anchor without a positive keeps all of its negatives.
    """
    largest_product = _largest_positive_products(scores, o)
    rounding = 0.0
    if o.positive_pairs is not None:
        # The kernels get no ids of the pairs: for them every pair is a negative, including (i, i).
        # Rounding must not put a positive above its own limit. Their sums of D products are wrong
        # by far less than 1e-5 times the product of the norms, which is added to the limit.
        no_positives = (
            torch.zeros_like(largest_product["row"]).long(),
            torch.ones_like(largest_product["col"]).long(),
        )
        scores = replace(scores, global_batch=scores.global_batch.with_ids(*no_positives))
        norms = [
            to_accumulate_dtype(x).square().sum(1).amax().sqrt()
            for x in (scores.queries, scores.keys)
        ]
        rounding = 1e-5 * scores.global_batch.all_reduce_max(torch.stack(norms)).prod()
    limit = {}
    for side, x in largest_product.items():
        factor = x.abs() if o.margin_type == "relative" else 1.0
        margin = o.false_negative_margin * factor + rounding
        limit[side] = torch.where(x == -torch.inf, torch.inf, x + margin)
    return replace(
        scores, row_limit=limit["row"], col_limit=limit["col"] if scores.symmetric else None
    )


def _largest_positive_products(scores: Scores, o: Options) -> dict[str, Tensor]:
    """The largest inner product of each anchor with one of its positives, -inf without any."""
    batch = scores.global_batch
    a = to_accumulate_dtype(scores.queries)
    b = to_accumulate_dtype(batch.all_gather_rows(scores.keys))
    if o.positive_pairs is None and scores.query_ids is not None:
        key_ids = batch.all_gather_rows(scores.key_ids)
        row, col = largest_positives(a, b, scores.query_ids, key_ids, scores.diagonal)
    else:
        pairs = o.positive_pairs
        if pairs is None:
            pairs = torch.arange(len(a), device=a.device).expand(2, -1)
        dot = row_dot(take_rows(a, pairs[0]), take_rows(b, pairs[1]))
        if scores.exclude_self:
            dot = dot.masked_fill(pairs[0] + scores.diagonal == pairs[1], -torch.inf)
        if o.positive_weights is not None:
            dot = dot.masked_fill(o.positive_weights == 0, -torch.inf)
        row, col = (
            x.new_full((len(x),), -torch.inf).scatter_reduce(0, anchors, dot, "amax")
            for x, anchors in zip((a, b), pairs, strict=True)
        )
    return {"row": row, "col": batch.local_columns(batch.all_reduce_max(col))}
