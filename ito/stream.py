"""Batches from a source that does not fit in memory: shuffled, decoded by worker processes.

Order is decided in this process from names and captions alone; only then are pictures read. So a
batch depends on the seed, its number and the rank, not on the number of workers, and a stream that
starts at batch n reads no picture before it.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle

from ito.batches import Batch, generator, pick, trimmed
from ito.config import Config
from ito.data.pictures import MAX_PIXELS, decode
from ito.data.records import Record, Shard, Skipped
from ito.data.shards import Member
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks

DOUBTFUL = 8  # groups that did not fill a batch: are there enough pictures that can be read?


@dataclass
class Decoded:
    """`images` uint8 (n, 3, S, S) and their n records."""

    images: Tensor
    records: list[Record]


class Stream:
    """Endless batches of `batch_size` different items each, over and over the shards' records.

    A pass gives each record once: shards in random order, dealt out to the ranks, records through a
    shuffle buffer. A record whose item is in the batch already waits for the next; where an item
    has so many records that more than `buffer` wait, those that waited longest are left out. In the
    place of a picture that cannot be read the batch has that of a record soon to come, which is in
    a batch of its own as well. Records of a split other than "train" are left out.

    Args:
        shards: see `ito.data.records.open_shards`; at least one per rank.
        image_size: pixels per side; see `ito.data.pictures.decode`.
        max_pixels: a picture of more is not decoded, but skipped.
        workers: processes that decode; 0 decodes in this one.
        buffer: records held to be shuffled, and as many that wait; names and captions only.

    `skipped` is what was left out so far, reasons by place.

    Raises ValueError if there are fewer shards than ranks, or if all shards together have fewer
    items than a batch; when iterated, if they have fewer with a picture that can be read.
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
        max_pixels: int = MAX_PIXELS,
    ):
        if len(shards) < world_size:
            raise ValueError(
                f"want at least a shard for each of {world_size} ranks, got {len(shards)}"
            )
        self.shards, self.batch_size = shards, batch_size
        self.decoder = Decoder(image_size, max_pixels)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.workers, self.buffer = workers, buffer
        self.skipped: dict[str, str] = {}
        self.require("different items")

    def batches(self, start: int = 0) -> Iterator[Decoded]:
        """Batch `start` and those after it."""
        groups, sent = itertools.tee(itertools.islice(self.groups(), start, None))
        loader = DataLoader(
            self.decoder,
            sampler=([record.image for record in group] for group in groups),
            batch_size=None,  # the sampler's elements are batches already
            num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for images, reasons in loader:
            group = next(sent)
            self.skipped |= {group[n].where: reason for n, reason in reasons.items()}
            found = Decoded(images, [r for n, r in enumerate(group) if n not in reasons])
            if reasons:
                sent, following = itertools.tee(sent)
                found = self.filled(found, following)
            yield found

    def filled(self, found: Decoded, following: Iterator[list[Record]]) -> Decoded:
        """The batch with readable pictures of the groups that follow, a whole one."""
        images, records = [found.images], list(found.records)
        items = {record.item for record in records}
        for number, group in enumerate(following, 1):
            for record in group:
                if len(records) == self.batch_size:
                    return Decoded(torch.cat(images), records)
                if record.item in items:
                    continue
                image, reasons = self.decoder[[record.image]]
                if reasons:
                    self.skipped[record.where] = reasons[0]
                    continue
                images.append(image)
                records.append(record)
                items.add(record.item)
            if number == DOUBTFUL:
                self.require("different items with a picture that can be read", self.readable)

    def describe(self) -> str:
        return f"a stream of {len(self.shards)} shards"

    def groups(self) -> Iterator[list[Record]]:
        """Lists of `batch_size` records of different items."""
        records = (record for number in itertools.count() for record in self.epoch(number))
        waiting: Iterable[Record] = ()
        while True:
            group: dict[str, Record] = {}
            repeated: deque[Record] = deque(maxlen=self.buffer)
            first = iter(waiting)
            for record in itertools.chain(first, records):
                if record.item in group:
                    repeated.append(record)
                    continue
                group[record.item] = record
                if len(group) == self.batch_size:
                    break
            waiting = deque([*repeated, *first], maxlen=self.buffer)
            yield list(group.values())

    def epoch(self, number: int) -> Iterator[Record]:
        """This rank's records of a pass, shuffled; its shards of one pass may have none."""
        order = torch.randperm(len(self.shards), generator=generator(self.seed, "shards", number))
        chance = random.Random(f"{self.seed}:{number}:{self.rank}")
        held: list[Record] = []
        for record in self.records(order[self.rank :: self.world_size].tolist()):
            held.append(record)
            if len(held) > self.buffer:
                yield swap_out(held, chance)
        while held:
            yield swap_out(held, chance)

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """The records to train on of some shards, in their order."""
        for number in numbers:
            for record in self.shards[number]():
                if isinstance(record, Skipped):
                    self.skipped[record.where] = record.reason
                elif record.split in (None, "train"):
                    yield record

    def require(self, what: str, usable: Callable[[Record], bool] = lambda record: True) -> None:
        """Raise ValueError unless all shards together have a batch of them; read no further."""
        items: set[str] = set()
        for record in self.records(range(len(self.shards))):
            if record.item not in items and usable(record):
                items.add(record.item)
            if len(items) == self.batch_size:
                return
        left_out = "; ".join(": ".join(found) for found in list(self.skipped.items())[:3])
        raise ValueError(
            f"batch_size must be at most the number of {what}, {len(items)} in {len(self.shards)} "
            f"shards ({len(self.skipped)} records skipped{': ' * bool(left_out)}{left_out}); "
            f"got {self.batch_size}"
        )

    def readable(self, record: Record) -> bool:
        _, reasons = self.decoder[[record.image]]
        if reasons:
            self.skipped[record.where] = reasons[0]
        return not reasons


def swap_out(held: list[Record], chance: random.Random) -> Record:
    place = chance.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


class Decoder(MapStyle):
    """Pictures of a batch: uint8 (n, 3, S, S) of those that can be read, and why not by number."""

    def __init__(self, image_size: int, max_pixels: int):
        self.image_size, self.max_pixels = image_size, max_pixels

    def __getitem__(self, places: list[Path | Member]) -> tuple[Tensor, dict[int, str]]:
        decoded = [decode(place, self.image_size, self.max_pixels) for place in places]
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
            torch.tensor([hashed(record.item) for record in found.records]),
        )


def hashed(item: str) -> int:
    """63 bits: two of a million items are equal once in 18 million data sets."""
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") >> 1
