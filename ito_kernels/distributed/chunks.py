"""Chunks of the keys of all ranks, the interface of the transports, and the cache of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..similarity.budget import byte_budget

GATHER_CACHE_BYTES = 64 << 20


class Chunk(NamedTuple):
    """The same part of the keys of one or more ranks.

    owners: these ranks. part: the range of local row numbers, the same for each of them.
    keys: (owners·part, D), ordered by owner; zeros beyond the last row of an owner.
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
        """Iterate over the keys of all ranks, each once. The next chunk is transferred while the
        current one is used.

        kept: the keys of the first chunks, cached in an earlier pass.
        """

    def reduce_scatter_grads(self, out: Tensor) -> GradReduceScatter:
        """Start a reduce-scatter of gradients for one pass over the chunks.

        out: memory for the gradients of this rank's keys, (max_count, D), where max_count is the
            largest number of keys of a rank.
        """


class GradReduceScatter(Protocol):
    def send(self, chunk: Chunk, grads: Tensor) -> None:
        """Send this rank's gradients of the current chunk, in the dtype of `out`. They are
        transferred while the next ones are computed."""

    def result(self) -> Tensor:
        """Wait for the sums over ranks of the gradients of this rank's keys, and return `out`."""


def flat(x: Tensor) -> Tensor:
    """A contiguous 1-d view. `flatten` may return a non-contiguous one if a size is 1."""
    return x.contiguous().view(-1)


def parts(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def padded(keys: Tensor, part: slice) -> Tensor:
    """A part of this rank's keys, padded with zeros to its full length."""
    x = keys[part]
    missing = part.stop - part.start - len(x)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x.contiguous()


class ChunkCache:
    """Keeps the first chunks of keys for backward, up to ITO_GATHER_CACHE_BYTES."""

    def __init__(self, enabled: bool):
        self.chunks, self.budget = [], gather_cache_bytes() if enabled else 0

    def offer(self, keys: Tensor) -> None:
        self.budget -= keys.nbytes
        if self.budget >= 0:
            self.chunks.append(keys)


def gather_cache_bytes() -> int:
    return byte_budget("ITO_GATHER_CACHE_BYTES", GATHER_CACHE_BYTES)
