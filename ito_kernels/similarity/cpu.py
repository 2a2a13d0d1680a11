"""Native kernels for CPU tensors: fp32, bf16 and fp16 features, accumulated in fp32.

Tiles of S are reduced while they are in the processor's cache. The backward pass computes them
again, or reads those that the forward pass kept: up to ITO_TILE_CACHE_BYTES, 64 MiB by default, for
all passes together that await their backward pass. The kernels run on PyTorch's OpenMP threads,
`torch.get_num_threads()` of them. With the same number of threads the results are the same bit for
bit.

Environment: ITO_CPU_ISA forces an instruction set, one of `instruction_sets()`. "amx_emulated" is
for tests: the kernels of AMX on emulated tiles, ten times slower than AVX-512.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend
from .budget import count_as_kept, tile_cache_left
from .native import MISSING, _native
from .spec import Grads, Needs, Problem, SideStats, Stats, Upstream

# in the order of the enumerations in problem.hpp and base.hpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIVES = (None, "linear", "lse")

COUNTABLE = 2**31  # rows and columns are counted with 32 bits


class Cpu(Backend):
    name = "cpu"
    priority = 3
    device = "cpu"
    native = True

    def status(self) -> tuple[bool, str]:
        if MISSING:
            return False, MISSING
        info, build = _native.cpu_info(), _native.build_info()
        return True, (
            f"kernels for {', '.join(instruction_sets())}, built by {build['compiler']}; found"
            f" {info['arch']} with {', '.join(info['features']) or 'no vector extensions'},"
            f" {info['logical_cores']} cores, L2 {info['l2_bytes'] >> 10} KiB,"
            f" L3 {info['l3_bytes'] >> 10} KiB"
        )

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if _native is None:
            return False, MISSING
        if not problem.a.is_cpu:
            return False, f"needs CPU tensors, got {problem.a.device.type}"
        if problem.a.dtype not in DTYPES:
            return False, f"needs float32, bfloat16 or float16 features, got {problem.a.dtype}"
        if max(problem.n, problem.m, abs(problem.diagonal)) >= COUNTABLE:
            return False, "counts rows and columns with 32 bits"
        return True, "native kernels"

    def missed(self, problem: Problem) -> str:
        if not MISSING or problem.a.dtype not in DTYPES:
            return ""
        return f"ito_kernels runs without its CPU kernels, several times slower: {MISSING}"

    def describe(self, problem: Problem) -> str:
        return _native.cpu_describe(_fields(problem), torch.get_num_threads())

    def cache_bytes(self, problem: Problem) -> int:
        """Memory to keep scores for backward, 4 bytes each, up to what other passes have left of
        ITO_TILE_CACHE_BYTES."""
        # tiles are rounded up to whole panels
        n, m = problem.n, problem.m
        return min(tile_cache_left(), 4 * (n + n // 4 + 64) * (m + m // 4 + 64))

    def new_cache(self, problem: Problem, size: int) -> Tensor:
        return count_as_kept(super().new_cache(problem, size))

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
        """Keeps as many scores in `cache` as fit."""
        stats = problem.new_stats()
        _native.cpu_forward(_fields(problem), stats, _memory(cache), torch.get_num_threads())
        return stats

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        grads = _new_grads(problem, needs)
        stats = Stats(*(side and SideStats(*_vectors(*side)) for side in stats))
        _native.cpu_backward(
            _fields(problem),
            stats,
            (_vectors(*upstream.row), _vectors(*upstream.col)),
            grads,
            _memory(cache),
            torch.get_num_threads(),
        )
        return grads

    def logsumexp_both(
        self,
        problem: Problem,
        with_stats: bool,
        upstream: Upstream,
        needs: Needs,
    ) -> tuple[Tensor, Stats, Grads]:
        """One native call. Without column statistics (and if a and b differ) it is one pass over
        the tiles: scores that fit into the cache are computed once, which makes 3 matrix products
        instead of 4."""
        total, grads = problem.scale.new_empty(()), _new_grads(problem, needs)
        stats = problem.new_stats() if with_stats else Stats()
        _native.cpu_both(
            _fields(problem),
            stats,
            (_vectors(*upstream.row), _vectors(*upstream.col)),
            grads,
            (total,),
            (None, self.cache_bytes(problem) * any(needs)),
            torch.get_num_threads(),
        )
        return total, stats, grads

    def softplus_forward(self, problem: Problem) -> Tensor:
        loss = problem.scale.new_empty(problem.n)
        _softplus(problem, loss, None, Needs())
        return loss

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        return _softplus(problem, None, u, needs)

    def softplus_both(self, problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
        loss = problem.scale.new_empty(problem.n)
        return loss, _softplus(problem, loss, u, needs)

    def softplus_total(
        self, problem: Problem, weights: Tensor | float, needs: Needs
    ) -> tuple[Tensor, Grads]:
        total = problem.scale.new_empty(())
        return total, _softplus(problem, None, weights, needs, total)


def instruction_sets() -> list[str]:
    """The instruction sets that can run here, best first."""
    return [] if _native is None else _native.cpu_instruction_sets()


def _softplus(
    problem: Problem,
    loss: Tensor | None,
    u: Tensor | float | None,
    needs: Needs,
    total: Tensor | None = None,
) -> Grads:
    grads = _new_grads(problem, needs)
    fields, upstream = _fields(problem), _vectors(u)
    _native.cpu_softplus(fields, (loss,), upstream, grads, (total,), torch.get_num_threads())
    return grads


def _fields(p: Problem) -> tuple[Tensor | int | None, ...]:
    """The problem as the tuple that bind.cpp reads, with adjacent elements in rows and vectors."""
    a = _rows(p.a)
    b = a if p.b is None else _rows(p.b)
    return (
        DTYPES.index(a.dtype),
        a.size(1),
        *(a, a.size(0), a.stride(0)),
        *(b, b.size(0), b.stride(0)),
        p.b is None,
        p.scale.ndim == 1,
        p.scale.contiguous(),
        *_vectors(p.row_bias, p.col_bias, p.row_ids, p.col_ids, p.row_limit),
        POSITIVES.index(p.positives),
        p.exclude_self,
        p.exclude_positives,
        p.diagonal,
        p.rows,
        p.cols,
        p.hardest,
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()


def _vectors(*vectors: Tensor | float | None) -> tuple[Tensor | float | None, ...]:
    # of a list: a generator would take twice as long
    return tuple([x if x is None or type(x) is float else x.contiguous() for x in vectors])


def _memory(cache: Tensor | None) -> tuple[Tensor | None, int]:
    return (cache, 0 if cache is None else cache.numel())


def _new_grads(problem: Problem, needs: Needs) -> Grads:
    a, like, n, m = problem.a, problem.scale, problem.n, problem.m
    return Grads(
        a.new_empty(n, problem.d) if needs.a else None,
        a.new_empty(m, problem.d) if needs.b else None,
        torch.empty_like(like) if needs.scale else None,
        like.new_empty(n) if needs.row_bias else None,
        like.new_empty(m) if needs.col_bias else None,
    )
