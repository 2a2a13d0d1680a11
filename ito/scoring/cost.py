"""The cost of a training step of each run, measured in turns in one process.

The logged seconds of runs depend on the load of the machine: two seeds of the same objective,
trained at different times next to other runs, differed by a factor of 1.3.
"""

import statistics
import time
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ito.compiled import compile_towers
from ito.model.exported import load
from ito.model.pretrained import described_encoders
from ito.ranks import Ranks
from ito.run import RunFolder
from ito.source import open_data
from ito.trainer import Trainer

WARMUP, ROUNDS = 3, 20


@dataclass(frozen=True)
class StepCost:
    """Medians, in seconds: of a step, of the part in which the model waited for its batch, and of
    the processor time in which the loader's thread prepared the next batch."""

    seconds: float
    input: float
    loader: float


def step_costs(runs: dict[str, Path], cache: Path | None = None) -> dict[str, StepCost]:
    """Train the first steps of finished runs on the same data again, with their threads, dtype and
    device, and return the costs by name."""
    trainers: dict[str, Trainer] = {}
    data = None
    for name, folder in runs.items():
        config = RunFolder(folder).read_config()
        # so that a next batch is always prepared
        config = replace(config, steps=max(config.steps, WARMUP + ROUNDS + 1))
        environment = RunFolder(folder).read_environment()
        torch.set_num_threads(environment["threads"])
        if data is None or config.stream:  # a stream has one position, so each run needs its own
            _, data = open_data(config, cache, 0, Ranks())
        exported = load(folder)
        trainers[name] = Trainer(
            config,
            data,
            exported.tokenizer,
            torch.device(environment["device"]),
            getattr(torch, environment["dtype"].removeprefix("torch.")),
            described=described_encoders(exported.model.architecture),
        )
        if environment["compile"]:
            compile_towers(trainers[name].model, trainers[name].objective)
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in trainers}
    for number in range(WARMUP + ROUNDS):
        for name, trainer in trainers.items():
            before = clocks(trainer)
            trainer.step(number)
            ended = time.perf_counter()
            wait(trainer.ahead.values())  # count it here, not in the next trainer's time
            late = time.perf_counter() - ended
            took, waited, loader = (b - a for a, b in zip(before, clocks(trainer), strict=True))
            spent[name].append((took + late, waited + late, loader))
    return {
        name: StepCost(*(statistics.median(x) for x in zip(*steps[WARMUP:], strict=True)))
        for name, steps in spent.items()
    }


def clocks(trainer: Trainer) -> tuple[float, float, float]:
    return trainer.seconds, trainer.input_seconds, trainer.loader_seconds
