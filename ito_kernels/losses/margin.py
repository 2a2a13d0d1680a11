"""The false-negative margin: it removes negatives that are more similar to the anchor than its
positives are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .options import Options
from .positive_pairs import PositivePairs
from .precision import to_accumulate_dtype
from .scores import Scores
from .tiles import largest_positives

# An inner product may be computed twice, for the limit and as a score. The two differ by up to 8
# units of rounding times the norms (D = 16 to 512): without a tolerance, candidates that are equal
# to the positive would leave or stay at random.
TOLERANCE = 32


@torch.no_grad()
def apply_margin(scores: Scores, o: Options, pairs: PositivePairs | None) -> Scores:
    """Return the scores with limits that leave out each negative (i, j) of an anchor i with

        <a_i, b_j> > max_{p ∈ P_i} <a_i, b_p> + margin

    in both directions. A relative margin is multiplied by the absolute value of that maximum. An
    anchor without a positive keeps all of its negatives. With a guide, the inner products are those
    of its features.

    pairs: the positives, or None if ids define them.
    """
    a, b = scores.queries, scores.keys
    if o.guide_queries is not None:
        a, b = guide = o.guide_queries, o.guide_keys
        scores = replace(scores, guide=guide)
    a, b = to_accumulate_dtype(a), to_accumulate_dtype(b)
    if pairs is None and scores.query_ids is None:
        pairs = PositivePairs.of_rows(scores)
    products = _largest_positive_products(scores, a, b, pairs)
    norms = _largest_positive_products(scores, *(norm_column(x) for x in (a, b)), pairs)
    limit = {}
    for side, x in products.items():
        factor = x.abs() if o.margin_type == "relative" else 1.0
        rounding = TOLERANCE * torch.finfo(x.dtype).eps * norms[side]
        x_limit = x + o.false_negative_margin * factor + rounding
        limit[side] = torch.where(x == -torch.inf, torch.inf, x_limit)
    return replace(
        scores, row_limit=limit["row"], col_limit=limit["col"] if scores.symmetric else None
    )


def norm_column(x: Tensor) -> Tensor:
    """The norms as features of width 1, whose inner products are the products of norms."""
    return x.norm(dim=1, keepdim=True)


def _largest_positive_products(
    scores: Scores, a: Tensor, b: Tensor, pairs: PositivePairs | None
) -> dict[str, Tensor]:
    """The largest inner product of each anchor with one of its positives, -inf without any.

    a, b: the features of the queries and of the keys that are compared.
    """
    batch = scores.global_batch
    if pairs is None:
        key_ids = batch.all_gather_rows(scores.key_ids)
        b = batch.all_gather_rows(b)
        row, col = largest_positives(a, b, scores.query_ids, key_ids, scores.diagonal)
    else:
        products = pairs.inner_products(a, b).masked_fill(pairs.weights == 0, -torch.inf)
        row, col = (
            products.new_full((size,), -torch.inf).scatter_reduce(0, anchors, products, "amax")
            for size, anchors in ((len(a), pairs.rows), (batch.global_count("col"), pairs.cols))
        )
    return {"row": row, "col": batch.local_columns(batch.all_reduce_max(col))}
