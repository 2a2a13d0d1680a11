"""Files that are whole or absent: checkpoints and everything else that a killed run may leave."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

KEPT = 2  # one to continue from, and one before it


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, flushed to the disk and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(run: Path, step: int, state: dict) -> None:
    """`state` after `step` steps, into `run/checkpoints`; the newest KEPT stay."""
    folder = run / "checkpoints"
    path = folder / f"step_{step:07d}.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    for old in sorted(folder.glob("step_*.pt"))[:-KEPT]:
        old.unlink()


@contextmanager
def undamaged(path: Path) -> Iterator[Path]:
    """Names the file that cannot be read: ValueError, or the system's error where it is missing."""
    try:
        yield path
    except OSError:
        raise
    except Exception as error:  # torch, pickle, zipfile and tokenizers raise what they like
        raise ValueError(
            f"{path} is damaged, or not of this run ({type(error).__name__})"
        ) from None


def load_checkpoint(run: Path) -> dict:
    """The newest checkpoint of a run; FileNotFoundError if it has none."""
    found = sorted((run / "checkpoints").glob("step_*.pt"))
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint (checkpoints/step_*.pt)")
    with undamaged(found[-1]) as path:
        return torch.load(path, weights_only=True, map_location="cpu")
