"""The checkpoints of a run, from which it is resumed. Their checksums are verified.

torch.save writes a zip archive with a checksum (CRC-32) of each part. torch.load does not verify
them: it takes a flipped bit for another weight.
"""

import re
import shutil
import zipfile
from pathlib import Path

import torch

from ito.files import require_file, undamaged, write_atomically
from ito.sharding import read_weights

STATES = ("model", "objective", "optimizer", "scaler", "architecture", "shards")
KEPT = 2  # the newest, and one before it in case it is damaged


def checkpoints(folder: Path, strict: bool = True) -> dict[int, Path]:
    """The checkpoints in `folder` by step, in ascending order.

    Raises ValueError for a file step_*.pt whose name holds no number; unless `strict`, it is
    ignored.
    """
    found = {}
    for path in folder.glob("step_*.pt"):
        number = re.fullmatch(r"step_(\d+)\.pt", path.name)
        if number:
            found[int(number[1])] = path
        elif strict:
            raise ValueError(f"{path} has no name of a checkpoint (step_0000300.pt): move it away")
    return dict(sorted(found.items()))


def shards_of(folder: Path, step: int) -> Path:
    """The folder of the shards, written before the checkpoint itself, if it is sharded."""
    return folder / f"step_{step:07d}"


def save_checkpoint(folder: Path, step: int, state: dict, best: int | None = None) -> None:
    """Write `state` after `step` steps, and delete all but the newest KEPT checkpoints and that of
    the step `best`."""
    path = folder / f"step_{step:07d}.pt"
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state | {"step": step}, file)
        except RuntimeError as error:  # torch's own; a full disk's OSError is its context
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for number, old in list(checkpoints(folder, strict=False).items())[:-KEPT]:
        if number != best:
            old.unlink()
    for shards in folder.glob("step_" + "[0-9]" * 7):  # also of a process that was killed
        if not shards.with_suffix(".pt").exists():
            shutil.rmtree(shards)


def load_checkpoint(folder: Path, step: int | None = None, shapes_only: bool = False) -> dict:
    """The newest checkpoint in `folder`, or that of `step`.

    Of a sharded one the weights are whole, without moments; or tensors without memory of their
    shapes.

    Raises FileNotFoundError if there is none, and ValueError if it is damaged or not of the step
    that its name says. The message names the file, and how to continue without it.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder.parent} holds no checkpoint ({folder.name}/step_*.pt)")
    if step is not None and step not in found:
        raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}")
    *earlier, (step, path) = [pair for pair in found.items() if step is None or pair[0] <= step]
    start = earlier[-1][1].name if earlier else "step 0"
    advice = f"remove it, and --resume continues from {start}"
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed: torch.save does not do so")
            part = archive.testzip()
        if part:
            raise zipfile.BadZipFile(f"{part} does not have its checksum")
        state = torch.load(path, weights_only=True, map_location="cpu")
        held = state["step"]
        for name in STATES:
            if not isinstance(state.get(name, {}), dict):
                raise TypeError(name)
    except OSError:
        raise
    except Exception as error:  # torch, pickle and zipfile raise many types
        why = error if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise ValueError(f"{path} is damaged ({why}): {advice}") from None
    if held != step:
        raise ValueError(f"{path} holds step {held}, which is not the step of its name: {advice}")
    if "shards" in state:
        with undamaged(shards_of(folder, step)) as shards:
            state |= read_weights(shards, state["shards"], shapes_only)
    return state
