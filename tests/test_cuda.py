"""The CUDA backend: what it says where it cannot run, that it builds, and, `pytest -m gpu`, that it
computes on a GPU what it computes on the emulator."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_primitive
import torch
from problems import CASES, Case, gradients, leaves, make, run

import ito_kernels
from ito_kernels import clip_loss, siglip_loss
from ito_kernels.similarity import cuda
from ito_kernels.similarity.spec import Problem

ROOT = Path(__file__).parent.parent


# ---- anywhere


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
    problem = SimpleNamespace(a=there, row_limit=None, n=2**30, m=1)
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
        "panel": cuda.Panel(
            scores, cuda.Split(1, 1, 1, 1, False), 0, 1, 0, 1, None, x, 64, *nothing
        ),
        "gradient": cuda.Gradient(scores._replace(arithmetic=0), None, x, 2, None, None),
    }
    for kernel, struct in calls.items():
        name = {"forward": "logsumexp"}.get(kernel, kernel)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^{name}_kernel: .*(driver|device)"):
                getattr(cuda._native.cuda, kernel)(tuple(cuda.numbers(struct)), 0, 12345)
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


# ---- on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """The shared problem set on the GPU: its tensors are made on the CPU and moved."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if reason := cuda.CUDA.missing():
        pytest.skip(reason)
    draw = test_primitive.weights

    def moved(case, dtype, seed=0):
        with torch.device("cpu"):
            t = make(case, dtype, seed)
        t = {k: None if v is None else v.cuda() for k, v in t.items()}
        if case.same:
            t["b"], t["col_ids"] = t["a"], t["row_ids"]
        return t

    def weights(case, truth):
        with torch.device("cpu"):
            drawn = draw(case, {k: v.cpu() for k, v in truth.items()})
        return {k: v.cuda() for k, v in drawn.items()}

    monkeypatch.setattr(test_primitive, "make", moved)
    monkeypatch.setattr(test_primitive, "weights", weights)
    with torch.device("cuda"):
        yield moved


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, Case(3000, 5000, 768, positives="linear")], ids=str)
def test_problem_set(case, dtype, gpu):
    test_primitive.test_logsumexp("cuda", case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_emulator(case, dtype, gpu):
    """The same kernels: what differs is the order inside one matrix instruction, and exp2."""
    t = gpu(case, dtype)
    here = {k: None if v is None else v.cpu() for k, v in t.items()}
    if case.same:
        here["b"], here["col_ids"] = here["a"], here["row_ids"]
    for x, y in zip(run(case, t, "cuda"), run(case, here, "simt"), strict=True):
        if y is not None:
            close = {"rtol": 1e-5, "atol": 1e-5 * (1 + case.scale)}
            torch.testing.assert_close(x.cpu(), y, equal_nan=True, **close)


@pytest.mark.gpu
def test_same_bits_every_time(gpu):
    a, b = (torch.randn(3000, 512, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    results = []
    for _ in range(5):
        loss = clip_loss(a, b, 0.1, backend="cuda")
        results.append([loss, *torch.autograd.grad(loss, (a, b))])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [clip_loss, lambda *args, **kw: siglip_loss(*args, -10.0, **kw)])
@pytest.mark.parametrize("d", [64, 512])
def test_cuda_graph(loss, d, gpu):
    """Forward and backward are captured: on the caller's stream, and nothing waits."""
    a, b = (torch.randn(2048, d, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.1)

    def step():
        return torch.autograd.grad(loss(a, b, scale, backend="cuda"), (a, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        a.copy_(torch.randn_like(a))
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(gpu):
    case = Case(1000, 1500, 256, ids="groups", positives="linear")
    t = leaves(gpu(case, torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = run(case, t, "cuda")
        gradients((stats.row_logsum - stats.row_pos).sum(), t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
