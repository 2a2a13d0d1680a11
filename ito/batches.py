"""Which drawings and captions a step sees: a pure function of the seed and the step.

Nothing carries over from step to step, so a resumed run sees exactly what it would have seen.
"""

import hashlib

import torch
from torch import Tensor

from ito.config import Config
from ito.data import Dataset
from ito.tokenizer import Tokenizer


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """An independent stream of random numbers for each (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Batches:
    """Batches of distinct items, each with V drawings and C captions.

    An item with several training drawings shows different ones in its views, so that different
    artists' drawings of a thing meet; one with fewer drawings than views repeats them, and the
    augmentation tells the views apart. Captions likewise. A pass over the items ends with its last
    full batch.

    `size` is the batch size, at most the number of items with a training drawing.
    `batches(step) -> (rows (V, N), ids (C, N, L))`: indices into `dataset.images`; token ids, the
    columns that are padding everywhere left out.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, config: Config):
        drawings: dict[int, list[int]] = {item: [] for item in dataset.training_items()}
        for row in dataset.rows("train").tolist():
            drawings[int(dataset.image_item[row])].append(row)
        self.drawings = list(drawings.values())
        self.captions = [tokenizer(dataset.captions[item]) for item in drawings]
        self.config = config
        self.size = min(config.batch_size, len(drawings))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        seed = self.config.seed
        epoch, place = divmod(step, len(self.drawings) // self.size)
        order = torch.randperm(len(self.drawings), generator=generator(seed, "epoch", epoch))
        items = order[place * self.size : (place + 1) * self.size].tolist()
        random = generator(seed, "draw", step)
        rows = [
            [
                self.drawings[item][k]
                for k in pick(len(self.drawings[item]), self.config.views, random)
            ]
            for item in items
        ]
        ids = [
            self.captions[item][pick(len(self.captions[item]), self.config.captions, random)]
            for item in items
        ]
        texts = torch.stack(ids, 1)
        return torch.tensor(rows).T, texts[..., : int((texts != Tokenizer.pad_id).sum(-1).max())]


def pick(available: int, wanted: int, random: torch.Generator) -> list[int]:
    """`wanted` of `range(available)` in random order, repeating only once all were taken."""
    order = torch.randperm(available, generator=random).tolist()
    return [order[k % available] for k in range(wanted)]
