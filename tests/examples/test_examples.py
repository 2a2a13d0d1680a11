"""Every script in examples/ runs and shows what it claims: one that does not ends with an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_run import QUICK, write_set

from ito import train

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(example, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    no_emoji = {"PYTHONPATH": path, "ITO_CACHE": str(tmp_path)}  # the same run on every machine
    out = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env=os.environ | no_emoji,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip(), "an example prints what it shows"


def test_the_trainer_takes_the_example_of_an_own_objective(tmp_path):
    data = write_set(tmp_path / "data", items=20)
    objective = f"{ROOT / 'examples' / 'own_objective.py'}:focal"
    options = ["--train-data", str(data), "--out", str(tmp_path / "run"), *QUICK]
    train.main([*options, "--objective", objective])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [line for line in lines if "i2t" in line]
    assert len(steps) == 6
    for step in steps:
        assert step["loss"] == pytest.approx((step["i2t"] + step["t2i"]) / 2, rel=1e-6)
