"""The checkpoints of a run: what it continues from, checked when it is read.

A checkpoint is a zip archive, as torch.save writes it, and holds a checksum (CRC-32) of each of its
parts. torch.load does not look at them: to it, a flipped bit is another weight.
"""

import re
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer as BPE

from ito.files import write_atomically
from ito.model.tokenizer import Tokenizer

KEPT = 2  # one to continue from, and one before it


def checkpoints(run: Path) -> dict[int, Path]:
    """By their steps, in order. Raises ValueError naming a file among them that is none."""
    found = {}
    for path in (run / "checkpoints").glob("step_*.pt"):
        number = re.fullmatch(r"step_(\d+)\.pt", path.name)
        if not number:
            raise ValueError(f"{path} has no name of a checkpoint (step_0000300.pt): move it away")
        found[int(number[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(run: Path, step: int, state: dict) -> None:
    """`state` after `step` steps, into `run/checkpoints`; the newest KEPT stay."""
    path = run / "checkpoints" / f"step_{step:07d}.pt"
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state | {"step": step}, file)
    for old in list(checkpoints(run).values())[:-KEPT]:
        old.unlink()


def load_checkpoint(run: Path) -> dict:
    """The newest checkpoint of a run.

    Raises FileNotFoundError if it has none, ValueError naming the file, and how to go on without
    it, if it is damaged or not of the step that its name says.
    """
    found = checkpoints(run)
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint (checkpoints/step_*.pt)")
    *earlier, (step, path) = found.items()
    start = earlier[-1][1].name if earlier else "step 0"
    advice = f"remove it, and --resume continues from {start}"
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


def saved_tokenizer(run: Path, state: dict) -> Tokenizer:
    """That of a checkpoint; older ones have it in `run/model` alone, where nothing checks it."""
    if "tokenizer" in state:
        return Tokenizer(BPE.from_str(state["tokenizer"]))
    return Tokenizer.load(run / "model" / "tokenizer.json")
