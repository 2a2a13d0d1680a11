"""The CUDA C++ kernels of csrc/cuda, for those who ship without Triton's compiler; and the same
kernels on the emulator of csrc/simt, for CPU tensors and tests (`simt`).

Forward is one pass for both sides' statistics. Backward has two shapes. For D ≤ 128 in half
precision a fused kernel keeps rows of the gradient in registers, once per side. Else W goes panel
by panel into a bounded workspace, and the vendor's matrix product does W·B and Wᵀ·A with fp32
accumulation: 4 matrix products in all. Where S is symmetric, half of its tiles are computed.

Nothing waits for the device and no atomics are used: the same inputs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_structs import (
    POSITIVES,
    Forward,
    Gradient,
    Merge,
    Panel,
    Scores,
    Split,
    Vectors,
    arithmetic,
    numbers,
)
from .operands import Operands, accumulate, is_symmetric
from .spec import Grads, Needs, Problem, Stats, Upstream

try:
    from .. import _native
except ImportError:
    _native = None

PANEL_BYTES = 256 << 20  # of one W panel
# fp16 W is multiplied up to this: 4 terms of it stay below 65,504, and a softmax entry of 1/N keeps
# its 11 bits down to 1e-8
FP16_TOP = 4096.0


class Backend:
    """One of the two: `name` is that of its part of the native module."""

    def __init__(self, name: str, device: str):
        self.name, self.device = name, device

    def missing(self) -> str:
        """Why nothing can run here; empty if it can."""
        if _native is None:
            return "the native module is not there: see the backend 'cpu'"
        if not hasattr(_native, self.name):
            return "built without the CUDA kernels: ITO_BUILD_CUDA=1 and nvcc build them"
        return getattr(_native, self.name).unavailable()

    def status(self) -> tuple[bool, str]:
        """For `backends()`."""
        if missing := self.missing():
            return False, missing
        if self.device == "cpu":
            return True, "the CUDA kernels on an emulator, for CPU tensors: to test, not to use"
        if not torch.cuda.is_available():
            return False, "there is a GPU, but this PyTorch cannot use it"
        if reason := self._too_old(torch.device("cuda")):
            return False, reason
        return True, torch.cuda.get_device_name()

    def _too_old(self, device: torch.device) -> str:
        """Why a GPU cannot run the kernels' instructions; empty if it can."""
        if device.type == "cpu":
            return ""
        gpu = torch.cuda.get_device_properties(device)
        if gpu.major >= 8:
            return ""
        return f"needs compute capability 8.0, {gpu.name} has {gpu.major}.{gpu.minor}"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        device = problem.a.device.type
        if device != self.device or not hasattr(_native, self.name):
            # of a driver only a machine without such tensors is asked: torch.compile traces this
            return False, self.missing() or f"needs {self.device} tensors, got {device}"
        if problem.a.dtype == torch.float64:
            return False, "fp64 is computed by the reference and chunked backends"
        if max(problem.n, problem.m) > 2**30:
            return False, "more than 2^30 rows: the kernels count them in 32 bits"
        if reason := self._too_old(problem.a.device):
            return False, reason
        return True, "the CUDA kernels"

    def describe(self, problem: Problem) -> str:
        tile = f"{self._kernels.TILE} x {self._kernels.TILE}"
        text = f"{arithmetic(problem.a.dtype)}, {tile} scores"
        if is_symmetric(problem):
            text += ", half of them (S is symmetric)"
        if self._fused(problem):
            return f"{text}; fused gradients"
        rows, cols = self._panel_size(problem)
        return f"{text}; W panels of {rows} x {cols} for the vendor's matrix product"

    # ---- forward

    def logsumexp_forward(self, problem: Problem) -> Stats:
        p, op, kernels = problem, Operands.of(problem), self._kernels
        symmetric = is_symmetric(p)
        split = self._split(p, symmetric)

        def slots(groups: int, length: int) -> Tensor:
            return _empty(op.a, kernels.FIELDS, groups * kernels.SLOTS, length)

        row_slots = slots(split.col_groups, p.n) if p.rows or symmetric else None
        col_slots = row_slots
        if not symmetric:
            col_slots = slots(split.row_groups, p.m) if p.cols else None
        self._run("forward", Forward(Scores.of(p, op), split, row_slots, col_slots), op.a)

        def merged(slots: Tensor) -> tuple[Tensor | None, ...]:
            wanted = (True, True, p.positives is not None, p.hardest)
            out = [_empty(slots, slots.shape[2]) if want else None for want in wanted]
            _, count, length = slots.shape
            kind = POSITIVES.index(p.positives)
            self._run("merge", Merge(slots, length, count, kind, *out), slots)
            return tuple(out)

        nothing = (None,) * 4
        rows = merged(row_slots) if p.rows or symmetric else nothing
        if symmetric:
            cols = tuple(None if x is None else x.clone() for x in rows)
        else:
            cols = merged(col_slots) if p.cols else nothing
        return Stats(*(rows if p.rows else nothing), *(cols if p.cols else nothing))

    def softplus_forward(self, problem: Problem) -> Tensor:
        op = Operands.of(problem)
        split = self._split(problem, triangle=False)
        slots = _empty(op.a, split.col_groups * self._kernels.WARP_COLS, problem.n)
        scores = Scores.of(problem, op, softplus=True)
        self._run("forward", Forward(scores, split, slots, None), op.a)
        return slots.sum(0)

    # ---- backward

    def logsumexp_backward(
        self, problem: Problem, stats: Stats, upstream: Upstream, needs: Needs
    ) -> Grads:
        s, up = stats, upstream
        rows = cols = _Side()
        if problem.rows:
            rows = _Side(up.u, s.row_max, s.row_logsum, up.alpha, s.row_pos)
        if problem.cols:
            cols = _Side(up.v, s.col_max, s.col_logsum, up.beta, s.col_pos)
        return self._backward(problem, rows, cols, needs, softplus=False)

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        return self._backward(problem, _Side(u), _Side(), needs, softplus=True)

    def _backward(
        self, problem: Problem, rows: _Side, cols: _Side, needs: Needs, softplus: bool
    ) -> Grads:
        op, symmetric = Operands.of(problem), is_symmetric(problem)
        if symmetric:
            rows = cols = rows.added_to(cols)
        norm = _norm(problem, rows, cols) if problem.a.dtype == torch.float16 else None
        sides = rows.vectors(), cols.vectors()
        call = _Backward(problem, op, *sides, symmetric, softplus, norm)
        return (self._fused_gradients if self._fused(problem) else self._panels)(call, needs)

    def _fused(self, problem: Problem) -> bool:
        # in fp32 three products for each would spill: W panels
        return problem.a.dtype != torch.float32 and problem.d <= self._kernels.GRADIENT_WIDTH

    def _fused_gradients(self, call: _Backward, needs: Needs) -> Grads:
        p, op = call.problem, call.op
        step = 16 // op.a.element_size()

        def side(call: _Backward, exchanged: bool, grad: bool, scale: bool, bias: bool):
            n = call.op.a.shape[0]
            out = _empty(op.a, n, -(-p.d // step) * step) if grad else None
            sums = [_empty(op.a, n) if x else None for x in (scale, bias)]
            if grad or scale or bias:
                stride = 0 if out is None else out.shape[1] // 2
                scores = call.scores(exchanged)
                self._run("gradient", Gradient(scores, call.norm, out, stride, *sums), op.a)
            return None if out is None else out[:, : p.d], *sums

        if call.symmetric:
            grad, scale, _ = side(call, False, needs.a, needs.scale, False)
            return Grads(call.rounded(grad), None, None if scale is None else scale * 0.5)
        both = needs.a and p.b is None
        grad_a, scale, row_bias = side(call, False, needs.a, needs.scale, needs.row_bias)
        grad_b, _, col_bias = side(call.exchanged(), True, needs.b or both, False, needs.col_bias)
        if both:
            grad_a, grad_b = grad_a + grad_b, None
        return Grads(call.rounded(grad_a), call.rounded(grad_b), scale, row_bias, col_bias)

    def _panels(self, call: _Backward, needs: Needs) -> Grads:
        p, op, kernels = call.problem, call.op, self._kernels
        height, width = self._panel_size(p)

        def zeros(*shape: int) -> Tensor:
            return op.a.new_zeros(shape, dtype=torch.float32)

        grad_a = zeros(p.n, p.d) if needs.a else None
        grad_b = grad_a if p.b is None else zeros(p.m, p.d) if needs.b else None
        scale = zeros(p.n) if needs.scale else None
        row_bias = zeros(p.n) if needs.row_bias else None
        col_bias = zeros(p.m) if needs.col_bias else None
        workspace = op.a.new_empty(height, width) if needs.a or needs.b else None
        scores = call.scores(False)

        for row0 in range(0, p.n, height):
            rows = slice(row0, min(row0 + height, p.n))
            for col0 in range(row0 if call.symmetric else 0, p.m, width):
                cols = slice(col0, min(col0 + width, p.m))
                size = (rows.stop - rows.start, cols.stop - cols.start)
                split = self._panel_split(*size, self._processors(op.a.device))
                shapes = (
                    (scale, (split.col_groups * kernels.WARP_COLS, size[0])),
                    (row_bias, (split.col_groups * kernels.WARP_COLS, size[0])),
                    (col_bias, (split.row_groups * kernels.WARP_ROWS, size[1])),
                )
                sums = [None if x is None else _empty(op.a, *shape) for x, shape in shapes]
                panel = Panel(
                    scores,
                    split,
                    first_row=rows.start,
                    last_row=rows.stop,
                    first_col=cols.start,
                    last_col=cols.stop,
                    norm=call.norm,
                    panel=workspace,
                    stride=width * op.a.element_size() // 8,
                    scale_sums=sums[0],
                    row_sums=sums[1],
                    col_sums=sums[2],
                )
                self._run("panel", panel, op.a)
                diagonal = call.symmetric and row0 == col0
                if scale is not None:
                    # W + Wᵀ has every pair twice; panels off the diagonal stand for two
                    scale[rows].add_(sums[0].sum(0), alpha=0.5 if diagonal else 1.0)
                if row_bias is not None:
                    row_bias[rows] += sums[1].sum(0)
                if col_bias is not None:
                    col_bias[cols] += sums[2].sum(0)
                if workspace is None:
                    continue
                weights = workspace[: size[0], : size[1]]
                if grad_a is not None:
                    accumulate(grad_a[rows], weights, op.b[cols])
                if grad_b is not None and not diagonal:
                    accumulate(grad_b[cols], weights.T, op.a[rows])
        grad_b = None if p.b is None else call.rounded(grad_b)
        return Grads(call.rounded(grad_a), grad_b, scale, row_bias, col_bias)

    # ---- how work is cut

    def _split(self, problem: Problem, triangle: bool) -> Split:
        tile, processors = self._kernels.TILE, self._processors(problem.a.device)
        return _split(-(-problem.n // tile), -(-problem.m // tile), processors, triangle)

    def _panel_split(self, rows: int, cols: int, processors: int) -> Split:
        """One row tile for each block, and enough blocks for eight waves."""
        tile = self._kernels.TILE
        row_groups, tiles = -(-rows // tile), -(-cols // tile)
        col_tiles = -(-tiles // min(tiles, -(-8 * processors // row_groups)))
        return Split(1, col_tiles, row_groups, -(-tiles // col_tiles), False)

    def _panel_size(self, problem: Problem) -> tuple[int, int]:
        """Rows and columns of a W panel, whole tiles: square ones cost the least traffic of the
        gradients, which are read and written once for each panel."""
        tile = self._kernels.TILE
        side = isqrt(PANEL_BYTES // problem.a.element_size()) // tile * tile
        rows, cols = (min(max(side, tile), -(-x // tile) * tile) for x in (problem.n, problem.m))
        return rows, cols

    # ---- the native module

    @property
    def _kernels(self):
        return getattr(_native, self.name)

    def _processors(self, device: torch.device) -> int:
        if device.type == "cpu":
            return 4
        return torch.cuda.get_device_properties(device).multi_processor_count

    def _run(self, kernel: str, struct: tuple, like: Tensor) -> None:
        """On the device of the tensors, which need not be the current one."""
        run, values = getattr(self._kernels, kernel), numbers(struct)
        if not like.is_cuda:
            return run(values, 0, 0)
        with torch.cuda.device(like.device):
            run(values, torch.cuda.current_stream(like.device).cuda_stream, like.device.index)


CUDA = Backend("cuda", "cuda")
SIMT = Backend("simt", "cpu")


@lru_cache(maxsize=256)
def _split(tiles_m: int, tiles_n: int, processors: int, triangle: bool) -> Split:
    """The split with the least work on the busiest processor, then the fewest groups.

    Statistics are kept per row and group of columns, and per column and group of rows: memory is
    O((N + M)·√processors), and nothing is shared between blocks.
    """
    if triangle:

        def cost(groups: int) -> tuple[int, int]:
            waves = -(-(groups * (groups + 1) // 2) // processors)
            return waves * (-(-tiles_m // groups)) ** 2, groups

        most = min(tiles_m, 2 * isqrt(2 * processors) + 1)
        size = -(-tiles_m // min(range(1, most + 1), key=cost))
        groups = -(-tiles_m // size)
        return Split(size, size, groups, groups, True)

    def cut(groups: int) -> Split:
        row_tiles = -(-tiles_m // groups)
        col_tiles = -(-tiles_n // min(tiles_n, processors // groups))
        return Split(
            row_tiles, col_tiles, -(-tiles_m // row_tiles), -(-tiles_n // col_tiles), False
        )

    cuts = [cut(groups) for groups in range(1, min(tiles_m, processors) + 1)]
    return min(cuts, key=lambda s: (s.row_tiles * s.col_tiles, s.row_groups + s.col_groups))


# ---- tensors


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


class _Side(NamedTuple):
    """What backward knows of one side: upstream gradient of logsum, statistics, that of pos."""

    u: Tensor | None = None
    max: Tensor | None = None
    logsum: Tensor | None = None
    alpha: Tensor | None = None
    pos: Tensor | None = None

    def added_to(self, other: _Side) -> _Side:
        """Of a symmetric S: dA takes (W + Wᵀ)·A, and W + Wᵀ is the W of a problem whose two sides
        have the same statistics and the sum of both sides' upstream vectors."""

        def first(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return y if x is None else x

        def total(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return first(x, y) if x is None or y is None else x + y

        return _Side(
            total(self.u, other.u),
            first(self.max, other.max),
            first(self.logsum, other.logsum),
            total(self.alpha, other.alpha),
            first(self.pos, other.pos),
        )

    def vectors(self) -> Vectors:
        """upstream·softmax = factor·e^(S - shift), as (shift, factor)."""
        factors = None
        if self.max is None:
            if self.u is not None:  # softplus
                factors = torch.stack([torch.zeros_like(self.u), self.u], 1)
        elif self.u is not None or self.alpha is not None:
            factor = self.u
            factor = torch.zeros_like(self.max) if factor is None else factor * (-self.logsum).exp()
            empty = self.max == -torch.inf
            factors = torch.stack([self.max.masked_fill(empty, 0), factor.masked_fill(empty, 0)], 1)
        given = factors, self.alpha, self.pos
        return Vectors(*(None if x is None else x.float().contiguous() for x in given))


class _Backward(NamedTuple):
    """What both shapes of backward share."""

    problem: Problem
    op: Operands
    rows: Vectors
    cols: Vectors
    symmetric: bool  # W + Wᵀ is computed, from `rows` alone
    softplus: bool
    norm: Tensor | None

    def exchanged(self) -> _Backward:
        return self._replace(op=self.op.exchanged(), rows=self.cols, cols=self.rows)

    def scores(self, exchanged: bool) -> Scores:
        sides = {"rows": self.rows, "cols": self.cols}
        return Scores.of(
            self.problem, self.op, **sides, softplus=self.softplus, exchanged=exchanged
        )

    def rounded(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if self.norm is None else x * self.norm
        return x.to(self.problem.a.dtype, memory_format=torch.contiguous_format)


def _norm(problem: Problem, rows: _Side, cols: _Side) -> Tensor:
    """A divisor that brings scale·W, of the order of 1/N², into the range of fp16."""
    vectors = [x.abs().max() for x in (rows.u, rows.alpha, cols.u, cols.alpha) if x is not None]
    top = torch.stack([x.float() for x in vectors]).max() * problem.scale.abs().max() / FP16_TOP
    return torch.where((top > 0) & top.isfinite(), top, 1.0)
