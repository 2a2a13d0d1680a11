"""The dual encoder as an ONNX pair, `image_encoder.onnx` and `text_encoder.onnx`.

Each gives unit rows, fp32, for any batch size. The image encoder takes the pixels that the model
sees, float32 (B, 3, S, S) with `(x / 255 - 0.5) / 0.5`; the text encoder takes token ids, int64
(B, context_length), padded with 0, of `tokenizer.json`. The scale of training and the preprocessing
are in each file's metadata, S and context_length in its input's shape.
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

PACKAGES = ("onnx", "onnxscript")


class Half(nn.Module):
    """One tower with its normalisation, as a module that can be exported."""

    def __init__(self, model: DualEncoder, encode: str):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.encode)(inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of itself: torch's deprecations, torchvision's absence."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def export_onnx(model: DualEncoder, out: Path) -> list[Path]:
    """Write both files to the folder `out`, each atomically, and return their paths.

    Raises ImportError naming the extra if a package that PyTorch's exporter needs is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--onnx needs {', '.join(missing)}, not installed here: "
            "pip install 'ito_kernels[onnx]'"
        )
    model = model.cpu().eval()
    size, length = model.image.image_size, model.text.context_length
    about = {"logit_scale": f"{model.logit_scale.exp().item():.6g}"}
    written = []
    for name, encode, example, details in (
        ("image", "encode_image", torch.zeros(2, 3, size, size), {"mean": MEAN, "std": STD}),
        ("text", "encode_text", torch.ones(2, length, dtype=torch.int64), {"pad_id": 0}),
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
        if isinstance(batch, int):  # the exporter took the example's for the only one
            raise RuntimeError(f"the {name} encoder was exported for batches of {batch} alone")
        program.model.metadata_props.update(about | {k: str(v) for k, v in details.items()})
        path = out / f"{name}_encoder.onnx"
        with write_atomically(path) as temporary:
            program.save(str(temporary))
        written.append(path)
    return written
