"""Trains, is killed, and goes on: `python -m support.kills DATA OUT KIND HOW COUNT SEED`, of the
KIND memory or stream, killed at `random` moments or while `saving`.

Forks a process for each training from this one, which has imported everything: a kill then takes a
second, not five. Prints one line of JSON with the counts, or fails.
"""

import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch

import ito
from ito import train
from ito.checkpoint import checkpoints, load_checkpoint
from ito.run import Log
from support.quick_run import TINY, steady

STEPS = ["--steps", "8", "--log-every", "1", "--eval-every", "4", "--checkpoint-every", "2"]
CALLS = ("fsync", "replace")  # of which each written file makes one each, and `unlink` an old one


def start(arguments: list[str], at: int | None = None, total: Path | None = None) -> int:
    """Train in a process of its own. at: it kills itself before this call of CALLS. total: where it
    writes the number of calls."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    told = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        seen = count_calls(at) if at or total else []
        train.main(arguments)
        if total:
            total.write_text(str(len(seen)))
        os._exit(0)
    except BaseException as error:
        os.write(told, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def count_calls(at: int | None) -> list[str]:
    seen = []

    def counted(call):
        def inner(*arguments, **options):
            seen.append(call.__name__)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return inner

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return seen


def ended(pid: int) -> bool:
    """Waits; False if it was killed. Raises if it failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise SystemExit(f"a training ended with {status}")
    return True


def require_whole(run: Path) -> int:
    """Every checkpoint, the exported model and the log can be read. Returns the checkpoints."""
    found = checkpoints(run / "checkpoints")
    for step, path in found.items():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
        assert torch.load(path, weights_only=True)["step"] == step
    if found:
        load_checkpoint(run / "checkpoints")
        ito.load(run)
    if (run / "metrics.jsonl").exists():
        Log(run / "metrics.jsonl").read()
    return len(found)


def same(run: Path, whole: Path) -> None:
    """The run's numbers, weights and files are those of the run that was not killed."""
    assert steady(run) == steady(whole), run
    for name in ("model/model.safetensors", "model/tokenizer.json", "data.json", "config.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), run / name
    now, before = (load_checkpoint(folder / "checkpoints") for folder in (run, whole))
    for part in ("model", "objective"):
        assert all(torch.equal(now[part][key], value) for key, value in before[part].items())
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (run, whole)]
    assert not {name for name in names[0] ^ names[1] if name.suffix != ".tmp"}, names


class Trainings:
    """Those of one kind: options, the run that is not killed, and how long it takes."""

    def __init__(self, root: Path, kind: str, options: list[str]):
        self.root, self.kind, self.options, self.runs = root, kind, options, 0
        self.whole, total = root / kind, root / f"{kind}-calls"
        began = time.monotonic()
        assert ended(start(self.arguments(self.whole), total=total))
        self.seconds = time.monotonic() - began
        self.calls = int(total.read_text())

    def arguments(self, run: Path) -> list[str]:
        if (run / "config.json").exists():
            return ["--resume", str(run)]
        return [*self.options, "--out", str(run)]

    def new(self) -> Path:
        self.runs += 1
        return self.root / f"{self.kind}-killed{self.runs}"


def at_random(trainings: Trainings, count: int, chance: random.Random) -> int:
    """Kill `count` times at any moment, of as many runs as that takes, and finish the last one.
    Returns how many checkpoints were read after kills."""
    kills = checked = 0
    run = trainings.new()
    while kills < count:
        pid = start(trainings.arguments(run))
        time.sleep(chance.uniform(0, trainings.seconds))
        os.kill(pid, signal.SIGKILL)
        if ended(pid):
            same(run, trainings.whole)
            run = trainings.new()
        else:
            kills += 1
            checked += require_whole(run)
    assert ended(start(trainings.arguments(run)))
    same(run, trainings.whole)
    return checked


def while_saving(trainings: Trainings, count: int, chance: random.Random) -> int:
    """Kill before `count` of the calls that make a file whole, each of a run of its own."""
    checked, every = 0, range(1, trainings.calls + 1)
    for at in chance.sample(every, min(count, len(every))):
        run = trainings.new()
        assert not ended(start(trainings.arguments(run), at))
        checked += require_whole(run)
        assert ended(start(trainings.arguments(run)))
        same(run, trainings.whole)
    return checked


def main(data: str, out: str, kind: str, how: str, count: int, seed: int) -> None:
    more = ["--stream", "--val-data", data, "--workers", "1"] if kind == "stream" else []
    options = ["--train-data", data, *TINY.split(), *STEPS, "--threads", "1", *more]
    trainings = Trainings(Path(out), kind, options)
    kill = {"random": at_random, "saving": while_saving}[how]
    checked = kill(trainings, count, random.Random(seed))
    found = {"kills": count, "runs": trainings.runs, "checkpoints": checked}
    print(json.dumps(found | {"calls": trainings.calls, "seconds": trainings.seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:]))
