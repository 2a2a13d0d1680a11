"""The benchmark of large batches: are its exact values those of its batch, does its line tell the
progress, and does a row hold what was measured?"""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scale  # noqa: E402

from ito_kernels.similarity.native import MISSING  # noqa: E402

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def test_exact_values_of_repeated_pairs(monkeypatch):
    monkeypatch.setattr(scale, "DISTINCT", 6)
    x, truth = scale.repeated_pairs(24, 5)
    a, b, log_scale = (leaf.detach().double().requires_grad_() for leaf in x[:3])
    scores, own = log_scale.exp() * a @ b.T, torch.arange(24)
    loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
    dense = (loss.detach(), *torch.autograd.grad(loss, (a, b, log_scale)))
    torch.testing.assert_close(truth, dense, rtol=1e-10, atol=1e-14)


def test_the_line_tells_the_progress(monkeypatch, capsys):
    done, printed = 500, ""
    monkeypatch.setattr(scale, "_native", SimpleNamespace(gemm_flops=lambda: done))
    with scale.progress("N = 8", 1000):
        done += 250
        until = time.monotonic() + 10
        while "N = 8:  25 % of the products" not in printed and time.monotonic() < until:
            time.sleep(0.05)
            printed += capsys.readouterr().err
        done += 750
    printed += capsys.readouterr().err
    assert "N = 8:  25 % of the products" in printed
    assert "N = 8: 100 % of the products" in printed


def test_command_line(tmp_path):
    n, out = 2048, tmp_path / "rows.jsonl"
    command = [
        *(sys.executable, str(BENCHMARKS / "scale.py"), "--dim", "16", "--batch", str(n)),
        *("--threads", "1", "--out", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "N = 2,048, D = 16: 100 % of the products" in done.stderr
    row = json.loads(out.read_text())
    assert (row["n"], row["d"], row["threads"]) == (n, 16, 1)
    assert row["products"] == 3  # all scores are kept
    assert row["extra_bytes"] is None or 4 * n * n < row["extra_bytes"] < row["bound_bytes"]
    assert all(0 <= error < 2e-6 for error in row["error"].values()), row
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_bad_size_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--batch", "1000"])
    with pytest.raises(SystemExit, match="2"):
        scale.parse_args()
    assert "argument --batch: must be a multiple of 1024, got 1000" in capsys.readouterr().err
