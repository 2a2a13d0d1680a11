"""The backends `cuda` and `simt`: the CUDA C++ kernels of csrc/cuda on a GPU, or on the emulator of
csrc/simt for CPU tensors and tests.

`cuda` is for deployments without Triton's compiler. One forward pass computes the statistics of
both sides. Backward has two forms. For D ≤ 128 in half precision, a fused kernel keeps rows of the
gradient in registers and runs once per side. Otherwise W is written to a bounded workspace, panel
by panel, and the vendor's matrix product computes W·B and Wᵀ·A with fp32 accumulation: 4 matrix
products in all. For a symmetric S half of the tiles are computed.

In half precision one exponential per score serves both sides: see `gpu.fixed_shift`. In fp32 each
side has its own, and its own forward pass: see `gpu.needs_maxima`. Sums have a fixed order, so the
same inputs should give the same bits on a device; no GPU has run this yet. Nothing waits for the
device.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from . import gpu
from .backend import Backend
from .cuda_structs import (
    POSITIVES,
    Fallback,
    Forward,
    Gradient,
    Merge,
    Panel,
    Scores,
    arithmetic,
    flatten,
)
from .gpu import Operands, PanelSums, RowGradient, Split, Weights, is_symmetric
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
        if gpu.needs_maxima(p):
            return gpu.both_sides(
                p, lambda: self._maxima(p, op, False), lambda: self._maxima(p, op, True)
            )
        symmetric = is_symmetric(p)
        split = self._split(p, symmetric)
        fields = kernels.FIELDS if p.positives else 1

        def slots(groups: int, length: int) -> Tensor:
            return _empty(op.a, fields, groups * kernels.SLOTS, length).zero_()

        row_slots = slots(split.col_groups, p.n) if p.rows or symmetric else None
        col_slots = row_slots
        if not symmetric:
            col_slots = slots(split.row_groups, p.m) if p.cols else None
        shift = gpu.fixed_shift(p, op)
        scores = Scores.of(p, op, Weights(shift))
        self._run("forward", Forward(scores, split, row_slots, col_slots), op.a)

        def merged(transposed: bool) -> SideStats:
            slots = col_slots if transposed else row_slots
            _, count, length = slots.shape
            out = p.new_side(length)
            merge = Merge(
                slots=slots,
                length=length,
                count=count,
                positives=POSITIVES.index(p.positives),
                biased=p.row_bias is not None or p.col_bias is not None,
                ids=op.col_ids if transposed else op.row_ids,
                shift=shift,
                out=out,
                underflowed=torch.empty_like(out.max, dtype=torch.int32),
            )
            self._run("merge", merge, slots)
            return self._maxima(p, op, transposed, merge.underflowed, out)

        return gpu.both_sides(p, lambda: merged(False), lambda: merged(True))

    def _maxima(
        self,
        problem: Problem,
        op: Operands,
        transposed: bool,
        underflowed: Tensor | None = None,
        out: SideStats | None = None,
    ) -> SideStats:
        """The statistics of one side with true maxima: of all rows, or in `out` of those that have
        underflowed."""
        op = op.transposed() if transposed else op
        n = op.a.shape[0]
        out = problem.new_side(n) if out is None else out
        scores = Scores.of(problem, op, transposed=transposed)
        slots = _empty(op.a, self._kernels.FALLBACK_FIELDS, self._kernels.SLOTS, n)
        self._run("fallback", Fallback(scores, underflowed, slots, out), op.a)
        return out

    def softplus_forward(self, problem: Problem) -> Tensor:
        op = Operands.of(problem)
        split = self._split(problem, triangle=False)
        slots = _empty(op.a, split.col_groups * self._kernels.WARP_COLS, problem.n).zero_()
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
        norm, factor = call.scaling()
        weights = call.weights(norm)

        def run(call: gpu.Backward, transposed: bool, needs: Needs) -> RowGradient:
            like = call.op.a
            n = like.shape[0]
            grad = _empty(like, n, -(-d // step) * step) if needs.a else None
            sums = [_empty(like, n) if x else None for x in (needs.scale, needs.row_bias)]
            if any(needs):
                stride = 0 if grad is None else grad.shape[1] // 2
                scores = Scores.of(
                    call.problem,
                    call.op,
                    weights.transposed() if transposed else weights,
                    softplus=call.softplus,
                    transposed=transposed,
                )
                self._run("gradient", Gradient(scores, grad, stride, *sums), like)
            return RowGradient(None if grad is None else grad[:, :d], *gpu.restored(sums, norm))

        return gpu.fused_gradients(call, needs, run, factor)

    def _panels(self, call: gpu.Backward, needs: Needs) -> Grads:
        like, kernels, tile = call.op.a, self._kernels, self._kernels.TILE
        height, width = self._panel_size(call.problem)
        norm, factor = call.scaling()
        scores = Scores.of(call.problem, call.op, call.weights(norm), softplus=call.softplus)

        def run(rows: slice, cols: slice, workspace: Tensor | None) -> PanelSums:
            n, m = rows.stop - rows.start, cols.stop - cols.start
            split = self._panel_split(n, m, self._processors(like.device))
            row_slots = split.col_groups * kernels.WARP_COLS, n
            col_slots = split.row_groups * kernels.WARP_ROWS, m
            sums = PanelSums.new(like, needs, row_slots, col_slots)
            if sums.col is not None:
                sums.col.zero_()
            panel = Panel(
                scores,
                split,
                first_row=rows.start,
                last_row=rows.stop,
                first_col=cols.start,
                last_col=cols.stop,
                panel=workspace,
                stride=width * like.element_size() // 8,
                scale_sums=sums.scale,
                row_sums=sums.row,
                col_sums=sums.col,
            )
            self._run("panel", panel, like)
            return PanelSums(*gpu.restored(sums, norm))

        return gpu.panel_gradients(call, needs, (height, width), (tile, tile), run, factor)

    # The split of work.

    def _split(self, problem: Problem, triangle: bool) -> Split:
        tile, processors = self._kernels.TILE, self._processors(problem.a.device)
        return gpu.split(problem.n, problem.m, tile, tile, processors, triangle)

    def _panel_split(self, rows: int, cols: int, processors: int) -> Split:
        """One column tile per block, and enough blocks for eight waves."""
        tile = self._kernels.TILE
        col_groups, tiles = -(-cols // tile), -(-rows // tile)
        row_tiles = -(-tiles // min(tiles, -(-8 * processors // col_groups)))
        return Split(row_tiles, 1, -(-tiles // row_tiles), col_groups, False)

    def _panel_size(self, problem: Problem) -> tuple[int, int]:
        """Rows and columns of a W panel, in whole tiles.

        Gradients are read and written once per panel. Square panels minimise this traffic.
        """
        tile = self._kernels.TILE
        side = isqrt(gpu.panel_elements(problem)) // tile * tile
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
