"""The options of `multi_positive_infonce`: what may be given, and with what.

A new one is a field with its default here, its check in `check_options`, and the place in
`infonce.py`, `pools.py` or beside them where it changes a pool or the positives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.spec import (
    accumulate_dtype,
    autocast_enabled,
    check_bias,
    check_ids,
    check_tensor,
    check_weight,
    is_number,
)
from .batch import Arguments
from .common import REDUCTIONS, check_choice, check_flags


class Options(NamedTuple):
    # one call of the primitive gives the loss and its gradients whatever these are, but for "none"
    positives: str = "mean"
    symmetric: bool = True
    exclude_self: bool = False
    empty: str = "zero"
    normalize: bool = False
    reduction: str = "mean"
    return_stats: bool = False
    # these take several pools, or several passes
    label_smoothing: float = 0.0
    query_weights: Tensor | None = None
    key_weights: Tensor | None = None
    key_bias: Tensor | None = None
    positive_pairs: Tensor | None = None  # (2, P) once checked
    positive_weights: Tensor | None = None
    queue: Tensor | None = None
    queue_ids: Tensor | None = None
    hard_negatives: Tensor | None = None
    false_negative_margin: float | None = None
    debias: float | Tensor | None = None
    hardness: float | None = None

    @property
    def plain(self) -> bool:
        # as a list: a generator takes three times as long
        return self.label_smoothing == 0 and not [x for x in self[_PLAIN:] if x is not None]

    @property
    def reweighted(self) -> bool:
        """Whether negatives count otherwise than in a softmax."""
        return self.debias is not None or self.hardness is not None

    @property
    def powers(self) -> tuple[float, ...]:
        """Those of e^S whose sums D is made of."""
        return (self.hardness, 1 + self.hardness) if self.hardness else (1.0,)

    def meets_outside(self, scale: Tensor) -> bool:
        """Whether positives and negatives come from several calls of the primitive."""
        others = (self.positive_pairs, self.queue, self.hard_negatives)
        in_panels = self.false_negative_margin is not None and self.symmetric and scale.ndim > 0
        return self.reweighted or in_panels or any(x is not None for x in others)

    def with_candidates(self, function: Callable[[Tensor], Tensor]) -> Options:
        """With `function` of the queue and of the hard negatives, where there are any."""
        queue, hard = (
            None if x is None else function(x) for x in (self.queue, self.hard_negatives)
        )
        return self._replace(queue=queue, hard_negatives=hard)


_PLAIN = Options._fields.index("label_smoothing") + 1


def check_options(o: Options, given: Arguments) -> Options:
    """The options in the dtypes of the computation. Raises TypeError or ValueError by name."""
    check_flags(
        symmetric=o.symmetric,
        exclude_self=o.exclude_self,
        normalize=o.normalize,
        return_stats=o.return_stats,
    )
    check_choice("positives", o.positives, ("mean", "sum", "in"))
    check_choice("empty", o.empty, ("zero", "drop"))
    check_choice("reduction", o.reduction, REDUCTIONS)
    n, m = given.queries.size(0), given.keys.size(0)
    if n != m and o.exclude_self:
        raise ValueError(
            f"exclude_self needs as many {given.names.queries} as {given.names.keys}, got {n} and"
            f" {m}"
        )
    return o if o.plain else _check_more(o, given)


def _check_more(o: Options, given: Arguments) -> Options:
    queries, n, m, device = given.queries, *map(len, given[:2]), given.queries.device
    o = o._replace(
        label_smoothing=check_number("label_smoothing", o.label_smoothing, 0, 1),
        hardness=_optional("hardness", o.hardness, 0) or None,  # 0 weighs nothing
        debias=_check_debias(o.debias, given.scale, queries, m, o.symmetric),
        false_negative_margin=_optional(
            "false_negative_margin", o.false_negative_margin, -math.inf
        ),
    )
    if o.positive_pairs is not None and (o.false_negative_margin or 0) < 0:
        raise ValueError(
            "false_negative_margin must be 0 or more with positive_pairs, of which none may leave"
            f" the denominator, got {o.false_negative_margin}"
        )
    if o.label_smoothing and o.reweighted:
        raise ValueError(
            "label_smoothing mixes targets over a softmax; with debias or hardness the denominator"
            " is not the sum of one"
        )
    if o.query_weights is not None:
        weights = _anchor_weights("query_weights", o.query_weights, queries, given.query_ids)
        o = o._replace(query_weights=weights)
    if o.key_weights is not None:
        if not o.symmetric:
            raise ValueError("key_weights weigh the key→query direction: they need symmetric=True")
        weights = _anchor_weights("key_weights", o.key_weights, given.keys, given.key_ids)
        o = o._replace(key_weights=weights)
    if o.key_bias is not None:
        o = o._replace(key_bias=check_bias("key_bias", o.key_bias, m, queries))
    if o.positive_weights is not None and o.positive_pairs is None:
        raise ValueError("positive_weights are the weights of positive_pairs, which are missing")
    if o.positive_pairs is not None:
        if given.query_ids is not None or given.key_ids is not None:
            raise ValueError("positive_pairs replace query_ids and key_ids: give one or the other")
        o = _check_pairs(o, queries)
    if o.queue is not None:
        o = o._replace(queue=_check_extra("queue", o.queue, queries, ("Q", "D")))
        if o.queue_ids is not None:
            if o.positive_pairs is not None:
                raise ValueError("queue_ids compare with query_ids, which positive_pairs replace")
            ids = check_ids("queue_ids", o.queue_ids, len(o.queue), "queue", device)
            o = o._replace(queue_ids=ids)
    elif o.queue_ids is not None:
        raise ValueError("queue_ids are the ids of queue, which is missing")
    if o.hard_negatives is not None:
        h = _check_extra("hard_negatives", o.hard_negatives, queries, ("N", "K", "D"))
        o = o._replace(hard_negatives=h)
        if len(h) != n:
            raise ValueError(
                f"hard_negatives must hold K keys for each of {n} queries, got {tuple(h.shape)}"
            )
    return o


def placed_pairs(o: Options, rows: range, cols: range) -> Options:
    """The pairs' queries as row numbers among this rank's, which are `rows` among all; the keys are
    numbers in `cols`. Raises ValueError for other numbers."""
    pairs = o.positive_pairs
    check_rows("positive_pairs", pairs[0], rows, "queries")
    check_rows("positive_pairs", pairs[1], cols, "keys")
    return o._replace(positive_pairs=torch.stack([pairs[0] - rows.start, pairs[1]]))


def check_number(name: str, x: object, low: float, high: float) -> float:
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not (low <= x <= high and -math.inf < x < math.inf):
        wanted = f"from {low} to {high}" if math.isfinite(high) else f"from {low} upwards, finite"
        wanted = wanted if math.isfinite(low) else "finite"
        raise ValueError(f"{name} must be {wanted}, got {x}")
    return float(x)


def _optional(name: str, x: object, low: float) -> float | None:
    return None if x is None else check_number(name, x, low, math.inf)


def check_values(name: str, x: Tensor, high: float = math.inf) -> Tensor:
    """`x`, whose values must be from 0 to `high`. Looked at on the CPU alone: a GPU would wait."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, top = x.aminmax() if x.numel() else (0, 0)
        if not (low >= 0 and top <= high):  # NaN is refused too
            wanted = "0 or more" if high == math.inf else f"from 0 to {high:g}"
            raise ValueError(f"{name} must be {wanted}, got {float(low):g} to {float(top):g}")
    return x


def check_rows(name: str, rows: Tensor, numbers: range, of: str) -> None:
    """`rows` are row numbers. Waits for the device."""
    if rows.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in rows.aminmax())
        if not (low in numbers and high in numbers):
            raise ValueError(
                f"{name} must be row numbers of {len(numbers)} {of}, {numbers.start} to"
                f" {numbers.stop - 1}, got {low} to {high}"
            )


def _check_debias(tau: object, scale: Tensor, queries: Tensor, m: int, symmetric: bool):
    """As a tensor, 0-d or (N,)."""
    if tau is None:
        return None
    if symmetric and scale.ndim == 1:
        raise ValueError(
            "debias bounds a key's negatives by exp(-scale), and a logit_scale for each query has"
            " no one scale for a key: use symmetric=False"
        )
    n = len(queries)
    tau = check_tensor("debias", tau) if isinstance(tau, Tensor) else tau
    if isinstance(tau, Tensor) and tau.ndim:
        tau = check_values("debias", check_weight("debias", tau, n, queries), 1)
        if symmetric and n != m:
            raise ValueError(
                f"debias with a prior for each query needs as many keys for symmetric=True, got"
                f" {n} queries and {m} keys"
            )
        return tau
    tau = check_number("debias", tau.item() if isinstance(tau, Tensor) else tau, 0, 1)
    if tau == 1:
        raise ValueError("debias must be less than 1: it is the share of false negatives")
    return torch.full((), tau, dtype=accumulate_dtype(queries.dtype), device=queries.device)


def _anchor_weights(name: str, weights: object, features: Tensor, ids: Tensor | None) -> Tensor:
    weights = check_weight(name, weights, len(features), features)
    check_values(name, weights if ids is None else weights.masked_fill(ids < 0, 0))
    return weights


def _check_pairs(o: Options, queries: Tensor) -> Options:
    pairs, weights = o.positive_pairs, o.positive_weights
    pairs = check_tensor("positive_pairs", pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"positive_pairs must have shape (P, 2), got {tuple(pairs.shape)}")
    pairs = torch.stack(
        [
            check_ids("positive_pairs", pairs[:, side], len(pairs), "itself", queries.device)
            for side in (0, 1)
        ]
    )
    if weights is not None:
        if o.positives == "sum":
            raise ValueError(
                "positive_weights are normalised per anchor, and positives='sum' has no such"
                " normalisation: use 'in' or 'mean'"
            )
        weights = check_weight("positive_weights", weights, pairs.shape[1], queries)
        check_values("positive_weights", weights)
    return o._replace(positive_pairs=pairs, positive_weights=weights)


def _check_extra(name: str, x: object, queries: Tensor, shape: tuple[str, ...]) -> Tensor:
    x = check_tensor(name, x)
    if x.ndim != len(shape) or 0 in x.shape or x.shape[-1] != queries.shape[1]:
        raise ValueError(
            f"{name} must have shape ({', '.join(shape)}) with D = {queries.shape[1]}, got"
            f" {tuple(x.shape)}"
        )
    if x.dtype != queries.dtype and not autocast_enabled(x.device):
        raise TypeError(f"{name} must be {queries.dtype} like queries, got {x.dtype}")
    if x.device != queries.device:
        raise ValueError(f"{name} must be on {queries.device} like queries, got {x.device}")
    return x
