"""Embeddings of one split's pictures, and of the names of its items."""

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.model.embed import embed_images, embed_texts
from ito.model.exported import Encoder


class EmbeddedSplit:
    """Embeddings of one split: of its pictures, and of each item's first caption.

    `items` (n,) are indices into the data set; `item` (N,) is the index into `items` per picture.
    """

    def __init__(self, split: str, encoder: Encoder, dataset: Dataset):
        self.rows = dataset.rows(split)
        self.items, self.item = dataset.image_item[self.rows].unique(return_inverse=True)
        self.pictures = dataset.images[self.rows]
        captions = [dataset.captions[n][0] for n in self.items.tolist()]
        self.names = [one_line(caption) for caption in captions]
        self.group = [dataset.group[n] for n in self.items.tolist()]
        self.images = embed_images(encoder.model, self.pictures)
        self.texts = embed_texts(encoder.model, encoder.tokenizer(captions))
