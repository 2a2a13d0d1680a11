"""Which backend computes a problem.

A backend asked for by name runs or raises; only the automatic choice looks further: the first, by
priority, of those that can.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from .backend import Backend
from .chunked import Chunked
from .cpu import Cpu
from .cuda import CUDA, SIMT
from .reference import Reference
from .spec import Problem
from .triton import Triton

REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (Reference(), Chunked(), Cpu(), Triton(), CUDA, SIMT)
}


class _Block:
    """A `use_backend` block. It may be left in another context than it was entered in (an async
    generator's, another thread's), where the variable cannot be set back: it says so itself."""

    def __init__(self, name: str):
        self.name, self.open = name, True


# the blocks that were entered in this thread or task, the innermost last
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("use_backend", default=())


class BackendStatus(NamedTuple):
    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """What can run here, and why the rest cannot: {name: (available, detail)}."""
    ordered = sorted(REGISTRY.values(), key=lambda backend: backend.native)
    return {backend.name: BackendStatus(*backend.status()) for backend in ordered}


@cache
def _automatic(device: str) -> tuple[Backend, ...]:
    """The backends to choose from for tensors on a kind of device, in order of preference."""
    found = [x for x in REGISTRY.values() if x.priority is not None and x.device in (None, device)]
    return tuple(sorted(found, key=lambda backend: -backend.priority))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls inside the block use the backend `name` unless they name one themselves.

    Calls of this thread (or asyncio task) only: others keep their own choice, and a thread that is
    started inside the block starts without one, as do those in which PyTorch runs backward on a GPU
    (a checkpointed forward that is computed again there: name the backend in the call).
    Calls that torch.compile has compiled before keep the backend they were compiled with.
    """
    check_name(name)
    block = _Block(name)
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    finally:
        block.open = False
        _blocks.set(tuple(other for other in _blocks.get() if other.open))


def load(name: str) -> Backend:
    return REGISTRY[name]


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The backend that runs `problem`.

    In this order: `name`, the innermost `use_backend`, the environment's ITO_BACKEND, the first
    that supports the problem. Raises ValueError for an unknown name and RuntimeError, with the
    reason, for one that cannot run.
    """
    name, source = requested(name)
    if name is None:
        for backend in _automatic(problem.a.device.type):
            if backend.supports(problem)[0]:
                return backend
            if not torch.compiler.is_compiling() and (warning := backend.missed(problem)):
                _warn_once(warning)
    said = f"{source}: " if source == "ITO_BACKEND" else ""
    check_name(name, said)
    ok, reason = REGISTRY[name].supports(problem)
    if not ok:
        raise RuntimeError(f"{said}backend {name!r} cannot run: {reason}")
    return REGISTRY[name]


@cache
def _warn_once(warning: str) -> None:
    """Once in a process."""
    warnings.warn(warning, stacklevel=2)


def _chosen_here() -> str | None:
    blocks = _blocks.get()
    return next((block.name for block in reversed(blocks) if block.open), None) if blocks else None


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
    choice = _automatic(problem.a.device.type)
    for backend in choice:
        ok, reason = backend.supports(problem)
        if ok:
            break
        passed.append(f"{backend.name} cannot: {reason}")
    names = ", ".join(backend.name for backend in choice)
    return "; ".join([f"the first of {names} that can run this", *passed])


def check_name(name: str, said: str = "") -> None:
    if name not in REGISTRY:
        raise ValueError(f"{said}unknown backend {name!r}: expected one of {', '.join(REGISTRY)}")
