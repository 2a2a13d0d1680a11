"""The transport of neighbours: every rank passes on to the next what it got from the one before.

At step t of W a rank has the keys of the rank t before it, and sends them on while it uses them.
Their gradients start at the rank after the owner and follow, each rank adding its own, and reach
the owner after W - 1 steps. Sums are formed in the order of the ring, so that their bits depend on
no collective's algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .chunks import Chunk, padded, parts
from .collectives import Started, shift


class Ring:
    """A chunk is a part of one rank's keys, at most `chunk_size` of them."""

    def __init__(self, group: dist.ProcessGroup, max_keys: int, chunk_size: int):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.parts = parts(max_keys, min(chunk_size, max_keys))

    def all_gather_chunks(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        coming, steps = None, [(part, t) for part in self.parts for t in range(self.size)]
        for number, (part, t) in enumerate(steps):
            if number < len(kept):
                x = kept[number]
            else:
                x = padded(keys, part) if t == 0 else coming.wait()
            passed_on = t < self.size - 1 and number + 1 >= len(kept)
            coming = self.start("keys", part, x) if passed_on else None
            owner = (self.rank - t) % self.size
            yield Chunk(slice(owner, owner + 1), part, x)

    def start(self, what: str, part: slice, x: Tensor) -> Started:
        what = f"ring transfer of {what} {part.start} to {part.stop} of each rank"
        return Started(what, shift, torch.empty_like(x), x, self.group)

    def reduce_scatter_grads(self, out: Tensor) -> RingReduceScatter:
        return RingReduceScatter(self, out)


class RingReduceScatter:
    """The gradients of a part of one rank's keys, passed from rank to rank, each adding its own."""

    def __init__(self, ring: Ring, out: Tensor):
        self.ring, self.out = ring, out
        self.part, self.coming = None, None

    def send(self, chunk: Chunk, grads: Tensor) -> None:
        t = (self.ring.rank - chunk.owners.start) % self.ring.size
        if t == 0:
            self._add_arrived()
            self.part = chunk.part
            self.out[self.part] = grads
            return
        if t > 1:
            grads = self.coming.wait().add_(grads)
        self.coming = self.ring.start("the gradients of keys", chunk.part, grads)

    def _add_arrived(self) -> None:
        """The sums of all other ranks for this rank's last part."""
        if self.coming is not None:
            self.out[self.part] += self.coming.wait()
            self.coming = None

    def result(self) -> Tensor:
        self._add_arrived()
        return self.out
