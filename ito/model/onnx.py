"""The dual encoder as two ONNX files, `image_encoder.onnx` and `text_encoder.onnx`.

Each gives unit rows, fp32, for any batch size. The image encoder takes float32 (B, 3, S, S), pixels
normalised by `(x / 255 - 0.5) / 0.5`; the text encoder takes token ids of `tokenizer.json`, int64
(B, context_length), padded with 0. Each file's metadata describes its input completely. Of a
picture: `image_size`, how it becomes a square (`fit`: crop takes its centre, pad all of it with
white around, warp all of it, squeezed), `resize`, `mean` and `std`; of a text: `context_length`,
`pad_id`, `vocab_size`, and `tokenizer`, the contents of `tokenizer.json`.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ito.data.augment import MEAN, STD
from ito.files import write_atomically
from ito.model.encoders import DualEncoder
from ito.model.tokenizer import Tokenizer

PACKAGES = ("onnx", "onnxscript")


class Half(nn.Module):
    """One tower with its L2 normalisation, as a module that can be exported."""

    def __init__(self, model: DualEncoder, encode: str):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.encode)(inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's own warnings: torch's deprecations, the absence of torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def export_onnx(
    model: DualEncoder, out: Path, fit: str = "crop", tokenizer: Tokenizer | None = None
) -> list[Path]:
    """Write both files to the folder `out`, each atomically, and return their paths.

    Raises ImportError if a package that PyTorch's exporter needs is missing; it names the extra.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--onnx needs {', '.join(missing)}, not installed here: "
            "pip install 'ito_trainer[onnx]'"
        )
    model = model.cpu().eval()
    size, length = model.image.image_size, model.text.context_length
    about = {"logit_scale": f"{model.logit_scale.exp().item():.6g}"}
    written = []
    pictures = {"image_size": size, "fit": fit, "resize": "bicubic", "mean": MEAN, "std": STD}
    pictures |= {"background": "white", "scale": "1/255", "channels": "RGB"}
    texts = {"context_length": length, "pad_id": 0}
    if tokenizer:
        texts |= {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.bpe.to_str()}
    for name, encode, example, details in (
        ("image", "encode_image", torch.zeros(2, 3, size, size), pictures),
        ("text", "encode_text", torch.ones(2, length, dtype=torch.int64), texts),
    ):
        with quiet():
            program = torch.onnx.export(
                Half(model, encode).eval(),
                (example,),
                dynamo=True,
                input_names=["pixels" if name == "image" else "ids"],
                output_names=["features"],  # "embedding" is a weight of the text tower
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        batch = program.model.graph.inputs[0].shape[0]
        if isinstance(batch, int):  # the exporter has fixed the example's batch size
            raise RuntimeError(f"the {name} encoder was exported for batches of {batch} only")
        program.model.metadata_props.update(about | {k: str(v) for k, v in details.items()})
        path = out / f"{name}_encoder.onnx"
        with write_atomically(path) as temporary:
            program.save(str(temporary))
        written.append(path)
    return written
