"""The CUDA backend off a GPU: what it says where it cannot run, and how it is built. On one it is
tested by test_gpu.py."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ito_kernels
from ito_kernels import clip_loss
from ito_kernels.similarity import cuda
from ito_kernels.similarity.spec import Problem

ROOT = Path(__file__).parent.parent


def test_the_reason_is_told():
    problem = Problem(torch.randn(4, 8), None, torch.tensor(1.0))
    ok, reason = cuda.CUDA.supports(problem)
    assert not ok
    if not hasattr(cuda._native, "cuda"):
        assert reason in ("built without nvcc", cuda.CUDA.missing())
    elif not torch.cuda.is_available():
        assert reason == ito_kernels.backends()["cuda"].detail
        assert reason == "no CUDA driver" or "CUDA" in reason
    else:
        assert reason == "needs cuda tensors, got cpu"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: " + re.escape(reason)):
        clip_loss(torch.randn(4, 8), torch.randn(4, 8), 1.0, backend="cuda")


@pytest.mark.parametrize(
    ("present", "driver", "expected"),
    [
        (False, "", "built without nvcc"),
        (True, "no CUDA driver", "no CUDA driver"),
    ],
)
def test_reasons(present, driver, expected, monkeypatch):
    class Native:
        pass

    if present:
        Native.cuda = Native()
        Native.cuda.unavailable = lambda: driver
    monkeypatch.setattr(cuda, "_native", Native)
    assert cuda.CUDA.status() == (False, expected)
    assert cuda.CUDA.supports(Problem(torch.ones(1, 1), None, torch.tensor(1.0)))[1] == expected


def test_what_a_gpu_must_be(monkeypatch):
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(cuda=SimpleNamespace(TILE=128)))
    gpu = SimpleNamespace(name="T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    there = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    problem = SimpleNamespace(a=there, n=2**30, m=1)
    assert cuda.CUDA.supports(problem) == (False, "needs compute capability 8.0, T4 has 7.5")
    gpu.major = 8
    assert cuda.CUDA.supports(problem)[0]
    problem.n += 1
    assert "more than 2^30 rows" in cuda.CUDA.supports(problem)[1]


@pytest.mark.skipif(not hasattr(cuda._native, "cuda"), reason="built without nvcc")
def test_a_launch_that_fails_names_its_kernel():
    """The arguments are right but for the stream's device, which does not exist."""
    x = torch.zeros(5, 1, 8)
    problem = Problem(x[0, :, :4], None, torch.tensor(1.0))
    scores = cuda.Scores.of(problem, cuda.Operands.of(problem))
    split, nothing = cuda.Split(1, 1, 1, 1, False), (None,) * 3
    calls = {
        "merge": cuda.Merge(x, 8, 1, 0, x, x, None, None),
        "forward": cuda.Forward(scores, split, x, None),
        "panel": cuda.Panel(scores, split, 0, 1, 0, 1, None, x, 64, *nothing),
        "gradient": cuda.Gradient(scores._replace(arithmetic=0), None, x, 2, None, None),
    }
    for kernel, struct in calls.items():
        name = {"forward": "logsumexp"}.get(kernel, kernel)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^{name}_kernel: .*(driver|device)"):
                getattr(cuda._native.cuda, kernel)(cuda.numbers(struct), 0, 12345)
        with pytest.raises(ValueError, match="too few fields"):
            getattr(cuda._native.cuda, kernel)((0,), 0, 12345)
        with pytest.raises(ValueError, match="too many fields"):
            getattr(cuda._native.cuda, kernel)((*cuda.numbers(struct), 0), 0, 12345)


def options(**environment) -> subprocess.CompletedProcess:
    """What setup.py would tell CMake."""
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup;"
    code += "print(*setup.cuda_options())"
    env = {k: v for k, v in os.environ.items() if not k.startswith("ITO_") and k != "CUDACXX"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True)


def test_build_options(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    there, absent = {"CUDACXX": str(compiler)}, {"CUDACXX": str(tmp_path / "none")}
    out = options(**there).stdout
    assert "-DITO_CUDA=ON" in out
    assert f"-DCMAKE_CUDA_COMPILER={compiler}" in out
    assert "-DCMAKE_CUDA_ARCHITECTURES=80\n" in out
    for archs, expected in (("90a", "=90a\n"), ("all", "=80-real;86-real;89-real;90-real;")):
        assert "ARCHITECTURES" + expected in options(**there, ITO_CUDA_ARCHS=archs).stdout
    assert options(**there, ITO_BUILD_CUDA="0").stdout == "-DITO_CUDA=OFF\n"
    assert options(**absent).stdout == "-DITO_CUDA=OFF\n"
    assert "there is no nvcc" in options(**absent, ITO_BUILD_CUDA="1").stderr
    assert "must be auto, 0 or 1, got 'yes'" in options(**there, ITO_BUILD_CUDA="yes").stderr
