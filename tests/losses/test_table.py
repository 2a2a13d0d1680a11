"""Every loss with every option: the backends agree, only first-order gradients, none is missing."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from support.losses_table import BACKENDS, PAGE, ROWS, WITHOUT_KERNELS, Inputs, page
from support.problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.similarity import dispatch

N, D = 24, 8
# whose kernels see features that are scaled, normalised or multiplied with others, in fp32
COMPUTED_IN_FP32 = ("cluster_weighted_infonce", "mnrl_loss", "soft_target_infonce", "symile_loss")
# tested in tests/distributed/
ELSEWHERE = ("group", "chunk_size")
CASES = [(loss, option) for loss, rows in ROWS.items() for option in rows]
rows = pytest.mark.parametrize(("loss", "option"), CASES, ids=[f"{a} {b}" for a, b in CASES])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in AVAILABLE])
@rows
def test_cell(loss, option, backend):
    x, y, z = (normalize(torch.randn(N, D), dim=1) for _ in range(3))

    def value_and_grads(dtype, backend):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        value = ROWS[loss][option].call(loss, Inputs.of(*leaves, z.to(dtype)), backend=backend)
        return [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]

    ours, truth = (
        value_and_grads(torch.float32, backend),
        value_and_grads(torch.float64, "reference"),
    )
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@rows
def test_only_half_values_are_called_half_values(loss, option, dtype, monkeypatch):
    """The GPU kernels round what is called so."""
    problems, choose = [], dispatch.choose

    def spy(problem, name=None):
        problems.append(problem)
        return choose(problem, name)

    monkeypatch.setattr(dispatch, "choose", spy)
    x, y, z = (normalize(torch.randn(N, D), dim=1).to(dtype) for _ in range(3))
    ROWS[loss][option].call(loss, Inputs.of(x, y, z))
    in_fp32 = [p for p in problems if p.a.dtype == torch.float32]
    for p in in_fp32:
        features = p.a if p.b is None else torch.cat([p.a, p.b])
        if p.half_values:
            assert dtype != torch.float32
            torch.testing.assert_close(features.to(dtype).float(), features, rtol=0, atol=0)
    if loss not in COMPUTED_IN_FP32:
        assert all(p.half_values == (dtype != torch.float32) for p in in_fp32)


def test_features_that_autocast_rounds_are_half_values(monkeypatch):
    """Not fp64, which it leaves: an error names it."""
    problems, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda p, name=None: problems.append(p) or choose(p))
    x, y, queue = (torch.randn(N, D) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ik.clip_loss(x, y, 10.0, queue=queue)
        for p in problems:
            assert p.half_values
            assert torch.equal(p.b.bfloat16().float(), p.b)
        with pytest.raises(TypeError, match=r"queue must be torch\.float32 like queries, got .*64"):
            ik.clip_loss(x, y, 10.0, queue=queue.double())
        with pytest.raises(TypeError, match=r"must have the same dtype, got .*float32, .*float64"):
            ik.clip_loss(x, y.double(), 10.0)
    assert len(problems) == 2


@rows
def test_what_is_not_first_order_reverse_mode_raises(loss, option):
    """Never a silent wrong number. A loss without a kernel can be differentiated again."""
    if loss in WITHOUT_KERNELS:
        return
    x, y, z = (normalize(torch.randn(N, D), dim=1) for _ in range(3))

    def call(x):
        return ROWS[loss][option].call(loss, Inputs.of(x, y, z))

    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(call(leaf), leaf, create_graph=True)
    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.vmap(f)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"ito_kernels|vmap: called random"):
            transform(call)


def test_every_loss_and_every_option_has_a_row():
    public = {name for name in ik.__all__ if name.endswith("_loss") or "infonce" in name}
    assert public == ROWS.keys()
    for loss, rows in ROWS.items():
        named = set(re.findall(r"\w+", " ".join(rows)))
        for name, parameter in inspect.signature(getattr(ik, loss)).parameters.items():
            if parameter.default is inspect.Parameter.empty or name in (*ELSEWHERE, "backend"):
                continue
            assert name in named, f"{loss}: no row for {name}"


def test_every_row_names_a_test():
    for rows in ROWS.values():
        for row in rows.values():
            file, name = row.test.split("::")
            assert f"def {name}(" in (Path(__file__).parent / file).read_text()


def test_the_table_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/support/losses_table.py"


@pytest.mark.parametrize("name", [n for n in ik.__all__ if inspect.isfunction(getattr(ik, n))])
def test_every_argument_is_documented(name):
    """In the docstring, or in that of the function to which it sends for its arguments."""
    about = inspect.getdoc(getattr(ik, name))
    for other in re.findall(r"Arguments\b[^.]*?\bas in\s+`(\w+)`", about):
        about += inspect.getdoc(getattr(ik, other))
    missing = [
        parameter
        for parameter in inspect.signature(getattr(ik, name)).parameters
        if not re.search(rf"\b{parameter}\b", about)
    ]
    assert not missing
