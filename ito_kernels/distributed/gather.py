"""The transport "gather": an all-gather per chunk of keys, a reduce-scatter for its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from .chunks import Chunk, padded, parts
from .collectives import Started, all_gather, reduce_scatter


class Gather:
    """A chunk is the same part of the keys of all ranks, `chunk_size` keys in total."""

    def __init__(self, group: dist.ProcessGroup, max_keys: int, chunk_size: int):
        self.group, self.size = group, dist.get_world_size(group)
        self.parts = parts(max_keys, min(-(-chunk_size // self.size), max_keys))

    def all_gather_chunks(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        all_ranks = slice(0, self.size)
        for part, x in zip(self.parts, kept, strict=False):
            yield Chunk(all_ranks, part, x)
        rest = self.parts[len(kept) :]
        in_flight = self._start(keys, rest[0]) if rest else None
        for part, following in zip(rest, [*rest[1:], None], strict=False):
            x = in_flight.wait()
            in_flight = None if following is None else self._start(keys, following)
            yield Chunk(all_ranks, part, x)

    def _start(self, keys: Tensor, part: slice) -> Started:
        x = padded(keys, part)
        out = x.new_empty(self.size * len(x), x.shape[1])
        name = f"all-gather of keys {part.start} to {part.stop} of each rank"
        return Started(name, all_gather, out, x, self.group)

    def reduce_scatter_grads(self, out: Tensor) -> ReduceScatters:
        return ReduceScatters(self.group, out)


class ReduceScatters:
    """One reduce-scatter per chunk, at most one in flight."""

    def __init__(self, group: dist.ProcessGroup, out: Tensor):
        self.group, self.out, self.pending = group, out, None

    def send(self, chunk: Chunk, grads: Tensor) -> None:
        part = chunk.part
        if self.pending is not None:
            self.pending.wait()
        name = f"reduce-scatter of the gradients of keys {part.start} to {part.stop} of each rank"
        self.pending = Started(name, reduce_scatter, self.out[part], grads, self.group)

    def result(self) -> Tensor:
        self.pending.wait()
        return self.out
