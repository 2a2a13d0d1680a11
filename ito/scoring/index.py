"""Embeddings of all pictures of a data set, for search, and from which cosine on one is near."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.files import read_text, undamaged, write_atomically, write_text
from ito.model.exported import Encoder
from ito.run import RunFolder
from ito.tensors import checksum, load_tensors, save_tensors


class Index:
    """Embeddings of all pictures of a data set, training and held-out.

    `search(queries (Q, E), k)` returns cosines and picture indices, (Q, k) each, best first; k is
    cut to the number of pictures.
    """

    def __init__(self, encoder: Encoder, dataset: Dataset, embeddings: torch.Tensor):
        self.encoder, self.dataset, self.embeddings = encoder, dataset, embeddings

    @classmethod
    def open(cls, run: Path, encoder: Encoder, dataset: Dataset) -> "Index":
        """The index, with embeddings saved in the run folder by a hash of weights and pictures."""
        key = hashlib.sha256(dataset.images.numpy())
        key.update(checksum(encoder.model.state_dict()).encode())
        path = RunFolder(run).index / f"{key.hexdigest()[:16]}.safetensors"
        if path.exists():
            with undamaged(path):
                kept = load_tensors(path)[0]["images"]
                wanted = (len(dataset.images), encoder.model.architecture["width"])
                if kept.shape != wanted or kept.dtype != torch.float32:
                    raise ValueError(
                        f"expected fp32 {wanted}, got {kept.dtype} {tuple(kept.shape)}"
                    )
                return cls(encoder, dataset, kept)
        embeddings = encoder.encode_image(dataset.images)
        with write_atomically(path) as temporary:
            temporary.write_bytes(save_tensors({"images": embeddings}))
        return cls(encoder, dataset, embeddings)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (queries @ self.embeddings.T).topk(min(k, len(self.embeddings)))

    def name(self, picture: int) -> str:
        """The first caption of the picture's item, shortened for display."""
        return one_line(self.dataset.captions[int(self.dataset.image_item[picture])][0])


REACHED = 0.98  # the part of the run's own captions and pictures that reach a near match
SAMPLE = 1000  # of them, at most


class Near(NamedTuple):
    """The cosine from which on the best match of a text, and of a picture, is called near.

    98 % of the run's own captions reach `text` at their best picture, and 98 % of its pictures
    reach `picture` at the best one of another item. Cosines of different models, and of texts and
    pictures with one model, are not comparable; this is.
    """

    text: float
    picture: float

    @classmethod
    def measure(cls, index: Index) -> "Near":
        """From the pictures that were trained on; from all, if the index has none of them."""
        dataset, encoder = index.dataset, index.encoder
        rows = dataset.rows("train")
        rows = rows if len(rows) else torch.arange(len(dataset.images))
        known, item = index.embeddings[rows], dataset.image_item[rows]
        captions = [text for n in item.unique().tolist() for text in dataset.captions[n]]
        texts = encoder.encode_text([captions[n] for n in spread(len(captions))])
        pictures = spread(len(rows))
        text_best = [(part @ known.T).amax(1) for part in texts.split(64)]
        picture_best = [
            (known[part] @ known.T).masked_fill(item[part, None] == item, -1).amax(1)
            for part in pictures.split(64)
        ]
        return cls(low(torch.cat(text_best)), low(torch.cat(picture_best)))

    @classmethod
    def open(cls, run: Path, encoder: Encoder, own: Callable[[], Index | None]) -> "Near | None":
        """That of these weights, saved in the run folder; measured on `own()`, the index of the
        run's own data, when it is first asked for. None if there is no such index."""
        weights, path = checksum(encoder.model.state_dict()), RunFolder(run).near
        if path.exists():
            with undamaged(path):
                saved = json.loads(read_text(path))
                if saved["weights"] == weights:
                    return cls(float(saved["text"]), float(saved["picture"]))
        index = own()
        if index is None:
            return None
        near = cls.measure(index)
        write_text(path, json.dumps(near._asdict() | {"weights": weights}) + "\n")
        return near

    def doubt(self, kind: str, best: float) -> str:
        """That the best match of a "text" or a "picture" is not near, in words; "" if it is."""
        limit = getattr(self, kind)
        if best >= limit - 1e-4:  # rounding, in batches of another size
            return ""
        return (
            f"nothing near: the best match has {best:.3f}; {REACHED:.0%} of the run's own "
            f"{'captions' if kind == 'text' else 'pictures'} reach {limit:.3f}"
        )


def spread(count: int) -> torch.Tensor:
    """At most SAMPLE of `count` indices, evenly spread."""
    return torch.linspace(0, count - 1, min(count, SAMPLE)).round().long()


def low(values: torch.Tensor) -> float:
    """The highest of `values` that REACHED of them reach."""
    return values.double().quantile(1 - REACHED, interpolation="lower").item()
