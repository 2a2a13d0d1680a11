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
from ito_kernels.similarity.spec import Problem, SideStats

ROOT = Path(__file__).parents[2]
NOT_BUILT = "built without the CUDA kernels: ITO_BUILD_CUDA=1 and nvcc build them"


def test_the_reason_is_told():
    problem = Problem(torch.randn(4, 8), None, torch.tensor(1.0))
    ok, reason = cuda.CUDA.supports(problem)
    assert not ok
    if not hasattr(cuda._native, "cuda"):
        assert reason in (NOT_BUILT, cuda.CUDA.missing())
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
        (False, "", NOT_BUILT),
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


@pytest.mark.skipif(not hasattr(cuda._native, "cuda"), reason=NOT_BUILT)
def test_a_launch_that_fails_names_its_kernel():
    """The arguments are right but for the stream's device, which does not exist."""
    x = torch.zeros(5, 1, 8)
    problem = Problem(x[0, :, :4], None, torch.tensor(1.0))
    scores = cuda.Scores.of(problem, cuda.Operands.of(problem))
    split, nothing = cuda.Split(1, 1, 1, 1, False), (None,) * 3
    calls = {
        "merge": cuda.Merge(x, 8, 1, 0, False, None, x, SideStats(x, x), x),
        "forward": cuda.Forward(scores, split, x, None),
        "fallback": cuda.Fallback(scores, x, x, SideStats(x, x)),
        "panel": cuda.Panel(scores, split, 0, 1, 0, 1, x, 64, *nothing),
        "gradient": cuda.Gradient(scores._replace(arithmetic=0), x, 2, None, None),
    }
    for kernel, struct in calls.items():
        name = {"forward": "logsumexp"}.get(kernel, kernel)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^{name}_kernel: .*(driver|device)"):
                getattr(cuda._native.cuda, kernel)(cuda.flatten(struct), 0, 12345)
        with pytest.raises(ValueError, match="too few fields"):
            getattr(cuda._native.cuda, kernel)((0,), 0, 12345)
        with pytest.raises(ValueError, match="too many fields"):
            getattr(cuda._native.cuda, kernel)((*cuda.flatten(struct), 0), 0, 12345)


def in_setup(code: str, **environment) -> subprocess.CompletedProcess:
    """Of setup.py, without building."""
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; " + code
    env = {k: v for k, v in os.environ.items() if not k.startswith("ITO_") and k != "CUDACXX"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True)


def options(**environment) -> subprocess.CompletedProcess:
    """What setup.py would tell CMake and, on a line of its own, the user."""
    code = "options, decision = setup.cuda_options(); print(*options); print(decision)"
    return in_setup(code, **environment)


@pytest.fixture
def compiler(tmp_path):
    """An nvcc by which it is there."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return {"CUDACXX": str(nvcc)}


def test_build_options(tmp_path, compiler):
    absent, asked = {"CUDACXX": str(tmp_path / "none")}, {"ITO_BUILD_CUDA": "1"}
    out = options(**compiler, **asked).stdout
    assert "-DITO_CUDA=ON" in out
    assert f"-DCMAKE_CUDA_COMPILER={compiler['CUDACXX']}" in out
    for archs, expected in (
        ("", "80-real;90-real;100-real;120"),  # PTX of the newest alone
        ("all", "80-real;86-real;89-real;90-real;100-real;120"),
        ("90a", "90a"),
    ):
        out = options(**compiler, **asked, ITO_CUDA_ARCHS=archs).stdout
        assert f"-DCMAKE_CUDA_ARCHITECTURES={expected}\n" in out
        assert f"CUDA kernels: built for {expected} with" in out
    for archs in ("75", "80;70-real", "all-major"):
        out = options(**compiler, **asked, ITO_CUDA_ARCHS=archs)
        assert "ITO_CUDA_ARCHS must name 80 and later" in out.stderr
    out = options(**compiler, ITO_BUILD_CUDA="0").stdout
    assert out == "-DITO_CUDA=OFF\nCUDA kernels: not built: ITO_BUILD_CUDA=0\n"
    assert "there is no nvcc" in options(**absent, **asked).stderr
    assert "must be auto, 0 or 1, got 'yes'" in options(**compiler, ITO_BUILD_CUDA="yes").stderr


@pytest.mark.parametrize(
    ("version", "cuda", "built", "why"),
    [
        ("2.13.0+cpu", "None", False, "torch 2.13.0+cpu is not a CUDA build; ITO_BUILD_CUDA=1"),
        ("2.13.0+cu130", "'13.0'", True, "torch 2.13.0+cu130 is a build for CUDA 13.0"),
    ],
)
def test_cuda_is_built_for_a_cuda_build_of_torch(version, cuda, built, why, tmp_path, compiler):
    torch_dir = tmp_path / "torch"
    torch_dir.mkdir()
    (torch_dir / "__init__.py").write_text("raise ImportError('the build must not import torch')")
    (torch_dir / "version.py").write_text(
        f"from typing import Optional\n\n__all__ = ['__version__', 'debug', 'cuda', 'hip']\n"
        f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    )
    there = {"PYTHONPATH": str(tmp_path)}
    out = options(**there, **compiler).stdout
    assert out.startswith("-DITO_CUDA=ON" if built else "-DITO_CUDA=OFF\n")
    assert why in out.splitlines()[1]
    out = options(**there, CUDACXX=str(tmp_path / "none")).stdout
    assert out.startswith("-DITO_CUDA=OFF\n")
    assert ("but there is no nvcc" in out) == built


@pytest.mark.parametrize(("prefix", "seen"), [("sys.base_prefix", True), ("'/nowhere'", False)])
def test_the_user_s_packages_are_looked_through_where_python_sees_them(prefix, seen, tmp_path):
    """pip's build does not (PYTHONNOUSERSITE); a virtual environment may be closed to them."""
    code = f"import site, sys; site.PREFIXES = [{prefix}]; print(*setup.site_folders(), sep='\\n')"
    found = in_setup(code, PYTHONUSERBASE=str(tmp_path), PYTHONNOUSERSITE="1").stdout.split("\n")
    assert found[0].startswith(str(tmp_path)) == seen
    assert any(path.endswith(("site-packages", "dist-packages")) for path in found)


def test_cuda_is_not_built_without_torch(tmp_path):
    out = in_setup(f"print(*setup.wants_cuda([{str(tmp_path)!r}]))").stdout
    assert out.startswith("False there is no torch in ")
