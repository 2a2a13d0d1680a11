"""Embeddings of all pictures of a data set, for search."""

import hashlib
from pathlib import Path

import torch

from ito.cli import one_line
from ito.data.dataset import Dataset
from ito.files import undamaged, write_atomically
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
                return cls(encoder, dataset, load_tensors(path)[0]["images"])
        embeddings = encoder.encode_image(dataset.images)
        with write_atomically(path) as temporary:
            temporary.write_bytes(save_tensors({"images": embeddings}))
        return cls(encoder, dataset, embeddings)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (queries @ self.embeddings.T).topk(min(k, len(self.embeddings)))

    def name(self, picture: int) -> str:
        """The first caption of the picture's item, shortened for display."""
        return one_line(self.dataset.captions[int(self.dataset.image_item[picture])][0])
