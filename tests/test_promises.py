"""Are the figures of docs/promises.md and docs/faults.md those of the files? Are the tests that
docs/promises.md names there?"""

import re

import pytest
from support import figures


def test_every_planted_fault_has_a_result():
    assert figures.planted().keys() == figures.results().keys()
    assert all(figures.results().values()), "python tests/faults.py --record"
    text = figures.FAULTS.read_text(encoding="utf-8")
    for name, file in figures.planted().items():
        cell = name.replace("|", "\\|")
        assert f"| {cell} | `{file}` | " in text


def test_the_faults_that_are_not_caught_are_few_and_have_a_reason():
    outcomes = figures.results()
    missed = [name for name, outcome in outcomes.items() if not outcome.startswith("caught")]
    introduction = figures.FAULTS.read_text(encoding="utf-8").split("| fault |")[0]
    assert all(f"- {name}: " in introduction for name in missed)
    assert len(outcomes) >= 200
    assert len(missed) <= 0.05 * len(outcomes)


def test_the_text_that_a_fault_replaces_is_there_once():
    found = figures.tomllib.loads((figures.ROOT / "tests" / "faults.toml").read_text("utf-8"))
    for file, faults in found.items():
        text = (figures.ROOT / file).read_text(encoding="utf-8")
        for name, (old, *_) in faults.items():
            assert text.count(old) == 1, (file, name)


def test_the_figures_are_those_of_the_files():
    """`PYTHONPATH=tests python tests/support/figures.py` writes them."""
    assert figures.caught() in figures.FAULTS.read_text(encoding="utf-8")
    assert figures.table() in figures.PROMISES.read_text(encoding="utf-8")


def named() -> list[tuple[str, tuple[str, ...]]]:
    """The words of each row's tests, and the files that it names before them."""
    found, files = [], ()
    for line in figures.PROMISES.read_text(encoding="utf-8").splitlines():
        if " | " not in line:
            continue
        for part in line.split(" | ")[1].split(";"):
            files = tuple(re.findall(r"`(test_\w+\.py)`", part)) or files
            found += [(word, files) for word in re.findall(r"`(\w+)`", part)]
    return found


@pytest.mark.parametrize("word", named(), ids=lambda x: f"{x[0]}-{x[1][0]}")
def test_a_test_that_is_named_is_there(word):
    word, files = word
    texts = [next(figures.ROOT.glob(f"tests/*/{x}")).read_text(encoding="utf-8") for x in files]
    assert any(re.search(rf'def test_\w*{word}|"{word}"', text) for text in texts)
