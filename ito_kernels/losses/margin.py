"""Negatives that look truer than the positives: taken for false ones, and left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch
from .pairs import equal_ids
from .precision import inner, take

# Pairs are gathered 2^22 elements at a time, 16 MiB in fp32, of each side.
GATHERED = 1 << 22


@torch.no_grad()
def limits(batch: Batch, margin: float) -> dict[str, Tensor]:
    """For each direction and anchor the largest inner product with a positive, plus the margin;
    inf without a positive. Time O(P·D) for P positive pairs."""
    top = {
        side: batch.scale.new_full((len(batch.features(side)),), -torch.inf)
        for side in batch.directions
    }
    for rows, cols in equal_ids(batch, max(1, GATHERED // batch.queries.shape[1])):
        score = inner(take(batch.queries, rows), take(batch.keys, cols))
        for side, anchor in (("row", rows), ("col", cols)):
            if side in top:
                top[side] = top[side].scatter_reduce(0, anchor, score, "amax")
    return {side: torch.where(x == -torch.inf, torch.inf, x + margin) for side, x in top.items()}
