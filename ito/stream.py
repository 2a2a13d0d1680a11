"""Batches from a source that does not fit in memory: shuffled, decoded by worker processes.

Order is decided in this process from names and captions alone; only then are pictures read. So a
batch depends on the seed, its number and the rank, not on the number of workers, and a stream that
starts at batch n reads no picture before it.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle

from ito.batches import Batch, generator, pick, trimmed
from ito.config import Config
from ito.ranks import Ranks
from ito.records import Record, Shard, Skipped, decode
from ito.shards import Member
from ito.tokenizer import Tokenizer


@dataclass
class Decoded:
    """`images` uint8 (n, 3, S, S) and their n records."""

    images: Tensor
    records: list[Record]


class Stream:
    """Endless batches of `batch_size` different items each, over and over the shards' records.

    A pass gives each record once: shards in random order, dealt out to the ranks, records through a
    shuffle buffer. A record whose item is in the batch already waits for the next. A batch with
    unreadable pictures is smaller by these. Records of a split other than "train" are left out.

    Args:
        shards: see `ito.records.open_shards`; at least one per rank.
        image_size: pixels per side; see `ito.records.decode`.
        workers: processes that decode; 0 decodes in this one.
        buffer: records held to be shuffled; their names and captions only.

    `skipped` is what was left out so far, reasons by place.

    Raises ValueError if there are fewer shards than ranks; when iterated, if a pass has no record,
    or fewer items than a batch, or if no picture of a batch can be read.
    """

    def __init__(
        self,
        shards: list[Shard],
        image_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        buffer: int = 10_000,
    ):
        if len(shards) < world_size:
            raise ValueError(
                f"want at least a shard for each of {world_size} ranks, got {len(shards)}"
            )
        self.shards, self.image_size, self.batch_size = shards, image_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.workers, self.buffer = workers, buffer
        self.skipped: dict[str, str] = {}

    def batches(self, start: int = 0) -> Iterator[Decoded]:
        """Batch `start` and those after it."""
        sent: deque[list[Record]] = deque()

        def places() -> Iterator[list[Path | Member]]:
            for group in itertools.islice(self.groups(), start, None):
                sent.append(group)
                yield [record.image for record in group]

        loader = DataLoader(
            Decoder(self.image_size),
            sampler=places(),
            batch_size=None,  # the sampler's elements are batches already
            num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for images, reasons in loader:
            group = sent.popleft()
            bad = {group[n].where: reason for n, reason in reasons.items()}
            self.skipped |= bad
            if len(bad) == len(group):
                where, reason = next(iter(bad.items()))
                raise ValueError(f"no usable picture in a batch of {len(group)}: {where}: {reason}")
            yield Decoded(images, [r for n, r in enumerate(group) if n not in reasons])

    def describe(self) -> str:
        return f"a stream of {len(self.shards)} shards"

    def groups(self) -> Iterator[list[Record]]:
        """Lists of `batch_size` records of different items."""
        records = ((epoch, r) for epoch in itertools.count() for r in self.epoch(epoch))
        waiting: deque[tuple[int, Record]] = deque()
        while True:
            group: dict[str, Record] = {}
            repeated: list[tuple[int, Record]] = []
            began = None
            while len(group) < self.batch_size:
                epoch, record = waiting.popleft() if waiting else next(records)
                began = epoch if began is None else began
                if epoch > began + 1:  # a whole pass lies between
                    raise ValueError(
                        f"batch_size must be at most the number of different items, {len(group)}; "
                        f"got {self.batch_size}"
                    )
                if record.item in group:
                    repeated.append((epoch, record))
                else:
                    group[record.item] = record
            waiting.extendleft(reversed(repeated))
            yield list(group.values())

    def epoch(self, number: int) -> Iterator[Record]:
        """This rank's records of a pass, shuffled."""
        order = torch.randperm(len(self.shards), generator=generator(self.seed, "shards", number))
        mine = order[self.rank :: self.world_size].tolist()
        chance = random.Random(f"{self.seed}:{number}:{self.rank}")
        held: list[Record] = []
        empty = True
        for record in (record for shard in mine for record in self.shards[shard]()):
            if isinstance(record, Skipped):
                self.skipped[record.where] = record.reason
                continue
            if record.split not in (None, "train"):
                continue
            empty = False
            held.append(record)
            if len(held) > self.buffer:
                yield swap_out(held, chance)
        if empty:
            raise ValueError(
                f"no record to train on in {len(mine)} shards ({len(self.skipped)} skipped)"
            )
        while held:
            yield swap_out(held, chance)


def swap_out(held: list[Record], chance: random.Random) -> Record:
    place = chance.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


class Decoder(MapStyle):
    """Pictures of a batch: uint8 (n, 3, S, S) of those that can be read, and why not by number."""

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __getitem__(self, places: list[Path | Member]) -> tuple[Tensor, dict[int, str]]:
        decoded = [decode(place, self.image_size) for place in places]
        reasons = {n: found for n, found in enumerate(decoded) if isinstance(found, str)}
        images = torch.empty(
            len(places) - len(reasons), 3, self.image_size, self.image_size, dtype=torch.uint8
        )
        good = (found for n, found in enumerate(decoded) if n not in reasons)
        for image, found in zip(images, good, strict=True):
            image.copy_(torch.from_numpy(found).permute(2, 0, 1))
        return images, reasons


def first_captions(shards: list[Shard], limit: int) -> list[str]:
    """The first `limit` captions to train on, or all there are, in the shards' order."""
    records = (r for shard in shards for r in shard() if isinstance(r, Record))
    captions = (c for r in records if r.split in (None, "train") for c in r.captions)
    return list(itertools.islice(captions, limit))


class StreamBatches:
    """A stream for the trainer, as `ito.batches.Batches` is for a set in memory.

    Each rank streams an equal part of the batch, and knows no other captions. An item has one
    drawing here, the same in its V views. Steps that follow one another are read ahead; any other
    starts anew.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        config: Config,
        ranks: Ranks,
        device: torch.device,
    ):
        self.stream, self.tokenizer, self.config, self.device = stream, tokenizer, config, device
        self.first = ranks.rank * stream.batch_size
        self.size = ranks.size * stream.batch_size
        self.next_step: int | None = None

    def __call__(self, step: int) -> Batch:
        if step != self.next_step:
            self.batches = self.stream.batches(step)
        found = next(self.batches)
        self.next_step = step + 1
        draw = generator(self.config.seed, "draw", step)
        chosen = [
            [record.captions[n] for n in pick(len(record.captions), self.config.captions, draw)]
            for record in found.records
        ]
        ids = torch.stack([self.tokenizer(list(texts)) for texts in zip(*chosen, strict=True)])
        views, count = self.config.views, len(found.records)
        places = torch.arange(views)[:, None] * self.size + self.first + torch.arange(count)
        return Batch(
            found.images.to(self.device).expand(views, *found.images.shape),
            places,
            views * self.size,
            trimmed(ids),
            slice(None),
        )
