"""Every available backend against the dense fp64 formula, over the shared problem set."""

import pytest
import torch
from support.kernel_checks import (
    check_far_rows_do_not_underflow,
    check_logsumexp,
    check_same_bits_every_time,
    check_softplus,
    check_strides,
)
from support.problems import (
    AVAILABLE,
    CASES,
    OPTIONS,
    Case,
    dense,
    gradients,
    leaves,
    make,
    run,
    run_softplus,
    tensors,
    turned,
)

from ito_kernels import similarity_logsumexp
from ito_kernels.similarity import panelwise


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Panels of a few rows, so that the problem set crosses many of their edges."""
    monkeypatch.setattr(panelwise, "PANEL_SCORES", 1000)
    monkeypatch.setattr(panelwise, "MIN_ROWS", 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_logsumexp(backend, case, dtype):
    check_logsumexp(backend, case, dtype)


WIDE = [
    pytest.param(backend, case, torch.float64, id=f"{backend}-{case}-float64")
    for backend in ("reference", "chunked")
    for case in CASES
]


@pytest.mark.parametrize(("backend", "case", "dtype"), [*turned(CASES, AVAILABLE), *WIDE])
def test_softplus(backend, case, dtype):
    check_softplus(backend, case, dtype)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_strides(backend):
    check_strides(backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_same_bits_every_time(backend):
    check_same_bits_every_time(backend)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_non_finite_features_show(backend, bad, side):
    case = OPTIONS[0]
    t = make(case, torch.float32)
    t[side][3, 5] = bad
    stats = run(case, t, backend)
    loss = (stats.row_logsum - stats.row_pos).sum() + (stats.col_logsum - stats.col_pos).sum()
    assert not loss.isfinite()
    assert not run_softplus(case, t, backend).sum().isfinite()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 200.0])
def test_far_rows_do_not_underflow(backend, scale):
    check_far_rows_do_not_underflow(backend, scale)


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
