"""Robust InfoNCE against its formula in fp64."""

import pytest
import torch
from support.formulas import check, unit
from support.problems import AVAILABLE

import ito_kernels as ik

F64 = torch.float64


def rows(S, q, lam):
    """One direction, as the paper writes it."""
    positive = S.diagonal()
    return (-(q * positive).exp() / q + (lam * S.exp().sum(1)).pow(q) / q).mean()


def formula(x, y, scale, q, lam, symmetric=True):
    S = scale.reshape(-1, 1) * (x @ y.T)
    return 0.5 * (rows(S, q, lam) + rows(S.T, q, lam)) if symmetric else rows(S, q, lam)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("q", "lam"), [(0.01, 0.01), (0.3, 0.5), (1.0, 1.0), (1, 0.02), (0.5, 3)])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_formula(n, q, lam, symmetric, backend):
    x, y = unit(n, 5).requires_grad_(), unit(n, 5, seed=1).requires_grad_()
    for scale in (torch.tensor(6.0, dtype=F64), torch.linspace(1, 9, n, dtype=F64)):
        scale = scale.requires_grad_()
        loss = ik.rince_loss(x, y, scale, q=q, lam=lam, symmetric=symmetric, backend=backend)
        check(loss, formula(x, y, scale, q, lam, symmetric), [x, y, scale])


def test_lam_of_zero_leaves_the_positives():
    x, y = unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    truth = -(0.3 * 6 * (x * y).sum(1)).exp().mean() / 0.3
    check(ik.rince_loss(x, y, 6.0, q=0.3, lam=0), truth, [x, y])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lam", [0.01, 0.5])
def test_overflow_comes_with_q_times_s_only(lam, sign):
    """Scores of ±200 would overflow e^S in fp32; q·S is 60."""
    x = unit(8, 5)

    def value_and_grad(loss, dtype):
        leaf = x.to(dtype).requires_grad_()
        value = loss(leaf, sign * leaf.detach())
        return value, *torch.autograd.grad(value, leaf)

    scale = torch.tensor(200.0, dtype=F64)
    truth = value_and_grad(lambda a, b: formula(a, b, scale, 0.3, lam), F64)
    found = value_and_grad(lambda a, b: ik.rince_loss(a, b, 200.0, q=0.3, lam=lam), torch.float32)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_converged_batch_keeps_its_digits():
    """With λ = 1 the two powers differ by 1e-8 of their value: fp32 would subtract them to 0."""
    x = torch.eye(8, dtype=F64)

    def value_and_grad(dtype, loss):
        leaf = x.to(dtype, copy=True).requires_grad_()
        value = loss(leaf)
        return value, *torch.autograd.grad(value, leaf)

    scale = torch.tensor(20.0, dtype=F64)
    truth = value_and_grad(F64, lambda leaf: formula(leaf, x, scale, 0.5, 1.0))
    found = value_and_grad(
        torch.float32, lambda leaf: ik.rince_loss(leaf, x.float(), 20.0, q=0.5, lam=1.0)
    )
    assert truth[0] < 1e-7 * torch.e**10
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend(dtype, backend):
    """The error against fp64 is at most twice that of dense PyTorch (gradients: three times)."""
    given = [unit(40, 24, seed=s).to(dtype) for s in range(2)]

    def value_and_grads(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        value = loss(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    def dense(x, y):
        return formula(x, y, torch.tensor(20.0, dtype=x.dtype), 0.2, 0.05)

    def ours(x, y):
        return ik.rince_loss(x, y, 20.0, q=0.2, lam=0.05, backend=backend)

    truth, peer = value_and_grads(dense, F64), value_and_grads(dense, dtype)
    for i, (a, b, t) in enumerate(zip(value_and_grads(ours, dtype), peer, truth, strict=True)):
        factor, eps = (3, 1e-6 + torch.finfo(dtype).eps) if i else (2, 1e-6)
        peer_error = (b - t).abs().max().nan_to_num(torch.inf)
        assert (a - t).abs().max() <= factor * peer_error + eps * t.abs().max()


def test_features_that_are_not_finite_show():
    x, y = unit(6, 4, dtype=torch.float32), unit(6, 4, seed=1, dtype=torch.float32)
    for wrong in (torch.nan, torch.inf):
        bad = x.clone()
        bad[2, 0] = wrong
        for a, b in ((bad, y), (y, bad)):
            for symmetric in (True, False):
                loss = ik.rince_loss(a, b, 5.0, q=0.5, lam=0.1, symmetric=symmetric)
                assert not loss.isfinite()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_infinite_feature_shows_if_it_makes_its_pair_the_best(backend):
    """Its row has a positive of +inf and negatives of -inf, which no exponential shows."""
    x, y = unit(6, 4, dtype=torch.float32), unit(6, 4, seed=1, dtype=torch.float32)
    x[2, 0], y[:, 0], y[2, 0] = torch.inf, -0.1, 0.1
    assert not ik.rince_loss(x, y, 5.0, q=0.5, lam=1, backend=backend).isfinite()


X = torch.randn(5, 3)
BAD = [
    (ValueError, "q must be greater than 0 and at most 1, got 0", {"q": 0}),
    (ValueError, "q must be greater than 0 and at most 1, got 1.5", {"q": 1.5}),
    (ValueError, "q must be greater than 0 and at most 1, got nan", {"q": float("nan")}),
    (TypeError, "q must be a number, got str", {"q": "a"}),
    (TypeError, "q must be a number, got NoneType", {"q": None}),
    (ValueError, "lam must be from 0 upwards, finite, got -0.1", {"lam": -0.1}),
    (ValueError, "lam must be from 0 upwards, finite, got inf", {"lam": float("inf")}),
    (TypeError, "lam must be a number, got NoneType", {"lam": None}),
    (TypeError, "symmetric must be True or False, got 1", {"symmetric": 1}),
    (ValueError, "logit_scale must be finite and greater than 0, got 0", {"logit_scale": 0.0}),
    (ValueError, "must have the same number of rows, got 5 and 4", {"keys": X[:4]}),
]


@pytest.mark.parametrize(("error", "message", "wrong"), BAD)
def test_bad_input(error, message, wrong):
    arguments = {"queries": X, "keys": X, "logit_scale": 1.0, "q": 0.5, "lam": 0.1}
    with pytest.raises(error, match=message):
        ik.rince_loss(**arguments | wrong)


def test_gradients_overflow_only_with_the_loss():
    """q·S is 60; the negative is 35 above the positive."""
    x = torch.eye(4)[:2].clone().requires_grad_()
    y = torch.tensor([[0.65, 0.0, 0.0, 0.76], [1.0, 0.0, 0.0, 0.0]])
    loss = ik.rince_loss(x, y, 100.0, q=0.6, lam=0.5, symmetric=False)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert grad.isfinite().all()
