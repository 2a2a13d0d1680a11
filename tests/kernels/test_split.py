"""fp32 on AMX, as sums of three bf16: is it as accurate as fp32, for numbers of any size? On the
emulated tiles, and on real ones where there are any."""

import pytest
import torch
from support.problems import Case, dense, gradients, leaves, run
from torch.nn.functional import normalize

from ito_kernels.similarity.cpu import instruction_sets

TILES = [isa for isa in instruction_sets() if isa.startswith("amx")]

pytestmark = pytest.mark.skipif(not TILES, reason="needs AVX-512 with bf16 and a C++ compiler")


@pytest.fixture(params=TILES, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("ITO_CPU_ISA", request.param)


def problem(a: torch.Tensor, b: torch.Tensor, scale: float) -> dict:
    nothing = dict.fromkeys(("row_bias", "col_bias", "row_ids", "col_ids"))
    return {"a": a, "b": b, "scale": torch.tensor(scale)} | nothing


def duplicates(a, b):
    return a, a.clone()


def near(a, b):
    return a, normalize(a + 0.1 * b, dim=1)


def large(a, b):
    return 1000 * a, 1000 * b


def of_one_sign(a, b):
    return a.abs(), b.abs()


def uneven(a, b):
    """Features from 1e-6 to 1e6 in size."""
    sizes = torch.logspace(-6, 6, a.shape[1], dtype=a.dtype)
    return a * sizes, b / sizes


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize(("n", "d"), [(100, 64), (100, 512), (100, 4096), (800, 32)])
@pytest.mark.parametrize("kind", [duplicates, near, large, of_one_sign, uneven])
def test_as_accurate_as_fp32(kind, n, d, scale):
    """Scores within twice the error of dense fp32, gradients within three times, and no ε."""
    g = torch.Generator().manual_seed(d)
    a, b = torch.randn(2, n, d, generator=g, dtype=torch.float64)
    a, b = (x.float() for x in kind(normalize(a, dim=1), normalize(b, dim=1)))
    case = Case(n, n, d, positives="linear")
    scale /= (a.double() @ b.double().T).abs().max().item()
    w = torch.rand(2, n, generator=g) - 0.5

    def outcome(t, stats):
        total = (w[0] * (stats["row_lse"] - stats["row_linear"]) + w[1] * stats["col_lse"]).sum()
        return [stats["row_max"], stats["row_linear"], *gradients(total, t).values()]

    t = problem(a, b, scale)
    truth, same, ours = (leaves(t, ("a", "b")) for _ in range(3))
    found = run(case, ours, "cpu")
    row, col = found.row, found.col
    stats = {
        "row_max": row.max,
        "row_lse": row.max + row.logsum,
        "row_linear": row.pos + row.max,
        "col_lse": col.max + col.logsum,
    }
    exact = outcome(truth, dense(case, truth, torch.float64))
    peer = outcome(same, dense(case, same, torch.float32))
    for x, y, z, factor in zip(outcome(ours, stats), peer, exact, (2, 2, 3, 3), strict=True):
        assert (x.double() - z).abs().max() <= factor * (y.double() - z).abs().max()


@pytest.mark.parametrize("of_b", [1.0, 1e-14])
def test_small_numbers(of_b):
    """Features down to 1e-30, inner products too, lose no digit."""
    a, b = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))
    a, b, scale = a * 1e-30 / of_b, b * of_b, 1e30
    case = Case(40, 40, 50, positives="linear")
    truth, ours = (leaves(problem(a, b, scale), ("a", "b")) for _ in range(2))
    expected, row = dense(case, truth, torch.float64)["row_lse"], run(case, ours, "cpu").row
    torch.testing.assert_close((row.max + row.logsum).double(), expected, rtol=1e-6, atol=0)
    pairs = (gradients(x.sum(), t).values() for x, t in ((row.logsum, ours), (expected, truth)))
    for x, y in zip(*pairs, strict=True):
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()


def test_numbers_that_bf16_rounds_to_infinity():
    """fp32 has finite products with them, and so do the sums of parts."""
    largest = torch.finfo(torch.float32).max
    a, b = torch.zeros(2, 50), torch.linspace(-0.9, 0.9, 30)[:, None].repeat(1, 50)
    a[0, 7], a[1, 40] = largest, -3.395e38
    t = problem(a, b, 1e-37)
    case = Case(2, 30, 50, positives="linear", hardest=True)
    expected, row = dense(case, t, torch.float64), run(case, t, "cpu").row
    for x, name in ((row.max, "max"), (row.pos + row.max, "linear"), (row.neg_max, "neg_max")):
        torch.testing.assert_close(x.double(), expected[f"row_{name}"], rtol=3e-7, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite(value):
    """Their row is not finite, the statistics of other rows keep their bits."""
    a, b = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))
    case = Case(40, 40, 50, positives="linear", cols=False)
    before = run(case, problem(a, b, 1.0), "cpu").row
    a[7, 3] = value
    after = run(case, problem(a, b, 1.0), "cpu").row
    assert not (after.max + after.logsum)[7].isfinite()
    others = torch.arange(40) != 7
    for x, y in zip(before, after, strict=True):
        assert x is None or torch.equal(x[others], y[others])
