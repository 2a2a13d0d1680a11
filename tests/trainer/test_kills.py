"""Training that is killed (SIGKILL) and resumed: the numbers, weights and files of a run that was
not, and after each kill every checkpoint and the exported model can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def killed(data, out, kind: str, how: str, count: int, seed: int = 0) -> dict:
    out.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    words = [sys.executable, "-m", "support.kills", str(data), str(out), kind, how]
    ended = subprocess.run(
        [*words, str(count), str(seed)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_three_kills_change_nothing(data, tmp_path):
    assert killed(data, tmp_path / "runs", "memory", "random", 3)["kills"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_kills_change_nothing(data, tmp_path, seed):
    """Fifty in all."""
    assert killed(data, tmp_path / "runs", "memory", "random", 10, seed)["kills"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 8))
def test_kills_of_a_streamed_run_change_nothing(data, tmp_path, seed):
    assert killed(data, tmp_path / "runs", "stream", "random", 10, seed)["kills"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 11))
def test_kills_in_the_middle_of_saving_change_nothing(data, tmp_path, seed):
    """Before a call that makes a written file whole, or that gives it its name."""
    assert killed(data, tmp_path / "runs", "memory", "saving", 14, seed)["kills"] == 14
