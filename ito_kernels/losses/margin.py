"""False negatives by a margin: keys that are more like the anchor than its positives are."""

from __future__ import annotations

from dataclasses import replace

import torch

from .batch import Batch
from .decoupled import GATHERED
from .options import Options
from .pairs import equal_ids
from .precision import accumulated, inner, take


@torch.no_grad()
def with_margin(batch: Batch, o: Options) -> Batch:
    """The batch without the negatives of an anchor i with

        <a_i, b_j> > max_{p ∈ P_i} <a_i, b_p> + margin

    in either direction. An anchor without a positive keeps all.
    """
    if o.positive_pairs is not None:
        pairs = [o.positive_pairs]
    else:
        pairs = equal_ids(batch, max(1, GATHERED // batch.queries.shape[1]))
    n, m = len(batch.queries), len(batch.keys)
    top = {"row": batch.scale.new_full((n,), -torch.inf)}
    top["col"] = batch.scale.new_full((m,), -torch.inf)
    for rows, cols in pairs:
        dot = inner(take(batch.queries, rows), take(batch.keys, cols))
        if batch.exclude_self:
            dot = dot.masked_fill(rows == cols, -torch.inf)
        for side, anchors in (("row", rows), ("col", cols)):
            top[side] = top[side].scatter_reduce(0, anchors, dot, "amax")
    margin = o.false_negative_margin
    if o.positive_pairs is not None:
        # to the kernels all are negatives, also (i, i): rounding must not put one beyond its limit.
        # Their sums of D products are off by far less than 1e-5 of the norms' product.
        none = torch.zeros_like(top["row"]).long(), torch.ones_like(top["col"]).long()
        batch = replace(batch, whole=batch.whole.with_ids(*none))
        norms = [accumulated(x).square().sum(1).amax().sqrt() for x in (batch.queries, batch.keys)]
        margin = margin + 1e-5 * norms[0] * norms[1]
    limit = {side: torch.where(x == -torch.inf, torch.inf, x + margin) for side, x in top.items()}
    return replace(
        batch, row_limit=limit["row"], col_limit=limit["col"] if batch.symmetric else None
    )
