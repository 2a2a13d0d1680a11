# ruff: noqa: E501 (a call and its message read best on one line)
"""The global contrastive loss against its formula in fp64, and its moving averages over batches."""

import pytest
import torch
from support.formulas import unit
from support.problems import AVAILABLE

import ito_kernels as ik

F64 = torch.float64
N = 7


def g_of(x, y, tau_1, tau_2):
    """g1 and g2, (N,), one row after the other."""
    n, S = len(x), x @ y.T
    found = [], []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        found[0].append(((S[i, others] - S[i, i]) / tau_1[i]).exp().sum() / (n - 1))
        found[1].append(((S[others, i] - S[i, i]) / tau_2[i]).exp().sum() / (n - 1))
    return [torch.stack(rows) for rows in found]


def formula(x, y, temperature, u, gamma, eps=1e-14, rho=None):
    """The value, the gradients of x, y and the temperatures, and the new u, each as it is defined."""
    n, pair = len(x), isinstance(temperature, tuple)
    taus = [t.detach().clone() for t in (temperature if pair else (temperature,) * 2)]
    rows = [t.expand(n).clone().requires_grad_() for t in taus]
    x, y = (z.detach().clone().requires_grad_() for z in (x, y))
    g = g_of(x, y, *rows)
    u = [
        torch.where(a == 0, b, (1 - gamma) * a + gamma * b).detach()
        for a, b in zip(u, g, strict=True)
    ]
    logs = [(eps + a).log() for a in u]
    value = sum((t * a).mean() for t, a in zip(rows, logs, strict=True)).detach()
    if rho is not None:
        value = value + rho * sum(rows).mean().detach()
    parts = [(t.detach() * b / (eps + a)).mean() for t, a, b in zip(rows, u, g, strict=True)]
    *features, grad_1, grad_2 = torch.autograd.grad(sum(parts), [x, y, *rows])
    grads = [b + (a + (rho or 0)) / n for a, b in zip(logs, (grad_1, grad_2), strict=True)]
    if not pair:
        grads = [sum(grads).sum()]
    return value, [*features, *grads], u


def moving_averages(n, dtype=F64, some_zero=True):
    u = [
        10 * torch.rand(n, dtype=dtype, generator=torch.Generator().manual_seed(s)) for s in (3, 4)
    ]
    if some_zero:
        u[0][::3], u[1][1] = 0, 0
    return u


def temperature_of(kind, n, low=0.2):
    if kind == "pair":
        ends = (low, 0.9), (0.7, low)
        return tuple(torch.linspace(*end, n, dtype=F64).requires_grad_() for end in ends)
    return torch.tensor(low, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["one", "pair"])
@pytest.mark.parametrize("rho", [None, 6.5])
@pytest.mark.parametrize(
    ("n", "gamma", "eps"), [(2, 0.3, 1e-14), (N, 0.9, 0.5), (N, 1.0, 0), (N, 0, 1e-3)]
)
def test_formula(n, gamma, eps, rho, kind, backend):
    x, y = unit(n, 5).requires_grad_(), unit(n, 5, seed=1).requires_grad_()
    temperature, u = temperature_of(kind, n), moving_averages(n)
    truth, grads, averages = formula(x, y, temperature, u, gamma, eps, rho)
    before = [a.clone() for a in u]
    loss, *found = ik.global_contrastive_loss(
        x, y, temperature, *u, gamma=gamma, eps=eps, rho=rho, backend=backend
    )
    leaves = [x, y, *(temperature if kind == "pair" else (temperature,))]
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b, old, unchanged in zip(found, averages, u, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
        assert not a.requires_grad
        assert torch.equal(old, unchanged)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["one", "pair"])
def test_every_backend(kind, dtype, backend):
    """Half precision is computed in fp32; only the gradients are rounded."""
    x, y = (unit(40, 24, seed=s).to(dtype).requires_grad_() for s in range(2))
    temperature, u = temperature_of(kind, 40, low=0.05), moving_averages(40)
    truth, grads, averages = formula(x.double(), y.double(), temperature, u, 0.6, rho=1.0)
    loss, *found = ik.global_contrastive_loss(
        x, y, temperature, *(a.float() for a in u), gamma=0.6, rho=1.0, backend=backend
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    leaves = [x, y, *(temperature if kind == "pair" else (temperature,))]
    for leaf, a, b in zip(leaves, torch.autograd.grad(loss, leaves), grads, strict=True):
        assert (a - b).abs().max() <= (1e-5 + torch.finfo(leaf.dtype).eps) * b.abs().max()
    for a, b in zip(found, averages, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong_pairs", [False, True])
def test_what_fp32_cannot_hold(wrong_pairs):
    """At a temperature of 0.005, g is e^±200 or so. Value and gradients are those of fp64; u is the
    largest number, or 0, and at the next step counts as one."""
    x = torch.eye(N)[: N - 1]
    y = (x.roll(1, 0) if wrong_pairs else x).clone().requires_grad_()
    tau, u = torch.tensor(0.005, requires_grad=True), torch.zeros(2, N - 1)
    truth, grads, averages = formula(x.double(), y.double(), tau.double(), u.double(), 0.4, 0, 1.0)
    loss, *found = ik.global_contrastive_loss(x, y, tau, *u, gamma=0.4, eps=0, rho=1.0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, [y, tau]), grads[1:], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    limit = torch.finfo(torch.float32).max if wrong_pairs else 0
    for a, b in zip(found, averages, strict=True):
        assert (b > 1e38).all() if wrong_pairs else (b < 1e-45).all()
        assert (a == limit).all()
    again = ik.global_contrastive_loss(x, y, tau, *found, gamma=0.4, eps=0)
    assert all(z.isfinite().all() for z in again)


def test_with_gamma_of_one_the_gradient_is_that_of_the_batch():
    """Without a history, g/u is 1 and the loss is a decoupled InfoNCE of the batch, up to log(N-1)."""
    x, y = unit(N, 5).requires_grad_(), unit(N, 5, seed=1).requires_grad_()
    loss, *_ = ik.global_contrastive_loss(x, y, 0.2, *moving_averages(N), gamma=1, eps=0)
    truth = 2 * 0.2 * ik.decoupled_contrastive_loss(x, y, 5.0)
    for a, b in zip(*(torch.autograd.grad(z, [x, y]) for z in (loss, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_features_that_are_not_finite_show(wrong):
    x, y = unit(6, 4, dtype=torch.float32), unit(6, 4, seed=1, dtype=torch.float32)
    bad = x.clone()
    bad[2, 0] = wrong
    for pair in ((bad, y), (y, bad)):
        loss, *_ = ik.global_contrastive_loss(*pair, 0.1, *torch.zeros(2, 6), gamma=0.5)
        assert not loss.isfinite()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_infinite_feature_shows_if_it_makes_its_pair_the_best(backend):
    """Its row has a positive of +inf and negatives of -inf, which no exponential shows."""
    x, y = unit(6, 4, dtype=torch.float32), unit(6, 4, seed=1, dtype=torch.float32)
    x[2, 0], y[:, 0], y[2, 0] = torch.inf, -0.1, 0.1
    assert not ik.global_contrastive_loss(
        x, y, 0.1, *torch.zeros(2, 6), gamma=0.5, backend=backend
    )[0].isfinite()


def test_autocast():
    """Features as autocast rounds them, everything else in fp32."""
    x, y = (unit(20, 8, seed=s, dtype=torch.float32) for s in range(2))
    u = moving_averages(20, torch.float32)
    truth = ik.global_contrastive_loss(*(z.bfloat16().float() for z in (x, y)), 0.1, *u, gamma=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = ik.global_contrastive_loss(x, y, 0.1, *u, gamma=0.5)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


# ---- the module


def test_the_module_keeps_the_averages_of_the_data_set():
    module, u = ik.GlobalContrastiveLoss(20, gamma=0.3, rho=2.0), torch.zeros(2, 20)
    for step in range(4):
        indices = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:N]
        x, y = unit(N, 5, seed=step, dtype=torch.float32), unit(N, 5, seed=9, dtype=torch.float32)
        truth, _, averages = formula(
            x.double(),
            y.double(),
            torch.tensor(0.2, dtype=F64),
            u[:, indices].double(),
            0.3,
            rho=2.0,
        )
        loss = module(x, y, 0.2, indices)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        u[:, indices] = torch.stack(averages).float()
        torch.testing.assert_close(torch.stack([module.u_image, module.u_text]), u)
    other = ik.GlobalContrastiveLoss(20, gamma=0.3, rho=2.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.u_text, module.u_text)
    assert other(x, y, 0.2, indices) == module(x, y, 0.2, indices)
    before = module.u_image.clone()
    module.eval()(x, y, 0.2, indices)
    assert torch.equal(module.u_image, before)
    options = "num_samples=20, gamma=0.3, eps=1e-14, rho=2.0, group=None, chunk_size=None"
    assert repr(module) == f"GlobalContrastiveLoss({options})"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_the_averages(wrong):
    x, y = unit(5, 4, dtype=torch.float32), unit(5, 4, seed=1, dtype=torch.float32)
    module, indices = ik.GlobalContrastiveLoss(9), torch.arange(5)
    module(x, y, 0.2, indices)
    before = [u.clone() for u in module.buffers()]
    bad = x.clone()
    bad[2, 0] = wrong
    assert not module(bad, y, 0.2, indices).isfinite()
    for u, old in zip(module.buffers(), before, strict=True):
        assert u.isfinite().all()
        assert (u == old)[2]
    assert module(x, y, 0.2, indices).isfinite()


def test_of_equal_indices_the_last_row_is_kept():
    x, y = unit(5, 4, dtype=torch.float32), unit(5, 4, seed=1, dtype=torch.float32)
    module = ik.GlobalContrastiveLoss(9)
    module(x, y, 0.2, torch.tensor([3, 8, 3, 0, 3]))
    _, u_image, u_text = ik.global_contrastive_loss(x, y, 0.2, *torch.zeros(2, 5), gamma=0.9)
    for kept, u in ((module.u_image, u_image), (module.u_text, u_text)):
        expected = torch.zeros(9)
        expected[3], expected[8], expected[0] = u[4], u[1], u[3]
        assert torch.equal(kept, expected)


X, U, TAU = torch.randn(5, 3), torch.zeros(5), torch.full((5,), 0.1)


def call(x=X, y=X, temperature=0.1, u_image=U, u_text=U, gamma=0.5, **options):
    return ik.global_contrastive_loss(x, y, temperature, u_image, u_text, gamma=gamma, **options)


BAD = [
    (ValueError, "image_features must have at least 2 rows, got 1", lambda: call(X[:1], X[:1], u_image=U[:1], u_text=U[:1])),
    (ValueError, "image_features and text_features must have the same number of rows, got 5 and 4", lambda: call(y=X[:4])),
    (ValueError, r"u_image must have shape \(5,\), .* got \(4,\)", lambda: call(u_image=U[:4])),
    (ValueError, r"u_text must have shape \(5,\), .* got \(5, 1\)", lambda: call(u_text=U[:, None])),
    (TypeError, "u_text must be a tensor, got list", lambda: call(u_text=[0.0] * 5)),
    (TypeError, "u_image must be float32 or float64, got torch.bfloat16", lambda: call(u_image=U.bfloat16())),
    (ValueError, "u_image must be 0 or more, got -1 to 0", lambda: call(u_image=U - (X[:, 0] == X[2, 0]).float())),
    (ValueError, "u_image must be 0 or more, got nan to nan", lambda: call(u_image=U * torch.nan)),
    (ValueError, "u_text must not require a gradient", lambda: call(u_text=U.clone().requires_grad_())),
    (ValueError, "u_text must be on cpu like image_features, got meta", lambda: call(u_text=U.to("meta"))),
    (ValueError, "gamma must be from 0 to 1, got 1.5", lambda: call(gamma=1.5)),
    (TypeError, "gamma must be a number, got NoneType", lambda: call(gamma=None)),
    (ValueError, "eps must be from 0 upwards, finite, got -1", lambda: call(eps=-1)),
    (ValueError, "rho must be from 0 upwards, finite, got -2", lambda: call(rho=-2)),
    (ValueError, "temperature must be finite and greater than 0, got 0", lambda: call(temperature=0.0)),
    (TypeError, "temperature must be a number or a tensor, got str", lambda: call(temperature="a")),
    (ValueError, r"temperature must be .* a pair of \(N,\) tensors, got shape \(5,\)", lambda: call(temperature=TAU)),
    (ValueError, r"temperature must be .* a pair of \(N,\) tensors, got 3 of them", lambda: call(temperature=(TAU, TAU, TAU))),
    (ValueError, r"temperature\[1\] must have shape \(5,\), got a single number", lambda: call(temperature=(TAU, 0.1))),
    (ValueError, r"temperature\[0\] must .* shape \(5,\), got \(4,\)", lambda: call(temperature=(TAU[:4], TAU))),
    (ValueError, "indices must be row numbers of 9 samples, 0 to 8, got 5 to 9", lambda: ik.GlobalContrastiveLoss(9)(X, X, 0.1, torch.arange(5, 10))),
    (ValueError, "indices must be row numbers of 9 samples, 0 to 8, got -1 to 3", lambda: ik.GlobalContrastiveLoss(9)(X, X, 0.1, torch.arange(-1, 4))),
    (ValueError, r"indices must have shape \(5,\), one id for each row of image_features, got \(4,\)", lambda: ik.GlobalContrastiveLoss(9)(X, X, 0.1, torch.arange(4))),
    (TypeError, "indices must have an integer dtype, got torch.float32", lambda: ik.GlobalContrastiveLoss(9)(X, X, 0.1, U)),
    (TypeError, "indices must be a tensor of integers, got list", lambda: ik.GlobalContrastiveLoss(9)(X, X, 0.1, [0, 1, 2, 3, 4])),
    (ValueError, "num_samples must be at least 1, got 0", lambda: ik.GlobalContrastiveLoss(0)),
    (TypeError, "num_samples must be a whole number, got 2.5", lambda: ik.GlobalContrastiveLoss(2.5)),
    (ValueError, "gamma must be from 0 to 1, got -0.1", lambda: ik.GlobalContrastiveLoss(9, gamma=-0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
