"""Every available backend against the dense fp64 formula, over the shared problem set."""

import pytest
import torch
from problems import (
    AVAILABLE,
    CASES,
    OPTIONS,
    Case,
    assert_accurate,
    dense,
    gradients,
    leaves,
    make,
    row_limit,
    run,
    run_softplus,
    tensors,
    weights,
)

from ito_kernels import similarity_logsumexp
from ito_kernels.similarity import dispatch, panelwise
from ito_kernels.similarity.spec import Problem

# ε of the accuracy rule: losses (times 1 + scale in fp32), gradients (relative)
EPS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Panels of a few rows, so that the problem set crosses many of their edges."""
    monkeypatch.setattr(panelwise, "PANEL_SCORES", 1000)
    monkeypatch.setattr(panelwise, "MIN_ROWS", 5)


def eps_of(dtype, scale: float) -> tuple[float, float]:
    if dtype == torch.float64:
        return 1e-14 * (1 + scale), 1e-13
    loss, grad = EPS[dtype]
    return (loss * (1 + scale) if dtype == torch.float32 else loss), grad


def supported(backend: str, case, dtype) -> None:
    t = make(case, dtype)
    limit = row_limit(t) if case.limit else None
    problem = Problem(t["a"], t["b"], t["scale"], row_limit=limit)
    ok, reason = dispatch.load(backend).supports(problem)
    if not ok:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_logsumexp(backend, case, dtype):
    supported(backend, case, dtype)
    t = leaves(make(case, dtype))
    truth_t, same_t = leaves(t), leaves(t)
    truth, same = dense(case, truth_t, torch.float64), dense(case, same_t, dtype)
    stats = run(case, t, backend)
    eps, grad_eps = eps_of(dtype, case.scale)

    for side, wanted in (("row", case.rows), ("col", case.cols)):
        ours = stats.row if side == "row" else stats.col
        if not wanted:
            assert ours is None
            continue
        top, logsum, pos, neg_max = ours
        shift = top.masked_fill(top == -torch.inf, 0)
        count = truth[f"{side}_count"]
        absolute = {"max": top, "lse": top + logsum}
        if case.positives == "linear":
            # the mean, as a loss uses it; 0 positives give 0
            k = count.clamp(min=1)
            for x in (truth, same):
                x[f"{side}_mean"] = x[f"{side}_linear"] / k
            absolute["mean"] = pos / k + shift * (count > 0)
        elif case.positives == "lse":
            absolute["lse_pos"] = pos + shift
        if case.hardest:
            absolute["neg_max"] = neg_max
        for name, value in absolute.items():
            key = f"{side}_{name}"
            assert_accurate(value, truth[key], same[key], 2, eps)

    w = weights(case, truth)
    kind = "linear" if case.positives == "linear" else "lse_pos"

    def functional(outputs: dict) -> torch.Tensor:
        total = 0
        for side in ("row", "col"):
            for ours, name in (("logsum", "lse"), ("pos", kind)):
                value, weight = outputs[f"{side}_{name}"], w[f"{side}_{ours}"]
                total = total + (torch.where(weight != 0, value, 0).double() * weight).sum()
        return total

    total = 0
    for key, weight in w.items():
        value = getattr(stats, key)
        if value is not None:
            total = total + (torch.where(weight != 0, value, 0).double() * weight).sum()
    if not total.requires_grad:  # nothing is allowed anywhere
        return
    ours = gradients(total, t)
    expected = gradients(functional(truth), truth_t)
    peer = gradients(functional(same), same_t)
    for name, value in ours.items():
        assert value.dtype == t[name].dtype
        size = expected[name].abs().max().item()
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_softplus(backend, case, dtype):
    supported(backend, case, dtype)
    t = leaves(make(case, dtype))
    truth_t, same_t = leaves(t), leaves(t)
    truth = dense(case, truth_t, torch.float64)["softplus"]
    same = dense(case, same_t, dtype)["softplus"]
    out = run_softplus(case, t, backend)
    eps, grad_eps = eps_of(dtype, case.scale)
    assert_accurate(out, truth, same, 2, eps * max(1, truth.abs().max().item()))

    w = torch.rand(case.n, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    ours = gradients((out.double() * w).sum(), t)
    expected = gradients((truth.double() * w).sum(), truth_t)
    peer = gradients((same.double() * w).sum(), same_t)
    for name, value in ours.items():
        size = expected[name].abs().max().item()
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_strides(backend):
    """Transposed, sliced and broadcast inputs give the bits of their contiguous copies."""
    case = OPTIONS[0]
    t = make(case, torch.float32)
    a, b = t["a"], t["b"]
    wide = torch.zeros(case.m, 2 * case.d)
    wide[:, ::2] = b
    strided = t | {"a": a.T.contiguous().T, "b": wide[:, ::2], "scale": t["scale"].expand(case.n)}
    plain = t | {"scale": t["scale"].expand(case.n).contiguous()}
    ours, expected = run(case, strided, backend), run(case, plain, backend)
    for x, y in zip(tensors(ours), tensors(expected), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_same_bits_every_time(backend):
    case = OPTIONS[0]
    results = []
    for _ in range(3):
        t = leaves(make(case, torch.float32))
        stats = run(case, t, backend)
        grads = gradients((stats.row_logsum - stats.row_pos).sum() + stats.col_logsum.sum(), t)
        results.append(tensors(stats, tuple(grads.values())))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_non_finite_features_show(backend, bad, side):
    case = OPTIONS[-1]
    t = make(case, torch.float32)
    t[side][3, 5] = bad
    stats = run(case, t, backend)
    loss = (stats.row_logsum - stats.row_pos).sum() + (stats.col_logsum - stats.col_pos).sum()
    assert not loss.isfinite()
    assert not run_softplus(case, t, backend).sum().isfinite()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 200.0])
def test_far_rows_do_not_underflow(backend, scale):
    """One row's scores lie 4·scale below its neighbours': its statistics keep their digits."""
    case = CASES[4]
    t = make(case, torch.float32)
    t["scale"] = torch.tensor(scale)
    t["row_bias"] = torch.zeros(case.n)
    t["row_bias"][::3] = -4 * scale
    t["col_bias"] = torch.zeros(case.m)
    t["col_bias"][5] = -3 * scale
    biased = type(case)(case.n, case.m, case.d, scale=scale, biases=True, positives="linear")
    truth, same = dense(biased, t, torch.float64), dense(biased, t, torch.float32)
    stats = run(biased, t, backend)
    for side in ("row", "col"):
        ours = stats.row if side == "row" else stats.col
        lse = ours.max + ours.logsum
        assert_accurate(lse, truth[f"{side}_lse"], same[f"{side}_lse"], 2, 1e-6 * (1 + 5 * scale))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("positives", ["linear", "lse"])
def test_gradient_of_the_positives_alone(backend, positives):
    """Nothing but pos is differentiated, at scores whose exponential overflows in fp32."""
    case = Case(600, 600, 2, scale=100.0, positives=positives)
    t = leaves(make(case, torch.float32), names=("a",))
    truth_t = leaves(t, names=("a",))
    key = "row_linear" if positives == "linear" else "row_lse_pos"
    expected = gradients(dense(case, truth_t, torch.float64)[key].sum(), truth_t)["a"]
    ours = gradients(run(case, t, backend).row_pos.sum(), t)["a"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_self_similarity_with_sides_padded_differently(backend):
    x = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    ids = {
        "row_ids": torch.tensor([-1, 0, 1, 2, 0, 1]),
        "col_ids": torch.tensor([0, 0, 1, 2, -1, 1]),
    }
    same = similarity_logsumexp(x, x, 20.0, positives="linear", backend=backend, **ids)
    copy = similarity_logsumexp(x, x.clone(), 20.0, positives="linear", backend=backend, **ids)
    for a, b in zip(tensors(same), tensors(copy), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
