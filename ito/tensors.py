"""Safetensors files with a checksum of their content, which the format itself lacks."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from ito.files import require_file


def checksum(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, in alphabetical order."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class WrongChecksum(ValueError):
    """The file can be read, but its content is not what was written."""


def verify(found: str, expected: str | None) -> None:
    if expected not in (found, None):
        raise WrongChecksum


def save_tensors(tensors: dict[str, torch.Tensor], **sums: str) -> bytes:
    """The bytes of a safetensors file with a checksum of the tensors, and further ones, `sums`."""
    sums |= {"tensors": checksum(tensors)}
    # one entry: safetensors does not keep the order of several
    return save(tensors, {"sha256": json.dumps(sums)})


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, and the checksums if the file has any. Raises WrongChecksum."""
    with safe_open(require_file(path), "pt") as file:
        sums = json.loads((file.metadata() or {}).get("sha256", "{}"))
    tensors = load_file(path)
    verify(checksum(tensors), sums.get("tensors"))
    return tensors, sums
