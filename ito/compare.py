"""`python -m ito.compare`: train several objectives on equal budgets and seeds, and compare them.

Each run is one `python -m ito.train` with the same data, towers, batches and steps; only the
objective differs. Give the same command again to continue: finished runs are kept and interrupted
runs are resumed. At the end it writes `comparison.md` and its plots.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ito.cli import Parser, output_path, user_errors
from ito.config import Config, add_options, flag, from_options
from ito.files import read_json, write_text
from ito.run import RunFolder, executed, locked, refuse_strange
from ito.scoring.comparison import write_comparison

# The options of each arm, added to those that all share.
ARMS = {
    "clip": {"objective": "clip"},
    "clip-aug": {"objective": "clip-aug"},
    "slip": {"objective": "slip"},
    "siglip": {"objective": "siglip"},
    "flair": {"objective": "flair"},
    "ito-align": {"objective": "ito", "lambda_fusion": 0.0},
    "ito": {"objective": "ito"},
    # ablations, trained only if named
    "ito-lambda-0.5": {"objective": "ito", "lambda_fusion": 0.5},
    "ito-lambda-1": {"objective": "ito", "lambda_fusion": 1.0},
    "ito-lambda-6": {"objective": "ito", "lambda_fusion": 6.0},
    "ito-lambda-falling": {"objective": "ito", "lambda_schedule": "cosine"},
    "ito-depth-1": {"objective": "ito", "fusion_depth": 1},
    "ito-depth-4": {"objective": "ito", "fusion_depth": 4},
    "ito-mean": {"objective": "ito", "fusion_readout": "mean"},
    "ito-pooled": {"objective": "ito", "denominator": "pooled"},
    "ito-own-scale": {"objective": "ito", "fusion_scale": "own"},
    "ito-stop-gradient": {"objective": "ito", "fusion_stop_gradient": "both"},
    "ito-text-shuffled": {"objective": "ito", "fusion_text": "shuffled"},
    "ito-text-dropped": {"objective": "ito", "fusion_text": "dropped"},
}
MAIN = tuple(ARMS)[:7]
DECIDED = tuple(sorted({"seed"}.union(*ARMS.values())))


@dataclass(frozen=True)
class Run:
    """One training: `name` is its folder, `options` those of `python -m ito.train`."""

    arm: str
    seed: int
    config: Config
    options: list[str]

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def main(arguments: list[str] | None = None) -> Path:
    parser = Parser(prog="python -m ito.compare", usage="%(prog)s [options]", description=__doc__)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        help="output folder (default: runs/compare)",
    )
    group.add_argument(
        "--arms",
        nargs="+",
        choices=tuple(ARMS),
        default=list(MAIN),
        metavar="ARM",
        help=f"runs to train, from {', '.join(ARMS)} (default: {' '.join(MAIN)})",
    )
    group.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)"
    )
    group.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, which slows each (default: 1)"
    )
    group.add_argument(
        "--threads", type=int, help="CPU threads per run (default: PyTorch's choice)"
    )
    group.add_argument(
        "--report-only", action="store_true", help="train nothing; report the runs that exist"
    )
    add_options(parser, hidden=DECIDED)
    with user_errors():
        options = parser.parse_args(arguments)
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
        output_path("--out", options.out)
        refuse_strange(options.out)
        if not options.report_only:
            runs = plan(options)
            options.out.mkdir(parents=True, exist_ok=True)
            with locked(options.out):
                train_all(runs, options)
        data = ("train_data", "val_data")
        given = {name: value for name, value in vars(options).items() if name in data}
        return write_comparison(options.out, options.cache, given)


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs, seed by seed, so that an interrupted comparison has some runs of every arm."""
    for name in ("seeds", "arms"):
        if len(set(values := getattr(options, name))) < len(values):
            raise ValueError(f"--{name} must differ, got {' '.join(map(str, values))}")
    given = {name: x for name, x in vars(options).items() if name in Config().flat()}
    for name in DECIDED:
        if name in given:
            raise ValueError(f"{flag(name)} is set by the arms of a comparison: drop it")
    runs = []
    for seed in options.seeds:
        for arm in options.arms:
            chosen = given | ARMS[arm] | {"seed": seed}
            config = from_options(argparse.Namespace(**chosen))
            runs.append(Run(arm, seed, config, command_line(chosen)))
    return runs


def command_line(chosen: dict) -> list[str]:
    """The options of `python -m ito.train` for these values."""
    words = []
    for name, value in chosen.items():
        if value is True:  # an option without a value, given only if it is on
            words.append(flag(name))
        elif name == "locked":
            towers = ("image", "text") if value == "both" else (value,)
            words += [f"--lock-{tower}" for tower in towers]
        else:
            values = value if isinstance(value, list) else [value]
            words += [flag(name), *map(str, values)]
    return words


def train_all(runs: list[Run], options: argparse.Namespace) -> None:
    environment = dict(os.environ)
    if options.cache:
        environment["ITO_CACHE"] = str(options.cache.absolute())
    if options.threads:  # of the evaluation too: three on one core took 120 s instead of 25
        environment["OMP_NUM_THREADS"] = str(options.threads)
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(
            lambda run: train(run, options.out, options.threads, environment), runs
        ):
            print(line, flush=True)


def train(run: Run, out: Path, threads: int | None, environment: dict) -> str:
    """Train a run, or resume it, and evaluate it. Raises OSError with the end of its output."""
    folder, log = out / run.name, out / f"{run.name}.log"
    cost, scores = RunFolder(folder).cost, RunFolder(folder).evaluation
    begun = is_begun(folder, run)
    if begun and cost.exists() and scores.exists():
        return f"{run.name}: finished before"
    if not (begun and cost.exists()):
        words = [sys.executable, "-m", "ito.train"]
        # what a run's config.json names is run only if it is given again
        again = ["--resume", str(folder), *command_line(executed(run.config))]
        words += again if begun else ["--out", str(folder), *run.options]
        words += ["--threads", str(threads)] if threads else []
        write_text(cost, json.dumps(call(words, log, environment)) + "\n")
    words = [sys.executable, "-m", "ito.evaluate", str(folder), "--json", str(scores)]
    places = {name: getattr(run.config, name) for name in ("train_data", "val_data")}
    words += command_line({name: place for name, place in places.items() if place})
    call(words, log, environment)
    peak = read_json(cost)["peak_bytes"]
    return f"{run.name}: {run.config.steps} steps, {peak / 2**20:.0f} MiB at most"


def call(words: list[str], log: Path, environment: dict) -> dict:
    """Run a command, append its output to the log, and return what it cost.

    Raises OSError with the end of its output if it fails.
    """
    with log.open("a", encoding="utf-8") as file:
        before = file.tell()
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = "\n".join(log.read_bytes()[before:].decode("utf-8", "replace").splitlines()[-5:])
        raise OSError(f"{' '.join(words[1:4])} ended with {process.returncode}:\n{end}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": usage.ru_maxrss * kilobyte, "cpu_seconds": usage.ru_utime}


def is_begun(folder: Path, run: Run) -> bool:
    """Whether the folder holds this run. Raises ValueError if it holds one with other options."""
    if not RunFolder(folder).config.exists():
        return False
    found = RunFolder(folder).read_config().flat()
    other = [name for name, value in run.config.flat().items() if found[name] != value]
    if other:
        about = f"was trained with another {', '.join(other)}"
        raise ValueError(f"{folder} {about}: name another --out")
    return True


if __name__ == "__main__":
    main()
