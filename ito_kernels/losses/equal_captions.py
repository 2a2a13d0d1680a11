"""The terms of `ito_loss` with equal captions whose positives no single id per row can define.

There are two cases. With C > 1 captions an image has a set of C ids, and sharing an id does not
partition the batch. With equal_ids="ignore" only an item's own pairs are positives, but the pairs
that are left out have the same ids. The negatives are summed by the primitive or, for sets, in
panels of rows. An item's own pairs are all on one rank and are computed separately. The mean score
of positives given by sets is computed from sums of features. Memory is O((V + C)·N·D).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .batch import Arguments
from .precision import logaddexp, without_autocast
from .scores import Scores


def pooled(args: Arguments, views: Tensor, captions: Tensor, ids: Tensor, equal_ids: str) -> Tensor:
    """L_align with denominator="pooled" of views (V, n, D) and captions (C, n, D) with ids (C, n).

    args: its features are replaced.
    """
    sets = ids.T.repeat(len(views), 1)  # (V·n, C), of each image
    features = {"queries": views.flatten(0, 1), "keys": captions.flatten(0, 1)}
    padding = {"query_ids": sets.amax(1), "key_ids": ids.flatten()}
    scores = args._replace(**features, **padding).scores()
    with without_autocast(ids.device):
        if equal_ids == "positive":
            means = _mean_scores(scores, sets)
            losses = {
                side: x.logsum - (means[side] - x.shift) for side, x in scores.statistics().items()
            }
        else:
            x, y = _without_padding(scores)
            x, y = x.unflatten(0, views.shape[:2]), y.unflatten(0, captions.shape[:2])
            own = scores.scale * torch.einsum("vnd,cnd->nvc", x, y)
            there = (ids >= 0).T[:, None].expand_as(own)
            if len(captions) == 1:
                others = scores.statistics(exclude_positives=True)
                log_sums = {side: (x.max, x.logsum) for side, x in others.items()}
            else:
                by_sets = replace(scores, query_sets=sets)
                others = by_sets.masked_statistics(("row", "col"), (1.0,), exclude_positives=True)
                log_sums = {side: (x.max, x.log_sums[0]) for side, x in others.items()}
            order = {"row": (1, 0, 2), "col": (2, 0, 1)}  # anchors first
            losses = {
                side: _own_against_others(
                    *(z.permute(order[side]).flatten(0, 1) for z in (own, there)), *log_sums[side]
                )
                for side in order
            }
        return 0.5 * sum(scores.mean(side, loss) for side, loss in losses.items())


def fusion_without_equal(args: Arguments, fused: Tensor, ids: Tensor) -> Tensor:
    """L_fusion with equal_ids="ignore" of fused views (F, n, D) of items with ids (n,)."""
    h, ids = fused.flatten(0, 1), ids.repeat(len(fused))
    scores = args._replace(queries=h, keys=h, query_ids=ids, key_ids=ids).scores(symmetric=False)
    with without_autocast(ids.device):
        z = _without_padding(scores)[0].unflatten(0, fused.shape[:2])
        own = scores.scale * torch.einsum("fnd,gnd->fng", z, z)
        another = ~torch.eye(len(fused), dtype=torch.bool, device=ids.device)[:, None]
        there = another & (ids >= 0).view(*fused.shape[:2], 1)
        others = scores.statistics(exclude_positives=True)["row"]
        own, there = own.flatten(0, 1), there.flatten(0, 1)
        return scores.mean("row", _own_against_others(own, there, others.max, others.logsum))


def _own_against_others(own: Tensor, there: Tensor, maximum: Tensor, logsum: Tensor) -> Tensor:
    """log (Σ e^own + e^(maximum + logsum)) - mean(own) for each anchor, 0 without a positive.

    own: (anchors, number), the scores of the anchor's positives; only those where `there` count.
    """
    number = there.sum(1)
    own = own.masked_fill(~there, 0)
    target = own.sum(1) / number.clamp(min=1)
    shift = target.detach()
    own = (own - shift[:, None]).masked_fill(~there & (number > 0)[:, None], -torch.inf)
    log_d = logaddexp(own.logsumexp(1), logsum + (maximum - shift))
    return torch.where(number > 0, log_d - (target - shift), 0)


def _mean_scores(scores: Scores, sets: Tensor) -> dict[str, Tensor]:
    """The mean score of each anchor's positives, by direction. The positives of query i are the
    keys whose id is one of sets[i].

    The sum of the inner products with all features of an id is the inner product with their sum.
    """
    batch = scores.global_batch
    queries, keys = _without_padding(scores)
    # an id's place is that of its first key in the sorted order
    known = batch.all_gather_rows(scores.key_ids).sort().values
    again = (sets[:, :, None] == sets[:, None]).tril(-1).any(2)
    counted = (sets >= 0) & ~again

    def place(ids: Tensor) -> Tensor:
        return torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)

    def sums(x: Tensor, places: Tensor) -> Tensor:
        return x.new_zeros(len(known), *x.shape[1:]).index_put((places,), x, accumulate=True)

    every_key, key_places = batch.all_gather_rows(keys), place(scores.key_ids)
    of_keys = sums(every_key, batch.all_gather_rows(key_places))
    numbers = torch.searchsorted(known, known, right=True) - torch.searchsorted(known, known)
    total, number = 0, 0
    of_queries, query_numbers = torch.zeros_like(of_keys), torch.zeros_like(of_keys[:, 0])
    every_query = batch.all_gather_rows(queries)
    for ids, mine in zip(sets.T, counted.T, strict=True):
        places, mine = place(ids), mine.to(queries.dtype)
        total = total + mine * (queries * of_keys[places]).sum(1)
        number = number + mine * numbers[places]
        places, mine = batch.all_gather_rows(places), batch.all_gather_rows(mine)
        of_queries = of_queries + sums(mine[:, None] * every_query, places)
        query_numbers = query_numbers + sums(mine, places)
    row = total / number.clamp(min=1)
    col = (keys * of_queries[key_places]).sum(1) / query_numbers[key_places].clamp(min=1)
    return {"row": scores.scale * row, "col": scores.scale * col}


def _without_padding(scores: Scores) -> tuple[Tensor, Tensor]:
    """The features, 0 for padding, which may hold any values."""
    return (
        scores.queries.masked_fill((scores.query_ids < 0)[:, None], 0),
        scores.keys.masked_fill((scores.key_ids < 0)[:, None], 0),
    )
