"""Where a training step of the default run spends its time, and its speed beside open_clip's.

    python benchmarks/trainer_throughput.py             both parts, about two minutes
    python benchmarks/trainer_throughput.py --quick     a few steps of each

1. A profile of the step: milliseconds of each part, forward and backward, for CLIP and ITO.
2. Pictures per second of the CLIP objective: `ito.trainer.Trainer` and open_clip's own
   `train_one_epoch` with its `ClipLoss`, its CSV data set and transform, and its AdamW. Same
   pictures, captions, tokens, batch, threads, precision and clipping of gradients. In turns:
   ours, theirs, ours, ... The median of all steps.
   The towers are those of the default run, the same modules for both; and CLIP's own
   (`--patch-size 8`), which open_clip builds itself, with the weights of ours.

Without open_clip, pandas or webdataset the second part is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from loss_throughput import machine, positive
from PIL import Image
from torch import Tensor, nn

from ito.config import Config
from ito.data.augment import CROP, MEAN, STD
from ito.data.dataset import Dataset
from ito.device import choose_precision
from ito.model.encoders import DualEncoder
from ito.model.open_clip import configuration, state_dict
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks
from ito.source import open_data
from ito.train import training_captions
from ito.trainer import Trainer

WARMUP = 3  # steps of each round that are not counted: batches prepared during the pause help them
PAUSE = 0.5  # seconds after a round, in which the next batches are prepared
REST = "logging, the rest"
OBJECTIVES = ("clip", "ito")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype, why = choose_precision(args.precision, torch.device("cpu"))
    report = {"date": datetime.now().isoformat(timespec="seconds"), **machine("cpu")}
    report |= {"precision": f"{str(dtype).removeprefix('torch.')}: {why}", "workers": args.workers}
    print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    config = Config(steps=100_000)
    _, data = open_data(config, args.cache, 0, Ranks())
    learned = training_captions(data)
    tokenizer = Tokenizer.train(learned, config.vocab_size, config.context_length)

    def trainer(**options) -> Trainer:
        config = Config(steps=100_000, **options)
        return Trainer(config, data, tokenizer, torch.device("cpu"), dtype)

    trainers = {name: trainer(objective=name) for name in OBJECTIVES}
    report["profile"] = profile(trainers, args.rounds, args.steps)
    report["beside_open_clip"] = []
    try:
        import open_clip_train.data  # noqa: F401  needs pandas, webdataset, torchvision
    except ImportError as error:
        print(f"\nnot beside open_clip: {error}; pip install open_clip_torch[training]")
    else:
        with tempfile.TemporaryDirectory() as folder:
            table = write_csv(data, Path(folder))
            for towers, ours in (
                ("of the default run", trainers["clip"]),
                ("CLIP's", trainer(objective="clip", patch_size=8)),
            ):
                theirs = OpenClip(ours, table, args.workers)
                row = {"towers": towers} | beside(ours, theirs, args.rounds, args.steps)
                report["beside_open_clip"].append(row)
                rate = row["pictures_per_second"]
                print(
                    f"\nclip, towers {towers}, batch {row['batch']}: {rate['ito']:.0f} pictures/s, "
                    f"open_clip's loop {rate['open_clip']:.0f}: {row['ratio']:.2f} times",
                    flush=True,
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps")
    parser.add_argument("--rounds", type=positive, help="default: 6")
    parser.add_argument("--steps", type=positive, help="of each in a round (default: 20)")
    parser.add_argument("--threads", type=positive, help="CPU threads; PyTorch's number by default")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--workers", type=positive, default=1, help="processes of open_clip's loader (default: 1)"
    )
    parser.add_argument("--cache", type=Path, help="folder of the emoji set, as of ito.train")
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 6)
    args.steps = args.steps or (3 if args.quick else 20)
    stem = f"trainer-{datetime.now():%Y%m%d-%H%M%S}{'-quick' * args.quick}.json"
    args.out = args.out or Path(__file__).parent / "results" / stem
    return args


# The profile.


class Clock:
    """Seconds by part. One part runs at a time; starting another one ends it."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)
        self.part, self.since = REST, time.perf_counter()

    def start(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def timed(self, part: str, function: Callable, output: Callable | None = None) -> Callable:
        """`function` as `part`. `output` picks a tensor of its result; the backward pass belongs
        to `part` from there on."""

        def call(*args, **kwargs):
            outer = self.part
            self.start(part)
            result = function(*args, **kwargs)
            if output and output(result).requires_grad:
                output(result).register_hook(lambda _: self.start(f"{part}, backward"))
            self.start(outer)
            return result

        return call

    def watch(self, trainer: Trainer) -> ExitStack:
        """Count the steps of a trainer until the stack is closed."""
        image, text, objective = trainer.model.image, trainer.model.text, trainer.objective
        watched = [
            (trainer, "next_batch", "wait for the batch", None),
            (image, "convolve", "image tower: stem", lambda out: out),
            (image, "attend", "image tower: blocks", lambda out: out[1]),
            (text, "forward", "text tower", lambda out: out[1]),
            (objective, "loss", "loss", lambda out: out[0]),
            (trainer, "backward", REST, None),  # what ran last in the backward pass ends here
            (trainer.optimizer, "zero_grad", "optimizer", None),
            (nn.utils, "clip_grad_norm_", "optimizer", None),
            (trainer.optimizer, "step", "optimizer", None),
        ]
        if getattr(objective, "fusion", None):
            watched.append((objective.fusion, "forward", "fusion", lambda out: out))
        stack = ExitStack()
        for owner, name, part, output in watched:
            timed = self.timed(part, getattr(owner, name), output)
            stack.enter_context(mock.patch.object(owner, name, timed))
        return stack


def profile(trainers: dict[str, Trainer], rounds: int, steps: int) -> list[dict]:
    """Median milliseconds of each part of a step, by objective, in turns."""
    samples: dict[str, list[dict]] = {name: [] for name in trainers}
    loader = dict.fromkeys(trainers, 0.0)
    for number in range(rounds):
        for name, trainer in trainers.items():
            begun = number * (WARMUP + steps)
            for step in range(begun, begun + WARMUP + steps):
                clock, before = Clock(), trainer.loader_seconds
                with clock.watch(trainer):
                    clock.start(REST)
                    clock.spent.clear()
                    trainer.step(step)
                    clock.start(REST)
                if step >= begun + WARMUP:
                    samples[name].append(dict(clock.spent))
                    loader[name] += trainer.loader_seconds - before
            wait(trainer.ahead.values())
    rows = []
    for name, found in samples.items():
        parts = sorted({part for sample in found for part in sample})
        ms = {p: 1e3 * statistics.median(s.get(p, 0.0) for s in found) for p in parts}
        total = 1e3 * statistics.median(sum(sample.values()) for sample in found)
        beside = 1e3 * loader[name] / len(found)
        rows.append({"objective": name, "step_ms": total, "parts_ms": ms, "loader_ms": beside})
        print(f"\na step of {name}: {total:.1f} ms (median of {len(found)})")
        for part in parts:
            if not part.endswith(", backward"):
                back = ms.get(f"{part}, backward")
                more = "" if back is None else f" + {back:.1f} backward"
                share = (ms[part] + (back or 0)) / total
                print(f"  {part:<20} {share:>5.1%}  {ms[part]:.1f}{more} ms")
        print(f"  beside it a thread draws and augments the next batch: {beside:.1f} ms")
    ratio = rows[1]["step_ms"] / rows[0]["step_ms"]
    print(f"\na step of ito takes {ratio:.2f} times one of clip")
    return rows


# Beside open_clip.


def write_csv(data: Dataset, folder: Path) -> Path:
    """The training pictures as PNG, as large as in our memory, and a caption of each."""
    lines = ["filepath\ttitle"]
    for row in data.rows("train").tolist():
        path = folder / f"{row}.png"
        Image.fromarray(data.images[row].permute(1, 2, 0).numpy()).save(path)
        lines.append(f"{path}\t{data.captions[int(data.image_item[row])][0]}")
    table = folder / "train.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


class Wrapped(nn.Module):
    """Our towers with the interface of open_clip's models."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model, self.logit_scale = model, model.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text = self.model.encode_image(images), self.model.encode_text(texts)
        scale = self.logit_scale.exp()
        return {"image_features": image, "text_features": text, "logit_scale": scale}


class Batches:
    """The batches of a loader, some at a time. Its worker processes live on in between.

    `times` are those at which open_clip asked for a batch, and of the end.
    """

    def __init__(self, loader):
        self.loader, self.endless = loader, self.repeat()
        self.num_batches = self.num_samples = 0

    def repeat(self) -> Iterator:
        while True:
            yield from self.loader

    def __iter__(self) -> Iterator:
        self.times = [time.perf_counter()]
        for _ in range(self.num_batches):
            yield next(self.endless)
            self.times.append(time.perf_counter())


class OpenClip:
    """open_clip's training loop on the towers and the pictures of one of our trainers."""

    def __init__(self, ours: Trainer, table: Path, workers: int):
        import open_clip
        from open_clip_train.data import DataInfo, get_csv_dataset

        config, tokenizer = ours.config, ours.batches.tokenizer
        if config.patch_size:
            about = configuration(ours.model, tokenizer, config.fit)["model_cfg"]
            about["text_cfg"].pop("hf_tokenizer_name")
            self.model = open_clip.CLIP(**about, output_dict=True)
            self.model.load_state_dict(state_dict(ours.model), strict=False)
        else:
            self.model = Wrapped(DualEncoder(**ours.model.architecture))
        self.model.to(memory_format=torch.channels_last)
        self.args = SimpleNamespace(
            **{"device": "cpu", "precision": "amp_bf16", "accum_freq": 1, "distill": False},
            **{"skip_scheduler": True, "grad_clip_norm": config.grad_clip, "horovod": False},
            **{"rank": 0, "local_rank": 0, "world_size": 1, "log_local": False},
            **{"log_every_n_steps": config.log_every, "wandb": False, "workers": workers},
            **{"batch_size": config.batch_size, "train_data": table, "distributed": False},
            **{"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "\t"},
        )
        if ours.dtype == torch.float32:
            self.args.precision = "fp32"
        self.loss = open_clip.ClipLoss()
        # the groups and the call of open_clip_train.main
        small = [p for p in self.model.parameters() if p.ndim < 2]
        large = [p for p in self.model.parameters() if p.ndim >= 2]
        groups = [
            {"params": small, "weight_decay": 0.0},
            {"params": large, "weight_decay": config.weight_decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)
        crop = open_clip.image_transform(
            config.image_size, True, (MEAN,) * 3, (STD,) * 3, aug_cfg={"scale": CROP.scale}
        )
        info = get_csv_dataset(self.args, crop, True, tokenizer=tokenizer)
        self.batches = Batches(info.dataloader)
        self.data = {"train": DataInfo(self.batches)}

    def run(self, steps: int) -> list[float]:
        from open_clip_train.train import train_one_epoch

        self.batches.num_batches = WARMUP + steps
        self.batches.num_samples = self.batches.num_batches * self.args.batch_size
        nothing = (None, None, None)
        train_one_epoch(self.model, self.data, self.loss, 0, self.optimizer, *nothing, self.args)
        times = self.batches.times
        return [b - a for a, b in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]


def beside(ours: Trainer, theirs: OpenClip, rounds: int, steps: int) -> dict:
    """Seconds of each step, in turns, and pictures per second."""
    seconds: dict[str, list[float]] = {"ito": [], "open_clip": []}
    done = 10_000  # steps that the profile has not done
    for _ in range(rounds):
        for number in range(done, done + WARMUP + steps):
            begun = time.perf_counter()
            ours.step(number)
            if number >= done + WARMUP:
                seconds["ito"].append(time.perf_counter() - begun)
        done += WARMUP + steps
        time.sleep(PAUSE)
        seconds["open_clip"] += theirs.run(steps)
        time.sleep(PAUSE)
    batch = ours.config.batch_size
    row = {"batch": batch, "pictures_per_second": {}, "step_ms": {}}
    for name, found in seconds.items():
        row["step_ms"][name] = 1e3 * statistics.median(found)
        row["pictures_per_second"][name] = batch / statistics.median(found)
    row["ratio"] = row["step_ms"]["open_clip"] / row["step_ms"]["ito"]
    return row


if __name__ == "__main__":
    main()
