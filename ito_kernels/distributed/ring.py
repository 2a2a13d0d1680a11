"""The transport "ring": every rank sends to the next rank what it received from the previous one.

At step t of W, rank r has the keys of rank r - t and sends them on while it uses them. The
gradients of these keys start at the rank after their owner and follow. Each rank adds its own, and
they reach the owner after W - 1 steps. Sums are formed in the order of the ring, so their bits do
not depend on the algorithm of a collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .chunks import Chunk, padded, parts
from .collectives import Started, shift


class Ring:
    """A chunk is a part of the keys of one rank, at most `chunk_size` keys."""

    def __init__(self, group: dist.ProcessGroup, max_keys: int, chunk_size: int):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.parts = parts(max_keys, min(chunk_size, max_keys))

    def all_gather_chunks(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
        in_flight, steps = None, [(part, t) for part in self.parts for t in range(self.size)]
        for number, (part, t) in enumerate(steps):
            if number < len(kept):
                x = kept[number]
            else:
                x = padded(keys, part) if t == 0 else in_flight.wait()
            # the next rank needs the keys unless this is their last step or it has kept them
            send_on = t < self.size - 1 and number + 1 >= len(kept)
            in_flight = self.start("keys", part, x) if send_on else None
            owner = (self.rank - t) % self.size
            yield Chunk(slice(owner, owner + 1), part, x)

    def start(self, contents: str, part: slice, x: Tensor) -> Started:
        name = f"ring transfer of {contents} {part.start} to {part.stop} of each rank"
        return Started(name, shift, torch.empty_like(x), x, self.group)

    def reduce_scatter_grads(self, out: Tensor) -> RingReduceScatter:
        return RingReduceScatter(self, out)


class RingReduceScatter:
    """Gradients of a part of one rank's keys go from rank to rank, and each rank adds its own."""

    def __init__(self, ring: Ring, out: Tensor):
        self.ring, self.out = ring, out
        self.part, self.in_flight = None, None

    def send(self, chunk: Chunk, grads: Tensor) -> None:
        t = (self.ring.rank - chunk.owners.start) % self.ring.size
        if t == 0:
            self._add_arrived()
            self.part = chunk.part
            self.out[self.part] = grads
            return
        if t > 1:
            grads = self.in_flight.wait().add_(grads)
        self.in_flight = self.ring.start("the gradients of keys", chunk.part, grads)

    def _add_arrived(self) -> None:
        """Add the sum of all other ranks to the gradients of this rank's last part."""
        if self.in_flight is not None:
            self.out[self.part] += self.in_flight.wait()
            self.in_flight = None

    def result(self) -> Tensor:
        self._add_arrived()
        return self.out
