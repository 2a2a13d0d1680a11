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

from ..distributed import GlobalBatch, LocalBatch
from ..similarity.pairs import finite_shift
from ..similarity.spec import SideStats
from .batch import Batch
from .candidates import extra_candidates
from .margin import with_margin
from .options import Options
from .pairs import Positives
from .precision import accumulated, as_autocast, logaddexp, without_autocast
from .reweighting import debiased, hard


def infonce_with_options(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    o: Options,
    whole: GlobalBatch | LocalBatch,
    *,
    positives: str,
    symmetric: bool,
    exclude_self: bool,
    empty: str,
    normalize: bool,
    reduction: str,
    return_stats: bool,
    backend: str | None,
) -> Tensor | tuple:
    """The arguments of `multi_positive_infonce`, checked; queries and keys are normalised where it
    is asked for, and pairs placed."""
    if o.false_negative_margin is not None and isinstance(whole, GlobalBatch):
        scale = _of_one_kind(scale, whole, len(queries))
    if normalize:
        o = o.with_candidates(lambda x: torch.nn.functional.normalize(x, dim=-1))
    o = o.with_candidates(as_autocast)
    same = keys is queries
    queries, keys = as_autocast(queries), as_autocast(keys)
    if o.meets_outside(scale, symmetric):  # the kernels: what cancels there was rounded before
        queries, keys = accumulated(queries), accumulated(keys)
    with without_autocast(queries.device):
        batch = Batch(
            whole,
            queries,
            queries if same else keys,
            scale,
            symmetric=symmetric,
            backend=backend,
            exclude_self=exclude_self,
            key_bias=o.key_bias,
        )
        limited = batch if o.false_negative_margin is None else with_margin(batch, o)
        anchors = _anchors(limited, o, positives)
        weights = {"row": o.query_weights, "col": o.key_weights}
        losses = tuple(
            _reduced(batch, side, x, weights[side], empty, reduction) for side, x in anchors.items()
        )
        loss = losses[0]
        if symmetric:
            loss = losses if reduction == "none" else 0.5 * (losses[0] + losses[1])
        return (loss, _diagnostics(batch, anchors)) if return_stats else loss


def _of_one_kind(scale: Tensor, whole: GlobalBatch, queries: int) -> Tensor:
    """One for each query on all ranks or on none, which choose their collectives by it: a scale of
    shape (1,) reads as 0-d, also that of a rank with one query."""
    per_query = whole.largest(scale.new_tensor(float(scale.ndim))) > 0
    return scale.expand(queries) if per_query else scale


class _Anchors(NamedTuple):
    """One direction's anchors: their losses, 0 without a positive; log D, absolute; the number (or
    weight) of their positives; with pairs the mean of those scores."""

    loss: Tensor
    log_denominator: Tensor
    k: Tensor
    positive: Tensor | None


def _anchors(batch: Batch, o: Options, positives: str) -> dict[str, _Anchors]:
    """Of each direction: calls of the primitive serve both at once."""
    pairs = _pairs(batch, o)
    powers = (o.hardness, 1 + o.hardness) if o.hardness else (1.0,)
    listed, sums = {}, None
    if o.reweighted and o.positive_pairs is not None:  # whose negatives the kernels cannot tell
        listed = {side: pairs.negatives(side, powers) for side in batch.directions}
        passes = {p: {side: x.sums[p] for side, x in listed.items()} for p in powers}
    elif o.hardness:
        passes = {p: batch.statistics(p, exclude_positives=True) for p in powers}
        sums = None if pairs else batch.statistics(positives="lse", exclude_positives=True)
    else:
        kind = "linear" if positives == "mean" and not o.reweighted else "lse"
        sums = batch.statistics(positives=None if pairs else kind, exclude_positives=o.reweighted)
        passes = {1.0: sums}
    means = sums
    if positives == "mean" and o.reweighted and batch.query_ids is not None:
        means = batch.statistics(positives="linear")  # there may be several positives
    extra = extra_candidates(batch, o)

    def positive_part(side: str, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, and of the positives the mean S and log Σ e^S, which is 0 where k is 0; where one of
        them is not needed, any value."""
        if pairs:
            k, mean, log_sum = pairs.of(side, shift)
        else:
            k = batch.positives(side)
            mean = means[side].pos / k.clamp(min=1) + (finite_shift(means[side].max) - shift)
            log_sum = sums[side].pos + (finite_shift(sums[side].max) - shift)
        return k, mean, torch.where(k > 0, log_sum, 0)

    def anchors(side: str) -> _Anchors:
        more = extra if side == "row" else []
        shift = finite_shift(passes[powers[-1]][side].max) / powers[-1]
        k, mean, log_sum = positive_part(side, shift)
        some = k > 0
        target = {"mean": mean, "in": log_sum - _log(k), "sum": log_sum}[positives]
        logs = [_log_sum(passes[p][side], p, shift, more) for p in powers]
        if o.reweighted:
            number = batch.candidates(side) + sum(x.number() for x in more)
            if batch.ids(side) is not None:
                number = number.masked_fill(batch.ids(side) < 0, 0)
            rest, itself = number - k, log_sum
            if listed:  # where k is a weight, and a pair may come twice
                rest = listed[side].number + sum(x.number() for x in more)
                itself = torch.where(some, pairs.log_sum(side, shift), 0)
            negatives = hard(*logs, rest) if o.hardness else logs[0]
            if o.debias is not None:
                floor = -batch.scale - shift
                negatives = debiased(negatives, log_sum - _log(k), rest, o.debias, floor)
            log_denominator = torch.logaddexp(itself, negatives)
        else:
            (log_denominator,) = logs

        kept = some | log_denominator.isnan()  # which shows even where there is no positive
        denominator = torch.where(kept, log_denominator, 0)
        loss = denominator - torch.where(some, target, 0)
        if o.label_smoothing:
            total, number = batch.total(side)
            total = total - number * shift
            for x in more:
                its_total, its_number = x.total(shift)
                total, number = total + its_total, number + its_number
            uniform = denominator - torch.where(some, total / number.clamp(min=1), 0)
            loss = (1 - o.label_smoothing) * loss + o.label_smoothing * uniform
        by_pairs = o.positive_pairs is not None
        return _Anchors(loss, log_denominator + shift, k, mean + shift if by_pairs else None)

    return {side: anchors(side) for side in batch.directions}


def _pairs(batch: Batch, o: Options) -> Positives | None:
    """The positives as pairs, where they are given as such or a pass over S would be for the
    diagonal alone; None where the kernels find them by ids."""
    if o.positive_pairs is not None:
        return Positives(batch, *o.positive_pairs, o.positive_weights)
    if o.hardness and batch.query_ids is None:
        rows = torch.arange(len(batch.queries), device=batch.queries.device)
        return Positives(batch, rows, rows, None)
    return None


def _log(k: Tensor) -> Tensor:
    return torch.where(k > 0, k, 1).log()


def _log_sum(found: SideStats, power: float, shift: Tensor, more: list) -> Tensor:
    """log Σ exp(power·(S - shift)) over the candidates of the batch and beyond."""
    out = found.logsum + (found.max - power * shift)
    for candidates in more:
        out = logaddexp(out, candidates.logsumexp(power, shift))
    return out


def _reduced(
    batch: Batch, side: str, anchors: _Anchors, weights: Tensor | None, empty: str, reduction: str
) -> Tensor:
    ids, whole = batch.ids(side), batch.whole
    if weights is not None and ids is not None:
        weights = weights.masked_fill(ids < 0, 0)  # padding may hold anything
    loss = anchors.loss if weights is None else anchors.loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return whole.sum(loss.sum())
    weights = torch.ones_like(anchors.k) if weights is None else weights
    if empty == "drop":
        weights = weights.masked_fill(anchors.k <= 0, 0)
    elif ids is not None:
        weights = weights.masked_fill(ids < 0, 0)
    number = whole.sum(weights.sum())
    return whole.sum(loss.sum()) / torch.where(number == 0, 1, number)


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
            out[f"{side}_accuracy"] = batch.whole.mean_where(right.to(x.loss.dtype), x.k > 0)
    rows = anchors["row"]
    out["hardest_negative_score"] = None
    if found:
        at = found["row"]
        positive = at.pos / rows.k.clamp(min=1) + at.max
        out["hardest_negative_score"] = batch.whole.mean_where(at.neg_max, at.neg_max != -torch.inf)
    else:
        positive = rows.positive
    out["positive_score"] = batch.whole.mean_where(positive, rows.k > 0)
    return out
