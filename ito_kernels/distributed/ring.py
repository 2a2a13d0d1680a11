"""The transport of neighbours: every rank passes on to the next what it got from the one before.

At step t of W a rank has the keys of the rank t before it, and sends them on while it uses them.
Their gradients start at the rank after the owner and follow, each rank adding its own, until after
W - 1 passes they are home. Sums are formed in the order of the ring, so that their bits depend on
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

    def __init__(self, group: dist.ProcessGroup, most_keys: int, chunk_size: int):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.parts = parts(most_keys, min(chunk_size, most_keys))

    def walk(self, keys: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[Chunk]:
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

    def homeward(self, sums: Tensor) -> Accumulated:
        return Accumulated(self, sums)


class Accumulated:
    def __init__(self, ring: Ring, sums: Tensor):
        self.ring, self.sums = ring, sums
        self.part, self.coming = None, None

    def send(self, chunk: Chunk, grads: Tensor) -> None:
        t = (self.ring.rank - chunk.owners.start) % self.ring.size
        if t == 0:
            self._home()
            self.part = chunk.part
            self.sums[self.part] = grads
            return
        if t > 1:
            grads = self.coming.wait().add_(grads)
        self.coming = self.ring.start("the gradients of keys", chunk.part, grads)

    def _home(self) -> None:
        """This rank's keys of the last part have been all round."""
        if self.coming is not None:
            self.sums[self.part] += self.coming.wait()
            self.coming = None

    def result(self) -> Tensor:
        self._home()
        return self.sums
