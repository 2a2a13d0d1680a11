"""The transport of collectives: an all-gather for each chunk of keys, a reduce-scatter back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from .chunks import Chunk, padded, parts
from .collectives import Started, all_gather, reduce_scatter


class Gather:
    """A chunk is the same part of all ranks' keys, `chunk_size` of them in all."""

    def __init__(self, group: dist.ProcessGroup, max_keys: int, chunk_size: int):
        self.group, self.size = group, dist.get_world_size(group)
        self.parts = parts(max_keys, min(-(-chunk_size // self.size), max_keys))

    def all_gather_chunks(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        all_ranks = slice(0, self.size)
        for part, x in zip(self.parts, kept, strict=False):
            yield Chunk(all_ranks, part, x)
        rest = self.parts[len(kept) :]
        coming = self._start(keys, rest[0]) if rest else None
        for part, after in zip(rest, [*rest[1:], None], strict=False):
            x = coming.wait()
            coming = None if after is None else self._start(keys, after)
            yield Chunk(all_ranks, part, x)

    def _start(self, keys: Tensor, part: slice) -> Started:
        x = padded(keys, part)
        out = x.new_empty(self.size * len(x), x.shape[1])
        what = f"all-gather of keys {part.start} to {part.stop} of each rank"
        return Started(what, all_gather, out, x, self.group)

    def reduce_scatter_grads(self, out: Tensor) -> ReduceScatters:
        return ReduceScatters(self.group, out)


class ReduceScatters:
    """One for each chunk."""

    def __init__(self, group: dist.ProcessGroup, out: Tensor):
        self.group, self.out, self.pending = group, out, None

    def send(self, chunk: Chunk, grads: Tensor) -> None:
        part = chunk.part
        if self.pending is not None:
            self.pending.wait()
        what = f"reduce-scatter of the gradients of keys {part.start} to {part.stop} of each rank"
        self.pending = Started(what, reduce_scatter, self.out[part], grads, self.group)

    def result(self) -> Tensor:
        self.pending.wait()
        return self.out
