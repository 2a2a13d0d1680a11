"""The primitive as a PyTorch operator: opcheck, gradcheck, compile, autocast, frozen sides."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from support.problems import (
    AVAILABLE,
    OPTIONS,
    gradients,
    leaves,
    make,
    run,
    run_softplus,
    tensors,
    turned,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ito_kernels as ik
from ito_kernels.similarity import dispatch, op, panelwise
from ito_kernels.similarity.spec import Needs, Problem, SideUpstream, Upstream

chunked, reference = dispatch.load("chunked"), dispatch.load("reference")
FLAGS = ("positives", "exclude_self", "exclude_positives", "diagonal", "rows", "cols", "hardest")
OPS = torch.ops.ito_kernels
CASE = next(c for c in OPTIONS if c.scale_per_row and not c.same)


def problem_of(t, **flags) -> Problem:
    return Problem(*t.values(), **flags)


@pytest.mark.parametrize(
    ("weighted", "early", "stats"),
    # without gradients formed early, backward needs the statistics
    [(False, False, True), (True, False, True), (True, True, True), (True, True, False)],
)
@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same, weighted, early, stats):
    """Schema, fake kernels, autograd and AOT dispatch agree with the real operators."""
    backend = "cpu" if "cpu" in AVAILABLE and not same else "chunked"
    t = leaves(make(CASE, torch.float32))
    if same:
        t["b"] = None
        t["col_bias"], t["col_ids"] = t["row_bias"], t["row_ids"]
    problem = problem_of(t, positives="lse", hardest=True)
    n, m = problem.n, problem.m
    weights = Upstream()
    if weighted:
        weights = Upstream(*(SideUpstream(*torch.rand(2, k)) for k in (n, m)))
    needs = Needs(True, not same, True, True, False)
    now = needs if weighted and early else Needs()
    ours = dispatch.load(backend)
    call = op.Logsumexp(problem, ours, stats, 0, weights, now)
    torch.library.opcheck(OPS.similarity_logsumexp.default, call.arguments())
    call = op.Softplus(problem, ours, weights.row.logsum, now)
    torch.library.opcheck(OPS.similarity_softplus.default, call.arguments())
    plain = Problem(*(x.detach() if isinstance(x, torch.Tensor) else x for x in problem))
    call = op.Logsumexp(plain, ours, True, 0, Upstream(), Needs())
    _, stats, _, cache = call.read(OPS.similarity_logsumexp(*call.arguments()))
    upstream = Upstream(*(SideUpstream(x.logsum.clone(), x.pos.clone()) for x in stats))
    call = op.LogsumexpBackward(plain, ours, stats, cache, upstream, needs)
    torch.library.opcheck(OPS.similarity_logsumexp_backward.default, call.arguments())
    call = op.SoftplusBackward(plain, ours, stats.row_max, needs)
    torch.library.opcheck(OPS.similarity_softplus_backward.default, call.arguments())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("positives", ["linear", "lse"])
@pytest.mark.parametrize("same", [False, True])
def test_gradcheck(backend, positives, same, monkeypatch):
    monkeypatch.setattr(panelwise, "PANEL_SCORES", 10)
    monkeypatch.setattr(panelwise, "MIN_ROWS", 2)
    g = torch.Generator().manual_seed(0)
    n, m = 5, 5 if same else 7
    ids = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([1, 0, 2, 1, 0, 2, 0])[:m]

    def tensor(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.requires_grad_()

    u, v = torch.rand(n, dtype=torch.float64), torch.rand(m, dtype=torch.float64)

    def f(a, b, scale, row_bias, col_bias):
        common = {"row_bias": row_bias, "col_bias": col_bias, "row_ids": ids[0], "col_ids": ids[1]}
        b = a if same else b
        s = ik.similarity_logsumexp(a, b, scale, positives=positives, backend=backend, **common)
        soft = ik.similarity_softplus(a, b, scale, backend=backend, **common)
        k = [(ids[0][:, None] == ids[1]).sum(d) if positives == "linear" else 1 for d in (1, 0)]
        pairs = {"row_weights": (u, -u / k[0]), "col_weights": (v, -v / k[1])}
        rows = {"row_weights": (u, -u / k[0]), "cols": False}
        return (
            *(
                ik.similarity_logsumexp(
                    a, b, scale, positives=positives, backend=backend, **common, **weights
                )[0]
                for weights in (pairs, rows)
            ),
            ik.similarity_softplus(a, b, scale, backend=backend, row_weights=u, **common),
            s.row_logsum - s.row_pos / k[0],
            s.col_logsum - s.col_pos / k[1],
            s.row_max.detach() + s.row_logsum,
            soft,
        )

    for scale in (tensor(), tensor(n)):
        assert torch.autograd.gradcheck(
            f, (tensor(n, 3), tensor(m, 3), scale, tensor(n), tensor(m)), fast_mode=True
        )


def test_a_number_may_change_after_compilation():
    """A temperature schedule: the number becomes symbolic."""
    x, y = (torch.nn.functional.normalize(torch.randn(8, 4), dim=1) for _ in "xy")
    compiled = torch.compile(ik.clip_loss, fullgraph=True, backend="aot_eager")
    for scale in (20.0, 21.0, 22.5):
        torch.testing.assert_close(compiled(x, y, scale), ik.clip_loss(x, y, scale))


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
    for x, y, z in zip(*map(tensors, (ours, mixed, expected)), strict=True):
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
    upstream = Upstream(SideUpstream(torch.ones(CASE.n)))
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


def ways(t, backend="chunked", case=CASE) -> list[Callable[[], torch.Tensor]]:
    """Each way through the operators, to a scalar."""
    u, v = torch.ones(case.n), torch.ones(case.m)
    common = t | {"backend": backend}
    return [
        lambda: run(case, t, backend).row_logsum.sum(),
        lambda: run_softplus(case, t, backend).sum(),
        lambda: ik.similarity_logsumexp(**common, row_weights=(u, None), col_weights=(v, None))[0],
        lambda: ik.similarity_logsumexp(**common, row_weights=(u, None), cols=False)[0],
        lambda: ik.similarity_softplus(**common, row_weights=u),
    ]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_double_backward_raises(backend):
    """It is not implemented: it must say so, and what to do, not give a wrong number."""
    t = leaves(make(CASE, torch.float32), names=("a",))
    for way in ways(t, backend):
        out = way()
        with pytest.raises(RuntimeError, match=r"first-order gradients only.*create_graph"):
            torch.autograd.grad(out, t["a"], create_graph=True)


@pytest.mark.parametrize("way", range(5))
def test_torch_func_raises(way):
    t = make(CASE, torch.float32)
    with pytest.raises(RuntimeError, match=r"torch.func transforms.*backward\(\)"):
        torch.func.grad(lambda a: ways(t | {"a": a})[way]())(t["a"])
    with pytest.raises(RuntimeError, match="loop instead of vmap"):
        torch.func.vmap(lambda a: ways(t | {"a": a})[way]())(t["a"].expand(2, -1, -1))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_who_watches_sees_the_operators(backend):
    """With and without PyTorch's dispatcher the same values; a dispatch mode sees operators."""
    t = make(CASE, torch.float32)
    results = []
    for watch in (nullcontext(), Names()):
        live = leaves(t)
        with watch as names:
            values = [way() for way in ways(live, backend)]
            sum(values).backward()
        results.append([*(x.detach() for x in values), *(x.grad for x in live.values())])
    for direct, dispatched in zip(*results, strict=True):
        assert direct is dispatched is None or torch.equal(direct, dispatched)
    assert {
        f"ito_kernels::{name}{suffix}"
        for name in ("similarity_logsumexp", "similarity_softplus")
        for suffix in ("", "_backward")
    } <= names.seen


def test_fake_tensors_pass():
    with FakeTensorMode():
        a, b = (torch.randn(6, 4, requires_grad=True) for _ in "ab")
        loss = ik.clip_loss(a, b, 10.0)
        loss.backward()
    assert (loss.shape, a.grad.shape) == ((), (6, 4))


@pytest.mark.parametrize("way", range(5))
def test_forward_mode_raises(way):
    """A tangent that is lost would read as a derivative of 0."""
    t = make(CASE, torch.float32)
    one = torch.ones_like(t["a"])
    with pytest.raises(RuntimeError, match="reverse mode only"):
        torch.func.jvp(lambda a: ways(t | {"a": a})[way](), (t["a"],), (one,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse mode only"):
        ways(t | {"scale": forward_ad.make_dual(t["scale"], torch.ones_like(t["scale"]))})[way]()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_backward_twice(backend):
    """What it hands out may be changed in place without changing what comes next."""
    t = leaves(make(CASE, torch.float32))
    for way in ways(t, backend):
        out = way()
        first = torch.autograd.grad(out, t["a"], retain_graph=True)[0]
        kept = first.clone()
        first.zero_()
        assert torch.equal(kept, torch.autograd.grad(out, t["a"], retain_graph=True)[0])
        (tripled,) = torch.autograd.grad(3 * out, t["a"])
        assert (tripled - 3 * kept).abs().max() < 1e-5 * kept.abs().max()


@pytest.mark.parametrize(("backend", "case", "dtype"), turned(OPTIONS, AVAILABLE))
def test_weights_give_the_sum_of_the_statistics(case, dtype, backend):
    """The weighted sum and its gradients are those of the statistics, weighted outside."""
    t, s = leaves(make(case, dtype)), leaves(make(case, dtype))
    stats = run(case, s, backend)
    g = torch.Generator().manual_seed(3)
    weights, expected = {}, 0
    for side, length, wanted in (("row", case.n, case.rows), ("col", case.m, case.cols)):
        if not wanted:
            continue
        w = [torch.rand(length, generator=g) for _ in range(2)]
        if case.positives is None:
            w[1] = None
        for k, x in enumerate((f"{side}_logsum", f"{side}_pos")):
            if w[k] is not None:
                value = getattr(stats, x)
                w[k] = torch.where(value == -torch.inf, 0, w[k])  # where there is nothing to sum
                expected = expected + torch.where(value == -torch.inf, 0, w[k] * value).sum()
        weights[f"{side}_weights"] = tuple(w)
    options = {k: getattr(case, k) for k in FLAGS}
    total, ours = ik.similarity_logsumexp(**t, **options, **weights, backend=backend)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    alone = ik.similarity_logsumexp(**t, **options, **weights, return_stats=False, backend=backend)
    assert torch.equal(alone, total)
    same = gradients(alone, t)
    for x, y in zip(tensors(ours), tensors(stats), strict=True):
        assert torch.equal(x, y)
        assert not x.requires_grad
    theirs = gradients(expected, s)
    close = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-3), torch.float16: (2e-3, 1e-3)}
    for name, x in gradients(total, t).items():
        assert torch.equal(x, same[name])
        size = theirs[name].abs().max().item()
        rtol, atol = close[t[name].dtype]
        torch.testing.assert_close(x, theirs[name], rtol=rtol, atol=atol * size)


@pytest.mark.parametrize("backend", [chunked, reference], ids=["chunked", "reference"])
def test_gradients_are_formed_once_and_only_if_wanted(backend, monkeypatch):
    """In the forward pass where weights are known, but in fp16; never without need."""
    formed = []
    for name in ("logsumexp_backward", "softplus_backward"):
        original = getattr(backend, name)

        def spy(problem, *args, original=original):
            formed.append(next(x for x in args if isinstance(x, Needs)))
            return original(problem, *args)

        monkeypatch.setattr(backend, name, spy)
    name = backend.name
    u, needs = torch.rand(CASE.n), Needs(a=True)
    for dtype, in_forward in ((torch.float32, 1), (torch.float16, 0)):
        t = make(CASE, dtype)
        live = leaves(t, names=("a",))
        for f in (
            lambda t: ik.similarity_softplus(**t, row_weights=u, backend=name),
            lambda t: ik.similarity_logsumexp(**t, row_weights=(u, None), backend=name)[0],
        ):
            f(t)
            with torch.no_grad():
                f(live)
            assert not formed
            out = f(live)
            assert formed == [needs] * in_forward
            out.backward()
            assert formed == [needs]
            formed.clear()


def test_fp16_gradients_survive_until_the_loss_scale():
    """Means over 2^14 pairs: unscaled gradients lie below the smallest number of fp16."""
    n = 16384
    x = (torch.randn(n, 4) * 0.01).half().requires_grad_()
    y = (torch.randn(n, 4) * 0.01).half()
    ids = torch.full((n,), 1)
    loss = ik.siglip_loss(x, y, 1.0, -10.0, image_ids=torch.arange(n), text_ids=ids + n)
    (scaled,) = torch.autograd.grad(loss * 2.0**16, x)
    expected = 2.0**16 / n * torch.sigmoid(torch.tensor(-10.0)) * y.float().sum(0)
    assert (scaled.float().mean(0) - expected).abs().max() < 0.02 * expected.abs().max()


def test_meta_tensors():
    """Shapes and dtypes without a device: the fake kernels answer."""
    x, y = (torch.randn(6, 3, device="meta", requires_grad=True) for _ in range(2))
    loss = ik.clip_loss(x, y, 10.0) + ik.siglip_loss(x, y, 10.0, -1.0)
    loss.backward()
    assert loss.is_meta
    assert x.grad.shape == x.shape
    assert ik.clip_loss(x, y, 10.0, reduction="none")[1].shape == (6,)


@pytest.mark.parametrize("f", [ik.clip_loss, lambda x, y, s: ik.siglip_loss(x, y, s, s - 20)])
def test_a_scale_of_shape_1(f):
    """As open_clip's parameter may have it: its gradient has the same shape."""
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    scale, plain = (torch.full(shape, 3.0, requires_grad=True) for shape in ((1,), ()))
    losses = f(x, y, scale), f(x, y, plain)
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert scale.grad.shape == (1,)
    assert torch.equal(scale.grad[0], plain.grad)


def test_the_cache_may_change_after_compilation(monkeypatch):
    if "cpu" not in AVAILABLE:
        pytest.skip("installed without a C++ compiler: no backend keeps a cache")
    t = leaves(make(CASE, torch.float32))

    def f(a, b):
        s = ik.similarity_logsumexp(a, b, 10.0, positives="linear", backend="cpu")
        return (s.row_logsum - s.row_pos).mean()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(t["a"], t["b"]), t["a"])[0]
    for size in ("1000000", "0", "4096"):
        monkeypatch.setenv("ITO_TILE_CACHE_BYTES", size)
        ours = torch.autograd.grad(compiled(t["a"], t["b"]), t["a"])[0]
        torch.testing.assert_close(ours, expected)


def test_batched_gradients():
    """Several upstream gradients at a time, which PyTorch maps over the backward pass."""
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    by = torch.tensor([1.0, 2.0])
    (batched,) = torch.autograd.grad(ik.clip_loss(x, y, 2.0), x, by, is_grads_batched=True)
    (single,) = torch.autograd.grad(ik.clip_loss(x, y, 2.0), x)
    torch.testing.assert_close(batched, by[:, None, None] * single)
