"""The runs behind docs/comparison.md: which objective finds more, and what fusion does.

    python benchmarks/evidence.py run --jobs 2      # continue; Ctrl-C at any time
    python benchmarks/evidence.py time              # step times, once, on a quiet machine
    python benchmarks/evidence_page.py              # the page, from what is there

A run is one training by `ito.trainer.Trainer` on one thread, and one line of `runs.jsonl`: its
settings, scores and hits of each test query. Runs are taken in the order of `plan`, and what the
time does not suffice for is at its end; docs/comparison.md says how the plan was changed, and when.
A run that has its line is not run again.

The data is the small emoji set, divided anew. Validation is what the trainer holds out by default
(the choices behind its defaults were made on it). The test was training data until now: of its
families of concepts, 15 % are `unseen` (both drawings) and 30 % are `seen` (the drawing of one of
the two artists, as the hash decides; the other artist's is trained on).
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from evidence_objectives import ADDED

from ito import compare
from ito.config import Config, from_options
from ito.data.dataset import Dataset
from ito.data.emoji import family, share
from ito.model.tokenizer import Tokenizer
from ito.objectives import OBJECTIVES
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.metrics import image_text_pairs, modality_gap, ranks, unit_rows
from ito.source import open_dataset
from ito.train import training_captions
from ito.trainer import Trainer
from ito_kernels import alignment_loss, uniformity_loss

FOLDER = Path(__file__).parents[1] / "docs" / "comparison"
STYLES = ("twemoji", "openmoji")
SEEDS, TUNING_SEED = range(5), 100
# The workload: a run takes 20 to 50 s of one core.
WORKLOAD = {
    "image_size": 24,
    "width": 64,
    "text_depth": 1,
    "batch_size": 64,
    "steps": 600,
    "weight_decay": 1.0,
}
COMPARED = ("clip", "clip-aug", "slip", "siglip", "flair", "ito-align", "ito")
ARMS = {name: compare.ARMS[name] for name in COMPARED}
# The trials of each objective: learning rate, weight decay, and the factor on the start of the
# scale (1/0.07; sigmoid: 10) and, for a sigmoid, of the bias (-10).
TRIALS = (
    (1e-3, 1.0, 1.0),
    (2e-3, 1.0, 1.0),
    (4e-3, 1.0, 1.0),
    (2e-3, 0.25, 0.5),
)
# How an arm's tuned settings are changed in the controls; `time`: as many steps as take the time
# of ITO's. A fusion that trains no tower still trains the scale and counts in gradient clipping.
CONTROLS = {
    "ito-align, ITO's time": ("ito-align", {"time": "ito"}),
    "clip-aug, ITO's time": ("clip-aug", {"time": "ito"}),
    "clip-aug, twice the batch": ("clip-aug", {"batch_size": 128}),
    "ito, fusion trains no tower": ("ito", {"fusion_stop_gradient": "both"}),
    "clip, ITO's time": ("clip", {"time": "ito"}),
}
ONE_SIDED = {"objective": "one-sided"}
GAP = {
    f"{arm}, scale {scale}": (tuned, change | {"frozen": scale})
    for scale in (100, 50, 20)
    for arm, tuned, change in (
        ("ito-align", "ito-align", {}),
        ("ito", "ito", {}),
        ("one-sided", "ito", ONE_SIDED),
    )
}
FUSION = {
    "one-sided": ("ito", ONE_SIDED),
    "one-sided, tower": ("ito", {"objective": "one-sided-tower"}),
    "dropped": ("ito", {"fusion_text": "dropped"}),
    "shuffled": ("ito", {"fusion_text": "shuffled"}),
    "own": ("ito", {"objective": "own", "captions": 2, "fusion_text": "shuffled"}),
    "modality": ("ito", {"objective": "modality"}),
    "mean-free": ("ito", {"objective": "mean-free"}),
}
# ITO without fusion at the settings that were tuned for ITO with it
WITHOUT = "ito-align, ITO's settings"
NO_FUSION = {"lambda_fusion": 0.0}
SETTINGS = {
    WITHOUT: ("ito", NO_FUSION),
    "siglip, ITO's time": ("siglip", {"time": "ito"}),
    **{
        f"{WITHOUT}, scale {scale}": ("ito", NO_FUSION | {"frozen": scale})
        for scale in (100, 50, 20)
    },
}
# 400 training concepts, longer
SATURATION = {
    f"{arm}, 400 concepts": (arm, {"concepts": 400, "steps": 10_000, "every": 1000})
    for arm in ("ito-align", "ito")
}
# the main comparison for four times as long
LONG = ", 2,400 steps"
LONGER = {arm + LONG: (arm, {"steps": 2400}) for arm in ARMS}
LONGER[WITHOUT + LONG] = ("ito", NO_FUSION | {"steps": 2400})
ORDER = (
    *(("controls", seed) for seed in (0, 1, 2)),
    *(("gap", 0), ("fusion", 0), ("controls", 3), ("controls", 4), ("saturation", 0)),
    *((kind, seed) for seed in (1, 2, 3, 4) for kind in ("fusion", "gap")),
    ("saturation", 1),
    *((kind, seed) for kind in ("settings", "longer") for seed in SEEDS),
    *(("saturation", seed) for seed in (2, 3, 4)),
)
# The comparisons that are tested, as one family, on seen and on unseen concepts; all others are
# described. Stated before any run of the test was made.
COMPARISONS = (
    ("ito", "ito-align"),
    ("ito-align", "clip-aug"),
    ("clip-aug", "clip"),
    ("ito", "slip"),
    ("ito", "siglip"),
    ("ito", "flair"),
    ("ito", "ito-align, ITO's time"),
    ("ito", "clip-aug, ITO's time"),
    ("ito", "clip, ITO's time"),
    ("ito", "clip-aug, twice the batch"),
    ("ito", "ito, fusion trains no tower"),
    ("one-sided", "ito"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """`arm` whose tuned settings are taken, or a trial of it; `change`: what differs from them."""

    family: str
    name: str
    arm: str
    seed: int
    change: dict
    trial: int | None = None

    @property
    def key(self) -> str:
        return f"{self.family}/{self.name}/{self.trial if self.family == 'tuning' else self.seed}"


def plan() -> list[list[Run]]:
    """The runs in their order, in parts of which each needs those before it.

    Tuning; then the main comparison, seed by seed; then the families of `ORDER`.
    """
    tuning = [
        Run("tuning", arm, arm, TUNING_SEED, {}, trial)
        for trial in range(len(TRIALS))
        for arm in ARMS
    ]
    rest = [Run("main", arm, arm, seed, {}) for seed in SEEDS for arm in ARMS]
    parts = {
        "controls": CONTROLS,
        "gap": GAP,
        "fusion": FUSION,
        "settings": SETTINGS,
        "saturation": SATURATION,
        "longer": LONGER,
    }
    for kind, seed in ORDER:
        rest += [Run(kind, name, x[0], seed, x[1]) for name, x in parts[kind].items()]
    return [tuning, rest]


def settings(run: Run, tuned: dict[str, int], seconds: dict[str, float]) -> dict:
    """All that is different from the trainer's defaults, with `scale` and `bias` at the start,
    `frozen`, the scale that is kept, `concepts`, the number to train on, and `every`, the steps
    between evaluations.

    tuned: the best trial of each arm. seconds: the time of a step of each.
    """
    trial = run.trial if run.trial is not None else tuned[run.arm]
    rate, decay, start = TRIALS[trial]
    found = WORKLOAD | ARMS[run.arm] | {"lr": rate, "weight_decay": decay, "seed": run.seed}
    found |= {"start": start} | run.change
    if arm := found.pop("time", None):
        found["steps"] = round(found["steps"] * seconds[arm] / seconds[run.arm])
    return found


# ---- data


@cache
def open_evidence() -> tuple[Dataset, Tokenizer]:
    """The small emoji set, divided as the module's docstring says, and its tokenizer."""
    data = divide(open_dataset(config(WORKLOAD)))
    captions = training_captions(data)
    return data, Tokenizer.train(captions, Config.vocab_size, Config.context_length)


def divide(data: Dataset) -> Dataset:
    """With the splits val_seen, val_unseen, test_seen, test_unseen and train."""
    renamed = {"heldout_style": "val_seen", "heldout_concept": "val_unseen"}
    rows = list(zip(data.image_item.tolist(), data.split, data.style, strict=True))
    # a concept that is in validation has no part in the test
    validated = {item for item, split, _ in rows if split != "train"}

    def split_of(item: int, split: str, style: str) -> str:
        if item in validated:
            return renamed.get(split, "train")
        u = share(f"evidence:{family(data.captions[item][0])}")
        if u < 0.15:
            return "test_unseen"
        held = STYLES[share(f"evidence-style:{data.items[item]}") < 0.5]
        return "test_seen" if u < 0.45 and style == held else "train"

    return dataclasses.replace(data, split=[split_of(*row) for row in rows])


def with_concepts(data: Dataset, count: int | None) -> Dataset:
    """The data with `count` training concepts: those tested on as seen, then others by hash."""
    if count is None:
        return data
    rows = zip(data.image_item.tolist(), data.split, strict=True)
    tested = {item for item, split in rows if split == "test_seen"}
    order = sorted(
        data.training_items(), key=lambda n: (n not in tested, share(f"few:{data.items[n]}"))
    )
    kept = set(order[:count])
    split = [
        "unused" if name == "train" and item not in kept else name
        for item, name in zip(data.image_item.tolist(), data.split, strict=True)
    ]
    return dataclasses.replace(data, split=split)


def cells(data: Dataset, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The galleries of `part`, val or test: (name, rows), by seen and unseen and by style."""
    for kind in ("seen", "unseen"):
        rows = data.rows(f"{part}_{kind}").tolist()
        for style in STYLES:
            if own := [row for row in rows if data.style[row] == style]:
                yield f"{kind}/{style}", torch.tensor(own)


# ---- one run


def config(given: dict) -> Config:
    names = Config.__dataclass_fields__
    return from_options(argparse.Namespace(**{k: x for k, x in given.items() if k in names}))


def trainer_of(given: dict) -> Trainer:
    data, tokenizer = open_evidence()
    data = with_concepts(data, given.get("concepts"))
    trainer = Trainer(config(given), data, tokenizer, torch.device("cpu"), torch.bfloat16)
    scale = trainer.model.logit_scale
    with torch.no_grad():
        scale += math.log(given["start"])
        if hasattr(trainer.objective, "logit_bias"):
            trainer.objective.logit_bias *= given["start"]
        if "frozen" in given:
            scale.fill_(math.log(given["frozen"])).requires_grad_(False)
    return trainer


def train(run: Run, given: dict) -> dict:
    """The line of a run."""
    torch.set_num_threads(1)
    began = time.process_time()
    data, tokenizer = open_evidence()
    trainer = trainer_of(given)
    steps, logged, curve = given["steps"], [], []
    for step in range(steps):
        logged.append(trainer.step(step))
        if "every" in given and (step + 1) % given["every"] == 0:
            found = hits(trainer.model, data, tokenizer, "test")
            curve.append([step + 1, recall(found, "seen/")])
    trainer.loader.shutdown()
    part = "val" if run.family == "tuning" else "test"
    found = hits(trainer.model, data, tokenizer, part)
    line = {"key": run.key, "family": run.family, "name": run.name, "arm": run.arm}
    line |= {"seed": run.seed, "trial": run.trial, "settings": given}
    line["hits"] = {name: f"{int(bits, 2):x}" for name, bits in found.items()}
    line["losses"] = curves(logged)
    line["scale"] = round(logged[-1]["logit_scale"], 3)
    line["parameters"] = sum(p.numel() for p in trainer.parameters)
    if curve:
        line["curve"] = curve
    if part == "test":
        kept = with_concepts(data, given.get("concepts"))
        rows = {"test": data.rows("test_seen"), "train": sample(kept.rows("train"), 400)}
        for name, own in rows.items():
            line[name] = geometry(EmbeddedSplit(own, trainer.model, tokenizer, data))
    return line | {"cpu_seconds": round(time.process_time() - began, 1)}


def hits(model, data: Dataset, tokenizer: Tokenizer, part: str) -> dict[str, str]:
    """For each gallery and direction a 1 for each query whose first answer is right, else 0.

    Queries are the drawings in their order, and the captions of their items in theirs.
    """
    found = {}
    for name, rows in cells(data, part):
        view = EmbeddedSplit(rows, model, tokenizer, data)
        pairs = image_text_pairs(view.item, view.item_text)
        i2t, _ = ranks(view.images, view.texts, pairs)
        t2i, _ = ranks(view.texts, view.images, pairs.flip(1))
        for way, rank in (("i2t", i2t), ("t2i", t2i)):
            found[f"{name}/{way}"] = "".join("01"[r == 1] for r in rank.tolist())
    return found


def recall(found: dict[str, str], prefix: str) -> float:
    own = [bits.count("1") / len(bits) for name, bits in found.items() if name.startswith(prefix)]
    return round(statistics.mean(own), 5)


def curves(logged: list[dict]) -> dict[str, list]:
    """The means of ten steps' terms, at 16 points of the run."""
    ends = [max(10, round(len(logged) * n / 16)) for n in range(1, 17)]
    kept = [name for name in ("align", "fusion", "logit_scale") if name in logged[0]]
    return {"step": ends} | {
        name: [
            float(f"{statistics.mean(x[name] for x in logged[end - 10 : end]):.4g}") for end in ends
        ]
        for name in kept
    }


def sample(rows: torch.Tensor, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return rows[torch.randperm(len(rows), generator=random)[:count].sort().values]


def geometry(view: EmbeddedSplit) -> dict[str, float]:
    """How pictures and the names of their items lie, a name for each picture.

    floor: the gap where each picture changes places with its name at random. R@1, centred: image to
    name, before and after each modality's mean is subtracted. other: the share of the other
    modality among the ten nearest of all embeddings. shared: mean cosine of a picture with its name
    less that with all names, after the means are subtracted.
    """
    images = view.images.double()
    names = view.texts.double()[[view.own[n][0] for n in view.item.tolist()]]
    random = torch.Generator().manual_seed(0)
    floors = []
    for _ in range(20):
        swap = (torch.rand(len(images), 1, generator=random) < 0.5).double()
        a, b = (images * swap + names * (1 - swap)), (names * swap + images * (1 - swap))
        floors.append((a.mean(0) - b.mean(0)).norm().item())
    centred = [torch.nn.functional.normalize(x - x.mean(0), dim=1) for x in (images, names)]
    own, index = view.item.unique(return_inverse=True)
    first = torch.tensor([view.own[n][0] for n in own.tolist()])
    classes = view.texts.double()[first]
    pairs = torch.stack([torch.arange(len(index)), index], 1)
    moved = classes - names.mean(0)
    both = torch.cat([images, names])
    near = (both @ both.T).fill_diagonal_(-2).topk(10).indices
    other = (near >= len(images)) != (torch.arange(len(both)) >= len(images))[:, None]
    cosines = centred[0] @ centred[1].T
    scores = modality_gap(images, names) | {
        "floor": statistics.mean(floors),
        "R@1": (ranks(images, classes, pairs)[0] == 1).double().mean().item(),
        "centred": (ranks(centred[0], moved, pairs)[0] == 1).double().mean().item(),
        "other": other.double().mean().item(),
        "alignment": alignment_loss(view.images, unit_rows(names)).item(),
        "uniformity_images": uniformity_loss(view.images).item(),
        "uniformity_names": uniformity_loss(unit_rows(names)).item(),
        "shared": (cosines.diagonal().mean() - cosines.mean()).item(),
    }
    return {name: round(x, 5) for name, x in scores.items()}


# ---- all runs


def read_runs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_trials(lines: list[dict], sizes: dict[str, int]) -> dict[str, int]:
    """The trial of each arm with the highest R@1 on validation, seen and unseen alike."""
    best: dict[str, tuple[float, int]] = {}
    for line in lines:
        if line["family"] == "tuning":
            score = statistics.mean(validation(line, sizes))
            best[line["arm"]] = max(best.get(line["arm"], (-1.0, 0)), (score, -line["trial"]))
    return {arm: -trial for arm, (_, trial) in best.items()}


def validation(line: dict, sizes: dict[str, int]) -> list[float]:
    """R@1 on seen and on unseen concepts: the mean over styles and directions."""
    bits = {name: f"{int(x, 16):0{sizes[name]}b}" for name, x in line["hits"].items()}
    return [recall(bits, "seen/"), recall(bits, "unseen/")]


def query_families() -> dict[str, dict[str, list[int]]]:
    """{part: {gallery/direction: the number of each query's family of concepts}}: what is needed
    beside the hits."""
    data, _ = open_evidence()
    names = [family(captions[0]) for captions in data.captions]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
    found = {}
    for part in ("val", "test"):
        found[part] = {}
        for name, rows in cells(data, part):
            items = data.image_item[rows].tolist()
            families = [numbers[names[n]] for n in items]
            found[part][f"{name}/i2t"] = families
            found[part][f"{name}/t2i"] = [
                number
                for n, number in sorted(zip(items, families, strict=True))
                for _ in data.captions[n]
            ]
    return found


def run_all(results: Path, jobs: int, first: int | None) -> None:
    """Train what has no line yet. first: only so many."""
    queries = query_families()
    (FOLDER / "queries.json").write_text(json.dumps(queries) + "\n")
    sizes = {name: len(own) for name, own in queries["val"].items()}
    for part in plan():
        lines = read_runs(results)
        done = {line["key"] for line in lines}
        tuned = best_trials(lines, sizes)
        seconds = json.loads((FOLDER / "step_seconds.json").read_text())
        todo = [run for run in part if run.key not in done][:first]
        work = [(run, settings(run, tuned, seconds)) for run in todo]
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            for line in pool.map(train, *zip(*work, strict=True)) if work else ():
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line["key"], line["cpu_seconds"], "s", flush=True)


def time_steps(rounds: int = 60) -> dict[str, float]:
    """Seconds of a step of each arm, the next batch prepared in them: medians, taken in turns."""
    torch.set_num_threads(1)
    trainers = {
        arm: trainer_of(settings(Run("main", arm, arm, 0, {}), dict.fromkeys(ARMS, 1), {}))
        for arm in ARMS
    }
    spent = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm, trainer in trainers.items():
            began = time.perf_counter()
            trainer.step(number)
            for future in trainer.ahead.values():
                future.result()
            spent[arm].append(time.perf_counter() - began)
    return {arm: round(statistics.median(x[3:]), 5) for arm, x in spent.items()}


def main() -> None:
    OBJECTIVES.update(ADDED)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=("run", "time"))
    parser.add_argument("--results", type=Path, default=FOLDER / "runs.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--first", type=int, help="train only so many")
    options = parser.parse_args()
    if options.do == "time":
        path = FOLDER / "step_seconds.json"
        path.write_text(json.dumps(time_steps(), indent=2) + "\n")
    else:
        run_all(options.results, options.jobs, options.first)


if __name__ == "__main__":
    main()
