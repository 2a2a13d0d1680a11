"""The pictures of a split and its texts, embedded, and which are right for each other."""

from collections.abc import Iterable

import torch

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.data.splits import text_key
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.model.tokenizer import Tokenizer


class EmbeddedSplit:
    """The pictures `rows` of a data set, and the distinct captions of their items.

    Captions that differ in white space and case alone are one text, in the form that comes first. A
    picture and a text are right for each other if the text is among the captions of the picture's
    item.

    Per picture: `pictures` uint8 (N, 3, S, S); `images` (N, E), their embeddings; `item` (N,),
    indices into the data set.
    Per text: `captions`; `texts` (M, E), their embeddings.
    `own`: {item: its captions, as indices of texts}; `item_text` (P, 2), the same as pairs.

    `name` and `right` take the number of a picture, from 0 to N − 1.
    """

    def __init__(
        self, rows: torch.Tensor, model: DualEncoder, tokenizer: Tokenizer, dataset: Dataset
    ):
        self.dataset, self.item = dataset, dataset.image_item[rows]
        self.pictures = dataset.images[rows]
        items = self.item.unique().tolist()
        self.captions, index = distinct(text for n in items for text in dataset.captions[n])
        owner = [n for n in items for _ in dataset.captions[n]]
        self.item_text = torch.stack([torch.tensor(owner), index], 1)
        self.own: dict[int, list[int]] = {}
        for n, text in self.item_text.tolist():
            self.own.setdefault(n, []).append(text)
        self.images = embed_images(model, self.pictures)
        self.texts = embed_texts(model, tokenizer(self.captions))

    def right(self, picture: int) -> list[int]:
        """The texts of the picture's item."""
        return self.own[int(self.item[picture])]

    def picture_of(self, item: int) -> int:
        """The first picture of the item."""
        return int((self.item == item).nonzero()[0, 0])

    def name(self, picture: int) -> str:
        """The first caption of the picture's item, shortened for display."""
        return one_line(self.dataset.captions[int(self.item[picture])][0])


def distinct(texts: Iterable[str]) -> tuple[list[str], torch.Tensor]:
    """Each text once, in the form that comes first, and its index for each of `texts`."""
    found: dict[str, tuple[int, str]] = {}
    index = [found.setdefault(text_key(text), (len(found), text))[0] for text in texts]
    return [text for _, text in found.values()], torch.tensor(index)
