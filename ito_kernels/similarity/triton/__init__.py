"""The backend `triton`. Triton is imported when the first kernel is needed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import gpu
from ..backend import Backend
from ..budget import count_as_kept
from ..spec import Grads, Needs, Problem, Stats, Upstream

MIN_TRITON = (3, 6)  # the oldest version that is tested
_INSTALLED = find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str:
    """Why no kernel can run here, whatever the GPU; empty if one can."""
    if not _INSTALLED:
        return "the triton package is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    try:
        import triton
    except ImportError as error:
        return f"the triton package cannot be imported: {error}"
    if gpu.older(triton.__version__, MIN_TRITON):
        return f"needs Triton {MIN_TRITON[0]}.{MIN_TRITON[1]}, got {triton.__version__}"
    return ""


# torch.compile uses the value at compilation; it cannot trace the import
_missing._dynamo_marked_constant = True


class Triton(Backend):
    name = "triton"
    priority = 2
    device = "cuda"

    def status(self) -> tuple[bool, str]:
        if reason := _missing():
            return False, reason
        if _interpreted():
            return True, "interpreted on the CPU: TRITON_INTERPRET=1"
        if reason := gpu.unsuitable(torch.device("cuda")):
            return False, reason
        return True, torch.cuda.get_device_name()

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if reason := _missing():
            return False, reason
        if problem.a.dtype == torch.float64:
            return False, "fp64 is computed by the reference and chunked backends"
        if problem.a.device.type == "cpu" and not _interpreted():
            return False, "CPU tensors need TRITON_INTERPRET=1 in the environment"
        if problem.a.device.type not in ("cpu", "cuda"):
            return False, f"no tiles for {problem.a.device.type} devices"
        if reason := gpu.unsuitable(problem.a.device):
            return False, reason
        if max(problem.n, problem.m) > 2**30:  # a group of rows may end beyond the last one
            return False, "more than 2^30 rows: the kernels count them in 32 bits"
        return True, "a GPU" if problem.a.is_cuda else "TRITON_INTERPRET=1"

    @property
    def _host(self):
        from . import host

        return host

    def missed(self, problem: Problem) -> str:
        reason = _missing() or gpu.unsuitable(problem.a.device)
        if not reason or problem.a.dtype == torch.float64:
            return ""
        return f"ito_kernels runs without its Triton kernels, in plain PyTorch: {reason}"

    def describe(self, problem: Problem) -> str:
        return self._host.describe(problem)

    def cache_bytes(self, problem: Problem) -> int:
        """Memory for exponentials that are kept for the gradients: see `kept.size`. None in a
        compiled call, in which the memory that is free cannot be asked for."""
        return 0 if torch.compiler.is_compiling() else self._host.cache_bytes(problem)

    def new_cache(self, problem: Problem, size: int) -> Tensor:
        return count_as_kept(super().new_cache(problem, size))

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
        return self._host.logsumexp_forward(problem, cache)

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        return self._host.logsumexp_backward(problem, stats, upstream, needs, cache)

    def logsumexp_both(
        self, problem: Problem, with_stats: bool, upstream: Upstream, needs: Needs
    ) -> tuple[Tensor, Stats, Grads]:
        from . import small

        if small.fits(problem, upstream):
            return small.both(problem, with_stats, upstream, needs)
        return super().logsumexp_both(problem, with_stats, upstream, needs)

    def softplus_forward(self, problem: Problem) -> Tensor:
        return self._host.softplus_forward(problem)

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        return self._host.softplus_backward(problem, u, needs)

    def softplus_both(self, problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
        return self._host.softplus_both(problem, u, needs)
