"""The primitive as a PyTorch operator: opcheck, gradcheck, compile, autocast, frozen sides."""

import pytest
import torch
from problems import AVAILABLE, OPTIONS, gradients, leaves, make, run, run_softplus
from torch.utils._python_dispatch import TorchDispatchMode

import ito_kernels as ik
from ito_kernels.similarity import chunked, op, reference
from ito_kernels.similarity.spec import Needs, Problem, Upstream

CASE = next(c for c in OPTIONS if c.scale_per_row and not c.same)


def problem_of(t, **flags) -> Problem:
    return Problem(*t.values(), **flags)


@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same):
    """Schema, fake kernels, autograd and AOT dispatch agree with the real operators."""
    t = leaves(make(CASE, torch.float32))
    if same:
        t["b"] = None
        t["col_bias"], t["col_ids"] = t["row_bias"], t["row_ids"]
    problem = problem_of(t, positives="lse", hardest=True)
    torch.library.opcheck(op._logsumexp, (*problem, "chunked", False))
    torch.library.opcheck(op._softplus, (*problem, "chunked"))
    plain = Problem(*(x.detach() if isinstance(x, torch.Tensor) else x for x in problem))
    *stats, cache = (x.detach() for x in op._logsumexp(*plain, "chunked", False))
    upstream = Upstream(*(stats[i].clone() for i in (1, 5, 2, 6)))
    needs = Needs(True, not same, True, True, False)
    torch.library.opcheck(
        op._logsumexp_backward, (*plain, "chunked", *stats, cache, *upstream, *needs)
    )
    torch.library.opcheck(op._softplus_backward, (*plain, "chunked", stats[0], *needs))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("positives", ["linear", "lse"])
@pytest.mark.parametrize("same", [False, True])
def test_gradcheck(backend, positives, same, monkeypatch):
    monkeypatch.setattr(chunked, "PANEL_SCORES", 10)
    monkeypatch.setattr(chunked, "MIN_ROWS", 2)
    g = torch.Generator().manual_seed(0)
    n, m = 5, 5 if same else 7
    ids = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([1, 0, 2, 1, 0, 2, 0])[:m]

    def tensor(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.requires_grad_()

    def f(a, b, scale, row_bias, col_bias):
        common = {"row_bias": row_bias, "col_bias": col_bias, "row_ids": ids[0], "col_ids": ids[1]}
        b = a if same else b
        s = ik.similarity_logsumexp(a, b, scale, positives=positives, backend=backend, **common)
        soft = ik.similarity_softplus(a, b, scale, backend=backend, **common)
        k = [(ids[0][:, None] == ids[1]).sum(d) if positives == "linear" else 1 for d in (1, 0)]
        return (
            s.row_logsum - s.row_pos / k[0],
            s.col_logsum - s.col_pos / k[1],
            s.row_max.detach() + s.row_logsum,
            soft,
        )

    for scale in (tensor(), tensor(n)):
        assert torch.autograd.gradcheck(
            f, (tensor(n, 3), tensor(m, 3), scale, tensor(n), tensor(m))
        )


@pytest.mark.parametrize("backend", AVAILABLE)
def test_compile_gives_the_same_numbers(backend):
    x, y = torch.randn(40, 16), torch.randn(40, 16)

    def loss(x, y, scale):
        clip = ik.clip_loss(x, y, scale, normalize=True, backend=backend)
        return clip + ik.siglip_loss(x, y, scale, -1.0, backend=backend) * 0.1

    eager, compiled = [], []
    for out, f in ((eager, loss), (compiled, torch.compile(loss, fullgraph=True))):
        v = [t.clone().requires_grad_() for t in (x, y, torch.tensor(5.0))]
        value = f(*v)
        out += [value, *torch.autograd.grad(value, v)]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_autocast(backend):
    """Features in the autocast dtype, everything else in fp32, also inside the backend."""
    t = make(CASE, torch.float32)
    half = t | {"a": t["a"].bfloat16(), "b": t["b"].bfloat16()}
    expected = run(CASE, half, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(CASE, t, backend)
        mixed = run(CASE, t | {"a": half["a"]}, backend)  # as towers under autocast give them
    for x, y, z in zip(ours, mixed, expected, strict=True):
        if z is not None:
            assert x.dtype == torch.float32
            assert torch.equal(x, z)
            assert torch.equal(y, z)
    live = leaves(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = run(CASE, live, backend)
    grads = gradients(stats.row_logsum.sum(), live)
    assert grads["a"].dtype == torch.float32


class CountProducts(TorchDispatchMode):
    """Multiply-adds of the matrix products that run inside."""

    work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            a, b = args[-2:]
            self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [reference, chunked], ids=["reference", "chunked"])
def test_frozen_sides_cost_no_product(backend):
    """Backward costs one product for the scores and one for each side that wants a gradient."""
    t = make(CASE, torch.float32)
    t["row_ids"] = t["col_ids"] = None
    problem = problem_of(t, positives="linear")
    stats = backend.logsumexp_forward(problem)
    upstream = Upstream(torch.ones(CASE.n))
    unit = CASE.n * CASE.m * CASE.d
    for needs, units in (
        (Needs(a=True, b=True, scale=True), 3),
        (Needs(a=True), 2),
        (Needs(b=True), 2),
        (Needs(scale=True, row_bias=True, col_bias=True), 1),
    ):
        for run_backward in (
            lambda needs=needs: backend.logsumexp_backward(problem, stats, upstream, needs),
            lambda needs=needs: backend.softplus_backward(problem, torch.ones(CASE.n), needs),
        ):
            with CountProducts() as count:
                run_backward()
            assert count.work == units * unit


def test_frozen_sides_get_no_gradient():
    t = leaves(make(CASE, torch.float32), names=("b",))
    stats = run(CASE, t, "chunked")
    assert set(gradients(stats.row_logsum.sum(), t)) == {"b"}
    assert not run(CASE, make(CASE, torch.float32), "chunked").row_logsum.requires_grad


def test_the_maximum_is_a_constant():
    stats = run(OPTIONS[0], leaves(make(OPTIONS[0], torch.float32)), "chunked")
    assert stats.row_logsum.requires_grad
    for x in (stats.row_max, stats.col_max, stats.row_neg_max, stats.col_neg_max):
        assert not x.requires_grad


def test_double_backward_raises():
    """It is not implemented: it must say so, not give a wrong number."""
    t = leaves(make(CASE, torch.float32), names=("a",))
    for out in (run(CASE, t, "chunked").row_logsum, run_softplus(CASE, t, "chunked")):
        (grad,) = torch.autograd.grad(out.sum(), t["a"], create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match="ito_kernels"):
            torch.autograd.grad(grad.sum(), t["a"])
