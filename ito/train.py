"""Train ITO: several views and captions of an item aligned, and fused, during training only.

Without arguments: prepares the small emoji set on first use, trains on it, evaluates on held-out
drawings, exports the dual encoder and writes a report.
"""

import argparse
import json
import platform
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from ito.checkpoint import load_checkpoint, save_checkpoint, undamaged, write_atomically
from ito.cli import user_errors
from ito.config import PRESETS, Config, add_options, from_options
from ito.data import Dataset, report_skipped
from ito.evaluate import evaluate, table
from ito.export import export, load
from ito.precision import choose_precision
from ito.ranks import Ranks
from ito.report import write_report
from ito.source import open_dataset
from ito.tokenizer import Tokenizer
from ito.trainer import Trainer


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m ito.train", usage="%(prog)s [options]", description=__doc__
    )
    run_options(parser)
    add_options(parser)
    with user_errors(), Ranks() as ranks:
        with ranks.together(), ranks.quiet():
            options = parser.parse_args(arguments)
            if options.resume:
                run, config = options.resume, resumed_config(options)
            else:
                run = options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
                config = from_options(options)
                refuse_used(run)
        dataset = ranks.leader_first(lambda: open_dataset(config, options.cache))
        return train(run, config, dataset, options, ranks)


def run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="run folder to create (runs/DATE-TIME)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="continue a run to its end")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="values for what is not given: the defaults, the full set, or the paper's recipes for "
        "your own --train-data (emoji-small)",
    )
    group.add_argument("--cache", type=Path, help="where prepared data lives (~/.cache/ito)")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the towers; auto: bf16 where the processor multiplies it (auto)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    group.add_argument(
        "--threads", type=thread_count, metavar="N", help="CPU threads (PyTorch's choice)"
    )


def thread_count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if int(text) > 1024:  # OpenMP would end the process without a word
        raise argparse.ArgumentTypeError(f"must be at most 1024, got {text}")
    return int(text)


def resumed_config(options: argparse.Namespace) -> Config:
    """The configuration of the run to resume; nothing but its intervals may be given anew."""
    run = options.resume
    if options.preset:
        raise ValueError(f"--resume keeps the run's configuration: drop --preset {options.preset}")
    if options.out:
        raise ValueError(f"--resume {run} continues in that folder: drop --out {options.out}")
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"--resume: no run folder at {run}")
    saved = Config.load(run / "config.json")
    free = ("log_every", "eval_every", "checkpoint_every", "accum_freq")
    if vars(options).get("objective", saved.objective) != saved.objective:
        raise ValueError("--resume keeps the run's configuration: drop --objective")
    config = from_options(options, saved)
    changed = [
        f"--{name.replace('_', '-')}"
        for name, value in config.flat().items()
        if value != saved.flat()[name] and name not in free
    ]
    if changed:
        raise ValueError(f"--resume keeps the run's configuration: drop {', '.join(changed)}")
    return config


def refuse_used(run: Path) -> None:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise FileExistsError(f"{run} exists; name another --out, or continue it with --resume")


def create_run(run: Path, named: bool) -> None:
    """Make the folder; it may be there already, empty, only if the user named it."""
    refuse_used(run)
    try:
        run.mkdir(parents=True, exist_ok=named)
    except OSError as error:
        raise OSError(f"--out: cannot create {run}: {error.strerror}") from error


def choose_device(name: str | None, saved: str | None, ranks: Ranks) -> torch.device:
    """The one named, or the run's before, or a GPU where there is one; each rank has its own."""
    asked = name or saved or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:  # no such name; a build or machine without it
        raise ValueError(f"--device {asked}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {asked}: training runs on cpu or cuda")
    if ranks.size > 1 and device.type == "cuda":
        if name not in (None, "cuda"):
            raise ValueError(f"--device {name}: each rank takes its own GPU; say cuda")
        if ranks.local >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: {torch.cuda.device_count()} GPUs for local rank {ranks.local}"
            )
        device = torch.device("cuda", ranks.local)
    return device


def train(
    run: Path, config: Config, dataset: Dataset, options: argparse.Namespace, ranks: Ranks
) -> Path:
    """Train from the run's newest checkpoint, or from scratch, to `config.steps`.

    Every rank computes; rank 0 alone evaluates and writes.
    """
    with ranks.together():
        resumed = load_checkpoint(run) if options.resume else None
        if resumed and resumed["step"] >= config.steps:
            print(f"resume     {run} is finished: it has all of its {config.steps} steps")
        machine, precision = {}, options.precision
        if resumed:  # as before: anything else would change the numbers
            with undamaged(run / "environment.json") as path:
                machine = json.loads(path.read_text(encoding="utf-8"))
            precision = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[resumed["dtype"]]
            if options.precision not in ("auto", precision):
                raise ValueError(
                    f"--resume keeps the run's precision, {precision}: "
                    f"drop --precision {options.precision}"
                )
        kept = machine if machine.get("ranks", 1) == ranks.size else {}
        if threads := options.threads or kept.get("threads"):
            torch.set_num_threads(threads)
        device = choose_device(options.device, machine.get("device"), ranks)
        dtype, reason = choose_precision(precision, device)
        print(f"data       {config.train_data}: {dataset.describe()}")
        if dataset.skipped:
            print(report_skipped(dataset.skipped))
        shared = f"{ranks.size} ranks, each {device.type}" if ranks.size > 1 else str(device)
        threads = f"{torch.get_num_threads()} threads"
        print(f"machine    {shared}, {threads}, torch {torch.__version__}")
        print(f"precision  {str(dtype).removeprefix('torch.')}: {reason}")

        start = load(config.pretrained) if config.pretrained else None
        if resumed:
            with undamaged(run / "model" / "tokenizer.json") as path:
                tokenizer = Tokenizer.load(path)
        elif start:
            tokenizer = start.tokenizer
        else:
            captions = training_captions(dataset)
            tokenizer = Tokenizer.train(captions, config.vocab_size, config.context_length)
        trainer = Trainer(config, dataset, tokenizer, device, dtype, ranks)
        if start and not resumed:
            trainer.start_from(start.model, config.pretrained)
            print(f"pretrained {config.pretrained}, step {start.step}")
        if trainer.batches.size < config.batch_size:
            size, wanted = trainer.batches.size, config.batch_size
            print(f"batch      {size}: all training items there are; --batch-size is {wanted}")
        for split in dataset.held_out_splits():
            if len(dataset.image_item[dataset.rows(split)].unique()) == 1:
                print(f"warning    {split} holds 1 item: R@1 is 100 % whatever is learned")
        now = environment(device, dtype, dataset, ranks)
        log = Log(run / "metrics.jsonl")
        if resumed:
            for name in machine:
                if now[name] != machine[name]:
                    print(
                        f"warning    {name} was {machine[name]}, is {now[name]}: numbers may differ"
                    )
            with undamaged(run / "checkpoints"):
                trainer.load(resumed)
            print(f"resume     {run} from step {resumed['step']}")
            if ranks.leads:
                log.forget_after(resumed["step"])
        elif ranks.leads:
            untrained = evaluate(trainer.model, tokenizer, dataset)
            create_run(run, named=options.out is not None)  # not before all input has passed
            config.save(run / "config.json")
            text = json.dumps(now, indent=2) + "\n"
            (run / "environment.json").write_text(text, encoding="utf-8")
            log.write("eval", 0, untrained)

    def checkpoint(step: int) -> None:
        about = {
            "step": step,
            "dtype": str(dtype),
            "architecture": trainer.model.architecture,
            "load_size": config.load_size,
        }
        export(trainer.model, tokenizer, config.load_size, step, run / "model")
        save_checkpoint(run, step, trainer.state() | about)

    step = first = resumed["step"] if resumed else 0
    began = time.perf_counter()
    bar = tqdm(
        total=config.steps,
        initial=first,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds: a log file is read later
        disable=not ranks.leads,
    )
    with Interrupt() as interrupt, bar:
        while step < config.steps and not ranks.any(interrupt.asked):
            terms = trainer.step(step)
            step += 1
            bar.update()
            if not ranks.leads:
                continue
            last = step == config.steps
            if last or step % config.log_every == 0:
                elapsed = time.perf_counter() - began
                rate = (step - first) * trainer.batches.size * config.views / elapsed
                log.write("train", step, terms | {"images_per_second": rate, "seconds": elapsed})
                bar.set_postfix_str(progress(terms, rate), refresh=False)
            if last or step % config.eval_every == 0:
                log.write("eval", step, evaluate(trainer.model, tokenizer, dataset))
            if last or step % config.checkpoint_every == 0:
                checkpoint(step)
    if not ranks.leads:
        return run
    if step < config.steps:
        checkpoint(step)
        print(f"stopped after step {step}; continue with: python -m ito.train --resume {run}")
        return run
    report = write_report(run, load(run), dataset)
    evaluations = log.read("eval")
    print(table({"before": evaluations[0], "after": evaluations[-1]}))
    if first < step:
        print(f"trained    {step - first} steps in {time.perf_counter() - began:.0f} s")
    for name, path in (("model", run / "model"), ("metrics", log.path), ("report", report)):
        print(f"{name:10} {path}")
    return run


def progress(terms: dict[str, float], rate: float) -> str:
    """The terms of the loss, the scale and the speed, for the bar."""
    shown = [n for n in terms if n not in ("loss", "logit_scale", "logit_bias", "grad_norm", "lr")]
    parts = [f"{name} {terms[name]:.3f}" for name in shown]
    return " ".join([*parts, f"scale {terms['logit_scale']:.1f} {rate:.0f} img/s"])


def environment(device: torch.device, dtype: torch.dtype, dataset: Dataset, ranks: Ranks) -> dict:
    """What the numbers depend on beside the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": str(device),
        "ranks": ranks.size,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "data": dataset.describe(),
    }


def training_captions(dataset: Dataset) -> list[str]:
    return [caption for item in dataset.training_items() for caption in dataset.captions[item]]


class Log:
    """`metrics.jsonl`: an object per log step ("train") and per evaluation ("eval")."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")

    def read(self, kind: str) -> list[dict]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged beyond its checkpoint, and a line it left unfinished."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        write_atomically(self.path, lambda path: path.write_text("".join(kept), encoding="utf-8"))


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a question asked between steps, never in the middle of one."""

    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_) -> None:
        self.asked = True


if __name__ == "__main__":
    main()
