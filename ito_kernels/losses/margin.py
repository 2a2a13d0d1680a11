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
    largest_product = _largest_positive_products(scores, a, b, pairs)
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
        norms = torch.stack([x.square().sum(1).amax().sqrt() for x in (a, b)])
        rounding = 1e-5 * scores.global_batch.all_reduce_max(norms).prod()
    limit = {}
    for side, x in largest_product.items():
        factor = x.abs() if o.margin_type == "relative" else 1.0
        margin = o.false_negative_margin * factor + rounding
        limit[side] = torch.where(x == -torch.inf, torch.inf, x + margin)
    return replace(
        scores, row_limit=limit["row"], col_limit=limit["col"] if scores.symmetric else None
    )


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
