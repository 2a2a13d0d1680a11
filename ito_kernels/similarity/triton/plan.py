"""With which arithmetic, tiles and programs does a call run, on which architecture?

With ITO_TRITON_AUTOTUNE=1 in the environment, the first call for a kernel, dtype and size (rounded
up to powers of two) times a few tiles similar to the table's and keeps the fastest. That call
synchronises, so it cannot be captured. Another process may choose another tile, which changes the
last bits of the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import gpu
from ..gpu import Split, is_symmetric
from ..spec import Problem
from . import forward, tiles

INTERPRETED = not isinstance(forward.sums_kernel, triton.JITFunction)


class Plan:
    """What a call uses, independent of tensor values: architecture, arithmetic, tiles, programs."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.arch, self.processors = tiles.device(problem.a.device)
        self.arithmetic = arithmetic_of(problem)
        if self.arithmetic not in self.arch.forward:
            self.arithmetic = "ieee"  # no 3×tf32 on this architecture
        by_ids = problem.row_ids is not None
        self.forward, self.panel = (
            (self.arch.ids if by_ids else x)[self.arithmetic]
            for x in (self.arch.forward, self.arch.panel)
        )
        self.maxima = self.arch.maxima[self.arithmetic]
        self.gradient = None
        if problem.d <= tiles.FUSED_D and not problem.half_values:  # tf32 would round W
            self.gradient = self.arch.gradient.get(self.arithmetic)
            if self.gradient and self.crowded() > 2:
                self.gradient = self.arch.crowded.get(self.arithmetic, self.gradient)
        for kernel in ("forward", "panel", "gradient"):
            if tile := getattr(self, kernel):
                setattr(self, kernel, _TUNED.get(self.key(kernel), tile))

    def key(self, kernel: str) -> tuple:
        p = self.problem
        sizes = (triton.next_power_of_2(x) for x in (p.n, p.m, p.d))
        return kernel, self.arch.name, p.a.dtype, self.arithmetic, p.row_ids is not None, *sizes

    def describe_tile(self, kernel: str) -> str:
        m, n, k, warps, stages = getattr(self, kernel)
        source = "tuned" if self.key(kernel) in _TUNED else "from the table"
        return f"{m} x {n} x {k}, {warps} warps, {stages} stages ({source})"

    def crowded(self, softplus: bool = False) -> int:
        """How many kinds of options take registers beside those of the plain losses."""
        p = self.problem
        biased = p.row_bias is not None or p.col_bias is not None
        masks = p.exclude_self + (p.positives == "lse") + (softplus and p.row_ids is not None)
        return masks + (p.scale.ndim > 0 or p.row_limit is not None or biased)

    def panel_size(self) -> tuple[int, int]:
        p = self.problem
        elements = gpu.panel_elements(p)
        return tiles.panel(p.n, p.m, p.d, elements, self.processors, is_symmetric(p))

    def split(self, triangle: bool = True) -> Split:
        p, tile = self.problem, self.forward
        return gpu.split(p.n, p.m, tile.m, tile.n, self.processors, triangle and is_symmetric(p))


_TUNED: dict[tuple, tiles.Tile] = {}


def _autotuned(choose: Callable[..., str]) -> Callable:
    """Decorate a function of a problem so that it autotunes the tile of a kernel.

    choose: returns the name of the kernel that the function runs, given its plan and arguments; ""
        for one that is not tuned.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(problem: Problem, *args):
            if os.environ.get("ITO_TRITON_AUTOTUNE") == "1":
                plan = Plan(problem)
                kernel = choose(plan, *args)
                key = plan.key(kernel)
                if kernel and key not in _TUNED:
                    times = {}
                    try:
                        for tile in tiles.tuning_candidates(getattr(plan, kernel)):
                            _TUNED[key] = tile
                            # a tile may need more shared memory than the device has
                            with suppress(OutOfResources), device_context(problem.a.device):
                                times[tile] = _milliseconds(lambda: function(problem, *args))
                    finally:
                        del _TUNED[key]
                    _TUNED[key] = min(times, key=times.get)
            return function(problem, *args)

        return run

    return decorate


def _kernel_of_backward(plan: Plan, *args) -> str:
    """Panels from kept exponentials, the last argument, have no tile to tune."""
    return "gradient" if plan.gradient else "" if isinstance(args[-1], Tensor) else "panel"


autotuned_forward = _autotuned(lambda plan, *_: "" if gpu.needs_maxima(plan.problem) else "forward")
autotuned_softplus = _autotuned(lambda plan: "forward")
autotuned_backward = _autotuned(_kernel_of_backward)


def _milliseconds(run: Callable[[], object]) -> float:
    if INTERPRETED:  # times are meaningless: equal ones keep the first tile, the table's
        return 0.0
    return triton.testing.do_bench(run, return_mode="median")


def arithmetic_of(problem: Problem) -> str:
    """The arithmetic of the scores, in forward and backward, and of a fused gradient.

    "half" for bf16 and fp16. fp32 features with such values (`half_values`) are exact in tf32: they
    take one product too.

    For fp32 it follows `torch.set_float32_matmul_precision`: "highest" is ieee; "high" is 3×tf32,
    which has nearly the accuracy of fp32 on tensor cores; "medium" is tf32. Outside the fused
    gradient, the products W·B and Wᵀ·A are PyTorch's own, and on a GPU tf32 at "high" too.
    """
    if problem.a.dtype != torch.float32:
        return "half"
    if problem.half_values:
        return "tf32"
    modes = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
    return modes[gpu.matmul_precision()]


def device_context(device: torch.device) -> AbstractContextManager:
    """Make the device of the tensors the current one for a launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
