"""Choosing a backend: by name, by block, by environment, automatically; never a silent fallback."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import ito_kernels as ik
from ito_kernels.similarity import cpu, dispatch, native

chunked = dispatch.load("chunked")
X, Y = torch.randn(6, 3), torch.randn(6, 3)


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that computed a loss."""
    names = []
    for name, backend in dispatch.REGISTRY.items():

        def spy(*arguments, name=name, both=backend.logsumexp_both):
            names.append(name)
            return both(*arguments)

        monkeypatch.setattr(backend, "logsumexp_both", spy)
    return names


def test_order_of_precedence(ran, monkeypatch):
    automatic = ik.explain(X, Y).split("backend ")[1].split(":")[0]
    ik.clip_loss(X, Y, 1.0)
    monkeypatch.setenv("ITO_BACKEND", "reference")
    ik.clip_loss(X, Y, 1.0)
    with ik.use_backend("chunked"):
        ik.clip_loss(X, Y, 1.0)
        with ik.use_backend("reference"):
            ik.clip_loss(X, Y, 1.0)
        ik.clip_loss(X, Y, 1.0, backend="reference")
        ik.clip_loss(X, Y, 1.0)
    expected = [automatic, "reference", "chunked", "reference", "reference", "chunked"]
    assert ran == expected


def test_backward_uses_the_backend_of_the_forward(monkeypatch):
    used = []
    backward = chunked.logsumexp_backward
    monkeypatch.setattr(
        chunked, "logsumexp_backward", lambda *args: used.append(1) or backward(*args)
    )
    x = X.clone().requires_grad_()
    with ik.use_backend("chunked"):
        loss = ik.clip_loss(x, Y, 1.0, reduction="none")[0].sum()
    assert not used
    with ik.use_backend("reference"):
        loss.backward()
    assert used


def test_unknown_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'fast'"), ik.use_backend("fast"):
        pass
    monkeypatch.setenv("ITO_BACKEND", "fast")
    with pytest.raises(ValueError, match="ITO_BACKEND: unknown backend 'fast'"):
        ik.clip_loss(X, Y, 1.0)
    monkeypatch.setenv("ITO_BACKEND", "cuda")  # these are CPU tensors
    with pytest.raises(RuntimeError, match="ITO_BACKEND: backend 'cuda' cannot run"):
        ik.clip_loss(X, Y, 1.0)


def test_missing_kernels_are_told_once(monkeypatch):
    """Slow is not silent: the first call that the native kernels would have taken says so."""
    monkeypatch.setattr(cpu, "MISSING", "no compiler")
    monkeypatch.setattr(cpu, "_native", None)
    dispatch._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ik.clip_loss(X.double(), Y.double(), 1.0)  # never theirs
        ik.clip_loss(X, Y, 1.0, backend="chunked")  # as asked
    with pytest.warns(UserWarning, match="without its CPU kernels.*no compiler"):
        ik.clip_loss(X, Y, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ik.clip_loss(X, Y, 1.0)
    dispatch._warn_once.cache_clear()


def test_use_backend_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), ik.use_backend("reference"):
        raise ZeroDivisionError
    assert "reference" not in ik.explain(X, Y)


def test_a_backend_that_cannot_run_says_why():
    unavailable = [name for name, status in ik.backends().items() if not status.available]
    for name in unavailable:
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: ."):
            ik.clip_loss(X, Y, 1.0, backend=name)


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(chunked, "supports", lambda problem: (False, "it is Sunday"))
    with pytest.raises(RuntimeError, match="backend 'chunked' cannot run: it is Sunday"):
        ik.clip_loss(X, Y, 1.0, backend="chunked")


def test_backends_and_explain():
    status = ik.backends()
    assert set(status) == {"reference", "chunked", "cpu", "triton", "cuda", "simt"}
    assert all(s.detail for s in status.values())
    assert status["reference"].available
    assert status["chunked"].available
    text = ik.explain(X, Y, backend="chunked")
    assert "6 x 6, D = 3, torch.float32 on cpu" in text
    assert "backend chunked: asked for by the call" in text
    assert "panels of 6 x 6" in text
    with ik.use_backend("reference"):
        assert "asked for by use_backend" in ik.explain(X, X)
        assert "self-similarity" in ik.explain(X, X)


def test_import_is_light():
    """Importing the package imports nothing that torch has not imported: no compiler, nothing of
    the trainer, no more of the standard library."""
    code = (
        "import torch, sys; before = set(sys.modules); import ito_kernels;"
        " print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] != 'ito_kernels'))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("ITO_")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == "[]", out.stderr


def test_native_module_reads_the_machine():
    native = pytest.importorskip("ito_kernels._native", reason="installed without a C++ compiler")
    info = native.cpu_info()
    assert info["logical_cores"] == len(os.sched_getaffinity(0))
    with open("/proc/cpuinfo") as f:
        flags = f.read()
    for ours, linux in (
        ("avx2", " avx2 "),
        ("avx512_bf16", "avx512_bf16"),
        ("amx_bf16", "amx_bf16"),
    ):
        assert (ours in info["features"]) == (linux in flags)
    assert native.build_info()["standard"] >= 201703


def test_the_dispatcher_knows_no_backend_by_name(monkeypatch):
    """The largest priority that supports the problem wins, if the device is its own; without a
    priority a backend runs only where it is asked for."""

    class Best(type(chunked)):
        name, priority, device = "best", 99, "cpu"

        def supports(self, problem):
            return problem.n == 6, "wants six rows"

    def chosen(best, n: int) -> str:
        entries = [best, *dispatch.REGISTRY.values()]
        ranked = sorted((x for x in entries if x.priority is not None), key=lambda x: -x.priority)
        monkeypatch.setattr(dispatch, "_BY_PRIORITY", ranked)
        return ik.explain(torch.randn(n, 3), torch.randn(n, 3)).split("backend ")[1]

    assert chosen(Best(), 6).startswith("best: the first of best, ")
    assert "best cannot: wants six rows" in chosen(Best(), 7)
    monkeypatch.setattr(Best, "device", "cuda")
    assert "best" not in chosen(Best(), 6)
    monkeypatch.setattr(Best, "device", None)
    monkeypatch.setattr(Best, "priority", None)
    assert "best" not in chosen(Best(), 6)
    assert all(dispatch.load(x).priority is None for x in ("reference", "simt", "cuda"))


def test_a_native_module_of_other_code_is_refused():
    """Its structures would be read wrongly: gradients were wrong where this was tried."""
    pytest.importorskip("ito_kernels._native", reason="installed without a C++ compiler")
    # the module is taken from where the package would find it, before the package is there
    code = (
        "import sys, types; package = types.ModuleType('ito_kernels');"
        f" package.__path__ = {list(ik.__path__)!r}; sys.modules['ito_kernels'] = package;"
        " import ito_kernels._native as native; native.interface = 1;"
        " from ito_kernels.similarity import native as checked; print(checked.MISSING)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = f"built for other Python code (interface 1, not {native.INTERFACE}): install"
    assert expected in out.stdout, out.stderr
