"""Train a dual encoder of images and texts, by default with the ITO objective.

Without arguments: prepares the small emoji set on first use, trains on it, evaluates on held-out
drawings, exports the dual encoder and writes a report.
"""

import argparse
import dataclasses
import json
import platform
import re
import shlex
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path

import PIL
import torch
from tqdm import tqdm

from ito.checkpoint import checkpoints, load_checkpoint, save_checkpoint, shards_of
from ito.cli import Parser, flush, one_line, output_path, shown, user_errors
from ito.compiled import choose_compile, compile_towers
from ito.config import Config, add_options, choose_preset, from_options, of_emoji
from ito.data.dataset import Dataset
from ito.data.fields import Skipped
from ito.device import PRECISIONS, choose_device, choose_precision
from ito.files import FileError, undamaged, write_text
from ito.model.encoders import DualEncoder
from ito.model.exported import export, load, require_shapes, saved_tokenizer
from ito.model.pretrained import OURS, described_encoders, encoders, load_tokenizer
from ito.model.pretrained_dual import Loaded, load_dual, package_of
from ito.model.tokenizer import Tokenizer, lost_share, report_cut
from ito.objectives import user_file
from ito.ranks import Ranks
from ito.recipes import PRESETS
from ito.resume import changed_data, data_hashes, digest, resumed_config
from ito.run import (
    BEST_BY,
    MOST_THREADS,
    RunFolder,
    created,
    locked,
    on_stop_signals,
    refuse_strange,
    refuse_used,
    remove_temporary_files,
    resumable,
    resume_command,
    stoppable,
)
from ito.scoring.evaluation import evaluate
from ito.scoring.model_card import write_card
from ito.scoring.report_page import write_report
from ito.scoring.scores import DIRECTIONS, headlines, table
from ito.sharding import load_shards, save_shards
from ito.source import open_data
from ito.stream import Stream, first_captions
from ito.summary import (
    count_overlap,
    print_notes,
    report_enlarged,
    report_equal_captions,
    report_groups,
    report_overlap,
    report_sizes,
    report_skipped,
    report_test,
    sentence,
    summarise,
)
from ito.tracking import LIBRARIES, import_library, open_tracker
from ito.trainer import Trainer


def main(arguments: list[str] | None = None) -> Path:
    parser = Parser(prog="python -m ito.train", usage="%(prog)s [options]", description=__doc__)
    run_options(parser)
    add_options(parser)
    with user_errors():
        with Ranks() as ranks, ExitStack() as held:  # the lock and the signal handlers
            # the options
            with ranks.together(), ranks.quiet():
                options = parser.parse_args(arguments)
                for name in options.report_to:
                    import_library(name)
                if options.resume:
                    folder, config = options.resume, resumed_config(options)
                else:
                    new = Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
                    folder = output_path("--out", options.out or new)
                    config = from_options(options)
                require_epochs(options, config)
                if ranks.leads and options.resume:
                    refuse_strange(folder)
                    held.enter_context(locked(folder))
                    remove_temporary_files(folder)
                elif ranks.leads:
                    with locked(folder) if RunFolder(folder).lock.exists() else nullcontext():
                        refuse_used(folder)
            if ranks.leads:
                held.enter_context(stoppable(folder))

            # the data
            moved = " --train-data NEW, if it has moved"
            with resumable(folder, moved) if options.resume else nullcontext():
                eval_data, train_data = ranks.leader_first(
                    lambda: open_data(config, options.cache, options.workers, ranks)
                )

            # the model; a new folder is made only when all options and data are known to be good
            with ranks.together():
                config = in_epochs(config, options.epochs, train_data)
                run = Run(folder, config, eval_data, train_data, options, ranks)
                flush()  # if nobody reads it, the run ends before it writes anything
                if ranks.leads and not options.resume:
                    held.enter_context(created(folder, named=options.out is not None))
            model = run.trainer.whole_model()
            with ranks.together():
                if ranks.leads:
                    about = folder, config.flat(), run.first_step
                    run.trackers = [open_tracker(name, *about) for name in options.report_to]
                if ranks.leads and not run.resumed:
                    with resumable(folder):
                        run.begin(model)
            del model

            # the training, and the report
            began = time.perf_counter()
            with resumable(folder):
                step = run.train()
                seconds = time.perf_counter() - began
                if config.stream:
                    train_data.skipped = ranks.all_gather_dicts(train_data.skipped)
                if ranks.leads:
                    run.finish(step, seconds)
        if step < config.steps:  # this rank was stopped by a signal, or another one was
            sys.exit(128 + (run.stopped_by or signal.SIGTERM))
        return folder


def run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="run folder to create (default: runs/DATE-TIME)")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue a run; see docs/runs.md for what may change",
    )
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="defaults of the other options: for the emoji sets, photographs, the ITO paper's "
        "recipes, or fine-tuning (default: finetune with --pretrained open_clip:NAME or hf:NAME; "
        "else emoji-small for emoji sets, photos for other data)",
    )
    group.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train on all of the data N times, instead of --steps",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that read --stream data (default: 1)",
    )
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="dtype of the towers; auto takes bf16 where the hardware supports it, else fp32; with "
        "fp16 the loss is scaled (default: auto)",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the towers with torch.compile"
    )
    group.add_argument(
        "--report-to",
        choices=tuple(LIBRARIES),
        nargs="+",
        default=[],
        help="send what is logged to these as well (extras of their names); name them again with "
        "--resume",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument(
        "--threads", type=thread_count, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )


def require_epochs(options: argparse.Namespace, config: Config) -> None:
    """Raises ValueError if `--epochs` is given where it has no meaning."""
    if options.epochs is None:
        return
    if options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
    for given, why in (
        ("steps" in options, "--steps says it too: drop one"),
        (options.resume, "--resume goes on to the run's steps: --steps moves their end"),
        (config.stream, "the length of a --stream is not known: give --steps"),
    ):
        if given:
            raise ValueError(f"--epochs {options.epochs}: {why}")


def in_epochs(config: Config, epochs: int | None, data: Dataset | Stream) -> Config:
    """The configuration with the steps of so many epochs. One ends with its last full batch."""
    if epochs is None:
        return config
    items = len(data.training_items())
    steps = items // min(items, config.batch_size)
    print(f"epochs     {epochs} of {steps} steps, {items} items each")
    return dataclasses.replace(config, steps=epochs * steps)


def thread_count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_THREADS}, got {text}")
    return int(text)


def load_pretrained(config: Config) -> Loaded:
    """What `--pretrained` names: another package's model, or the exported model of a run, with the
    bias of its objective if that is the same, which only its checkpoint holds."""
    if package_of(config.pretrained):
        loaded = load_dual(config.pretrained, config.context_length)
        print(f"pretrained {one_line(config.pretrained)}")
        if loaded.note:
            print(f"note       {loaded.note}")
        return loaded
    if not Path(config.pretrained).exists():
        about = "name a run folder, open_clip:MODEL/WEIGHTS or hf:NAME"
        raise FileNotFoundError(f"--pretrained: there is no {config.pretrained}: {about}")
    encoder, run = load(config.pretrained), RunFolder(config.pretrained)
    print(f"pretrained {shown(config.pretrained)}, step {encoder.step}")
    bias = None
    if checkpoints(run.checkpoints) and run.read_config().objective == config.objective:
        with undamaged(run.checkpoints):
            bias = load_checkpoint(run.checkpoints)["objective"].get("logit_bias")
            bias = None if bias is None else bias.item()
    return Loaded(
        architecture=encoder.model.architecture,
        towers={name: getattr(encoder.model, name).state_dict() for name in ("image", "text")},
        logit_scale=encoder.model.logit_scale.item(),
        logit_bias=bias,
        tokenizer=encoder.tokenizer,
    )


TIMED = 3  # steps after the first, which is slower, that tell how long the run will take


class Run:
    """One training run: set up, from its newest checkpoint or from scratch, trained, finished.

    Every rank trains. Only rank 0 evaluates, on `eval_data`, and writes files.

    Raises ValueError or OSError for whatever does not fit, before anything is written.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        eval_data: Dataset,
        train_data: Dataset | Stream,
        options: argparse.Namespace,
        ranks: Ranks,
    ):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.eval_data, self.train_data = eval_data, train_data
        self.files = RunFolder(folder)
        self.log = self.files.log()
        self.trackers, self.first_step = [], 0
        self.stopped_by: int | None = None  # the number of a signal

        saved = options.resume and checkpoints(self.files.checkpoints)
        state = load_checkpoint(self.files.checkpoints, shapes_only=True) if saved else None
        self.resumed = state is not None
        if state:
            self.require_sizes(state)
        machine = self.choose_machine(options, state)
        if not options.resume:
            print("preset     {}: {}".format(*choose_preset(options)))
        self.print_setup(machine)

        pretrained = load_pretrained(config) if config.pretrained and not state else None
        self.tokenizer = self.choose_tokenizer(state, pretrained)
        overlap = None if config.stream else count_overlap(train_data, eval_data)
        self.facts = self.count_data(overlap)
        print(f"read       {sentence(self.facts)}")
        meaning = None if user_file(config.objective) else config.equal_captions
        print_notes(
            report_equal_captions(None if config.stream else train_data, meaning),
            # the splits of an emoji set share concepts on purpose, and groups are its classes
            "" if of_emoji(config.train_data) else report_overlap(overlap or {}, eval_data),
            report_test(eval_data),
        )
        if state:  # the original weights are needed no more
            described = described_encoders(state["architecture"])
        else:
            described = pretrained and encoders(config, pretrained.architecture)
        self.trainer = Trainer(
            config, train_data, self.tokenizer, self.device, self.dtype, ranks, described
        )
        if self.compile:
            compile_towers(self.trainer.model, self.trainer.objective)
        self.print_warnings()

        if state:
            self.resume(state)
        elif options.resume:
            print(f"resume     {shown(folder)} has no checkpoint: it starts again")
            if ranks.leads:
                changed_data(self.files, config, self.saved_environment, self.environment())
        if pretrained:
            self.trainer.start_from(pretrained)

    def require_sizes(self, state: dict) -> None:
        """Raises ValueError if the checkpoint's weights are not of the sizes that it and
        config.json name, before memory is taken for a model of these sizes."""
        with undamaged(self.files.checkpoints):
            saved = state["architecture"]
            require_shapes(saved, state["model"])
            for name in sorted(saved.keys() - {"vocab_size", "image_encoder", "text_encoder"}):
                if saved[name] != getattr(self.config, name):
                    about = f"{name} {saved[name]}, config.json has {getattr(self.config, name)}"
                    raise FileError(f"{self.files.checkpoints} is of another model: {about}")

    def choose_machine(self, options: argparse.Namespace, state: dict | None) -> dict[str, str]:
        """Set device, threads and dtype, and return them in words.

        A resumed run keeps those it began with: others would change the numbers.
        """
        self.saved_environment, precision = {}, options.precision
        if state or (options.resume and self.files.environment.exists()):
            self.saved_environment = self.files.read_environment()
            with undamaged(self.files.environment):
                saved = state["dtype"] if state else self.saved_environment["dtype"]
                precision = {str(dtype): name for name, dtype in PRECISIONS.items()}[saved]
            if options.precision not in ("auto", precision):
                raise ValueError(
                    f"--resume keeps the run's precision, {precision}: "
                    f"drop --precision {options.precision}"
                )
        same_ranks = self.saved_environment.get("ranks", 1) == self.ranks.size
        saved_threads = self.saved_environment.get("threads") if same_ranks else None
        if threads := options.threads or saved_threads:
            torch.set_num_threads(threads)
        saved_device = self.saved_environment.get("device")
        self.device = choose_device(options.device, saved_device, self.ranks)
        self.dtype, why_dtype = choose_precision(precision, self.device)
        if self.config.fsdp and self.dtype == torch.float16:
            raise ValueError(
                "--fsdp with --precision fp16: PyTorch's GradScaler takes no mixture of sharded "
                "and whole weights; use bf16"
            )
        if self.saved_environment:
            why_dtype = "as the run began"
        asked = options.compile or self.saved_environment.get("compile", False)
        self.compile, why_compile = choose_compile(asked, self.device)
        ranks = f"{self.ranks.size} ranks, each " if self.ranks.size > 1 else ""
        threads = f"{torch.get_num_threads()} threads"
        padding = "left out" if self.device.type == "cpu" and not self.compile else "computed"
        return {
            "machine": f"{ranks}{self.device}, {threads}, torch {torch.__version__}",
            "precision": f"{str(self.dtype).removeprefix('torch.')}: {why_dtype}",
            "compile": f"{'yes' if self.compile else 'no'}: {why_compile}",
            "step": f"channels_last, fused AdamW, views augmented as one batch, padding {padding}"
            + ", blocks computed again in backward" * self.config.grad_checkpointing
            + f", weights sharded over {self.ranks.size} ranks" * self.config.fsdp,
        }

    def print_setup(self, machine: dict[str, str]) -> None:
        print(f"data       {one_line(self.config.train_data)}: {self.train_data.describe()}")
        if self.config.val_data:
            print(f"val        {one_line(self.config.val_data)}: {self.eval_data.describe()}")
        for dataset in self.in_memory():
            print_notes(
                report_skipped(dataset.skipped),
                report_groups(dataset, self.config.group_by),
                report_enlarged(dataset),
            )
        for name, value in machine.items():
            print(f"{name:10} {value}")

    def choose_tokenizer(self, state: dict | None, pretrained: Loaded | None) -> Tokenizer:
        """The checkpoint's, that of --pretrained, the text encoder's, or a new one."""
        config = self.config
        captions = self.captions()
        if state:
            tokenizer = saved_tokenizer(state, self.files)
        elif pretrained:
            tokenizer = pretrained.tokenizer
        elif config.text_encoder != OURS:
            tokenizer = load_tokenizer(config)
        else:
            learned = training_captions(self.train_data, config.tokenizer_captions)
            tokenizer = Tokenizer.train(learned, config.vocab_size, config.context_length)
            captions += learned if config.stream else []
        print(report_sizes(config, tokenizer))
        if cut := report_cut(captions, tokenizer):
            print(f"{cut}; --context-length keeps more")
        return tokenizer

    def in_memory(self) -> list[Dataset]:
        """The data sets in memory: that trained on, if it is one, and that scored, if another."""
        both = (self.train_data, self.eval_data)
        return [self.eval_data] if self.config.stream or both[0] is both[1] else [*both]

    def captions(self) -> list[str]:
        """Those of all data in memory."""
        return [text for part in self.in_memory() for texts in part.captions for text in texts]

    def count_data(self, overlap: dict | None) -> dict:
        """What `data.json` says; see `ito/summary.py`."""
        config, lengths = self.config, self.tokenizer.lengths(self.captions())
        limit = self.tokenizer.context_length
        cut = sum(length > limit for length in lengths)
        form = (self.train_data.shards if config.stream else self.train_data).format
        return summarise(form, self.in_memory(), cut, overlap) | {
            "cut_tokens": round(lost_share(lengths, limit), 4),
            "enlarged": sum(part.enlarged for part in self.in_memory()),
        }

    def print_warnings(self) -> None:
        size, asked = self.trainer.batches.size, self.config.batch_size
        if size < asked:
            print(f"batch      {size}: all training items there are; --batch-size is {asked}")
        for split in self.eval_data.held_out_splits():
            if len(self.eval_data.image_item[self.eval_data.rows(split)].unique()) == 1:
                print(f"warning    {split} holds 1 item: R@1 is 100 % whatever is learned")

    def resume(self, state: dict) -> None:
        """Load a checkpoint; rank 0 cuts the log back to its step and says what has changed.

        Raises ValueError if the checkpoint is not of this run.
        """
        self.first_step = state["step"]
        if self.first_step > self.config.steps:
            path = checkpoints(self.files.checkpoints)[self.first_step]
            raise ValueError(
                f"{path} is beyond the {self.config.steps} steps "
                "of the run's config.json: one of them is another run's"
            )
        with undamaged(self.files.checkpoints):
            if "shards" in state:
                folder = shards_of(self.files.checkpoints, self.first_step)
                load_shards(folder, self.trainer.shards(), state["shards"], self.ranks)
            self.trainer.load(state)
        if not self.ranks.leads:
            return
        if self.first_step < self.config.steps:
            print(f"resume     {shown(self.folder)} from step {self.first_step}")
        else:
            done = f"it has all of its {self.first_step} steps; --steps MORE goes on"
            print(f"resume     {shown(self.folder)} is finished: {done}")
        saved, now = dict(self.saved_environment), self.environment()
        if "sha256" not in saved or "logged" not in state:
            print("note       an older version began this: changed data, a cut log go unnoticed")
        for name in changed_data(self.files, self.config, saved, now):
            about = "of the data changed since the run began: numbers differ"
            print(f"warning    {one_line(name)} {about}")
        for name, value in saved.items():
            if name != "sha256" and now.get(name) != value:
                was = one_line(f"{name} was {value}, is {now.get(name)}")
                print(f"warning    {was}: numbers may differ")
        before = self.files.read_config()
        if self.config.steps != before.steps:
            rate = self.trainer.learning_rate(self.first_step)
            print(
                f"steps      {self.config.steps} instead of {before.steps}: the learning rate goes "
                f"on at {rate:.2g} and falls to 0 at the new end"
            )
        if self.config != before:
            self.config.save(self.files.config)
        for problem in self.log.rewind(self.first_step, state.get("logged")):
            print(f"warning    {shown(self.log.path)}: {one_line(problem)}")

    def environment(self) -> dict:
        """What the numbers depend on, apart from the configuration."""
        loss_file = user_file(self.config.objective)
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "machine": platform.machine(),
            "device": str(self.device),
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype),
            "compile": self.compile,
            "data": self.train_data.describe(),
            "sha256": data_hashes(self.eval_data, self.train_data),
            **({"objective": digest(loss_file[0].read_bytes())} if loss_file else {}),
        }

    def begin(self, model: DualEncoder) -> None:
        """Evaluate the untrained model, and write the files that exist before the first step."""
        untrained = self.scores(model)
        self.config.save(self.files.config)
        write_text(self.files.environment, json.dumps(self.environment(), indent=2) + "\n")
        write_text(self.files.data, json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")
        self.log.start()
        self.write("eval", 0, untrained)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.log.write(kind, step, values)
        for log, _ in self.trackers:
            log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def train(self) -> int:
        """Train to `config.steps`, or until a signal stops any rank. Returns the steps done."""
        config, step, began = self.config, self.first_step, time.perf_counter()
        signals: list[int] = []  # Ctrl-C or SIGTERM: the loop ends between two steps
        noted = on_stop_signals(lambda number, _: signals.append(number))
        with noted, self.progress_bar() as bar:
            while step < config.steps and not self.ranks.any(bool(signals)):
                terms = self.trainer.step(step)
                step += 1
                bar.update()
                last = step == config.steps
                if self.ranks.leads and step == self.first_step + 1:
                    first = self.trainer.seconds
                elif self.ranks.leads and step == self.first_step + 1 + TIMED < config.steps:
                    seconds = (self.trainer.seconds - first) / TIMED
                    steps = config.steps - self.first_step
                    told = f"about {duration(steps * seconds)} for {steps} steps"
                    bar.write(f"time       {told}, evaluations not included", sys.stdout)
                if self.ranks.leads and (last or step % config.log_every == 0):
                    speed = self.speed(step, time.perf_counter() - began)
                    self.write("train", step, terms | speed)
                    bar.set_postfix_str(progress(terms, speed["images_per_second"]), refresh=False)
                scored = last or step % config.eval_every == 0
                saved = last or step % config.checkpoint_every == 0
                model = self.trainer.whole_model() if scored or saved else None
                if scored and self.ranks.leads:
                    self.write("eval", step, self.scores(model, last))
                if scored:  # an evaluation with the best scores so far is saved
                    saved |= self.ranks.any(self.ranks.leads and self.log.best() == step)
                if saved:
                    self.checkpoint(step, model)
            if step < config.steps and not (self.resumed and step == self.first_step):
                self.checkpoint(step, self.trainer.whole_model())
        self.stopped_by = signals[-1] if signals else None
        return step

    def progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.first_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; few lines in a log file
            disable=not self.ranks.leads,
        )

    def speed(self, step: int, seconds: float) -> dict[str, float]:
        images = (step - self.first_step) * self.trainer.batches.size * self.config.views
        return {
            "images_per_second": images / seconds,
            "seconds": seconds,
            "input_share": self.trainer.input_seconds / self.trainer.seconds,
        }

    def scores(self, model: DualEncoder, last: bool = False) -> dict[str, float]:
        """Those of the held-out splits; the split "test", beside others, is scored at the last step
        only."""
        data = self.eval_data
        splits = data.held_out_splits() if last else data.validation_splits()
        scores = evaluate(model, self.tokenizer, data, splits)
        recall = [scores[f"{s}/{way}/R@1"] for s in data.validation_splits() for way in DIRECTIONS]
        return {BEST_BY: sum(recall) / len(recall)} | scores

    def checkpoint(self, step: int, model: DualEncoder) -> None:
        """Export the model, and save what the run can be resumed from. All ranks call it."""
        shards = {}
        if self.config.fsdp:
            folder = shards_of(self.files.checkpoints, step)
            shards = {"shards": save_shards(folder, self.trainer.shards(), self.ranks)}
        if not self.ranks.leads:
            return
        load_size = self.config.load_size
        export(model, self.tokenizer, load_size, step, self.files.model, self.config.fit)
        about = {
            "dtype": str(self.dtype),
            "tokenizer": self.tokenizer.bpe.to_str(),
            "logged": self.log.count,
            "architecture": model.architecture,
            "load_size": load_size,
            "fit": self.config.fit,
        }
        state = self.trainer.state() | shards | about
        save_checkpoint(self.files.checkpoints, step, state, self.log.best())

    def finish(self, step: int, seconds: float) -> None:
        """Write the report and the model's card and print the scores; or, of a stopped run, how to
        continue it."""
        for _, close in self.trackers:
            close(int(step < self.config.steps))
        if step < self.config.steps:
            print(f"stopped after step {step}; continue with: {resume_command(self.folder)}")
            return
        trained = step - self.first_step
        if self.config.stream and trained:
            self.log.write("stream", step, {"skipped": len(self.train_data.skipped)})
        report = write_report(self.folder, load(self.folder), self.eval_data)
        write_card(self.folder)
        if evaluations := self.log.read("eval"):
            with undamaged(self.log.path):
                scores = table({"before": evaluations[0], "after": evaluations[-1]})
                result = headlines(evaluations[-1])[0]
            print(scores)
        if trained:
            compute = 1 - self.trainer.input_seconds / self.trainer.seconds
            loader = self.trainer.loader_seconds / self.trainer.seconds
            print(f"trained    {trained} steps in {seconds:.0f} s")
            print(f"compute    {compute:.1%} of a step; in the rest the model waits for its batch")
            if loader:
                print(f"           the thread that prepares batches is busy for {loader:.1%} of it")
        if self.config.stream and self.train_data.skipped:
            print(report_skipped([Skipped(*record) for record in self.train_data.skipped.items()]))
        print(f"model      {shown(self.files.model)}")
        best, command = self.log.best(), f"python -m ito.export {shown(self.folder)} --best"
        if best not in (None, step):
            print(f"best       step {best} by {BEST_BY}; the model is of step {step}: {command}")
        print(f"metrics    {shown(self.log.path)}")
        print(f"report     {shown(report)}")
        if evaluations:
            print(f"result     {one_line(result)}")
        folder = shown(Path(shlex.quote(str(self.folder))))
        print(f'next       python -m ito.search {folder} "{example(self.eval_data)}"')
        print(f"           python -m ito.evaluate {folder} --data YOUR_PICTURES")


def example(data: Dataset) -> str:
    """A held-out name that a shell reads as it is, or else any words."""
    names = (data.captions[n][0] for n in data.image_item[data.rows(data.held_out_splits()[0])])
    return next((name for name in names if re.fullmatch(r"\w[\w ,.'-]{2,59}", name)), "a red flag")


def duration(seconds: float) -> str:
    """Rounded, in the unit that fits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def progress(terms: dict[str, float], rate: float) -> str:
    """The terms of the loss, the logit scale and the speed, for the progress bar."""
    hidden = ("loss", "logit_scale", "logit_bias", "grad_norm", "lr", "loss_scale")
    parts = [f"{name} {value:.3f}" for name, value in terms.items() if name not in hidden]
    return " ".join([*parts, f"scale {terms['logit_scale']:.1f} {rate:.0f} img/s"])


def training_captions(data: Dataset | Stream, limit: int = Config.tokenizer_captions) -> list[str]:
    """All captions of a data set in memory, the first `limit` of a stream."""
    if isinstance(data, Stream):
        return first_captions(data.shards, limit)
    return [caption for item in data.training_items() for caption in data.captions[item]]


if __name__ == "__main__":
    main()
