"""How everyone's keys come by, chunk by chunk, and how their gradients go home."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..similarity.spec import Problem
from .collectives import Started, reduce_scatter

if TYPE_CHECKING:
    from .batch import GlobalBatch

GATHER_CACHE_BYTES = 64 << 20


def chunks(
    whole: GlobalBatch, b: Tensor, kept: Sequence[Tensor] = ()
) -> Iterator[tuple[slice, Tensor]]:
    """All ranks' rows of a part after the other, (size·part, D); the next part travels while
    this one is used. `kept`: the first parts, from an earlier walk."""

    def start(part: slice) -> Started:
        x = b[part]
        missing = part.stop - part.start - len(x)
        if missing:
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        return whole.start_gather(f"keys {part.start} to {part.stop} of each rank", x)

    b = b.detach()
    yield from zip(whole.parts, kept, strict=False)
    rest = whole.parts[len(kept) :]
    coming = start(rest[0]) if rest else None
    for part, after in zip(rest, [*rest[1:], None], strict=False):
        keys = coming.wait()
        coming = None if after is None else start(after)
        yield part, keys


class KeyGradients:
    """Gradients of everyone's keys, summed over ranks by their owner in the accumulate dtype, a
    part travelling while the next is computed."""

    def __init__(self, whole: GlobalBatch, problem: Problem):
        self.whole, self.like = whole, problem.b
        self.sums = problem.scale.new_empty(whole.most_keys, problem.d)
        self.blocks, self.pending = [], None

    def add(self, grads: Tensor) -> None:
        """The next rows of the part."""
        self.blocks.append(grads)

    def send(self, part: slice) -> None:
        """The blocks of a part are complete."""
        x = self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks)
        x = x.to(self.sums.dtype)
        self.blocks = []
        if self.pending is not None:
            self.pending.wait()
        what = f"reduce-scatter of the gradients of keys {part.start} to {part.stop} of each rank"
        self.pending = Started(what, reduce_scatter, self.sums[part], x, self.whole.group)

    def result(self) -> Tensor:
        """Of this rank's keys."""
        self.pending.wait()
        return self.sums[: len(self.like)].to(self.like.dtype)


class Kept:
    """The first chunks of keys, as many as the budget holds, for backward."""

    def __init__(self, wanted: bool):
        self.chunks, self.budget = [], gather_cache_bytes() if wanted else 0

    def offer(self, keys: Tensor) -> None:
        self.budget -= keys.nbytes
        if self.budget >= 0:
            self.chunks.append(keys)


def gather_cache_bytes() -> int:
    text = os.environ.get("ITO_GATHER_CACHE_BYTES", GATHER_CACHE_BYTES)
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"ITO_GATHER_CACHE_BYTES must be a whole number of bytes, got {text!r}")
    return budget
