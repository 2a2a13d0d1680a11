"""The exported dual encoder: written by `python -m ito.export RUN`, read by `ito.load(RUN)`.

Its folder holds `model.safetensors`, `config.json` and `tokenizer.json`. The fusion module is not
part of it: inference costs as much as with a plain dual encoder. The file of weights holds
checksums of the weights and of the tokenizer.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ito.data.pictures import FITS, MAX_PIXELS, Refused, decode, square
from ito.device import find_device
from ito.files import FileError, naming, read_text, require_file, undamaged, write_atomically
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.model.pretrained import planned_body
from ito.model.tokenizer import Tokenizer
from ito.run import RunFolder
from ito.tensors import load_tensors, save_tensors, verify

Picture = Image.Image | str | os.PathLike | bytes | np.ndarray | torch.Tensor
PICTURE = "a path, the bytes of a file, a PIL image, a uint8 array or tensor"
WEIGHTS, ABOUT, TOKENS = "model.safetensors", "config.json", "tokenizer.json"
MOST_SIZE = 2**22  # of widths, vocabularies and the like
NO_TOWER = {  # arguments of `DualEncoder` in place of another package's tower
    "image": {"image_encoder": None, "image_size": 8, "patch_size": None, "image_depth": 0},
    "text": {"text_encoder": None, "text_depth": 0},
}


def export(
    model: DualEncoder,
    tokenizer: Tokenizer,
    load_size: int,
    step: int,
    out: Path,
    fit: str = "crop",
) -> None:
    """Write the model, as it is after `step` steps, to the folder `out`.

    load_size, fit: how pictures become squares; see `ito.config.Config`.

    Files are replaced only when all of them are written, so a full disk leaves the old ones. Raises
    OSError naming the file.
    """
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    about = {"architecture": model.architecture, "load_size": load_size, "fit": fit, "step": step}
    tokens = tokenizer.bpe.to_str(pretty=True).encode()
    files = {  # written and renamed from the last on: without weights there is no model yet
        WEIGHTS: save_tensors(weights, tokenizer=hashlib.sha256(tokens).hexdigest()),
        ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
        TOKENS: tokens,
    }
    with ExitStack() as written:
        places = {name: written.enter_context(write_atomically(out / name)) for name in files}
        for name, content in reversed(files.items()):
            with naming(out / name):
                places[name].write_bytes(content)


class Encoder:
    """An exported model. Embeddings are unit rows, fp32, on the CPU: `image @ text.T` are cosines.

    Attributes: `model`, `tokenizer`, `step` (optimizer steps it was trained for), `fit` (how a
    picture becomes a square: crop, pad or warp), and `max_pixels`; larger pictures are refused.
    """

    max_pixels = MAX_PIXELS

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, load_size: int, step: int, fit: str = "crop"
    ):
        self.model, self.tokenizer, self.load_size, self.step = model, tokenizer, load_size, step
        self.fit = fit

    def encode_image(self, images: Picture | Iterable[Picture]) -> torch.Tensor:
        """Embeddings `(K, E)` of one picture or several.

        A picture is a path, the bytes of a file, a PIL image, a uint8 array (H, W, 3), (H, W) of
        grey, (H, W, 4) with opacity, or a uint8 tensor (3, H, W). Several are an iterable of such,
        of any kinds, or one array or tensor with a first dimension K. The pixels of a PNG give the
        embedding of its file; those of a large JPEG differ a little, because a file is decoded at a
        fraction of its size.

        As in training, the model sees the centred square of a picture, or all of it (`fit`), on
        white. Raises TypeError for anything else, and ValueError naming a picture that cannot be
        read or is too large, or an array of another shape or dtype.
        """
        if isinstance(images, torch.Tensor | np.ndarray):
            one = images.ndim < 4
        else:
            one = isinstance(images, Image.Image | str | os.PathLike | bytes)
        if not one and (isinstance(images, dict) or not isinstance(images, Iterable)):
            raise TypeError(f"images must be {PICTURE}; or several; got {type(images).__name__}")
        squares = [self.square(image, n) for n, image in enumerate([images] if one else images)]
        if not squares:
            return torch.empty(0, self.model.architecture["width"])
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
        return embed_images(self.model, pixels)

    def encode_text(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Embeddings `(K, E)` of texts; texts longer than the context are cut. Raises TypeError for
        anything else."""
        if not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a text, or several; got {type(texts).__name__}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.model.architecture["width"])
        return embed_texts(self.model, self.tokenizer(texts))

    def square(self, picture: Picture, number: int) -> np.ndarray:
        if isinstance(picture, torch.Tensor | np.ndarray):
            limit = math.inf  # it is in memory already
            return square(as_picture(picture, number), self.load_size, limit, self.fit)
        if isinstance(picture, Image.Image):
            try:
                if 0 in picture.size:
                    raise ValueError(f"it has {picture.width} × {picture.height} pixels")
                return square(picture, self.load_size, self.max_pixels, self.fit)
            except Refused as error:
                raise ValueError(f"images[{number}]: the picture {error}") from None
            except Exception as error:  # Pillow reads the file only now, and raises anything
                raise ValueError(f"images[{number}]: unreadable picture: {error}") from None
        if not isinstance(picture, str | os.PathLike | bytes):
            raise TypeError(f"images[{number}] must be {PICTURE}; got {type(picture).__name__}")
        place = Contents(picture) if isinstance(picture, bytes) else Path(picture)
        pixels = decode(place, self.load_size, self.max_pixels, self.fit)
        if isinstance(pixels, str):
            raise ValueError(f"images[{number}]: {pixels}")
        return pixels


class Contents(NamedTuple):
    """The bytes of a picture's file, for `decode`."""

    data: bytes

    def __str__(self) -> str:
        return f"a file of {len(self.data)} bytes"

    def read_bytes(self) -> bytes:
        return self.data


def as_picture(values: torch.Tensor | np.ndarray, number: int) -> Image.Image:
    """An array (H, W), (H, W, 3) or (H, W, 4), or a tensor (3, H, W), of uint8, as a picture."""
    shape, torch_form = tuple(values.shape), isinstance(values, torch.Tensor)
    if torch_form:
        wanted, fits = "(3, H, W)", len(shape) == 3 and shape[0] == 3
    else:
        wanted = "(H, W, 3), (H, W) or (H, W, 4)"
        fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
    if str(values.dtype) not in ("uint8", "torch.uint8") or not fits or 0 in shape:
        raise ValueError(f"images[{number}] must be uint8 {wanted}, got {values.dtype} {shape}")
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy() if torch_form else values)


def load(run: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The exported model of a run folder, or of a `model/` folder itself.

    Raises FileNotFoundError if there is none, and ValueError naming a file that is damaged, or a
    device that there is not. Models exported by older versions have no checksums and are not
    verified.
    """
    device = find_device(device)
    if device.type == "meta":
        raise ValueError("device meta: it computes nothing")
    exported = RunFolder(run).model
    folder = exported if exported.is_dir() else Path(run)
    if not (folder / WEIGHTS).exists():
        written = (
            f"({exported.name}/{WEIGHTS}); a run writes it with its first checkpoint, and `python "
            "-m ito.export RUN` from its newest"
        )
        why = written if Path(run).exists() else "because it does not exist"
        raise FileNotFoundError(f"{run} holds no exported model {why}")
    with undamaged(folder / WEIGHTS) as path:
        weights, sums = load_tensors(path)
    with undamaged(folder / ABOUT) as path:
        about = json.loads(read_text(path))
        model = built(about["architecture"], weights)
        load_size, step = about["load_size"], about["step"]
        fit = about.get("fit", "crop")  # older versions had no other
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        if type(step) is not int or type(load_size) is not int:
            raise TypeError(f"step and load_size must be numbers, got {step!r} and {load_size!r}")
        if not 0 < load_size <= 2 * model.architecture["image_size"]:
            raise ValueError(f"load_size must be at most twice the image_size, got {load_size}")
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    with undamaged(folder / TOKENS) as path:
        verify(hashlib.sha256(require_file(path).read_bytes()).hexdigest(), sums.get("tokenizer"))
        tokenizer = Tokenizer.load(path)
        require_fit(tokenizer, model.architecture, path)
    return Encoder(model, tokenizer, load_size, step, fit)


def built(architecture: dict, weights: dict[str, torch.Tensor]) -> DualEncoder:
    """The model with these weights.

    Raises ValueError if they are another model's, before any memory is taken for it: the sizes may
    be anything.
    """
    require_shapes(architecture, weights)
    model = DualEncoder(**architecture)
    model.load_state_dict(weights)
    return model


def require_shapes(architecture: dict, weights: dict[str, torch.Tensor]) -> None:
    """Raises ValueError or TypeError if a model of this architecture has no such weights."""
    for name, value in architecture.items():
        if name in ("image_encoder", "text_encoder"):
            continue
        most = len(weights) if name.endswith("depth") else MOST_SIZE
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise ValueError(f"{name} must be a number from 1 to {most}, got {value!r}")
    planned, others = [], {}
    for number, (tower, nothing) in enumerate(NO_TOWER.items()):
        if encoder := architecture.get(f"{tower}_encoder"):
            planned.append((f"{tower}.body.", planned_body(encoder, number)))
            others |= nothing
    with torch.device("meta"):  # shapes without memory
        own = DualEncoder(**architecture | others)
    own_towers = [tower for tower in NO_TOWER if f"{tower}_encoder" not in others]
    planned += [(f"{tower}.", getattr(own, tower)) for tower in own_towers]
    for prefix, module in planned:
        if module is None:
            continue
        wanted = {f"{prefix}{n}": tuple(value.shape) for n, value in module.state_dict().items()}
        found = {n: tuple(value.shape) for n, value in weights.items() if n.startswith(prefix)}
        if other := sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n)):
            name = other[0]
            raise ValueError(f"{name} must be {wanted.get(name)}, got {found.get(name)}")


def saved_tokenizer(state: dict, run: RunFolder) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Checkpoints of older versions hold none: it is then read from the exported model,
    `model/tokenizer.json`, without a checksum.

    Raises ValueError naming the file if it is damaged, or does not fit the checkpoint's model.
    """
    inside = "tokenizer" in state
    with undamaged(run.checkpoints if inside else run.model / TOKENS) as path:
        tokenizer = Tokenizer.parse(state["tokenizer"]) if inside else Tokenizer.load(path)
        require_fit(tokenizer, state["architecture"], path)
    return tokenizer


def require_fit(tokenizer: Tokenizer, architecture: dict, path: Path) -> None:
    """Raises FileError if the tokenizer's sizes are not those of the text tower."""
    for name in ("vocab_size", "context_length"):
        found, expected = getattr(tokenizer, name), architecture[name]
        if found != expected:
            raise FileError(f"{path} is of another model: {name} {found}, expected {expected}")
    size, highest = tokenizer.vocab_size, max(tokenizer.bpe.get_vocab().values())
    if not architecture.get("text_encoder") and highest >= size:
        raise FileError(f"{path} is damaged: its ids must be below {size}, got {highest}")
