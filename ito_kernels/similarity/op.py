"""The primitive as PyTorch operators: opaque, with fake kernels and autograd.

Opaque, so that `torch.compile` leaves them whole and nothing inside them is traced; the gradients
are ops of their own, chosen by what is needed: a frozen side costs no matrix product. Registered
by hand because `torch.library.custom_op` adds 0.8 ms to a forward and backward pass, three times
what the kernels need for 64 rows. Where nobody watches, `_call` leaves the dispatcher out too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import dispatch
from .first_order import first_order_only
from .spec import (
    Grads,
    Needs,
    Problem,
    Stats,
    Upstream,
    autocast_enabled,
    readable,
)

# The fields of Problem, Stats, Upstream and Needs as operator arguments, in their order.
_PROBLEM = (
    "Tensor a, Tensor? b, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids,"
    " Tensor? col_ids, Tensor? row_limit, str? positives, bool exclude_self,"
    " bool exclude_positives, SymInt diagonal, bool rows, bool cols, bool hardest, str backend"
)
_STATS = ", ".join(f"Tensor? {name}" for name in Stats._fields)
_UPSTREAM = ", ".join(f"Tensor? {name}" for name in Upstream._fields)
_NEEDS = ", ".join(f"bool need_{name}" for name in Needs._fields)
_PROBLEM_ARGS = len(Problem._fields) + 1
_TENSORS = Problem._fields.index("positives")
_INPUTS = len(Needs._fields)  # a, b, scale and the biases: what may have a gradient


def logsumexp(
    problem: Problem,
    backend: str,
    cache_bytes: int,
    with_stats: bool,
    weights: Upstream,
    needs: Needs,
) -> tuple[Tensor | None, Stats]:
    """The weighted sum, None without weights, and the statistics, which may be missing if they are
    not wanted. `needs`: the gradients that backward will be asked for."""
    now = needs if _weighted(weights) and _can_be_early(problem) else Needs()
    with_stats = with_stats or not any(now)
    out = _call(_logsumexp, (*problem, backend, cache_bytes, with_stats, *weights, *now))
    result = _Result.read(problem, with_stats, weights, now, out)
    return result.total, result.stats


def softplus(problem: Problem, backend: str, weights: Tensor | None, needs: Needs) -> Tensor:
    """The rows' sums, or their weighted sum."""
    now = needs if weights is not None and _can_be_early(problem) else Needs()
    return _call(_softplus, (*problem, backend, weights, *now))[0]


def _can_be_early(problem: Problem) -> bool:
    """Whether gradients may be formed in the forward pass, where weights are known.

    Not in fp16: the gradient of a mean underflows there unless a loss scale reaches it before it
    is rounded, and that scale arrives with the backward pass.
    """
    return problem.a.dtype != torch.float16


def _wanted(problem: Problem) -> Stats:
    """Which statistics the problem asks for."""
    side = (True, True, problem.positives is not None, problem.hardest)
    return Stats(*(problem.rows and x for x in side), *(problem.cols and x for x in side))


def _split(args: tuple) -> tuple[Problem, str, tuple]:
    """Operator arguments back into the problem, the backend's name and the rest."""
    *fields, backend = args[:_PROBLEM_ARGS]
    return Problem(*fields), backend, args[_PROBLEM_ARGS:]


def _run(problem: Problem, backend: str, function: str, *args):
    """A backend's function with autocast off: inside it, dtypes are chosen by the backend."""
    call = getattr(dispatch.load(backend), function)
    if not autocast_enabled(problem.a.device):
        return call(problem, *args)
    with torch.autocast(problem.a.device.type, enabled=False):
        return call(problem, *args)


# ---- registration. Operators return lists: of their results those that are wanted, in order.

_LIBRARY = torch.library.Library("ito_kernels", "DEF")
_IMPLEMENTATIONS: dict[OpOverload, Callable] = {}
_DIFFERENTIABLE: dict[OpOverload, Callable] = {}


def _operator(arguments: str) -> Callable:
    """Makes the decorated function an operator of its name, taking a problem and `arguments`."""

    def register(function: Callable) -> OpOverload:
        name = function.__name__.strip("_")
        _LIBRARY.define(f"{name}({_PROBLEM}, {arguments}) -> Tensor[]")
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.ito_kernels, name).default
        _IMPLEMENTATIONS[operator] = _DIFFERENTIABLE[operator] = function
        return operator

    return register


def _fake(operator: OpOverload) -> Callable:
    return torch.library.register_fake(operator, lib=_LIBRARY)


def _autograd(operator: OpOverload) -> Callable:
    """The decorated autograd.Function differentiates the operator, which it calls as `_below`."""

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        def differentiable(*args):
            # what has no gradient goes in one argument: each costs a microsecond or two
            return list(function.apply(*args[:_INPUTS], args[_INPUTS:]))

        _LIBRARY.impl(operator.name(), differentiable, "Autograd")
        _DIFFERENTIABLE[operator] = differentiable
        return function

    return register


def _call(operator: OpOverload, args: tuple) -> list[Tensor]:
    """The operator, or if nobody would see the difference what is registered for it: an operator
    of 26 arguments costs 25 µs, twice in a forward pass, whose kernels take 180 for 64 rows."""
    return _DIFFERENTIABLE[operator](*args) if _unseen(args) else operator(*args)


def _below(operator: OpOverload, args: tuple) -> list[Tensor]:
    """The same below autograd."""
    if _unseen(args):
        return _IMPLEMENTATIONS[operator](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _unseen(args: tuple) -> bool:
    """Neither compiled nor traced, in no dispatch mode, with plain tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or not _PLAIN.issuperset(map(type, args[:_INPUTS]))
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _read_grads(needs: Needs, tensors: Iterable[Tensor]) -> Grads:
    tensors = iter(tensors)
    return Grads(*(next(tensors) if need else None for need in needs))


def _fake_grads(problem: Problem, needs: Needs) -> list[Tensor]:
    like = problem.a
    sizes = (problem.n, problem.n, problem.m)
    return _present(
        like.new_empty(like.shape) if needs.a else None,
        like.new_empty(problem.b.shape) if needs.b else None,
        *(
            like.new_empty(size, dtype=problem.accumulate) if need else None
            for size, need in zip(sizes, needs[2:], strict=True)
        ),
    )


def _input_grads(scale: Tensor, grads: Grads) -> tuple:
    """One gradient for each argument; a 0-d scale takes the sum over the rows."""
    if grads.scale is not None and scale.ndim == 0:
        grads = grads._replace(scale=grads.scale.sum())
    return *grads, None


def _scaled_grads(ctx, by: Tensor) -> tuple:
    """The gradients that the forward pass formed, times what arrives."""
    scale, *grads = ctx.saved_tensors
    # Where the loss itself is differentiated and nobody asks again, they are handed out as they
    # are; but to look at `by` would make a GPU wait.
    as_they_are = (
        by.device.type == "cpu"
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and _unseen((by,))
        and by.item() == 1
    )
    if not as_they_are:
        grads = [x * by for x in grads]
    return _input_grads(scale, _read_grads(ctx.now, grads))


def saved_problem(*fields) -> Problem:
    """A problem that autograd kept: its memory may have been freed since."""
    return Problem(
        *(
            readable(f"{name}, kept for backward,", x) if isinstance(x, Tensor) else x
            for name, x in zip(Problem._fields, fields, strict=True)
        )
    )


def arrived_gradients(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """As kernels may read them."""
    return tuple(None if x is None else readable("the gradient that arrives", x) for x in tensors)


# ---- logsumexp


class _Result(NamedTuple):
    """What the operator returns. `cache`, for backward, unless it formed the gradients itself."""

    total: Tensor | None
    stats: Stats
    cache: Tensor | None
    grads: Grads

    @classmethod
    def read(
        cls,
        problem: Problem,
        with_stats: bool,
        weights: Upstream,
        now: Needs,
        tensors: Iterable[Tensor],
    ) -> _Result:
        tensors = iter(tensors)
        total = next(tensors) if _weighted(weights) else None
        wanted = _wanted(problem) if with_stats else ()
        stats = Stats(*(next(tensors) if want else None for want in wanted))
        cache = None if any(now) else next(tensors)
        return cls(total, stats, cache, _read_grads(now, tensors))


def _weighted(weights: Upstream) -> bool:
    return weights.u is not None or weights.v is not None


def _forward_args(rest: tuple) -> tuple[int, bool, Upstream, Needs]:
    end = 2 + len(Upstream._fields)
    return *rest[:2], Upstream(*rest[2:end]), Needs(*rest[end:])


# Without `stats` they are not returned, where backward, too, can do without them.
@_operator(f"SymInt cache_bytes, bool stats, {_UPSTREAM}, {_NEEDS}")
def _logsumexp(*args):
    problem, backend, rest = _split(args)
    cache_bytes, with_stats, weights, now = _forward_args(rest)
    cache = problem.a.new_empty(cache_bytes, dtype=torch.uint8)
    kept = (cache,) if cache_bytes else ()  # an argument of backends that have one
    if not any(now):
        stats = _run(problem, backend, "logsumexp_forward", *kept)
        return _present(weighted_sum(stats, weights), *stats, cache)
    if _has(backend, "logsumexp_both"):
        total, stats, grads = _run(
            problem, backend, "logsumexp_both", with_stats, weights, now, *kept
        )
    else:
        stats = _run(problem, backend, "logsumexp_forward", *kept)
        grads = _run(problem, backend, "logsumexp_backward", stats, weights, now, *kept)
        total = weighted_sum(stats, weights)
    return _present(total, *(stats if with_stats else ()), *grads)


def _has(backend: str, function: str) -> bool:
    return hasattr(dispatch.load(backend), function)


def weighted_sum(stats: Stats, weights: Upstream) -> Tensor | None:
    """The weighted sum of the statistics. Where the weight is 0, one of -inf counts as 0: there was
    nothing to sum. Anything else that is not finite makes the total so."""

    def weighted(weight: Tensor, x: Tensor) -> Tensor:
        return weight * torch.where((weight == 0) & (x == -math.inf), 0, x)

    total = None
    for weight, pos_weight, logsum, pos in (
        (weights.u, weights.alpha, stats.row_logsum, stats.row_pos),
        (weights.v, weights.beta, stats.col_logsum, stats.col_pos),
    ):
        if weight is None:
            continue
        terms = weighted(weight, logsum)
        if pos_weight is not None:
            terms = terms + weighted(pos_weight, pos)
        total = terms.sum() if total is None else total + terms.sum()
    return total


@_fake(_logsumexp)
def _(*args):
    problem, _, rest = _split(args)
    cache_bytes, with_stats, weights, now = _forward_args(rest)
    like, dtype = problem.a, problem.accumulate
    sizes = (problem.n,) * 4 + (problem.m,) * 4
    wanted = _wanted(problem) if with_stats else ()
    return _present(
        like.new_empty((), dtype=dtype) if _weighted(weights) else None,
        *(like.new_empty(size, dtype=dtype) for size in compress(sizes, wanted)),
        None if any(now) else like.new_empty(cache_bytes, dtype=torch.uint8),
        *_fake_grads(problem, now),
    )


@_operator(f"{_STATS}, Tensor cache, {_UPSTREAM}, {_NEEDS}")
def _logsumexp_backward(*args):
    problem, backend, rest = _split(args)
    stats, cache, upstream, needs = _backward_args(rest)
    args = (stats, upstream, needs, *((cache,) if cache.numel() else ()))
    return _present(*_run(problem, backend, "logsumexp_backward", *args))


@_fake(_logsumexp_backward)
def _(*args):
    problem, _, rest = _split(args)
    return _fake_grads(problem, _backward_args(rest)[-1])


def _backward_args(rest: tuple) -> tuple[Stats, Tensor, Upstream, Needs]:
    stats, end = len(Stats._fields), len(Stats._fields) + 1 + len(Upstream._fields)
    return (
        Stats(*rest[:stats]),
        rest[stats],
        Upstream(*rest[stats + 1 : end]),
        Needs(*rest[end:]),
    )


@_autograd(_logsumexp)
class _Logsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        args = (*args[:-1], *args[-1])
        out = _below(_logsumexp, args)
        problem, ctx.backend, rest = _split(args)
        _, stats, weights, ctx.now = _forward_args(rest)
        ctx.flags = problem[_TENSORS:]
        ctx.set_materialize_grads(False)  # of the many outputs few have a gradient
        if any(ctx.now):
            ctx.mark_non_differentiable(*out[1:])
            ctx.save_for_backward(problem.scale, *out[-sum(ctx.now) :])
            return tuple(out)
        if _weighted(weights):
            ctx.mark_non_differentiable(*out[1:])
        else:
            _, s, cache, _ = _Result.read(problem, stats, weights, ctx.now, out)
            maxima = (s.row_max, s.row_neg_max, s.col_max, s.col_neg_max)
            ctx.mark_non_differentiable(*_present(*maxima, cache))
        ctx.save_for_backward(*problem[:_TENSORS], *weights, *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *arrived):
        first_order_only()
        if all(x is None for x in arrived):
            return (None,) * len(ctx.needs_input_grad)
        if any(ctx.now):
            return _scaled_grads(ctx, arrived[0])
        arrived = arrived_gradients(arrived)
        end = _TENSORS + len(Upstream._fields)
        tensors = ctx.saved_tensors
        problem = saved_problem(*tensors[:_TENSORS], *ctx.flags)
        weights = Upstream(*tensors[_TENSORS:end])
        _, stats, cache, _ = _Result.read(problem, True, weights, ctx.now, tensors[end:])
        total, s, *_ = _Result.read(problem, True, weights, ctx.now, arrived)
        if _weighted(weights):
            upstream = (None if x is None else x * total for x in weights)
        else:
            upstream = (s.row_logsum, s.col_logsum, s.row_pos, s.col_pos)
        needs = Needs(*ctx.needs_input_grad[:_INPUTS])
        args = (*problem, ctx.backend, *stats, cache, *upstream, *needs)
        out = _call(_logsumexp_backward, args)
        return _input_grads(problem.scale, _read_grads(needs, out))


# ---- softplus


@_operator(f"Tensor? weights, {_NEEDS}")
def _softplus(*args):
    problem, backend, (weights, *now) = _split(args)
    now, grads = Needs(*now), Grads()
    if any(now) and _has(backend, "softplus_both"):
        rows, grads = _run(problem, backend, "softplus_both", weights, now)
    else:
        rows = _run(problem, backend, "softplus_forward")
        if any(now):
            grads = _run(problem, backend, "softplus_backward", weights, now)
    return _present(rows if weights is None else (rows * weights).sum(), *grads)


@_fake(_softplus)
def _(*args):
    problem, _, (weights, *now) = _split(args)
    size = (problem.n,) if weights is None else ()
    value = problem.a.new_empty(size, dtype=problem.accumulate)
    return [value, *_fake_grads(problem, Needs(*now))]


@_operator(f"Tensor u, {_NEEDS}")
def _softplus_backward(*args):
    problem, backend, (u, *needs) = _split(args)
    return _present(*_run(problem, backend, "softplus_backward", u, Needs(*needs)))


@_fake(_softplus_backward)
def _(*args):
    problem, _, (_, *needs) = _split(args)
    return _fake_grads(problem, Needs(*needs))


@_autograd(_softplus)
class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        args = (*args[:-1], *args[-1])
        value, *grads = _below(_softplus, args)
        problem, ctx.backend, (weights, *now) = _split(args)
        ctx.now, ctx.flags = Needs(*now), problem[_TENSORS:]
        ctx.mark_non_differentiable(*grads)
        if grads:
            ctx.save_for_backward(problem.scale, *grads)
        else:
            ctx.save_for_backward(*problem[:_TENSORS], weights)
        return value, *grads

    @staticmethod
    def backward(ctx, arrived, *_):
        first_order_only()
        if any(ctx.now):
            return _scaled_grads(ctx, arrived)
        (arrived,) = arrived_gradients([arrived])
        *tensors, weights = ctx.saved_tensors
        problem = saved_problem(*tensors, *ctx.flags)
        u = arrived if weights is None else arrived * weights
        needs = Needs(*ctx.needs_input_grad[:_INPUTS])
        out = _call(_softplus_backward, (*problem, ctx.backend, u, *needs))
        return _input_grads(problem.scale, _read_grads(needs, out))
