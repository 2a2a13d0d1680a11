"""The options of `multi_positive_infonce`: their defaults, and which combinations are valid.

A new option is a field of `Options`, a check in `check_options`, and code in the module whose
behaviour it changes: `infonce.py`, `pools.py`, `positive_pairs.py`, `scores.py`, `margin.py` or
`reweighting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from ..similarity.spec import (
    accumulate_dtype,
    check_bias,
    check_ids,
    check_pair,
    check_tensor,
    check_weight,
    is_number,
    same_dtype,
)
from .batch import Arguments
from .common import REDUCTIONS, check_choice, check_flags


class Options(NamedTuple):
    # For any values of these fields except reduction="none", one call of the primitive computes
    # the loss and its gradients.
    positives: str = "mean"
    symmetric: bool = True
    exclude_self: bool = False
    empty: str = "zero"
    normalize: bool = False
    reduction: str = "mean"
    return_stats: bool = False
    # Any other value of these than the default needs several calls of the primitive.
    in_batch: bool = True
    equal_ids: str = "positive"
    label_smoothing: float = 0.0
    query_weights: Tensor | None = None
    key_weights: Tensor | None = None
    key_bias: Tensor | None = None
    positive_pairs: Tensor | None = None  # (P, 2) as given, (2, P) after `check_options`
    positive_weights: Tensor | None = None
    queue: Tensor | None = None
    queue_ids: Tensor | None = None
    hard_negatives: Tensor | None = None
    hard_negative_ids: Tensor | None = None
    false_negative_margin: float | None = None
    margin_type: str = "absolute"
    margin_on: str = "all"
    guide_queries: Tensor | None = None
    guide_keys: Tensor | None = None
    debias: float | Tensor | None = None
    hardness: float | None = None
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    @property
    def single_pass(self) -> bool:
        """Whether all options that need several calls of the primitive have their defaults. True
        also for reduction="none", which needs the statistics instead of their sum."""
        if self is PLAIN:
            return True
        given = self[_MULTI_PASS:]
        if all(map(is_, given, _DEFAULTS)):  # takes 0.5 µs, the lines below 2 µs
            return True
        pairs = zip(given, _DEFAULTS, strict=True)
        return all(x is d or (isinstance(x, _COMPARABLE) and x == d) for x, d in pairs)

    @property
    def reweights_negatives(self) -> bool:
        """Whether the denominator is not a plain sum of exponentials over the candidates."""
        return self.debias is not None or self.hardness is not None

    @property
    def powers(self) -> tuple[float, ...]:
        """The exponents p for which the denominator needs Σ e^{p·S}."""
        return (self.hardness, 1 + self.hardness) if self.hardness else (1.0,)

    def boost(self, kind: str) -> float:
        """The hardness_strength of the negatives "in_batch", "hard" or in the "queue"; 0 if
        hardness_mode does not include them."""
        return self.hardness_strength if self.hardness_mode in (kind, "all") else 0.0

    def needs_accumulate_dtype(self, scale: Tensor) -> bool:
        """Whether scores from different computations are combined outside the kernels, so that
        features must not be rounded to half precision."""
        extra = (self.positive_pairs, self.queue, self.hard_negatives, self.guide_queries)
        in_panels = self.false_negative_margin is not None and self.symmetric and scale.ndim > 0
        apart = self.hardness_mode is not None or self.equal_ids == "ignore"
        separate = self.reweights_negatives or in_panels or apart
        return separate or any(x is not None for x in extra)

    def map_extra_candidates(self, function: Callable[[Tensor], Tensor]) -> Options:
        """Apply `function` to the queue and to the hard negatives, if given."""
        queue, hard = (
            None if x is None else function(x) for x in (self.queue, self.hard_negatives)
        )
        return self._replace(queue=queue, hard_negatives=hard)


_COMPARABLE = (bool, int, float, str)  # a tensor and an array compare element by element
_MULTI_PASS = Options._fields.index("in_batch")
PLAIN = Options()
_DEFAULTS = PLAIN[_MULTI_PASS:]


# the names of sentence-transformers for the hardness modes
HARDNESS_MODES = {
    "in_batch": "in_batch",
    "hard": "hard",
    "all": "all",
    "in_batch_negatives": "in_batch",
    "hard_negatives": "hard",
    "all_negatives": "all",
}


def check_options(o: Options, args: Arguments) -> Options:
    """Check the options and convert their tensors to the dtypes of the computation.

    Raises TypeError or ValueError that names the option.
    """
    if o is PLAIN or all(map(is_, o, PLAIN)):
        return PLAIN
    check_flags(
        symmetric=o.symmetric,
        exclude_self=o.exclude_self,
        normalize=o.normalize,
        return_stats=o.return_stats,
        in_batch=o.in_batch,
    )
    check_choice("positives", o.positives, ("mean", "sum", "in"))
    check_choice("empty", o.empty, ("zero", "drop"))
    check_choice("reduction", o.reduction, REDUCTIONS)
    n, m = args.queries.size(0), args.keys.size(0)
    if o.exclude_self and n != m:
        raise ValueError(
            f"exclude_self needs the same number of {args.names.queries} and {args.names.keys},"
            f" got {n} and {m}"
        )
    return o if o.single_pass else _check_multi_pass_options(o, args)


def _check_multi_pass_options(o: Options, args: Arguments) -> Options:
    queries, n, m, device = args.queries, *map(len, args[:2]), args.queries.device
    o = o._replace(
        label_smoothing=check_number("label_smoothing", o.label_smoothing, 0, 1),
        # hardness 0 weights all negatives equally: the same as None
        hardness=_check_optional_number("hardness", o.hardness, 0) or None,
        debias=_check_debias(o.debias, args.scale, queries, m, o.symmetric),
        false_negative_margin=_check_optional_number(
            "false_negative_margin", o.false_negative_margin, -math.inf
        ),
    )
    check_choice("margin_type", o.margin_type, ("absolute", "relative"))
    check_choice("margin_on", o.margin_on, ("all", "in_batch"))
    for name, value in (("margin_type", "relative"), ("margin_on", "in_batch")):
        if getattr(o, name) == value and o.false_negative_margin is None:
            raise ValueError(f"{name}={value!r} needs false_negative_margin, which is missing")
    if o.margin_on == "in_batch" and not o.in_batch:
        raise ValueError(
            "margin_on='in_batch' spares the queue and the hard negatives, and with in_batch=False"
            " there are no other negatives: give one or the other"
        )
    o = _check_equal_ids(_check_guide(_check_hardness_mode(o), args), args)
    extra = "a queue or hard_negatives"
    if o.queue is None and o.hard_negatives is None:
        extra = "neither queue nor hard_negatives"
    if not o.in_batch and (o.symmetric or extra.startswith("neither")):
        raise ValueError(
            "in_batch=False leaves the queue and the hard negatives as negatives: it needs one of"
            f" them, and symmetric=False; got {extra}, and symmetric={o.symmetric}"
        )
    if o.label_smoothing and o.reweights_negatives:
        raise ValueError(
            "label_smoothing is defined for a softmax: it cannot be combined with debias or"
            " hardness, whose denominator is not that of a softmax"
        )
    if o.query_weights is not None:
        weights = check_anchor_weights("query_weights", o.query_weights, queries, args.query_ids)
        o = o._replace(query_weights=weights)
    if o.key_weights is not None:
        if not o.symmetric:
            raise ValueError("key_weights apply to the key→query direction: use symmetric=True")
        weights = check_anchor_weights("key_weights", o.key_weights, args.keys, args.key_ids)
        o = o._replace(key_weights=weights)
    if o.key_bias is not None:
        o = o._replace(key_bias=check_bias("key_bias", o.key_bias, m, queries))
    if o.positive_weights is not None and o.positive_pairs is None:
        raise ValueError("positive_weights need positive_pairs, which are missing")
    if o.positive_pairs is not None:
        if args.query_ids is not None or args.key_ids is not None:
            raise ValueError("positive_pairs replace query_ids and key_ids: give one of the two")
        o = _check_pairs(o, queries)
    if o.queue is not None:
        o = o._replace(queue=_check_extra_candidates("queue", o.queue, queries, ("Q", "D")))
        if o.queue_ids is not None:
            if o.positive_pairs is not None:
                raise ValueError(
                    "queue_ids are compared with query_ids, which positive_pairs replace"
                )
            ids = check_ids("queue_ids", o.queue_ids, len(o.queue), "queue", device)
            o = o._replace(queue_ids=ids)
    elif o.queue_ids is not None:
        raise ValueError("queue_ids need queue, which is missing")
    if o.hard_negatives is not None:
        h = _check_extra_candidates("hard_negatives", o.hard_negatives, queries, ("N", "K", "D"))
        o = o._replace(hard_negatives=h)
        if len(h) != n:
            raise ValueError(
                f"hard_negatives must hold K keys for each of {n} queries, got {tuple(h.shape)}"
            )
    elif o.hard_negative_ids is not None:
        raise ValueError("hard_negative_ids need hard_negatives, which are missing")
    return o if o.hard_negative_ids is None else _check_hard_negative_ids(o, device)


def _check_hardness_mode(o: Options) -> Options:
    strength = check_number("hardness_strength", o.hardness_strength, 0, math.inf)
    if o.hardness_mode is None:
        if strength:
            raise ValueError(f"hardness_strength={strength} needs hardness_mode, which is missing")
        return o
    check_choice("hardness_mode", o.hardness_mode, (None, *HARDNESS_MODES))
    given = {
        "label_smoothing": o.label_smoothing > 0,
        "debias": o.debias is not None,
        "hardness": o.hardness is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"hardness_mode changes the scores of negatives, for which {name} is not defined:"
                " give one of the two"
            )
    mode = HARDNESS_MODES[o.hardness_mode]
    if mode == "hard" and o.hard_negatives is None:
        raise ValueError(f"hardness_mode={o.hardness_mode!r} needs hard_negatives, got none")
    if mode == "in_batch" and not o.in_batch:
        raise ValueError(f"hardness_mode={o.hardness_mode!r} needs in_batch=True, got False")
    return o._replace(hardness_mode=mode if strength else None, hardness_strength=strength)


def _check_guide(o: Options, args: Arguments) -> Options:
    if o.guide_queries is None and o.guide_keys is None:
        return o
    for name in ("guide_queries", "guide_keys", "false_negative_margin"):
        if getattr(o, name) is None:
            raise ValueError(
                "guide_queries, guide_keys and false_negative_margin are needed together, because"
                f" the margin compares the guide's inner products; {name} is missing"
            )
    if not o.in_batch:
        raise ValueError(
            "guide_queries and guide_keys concern the negatives of the batch, which in_batch=False"
            " leaves out: give one or the other"
        )
    check_pair("guide_queries", o.guide_queries, "guide_keys", o.guide_keys)
    return o._replace(
        guide_queries=args.check_constant_features(
            "guide_queries", o.guide_queries, len(args.queries)
        ),
        guide_keys=args.check_constant_features("guide_keys", o.guide_keys, len(args.keys)),
    )


def _check_equal_ids(o: Options, args: Arguments) -> Options:
    check_choice("equal_ids", o.equal_ids, ("positive", "ignore"))
    if o.equal_ids == "positive":
        return o
    given = {"exclude_self": o.exclude_self, "positive_pairs": o.positive_pairs is not None}
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"equal_ids='ignore' makes (i, i) the only positives: it cannot be combined with"
                f" {name}"
            )
    n, m = len(args.queries), len(args.keys)
    if n != m:
        raise ValueError(
            f"equal_ids='ignore' needs the same number of {args.names.queries} and"
            f" {args.names.keys}, got {n} and {m}"
        )
    has_ids = args.query_ids is not None or args.key_ids is not None
    return o if has_ids else o._replace(equal_ids="positive")  # all ids differ


def _check_hard_negative_ids(o: Options, device: torch.device) -> Options:
    """Check the ids of the hard negatives. Padded hard negatives, which may hold any values, become
    0."""
    if o.positive_pairs is not None:
        raise ValueError(
            "hard_negative_ids are compared with query_ids, which positive_pairs replace"
        )
    hard, ids = o.hard_negatives, check_tensor("hard_negative_ids", o.hard_negative_ids)
    if ids.shape != hard.shape[:2]:
        raise ValueError(
            f"hard_negative_ids must have shape {tuple(hard.shape[:2])}, one id for each of the"
            f" hard_negatives, got {tuple(ids.shape)}"
        )
    flat = check_ids("hard_negative_ids", ids.reshape(-1), ids.numel(), "hard_negatives", device)
    ids = flat.view(ids.shape)
    return o._replace(
        hard_negatives=hard.masked_fill((ids < 0)[:, :, None], 0), hard_negative_ids=ids
    )


def localize_pairs(o: Options, rows: range, cols: range) -> Options:
    """Convert the pairs' query numbers from global row numbers to local ones.

    rows: the global numbers of this rank's queries. cols: those of all ranks' keys.
    Raises ValueError for numbers outside these ranges.
    """
    pairs = o.positive_pairs
    check_row_numbers("positive_pairs", pairs[0], rows, "queries")
    check_row_numbers("positive_pairs", pairs[1], cols, "keys")
    return o._replace(positive_pairs=torch.stack([pairs[0] - rows.start, pairs[1]]))


def check_number(name: str, x: object, low: float, high: float) -> float:
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not (low <= x <= high and -math.inf < x < math.inf):
        wanted = f"from {low} to {high}" if math.isfinite(high) else f"from {low} upwards, finite"
        wanted = wanted if math.isfinite(low) else "finite"
        raise ValueError(f"{name} must be {wanted}, got {x}")
    return float(x)


def _check_optional_number(name: str, x: object, low: float) -> float | None:
    return None if x is None else check_number(name, x, low, math.inf)


def check_value_range(name: str, x: Tensor, high: float = math.inf) -> Tensor:
    """Check that all values are from 0 to `high`. CPU tensors only: reading values of a GPU tensor
    would synchronise."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        x_min, x_max = x.aminmax() if x.numel() else (0, 0)
        if not (x_min >= 0 and x_max <= high):  # written so that NaN raises too
            wanted = "0 or more" if high == math.inf else f"from 0 to {high:g}"
            raise ValueError(f"{name} must be {wanted}, got {float(x_min):g} to {float(x_max):g}")
    return x


def check_row_numbers(name: str, rows: Tensor, numbers: range, of: str) -> None:
    """Check that all `rows` lie in `numbers`. Synchronises with the device."""
    if rows.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in rows.aminmax())
        if not (low in numbers and high in numbers):
            raise ValueError(
                f"{name} must be row numbers of {len(numbers)} {of}, {numbers.start} to"
                f" {numbers.stop - 1}, got {low} to {high}"
            )


def _check_debias(tau: object, scale: Tensor, queries: Tensor, m: int, symmetric: bool):
    """Check the prior. Return a tensor, 0-d or (N,)."""
    if tau is None:
        return None
    if symmetric and scale.ndim == 1:
        raise ValueError(
            "debias bounds the negatives of a key by exp(-logit_scale), which is not defined for a"
            " logit_scale per query: use symmetric=False"
        )
    n = len(queries)
    tau = check_tensor("debias", tau) if isinstance(tau, Tensor) else tau
    if isinstance(tau, Tensor) and tau.ndim:
        tau = check_value_range("debias", check_weight("debias", tau, n, queries), 1)
        if tau.device.type == "cpu" and not torch.compiler.is_compiling() and (tau == 1).any():
            raise ValueError("debias, the proportions of false negatives, must be less than 1")
        if symmetric and n != m:
            raise ValueError(
                "debias with a prior per query and symmetric=True needs the same number of queries"
                f" and keys, got {n} and {m}"
            )
        return tau
    tau = check_number("debias", tau.item() if isinstance(tau, Tensor) else tau, 0, 1)
    if tau == 1:
        raise ValueError("debias, the proportion of false negatives, must be less than 1, got 1")
    return torch.full((), tau, dtype=accumulate_dtype(queries.dtype), device=queries.device)


def check_anchor_weights(
    name: str, weights: object, features: Tensor, ids: Tensor | None
) -> Tensor:
    weights = check_weight(name, weights, len(features), features)
    check_value_range(name, weights if ids is None else weights.masked_fill(ids < 0, 0))
    return weights


def _check_pairs(o: Options, queries: Tensor) -> Options:
    pairs, weights = o.positive_pairs, o.positive_weights
    pairs = check_tensor("positive_pairs", pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"positive_pairs must have shape (P, 2), got {tuple(pairs.shape)}")
    pairs = torch.stack(
        [
            check_ids("positive_pairs", pairs[:, side], len(pairs), "queries", queries.device)
            for side in (0, 1)
        ]
    )
    if weights is not None:
        if o.positives == "sum":
            raise ValueError(
                "positive_weights are normalised per anchor, which positives='sum' does not do: use"
                " 'in' or 'mean'"
            )
        weights = check_weight("positive_weights", weights, pairs.shape[1], queries)
        check_value_range("positive_weights", weights)
    return o._replace(positive_pairs=pairs, positive_weights=weights)


def _check_extra_candidates(
    name: str, x: object, queries: Tensor, shape: tuple[str, ...]
) -> Tensor:
    x = check_tensor(name, x)
    if x.ndim != len(shape) or 0 in x.shape or x.shape[-1] != queries.shape[1]:
        raise ValueError(
            f"{name} must have shape ({', '.join(shape)}) with D = {queries.shape[1]}, got"
            f" {tuple(x.shape)}"
        )
    if not same_dtype(x, queries):
        raise TypeError(f"{name} must be {queries.dtype} like queries, got {x.dtype}")
    if x.device != queries.device:
        raise ValueError(f"{name} must be on {queries.device} like queries, got {x.device}")
    return x
