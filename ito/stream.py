"""Batches of a data set that does not fit into memory: shuffled, and decoded by worker processes.

This process decides the order from names and captions, before any picture is read. So a batch
depends on the seed, its number and the rank, and not on the number of workers. A stream that starts
at batch n reads no picture of the batches before it.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ito.batches import Batch, generator, pick, without_padding_columns
from ito.config import Config
from ito.data.pictures import MAX_PIXELS, Decoder
from ito.data.records import Record, Shard, Skipped
from ito.data.splits import text_key
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks

# After so many groups that did not fill a batch, count whether enough pictures can be read at all.
GROUPS_BEFORE_COUNT = 8


@dataclass
class Decoded:
    """`images` uint8 (n, 3, S, S), and the n records that they belong to."""

    images: Tensor
    records: list[Record]


@dataclass(eq=False, repr=False)
class Stream:
    """Endless batches of `batch_size` different items each, epoch after epoch.

    In an epoch each record is used once. Shards are shuffled and divided among the ranks, and
    records go through a shuffle buffer. A record whose item is already in the batch waits for the
    next one. If more than `buffer` records wait, because an item has very many, the oldest are left
    out. A picture that cannot be read is replaced by that of a later record, which is also used in
    its own batch. Records of a split other than "train" are left out.

    Args:
        shards: see `ito.data.records.open_shards`; at least one per rank.
        image_size, max_pixels, fit: see `ito.data.pictures.decode`.
        workers: processes that decode; 0 decodes in this process.
        buffer: size of the shuffle buffer, in records (names and captions, no pictures), and the
            most records that wait.

    `skipped` holds the reasons of all records left out so far, by where they stand.

    Raises ValueError if there are fewer shards than ranks, or if all shards together have fewer
    items than a batch; while iterating, if fewer items have a picture that can be read.
    """

    shards: list[Shard]
    image_size: int
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    buffer: int = 10_000
    max_pixels: int = MAX_PIXELS
    fit: str = "crop"

    def __post_init__(self):
        count, ranks = len(self.shards), self.world_size
        if count < ranks:
            raise ValueError(f"expected at least one shard for each of {ranks} ranks, got {count}")
        self.decoder = Decoder(self.image_size, self.max_pixels, self.fit)
        self.skipped: dict[str, str] = {}
        self.require("different items")

    def batches(self, start: int = 0) -> Iterator[Decoded]:
        """Batch `start` and all that follow."""
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
        """The batch, filled up with readable pictures of the groups that follow."""
        images, records = [found.images], list(found.records)
        items = {record.item for record in records}
        for number, group in enumerate(following, 1):
            for record in group:
                if len(records) == self.batch_size:
                    return Decoded(torch.cat(images), records)
                if record.item in items:
                    continue
                image = self.read(record)
                if len(image):
                    images.append(image)
                    records.append(record)
                    items.add(record.item)
            if number == GROUPS_BEFORE_COUNT:
                what = "different items with a picture that can be read"
                self.require(what, lambda record: len(self.read(record)) == 1)

    def describe(self) -> str:
        return f"a stream of {len(self.shards)} shards"

    def groups(self) -> Iterator[list[Record]]:
        """Lists of `batch_size` records of different items."""
        records = (record for number in itertools.count() for record in self.epoch(number))
        waiting: Iterable[Record] = ()
        while True:
            group: dict[str, Record] = {}
            repeated: deque[Record] = deque(maxlen=self.buffer)
            earlier = iter(waiting)
            for record in itertools.chain(earlier, records):
                if record.item in group:
                    repeated.append(record)
                    continue
                group[record.item] = record
                if len(group) == self.batch_size:
                    break
            waiting = deque([*repeated, *earlier], maxlen=self.buffer)
            yield list(group.values())

    def epoch(self, number: int) -> Iterator[Record]:
        """This rank's records of an epoch, shuffled; there may be none in its shards."""
        order = torch.randperm(len(self.shards), generator=generator(self.seed, "shards", number))
        chance = random.Random(f"{self.seed}:{number}:{self.rank}")
        buffer: list[Record] = []
        for record in self.records(order[self.rank :: self.world_size].tolist()):
            buffer.append(record)
            if len(buffer) > self.buffer:
                yield pop_random(buffer, chance)
        while buffer:
            yield pop_random(buffer, chance)

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """The training records of these shards, in the order of the files."""
        for number in numbers:
            for record in self.shards[number]():
                if isinstance(record, Skipped):
                    self.skipped[record.where] = record.reason
                elif record.split in (None, "train"):
                    yield record

    def require(self, what: str, usable: Callable[[Record], bool] = lambda record: True) -> None:
        """Raise ValueError unless all shards together have a batch of usable items.

        Reads only until there are enough.
        """
        items: set[str] = set()
        for record in self.records(range(len(self.shards))):
            if record.item not in items and usable(record):
                items.add(record.item)
            if len(items) == self.batch_size:
                return
        examples = "; ".join(": ".join(found) for found in list(self.skipped.items())[:3])
        raise ValueError(
            f"batch_size must be at most the number of {what}, {len(items)} in {len(self.shards)} "
            f"shards ({len(self.skipped)} records skipped{': ' * bool(examples)}{examples}); "
            f"got {self.batch_size}"
        )

    def read(self, record: Record) -> Tensor:
        """The picture, (1, 3, S, S), or (0, 3, S, S) if it cannot be read."""
        image, reasons = self.decoder[[record.image]]
        if reasons:
            self.skipped[record.where] = reasons[0]
        return image


def pop_random(records: list[Record], chance: random.Random) -> Record:
    place = chance.randrange(len(records))
    records[place], records[-1] = records[-1], records[place]
    return records.pop()


def require_stream(config: Config, workers: int, ranks: Ranks) -> None:
    """Raises ValueError for options that --stream cannot be used with."""
    if config.batch_size % ranks.size:
        raise ValueError(
            "--stream gives ranks equal parts: --batch-size must be a multiple of "
            f"{ranks.size} ranks, got {config.batch_size}"
        )
    if config.fusion_text == "shuffled" and config.batch_size < 2 * ranks.size:
        raise ValueError(
            f"--fusion-text shuffled takes captions of other items: with --stream, --batch-size "
            f"must be at least 2 for each of {ranks.size} ranks, got {config.batch_size}"
        )
    if workers < 0:
        raise ValueError(f"--workers must be at least 0, got {workers}")


def first_captions(shards: list[Shard], limit: int) -> list[str]:
    """The first `limit` training captions in the order of the shards, or all if there are fewer."""
    records = (r for shard in shards for r in shard() if isinstance(r, Record))
    captions = (c for r in records if r.split in (None, "train") for c in r.captions)
    return list(itertools.islice(captions, limit))


class StreamBatches:
    """A stream with the interface of `ito.batches.Batches`.

    Each rank streams an equal part of the global batch, and knows only its own captions. All V
    views of an item show the same picture. A step that does not follow the last one starts the
    stream anew.
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
        by_slot = [*zip(*chosen, strict=True)]
        ids = torch.stack([self.tokenizer(list(texts)) for texts in by_slot])
        caption_ids = None
        if self.config.equal_captions != "negative":
            hashes = [[hashed(text_key(text)) for text in texts] for texts in by_slot]
            caption_ids = torch.tensor(hashes)
        views, count = self.config.views, len(found.records)
        positions = torch.arange(views)[:, None] * self.size + self.first + torch.arange(count)
        return Batch(
            found.images.to(self.device).expand(views, *found.images.shape),
            positions,
            views * self.size,
            without_padding_columns(ids),
            slice(None),
            torch.tensor([hashed(record.item) for record in found.records]),
            caption_ids,
        )


def hashed(text: str) -> int:
    """63 bits: of a million texts, two have the same hash in one of 18 million data sets."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
