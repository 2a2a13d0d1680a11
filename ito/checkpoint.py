"""The checkpoints of a run: what it continues from, checked when it is read.

A checkpoint is a zip archive, as torch.save writes it, and holds a checksum (CRC-32) of each of its
parts. torch.load does not look at them: to it, a flipped bit is another weight.
"""

import re
import zipfile
from pathlib import Path

import torch

from ito.files import require_file, write_atomically

KEPT = 2  # one to continue from, and one before it


def checkpoints(folder: Path, strict: bool = True) -> dict[int, Path]:
    """Those in `folder` by their steps, in order.

    Raises ValueError naming a file step_*.pt that is none; without `strict` it is passed over.
    """
    found = {}
    for path in folder.glob("step_*.pt"):
        number = re.fullmatch(r"step_(\d+)\.pt", path.name)
        if number:
            found[int(number[1])] = path
        elif strict:
            raise ValueError(f"{path} has no name of a checkpoint (step_0000300.pt): move it away")
    return dict(sorted(found.items()))


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """`state` after `step` steps; the newest KEPT stay."""
    path = folder / f"step_{step:07d}.pt"
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state | {"step": step}, file)
        except RuntimeError as error:  # torch's own; a full disk's OSError is its context
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for old in list(checkpoints(folder, strict=False).values())[:-KEPT]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict:
    """The newest checkpoint in `folder`.

    Raises FileNotFoundError if there is none, ValueError naming the file, and how to go on without
    it, if it is damaged or not of the step that its name says.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder.parent} holds no checkpoint ({folder.name}/step_*.pt)")
    *earlier, (step, path) = found.items()
    start = earlier[-1][1].name if earlier else "step 0"
    advice = f"remove it, and --resume continues from {start}"
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part:
            raise zipfile.BadZipFile(f"{part} does not have its checksum")
        state = torch.load(path, weights_only=True, map_location="cpu")
        held = state["step"]
    except OSError:
        raise
    except Exception as error:  # torch, pickle and zipfile raise what they like
        why = error if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise ValueError(f"{path} is damaged ({why}): {advice}") from None
    if held != step:
        raise ValueError(f"{path} holds step {held}, which is not its name's: {advice}")
    return state
