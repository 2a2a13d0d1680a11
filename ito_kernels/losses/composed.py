"""`multi_positive_infonce` with options, as a composition of calls of the primitive.

For an anchor i with positives P_i and negatives N_i,

    loss_i = log D_i - T_i

D_i, the denominator: Σ e^S over all candidates, or Σ e^S over P_i plus the reweighted negatives.
T_i, the target: the mean of S over P_i, or the logarithm of the mean or of the sum of e^S over P_i.

Both are relative to `shift`, a constant beside the largest score, where digits do not cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.pairs import finite_shift
from ..similarity.spec import check_scale
from .batch import Batch, Direction
from .candidates import extra_candidates
from .common import mean_where
from .margin import with_margin
from .options import Options, check_options
from .pairs import Positives
from .precision import accumulated, as_autocast, logaddexp, without_autocast
from .reweighting import debiased, hard


def infonce_with_options(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    options: Options,
    *,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    positives: str,
    symmetric: bool,
    exclude_self: bool,
    empty: str,
    normalize: bool,
    reduction: str,
    return_stats: bool,
    backend: str | None,
) -> Tensor | tuple:
    """The arguments of `multi_positive_infonce`, checked but for the options; queries and keys are
    normalised where that is asked for."""
    scale = check_scale("logit_scale", logit_scale, queries)
    ids = {"query_ids": query_ids, "key_ids": key_ids}
    o = check_options(
        options, queries, keys, scale, positives=positives, symmetric=symmetric, **ids
    )
    if normalize:
        o = o.with_candidates(lambda x: torch.nn.functional.normalize(x, dim=-1))
    o = o.with_candidates(as_autocast)
    same = keys is queries
    queries, keys = as_autocast(queries), as_autocast(keys)
    if o.reweighted or o.positive_pairs is not None:  # parts of several calls cancel
        queries, keys = accumulated(queries), accumulated(keys)
    with without_autocast(queries.device):
        batch = Batch(
            queries,
            queries if same else keys,
            scale,
            **ids,
            symmetric=symmetric,
            backend=backend,
            exclude_self=exclude_self,
            key_bias=o.key_bias,
        )
        limited = batch if o.false_negative_margin is None else with_margin(batch, o)
        anchors = _anchors(limited, o, positives)
        weights = {"row": o.query_weights, "col": o.key_weights}
        losses = tuple(
            _reduced(x, batch.ids(side), weights[side], empty, reduction)
            for side, x in anchors.items()
        )
        loss = losses[0]
        if symmetric:
            loss = losses if reduction == "none" else 0.5 * (losses[0] + losses[1])
        return (loss, _diagnostics(batch, anchors)) if return_stats else loss


class _Anchors(NamedTuple):
    """One direction's anchors: their losses, 0 without a positive; log D, absolute; the number (or
    weight) of their positives; with pairs the mean of those scores."""

    loss: Tensor
    log_denominator: Tensor
    k: Tensor
    positive: Tensor | None


def _anchors(batch: Batch, o: Options, positives: str) -> dict[str, _Anchors]:
    """Of each direction: calls of the primitive serve both at once."""
    pairs = None
    if o.positive_pairs is not None:
        rows, cols = o.positive_pairs
        pairs = Positives(batch, rows, cols, o.positive_weights)
    linear = positives == "mean"
    kind = None if pairs else "linear" if linear and not o.reweighted else "lse"
    base = means = batch.statistics(positives=kind, exclude_positives=o.reweighted)
    if linear and kind == "lse" and batch.query_ids is not None:  # there may be several positives
        means = batch.statistics(positives="linear")
    powers = {1.0: base}
    if o.hardness:
        powers = {
            power: batch.statistics(power, exclude_positives=True)
            for power in (o.hardness, 1 + o.hardness)
        }
    extra = extra_candidates(batch, o)

    def anchors(side: str) -> _Anchors:
        at, more = base[side], extra if side == "row" else []
        shift = finite_shift(at.max)
        if pairs:
            k, mean, log_sum = pairs.of(side, shift)
        else:
            k, log_sum = batch.positives(side), at.pos
            mean = means[side].pos / k.clamp(min=1) + (finite_shift(means[side].max) - shift)
        some = k > 0
        log_k = torch.where(some, k, 1).log()
        log_sum = None if log_sum is None else torch.where(some, log_sum, 0)
        target = mean
        if positives != "mean":
            target = log_sum - log_k if positives == "in" else log_sum
        if o.reweighted or o.label_smoothing:
            number = batch.candidates(side) + sum(x.number() for x in more)
            if batch.ids(side) is not None:
                number = number.masked_fill(batch.ids(side) < 0, 0)

        logs = [_log_sum(found[side], power, shift, more) for power, found in powers.items()]
        if o.reweighted:
            negatives = hard(*logs, number - k) if o.hardness else logs[0]
            if o.debias is not None:
                floor = -batch.scale - shift
                negatives = debiased(negatives, log_sum - log_k, number - k, o.debias, floor)
            log_denominator = torch.logaddexp(log_sum, negatives)
        else:
            (log_denominator,) = logs

        kept = some | log_denominator.isnan()  # which shows even where there is no positive
        denominator = torch.where(kept, log_denominator, 0)
        loss = denominator - torch.where(some, target, 0)
        if o.label_smoothing:
            total = batch.total(side) - batch.candidates(side) * shift
            total = total + sum(x.total(shift) for x in more)
            uniform = denominator - torch.where(some, total / number.clamp(min=1), 0)
            loss = (1 - o.label_smoothing) * loss + o.label_smoothing * uniform
        return _Anchors(loss, log_denominator + shift, k, mean + shift if pairs else None)

    return {side: anchors(side) for side in base}


def _log_sum(found: Direction, power: float, shift: Tensor, more: list) -> Tensor:
    """log Σ exp(power·(S - shift)) over the candidates of the batch and beyond."""
    out = found.logsum + (found.max - power * shift)
    for candidates in more:
        out = logaddexp(out, candidates.logsumexp(power, shift))
    return out


def _reduced(
    anchors: _Anchors, ids: Tensor | None, weights: Tensor | None, empty: str, reduction: str
) -> Tensor:
    loss = anchors.loss if weights is None else anchors.loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    weights = torch.ones_like(anchors.k) if weights is None else weights
    if empty == "drop":
        weights = weights.masked_fill(anchors.k <= 0, 0)
    elif ids is not None:
        weights = weights.masked_fill(ids < 0, 0)
    number = weights.sum()
    return loss.sum() / torch.where(number == 0, 1, number)


@torch.no_grad()
def _diagnostics(batch: Batch, anchors: dict[str, _Anchors]) -> dict:
    """Without the options' weights. Which scores are hardest and which win is a matter of the
    batch alone; where positives are pairs the kernels cannot tell them, and it stays unknown."""
    out = dict.fromkeys(
        f"{side}_{what}" for side in ("row", "col") for what in ("loss", "lse", "accuracy")
    )
    found = None
    if anchors["row"].positive is None:
        found = batch.statistics(positives="linear", hardest=True)
    for side, x in anchors.items():
        out[f"{side}_loss"], out[f"{side}_lse"] = x.loss.detach(), x.log_denominator.detach()
        if found:
            right = found[side].max > found[side].neg_max
            out[f"{side}_accuracy"] = mean_where(right.to(x.loss.dtype), x.k > 0)
    rows = anchors["row"]
    out["hardest_negative_score"] = None
    if found:
        at = found["row"]
        positive = at.pos / rows.k.clamp(min=1) + at.max
        out["hardest_negative_score"] = mean_where(at.neg_max, at.neg_max != -torch.inf)
    else:
        positive = rows.positive
    out["positive_score"] = mean_where(positive, rows.k > 0)
    return out
