"""Combinations of options: valid ones that hold every valid pair of values, and random ones.

options: {name: its values}. refused: partial combinations that are not valid, {name: value or tuple
of values}; all others are.
"""

from __future__ import annotations

from itertools import combinations
from operator import itemgetter
from random import Random

Options = dict[str, tuple]
Combination = dict[str, object]


class Refused:
    """The partial combinations that are not valid, by the options that they name."""

    def __init__(self, options: Options, refused: list[dict]):
        self.options = options
        entries = [
            {name: v if isinstance(v, tuple) else (v,) for name, v in entry.items()}
            for entry in refused
        ]
        self.by_name = {name: [e for e in entries if name in e] for name in options}

    def allows(self, chosen: Combination, name: str, value: object) -> bool:
        """Whether `name` = `value` beside what is chosen completes no refused combination."""
        with_value = chosen | {name: value}
        return not any(
            all(with_value.get(n, missing) in values for n, values in entry.items())
            for entry in self.by_name[name]
        )

    def completed(self, chosen: Combination, prefer, random: Random) -> Combination | None:
        """A valid combination of all options that has `chosen`; None if there is none.

        The option with the fewest values left is chosen first. prefer: a score of (name, value)
        beside what is chosen, of which the largest comes first.
        """
        if not all(self.allows(chosen, name, value) for name, value in chosen.items()):
            return None
        open_names = [name for name in self.options if name not in chosen]
        if not open_names:
            return chosen
        left = {
            name: [v for v in self.options[name] if self.allows(chosen, name, v)]
            for name in open_names
        }
        fewest = min(map(len, left.values()))
        name = random.choice([name for name, values in left.items() if len(values) == fewest])
        values = random.sample(left[name], len(left[name]))
        for value in sorted(values, key=lambda v: -prefer(chosen, name, v)):
            found = self.completed(chosen | {name: value}, prefer, random)
            if found is not None:
                return found
        return None


missing = object()  # equals no value


def pairs_of(combination: Combination) -> set[tuple]:
    """All pairs of (name, value), in the order of the names."""
    return {*combinations(sorted(combination.items(), key=itemgetter(0)), 2)}


def all_pairs(options: Options) -> list[tuple]:
    """Every pair of values of two options, as in `pairs_of`."""
    values = sorted(((name, v) for name, vs in options.items() for v in vs), key=itemgetter(0))
    return [pair for pair in combinations(values, 2) if pair[0][0] != pair[1][0]]


def pairwise(options: Options, refused: list[dict]) -> tuple[list[Combination], list[tuple]]:
    """Valid combinations that together hold every pair of values that any valid one can hold, and
    the pairs that none can."""
    rules, random = Refused(options, refused), Random(0)
    pairs = all_pairs(options)
    random.shuffle(pairs)
    uncovered, found, impossible = set(pairs), [], []

    def new_pairs(chosen: Combination, name: str, value: object) -> int:
        new = (name, value)
        beside = (
            (min(x, new, key=itemgetter(0)), max(x, new, key=itemgetter(0))) for x in chosen.items()
        )
        return sum(pair in uncovered for pair in beside)

    for pair in pairs:
        if pair not in uncovered:
            continue
        combination = rules.completed(dict(pair), new_pairs, random)
        if combination is None:
            impossible.append(pair)
            continue
        found.append(combination)
        uncovered -= pairs_of(combination)
    return found, impossible


def random_combination(options: Options, refused: list[dict], random: Random) -> Combination:
    found = Refused(options, refused).completed({}, lambda *_: 0, random)
    assert found is not None
    return found
