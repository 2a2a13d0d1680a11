"""Problems whose elements are counted beyond 2^31: N·D in memory, N·M in the loops.

Rows repeat those of a small problem, of which the dense fp64 formula gives every result: a row has
the statistics and the gradient of the one that it repeats, a column sums over so many more.
The CUDA kernels are tested at such addresses by tests/cpp/test_simt_kernels.cpp.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from ito_kernels.similarity import dispatch
from ito_kernels.similarity.cpu import WIDEST
from ito_kernels.similarity.spec import Needs, Problem, SideUpstream, Upstream

reference = dispatch.load("reference")


def check(backend: str, base: torch.Tensor, times: int, keys: torch.Tensor) -> None:
    """`base` repeated so many times against `keys`, with gradients of the rows' logsumexp."""
    scale = torch.tensor(3.0)
    small = Problem(base, keys, scale)
    exact = Problem(base.double(), keys.double(), scale.double())
    problem = small._replace(a=base.repeat(times, 1))
    n = len(problem.a)
    chosen = dispatch.load(backend)
    assert chosen.supports(problem)[0]
    total, stats, grads = chosen.logsumexp_both(
        problem, True, Upstream(SideUpstream(torch.ones(n)), SideUpstream()), Needs(True, True)
    )
    truth = reference.logsumexp_forward(exact)
    upstream = Upstream(SideUpstream(torch.ones(len(base)).double()), SideUpstream())
    expected = reference.logsumexp_backward(exact, truth, upstream, Needs(True, True))
    close = (
        {"rtol": 1e-4, "atol": 1e-4}
        if base.dtype == torch.float32
        else {"rtol": 2e-2, "atol": 2e-2}
    )
    rows = truth.row_max + truth.row_logsum
    columns = truth.col_max + truth.col_logsum + math.log(times)
    for part in (stats.row_max + stats.row_logsum).split(len(base)):
        torch.testing.assert_close(part.double(), rows, **close)
    torch.testing.assert_close((stats.col_max + stats.col_logsum).double(), columns, **close)
    torch.testing.assert_close(total.double(), times * truth.row_logsum.sum(), rtol=1e-3, atol=0)
    for part in grads.a.split(len(base)):
        torch.testing.assert_close(part.double(), expected.a, **close)
    torch.testing.assert_close(grads.b.double() / times, expected.b, **close)


def rows(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normalize(torch.randn(n, d), dim=1).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_pairs_beyond_32_bits(backend):
    """N·M = 66,000² > 2^32."""
    check(backend, rows(100, 8), 660, rows(66_000, 8))


@pytest.mark.slow
def test_features_beyond_32_bits():
    """N·D = 1.1·2^31 elements, 4.7 GB, and as much for their gradient."""
    check("cpu", rows(1000, 520, torch.bfloat16), 4550, rows(33, 520, torch.bfloat16))


@pytest.mark.slow
def test_the_widest_features():
    """Where D·64, the elements of a panel of columns, is nearly 2^30: 2.2 GB for 33 rows."""
    check("cpu", rows(3, WIDEST - 1), 11, rows(2, WIDEST - 1))


def test_wider_features_are_refused_by_name():
    x = torch.empty(1, 1).expand(1, WIDEST)
    ok, reason = dispatch.load("cpu").supports(Problem(x, x, torch.tensor(1.0)))
    assert (ok, reason) == (False, f"takes fewer than 2^24 features, got {WIDEST}")
