"""False negatives by a margin: keys that are more like the anchor than its positives are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .options import Options
from .precision import accumulated, inner, take
from .scores import Scores
from .tiles import largest


@torch.no_grad()
def with_margin(batch: Scores, o: Options) -> Scores:
    """The batch without the negatives of an anchor i with

        <a_i, b_j> > max_{p ∈ P_i} <a_i, b_p> + margin

    in either direction. An anchor without a positive keeps all.
    """
    top = _largest_positives(batch, o)
    margin = o.false_negative_margin
    if o.positive_pairs is not None:
        # to the kernels all are negatives, also (i, i): rounding must not put one beyond its limit.
        # Their sums of D products are off by far less than 1e-5 of the norms' product.
        none = torch.zeros_like(top["row"]).long(), torch.ones_like(top["col"]).long()
        batch = replace(batch, global_batch=batch.global_batch.with_ids(*none))
        norms = [accumulated(x).square().sum(1).amax().sqrt() for x in (batch.queries, batch.keys)]
        margin = margin + 1e-5 * batch.global_batch.all_reduce_max(torch.stack(norms)).prod()
    limit = {side: torch.where(x == -torch.inf, torch.inf, x + margin) for side, x in top.items()}
    return replace(
        batch, row_limit=limit["row"], col_limit=limit["col"] if batch.symmetric else None
    )


def _largest_positives(batch: Scores, o: Options) -> dict[str, Tensor]:
    """Their inner product with each anchor, -inf where there is none."""
    global_batch = batch.global_batch
    a, b = accumulated(batch.queries), accumulated(global_batch.all_gather_rows(batch.keys))
    if o.positive_pairs is None and batch.query_ids is not None:
        key_ids = global_batch.all_gather_rows(batch.key_ids)
        row, col = largest(a, b, batch.query_ids, key_ids, batch.diagonal)
    else:
        pairs = o.positive_pairs
        if pairs is None:
            pairs = torch.arange(len(a), device=a.device).expand(2, -1)
        dot = inner(take(a, pairs[0]), take(b, pairs[1]))
        if batch.exclude_self:
            dot = dot.masked_fill(pairs[0] + batch.diagonal == pairs[1], -torch.inf)
        if o.positive_weights is not None:
            dot = dot.masked_fill(o.positive_weights == 0, -torch.inf)
        row, col = (
            x.new_full((len(x),), -torch.inf).scatter_reduce(0, anchors, dot, "amax")
            for x, anchors in zip((a, b), pairs, strict=True)
        )
    return {"row": row, "col": global_batch.local_columns(global_batch.all_reduce_max(col))}
