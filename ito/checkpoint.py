"""Files that are whole or absent: checkpoints and everything else that a killed run may leave."""

import os
from collections.abc import Callable
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


def load_checkpoint(run: Path) -> dict:
    """The newest checkpoint of a run; FileNotFoundError if it has none."""
    found = sorted((run / "checkpoints").glob("step_*.pt"))
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint (checkpoints/step_*.pt)")
    return torch.load(found[-1], weights_only=True, map_location="cpu")
