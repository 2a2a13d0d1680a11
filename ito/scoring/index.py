"""Embeddings of all pictures of a data set, for search, and from which cosine on one is near."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.files import read_text, undamaged, write_atomically, write_text
from ito.model.exported import Encoder
from ito.run import RunFolder
from ito.scoring.embedded_split import distinct
from ito.scoring.probes import minimise
from ito.scoring.scores import FEW
from ito.tensors import checksum, load_tensors, save_tensors


class Index:
    """Embeddings of all pictures of a data set, training and held-out."""

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
                emb = load_tensors(path)[0]["images"]
                wanted = (len(dataset.images), encoder.model.architecture["width"])
                if emb.shape != wanted or emb.dtype != torch.float32:
                    raise ValueError(f"expected fp32 {wanted}, got {emb.dtype} {tuple(emb.shape)}")
                return cls(encoder, dataset, emb)
        embeddings = encoder.encode_image(dataset.images)
        with write_atomically(path) as temporary:
            temporary.write_bytes(save_tensors({"images": embeddings}))
        return cls(encoder, dataset, embeddings)

    def search(
        self, queries: torch.Tensor, k: int, without: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and picture indices, (Q, k) each, best first, of queries (Q, E); k is cut to the
        number of pictures. without (Q,): a picture of each query's that is left out."""
        scores, most = queries @ self.embeddings.T, len(self.embeddings)
        if without is not None:
            scores, most = scores.scatter(1, without[:, None], -torch.inf), most - 1
        return scores.topk(min(k, most))

    def name(self, picture: int) -> str:
        """The first caption of the picture's item, shortened for display."""
        return one_line(self.dataset.captions[int(self.dataset.image_item[picture])][0])


REACHED = 0.98  # the part of the run's own captions and pictures that reach a near match
SAMPLE = 1000  # of them, at most
SHOWN = 24  # matches of a query on the search page


class Near(NamedTuple):
    """What cosines mean with one model: cosines of different models, and of texts and pictures with
    one model, are not comparable; this is.

    text, picture: from which cosine on the best match of a text, and of a picture, is called near.
    98 % of the run's own captions reach `text` at their best picture, and 98 % of its pictures
    reach `picture` at the best one of another item.
    text_odds, picture_odds: what `right` computes with, from `fit_odds`. None if the data has too
    few right matches to tell.
    """

    text: float
    picture: float
    text_odds: list[float] | None = None
    picture_odds: list[float] | None = None

    @classmethod
    def measure(cls, index: Index) -> "Near":
        """The limits from the pictures that were trained on, the odds from the others and their
        captions; from all, if the index has none of them."""
        dataset, encoder = index.dataset, index.encoder
        trained = torch.tensor([split == "train" for split in dataset.split])
        none, every = ~trained.any(), trained.all()
        rows, held = (x.nonzero()[:, 0] for x in (trained | none, ~trained | every))
        known, item = index.embeddings[rows], dataset.image_item[rows]
        captions = [text for n in item.unique().tolist() for text in dataset.captions[n]]
        texts = encoder.encode_text([captions[n] for n in spread(len(captions))])
        pictures = spread(len(rows))
        best = [(part @ known.T).amax(1) for part in texts.split(64)]
        others = [
            (known[part] @ known.T).masked_fill(item[part, None] == item, -1).amax(1)
            for part in pictures.split(64)
        ]
        return cls(low(torch.cat(best)), low(torch.cat(others)), *measure_odds(index, held))

    @classmethod
    def open(cls, run: Path, encoder: Encoder, own: Callable[[], Index | None]) -> "Near | None":
        """That of these weights, saved in the run folder; measured on `own()`, the index of the
        run's own data, when it is first asked for. None if there is no such index."""
        weights, path = checksum(encoder.model.state_dict()), RunFolder(run).near
        if path.exists():
            with undamaged(path):
                saved = json.loads(read_text(path))
                if saved["weights"] == weights and "text_odds" in saved:
                    odds = [saved[f"{kind}_odds"] for kind in ("text", "picture")]
                    odds = [x and [float(x[n]) for n in range(3)] for x in odds]
                    return cls(float(saved["text"]), float(saved["picture"]), *odds)
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

    def right(self, kind: str, cosines: torch.Tensor) -> list[float] | None:
        """How likely each of the best matches (K,) of a "text" or a "picture" is right; None if
        that is not known."""
        odds = getattr(self, f"{kind}_odds")
        return odds and (features(cosines) @ torch.tensor(odds).double()).sigmoid().tolist()


def features(cosines: torch.Tensor) -> torch.Tensor:
    """Of a query's best matches (..., K): the cosine, its mean over them all, and 1."""
    cosines = cosines.double()
    mean = cosines.mean(-1, keepdim=True).expand_as(cosines)
    return torch.stack([cosines, mean, torch.ones_like(mean)], -1)


def measure_odds(index: Index, held: torch.Tensor) -> list[list[float] | None]:
    """How likely a match is right: of the captions of the pictures `held`, and of these pictures.

    A match is one of the SHOWN most similar pictures of the index, without the query itself. It is
    right if its item has the caption, or is the item of the picture.
    """
    dataset, item = index.dataset, index.dataset.image_item
    captions, text = distinct(text for texts in dataset.captions for text in texts)
    owner = torch.tensor([n for n, texts in enumerate(dataset.captions) for _ in texts])
    asked = text[torch.isin(owner, item[held])].unique()
    asked, held = asked[spread(len(asked))], held[spread(len(held))]
    texts = index.encoder.encode_text([captions[n] for n in asked])
    parts = [index.search(part, SHOWN) for part in texts.split(64)]
    cosines, found = (torch.cat(x) for x in zip(*parts, strict=True))
    pairs = asked[:, None] * len(dataset.items) + item[found]
    odds = [fit_odds(cosines, torch.isin(pairs, text * len(dataset.items) + owner))]
    parts = [index.search(index.embeddings[part], SHOWN, part) for part in held.split(64)]
    cosines, found = (torch.cat(x) for x in zip(*parts, strict=True))
    return [*odds, fit_odds(cosines, item[found] == item[held, None])]


def fit_odds(cosines: torch.Tensor, right: torch.Tensor) -> list[float] | None:
    """The weights of `features` (Q, K) whose sum is the log-odds that a match is right, by maximum
    likelihood; None if fewer than FEW are right, or wrong.

    Of the captions of one half of the small emoji set's held-out concepts, with the weights of the
    other half, the probabilities are off by 0.005 on average, those of the best matches by 0.1 to
    0.2, which are too low (without the mean: 0.2).

    Source: Platt 1999, "Probabilistic outputs for support vector machines", with the targets of its
    section 2.2, which keep the weights finite where cosines divide right from wrong.
    """
    hits, misses = int(right.sum()), int((~right).sum())
    if min(hits, misses) < FEW:
        return None
    x = features(cosines)
    target = torch.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2)).double()
    odds = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    minimise(lambda: F.binary_cross_entropy_with_logits(x @ odds, target), [odds], max_iter=200)
    return odds.tolist()


def spread(count: int, most: int = SAMPLE) -> torch.Tensor:
    """At most `most` of `count` indices, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def low(values: torch.Tensor) -> float:
    """The highest of `values` that REACHED of them reach."""
    return values.double().quantile(1 - REACHED, interpolation="lower").item()
