"""The primitive as PyTorch operators, with fake kernels and autograd.

The operators are opaque to `torch.compile`: it does not trace into them. Gradients are operators of
their own, which compute only what is needed: a frozen side costs no matrix product. They are
registered by hand because `torch.library.custom_op` adds 0.8 ms to a forward and backward pass,
three times what the kernels need for 64 rows. A call in plain eager mode does not even go through
PyTorch's dispatcher.

Each call is a struct with four methods: `arguments()` lists its members as the operator takes them,
`of()` reads them back, `run()` computes, and `fake()` gives results of the right shapes. An
operator returns a flat list of tensors: those of its results that are asked for, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import dispatch
from .backend import Backend, weighted_sum
from .first_order import first_order_only, reverse_mode_only
from .spec import (
    Grads,
    Needs,
    Problem,
    SideStats,
    SideUpstream,
    Stats,
    Upstream,
    can_skip_dispatcher,
    readable,
)

# ---- the primitive, of arguments that have been checked


def logsumexp_of(
    problem: Problem, weights: Upstream, return_stats: bool, backend: str | None
) -> Stats | Tensor | tuple[Tensor, Stats]:
    """`similarity_logsumexp` for a checked problem and weights."""
    chosen, inputs = dispatch.choose(problem, backend), problem.inputs
    needs = needed_gradients(inputs)
    weighted = _weighted(weights)
    early = needs if weighted and _early_allowed(problem) else Needs()
    direct = can_skip_dispatcher(inputs)
    if weighted and early == needs and direct:  # nothing is kept for backward: one call
        with _BELOW_AUTOGRAD(), _WITHOUT_AUTOCAST():
            total, stats, grads = chosen.logsumexp_both(problem, return_stats, weights, early)
        if any(early):
            total = _with_gradients(*inputs, (total, grads))
        return (total, stats) if return_stats else total
    weights = weights.tensors(problem)
    # For tiles kept for backward. Called even without backward: it raises for a bad ITO_ variable.
    cache_bytes = 0 if any(early) else chosen.cache_bytes(problem) * any(needs)
    call = Logsumexp(problem, chosen, return_stats or not any(early), cache_bytes, weights, early)
    if not direct:
        found = call.read(_LOGSUMEXP(*call.arguments()))
    elif any(needs):
        found = call.read(_apply_logsumexp(*inputs, call, False))
    else:
        found = call.compute()
    if not weighted:
        return found.stats
    return (found.total, found.stats) if return_stats else found.total


def softplus_of(
    problem: Problem, row_weights: Tensor | float | None, backend: str | None
) -> Tensor:
    """`similarity_softplus` for a checked problem. Weights: a number is that of every row."""
    chosen, inputs = dispatch.choose(problem, backend), problem.inputs
    needs = needed_gradients(inputs)
    early = needs if row_weights is not None and _early_allowed(problem) else Needs()
    direct = can_skip_dispatcher(inputs)
    if row_weights is not None and early == needs and direct:  # as in logsumexp_of
        with _BELOW_AUTOGRAD(), _WITHOUT_AUTOCAST():
            found = chosen.softplus_total(problem, row_weights, early)
        return _with_gradients(*inputs, found) if any(early) else found[0]
    if not (row_weights is None or isinstance(row_weights, Tensor)):
        row_weights = problem.scale.new_full((problem.n,), row_weights)
    call = Softplus(problem, chosen, row_weights, early)
    if not direct:
        return _SOFTPLUS(*call.arguments())[0]
    return (_apply_softplus(*inputs, call, False) if any(needs) else call.compute())[0]


def logsumexp_gradients(
    problem: Problem, stats: Stats, upstream: Upstream, needs: Needs, backend: str | None
) -> Grads:
    """The gradients of a checked problem. `stats` may be those of a larger problem that this one is
    a block of."""
    no_cache = problem.a.new_empty(0, dtype=torch.uint8)
    chosen = dispatch.choose(problem, backend)
    call = LogsumexpBackward(problem, chosen, stats, no_cache, upstream, needs)
    return _present_grads(needs, iter(_run(_LOGSUMEXP_BACKWARD, call)))


def _early_allowed(problem: Problem) -> bool:
    """Whether gradients may be formed in the forward pass, given weights.

    Not in fp16, where the gradient of a mean underflows unless it is multiplied by a loss scale
    before it is rounded. That scale is known in the backward pass only.
    """
    return problem.a.dtype != torch.float16


def _weighted(weights: Upstream) -> bool:
    return weights.row.logsum is not None or weights.col.logsum is not None


_BELOW_AUTOGRAD = torch._C._AutoDispatchBelowAutograd  # 1 µs less than `torch.no_grad`
_WITHOUT_AUTOCAST = torch._C._DisableAutocast  # 2 µs less than `torch.autocast(enabled=False)`


def needed_gradients(inputs: tuple[Tensor | None, ...]) -> Needs:
    reverse_mode_only(*inputs)
    if not torch.is_grad_enabled():
        return Needs()
    a, b, scale, row_bias, col_bias = inputs
    return Needs(
        a.requires_grad,
        b is not None and b.requires_grad,
        scale.requires_grad,
        row_bias is not None and row_bias.requires_grad,
        col_bias is not None and col_bias.requires_grad,
    )


# ---- structs to flat lists and back

_Struct = TypeVar("_Struct", bound=tuple)
_NO_SIDE = SideStats(None, None)


def _take(kind: type[_Struct], values: Iterator) -> _Struct:
    """Fills a struct from the next values."""
    return kind(*islice(values, len(kind._fields)))


def _take_upstream(values: Iterator) -> Upstream:
    return Upstream(_take(SideUpstream, values), _take(SideUpstream, values))


def _take_stats(values: Iterator) -> Stats:
    row, col = _take(SideStats, values), _take(SideStats, values)
    return Stats(None if row.max is None else row, None if col.max is None else col)


def _flat(stats: Stats) -> tuple[Tensor | None, ...]:
    return *(stats.row or _NO_SIDE), *(stats.col or _NO_SIDE)


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def present_stats(problem: Problem, tensors: Iterator) -> Stats:
    """Reads the statistics that the problem asks for from a list that has no others."""

    def side() -> SideStats:
        return SideStats(
            next(tensors),
            next(tensors),
            next(tensors) if problem.positives is not None else None,
            next(tensors) if problem.hardest else None,
        )

    row = side() if problem.rows else None
    return Stats(row, side() if problem.cols else None)


def _present_grads(needs: Needs, tensors: Iterator) -> Grads:
    return Grads(*[next(tensors) if need else None for need in needs])


def upstream_of(arrived: Stats) -> Upstream:
    """The upstream gradients of the statistics, as the backward pass takes them."""
    return Upstream(
        *(
            SideUpstream() if side is None else SideUpstream(side.logsum, side.pos)
            for side in arrived
        )
    )


def detached(stats: Stats) -> Stats:
    return Stats(
        *(side and SideStats(*(None if x is None else x.detach() for x in side)) for side in stats)
    )


def saved_problem(saved: Iterable[Tensor | None], options: tuple) -> tuple[Problem, list]:
    """Splits what autograd saved into the problem, whose tensors come first, and the rest. Raises
    ValueError if a tensor's memory was freed since the forward pass."""
    names = Problem._fields[: -len(options)]
    saved = list(saved)
    tensors = [
        None if x is None else readable(f"{name}, kept for backward,", x)
        for name, x in zip(names, saved, strict=False)
    ]
    return Problem(*tensors, *options), saved[len(names) :]


def readable_gradients(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Upstream gradients with their values in memory, as kernels read them."""
    return tuple(None if x is None else readable("the gradient that arrives", x) for x in tensors)


# ---- calls


class Result(NamedTuple):
    """The result of a logsumexp call. total: the weighted sum of the statistics, None without
    weights. grads: the gradients formed in the forward pass. cache: tiles kept for backward."""

    total: Tensor | None
    stats: Stats
    grads: Grads = Grads()
    cache: Tensor | None = None


class Logsumexp(NamedTuple):
    """The operator `similarity_logsumexp`.

    early: the gradients to form in the forward pass. with_stats: whether to return the statistics;
    False only where backward does not need them.
    """

    problem: Problem
    backend: Backend
    with_stats: bool
    cache_bytes: int
    weights: Upstream
    early: Needs

    schema = (
        "bool with_stats, SymInt cache_bytes, Tensor? u, Tensor? alpha, Tensor? v, Tensor? beta,"
        " bool need_a, bool need_b, bool need_scale, bool need_row_bias, bool need_col_bias"
    )

    @classmethod
    def of(cls, arguments: tuple) -> Logsumexp:
        values = iter(arguments)
        problem, backend = _take(Problem, values), dispatch.load(next(values))
        return cls(
            problem,
            backend,
            next(values),
            next(values),
            _take_upstream(values),
            _take(Needs, values),
        )

    def arguments(self) -> tuple:
        weights = self.weights
        return (
            *self.problem,
            self.backend.name,
            self.with_stats,
            self.cache_bytes,
            *weights.row,
            *weights.col,
            *self.early,
        )

    def compute(self) -> Result:
        problem, backend, with_stats, cache_bytes, weights, early = self
        with _WITHOUT_AUTOCAST():
            if _weighted(weights) and not cache_bytes:
                return Result(*backend.logsumexp_both(problem, with_stats, weights, early))
            cache = backend.new_cache(problem, cache_bytes) if cache_bytes else None
            stats = backend.logsumexp_forward(problem, cache)
            return Result(weighted_sum(stats, weights), stats, cache=cache)

    def run(self) -> list[Tensor]:
        total, stats, grads, cache = self.compute()
        if any(self.early):
            return present(total, *_flat(stats), *grads)
        if cache is None:
            cache = self.problem.a.new_empty(0, dtype=torch.uint8)
        return present(total, *_flat(stats), cache)

    def read(self, tensors: Iterable) -> Result:
        """Reads the list that `run` returns."""
        tensors = iter(tensors)
        return Result(
            next(tensors) if _weighted(self.weights) else None,
            present_stats(self.problem, tensors) if self.with_stats else Stats(),
            _present_grads(self.early, tensors),
            None if any(self.early) else next(tensors),
        )

    def fake(self) -> list[Tensor]:
        problem = self.problem
        return present(
            problem.scale.new_empty(()) if _weighted(self.weights) else None,
            *_flat(problem.new_stats() if self.with_stats else Stats()),
            None if any(self.early) else problem.a.new_empty(self.cache_bytes, dtype=torch.uint8),
            *_fake_grads(problem, self.early),
        )


class LogsumexpBackward(NamedTuple):
    """The operator `similarity_logsumexp_backward`. An empty `cache` means none."""

    problem: Problem
    backend: Backend
    stats: Stats
    cache: Tensor
    upstream: Upstream
    needs: Needs

    schema = (
        "Tensor? row_max, Tensor? row_logsum, Tensor? row_pos, Tensor? row_neg_max,"
        " Tensor? col_max, Tensor? col_logsum, Tensor? col_pos, Tensor? col_neg_max, Tensor cache,"
        " Tensor? u, Tensor? alpha, Tensor? v, Tensor? beta,"
        " bool need_a, bool need_b, bool need_scale, bool need_row_bias, bool need_col_bias"
    )

    @classmethod
    def of(cls, arguments: tuple) -> LogsumexpBackward:
        values = iter(arguments)
        problem, backend = _take(Problem, values), dispatch.load(next(values))
        stats, cache = _take_stats(values), next(values)
        return cls(problem, backend, stats, cache, _take_upstream(values), _take(Needs, values))

    def arguments(self) -> tuple:
        upstream = self.upstream
        return (
            *self.problem,
            self.backend.name,
            *_flat(self.stats),
            self.cache,
            *upstream.row,
            *upstream.col,
            *self.needs,
        )

    def run(self) -> list[Tensor]:
        problem, backend, stats, cache, upstream, needs = self
        cache = cache if cache.numel() else None
        with _WITHOUT_AUTOCAST():
            return present(*backend.logsumexp_backward(problem, stats, upstream, needs, cache))

    def fake(self) -> list[Tensor]:
        return present(*_fake_grads(self.problem, self.needs))


class Softplus(NamedTuple):
    """The operator `similarity_softplus`: the sum of each row, or with weights their weighted sum.
    early: the gradients to form in the forward pass."""

    problem: Problem
    backend: Backend
    weights: Tensor | None
    early: Needs

    schema = (
        "Tensor? weights,"
        " bool need_a, bool need_b, bool need_scale, bool need_row_bias, bool need_col_bias"
    )

    @classmethod
    def of(cls, arguments: tuple) -> Softplus:
        values = iter(arguments)
        problem, backend = _take(Problem, values), dispatch.load(next(values))
        return cls(problem, backend, next(values), _take(Needs, values))

    def arguments(self) -> tuple:
        return *self.problem, self.backend.name, self.weights, *self.early

    def compute(self) -> tuple[Tensor, Grads]:
        problem, backend, weights, early = self
        with _WITHOUT_AUTOCAST():
            if weights is None:
                return backend.softplus_forward(problem), Grads()
            return backend.softplus_total(problem, weights, early)

    def run(self) -> list[Tensor]:
        value, grads = self.compute()
        return present(value, *grads)

    def fake(self) -> list[Tensor]:
        size = (self.problem.n,) if self.weights is None else ()
        value = self.problem.a.new_empty(size, dtype=self.problem.accumulate)
        return present(value, *_fake_grads(self.problem, self.early))


class SoftplusBackward(NamedTuple):
    """The operator `similarity_softplus_backward`. u: the upstream gradient of the row sums."""

    problem: Problem
    backend: Backend
    u: Tensor
    needs: Needs

    schema = (
        "Tensor u,"
        " bool need_a, bool need_b, bool need_scale, bool need_row_bias, bool need_col_bias"
    )

    @classmethod
    def of(cls, arguments: tuple) -> SoftplusBackward:
        values = iter(arguments)
        problem, backend = _take(Problem, values), dispatch.load(next(values))
        return cls(problem, backend, next(values), _take(Needs, values))

    def arguments(self) -> tuple:
        return *self.problem, self.backend.name, self.u, *self.needs

    def run(self) -> list[Tensor]:
        with _WITHOUT_AUTOCAST():
            return present(*self.backend.softplus_backward(self.problem, self.u, self.needs))

    def fake(self) -> list[Tensor]:
        return present(*_fake_grads(self.problem, self.needs))


def _fake_grads(problem: Problem, needs: Needs) -> Grads:
    like = problem.a

    def vector(length: int, wanted: bool) -> Tensor | None:
        return like.new_empty(length, dtype=problem.accumulate) if wanted else None

    return Grads(
        like.new_empty(like.shape) if needs.a else None,
        like.new_empty(problem.b.shape) if needs.b else None,
        problem.scale.new_empty(problem.scale.shape) if needs.scale else None,
        vector(problem.n, needs.row_bias),
        vector(problem.m, needs.col_bias),
    )


# ---- operators
# `torch.compile` keeps graphs on disk and finds them again by the names and arguments of the
# forward operators alone. A change of a backward operator's arguments, or of a result's shape, must
# therefore change a forward operator's name or arguments too.

_PROBLEM = (
    "Tensor a, Tensor? b, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids,"
    " Tensor? col_ids, Tensor? row_limit, str? positives, bool exclude_self,"
    " bool exclude_positives, SymInt diagonal, bool rows, bool cols, bool hardest, bool exact_max,"
    " bool half_values, str backend"
)
_LIBRARY = torch.library.Library("ito_kernels", "DEF")


def _operator(name: str, call: type) -> OpOverload:
    _LIBRARY.define(f"{name}({_PROBLEM}, {call.schema}) -> Tensor[]")
    _LIBRARY.impl(name, lambda *args: call.of(args).run(), "CompositeExplicitAutograd")
    operator = getattr(torch.ops.ito_kernels, name).default
    torch.library.register_fake(operator, lambda *args: call.of(args).fake(), lib=_LIBRARY)
    return operator


_LOGSUMEXP = _operator("similarity_logsumexp", Logsumexp)
_LOGSUMEXP_BACKWARD = _operator("similarity_logsumexp_backward", LogsumexpBackward)
_SOFTPLUS = _operator("similarity_softplus", Softplus)
_SOFTPLUS_BACKWARD = _operator("similarity_softplus_backward", SoftplusBackward)


# ---- autograd


class _WithGradients(torch.autograd.Function):
    """Attaches gradients that the forward pass has formed to its result.

    known: the result and its gradients, as one argument, because each costs 0.3 µs.
    """

    @staticmethod
    def forward(ctx, a, b, scale, row_bias, col_bias, known: tuple[Tensor, Grads]):
        value, grads = known
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        first_order_only()
        grads = ctx.saved_tensors
        # `loss.backward()` has an upstream gradient of 1: the gradients are returned as they are,
        # unless the graph is kept for another pass. On a GPU, reading the 1 would wait for it.
        multiply = not (
            upstream.is_cpu
            and type(upstream) is Tensor
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched=True
            and not torch._C._autograd._get_current_graph_task_keep_graph()
            and upstream.item() == 1
        )
        if multiply:
            grads = (None if x is None else x * upstream for x in grads)
        return *grads, None


class _Logsumexp(torch.autograd.Function):
    """dispatched: whether the call came through PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx, a, b, scale, row_bias, col_bias, call: Logsumexp, dispatched: bool):
        problem, weights = call.problem, call.weights
        out = _below_autograd(_LOGSUMEXP, call) if dispatched else call.run()
        ctx.options, ctx.backend = problem.options, call.backend
        ctx.set_materialize_grads(False)  # of the many outputs few have a gradient
        if _weighted(weights):
            ctx.mark_non_differentiable(*out[1:])
        else:
            found = call.read(out)
            stats = found.stats
            maxima = (stats.row_max, stats.row_neg_max, stats.col_max, stats.col_neg_max)
            ctx.mark_non_differentiable(*present(*maxima, found.cache))
        ctx.save_for_backward(*problem.tensors, *weights.row, *weights.col, *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *arrived):
        first_order_only()
        if all(x is None for x in arrived):
            return (None,) * (len(Grads._fields) + 2)
        problem, saved = saved_problem(ctx.saved_tensors, ctx.options)
        saved = iter(saved)
        weights = _take_upstream(saved)
        call = Logsumexp(problem, ctx.backend, True, 0, weights, Needs())
        found, arrived = call.read(saved), call.read(readable_gradients(arrived))
        upstream = upstream_of(arrived.stats)
        if _weighted(weights):
            row, col = (
                SideUpstream(*(None if x is None else x * arrived.total for x in side))
                for side in weights
            )
            upstream = Upstream(row, col)
        needs = _take(Needs, iter(ctx.needs_input_grad))
        back = LogsumexpBackward(problem, ctx.backend, found.stats, found.cache, upstream, needs)
        out = _run(_LOGSUMEXP_BACKWARD, back)
        return *_present_grads(needs, iter(out)), None, None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, row_bias, col_bias, call: Softplus, dispatched: bool):
        problem = call.problem
        out = _below_autograd(_SOFTPLUS, call) if dispatched else call.run()
        ctx.options, ctx.backend = problem.options, call.backend
        ctx.save_for_backward(*problem.tensors, call.weights)
        return tuple(out)

    @staticmethod
    def backward(ctx, arrived: Tensor):
        first_order_only()
        (arrived,) = readable_gradients([arrived])
        problem, (weights,) = saved_problem(ctx.saved_tensors, ctx.options)
        u = arrived if weights is None else arrived * weights
        needs = _take(Needs, iter(ctx.needs_input_grad))
        back = SoftplusBackward(problem, ctx.backend, u, needs)
        out = _run(_SOFTPLUS_BACKWARD, back)
        return *_present_grads(needs, iter(out)), None, None


def _run(operator: OpOverload, call: LogsumexpBackward | SoftplusBackward) -> list[Tensor]:
    """The operator's result, without the dispatcher where that may be bypassed."""
    if can_skip_dispatcher(call.problem.inputs):
        return call.run()
    return operator(*call.arguments())


def _below_autograd(operator: OpOverload, call: Logsumexp | Softplus) -> list[Tensor]:
    with _BELOW_AUTOGRAD():
        return operator(*call.arguments())


def _apply_of(function: type) -> Callable:
    """The C++ half of `function.apply`. The Python half, 2 µs, serves the transforms of torch.func,
    which `reverse_mode_only` has refused."""
    return super(torch.autograd.Function, function).apply


_with_gradients = _apply_of(_WithGradients)
_apply_logsumexp = _apply_of(_Logsumexp)
_apply_softplus = _apply_of(_Softplus)


def _make_differentiable(operator: OpOverload, call: type, apply: Callable) -> None:
    def differentiable(*args) -> list[Tensor]:
        this = call.of(args)
        inputs = this.problem.inputs
        if not any(this.early):
            return list(apply(*inputs, this, True))
        value, *rest = _below_autograd(operator, this)
        grads = _present_grads(this.early, iter(rest[len(rest) - sum(this.early) :]))
        return [_with_gradients(*inputs, (value, grads)), *rest]

    _LIBRARY.impl(operator.name(), differentiable, "Autograd")


_make_differentiable(_LOGSUMEXP, Logsumexp, _apply_logsumexp)
_make_differentiable(_SOFTPLUS, Softplus, _apply_softplus)
