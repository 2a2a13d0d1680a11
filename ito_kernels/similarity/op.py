"""The primitive as PyTorch operators: opaque custom ops with fake kernels and autograd.

Opaque, so that `torch.compile` leaves them whole and nothing inside them is traced; the gradients
are ops of their own, chosen by what is needed: a frozen side costs no matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from . import dispatch
from .spec import Grads, Needs, Problem, Stats, Upstream, make_problem

# The fields of Problem, Stats and Upstream as operator arguments, in their order.
_PROBLEM = (
    "Tensor a, Tensor? b, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids,"
    " Tensor? col_ids, str? positives, bool exclude_self, bool exclude_positives, SymInt diagonal,"
    " bool rows, bool cols, bool hardest, str backend"
)
_STATS = ", ".join(f"Tensor? {name}" for name in Stats._fields)
_UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in Upstream._fields)
_NEEDS = ", ".join(f"bool need_{name}" for name in Needs._fields)
_GRADS = "(" + ", ".join(["Tensor"] * len(Grads._fields)) + ")"
_PROBLEM_ARGS = len(Problem._fields) + 1


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
    backend: str | None = None,
) -> Stats:
    """Row and column logsumexp of S = scale·a·bᵀ + biases, without forming S.

    Args:
        a, b: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked backends);
            any strides. The same tensor for both is a self-similarity.
        scale: multiplier of the inner products: a number, a 0-d tensor or an (N,) tensor.
        row_bias, col_bias: (N,) and (M,), added to the scores.
        row_ids, col_ids: (N,) and (M,) integers. Equal ids are positives; a negative id is padding
            that takes no part. Without ids the positive of row i is column i + diagonal.
        positives: also give, per row and column, the positives' Σ (S - max) ("linear") or
            log Σ exp(S - max) ("lse").
        exclude_self: leave out the pairs (i, i + diagonal).
        exclude_positives: leave the positives out of max and logsum.
        rows, cols: which side's statistics are wanted.
        hardest: also give the maximum over the negatives.
        backend: see `ito_kernels.backends()`; None chooses.

    Returns:
        Stats of fp32 tensors (fp64 for fp64 features): `max` (constant for autograd), `logsum`,
        `pos`, `neg_max` of rows (N,) and columns (M,), None where not wanted. The logsumexp is
        `max + logsum`; a loss is best written `logsum - pos / k`, which keeps the digits that
        `logsumexp - positive` cancels at a large scale.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
        RuntimeError: the backend asked for cannot run this problem.

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
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem[:5])
    *out, _ = _logsumexp(*problem, dispatch.choose(problem, backend), keep)
    return _stats(problem, out)


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
    backend: str | None = None,
) -> Tensor:
    """Per row, the sum over columns of softplus(S) at negatives and softplus(-S) at positives.

    S = scale·a·bᵀ + biases is not formed. Arguments and errors as in `similarity_logsumexp`.
    Returns (N,) in fp32, fp64 for fp64 features.
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
    return _softplus(*problem, dispatch.choose(problem, backend))


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


def _wanted(problem: Problem) -> Stats:
    """Which statistics the problem asks for."""
    side = (True, True, problem.positives is not None, problem.hardest)
    return Stats(*(problem.rows and x for x in side), *(problem.cols and x for x in side))


def _stats(problem: Problem, out: Sequence[Tensor]) -> Stats:
    """An operator's output with None for what was not asked for."""
    return Stats(*(x if want else None for x, want in zip(out, _wanted(problem), strict=True)))


def _split(args: tuple) -> tuple[Problem, str, tuple]:
    """Operator arguments back into the problem, the backend's name and the rest."""
    *fields, backend = args[:_PROBLEM_ARGS]
    return Problem(*fields), backend, args[_PROBLEM_ARGS:]


def _run(problem: Problem, backend: str, function: str, *args):
    """A backend's function with autocast off: inside it, dtypes are chosen by the backend."""
    with torch.autocast(problem.a.device.type, enabled=False):
        return getattr(dispatch.load(backend), function)(problem, *args)


def _present(problem: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Operators cannot return None: an empty tensor stands for it."""
    return tuple(
        problem.a.new_empty(0, dtype=problem.accumulate) if x is None else x for x in tensors
    )


def _fake_grads(problem: Problem, needs: Needs) -> tuple[Tensor, ...]:
    n, m = problem.n, problem.m
    like = (
        problem.a.new_empty(problem.a.shape) if needs.a else None,
        problem.b.new_empty(problem.b.shape) if needs.b else None,
        *(
            problem.a.new_empty(size, dtype=problem.accumulate) if need else None
            for size, need in zip((n, n, m), needs[2:], strict=True)
        ),
    )
    return _present(problem, like)


def _needs(ctx) -> Needs:
    """Of a, b, scale, row_bias, col_bias: the first five arguments."""
    return Needs(*ctx.needs_input_grad[:5])


def _input_grads(
    problem: Problem, needs: Needs, grads: tuple[Tensor, ...], arguments: int = _PROBLEM_ARGS
) -> tuple:
    """One gradient for each operator argument; a 0-d scale takes the sum over the rows."""
    out = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if needs.scale and problem.scale.ndim == 0:
        out[2] = out[2].sum()
    return (*out, *(None,) * (arguments - len(out)))


# ---- logsumexp


@custom_op(
    "ito_kernels::logsumexp",
    mutates_args=(),
    schema=f"({_PROBLEM}, bool keep) -> ({', '.join(['Tensor'] * (len(Stats._fields) + 1))})",
)
def _logsumexp(*args):
    problem, backend, (keep,) = _split(args)
    cache = _new_cache(problem, backend, keep)
    stats = _run(problem, backend, "logsumexp_forward", *_filled(cache))
    return (*_present(problem, stats), cache)


def _new_cache(problem: Problem, backend: str, keep: bool) -> Tensor:
    """What a backend may fill in its forward pass for its backward pass; empty for most."""
    size = getattr(dispatch.load(backend), "cache_bytes", lambda problem: 0)
    return problem.a.new_empty(size(problem) if keep else 0, dtype=torch.uint8)


def _filled(cache: Tensor) -> tuple[Tensor, ...]:
    """The cache as the last argument of a backend that has one."""
    return (cache,) if cache.numel() else ()


@_logsumexp.register_fake
def _(*args):
    problem, backend, (keep,) = _split(args)
    sizes = (problem.n,) * 4 + (problem.m,) * 4
    stats = tuple(
        problem.a.new_empty(size, dtype=problem.accumulate) if want else None
        for size, want in zip(sizes, _wanted(problem), strict=True)
    )
    return (*_present(problem, stats), _new_cache(problem, backend, keep))


@custom_op(
    "ito_kernels::logsumexp_backward",
    mutates_args=(),
    schema=f"({_PROBLEM}, {_STATS}, Tensor cache, {_UPSTREAM}, {_NEEDS}) -> {_GRADS}",
)
def _logsumexp_backward(*args):
    problem, backend, rest = _split(args)
    stats, cache, upstream, needs = _backward_args(rest)
    args = (stats, upstream, needs, *_filled(cache))
    return _present(problem, _run(problem, backend, "logsumexp_backward", *args))


@_logsumexp_backward.register_fake
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


def _logsumexp_context(ctx, inputs, output) -> None:
    problem, ctx.backend, _ = _split(inputs)
    ctx.flags = problem[7:]
    stats, cache = Stats(*output[:-1]), output[-1]
    constants = (stats.row_max, stats.row_neg_max, stats.col_max, stats.col_neg_max)
    ctx.mark_non_differentiable(*constants, cache)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*problem[:7], *output)


def _logsumexp_autograd(ctx, *grads):
    tensors = ctx.saved_tensors
    problem = Problem(*tensors[:7], *ctx.flags)
    stats, cache = _stats(problem, tensors[7:-1]), tensors[-1]
    arrived = Stats(*grads[:-1])
    upstream = Upstream(arrived.row_logsum, arrived.col_logsum, arrived.row_pos, arrived.col_pos)
    needs = _needs(ctx)
    out = _logsumexp_backward(*problem, ctx.backend, *stats, cache, *upstream, *needs)
    return _input_grads(problem, needs, out, _PROBLEM_ARGS + 1)


_logsumexp.register_autograd(_logsumexp_autograd, setup_context=_logsumexp_context)


# ---- softplus


@custom_op("ito_kernels::softplus", mutates_args=(), schema=f"({_PROBLEM}) -> Tensor")
def _softplus(*args):
    problem, backend, _ = _split(args)
    return _run(problem, backend, "softplus_forward")


@_softplus.register_fake
def _(*args):
    problem, _, _ = _split(args)
    return problem.a.new_empty(problem.n, dtype=problem.accumulate)


@custom_op(
    "ito_kernels::softplus_backward",
    mutates_args=(),
    schema=f"({_PROBLEM}, Tensor grad_u, {_NEEDS}) -> {_GRADS}",
)
def _softplus_backward(*args):
    problem, backend, (u, *needs) = _split(args)
    return _present(problem, _run(problem, backend, "softplus_backward", u, Needs(*needs)))


@_softplus_backward.register_fake
def _(*args):
    problem, _, (_, *needs) = _split(args)
    return _fake_grads(problem, Needs(*needs))


def _softplus_context(ctx, inputs, output) -> None:
    problem, ctx.backend, _ = _split(inputs)
    ctx.flags = problem[7:]
    ctx.save_for_backward(*problem[:7])


def _softplus_autograd(ctx, grad):
    problem = Problem(*ctx.saved_tensors, *ctx.flags)
    needs = _needs(ctx)
    out = _softplus_backward(*problem, ctx.backend, grad, *needs)
    return _input_grads(problem, needs, out)


_softplus.register_autograd(_softplus_autograd, setup_context=_softplus_context)
