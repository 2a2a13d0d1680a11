"""The report of a comparison: tables and pictures of several runs, written as `comparison.md`.

R@1 is the mean of both directions on the first held-out split (new drawings of trained concepts).
Standard deviations are over seeds. Differences are paired by seed, with the 95 % interval of
Student's t: 4.3 standard errors for three seeds.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ito.cli import one_line, shown
from ito.config import from_options
from ito.data.augment import Augmentation
from ito.data.dataset import Dataset
from ito.files import read_json, write_atomically, write_text
from ito.model.exported import WEIGHTS, load
from ito.objectives import OPTIONS
from ito.run import RunFolder, refuse_commands
from ito.scoring.cost import StepCost, step_costs
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.pages import plain_text
from ito.scoring.projections import PROJECTIONS
from ito.source import open_dataset

# 97.5 % quantiles of Student's t, by degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# pairs of objectives; the paper expects the first to be better
EXPECTED = (("ito", "ito-align"), ("ito-align", "clip-aug"), ("clip-aug", "clip"), ("ito", "clip"))
BASE = "ito"  # what ablations are compared with
# options in which arms may differ; plain CLIP has its own augmentation
DECIDED = {"objective", "seed", *OPTIONS, *vars(Augmentation())} - {"equal_captions"}


class Result:
    """A finished run."""

    def __init__(self, folder: Path):
        run = RunFolder(folder)
        self.folder, self.arm = folder, folder.name.rpartition("-seed")[0]
        self.config, self.environment = run.read_config(), run.read_environment()
        self.steps, self.evaluations = run.log().read("train"), run.log().read("eval")
        self.probes = dict(read_json(run.evaluation))  # of `python -m ito.evaluate`
        self.peak_bytes = int(read_json(run.cost)["peak_bytes"])

    @property
    def version(self) -> int:
        """2 if every distinct caption is scored, 1 if only the first of each item was."""
        return 1 + (f"{self.split}/distinct_captions" in self.evaluations[-1])

    @property
    def split(self) -> str:
        """The first held-out split, by which runs are compared."""
        return next(name for name in self.evaluations[0] if "/" in name).split("/")[0]

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of an evaluation's metric; R@1 is the mean of both directions."""
        return [(r["step"], self.value(r, metric)) for r in self.evaluations]

    def value(self, record: dict, metric: str) -> float:
        if metric == "R@1":
            return (self.value(record, "i2t/R@1") + self.value(record, "t2i/R@1")) / 2
        return record.get(f"{self.split}/{metric}", math.nan)

    def end(self, metric: str) -> float:
        return self.value(self.evaluations[-1], metric)

    def probe(self, metric: str) -> float:
        return self.probes.get(f"{self.split}/{metric}", math.nan)

    def scale(self) -> list[tuple[int, float]]:
        """(step, logit scale) of the logged steps."""
        return [(r["step"], r["logit_scale"]) for r in self.steps]

    def aligning(self) -> list[tuple[int, float]]:
        """(step, alignment loss), averaged over ten logged steps; only of softmax losses of pairs.

        Sigmoid losses are not comparable, and a pooled one of V views and a caption cannot fall
        below ½ ln V.
        """
        if self.config.denominator == "pooled":
            return []
        logged = [(r["step"], r["align"]) for r in self.steps if "logit_bias" not in r]
        means = [statistics.mean(v for _, v in logged[i : i + 10]) for i in range(len(logged) - 9)]
        return [(step, mean) for (step, _), mean in zip(logged[9:], means, strict=True)]


def write_comparison(out: Path, cache: Path | None = None, given: dict | None = None) -> Path:
    """Write `out/comparison.md` and its pictures from the finished runs in `out`.

    cache: where prepared data lives (~/.cache/ito). given: the options that name data.
    Raises ValueError if there are none, if they had unequal budgets, data or threads, or if their
    data is a command that is not given.
    """
    folders = sorted(path for path in out.glob("*") if RunFolder(path).evaluation.exists())
    if not folders:
        raise ValueError(f"{out} holds no finished run")
    arms: dict[str, list[Result]] = {}
    for result in map(Result, folders):
        arms.setdefault(result.arm, []).append(result)
    check_equal([run for runs in arms.values() for run in runs])
    for run in (run for runs in arms.values() for run in runs):
        same = from_options(argparse.Namespace(**given or {}), run.config) == run.config
        named = given if given and same else {}
        refuse_commands(run.folder, run.config, named, ("train_data", "val_data", "objective"))
    costs = measured({arm: runs[0].folder for arm, runs in arms.items()}, out, cache)
    arms = dict(sorted(arms.items(), key=lambda item: costs[item[0]].seconds))
    first = next(iter(arms.values()))[0]
    draw_curves(arms, out / "curves.png")
    method = draw_maps(arms, out / "maps.png", cache)
    sections = {
        "Equal steps": equal_steps(arms),
        "Further scores of the exported models": probes(arms),
        "Equal time": equal_time(arms, costs),
        "Differences": differences(arms),
        "The modality gap at matched quality": matched_gap(arms),
        "Cost": cost_table(arms, costs),
        "Curves": "![R@1, modality gap, scale and fusion loss](curves.png)",
        "Maps of both modalities": "![Pictures and captions in two dimensions](maps.png)",
    }
    parts = ["# Objectives compared", about(arms, first)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    parts.append(f"Held-out pictures and their captions, first seed, {method}.")
    path = out / "comparison.md"
    write_text(path, "\n\n".join(parts) + "\n")
    print(f"comparison {shown(path)}")
    return path


def check_equal(runs: list[Result]) -> None:
    """Raises ValueError naming two runs that differ in other options than arms and seeds do."""
    first = runs[0]
    for run in runs:
        for a, b in (
            (first.config.flat(), run.config.flat()),
            (first.environment, run.environment),
            ({"version of the scores": first.version}, {"version of the scores": run.version}),
        ):
            other = [name for name in a if name not in DECIDED and a[name] != b.get(name)]
            if other:
                raise ValueError(
                    f"{first.folder} and {run.folder} differ in {', '.join(other)}: "
                    "compare runs of equal budgets, data and machines"
                )


def measured(folders: dict[str, Path], out: Path, cache: Path | None) -> dict[str, StepCost]:
    """`step_costs`, saved in `out` for the next report of the same arms."""
    path = out / "step_costs.json"
    known = read_json(path) if path.exists() else {}
    fields = {field.name for field in dataclasses.fields(StepCost)}
    if known.keys() != folders.keys() or any(cost.keys() != fields for cost in known.values()):
        print(f"timing steps of {one_line(', '.join(folders), 2000)}", flush=True)
        known = {arm: dataclasses.asdict(x) for arm, x in step_costs(folders, cache).items()}
        write_text(path, json.dumps(known, indent=2) + "\n")
    return {arm: StepCost(**x) for arm, x in known.items()}


def rows(header: list[str], lines: list[list[str]]) -> str:
    table = [[*map(plain_text, header)], ["---"] * len(header)]
    table += [[*map(plain_text, line)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def by_arm(
    arms: dict[str, list[Result]],
    columns: dict[str, tuple[Callable[[list[float]], str], Callable[[Result], float]]],
) -> str:
    """A row per arm. columns: by title, what writes the values of its runs, and that of a run."""
    lines = [
        [arm, *(cell([value(run) for run in runs]) for cell, value in columns.values())]
        for arm, runs in arms.items()
    ]
    return rows(["objective", *columns], lines)


def spread(form: Callable[[float], str], values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    values = [x for x in values if not math.isnan(x)]
    if not values:
        return ""
    mean = form(statistics.mean(values))
    return f"{mean} ± {form(statistics.stdev(values))}" if len(values) > 1 else mean


def whole(values: list[float]) -> str:
    return f"{statistics.mean(values):.0f}"


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def plain(x: float) -> str:
    return f"{x:.2f}"


percents, plains = partial(spread, percent), partial(spread, plain)


def about(arms: dict[str, list[Result]], first: Result) -> str:
    config, environment, chance = first.config, first.environment, first.end("i2t/chance")
    seeds = ", ".join(f"{arm} {len(runs)}" for arm, runs in arms.items())
    return plain_text(
        f"{config.steps} steps of {config.batch_size} items each, {environment['threads']} threads,"
        f" {environment['dtype'].removeprefix('torch.')}; {environment['data']}. Split "
        f"{first.split}, {first.end('i2t/candidates')} captions, chance {chance:.2%}. "
        f"Seeds: {seeds}. Percentages, mean ± deviation over seeds. "
        "Gap: the distance between the means of both modalities, and relative to that of an image "
        "and a text; scale: the learned multiplier of cosines. A column is empty where the data "
        "has no such scores: probes need two classes that are trained on and held out."
    )


def equal_steps(arms: dict[str, list[Result]]) -> str:
    def late(run: Result) -> float:
        return run.end("R@1") - at(run.curve("R@1"), 0.75 * run.config.steps)

    unseen = "heldout_concept/i2t/R@1"
    table = by_arm(
        arms,
        {
            "image → text R@1": (percents, lambda r: r.end("i2t/R@1")),
            "text → image R@1": (percents, lambda r: r.end("t2i/R@1")),
            "text → image R@10": (percents, lambda r: r.end("t2i/R@10")),
            "zero-shot, all names": (percents, lambda r: r.end("zero_shot/names/top1")),
            "unseen things R@1": (percents, lambda r: r.evaluations[-1].get(unseen, math.nan)),
            "gap": (plains, lambda r: r.end("modality/gap")),
            "relative gap": (plains, lambda r: r.end("modality/relative")),
            "scale": (plains, lambda r: r.steps[-1]["logit_scale"]),
            "gained in the last quarter": (percents, late),
        },
    )
    return table + (
        "\n\nThe last column says how far from convergence a run is: R@1 at the end less R@1 after "
        "three quarters of the steps, while the learning rate came down."
    )


def probes(arms: dict[str, list[Result]]) -> str:
    """The scores that `python -m ito.evaluate` adds to those of training."""
    columns = (
        ("linear probe, concepts", percents, "linear_probe/concepts/top1"),
        ("k-NN, concepts", percents, "knn/concepts/top1"),
        ("linear probe, subgroups", percents, "linear_probe/subgroups/top1"),
        ("zero-shot, prompt ensemble", percents, "zero_shot/names/ensemble"),
        ("modality classifier", percents, "modality/classifier"),
        ("uniformity, images", plains, "geometry/uniformity_images"),
        ("uniformity, names", plains, "geometry/uniformity_texts"),
        ("alignment", plains, "geometry/alignment"),
        ("rank variance over languages", plains, "languages/t2i/mean_rank_variance"),
    )
    values = {name: (cell, partial(Result.probe, metric=key)) for name, cell, key in columns}
    return by_arm(arms, values)


def equal_time(arms: dict[str, list[Result]], costs: dict[str, StepCost]) -> str:
    """The scores of each run at the time at which the fastest arm has ended."""
    budget = min(costs[arm].seconds * runs[0].config.steps for arm, runs in arms.items())

    def by_then(run: Result) -> float:
        return min(budget / costs[run.arm].seconds, run.config.steps)

    table = by_arm(
        arms,
        {
            "steps by then": (whole, by_then),
            "R@1": (percents, lambda r: at(r.curve("R@1"), by_then(r))),
            "gap": (plains, lambda r: at(r.curve("modality/gap"), by_then(r))),
        },
    )
    return (
        f"After {budget:.0f} s of steps, when the fastest has ended: from the same runs' curves "
        "and the cost of a step (below). The learning rate of the slower ones has not come down "
        f"yet, which is to their disadvantage.\n\n{table}"
    )


def differences(arms: dict[str, list[Result]]) -> str:
    pairs = dict.fromkeys((*EXPECTED, *((BASE, arm) for arm in arms if arm != BASE)))
    lines = [
        [
            f"{a} − {b}",
            interval(paired(arms[a], arms[b], "R@1"), percent),
            interval(paired(arms[a], arms[b], "modality/gap"), plain),
            "yes" if (a, b) in EXPECTED else "",
        ]
        for a, b in pairs
        if a in arms and b in arms
    ]
    table = rows(["difference", "R@1", "gap", "expected by the paper to be better"], lines)
    return table + (
        "\n\n± is the half of a 95 % interval (Student's t, differences paired by seed). "
        '"Significant" is each difference alone: of 20, one is so by chance.'
    )


def paired(a: list[Result], b: list[Result], metric: str) -> list[float]:
    others = {r.config.seed: r.end(metric) for r in b}
    return [r.end(metric) - others[r.config.seed] for r in a if r.config.seed in others]


def interval(values: list[float], form: Callable[[float], str]) -> str:
    """The mean, with its 95 % interval if there are several values."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{form(mean)} (one seed)"
    quantile = T[min(len(values) - 2, len(T) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    verdict = ", significant" if abs(mean) > half else ""
    return f"{form(mean)} ± {form(half)}{verdict}"


def matched_gap(arms: dict[str, list[Result]]) -> str:
    """The modality gap at equal R@1 and at equal alignment loss, because it depends on progress."""
    quality = min(max(v for _, v in r.curve("R@1")) for runs in arms.values() for r in runs)
    by_quality = gaps_when(arms, lambda r: reached(r.curve("R@1"), quality))
    text = f"When R@1 first reaches {quality:.1%}, which every run does.\n\n{by_quality}"
    softmax = {arm: runs for arm, runs in arms.items() if runs[0].aligning()}
    if not softmax:
        return text
    loss = max(min(v for _, v in r.aligning()) for runs in softmax.values() for r in runs)
    by_loss = gaps_when(softmax, lambda r: reached([(step, -v) for step, v in r.aligning()], -loss))
    return (
        f"{text}\n\nWhen the alignment loss in training (the mean of ten logged batches) first "
        f"reaches {loss:.2f}, for the objectives that have that loss. Pictures under mild "
        f"augmentation reach this loss sooner than the same R@1.\n\n{by_loss}"
    )


def gaps_when(arms: dict[str, list[Result]], when: Callable[[Result], float]) -> str:
    """Gap and scale of each run at the step that `when` returns."""
    return by_arm(
        arms,
        {
            "at step": (whole, when),
            "gap": (plains, lambda r: at(r.curve("modality/gap"), when(r))),
            "relative gap": (plains, lambda r: at(r.curve("modality/relative"), when(r))),
            "scale": (plains, lambda r: at(r.scale(), when(r))),
        },
    )


def at(curve: list[tuple[float, float]], step: float) -> float:
    """The value of the curve at a step, interpolated linearly."""
    return float(np.interp(step, *zip(*curve, strict=True)))


def reached(curve: list[tuple[float, float]], target: float) -> float:
    """The first step at which the curve reaches `target`."""
    for (a, x), (b, y) in pairwise(curve):
        if y >= target:
            return a if x >= target else a + (b - a) * (target - x) / (y - x)
    return curve[-1][0]


def cost_table(arms: dict[str, list[Result]], costs: dict[str, StepCost]) -> str:
    fastest = min(cost.seconds for cost in costs.values())
    lines = []
    for arm, runs in arms.items():
        cost = costs[arm]
        weights = RunFolder(runs[0].folder).model / WEIGHTS
        lines.append(
            [
                arm,
                f"{1000 * cost.seconds:.0f}",
                f"{cost.seconds / fastest:.2f}",
                percent(cost.input / cost.seconds),
                f"{1000 * cost.loader:.1f}",
                f"{max(r.peak_bytes for r in runs) / 2**20:.0f}",
                f"{weights.stat().st_size / 2**20:.1f}",
            ]
        )
    header = ["objective", "ms per step", "× the fastest", "waiting for its batch, %"]
    header += ["preparing the next batch, ms", "peak memory, MiB", "exported model, MiB"]
    return rows(header, lines) + (
        "\n\nSteps are timed in turns in one process; a thread prepares the next batch while one "
        "computes. The exported model has the two towers only, so it and the cost of inference are "
        "the same for all objectives. Memory is that of the process, with data and evaluation."
    )


def draw_curves(arms: dict[str, list[Result]], path: Path) -> None:
    panels = (
        ("R@1, %", lambda r: [(s, 100 * v) for s, v in r.curve("R@1")]),
        ("modality gap", lambda r: r.curve("modality/gap")),
        ("scale", lambda r: r.scale()),
        ("fusion loss", lambda r: [(s["step"], s["fusion"]) for s in r.steps if s.get("fusion")]),
    )
    with picture(path, 2, 2, (11, 7)) as axes:
        for axis, (title, curve) in zip(axes.flat, panels, strict=True):
            for number, (arm, runs) in enumerate(arms.items()):
                label = arm
                for run in runs:
                    if points := curve(run):
                        style = {"color": f"C{number % 10}", "lw": 1.1, "alpha": 0.8}
                        axis.plot(*zip(*points, strict=True), label=label, **style)
                        label = None
            axis.set(title=title, xlabel="step")
            axis.spines[["top", "right"]].set_visible(False)
        axes[1, 1].set_yscale("log")


def draw_maps(arms: dict[str, list[Result]], path: Path, cache: Path | None) -> str:
    """Draw pictures and captions of the held-out split, of each arm's first run, as a map. Returns
    the name of the projection."""
    columns = min(len(arms), 4)
    height = -(-len(arms) // columns)
    project = "umap" if importlib.util.find_spec("umap") else "pca"
    datasets: dict[str, Dataset] = {}
    with picture(path, height, columns, (3 * columns, 3 * height)) as axes:
        for axis in axes.flat:
            axis.axis("off")
        for axis, (arm, runs) in zip(axes.flat, arms.items(), strict=False):
            run = runs[0]
            data = datasets.setdefault(run.config.train_data, open_dataset(run.config, cache))
            encoder = load(run.folder)
            split = EmbeddedSplit(data.rows(run.split), encoder.model, encoder.tokenizer, data)
            points, _ = PROJECTIONS[project](torch.cat([split.images, split.texts]))
            n = len(split.images)
            axis.scatter(*zip(*points[:n], strict=True), s=5, lw=0, alpha=0.7, label="pictures")
            axis.scatter(*zip(*points[n:], strict=True), s=5, lw=0, alpha=0.7, label="captions")
            axis.set_title(arm, fontsize=10)
    return {"umap": "UMAP", "pca": "principal directions"}[project]


@contextmanager
def picture(path: Path, height: int, width: int, inches: tuple[int, int]) -> Iterator[np.ndarray]:
    """The axes, height × width, of a PNG that is written at the end of the body."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "a comparison draws with matplotlib: pip install 'ito_trainer[compare]'"
        ) from None
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    yield axes
    axes[0, 0].legend(frameon=False, fontsize=8)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
