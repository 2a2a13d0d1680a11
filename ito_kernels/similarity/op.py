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
from torch.autograd import forward_ad

from . import dispatch
from .spec import (
    Grads,
    Needs,
    Problem,
    Stats,
    Upstream,
    autocast_enabled,
    check_weight,
    check_weights,
    make_problem,
)

# The fields of Problem, Stats, Upstream and Needs as operator arguments, in their order.
_PROBLEM = (
    "Tensor a, Tensor? b, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids,"
    " Tensor? col_ids, str? positives, bool exclude_self, bool exclude_positives, SymInt diagonal,"
    " bool rows, bool cols, bool hardest, str backend"
)
_STATS = ", ".join(f"Tensor? {name}" for name in Stats._fields)
_UPSTREAM = ", ".join(f"Tensor? {name}" for name in Upstream._fields)
_NEEDS = ", ".join(f"bool need_{name}" for name in Needs._fields)
_PROBLEM_ARGS = len(Problem._fields) + 1
_INPUTS = len(Needs._fields)  # a, b, scale and the biases: what may have a gradient


def similarity_logsumexp(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positives: str | None = None,
    exclude_self: bool = False,
    exclude_positives: bool = False,
    diagonal: int = 0,
    rows: bool = True,
    cols: bool = True,
    hardest: bool = False,
    row_weights: tuple[Tensor, Tensor | None] | None = None,
    col_weights: tuple[Tensor, Tensor | None] | None = None,
    return_stats: bool = True,
    backend: str | None = None,
) -> Stats | Tensor | tuple[Tensor, Stats]:
    """Row and column logsumexp of S = scale·a·bᵀ + biases, without forming S.

    Args:
        a, b: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked backends);
            any strides. The same tensor for both is a self-similarity.
        scale: multiplier of the inner products: a number, a 0-d tensor, one of shape (1,) or (N,).
        row_bias, col_bias: (N,) and (M,), added to the scores.
        row_ids, col_ids: (N,) and (M,) integers. Equal ids are positives; a negative id is padding
            that takes no part. Without ids the positive of row i is column i + diagonal.
        positives: also give, per row and column, the positives' Σ (S - max) ("linear") or
            log Σ exp(S - max) ("lse").
        exclude_self: leave out the pairs (i, i + diagonal): without ids, every positive.
        exclude_positives: leave the positives out of max and logsum.
        rows, cols: which side's statistics are wanted.
        hardest: also give the maximum over the negatives.
        row_weights, col_weights: (u, alpha) of (N,) and (v, beta) of (M,), tensors without
            gradient; alpha and beta may be None. Ask for the sum of all statistics, weighted:

                Σ_i u_i·row_logsum_i + alpha_i·row_pos_i + Σ_j v_j·col_logsum_j + beta_j·col_pos_j

            in which statistics of -inf with a weight of 0 count as 0. Gradients that are wanted
            are then formed in the forward pass, except in fp16, and backward only multiplies them:
            with cols=False 3 matrix products instead of 4 where the backend can (cpu).
        return_stats: with weights: whether the statistics are wanted too, or their sum alone.
        backend: see `ito_kernels.backends()`; None chooses. A function that torch.compile has
            compiled keeps the backend it was compiled with: later `use_backend` and ITO_BACKEND do
            not reach it.

    Returns:
        Stats of fp32 tensors (fp64 for fp64 features): `max` (constant for autograd), `logsum`,
        `pos`, `neg_max` of rows (N,) and columns (M,), None where not wanted. The logsumexp is
        `max + logsum`; a loss is best written `logsum - pos / k`, which keeps the digits that
        `logsumexp - positive` cancels at a large scale.
        With weights the pair of their 0-d sum and the Stats, which then carry no gradient, or the
        sum alone without `return_stats`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
        RuntimeError: the backend asked for cannot run this problem; a gradient of a gradient or
            forward-mode differentiation is asked for.

    Under autocast a and b are computed in the autocast dtype and everything else in fp32.
    """
    problem = make_problem(
        a,
        b,
        scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        positives=positives,
        exclude_self=exclude_self,
        exclude_positives=exclude_positives,
        diagonal=diagonal,
        rows=rows,
        cols=cols,
        hardest=hardest,
    )
    u, alpha = check_weights("row_weights", row_weights, problem, rows, problem.n)
    v, beta = check_weights("col_weights", col_weights, problem, cols, problem.m)
    weights = Upstream(u, v, alpha, beta)
    name = dispatch.choose(problem, backend)
    needs = _wanted_gradients(problem)
    module = dispatch.load(name)
    now = needs if _weighted(weights) and _can_be_early(problem) else Needs()
    cache = module.cache_bytes(problem) if any(needs) and hasattr(module, "cache_bytes") else 0
    stats = return_stats or not any(now)
    out = _call(_logsumexp, (*problem, name, cache, stats, *weights, *now))
    if _weighted(weights) and not return_stats:
        return out[0]
    result = _Result.read(problem, stats, weights, now, out)
    return result.stats if result.total is None else (result.total, result.stats)


def similarity_softplus(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_self: bool = False,
    diagonal: int = 0,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Per row, the sum over columns of softplus(S) at negatives and softplus(-S) at positives.

    S = scale·a·bᵀ + biases is not formed. Arguments and errors as in `similarity_logsumexp`, but
    `row_weights` is one (N,) tensor without gradient. With it the result is the 0-d sum
    Σ_i row_weights_i · row_i, and gradients that are wanted are formed in the forward pass, except
    in fp16: 3 matrix products instead of 4 where the backend can (cpu).

    Returns (N,), or 0-d with `row_weights`, in fp32, fp64 for fp64 features.
    """
    problem = make_problem(
        a,
        b,
        scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        exclude_self=exclude_self,
        diagonal=diagonal,
    )
    if row_weights is not None:
        row_weights = check_weight("row_weights", row_weights, problem.n, problem.a)
    name = dispatch.choose(problem, backend)
    needs = _wanted_gradients(problem)
    now = needs if row_weights is not None and _can_be_early(problem) else Needs()
    return _call(_softplus, (*problem, name, row_weights, *now))[0]


def explain(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options,
) -> str:
    """Which backend and tile shape a call with these tensors would use, and why. Runs nothing.

    `options` are those of `similarity_logsumexp`.
    """
    names = ("row_bias", "col_bias", "row_ids", "col_ids")
    problem = make_problem(
        queries, keys, logit_scale, **{name: options.pop(name, None) for name in names}, **options
    )
    name = dispatch.choose(problem, backend)
    what = "self-similarity" if problem.b is None else "similarity"
    return (
        f"{what} of {problem.n} x {problem.m}, D = {problem.d}, {problem.a.dtype} on"
        f" {problem.a.device.type}\n"
        f"backend {name}: {dispatch.why(problem, backend)}\n"
        f"tiles: {dispatch.load(name).describe(problem)}"
    )


def _wanted_gradients(problem: Problem) -> Needs:
    """Of a, b, scale, row_bias, col_bias: the first five fields."""
    inputs = problem[:_INPUTS]
    if not torch.compiler.is_compiling():
        # operators would lose a forward-mode tangent without a word
        if forward_ad._current_level >= 0 and any(
            x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
        ):
            raise RuntimeError(
                "ito_kernels supports reverse mode only, not forward-mode differentiation"
                " (torch.func.jvp, torch.autograd.forward_ad): use backward() or"
                " torch.autograd.grad()"
            )
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(
                "ito_kernels does not run inside torch.func transforms (grad, vjp, vmap, ...): use"
                " backward() or torch.autograd.grad(), and a loop instead of vmap"
            )
    live = torch.is_grad_enabled()
    return Needs(*(live and x is not None and x.requires_grad for x in inputs))


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


def _first_order_only() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ito_kernels gives first-order gradients only: differentiate without create_graph=True."
            " For a gradient of a gradient (a gradient penalty, a Hessian) write the loss on the"
            " dense similarity matrix"
        )


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
        return _present(_total(stats, weights), *stats, cache)
    if _has(backend, "logsumexp_both"):
        total, stats, grads = _run(
            problem, backend, "logsumexp_both", with_stats, weights, now, *kept
        )
    else:
        stats = _run(problem, backend, "logsumexp_forward", *kept)
        grads = _run(problem, backend, "logsumexp_backward", stats, weights, now, *kept)
        total = _total(stats, weights)
    return _present(total, *(stats if with_stats else ()), *grads)


def _has(backend: str, function: str) -> bool:
    return hasattr(dispatch.load(backend), function)


def _total(stats: Stats, weights: Upstream) -> Tensor | None:
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
        ctx.flags = problem[7:]
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
        ctx.save_for_backward(*problem[:7], *weights, *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *arrived):
        _first_order_only()
        if all(x is None for x in arrived):
            return (None,) * len(ctx.needs_input_grad)
        if any(ctx.now):
            return _scaled_grads(ctx, arrived[0])
        tensors = ctx.saved_tensors
        problem, weights = Problem(*tensors[:7], *ctx.flags), Upstream(*tensors[7:11])
        _, stats, cache, _ = _Result.read(problem, True, weights, ctx.now, tensors[11:])
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
        ctx.now, ctx.flags = Needs(*now), problem[7:]
        ctx.mark_non_differentiable(*grads)
        if grads:
            ctx.save_for_backward(problem.scale, *grads)
        else:
            ctx.save_for_backward(*problem[:7], weights)
        return value, *grads

    @staticmethod
    def backward(ctx, arrived, *_):
        _first_order_only()
        if any(ctx.now):
            return _scaled_grads(ctx, arrived)
        *tensors, weights = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.flags)
        u = arrived if weights is None else arrived * weights
        needs = Needs(*ctx.needs_input_grad[:_INPUTS])
        out = _call(_softplus_backward, (*problem, ctx.backend, u, *needs))
        return _input_grads(problem.scale, _read_grads(needs, out))
