"""The backends `cuda` and `simt`: the CUDA C++ kernels of csrc/cuda on a GPU, or on the emulator of
csrc/simt for CPU tensors and tests.

`cuda` is for deployments without Triton's compiler. One forward pass computes the statistics of
both sides. Backward has two forms. For D ≤ 128 in half precision, a fused kernel keeps rows of the
gradient in registers and runs once per side. Otherwise W is written to a bounded workspace, panel
by panel, and the vendor's matrix product computes W·B and Wᵀ·A with fp32 accumulation: 4 matrix
products in all. For a symmetric S half of the tiles are computed.

No atomics are used and sums have a fixed order, so the same inputs should give the same bits on a
device; no GPU has run this yet. Nothing synchronises with the device.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from . import gpu
from .backend import Backend
from .cuda_structs import (
    POSITIVES,
    Forward,
    Gradient,
    Merge,
    Panel,
    Scores,
    arithmetic,
    flatten,
)
from .gpu import Operands, PanelSums, RowGradient, Split, is_symmetric
from .native import _native
from .spec import Grads, Needs, Problem, SideStats, Stats, Upstream


class Cuda(Backend):
    """One of the two backends. `name` is also the name of its part of the native module."""

    native = True

    def __init__(self, name: str, device: str):
        self.name, self.device = name, device

    def missing(self) -> str:
        """Why no kernel can run here; empty if they can."""
        if _native is None:
            return "the native module is missing: see the backend 'cpu'"
        if not hasattr(_native, self.name):
            return "built without the CUDA kernels: ITO_BUILD_CUDA=1 and nvcc build them"
        return getattr(_native, self.name).unavailable()

    def status(self) -> tuple[bool, str]:
        if missing := self.missing():
            return False, missing
        if self.device == "cpu":
            return True, "the CUDA kernels on an emulator, for CPU tensors: only for tests"
        if not torch.cuda.is_available():
            return False, "there is a GPU, but this PyTorch cannot use it"
        if reason := gpu.unsuitable(torch.device("cuda")):
            return False, reason
        return True, torch.cuda.get_device_name()

    def supports(self, problem: Problem) -> tuple[bool, str]:
        device = problem.a.device.type
        if device != self.device or not hasattr(_native, self.name):
            # `missing` queries the driver, which torch.compile cannot trace. It is reached only if
            # the tensors are on another kind of device.
            return False, self.missing() or f"needs {self.device} tensors, got {device}"
        if problem.a.dtype == torch.float64:
            return False, "fp64 is computed by the reference and chunked backends"
        if max(problem.n, problem.m) > 2**30:
            return False, "more than 2^30 rows: the kernels count them in 32 bits"
        if reason := gpu.unsuitable(problem.a.device):
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

    # Forward.

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
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

        def merged(slots: Tensor) -> SideStats:
            _, count, length = slots.shape
            out = p.new_side(length)
            kind = POSITIVES.index(p.positives)
            self._run("merge", Merge(slots, length, count, kind, *out), slots)
            return out

        return gpu.both_sides(p, lambda: merged(row_slots), lambda: merged(col_slots))

    def softplus_forward(self, problem: Problem) -> Tensor:
        op = Operands.of(problem)
        split = self._split(problem, triangle=False)
        slots = _empty(op.a, split.col_groups * self._kernels.WARP_COLS, problem.n)
        scores = Scores.of(problem, op, softplus=True)
        self._run("forward", Forward(scores, split, slots, None), op.a)
        return slots.sum(0)

    # Backward.

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        return self._backward(gpu.Backward.of_logsumexp(problem, stats, upstream), needs)

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        return self._backward(gpu.Backward.of_softplus(problem, u), needs)

    def _backward(self, call: gpu.Backward, needs: Needs) -> Grads:
        return (self._fused_gradients if self._fused(call.problem) else self._panels)(call, needs)

    def _fused(self, problem: Problem) -> bool:
        # in fp32 the three products per element would spill registers
        return problem.a.dtype != torch.float32 and problem.d <= self._kernels.GRADIENT_WIDTH

    def _fused_gradients(self, call: gpu.Backward, needs: Needs) -> Grads:
        d, step = call.problem.d, 16 // call.op.a.element_size()
        norm = call.norm(of_scale=True)

        def run(call: gpu.Backward, transposed: bool, needs: Needs) -> RowGradient:
            like = call.op.a
            n = like.shape[0]
            grad = _empty(like, n, -(-d // step) * step) if needs.a else None
            sums = [_empty(like, n) if x else None for x in (needs.scale, needs.row_bias)]
            if any(needs):
                stride = 0 if grad is None else grad.shape[1] // 2
                scores = _scores(call, transposed)
                self._run("gradient", Gradient(scores, norm, grad, stride, *sums), like)
            return RowGradient(None if grad is None else grad[:, :d], *sums)

        return gpu.fused_gradients(call, needs, run, norm)

    def _panels(self, call: gpu.Backward, needs: Needs) -> Grads:
        like, kernels, tile = call.op.a, self._kernels, self._kernels.TILE
        height, width = self._panel_size(call.problem)
        scores, norm = _scores(call), call.norm(of_scale=True)

        def run(rows: slice, cols: slice, workspace: Tensor | None) -> PanelSums:
            n, m = rows.stop - rows.start, cols.stop - cols.start
            split = self._panel_split(n, m, self._processors(like.device))
            row_slots = split.col_groups * kernels.WARP_COLS, n
            col_slots = split.row_groups * kernels.WARP_ROWS, m
            sums = PanelSums.new(like, needs, row_slots, col_slots)
            panel = Panel(
                scores,
                split,
                first_row=rows.start,
                last_row=rows.stop,
                first_col=cols.start,
                last_col=cols.stop,
                norm=norm,
                panel=workspace,
                stride=width * like.element_size() // 8,
                scale_sums=sums.scale,
                row_sums=sums.row,
                col_sums=sums.col,
            )
            self._run("panel", panel, like)
            return sums

        return gpu.panel_gradients(call, needs, (height, width), (tile, tile), run, norm)

    # The split of work.

    def _split(self, problem: Problem, triangle: bool) -> Split:
        tile, processors = self._kernels.TILE, self._processors(problem.a.device)
        return gpu.split(problem.n, problem.m, tile, tile, processors, triangle)

    def _panel_split(self, rows: int, cols: int, processors: int) -> Split:
        """One row tile per block, and enough blocks for eight waves."""
        tile = self._kernels.TILE
        row_groups, tiles = -(-rows // tile), -(-cols // tile)
        col_tiles = -(-tiles // min(tiles, -(-8 * processors // row_groups)))
        return Split(1, col_tiles, row_groups, -(-tiles // col_tiles), False)

    def _panel_size(self, problem: Problem) -> tuple[int, int]:
        """Rows and columns of a W panel, in whole tiles.

        Gradients are read and written once per panel. Square panels minimise this traffic.
        """
        tile = self._kernels.TILE
        side = isqrt(gpu.PANEL_BYTES // problem.a.element_size()) // tile * tile
        rows, cols = (min(max(side, tile), -(-x // tile) * tile) for x in (problem.n, problem.m))
        return rows, cols

    # The native module.

    @property
    def _kernels(self):
        return getattr(_native, self.name)

    def _processors(self, device: torch.device) -> int:
        if device.type == "cpu":
            return 4
        return torch.cuda.get_device_properties(device).multi_processor_count

    def _run(self, kernel: str, struct: tuple, like: Tensor) -> None:
        """Launch a kernel on the device of the tensors, which may not be the current device."""
        run, values = getattr(self._kernels, kernel), flatten(struct)
        if not like.is_cuda:
            return run(values, 0, 0)
        with torch.cuda.device(like.device):
            run(values, torch.cuda.current_stream(like.device).cuda_stream, like.device.index)


CUDA = Cuda("cuda", "cuda")
SIMT = Cuda("simt", "cpu")


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _scores(call: gpu.Backward, transposed: bool = False) -> Scores:
    return Scores.of(
        call.problem,
        call.op,
        row=call.row.vectors(),
        col=call.col.vectors(),
        softplus=call.softplus,
        transposed=transposed,
    )
