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
    LONGER,
    SATURATION,
    SEEDS,
    STYLES,
    TRIALS,
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
FIRST = (*ARMS, *CONTROLS, MODULE)


class Page:
    """The functions that the text calls, by name."""

    def __init__(self, folder: Path = FOLDER):
        self.evidence = Evidence(folder)
        self.seconds = json.loads((folder / "step_seconds.json").read_text())
        estimates = {
            (a, b, kind): self.evidence.estimate(a, prefix, b)
            for a, b in COMPARISONS
            for kind, prefix in KINDS.items()
        }
        self.family = {key: x for key, x in estimates.items() if x and x.seeds > 1}
        # tested once all seeds are there, not as they come; until then it counts in Holm's number
        tested = {key for key, x in self.family.items() if x.seeds == len(SEEDS)}
        p = [self.family[key].p if key in tested else 1.0 for key in estimates]
        self.adjusted = dict(zip(estimates, holm(p), strict=True))
        self.tests = tested

    def fill(self, text: str) -> str:
        def value(match: re.Match) -> str:
            name, *arguments = (" ".join(part.split()) for part in match[1].split("|"))
            return getattr(self, name)(*arguments)

        return wrapped(re.sub(r"\{([^{}]+)\}", value, text))

    # ---- in the text

    def headline(self) -> str:
        """Who finds most of the seen concepts, at equal steps and at equal time, and what fusion
        adds."""
        means = {arm: x.value for arm in ARMS if (x := self.evidence.estimate(arm, KINDS["seen"]))}
        best = max(means, key=means.get)
        first = (
            "ITO finds most"
            if best == "ito"
            else f"The method does not win here: {best} finds most"
        )
        others = ", ".join(f"{arm} {means[arm]:.1f}" for arm in ("ito", "clip") if arm != best)
        in_time = {"ito": means["ito"]}
        for name in self.evidence.runs:
            if name.endswith(", ITO's time"):
                in_time[name.split(",")[0]] = self.evidence.estimate(name, KINDS["seen"]).value
        fastest = max(in_time, key=in_time.get)
        found = self.evidence.estimate("ito", KINDS["seen"], "ito-align")
        p = self.adjusted["ito", "ito-align", "seen"]
        effect = "that fusion helps is not shown"
        if p < 0.05:
            effect = "fusion helps" if found.value > 0 else "fusion harms"
        seeds = "" if found.seeds == len(SEEDS) else f"; {found.seeds} of 5 seeds so far"
        return (
            f"{first} drawings of seen concepts at equal steps ({means[best]:.1f} %; {others}), "
            f"{fastest} of those that were given the time that ITO takes "
            f"({in_time[fastest]:.1f}), and {effect} "
            f"({signed(found)} points over ITO without it at equal steps, p = {p:.2f} after Holm's "
            f"correction{seeds})."
        )

    def line(self, a: str, b: str) -> str:
        """R@1 of a less that of b, on seen and unseen concepts; * where p of Holm is below 0.05."""
        if (a, b, "seen") not in self.family:
            return "not run yet."
        parts = []
        for kind in KINDS:
            star = r"\*" if self.adjusted[a, b, kind] < 0.05 else ""
            parts.append(f"{signed(self.family[a, b, kind])}{star} on {kind}")
        count = self.family[a, b, "seen"].seeds
        return ", ".join(parts) + ("." if count == len(SEEDS) else f" ({count} seeds).")

    def of(self, name: str, part: str, score: str) -> str:
        """The mean over seeds of a score of the geometry, on test or train, and half of its 95 %
        interval."""
        values = [x[part][score] for x in self.evidence.runs[name].values()]
        mean, count = form(score, statistics.mean(values)), len(values)
        if count == 1:
            return f"{mean} (one seed)"
        half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
        return f"{mean} ± {form(score, half)}"

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
        seeds = " (one seed)" * (len(runs) == 1)
        return (
            f"{first} % at step {steps[0]:,}, {last} at step {steps[-1]:,}, {most} at most{seeds}"
        )

    def longer(self) -> str:
        """R@1 on seen concepts after four times the steps, the highest first, and ITO's difference
        to the highest of the others."""
        names = {arm: name for name, (arm, _) in LONGER.items()}
        found = {arm: self.evidence.estimate(name, KINDS["seen"]) for arm, name in names.items()}
        if None in found.values():
            return "not run yet."
        order = sorted(found, key=lambda arm: -found[arm].value)
        other = next(arm for arm in order if arm != "ito")
        less = self.evidence.estimate(names["ito"], KINDS["seen"], names[other])
        means = ", ".join(f"{arm} {found[arm].value:.1f}" for arm in order)
        seeds = seeds_of(self.evidence.runs[names["ito"]])
        return f"{means}{seeds}; ito − {other} {signed(less)}."

    def cost(self, name: str) -> float | None:
        """The time of all steps, relative to CLIP's in the main comparison; None for a batch of
        which no step was timed."""
        line = next(iter(self.evidence.runs[name].values()))
        given, arm = line["settings"], line["arm"]
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
        """The planned families of which runs are missing, with what there is of each."""
        done = {line["key"] for line in self.evidence.tuning}
        done |= {line["key"] for runs in self.evidence.runs.values() for line in runs.values()}
        planned: dict[str, list[bool]] = {}
        for run in (run for part in plan() for run in part):
            planned.setdefault(run.family, []).append(run.key in done)
        parts = [f"{name} ({sum(x)} of {len(x)})" for name, x in planned.items() if not all(x)]
        return ", ".join(parts) or "nothing"

    # ---- tables

    def first_table(self) -> str:
        header = ["R@1, %", "time"]
        for kind in KINDS:
            header += [f"{kind}, {style}" for style in ("Twemoji", "OpenMoji")]
            header += [f"**{kind}**"]
        lines = []
        for name in FIRST:
            if name not in self.evidence.runs:
                continue
            runs = self.evidence.runs[name].values()
            cost = self.cost(name)
            line = [name + seeds_of(runs), f"{cost:.2f}" if cost else ""]
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
        lines = []
        for (a, b, kind), found in self.family.items():
            p = ["", ""]
            if (a, b, kind) in self.tests:
                p = [probability(x) for x in (found.p, self.adjusted[a, b, kind])]
            lines.append([f"{a} − {b}", kind, signed(found), *p, str(found.seeds)])
        return table(["difference", "concepts", "R@1 [95 %]", "p", "p, Holm", "seeds"], lines)

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
        for name in ("ito-align", "ito", MODULE, *GAP):
            runs = self.evidence.runs.get(name, {}).values()
            if runs:
                scale = statistics.mean(x["scale"] for x in runs)
                cells = [form(key, self.geometry(name, part, key)) for key in scores]
                lines.append([name + seeds_of(runs), f"{scale:.0f}", *cells])
        return table(["", "scale", *scores.values()], lines)

    def fusion_table(self) -> str:
        lines = []
        for name in ("ito-align", "ito", *FUSION):
            runs = self.evidence.runs.get(name, {}).values()
            if not runs:
                continue
            line = [name + seeds_of(runs)]
            for prefix in KINDS.values():
                found = self.evidence.estimate(name, prefix)
                more = None if name == "ito" else self.evidence.estimate(name, prefix, "ito")
                line += [f"{found.value:.1f}", signed(more) if more else ""]
            fused = name != "ito-align"
            line += [self.fusion(name, x) if fused else "" for x in ("first", "last")]
            line += [form("gap", self.geometry(name, "test", "gap"))]
            lines.append(line)
        header = ["", "seen", "− ito [95 %]", "unseen", "− ito [95 %]"]
        header += ["fusion loss, first", "last", "gap"]
        return table(header, lines)

    def longer_table(self) -> str:
        """The arms after the steps of the first table and after four times as many."""
        own = next(name for name, (arm, _) in LONGER.items() if arm == "ito")
        lines = []
        for name, (arm, _) in LONGER.items():
            runs = self.evidence.runs.get(name, {}).values()
            if not runs:
                continue
            line = [arm + seeds_of(runs), f"{self.cost(name):.2f}"]
            for prefix in KINDS.values():
                short, long = (self.evidence.estimate(x, prefix) for x in (arm, name))
                line += [f"{x.value:.1f} ± {x.half:.1f}" for x in (short, long)]
                less = self.evidence.estimate(own, prefix, name) if name != own else None
                line.append(signed(less) if less else "")
            lines.append(line)
        header = ["", "time"]
        for kind in KINDS:
            header += [f"{kind}, {WORKLOAD['steps']} steps", "2,400 steps", "ito − it [95 %]"]
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
        if block[0] not in "|#!`":
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


def seeds_of(runs) -> str:
    """Said of a row that has fewer seeds than planned."""
    return "" if len(runs) == len(SEEDS) else f" ({len(runs)} seed{'s' * (len(runs) > 1)})"


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---- the figure


def draw(page: Page, path: Path) -> None:
    """R@1 against the time of training, with intervals, on seen and on unseen concepts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in FIRST if name in page.evidence.runs and page.cost(name)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (kind, prefix) in zip(axes, KINDS.items(), strict=True):
        for name in names:
            found = page.evidence.estimate(name, prefix)
            colour = f"C{list(ARMS).index(name)}" if name in ARMS else "0.45"
            marker = "o" if name in ARMS else "D"
            # side by side where the time is the same
            cost, before = page.cost(name), names[: names.index(name)]
            x = cost + 0.06 * sum(abs(cost - page.cost(other)) < 0.07 for other in before)
            axis.errorbar(x, found.value, found.half, fmt=marker, color=colour, capsize=3, ms=5)
            axis.annotate(name, (x, found.value), (5, 3), textcoords="offset points", fontsize=7)
        axis.set(title=f"{kind} concepts", xlabel="time of training, CLIP's = 1", ylabel="R@1, %")
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
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
