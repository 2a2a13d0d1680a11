"""`python -m ito_kernels`: it passes here, and notices a wrong loss and a wrong gradient."""

import pytest
import torch

import ito_kernels as ik
from ito_kernels import __main__ as self_check
from ito_kernels.similarity.dispatch import BackendStatus


def test_every_backend_here_is_right(capsys, monkeypatch):
    monkeypatch.setenv("ITO_CPU_ISA", "scalar")
    with pytest.raises(SystemExit) as ended:
        self_check.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    lines = [line for line in said.splitlines() if "largest relative error" in line]
    available = [name for name, status in ik.backends().items() if status.available]
    assert {line.split()[0] for line in lines} == set(available)
    assert "ITO_CPU_ISA=scalar" in said
    for isa in self_check.instruction_sets():
        assert any(line.split()[:2] == ["cpu", isa] for line in lines)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


@pytest.mark.parametrize(
    "wrong", [lambda x: x * 1.0001, WrongGradient.apply, lambda x: x * torch.nan]
)
def test_a_wrong_value_or_gradient_is_named(wrong, capsys, monkeypatch):
    right = ik.siglip_loss
    monkeypatch.setattr(ik, "siglip_loss", lambda *a, **k: wrong(right(*a, **k)))
    monkeypatch.setattr(ik, "backends", lambda: {"chunked": BackendStatus(True, "")})
    assert not self_check.check()
    assert "WRONG: siglip_loss" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["ITO_CPU_ISA", "ITO_TILE_CACHE_BYTES"])
def test_a_wrong_variable_is_said_in_a_line(variable, monkeypatch):
    monkeypatch.setenv(variable, "abc")
    with pytest.raises(SystemExit, match=f"^{variable} must be .*abc") as ended:
        self_check.main()
    assert "\n" not in str(ended.value)
