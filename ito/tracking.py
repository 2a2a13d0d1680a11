"""`--report-to`: what a run logs goes to TensorBoard or Weights & Biases as well, by their own
libraries. Options of either are those of its environment variables (`WANDB_MODE=offline`, ...)."""

import secrets
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ito.files import read_text, write_text

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def import_library(name: str):
    """The library. Raises ImportError naming the extra, if it is not installed."""
    try:
        return import_module(LIBRARIES[name])
    except ImportError as error:
        about = f"--report-to {name} needs {name} ({error.name or error} is not installed here)"
        raise ImportError(f"{about}: pip install 'ito_trainer[{name}]'") from None


def open_tracker(name: str, run: Path, config: dict, step: int) -> tuple[Callable, Callable]:
    """What takes the values of a step, by name, and what ends it with an exit status.

    step: of the checkpoint that the run goes on from; TensorBoard drops what it has of later steps.
    """
    library = import_library(name)
    if name == "wandb":  # its files hold links, which a run folder must not
        own = run / "wandb.txt"
        if not step or not own.exists():
            write_text(own, secrets.token_hex(4))
        begun = library.init(id=read_text(own), name=run.name, config=config, resume="allow")
        return begun.log, begun.finish
    writer = library.SummaryWriter(str(run / name), purge_step=step + 1 if step else None)

    def log(values: dict[str, float], step: int) -> None:
        for title, value in values.items():
            writer.add_scalar(title, value, step)
        writer.flush()

    return log, lambda status: writer.close()
