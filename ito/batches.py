"""Which pictures and captions a step sees: a pure function of the seed and the step.

No state is carried from step to step, so a resumed run sees the same batches.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ito.config import Config
from ito.data.dataset import Dataset
from ito.data.splits import shared, text_key
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """An independent stream of random numbers for each (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Batch(NamedTuple):
    """One rank's part of a step's batch: n items, with V pictures and C captions of each.

    pictures: uint8 (V, n, 3, S, S).
    positions: (V, n), of the pictures in the global batch of `count` pictures. The augmentation's
        random numbers depend on them.
    ids: token ids (C, N, L) of the N items whose captions this rank knows.
    local_rows: which of the N are this rank's n.
    item: (n,), the items' numbers in the data set; of a stream, 63 bits of a hash of the name.
    caption_ids: (C, N), the same number for captions that are equal but for white space and case;
        of a stream, 63 bits of a hash. None if equal captions are negatives, or if no two items of
        the data set have one: it is None on all ranks or on none.
    """

    pictures: Tensor
    positions: Tensor
    count: int
    ids: Tensor
    local_rows: slice
    item: Tensor
    caption_ids: Tensor | None


class Batches:
    """Batches of distinct items, from a data set in memory.

    The V views of an item are different training pictures of it, if it has so many; otherwise
    pictures are repeated, and only the augmentation differs. The C captions are chosen in the same
    way. An epoch ends with its last full batch.

    `size` is the global batch size: that of the configuration, or the number of items with a
    training picture if that is smaller. `batches(step)` is this rank's Batch, with the captions of
    all ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        config: Config,
        ranks: Ranks,
        device: torch.device,
    ):
        image_rows: dict[int, list[int]] = {item: [] for item in dataset.training_items()}
        for row in dataset.rows("train").tolist():
            image_rows[int(dataset.image_item[row])].append(row)
        self.image_rows = list(image_rows.values())
        # the token ids of all captions in one tensor, and each item's rows of it
        captions = [dataset.captions[item] for item in image_rows]
        self.ids = tokenizer([caption for texts in captions for caption in texts])
        self.text_numbers = None
        if config.equal_captions != "negative":
            self.text_numbers = number_texts(captions)
        ends = [*itertools.accumulate(map(len, captions), initial=0)]
        self.caption_rows = [range(*pair) for pair in itertools.pairwise(ends)]
        self.images = dataset.images.to(device)
        self.image_item = dataset.image_item
        self.config, self.ranks = config, ranks
        self.size = min(config.batch_size, len(image_rows))

    def __call__(self, step: int) -> Batch:
        rows, ids, caption_ids = self.choose(step)
        local_rows = self.ranks.local_slice(self.size)
        positions = torch.arange(rows.numel()).view(rows.shape)[:, local_rows]
        # index_select takes 0.2 ms for 128 pictures of 64 px on one core, images[rows] 2.3 ms
        chosen = rows[:, local_rows].flatten().to(self.images.device)
        pictures = self.images.index_select(0, chosen).unflatten(0, positions.shape)
        item = self.image_item[rows[0, local_rows]]
        return Batch(pictures, positions, rows.numel(), ids, local_rows, item, caption_ids)

    def choose(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The global batch: indices into `dataset.images` (V, N), token ids (C, N, L), and the ids
        of the captions (C, N) as in Batch."""
        seed = self.config.seed
        epoch, number = divmod(step, len(self.image_rows) // self.size)
        order = torch.randperm(len(self.image_rows), generator=generator(seed, "epoch", epoch))
        items = order[number * self.size : (number + 1) * self.size].tolist()
        random = generator(seed, "draw", step)
        images = choose_rows(self.image_rows, items, self.config.views, random)
        captions = choose_rows(self.caption_rows, items, self.config.captions, random)
        ids = self.ids.index_select(0, captions.flatten()).unflatten(0, captions.shape)
        numbers = None if self.text_numbers is None else self.text_numbers[captions]
        return images, without_padding_columns(ids), numbers


def number_texts(captions: list[list[str]]) -> Tensor | None:
    """A number for each of all captions in one list, the same where two are equal but for white
    space and case. None if no two of the lists, one for each item, have one in common."""
    keys = [[text_key(text) for text in texts] for texts in captions]
    if not shared([set(own) for own in keys]):
        return None
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for own in keys for key in own])


def choose_rows(rows: list[Sequence[int]], items: list[int], count: int, random) -> Tensor:
    """`count` rows of each item, chosen at random: (count, N)."""
    chosen = [[rows[item][k] for k in pick(len(rows[item]), count, random)] for item in items]
    return torch.tensor(chosen).T


def pick(available: int, count: int, random: torch.Generator) -> list[int]:
    """`count` of `range(available)` in random order; none repeats before all have been picked."""
    order = torch.randperm(available, generator=random).tolist()
    return [order[k % available] for k in range(count)]


def without_padding_columns(ids: Tensor) -> Tensor:
    """Token ids (C, N, L) without the last columns, where these are padding in every row."""
    return ids[..., : int((ids != Tokenizer.pad_id).sum(-1).max())]
