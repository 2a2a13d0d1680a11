"""Which backend computes a problem.

A backend is a module with `supports(problem) -> (ok, reason)`, `describe(problem) -> str` and the
four functions `logsumexp_forward`, `logsumexp_backward`, `softplus_forward`, `softplus_backward`.
It may have `logsumexp_both` and `softplus_both`, forward and backward in one call, and
`cache_bytes(problem)`, memory that forward fills for backward. A new one is a file and a line in
`REGISTRY`.

A backend asked for by name runs or raises; only the automatic choice looks further.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from . import chunked, cpu, cuda, reference
from .spec import Problem


class _Later:
    """A backend whose import is heavy: imported when it is first used."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str):
        return getattr(import_module(self._module, __package__), name)


REGISTRY: dict[str, ModuleType | _Later] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": _Later(".triton"),
    "cuda": cuda.CUDA,
    "simt": cuda.SIMT,
}

# of the innermost `use_backend` block that is open in this thread or task
_chosen: ContextVar[str | None] = ContextVar("use_backend", default=None)


class BackendStatus(NamedTuple):
    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """What can run here, and why the rest cannot: {name: (available, detail)}."""
    plain = BackendStatus(True, "plain PyTorch, any device")
    status = {"reference": plain, "chunked": plain, "triton": _triton()}
    if cpu.MISSING:
        native = cpu.MISSING
    else:
        info, build = cpu._native.cpu_info(), cpu._native.build_info()
        native = (
            f"kernels for {', '.join(cpu.instruction_sets())}, built by {build['compiler']}; found"
            f" {info['arch']} with {', '.join(info['features']) or 'no vector extensions'},"
            f" {info['logical_cores']} cores, L2 {info['l2_bytes'] >> 10} KiB,"
            f" L3 {info['l3_bytes'] >> 10} KiB"
        )
    status["cpu"] = BackendStatus(not cpu.MISSING, native)
    for backend in (cuda.CUDA, cuda.SIMT):
        status[backend.name] = BackendStatus(*backend.status())
    return status


def _triton() -> BackendStatus:
    if find_spec("triton") is None:
        return BackendStatus(False, "the triton package is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendStatus(True, "interpreted on the CPU: TRITON_INTERPRET=1")
    if not torch.cuda.is_available():
        return BackendStatus(False, "there is no CUDA device, and TRITON_INTERPRET=1 is not set")
    return BackendStatus(True, torch.cuda.get_device_name())


def _automatic(problem: Problem) -> tuple[str, ...]:
    """The backends to choose from, in order of preference."""
    if problem.a.is_cuda and _triton().available:
        return "triton", "chunked"
    return "cpu", "chunked"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls inside the block use the backend `name` unless they name one themselves.

    Calls of this thread (or asyncio task) only: others keep their own choice, and a thread that is
    started inside the block starts without one. Calls that torch.compile has compiled before keep
    the backend they were compiled with.
    """
    check_name(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def load(name: str) -> ModuleType:
    return REGISTRY[name]


def choose(problem: Problem, name: str | None = None) -> str:
    """The name of the backend that runs `problem`.

    In this order: `name`, the innermost `use_backend`, the environment's ITO_BACKEND, the first
    that supports the problem. Raises ValueError for an unknown name and RuntimeError, with the
    reason, for one that cannot run.
    """
    name, source = requested(name)
    if name is None:
        name = next(name for name in _automatic(problem) if REGISTRY[name].supports(problem)[0])
        kernels_wanted = cpu.MISSING and problem.a.is_cpu and problem.a.dtype in cpu.DTYPES
        if kernels_wanted and not torch.compiler.is_compiling():
            _warn_of_slow_kernels()
        return name
    said = f"{source}: " if source == "ITO_BACKEND" else ""
    check_name(name, said)
    if name == "triton" and not _triton().available:
        ok, reason = _triton()
    else:
        ok, reason = REGISTRY[name].supports(problem)
    if not ok:
        raise RuntimeError(f"{said}backend {name!r} cannot run: {reason}")
    return name


@cache
def _warn_of_slow_kernels() -> None:
    """Once in a process."""
    warnings.warn(
        f"ito_kernels runs without its CPU kernels, several times slower: {cpu.MISSING}",
        stacklevel=2,
    )


def _chosen_here() -> str | None:
    return _chosen.get()


# torch.compile cannot trace a ContextVar: it takes the value that the function has at compilation.
# As torch.compiler.assume_constant_result says it, which would import dynamo: 2 s.
_chosen_here._dynamo_marked_constant = True


def requested(name: str | None) -> tuple[str | None, str]:
    """The backend that was asked for, None if the choice is automatic, and by what."""
    if name is not None:
        return name, "the call"
    if chosen := _chosen_here():
        return chosen, "use_backend"
    return os.environ.get("ITO_BACKEND") or None, "ITO_BACKEND"


def why(problem: Problem, name: str | None = None) -> str:
    """The reason for the choice, in words."""
    name, source = requested(name)
    if name is not None:
        return f"asked for by {source}"
    passed = []
    for name in _automatic(problem):
        ok, reason = REGISTRY[name].supports(problem)
        if ok:
            break
        passed.append(f"{name} cannot: {reason}")
    return "; ".join([f"the first of {', '.join(_automatic(problem))} that can run this", *passed])


def check_name(name: str, said: str = "") -> None:
    if name not in REGISTRY:
        raise ValueError(f"{said}unknown backend {name!r}: expected one of {', '.join(REGISTRY)}")
