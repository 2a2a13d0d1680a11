"""Chunks of all ranks' keys: what a transport brings to every rank, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..similarity.budget import byte_budget

GATHER_CACHE_BYTES = 64 << 20


class Chunk(NamedTuple):
    """A part of the keys of some ranks, one owner's after the other's.

    owners: the ranks. part: the rows of each of them. keys: (owners·part, D), zeros where an owner
        has fewer.
    """

    owners: slice
    part: slice
    keys: Tensor

    @property
    def step(self) -> int:
        return self.part.stop - self.part.start


class Transport(Protocol):
    """All-gathers keys chunk by chunk, and reduce-scatters their gradients."""

    def all_gather_chunks(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        """This rank's keys and those of all others, each once; the next chunk travels while this
        one is used. `kept`: the keys of the first chunks, from an earlier pass over them."""

    def reduce_scatter_grads(self, out: Tensor) -> GradReduceScatter:
        """For one pass over the chunks. `out`: memory for the gradients of this rank's keys, as
        many as the rank with the most keys has."""


class GradReduceScatter(Protocol):
    def send(self, chunk: Chunk, grads: Tensor) -> None:
        """This rank's gradients of the chunk that the pass is at, in the dtype of `out`. They
        travel while the next are computed."""

    def result(self) -> Tensor:
        """`out`, the sums over ranks for this rank's keys."""


def flat(x: Tensor) -> Tensor:
    """Contiguous, which `flatten` is not where one size is 1."""
    return x.contiguous().view(-1)


def parts(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def padded(keys: Tensor, part: slice) -> Tensor:
    """A part of this rank's keys, with zeros where there are none."""
    x = keys[part]
    missing = part.stop - part.start - len(x)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x.contiguous()


class Kept:
    """The first chunks of keys, as many as the budget holds, for backward."""

    def __init__(self, wanted: bool):
        self.chunks, self.budget = [], gather_cache_bytes() if wanted else 0

    def offer(self, keys: Tensor) -> None:
        self.budget -= keys.nbytes
        if self.budget >= 0:
            self.chunks.append(keys)


def gather_cache_bytes() -> int:
    return byte_budget("ITO_GATHER_CACHE_BYTES", GATHER_CACHE_BYTES)
