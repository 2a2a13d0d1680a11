"""Native kernels for CPU tensors: fp32, bf16 and fp16 features, accumulated in fp32.

Tiles of S stay in the processor's cache and are reduced there; backward computes them again, or
reads those that forward kept (`ITO_TILE_CACHE_BYTES`, 64 MiB by default). Threads are PyTorch's
own: as many as `torch.get_num_threads()`. The same number of threads gives the same bits.

Environment: ITO_CPU_ISA forces an instruction set, one of `instruction_sets()`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

from .spec import Grads, Needs, Problem, Stats, Upstream

MISSING = ""  # why there are no native kernels
try:
    from .. import _native
except ImportError as error:
    _native = None
    MISSING = f"the native module does not load: {error}"
    if find_spec("ito_kernels._native") is None:
        MISSING = "the native module was not built: no C++ compiler was found at installation"

# in the order of problem.hpp's enumerations
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIVES = (None, "linear", "lse")

TILE_CACHE_BYTES = 64 << 20


def supports(problem: Problem) -> tuple[bool, str]:
    if _native is None:
        return False, MISSING
    if problem.a.device.type != "cpu":
        return False, f"needs CPU tensors, got {problem.a.device.type}"
    if problem.a.dtype not in DTYPES:
        return False, f"needs float32, bfloat16 or float16 features, got {problem.a.dtype}"
    if max(problem.n, problem.m) >= 2**31 or abs(problem.diagonal) >= 2**31:
        return False, "counts rows and columns with 32 bits"
    return True, "native kernels"


def describe(problem: Problem) -> str:
    return _native.cpu_describe(_fields(_Arguments(problem)), _isa(), torch.get_num_threads())


def instruction_sets() -> list[str]:
    """The instruction sets that the kernels were built for and this processor has, best first."""
    return [] if _native is None else _native.cpu_instruction_sets()


def cache_bytes(problem: Problem) -> int:
    """Memory worth having for scores that forward keeps for backward: 4 bytes for each score, up
    to the budget."""
    text = os.environ.get("ITO_TILE_CACHE_BYTES", TILE_CACHE_BYTES)
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"ITO_TILE_CACHE_BYTES must be a whole number of bytes, got {text!r}")
    # tiles are whole panels, a little larger than what they cover
    n, m = problem.n, problem.m
    return min(budget, 4 * (n + n // 4 + 64) * (m + m // 4 + 64))


def logsumexp_forward(problem: Problem, cache: Tensor | None = None) -> Stats:
    """With a `cache` of any size, keeps there as many scores as fit."""
    out = _new_stats(problem)
    a = _Arguments(problem)
    _native.cpu_forward(_fields(a), _addresses(out), _cache(cache), _isa(), torch.get_num_threads())
    return out


def logsumexp_backward(
    problem: Problem,
    stats: Stats,
    upstream: Upstream,
    needs: Needs,
    cache: Tensor | None = None,
) -> Grads:
    """`cache`: what forward filled."""
    grads = _new_grads(problem, needs)
    a = _Arguments(problem)
    # kept alive by these names until the call returns
    stats = Stats(*(None if x is None else x.contiguous() for x in stats))
    upstream = Upstream(*(None if x is None else x.float().contiguous() for x in upstream))
    _native.cpu_backward(
        _fields(a),
        _addresses(stats),
        _addresses(upstream),
        _addresses(grads),
        _cache(cache),
        _isa(),
        torch.get_num_threads(),
    )
    return grads


def softplus_forward(problem: Problem) -> Tensor:
    loss = problem.scale.new_empty(problem.n)
    _softplus(problem, loss, None, Needs())
    return loss


def softplus_backward(problem: Problem, u: Tensor, needs: Needs) -> Grads:
    return _softplus(problem, None, u, needs)


def logsumexp_both(
    problem: Problem,
    with_stats: bool,
    upstream: Upstream,
    needs: Needs,
    cache: Tensor | None = None,
) -> tuple[Tensor, Stats | None, Grads]:
    """The weighted sum, the statistics if wanted and the gradients, for an upstream known before.

    In one call, and for rows only (but of a self-similarity) in one pass: a panel's scores are
    computed once if they fit into `cache`, 3 matrix products instead of 4.
    """
    total, grads = problem.scale.new_empty(()), _new_grads(problem, needs)
    out = _new_stats(problem) if with_stats else None
    a = _Arguments(problem)
    # kept alive by this name until the call returns
    upstream = [None if x is None else x.contiguous() for x in upstream]
    _native.cpu_both(
        _fields(a),
        _addresses(out or Stats()),
        _addresses(upstream),
        _addresses(grads),
        total.data_ptr(),
        _cache(cache),
        _isa(),
        torch.get_num_threads(),
    )
    return total, out, grads


def softplus_both(problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
    """The row sums and, for an upstream gradient `u` known before, the gradients: 3 products."""
    loss = problem.scale.new_empty(problem.n)
    return loss, _softplus(problem, loss, u, needs)


def _softplus(problem: Problem, loss: Tensor | None, u: Tensor | None, needs: Needs) -> Grads:
    grads = _new_grads(problem, needs)
    a = _Arguments(problem)
    u = None if u is None else u.float().contiguous()
    _native.cpu_softplus(
        _fields(a),
        0 if loss is None else loss.data_ptr(),
        0 if u is None else u.data_ptr(),
        _addresses(grads),
        _isa(),
        torch.get_num_threads(),
    )
    return grads


class _Arguments:
    """A problem's tensors as the engine reads them: rows with adjacent elements, dense vectors."""

    def __init__(self, problem: Problem):
        def rows(x: Tensor) -> Tensor:
            return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

        self.problem = problem
        self.a = rows(problem.a)
        self.b = self.a if problem.b is None else rows(problem.b)
        self.vectors = [None if x is None else x.contiguous() for x in problem[2:8]]


def _fields(arguments: _Arguments) -> tuple[int, ...]:
    """What bind.cpp reads, in its order."""
    p, a, b = arguments.problem, arguments.a, arguments.b
    return (
        DTYPES.index(a.dtype),
        a.shape[1],
        *(a.data_ptr(), a.shape[0], a.stride(0)),
        *(b.data_ptr(), b.shape[0], b.stride(0)),
        p.b is None,
        p.scale.ndim == 1,
        *_addresses(arguments.vectors),
        POSITIVES.index(p.positives),
        p.exclude_self,
        p.exclude_positives,
        p.diagonal,
        p.rows,
        p.cols,
        p.hardest,
    )


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _cache(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.numel())


def _new_stats(problem: Problem) -> Stats:
    like, n, m = problem.scale, problem.n, problem.m
    side = (True, True, problem.positives is not None, problem.hardest)
    return Stats(
        *(like.new_empty(n) if problem.rows and want else None for want in side),
        *(like.new_empty(m) if problem.cols and want else None for want in side),
    )


def _new_grads(problem: Problem, needs: Needs) -> Grads:
    n, m, like = problem.n, problem.m, problem.scale
    return Grads(
        problem.a.new_empty(n, problem.d) if needs.a else None,
        problem.a.new_empty(m, problem.d) if needs.b else None,
        *(
            like.new_empty(k) if need else None
            for k, need in zip((n, n, m), needs[2:], strict=True)
        ),
    )


def _isa() -> str:
    return os.environ.get("ITO_CPU_ISA", "")
