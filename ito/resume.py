"""What may change when a run is resumed, and what has changed since it began."""

import argparse
import hashlib
import json

import numpy as np

from ito.checkpoint import checkpoints
from ito.cli import shown
from ito.config import Config, flag, from_options, with_absolute_paths
from ito.data.dataset import Dataset
from ito.run import RunFolder, executed, refuse_commands
from ito.stream import Stream, first_captions

PLACES = ("train_data", "val_data", "image_root")  # of data, which may have moved
FREE = (*PLACES, "steps", "log_every", "eval_every", "checkpoint_every")
FREE += ("accum_freq", "grad_checkpointing")
HASHED_CAPTIONS = 10_000  # of a stream


def resumed_config(options: argparse.Namespace) -> Config:
    """The configuration of the run to resume, with those of the options FREE that are given.

    Raises ValueError for other options that change it, for fewer steps than are done, and if the
    configuration names a command or a file to run that the options do not.
    """
    run = options.resume
    if options.preset:
        raise ValueError(f"--resume keeps the run's configuration: drop --preset {options.preset}")
    if options.out:
        raise ValueError(f"--resume {run} continues in that folder: drop --out {options.out}")
    if not RunFolder(run).config.is_file():
        raise FileNotFoundError(f"--resume: no run folder at {run}")
    saved = RunFolder(run).read_config()
    given = with_absolute_paths({n: v for n, v in vars(options).items() if n == "objective"})
    if given.get("objective", saved.objective) != saved.objective:
        raise ValueError("--resume keeps the run's configuration: drop --objective")
    refuse_commands(run, saved, vars(options), executed(saved))
    config = from_options(options, saved)
    before, now = saved.flat(), config.flat()
    changed = [flag(name) for name in now if now[name] != before[name] and name not in FREE]
    if changed:
        raise ValueError(f"--resume keeps the run's configuration: drop {', '.join(changed)}")
    done = max(checkpoints(RunFolder(run).checkpoints, strict=False), default=0)
    if config.steps < min(done, saved.steps):
        raise ValueError(f"--steps {config.steps}: {run} has done {done} steps already; name more")
    return config


def changed_data(run: RunFolder, config: Config, saved: dict, now: dict) -> list[str]:
    """What of the data has changed since the run began.

    saved, now: the run's environment when it began, and now.

    Raises ValueError if that is data which is said to have moved, and is not what it was.
    """
    before = run.read_config()
    places = {name: getattr(config, name) for name in PLACES}
    moved = {name: place for name, place in places.items() if place != getattr(before, name)}
    hashes = saved.get("sha256", {})
    changed = [name for name, value in hashes.items() if now["sha256"].get(name) != value]
    # another version may decode the same files to slightly other pixels
    other_pillow = saved.get("pillow", now["pillow"]) != now["pillow"]
    excused = {"pictures", "training pictures"} if other_pillow else set()
    if moved and not excused.issuperset(changed):
        given = ", ".join(f"{flag(name)} {place}" for name, place in moved.items())
        raise ValueError(
            f"{given} is not the data that the run began with: {', '.join(changed)} differ; "
            f"to train its model on other data, begin a run with --pretrained {run.path}"
        )
    for name, place in moved.items():
        print(f"moved      {name} is {shown(place)}")
    return changed


def data_hashes(eval_data: Dataset, train_data: Dataset | Stream) -> dict[str, str]:
    """Those of the data that is scored and, if it is another, of that trained on; of a stream, of
    its first captions."""
    hashes = fingerprint(eval_data)
    if isinstance(train_data, Stream):
        captions = first_captions(train_data.shards, HASHED_CAPTIONS)
        hashes["stream"] = digest(json.dumps(captions).encode())
    elif train_data is not eval_data:
        trained = fingerprint(train_data)
        hashes |= {f"training {name}": value for name, value in trained.items()}
    return hashes


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Hashes of the data that training and scores depend on, by name. Paths are not hashed."""
    texts = {
        "items": [dataset.items, dataset.image_item.tolist()],
        "captions": dataset.captions,
        "splits": dataset.split,
        "groups": [dataset.group, dataset.subgroup],
    }
    found = {name: digest(json.dumps(value).encode()) for name, value in texts.items()}
    return found | {"pictures": digest(dataset.images.numpy())}


def digest(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
