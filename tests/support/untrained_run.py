"""A data set of coloured noise and the folder of an untrained run on it, made in a second."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ito.config import Config
from ito.model.encoders import DualEncoder
from ito.model.exported import export
from ito.model.tokenizer import Tokenizer
from ito.scoring.evaluation import evaluate
from ito.source import open_dataset

COLOURS = ("red", "green", "blue", "pink", "grey")
THINGS = ("cat", "dog", "sun", "boat")
SPLITS = ("train", "train", "heldout_style", "heldout_concept")


def write_data(folder: Path, **fields) -> Path:
    """20 items of 2 pictures: a colour (its subgroup) and a thing (its group), in 3 languages.

    An item's split is that of its thing; a heldout_style item's first picture is trained on.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with (folder / "captions.jsonl").open("w") as lines:
        for colour in COLOURS:
            for thing, split in zip(THINGS, SPLITS, strict=True):
                coarse = random.integers(0, 256, (4, 4, 3))
                name = f"{colour} {thing}"
                for drawing in range(2):
                    noisy = coarse.repeat(8, 0).repeat(8, 1) + random.normal(0, 12, (32, 32, 3))
                    file = f"{colour}-{thing}-{drawing}.png"
                    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / file)
                    record = {
                        "image": file,
                        "item": name,
                        "captions": [name, f"a {thing}"],
                        "translations": {"de": [f"{name} auf deutsch"], "fr": [f"le {name}"]},
                        "group": thing,
                        "subgroup": colour,
                        "split": "train" if split == "heldout_style" and not drawing else split,
                    }
                    lines.write(json.dumps(record | fields) + "\n")
    return folder


def write_run(run: Path, data: Path) -> Path:
    """The folder of a run, as `ito.train` leaves it, but for checkpoints."""
    torch.manual_seed(1)
    run.mkdir(parents=True)
    config = Config(train_data=str(data), load_size=32, image_size=16, width=16, heads=2)
    config.save(run / "config.json")
    dataset = open_dataset(config)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    model = DualEncoder(
        image_size=16,
        width=16,
        heads=2,
        image_depth=1,
        text_depth=1,
        vocab_size=tokenizer.vocab_size,
        context_length=8,
    )
    export(model, tokenizer, 32, 7, run / "model")
    scores = evaluate(model, tokenizer, dataset)
    records = [{"kind": "eval", "step": 0} | scores, {"kind": "eval", "step": 7} | scores]
    for step in range(1, 8):
        terms = {"loss": 8 / step, "align": 5 / step, "seconds": 0.1 * step, "lr": 1e-3}
        records.append({"kind": "train", "step": step, "logit_scale": 14.0, "grad_norm": 1} | terms)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "environment.json").write_text(json.dumps({"torch": "<1.0>", "threads": 1}))
    return run


def write(folder):
    """A run, and its data beside it."""
    return write_run(folder / "run", write_data(folder / "data"))
