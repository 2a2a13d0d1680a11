"""Which backend computes a problem.

A backend asked for by name runs, or the call raises an error. Without a name, the backend with the
highest priority that supports the problem is chosen.
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
_BY_PRIORITY = sorted(
    (backend for backend in REGISTRY.values() if backend.priority is not None),
    key=lambda backend: -backend.priority,
)


class _Block:
    """A `use_backend` block.

    The block may be left in another context than it was entered in (by an async generator, or in
    another thread). The context variable cannot be reset there, so the block stores whether it is
    still open.
    """

    def __init__(self, name: str):
        self.name, self.open = name, True


# the blocks entered in this thread or task, innermost last
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("use_backend", default=())


class BackendStatus(NamedTuple):
    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """Which backends can run here, and why the others cannot: {name: (available, detail)}."""
    ordered = sorted(REGISTRY.values(), key=lambda backend: backend.native)
    return {backend.name: BackendStatus(*backend.status()) for backend in ordered}


def _automatic(problem: Problem) -> list[Backend]:
    """The backends to choose from for the problem's device, in order of preference."""
    device = problem.a.device.type
    return [backend for backend in _BY_PRIORITY if backend.device in (None, device)]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls inside the block use the backend `name`, unless they name one themselves.

    The block applies to the current thread or asyncio task only. It does not apply to threads
    started inside it, nor to PyTorch's backward threads on a GPU: if activation checkpointing
    recomputes a loss there, name the backend in the call. Functions compiled by torch.compile
    before the block keep the backend they were compiled with.

    Raises ValueError for an unknown name.
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
    """The backend that runs `problem`: the one given by `name`, else by the innermost `use_backend`
    block, else by the environment variable ITO_BACKEND, else the automatic choice.

    Raises ValueError for an unknown name, and RuntimeError with the reason for a backend that
    cannot run the problem.
    """
    name, source = requested(name)
    if name is None:
        device = problem.a.device.type
        for backend in _BY_PRIORITY:
            if backend.device not in (None, device):
                continue
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
    """Warns once per process."""
    warnings.warn(warning, stacklevel=2)


def _chosen_here() -> str | None:
    blocks = _blocks.get()
    return next((block.name for block in reversed(blocks) if block.open), None) if blocks else None


# torch.compile cannot trace a ContextVar: it uses the value at compilation. This attribute is what
# torch.compiler.assume_constant_result sets; that function would import dynamo, which takes 2 s.
_chosen_here._dynamo_marked_constant = True


def requested(name: str | None) -> tuple[str | None, str]:
    """The name of the backend asked for (None: automatic choice) and where it was given."""
    if name is not None:
        return name, "the call"
    if chosen := _chosen_here():
        return chosen, "use_backend"
    if "ITO_BACKEND" in os.environ:  # half the time of `get`
        name = os.environ["ITO_BACKEND"] or None
    return name, "ITO_BACKEND"


def why(problem: Problem, name: str | None = None) -> str:
    """Why this backend is chosen, as text."""
    name, source = requested(name)
    if name is not None:
        return f"asked for by {source}"
    passed = []
    choice = _automatic(problem)
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
