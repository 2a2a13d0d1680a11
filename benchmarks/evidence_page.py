"""Writes docs/comparison.md, its figure and docs/comparison/tables.md from the finished runs.

The text is `evidence_page.md`, in which `{function | argument | ...}` stands for a number or a
table; tests/trainer/test_evidence.py writes the pages again and compares. Words that say who is
better come from the data too.
"""

import argparse
import json
import math
import re
import statistics
import textwrap
from pathlib import Path

from evidence import (
    ARMS,
    COMPARISONS,
    CONTROLS,
    FOLDER,
    FUSION,
    GAP,
    LONG,
    LONGER,
    SATURATION,
    SETTINGS,
    STYLES,
    TRIALS,
    WITHOUT,
    WORKLOAD,
    best_trials,
    plan,
    validation,
)
from evidence_statistics import Estimate, Evidence, holm, t_quantile

TEXT = Path(__file__).with_name("evidence_page.md")
KINDS = {"seen": "seen/", "unseen": "unseen/"}
MODULE = "one-sided"
# rows of the first table
FIRST = (*ARMS, *CONTROLS, *(name for name in SETTINGS if "scale" not in name), MODULE)
# what the differences of the page say; those that were not named beforehand are described
QUESTIONS = {
    "fusion": [("ito", "ito-align")],
    "fusion, at equal settings": [("ito", WITHOUT)],
    "fusion's gradient to the towers, at equal settings": [("ito", "ito, fusion trains no tower")],
    "two views": [("ito-align", "clip-aug")],
    "two views, at equal settings": [(WITHOUT, "clip-aug")],
    "augmentation": [("clip-aug", "clip")],
    "other objectives, equal steps": [
        ("ito", other) for other in ("clip", "slip", "siglip", "flair")
    ],
    "equal time": [
        ("ito", f"{other}, ITO's time") for other in ("clip", "clip-aug", "siglip", "ito-align")
    ],
    "equal pictures": [("ito", "clip-aug, twice the batch")],
    "one-sided fusion": [(MODULE, "ito")],
}


class Page:
    """The functions that the text calls, by name."""

    def __init__(self, folder: Path = FOLDER):
        self.evidence = Evidence(folder)
        self.seconds = json.loads((folder / "step_seconds.json").read_text())
        estimates: dict[tuple[str, str, str], Estimate] = {
            (a, b, kind): self.evidence.estimate(a, prefix, b)
            for a, b in COMPARISONS
            for kind, prefix in KINDS.items()
        }
        p = [found.p for found in estimates.values()]
        self.family = estimates
        self.adjusted = dict(zip(estimates, holm(p), strict=True))

    def fill(self, text: str) -> str:
        def value(match: re.Match) -> str:
            name, *arguments = (" ".join(part.split()) for part in match[1].split("|"))
            return getattr(self, name)(*arguments)

        return wrapped(re.sub(r"\{([^{}]+)\}", value, text))

    # ---- in the text

    def recall(self, name: str) -> str:
        """R@1 on seen concepts."""
        return f"{self.evidence.estimate(name, KINDS['seen']).value:.1f}"

    def difference(self, a: str, b: str) -> str:
        """On seen concepts; marked as in `differences`."""
        return signed(self.evidence.estimate(a, KINDS["seen"], b)) + self.mark(a, b, "seen")

    def mark(self, a: str, b: str, kind: str) -> str:
        p = self.adjusted.get((a, b, kind))
        return "†" if p is None else r"\*" if p < 0.05 else ""

    def p(self, a: str, b: str) -> str:
        return probability(self.adjusted[a, b, "seen"])

    def differences(self) -> str:
        """R@1 of one less that of the other; * where p of Holm is below 0.05, † where there is no
        test."""
        lines = []
        for question, pairs in QUESTIONS.items():
            for a, b in pairs:
                line = [question, f"{a} − {b}"]
                for kind, prefix in KINDS.items():
                    found = self.evidence.estimate(a, prefix, b)
                    line.append(signed(found) + self.mark(a, b, kind))
                lines.append(line)
                question = ""
        return table(["", "difference", "seen", "unseen"], lines)

    def relative_cost(self, name: str, other: str) -> str:
        """The processor time of whole runs of one, relative to the other's."""
        spent = [
            statistics.median(x["cpu_seconds"] for x in self.evidence.runs[arm].values())
            for arm in (name, other)
        ]
        return f"{spent[0] / spent[1]:.1f}"

    def of(self, name: str, part: str, score: str) -> str:
        """The mean over seeds of a score of the geometry, on test or train, and half of its 95 %
        interval."""
        values = [x[part][score] for x in self.evidence.runs[name].values()]
        count = len(values)
        half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
        return f"{form(score, statistics.mean(values))} ± {form(score, half)}"

    def geometry(self, name: str, part: str, score: str) -> float:
        return statistics.mean(x[part][score] for x in self.evidence.runs[name].values())

    def fusion(self, name: str, end: str) -> str:
        """The fusion loss, first (at a sixteenth of the steps) or last, over seeds."""
        runs = self.evidence.runs[name].values()
        return f"{statistics.mean(x['losses']['fusion'][-(end == 'last')] for x in runs):.2g}"

    def curve(self, name: str) -> str:
        """R@1 along the training, first and last and where it is highest, means over seeds."""
        runs = self.evidence.runs[name].values()
        steps, values = zip(
            *(
                (points[0][0], statistics.mean(value for _, value in points))
                for points in zip(*(line["curve"] for line in runs), strict=True)
            ),
            strict=True,
        )
        first, last, most = (f"{100 * x:.1f}" for x in (values[0], values[-1], max(values)))
        return (
            f"{first} % at step {steps[0]:,} and {last} at step {steps[-1]:,} (highest: {most}; "
            f"{len(runs)} seeds)"
        )

    def longer(self) -> str:
        """R@1 on seen concepts after four times the steps, the highest first."""
        found = {name.removesuffix(LONG): self.evidence.estimate(name, "seen/") for name in LONGER}
        order = sorted(found, key=lambda name: -found[name].value)
        return ", ".join(f"{name} {found[name].value:.1f}" for name in order)

    def longer_difference(self, a: str, b: str) -> str:
        return self.difference(a + LONG, b + LONG)

    def cost(self, name: str) -> float | None:
        """The time of all steps, relative to CLIP's in the main comparison; None for a batch of
        which no step was timed."""
        line = next(iter(self.evidence.runs[name].values()))
        given, arm = line["settings"], line["arm"]
        arm = "ito-align" if given.get("lambda_fusion") == 0 else arm
        if given["batch_size"] != WORKLOAD["batch_size"]:
            return None
        return given["steps"] * self.seconds[arm] / (self.seconds["clip"] * WORKLOAD["steps"])

    def steps(self) -> str:
        return str(WORKLOAD["steps"])

    def drawings(self, kind: str) -> str:
        """The number of test queries that are drawings, a concept's two as one."""
        galleries = self.evidence.queries["test"]
        sizes = [len(galleries[f"{kind}/{style}/i2t"]) for style in STYLES]
        return str(sum(sizes) if kind == "seen" else max(sizes))

    def gallery(self) -> str:
        """The sizes of the galleries, and what chance finds in the smallest."""
        galleries = self.evidence.queries["test"].items()
        sizes = [len(x) for name, x in galleries if name.endswith("i2t")]
        return f"{min(sizes)} to {max(sizes)} drawings; chance is at most {100 / min(sizes):.1f} %"

    def tested(self) -> str:
        return str(len(self.adjusted))

    def count(self) -> str:
        """The runs that there are, of all planned."""
        runs = self.evidence.runs
        done = sum(map(len, runs.values())) + len(self.evidence.tuning)
        return f"{done} of {sum(map(len, plan()))}"

    def missing(self) -> str:
        """The planned families of which runs are missing."""
        words = {
            "settings": "at ITO's settings",
            "saturation": "on 400 concepts",
            "longer": "of 2,400 steps",
        }
        done = {line["key"] for line in self.evidence.tuning}
        done |= {line["key"] for runs in self.evidence.runs.values() for line in runs.values()}
        planned: dict[str, list[bool]] = {}
        for run in (run for part in plan() for run in part):
            planned.setdefault(run.family, []).append(run.key in done)
        parts = [
            f"{len(x) - sum(x)} of {len(x)} {words.get(name, name)}"
            for name, x in planned.items()
            if not all(x)
        ]
        return f"; missing are {', '.join(parts)}" if parts else ""

    # ---- tables

    def first_table(self) -> str:
        header = ["R@1, %", "time"]
        for kind in KINDS:
            header += [f"{kind}, {style}" for style in ("Twemoji", "OpenMoji")]
            header += [f"**{kind}**"]
        lines = []
        for name in FIRST:
            runs = self.evidence.runs[name].values()
            cost = self.cost(name)
            line = [name, f"{cost:.2f}" if cost else ""]
            for kind, prefix in KINDS.items():
                for style in STYLES:
                    ways = (f"{kind}/{style}/{way}" for way in ("i2t", "t2i"))
                    both = (
                        statistics.mean(self.evidence.recall(x, gallery) for x in runs)
                        for gallery in ways
                    )
                    line.append(" / ".join(f"{x:.1f}" for x in both))
                found = self.evidence.estimate(name, prefix)
                line.append(f"**{found.value:.1f}** ± {found.half:.1f}")
            lines.append(line)
        return table(header, lines)

    def comparisons(self) -> str:
        lines = [
            [
                f"{a} − {b}",
                kind,
                signed(found),
                probability(found.p),
                probability(self.adjusted[a, b, kind]),
            ]
            for (a, b, kind), found in self.family.items()
        ]
        return table(["difference", "concepts", "R@1 [95 %]", "p", "p, Holm"], lines)

    def trials(self) -> str:
        sizes = {name: len(x) for name, x in self.evidence.queries["val"].items()}
        best = best_trials(self.evidence.tuning, sizes)
        header = ["R@1 on validation, seen / unseen, %"]
        header += [f"rate {r:g}, decay {d:g}, start × {s:g}" for r, d, s in TRIALS]
        found = {(x["arm"], x["trial"]): validation(x, sizes) for x in self.evidence.tuning}
        lines = []
        for arm in ARMS:
            line = [arm]
            for trial in range(len(TRIALS)):
                cell = " / ".join(f"{100 * x:.1f}" for x in found.get((arm, trial), ()))
                line.append(f"**{cell}**" if trial == best.get(arm) else cell)
            lines.append(line)
        return table(header, lines)

    def gap_table(self, part: str) -> str:
        scores = {
            "gap": "gap",
            "floor": "floor",
            "R@1": "R@1",
            "centred": "R@1, centred",
            "other": "other modality near, %",
            "alignment": "alignment",
            "uniformity_images": "uniformity, images",
            "uniformity_names": "names",
            "shared": "shared space",
        }
        lines = []
        for name in (*FIRST, *GAP, *(name for name in SETTINGS if "scale" in name)):
            scale = statistics.mean(x["scale"] for x in self.evidence.runs[name].values())
            cells = [form(key, self.geometry(name, part, key)) for key in scores]
            lines.append([name, f"{scale:.0f}", *cells])
        return table(["", "scale", *scores.values()], lines)

    def fusion_table(self) -> str:
        lines = []
        for name in ("ito-align", "ito", *FUSION):
            line = [name]
            for prefix in KINDS.values():
                found = self.evidence.estimate(name, prefix)
                more = None if name == "ito" else self.evidence.estimate(name, prefix, "ito")
                line += [f"{found.value:.1f}", signed(more) if more else ""]
            fused = name != "ito-align"
            line += [self.fusion(name, x) if fused else "" for x in ("first", "last")]
            line += [form("gap", self.geometry(name, "test", "gap"))]
            lines.append(line)
        header = ["", "seen", "less ITO [95 %]", "unseen", "less ITO [95 %]"]
        header += ["fusion loss, first", "last", "gap"]
        return table(header, lines)

    def small_gap_table(self) -> str:
        """Gap and R@1 by scale, of the forms at ITO's settings."""
        forms = (WITHOUT, "ito", MODULE)
        scores = [(score, name) for score in ("gap", "R@1") for name in forms]
        lines = []
        for scale in ("", ", scale 20", ", scale 50", ", scale 100"):
            line = [scale.removeprefix(", scale ") or "learned"]
            lines.append(line + [self.of(name + scale, "test", score) for score, name in scores])
        header = [f"{score}: {name}" for score, name in scores]
        return table(["scale", *header], lines)

    def longer_table(self) -> str:
        """The arms after the steps of the first table and after four times as many."""
        lines = []
        for name in LONGER:
            short = name.removesuffix(LONG)
            line = [short, f"{self.cost(name):.2f}"]
            for prefix in KINDS.values():
                both = (self.evidence.estimate(x, prefix) for x in (short, name))
                line += [f"{x.value:.1f} ± {x.half:.1f}" for x in both]
                less = self.evidence.estimate("ito" + LONG, prefix, name)
                line.append(signed(less) if less and short != "ito" else "")
            lines.append(line)
        header = ["", "time"]
        for kind in KINDS:
            header += [f"{kind}, {WORKLOAD['steps']} steps", "2,400 steps", "ITO less this [95 %]"]
        return table(header, lines)

    def saturation_table(self) -> str:
        lines = []
        for name in SATURATION:
            for seed, line in sorted(self.evidence.runs.get(name, {}).items()):
                lines.append(
                    [f"{name}, seed {seed}", *(f"{100 * x:.1f}" for _, x in line["curve"])]
                )
        steps = range(1000, 10_001, 1000)
        return table(["R@1 on seen concepts, %, at step", *map(str, steps)], lines)


# ---- forms


def signed(found: Estimate) -> str:
    low, high = found.value - found.half, found.value + found.half
    return f"{found.value:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def wrapped(text: str) -> str:
    """With lines of 105 letters, except in tables, code and headings."""
    blocks = []
    for block in text.split("\n\n"):
        if not block.startswith(("|", "#", "!", "```")):
            items = re.split(r"\n(?=- )", block)
            block = "\n".join(
                textwrap.fill(
                    " ".join(item.split()),
                    105,
                    subsequent_indent="  " if item.startswith("- ") else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            )
        blocks.append(block)
    return "\n\n".join(blocks).rstrip() + "\n"


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def form(score: str, value: float) -> str:
    percent = score in ("R@1", "centred", "other")
    return f"{100 * value:.1f}" if percent else f"{value:.2f}".replace("-", "−")


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---- the figure


def draw(page: Page, path: Path) -> None:
    """R@1 with intervals, on seen and on unseen concepts: at equal steps, and in ITO's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    other = [name for name in FIRST if name not in ARMS]
    names = [*ARMS, *sorted(other, key=lambda name: "time" not in name)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    for axis, (kind, prefix) in zip(axes, KINDS.items(), strict=True):
        for y, name in enumerate(names):
            found = page.evidence.estimate(name, prefix)
            colour = "C3" if name == "ito" else "C0" if name in ARMS else "0.45"
            axis.errorbar(found.value, y, xerr=found.half, fmt="o", color=colour, capsize=3, ms=5)
        axis.axvline(page.evidence.estimate("ito", prefix).value, color="C3", lw=0.8, alpha=0.5)
        axis.set(title=f"{kind} concepts", xlabel="R@1, %")
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    times = {name: f"  ({cost:.2f})" for name in names if (cost := page.cost(name))}
    axes[0].set_yticks(range(len(names)), [name + times.get(name, "") for name in names])
    axes[0].invert_yaxis()
    figure.suptitle("in brackets: time of training, CLIP's = 1", fontsize=9, color="0.4")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pages(folder: Path = FOLDER) -> dict[Path, str]:
    """The text of each page."""
    page = Page(folder)
    front, back = TEXT.read_text().split("\n<!-- tables -->\n\n")
    return {
        FOLDER.with_suffix(".md"): page.fill(front),
        FOLDER / "tables.md": page.fill(back),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for path, text in pages().items():
        path.write_text(text)
    draw(Page(), FOLDER / "comparison.png")


if __name__ == "__main__":
    main()
