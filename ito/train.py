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
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from ito.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ito.cli import output_path, user_errors
from ito.compiled import choose_compile, compile_towers
from ito.config import Config, add_options, from_options
from ito.data.dataset import Dataset, report_repeated, report_skipped
from ito.data.records import Skipped
from ito.files import undamaged, write_text
from ito.model.exported import export, load, saved_tokenizer
from ito.model.pretrained import OURS, load_tokenizer
from ito.model.tokenizer import Tokenizer, report_cut
from ito.objectives import own_parts
from ito.precision import choose_precision
from ito.ranks import Ranks
from ito.recipes import PRESETS
from ito.run import (
    RunFolder,
    clean,
    created,
    digest,
    fingerprint,
    locked,
    refuse_used,
    resumable,
    stoppable,
)
from ito.scoring.evaluation import evaluate
from ito.scoring.report_page import write_report
from ito.scoring.scores import table
from ito.source import open_data
from ito.stream import Stream, first_captions
from ito.trainer import Trainer


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m ito.train", usage="%(prog)s [options]", description=__doc__
    )
    run_options(parser)
    add_options(parser)
    with user_errors():
        with Ranks() as ranks, ExitStack() as lock:
            with ranks.together(), ranks.quiet():
                options = parser.parse_args(arguments)
                if options.resume:
                    folder, config = options.resume, resumed_config(options)
                    if ranks.leads:
                        lock.enter_context(locked(folder))
                        clean(folder)
                else:
                    folder = options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
                    output_path("--out", folder)
                    config = from_options(options)
                    if ranks.leads:
                        with locked(folder) if RunFolder(folder).lock.exists() else nullcontext():
                            refuse_used(folder)
            if ranks.leads:
                lock.enter_context(stoppable(folder))
            scored, data = ranks.leader_first(
                lambda: open_data(config, options.cache, options.workers, ranks)
            )
            with ranks.together():
                run = Run(folder, config, scored, data, options, ranks)
                if ranks.leads and not options.resume:  # not before all of the input has passed
                    lock.enter_context(created(folder, named=options.out is not None))
                if ranks.leads and not run.resumed:
                    run.begin()
            began = time.perf_counter()
            with resumable(folder):
                step = run.train()
                seconds = time.perf_counter() - began
                if config.stream:
                    data.skipped = ranks.all_gather_dicts(data.skipped)
                if ranks.leads:
                    run.finish(step, seconds)
        if step < config.steps:
            sys.exit(128 + (run.stopped_by or signal.SIGTERM))  # or another rank was told to stop
        return folder


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
        "--workers", type=int, default=1, metavar="N", help="processes that read a --stream (1)"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the towers; auto: bf16 where the processor multiplies it (auto)",
    )
    group.add_argument("--compile", action="store_true", help="the towers, by torch.compile (no)")
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
    if not RunFolder(run).config.is_file():
        raise FileNotFoundError(f"--resume: no run folder at {run}")
    saved = RunFolder(run).read_config()
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


STREAMED = 10_000  # captions that a stream is known again by


class Run:
    """A run from its folder's newest checkpoint, or from scratch: set up, trained, finished.

    Every rank computes; rank 0 alone evaluates, on `dataset`, and writes.

    Raises ValueError and OSError naming what does not fit, before anything is written.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        dataset: Dataset,
        data: Dataset | Stream,
        options: argparse.Namespace,
        ranks: Ranks,
    ):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.dataset, self.data = dataset, data
        self.files = RunFolder(folder)
        self.log = self.files.log()
        found = options.resume and checkpoints(self.files.checkpoints)
        state = load_checkpoint(self.files.checkpoints) if found else None
        machine = self.choose_machine(options, state)
        print(f"data       {config.train_data}: {data.describe()}")
        if config.stream:
            print(f"val        {config.val_data}: {dataset.describe()}")
        if dataset.skipped:
            print(report_skipped(dataset.skipped))
        if repeated := report_repeated(dataset):
            print(repeated)
        for name, value in machine.items():
            print(f"{name:10} {value}")
        pretrained = load(config.pretrained) if config.pretrained and not state else None
        read = [caption for names in dataset.captions for caption in names]
        if state:
            self.tokenizer = saved_tokenizer(state, self.files)
        elif pretrained:
            self.tokenizer = pretrained.tokenizer
            print(f"pretrained {config.pretrained}, step {pretrained.step}")
        elif config.text_encoder != OURS:
            self.tokenizer = load_tokenizer(config)
        else:
            captions = training_captions(data, config.tokenizer_captions)
            self.tokenizer = Tokenizer.train(captions, config.vocab_size, config.context_length)
            read += captions if config.stream else []
        if cut := report_cut(read, self.tokenizer):
            print(cut)
        self.trainer = Trainer(config, data, self.tokenizer, self.device, self.dtype, ranks)
        if self.compile:
            compile_towers(self.trainer.model, self.trainer.objective)
        if self.trainer.batches.size < config.batch_size:
            size, wanted = self.trainer.batches.size, config.batch_size
            print(f"batch      {size}: all training items there are; --batch-size is {wanted}")
        for split in dataset.held_out_splits():
            if len(dataset.image_item[dataset.rows(split)].unique()) == 1:
                print(f"warning    {split} holds 1 item: R@1 is 100 % whatever is learned")
        self.first = 0  # the step to begin with
        self.resumed = state is not None
        self.stopped_by: int | None = None
        if state:
            self.resume(state)
        elif options.resume:
            print(f"resume     {folder} has no checkpoint: it starts again")
        if pretrained:
            self.trainer.start_from(pretrained.model, config.pretrained)

    def choose_machine(self, options: argparse.Namespace, state: dict | None) -> dict[str, str]:
        """Device, threads and dtype; resumed, as before: anything else would change the numbers."""
        self.before, precision = {}, options.precision
        if state or (options.resume and self.files.environment.exists()):
            self.before = self.files.read_environment()
            with undamaged(self.files.environment):
                was = state["dtype"] if state else self.before["dtype"]
                precision = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[was]
            if options.precision not in ("auto", precision):
                raise ValueError(
                    f"--resume keeps the run's precision, {precision}: "
                    f"drop --precision {options.precision}"
                )
        kept = self.before if self.before.get("ranks", 1) == self.ranks.size else {}
        if threads := options.threads or kept.get("threads"):
            torch.set_num_threads(threads)
        self.device = choose_device(options.device, self.before.get("device"), self.ranks)
        self.dtype, reason = choose_precision(precision, self.device)
        wanted = options.compile or self.before.get("compile", False)
        self.compile, why = choose_compile(wanted, self.device)
        ranks = f"{self.ranks.size} ranks, each " if self.ranks.size > 1 else ""
        threads = f"{torch.get_num_threads()} threads"
        return {
            "machine": f"{ranks}{self.device}, {threads}, torch {torch.__version__}",
            "precision": f"{str(self.dtype).removeprefix('torch.')}: {reason}",
            "compile": f"{'yes' if self.compile else 'no'}: {why}",
        }

    def environment(self) -> dict:
        """What the numbers depend on beside the configuration."""
        content = fingerprint(self.dataset)
        if self.config.stream:
            first = training_captions(self.data, STREAMED)
            content["stream"] = digest(json.dumps(first).encode())
        own = own_parts(self.config.objective)
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": str(self.device),
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype),
            "compile": self.compile,
            "data": self.data.describe(),
            "sha256": content,
            **({"objective": digest(own[0].read_bytes())} if own else {}),
        }

    def resume(self, state: dict) -> None:
        """Raises ValueError if the checkpoint is not of this run."""
        self.first = state["step"]
        if self.first > self.config.steps:
            path = checkpoints(self.files.checkpoints)[self.first]
            raise ValueError(
                f"{path} is beyond the {self.config.steps} steps "
                "of the run's config.json: one of them is another run's"
            )
        with undamaged(self.files.checkpoints):
            self.trainer.load(state)
        if not self.ranks.leads:
            return
        if self.first < self.config.steps:
            print(f"resume     {self.folder} from step {self.first}")
        else:
            print(f"resume     {self.folder} is finished: it has all of its {self.first} steps")
        now = self.environment()
        if "sha256" not in self.before or "logged" not in state:
            print("note       an older version began this: changed data, a cut log go unnoticed")
        for name, was in self.before.pop("sha256", {}).items():
            if now["sha256"].get(name) != was:
                print(f"warning    {name} of the data changed since the run began: numbers differ")
        for name, was in self.before.items():
            if now.get(name) != was:
                print(f"warning    {name} was {was}, is {now.get(name)}: numbers may differ")
        for amiss in self.log.rewind(self.first, state.get("logged")):
            print(f"warning    {self.log.path}: {amiss}")

    def begin(self) -> None:
        """Write what the folder holds before the first step."""
        untrained = self.scores()
        self.config.save(self.files.config)
        text = json.dumps(self.environment(), indent=2) + "\n"
        write_text(self.files.environment, text)
        self.log.start()
        self.log.write("eval", 0, untrained)

    def train(self) -> int:
        """To `config.steps`, or until any rank is interrupted. Returns the steps that are done."""
        config, step, began = self.config, self.first, time.perf_counter()
        with Interrupt() as interrupt, self.progress_bar() as bar:
            while step < config.steps and not self.ranks.any(interrupt.number is not None):
                terms = self.trainer.step(step)
                step += 1
                bar.update()
                if not self.ranks.leads:
                    continue
                last = step == config.steps
                if last or step % config.log_every == 0:
                    speed = self.speed(step, time.perf_counter() - began)
                    self.log.write("train", step, terms | speed)
                    bar.set_postfix_str(progress(terms, speed["images_per_second"]), refresh=False)
                if last or step % config.eval_every == 0:
                    self.log.write("eval", step, self.scores())
                if last or step % config.checkpoint_every == 0:
                    self.checkpoint(step)
            if self.ranks.leads and step < config.steps:
                self.checkpoint(step)
        self.stopped_by = interrupt.number
        return step

    def progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.first,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds: a log file is read later
            disable=not self.ranks.leads,
        )

    def speed(self, step: int, seconds: float) -> dict[str, float]:
        pictures = (step - self.first) * self.trainer.batches.size * self.config.views
        share = self.trainer.input_seconds / self.trainer.seconds
        return {"images_per_second": pictures / seconds, "seconds": seconds, "input_share": share}

    def scores(self) -> dict[str, float]:
        return evaluate(self.trainer.model, self.tokenizer, self.dataset)

    def checkpoint(self, step: int) -> None:
        about = {
            "dtype": str(self.dtype),
            "tokenizer": self.tokenizer.bpe.to_str(),
            "logged": self.log.count,
            "architecture": self.trainer.model.architecture,
            "load_size": self.config.load_size,
        }
        model = self.trainer.model
        export(model, self.tokenizer, self.config.load_size, step, self.files.model)
        save_checkpoint(self.files.checkpoints, step, self.trainer.state() | about)

    def finish(self, step: int, seconds: float) -> None:
        """The report and the table, or how to go on."""
        folder = self.folder
        if step < self.config.steps:
            print(
                f"stopped after step {step}; continue with: python -m ito.train --resume {folder}"
            )
            return
        if self.config.stream and self.first < step:
            self.log.write("stream", step, {"skipped": len(self.data.skipped)})
        report = write_report(folder, load(folder), self.dataset)
        if evaluations := self.log.read("eval"):
            print(table({"before": evaluations[0], "after": evaluations[-1]}))
        if self.first < step:
            share = 1 - self.trainer.input_seconds / self.trainer.seconds
            print(f"trained    {step - self.first} steps in {seconds:.0f} s")
            print(f"compute    {share:.1%} of a step; the rest waits for its batch")
            if busy := self.trainer.loader_seconds / self.trainer.seconds:
                print(
                    f"           beside it, the thread that prepares batches is busy for {busy:.1%}"
                )
        if self.config.stream and self.data.skipped:
            print(report_skipped([Skipped(*found) for found in self.data.skipped.items()]))
        for name, path in (
            ("model", self.files.model),
            ("metrics", self.log.path),
            ("report", report),
        ):
            print(f"{name:10} {path}")


def progress(terms: dict[str, float], rate: float) -> str:
    """The terms of the loss, the scale and the speed, for the bar."""
    shown = [n for n in terms if n not in ("loss", "logit_scale", "logit_bias", "grad_norm", "lr")]
    parts = [f"{name} {terms[name]:.3f}" for name in shown]
    return " ".join([*parts, f"scale {terms['logit_scale']:.1f} {rate:.0f} img/s"])


def training_captions(data: Dataset | Stream, limit: int = Config.tokenizer_captions) -> list[str]:
    """All of a set in memory, the first `limit` of a stream."""
    if isinstance(data, Stream):
        return first_captions(data.shards, limit)
    return [caption for item in data.training_items() for caption in data.captions[item]]


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a question asked between steps, never in the middle of one."""

    number: int | None = None  # of the signal

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        self.number = number


if __name__ == "__main__":
    main()
