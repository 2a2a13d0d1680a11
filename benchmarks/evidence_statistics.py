"""Differences between runs with their intervals, from the hits that `evidence.py` keeps.

The standard error is that of a hierarchical bootstrap: seeds and families of concepts are drawn
with replacement, the same for both sides of a difference (Owen 2007, "The pigeonhole bootstrap": it
errs on the safe side, as what is neither of the seed nor of the family counts up to three times).
Five seeds vary less in such draws than five new ones would, so their weights are spread by
√(S / (S − 1)), and the interval is Student's t with the degrees of freedom of Satterthwaite (1946):
4 if seeds decide, many if items do.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

DRAWS = 20_000  # with 2,000, p-values near 0.05 vary by 0.01


def t_angles(df: float) -> tuple[np.ndarray, np.ndarray]:
    """tan θ · √df is Student's t if θ in (0, π/2) has density cos(θ)^(df − 1): θ, and its share."""
    angle = np.linspace(0, np.pi / 2, 4001)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angle, area / area[-1]


def t_quantile(df: float, share: float = 0.95) -> float:
    """Student's |t| is below it in this share of cases."""
    angle, area = t_angles(df)
    return math.sqrt(df) * math.tan(np.interp(share, area, angle))


def t_p(t: float, df: float) -> float:
    """The two-sided p-value."""
    angle, area = t_angles(df)
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(df)), angle, area))


def holm(p: list[float]) -> list[float]:
    """Holm's (1979) adjusted p-values."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, n in enumerate(sorted(range(len(p)), key=lambda n: p[n])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[n]))
        adjusted[n] = highest
    return adjusted


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, half of its 95 % interval, and the p-value of its being 0."""

    value: float
    half: float
    p: float
    seeds: int


class Evidence:
    """The finished runs of a folder; percentages."""

    def __init__(self, folder: Path):
        lines = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
        self.queries = json.loads((folder / "queries.json").read_text())
        self.tuning: list[dict] = []
        self.runs: dict[str, dict[int, dict]] = {}
        for line in lines:
            if line["family"] == "tuning":
                self.tuning.append(line)
            else:
                self.runs.setdefault(line["name"], {})[line["seed"]] = line

    def hits(self, line: dict) -> dict[str, np.ndarray]:
        """0 or 1 for each query, by gallery and direction."""
        families = self.queries["val" if line["family"] == "tuning" else "test"]
        return {
            name: np.array([*f"{int(bits, 16):0{len(families[name])}b}"], dtype=float)
            for name, bits in line["hits"].items()
        }

    def recall(self, line: dict, gallery: str) -> float:
        """The mean R@1 over the galleries and directions whose name begins so."""
        own = [hit.mean() for name, hit in self.hits(line).items() if name.startswith(gallery)]
        return 100 * float(np.mean(own))

    @cached_property
    def drawn(self) -> dict[tuple[str, int, str], np.ndarray]:
        """R@1 of each run, by name, seed and kind, with each draw of the families, (1 + DRAWS,);
        the first is of the families as they are, and each draw is the same for all runs."""
        keys = [(name, seed) for name, runs in self.runs.items() for seed in runs]
        hits = [self.hits(self.runs[name][seed]) for name, seed in keys]
        random, found = np.random.default_rng(0), {}
        for kind in ("seen/", "unseen/"):
            galleries = {n: x for n, x in self.queries["test"].items() if n.startswith(kind)}
            families = sorted(set().union(*galleries.values()))
            count = len(families)
            times = random.multinomial(count, [1 / count] * count, DRAWS)
            times = np.vstack([np.ones(count), times])
            shares = 0
            for gallery, own in galleries.items():
                of_family = np.searchsorted(families, own)[:, None] == np.arange(count)
                right = np.array([hit[gallery] for hit in hits]) @ of_family
                shares = shares + (times @ right.T) / (times @ of_family.sum(0))[:, None]
            means = 100 * shares / len(galleries)
            found |= {(*key, kind): means[:, n] for n, key in enumerate(keys)}
        return found

    def estimate(self, name: str, kind: str, less: str | None = None) -> Estimate | None:
        """R@1 of `name`, or what it is more than `less`, on the seeds that both have."""
        sides = [self.runs.get(x, {}) for x in ((name,) if less is None else (name, less))]
        seeds = sorted(set.intersection(*map(set, sides)))
        if not seeds:
            return None
        drawn = np.array([self.drawn[name, seed, kind] for seed in seeds])
        if less is not None:
            drawn = drawn - [self.drawn[less, seed, kind] for seed in seeds]
        return self.interval(drawn, kind)

    def interval(self, drawn: np.ndarray, kind: str) -> Estimate:
        """Of (seeds, 1 + DRAWS). One seed says nothing about others: its interval is of items."""
        count = len(drawn)
        weights = np.full((DRAWS, count), 1 / count)
        if count > 1:
            random = np.random.default_rng(1)
            times = random.multinomial(count, weights[0], DRAWS) / count
            weights = weights + math.sqrt(count / (count - 1)) * (times - weights)
        total = (weights * drawn[:, 1:].T).sum(1).var()
        of_seeds = (weights @ drawn[:, 0]).var()
        galleries = [x for n, x in self.queries["test"].items() if n.startswith(kind)]
        families = len(set().union(*galleries))
        parts = max(total - of_seeds, 0) ** 2 / (families - 1)
        parts += of_seeds**2 / (count - 1) if count > 1 else 0
        df = total**2 / parts if parts else math.inf
        df = min(max(df, 1), families - 1)
        value, error = float(drawn[:, 0].mean()), math.sqrt(total)
        p = t_p(value / error, df) if error else 1.0
        return Estimate(value, t_quantile(df) * error, p, count)
