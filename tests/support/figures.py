"""The figures of docs/promises.md and docs/faults.md, counted in the files that they are about.

    PYTHONPATH=tests python tests/support/figures.py     writes them into the pages

tests/test_promises.py compares. A test function counts once, however many cases it has.
"""

import re
from pathlib import Path

import tomllib

from support.infonce_options import OPTIONS, REFUSED
from support.losses_table import ROWS

ROOT = Path(__file__).resolve().parents[2]
PROMISES, FAULTS = ROOT / "docs" / "promises.md", ROOT / "docs" / "faults.md"
FOLDERS = ("kernels", "losses", "properties", "distributed")
FOLDERS += ("trainer", "examples", "benchmarks", "docs")


def planted() -> dict[str, str]:
    """{fault: its file}, as tests/faults.toml has them."""
    found = tomllib.loads((ROOT / "tests" / "faults.toml").read_text(encoding="utf-8"))
    return {name: file for file, here in found.items() for name in here}


def results() -> dict[str, str]:
    """{fault: what became of it}, as the table of docs/faults.md has them."""
    found = {}
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] != "fault":
            found[cells[0].replace("\\|", "|")] = cells[2]
    return found


def caught() -> str:
    """How many faults are caught, as docs/faults.md says it."""
    outcomes = [*results().values()]
    number = sum(x.startswith("caught") for x in outcomes)
    return f"**{number} of {len(outcomes)} faults are caught ({number / len(outcomes):.1%}).**"


def sources(folder: str) -> str:
    paths = sorted((ROOT / "tests" / folder).glob("test_*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def table() -> str:
    """The table "In figures" of docs/promises.md."""
    tests = {x: len(re.findall(r"^def test_\w+", sources(x), re.MULTILINE)) for x in FOLDERS}
    laws = len(re.findall(r"^@examples\(", sources("properties"), re.MULTILINE))
    on_ranks = sources("properties").split("\nLAWS = {")[1].split("\n}")[0].count("\n")
    calls = sum(map(len, ROWS.values()))
    rows = {
        **{f"tests in `tests/{folder}/`": n for folder, n in tests.items()},
        "laws of the losses with random examples, `tests/properties/`": laws,
        "laws of a batch on several ranks": on_ranks,
        "losses, and their calls with options, that are compared on every backend": (
            f"{len(ROWS)}, {calls}"
        ),
        "options of `multi_positive_infonce` and their values, combined in pairs": (
            f"{len(OPTIONS)}, {sum(map(len, OPTIONS.values()))}"
        ),
        "combinations that are refused by name": len(REFUSED),
        "planted faults, and those that a test catches": (
            f"{len(results())}, {sum(x.startswith('caught') for x in results().values())}"
        ),
    }
    lines = [f"| {what} | {number} |" for what, number in rows.items()]
    return "\n".join(["| what | count |", "|---|---|", *lines]) + "\n"


def main() -> None:
    text = FAULTS.read_text(encoding="utf-8")
    text = re.sub(r"^\*\*\d+ of .*", lambda _: caught(), text, flags=re.MULTILINE)
    FAULTS.write_text(text, encoding="utf-8")
    before, after = PROMISES.read_text(encoding="utf-8").split("## In figures\n\n")
    after = after.partition("\n\n")[2]
    PROMISES.write_text(f"{before}## In figures\n\n{table()}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
