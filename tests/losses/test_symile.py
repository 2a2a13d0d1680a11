# ruff: noqa: E501 (a call and its message read best on one line)
"""The multilinear loss of two and more modalities against its formula in fp64."""

import pytest
import torch
from support.formulas import check, infonce, unit
from support.problems import AVAILABLE
from torch.nn.functional import cross_entropy

import ito_kernels as ik
from ito_kernels.losses import symile

F64 = torch.float64
PLAIN = ["reference", "chunked"]


def features(count, n, d=5, dtype=F64):
    return [unit(n, d, seed=s, dtype=dtype).requires_grad_() for s in range(count)]


def scale_of(n, per_row):
    scale = torch.linspace(1, 9, n, dtype=F64) if per_row else torch.tensor(6.0, dtype=F64)
    return scale.requires_grad_()


def product(tensors):
    return torch.stack(tensors).prod(0)


def shuffled(modalities, scale, generator):
    """One modality after the other as the anchor, with the dense matrix."""
    n, total = len(modalities[0]), 0
    for index, anchor in enumerate(modalities):
        others = [x for i, x in enumerate(modalities) if i != index]
        candidates = product([x[torch.randperm(n, generator=generator)] for x in others])
        own = (anchor * product(others)).sum(1)
        S = torch.where(torch.eye(n, dtype=torch.bool), own, anchor @ candidates.T)
        total = total + cross_entropy(scale.reshape(-1, 1) * S, torch.arange(n))
    return total / len(modalities)


def all_triples(modalities, scale):
    """From the cube of all products <x_i, y_j ∘ z_k>."""
    cube, total = torch.einsum("id,jd,kd->ijk", *modalities), 0
    n = len(cube)
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        S = scale.reshape(-1, 1) * cube.permute(axes).reshape(n, -1)
        total = total + cross_entropy(S, torch.arange(n) * (n + 1))
    return total / 3


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("count", "n"), [(2, 9), (3, 1), (3, 2), (3, 12), (5, 6)])
def test_shuffled(count, n, per_row, backend):
    modalities, scale = features(count, n), scale_of(n, per_row)
    truth = shuffled(modalities, scale, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    loss = ik.symile_loss(modalities, scale, generator=g, backend=backend)
    check(loss, truth, [*modalities, scale])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_all(n, block, per_row, backend, monkeypatch):
    """In blocks of one row, of some that do not divide N, and in one block."""
    monkeypatch.setattr(symile, "BLOCK_NUMBERS", block * n * 5)
    modalities, scale = features(3, n), scale_of(n, per_row)
    loss = ik.symile_loss(modalities, scale, negatives="all", backend=backend)
    check(loss, all_triples(modalities, scale), [*modalities, scale])


@pytest.mark.parametrize("trained", range(4))
def test_all_with_one_part_trained(trained):
    """The gradients that are not asked for are not computed."""
    leaves = [*features(3, 7), scale_of(7, False)]
    for i, x in enumerate(leaves):
        x.requires_grad_(i == trained)
    *modalities, scale = leaves
    loss = ik.symile_loss(modalities, scale, negatives="all", backend="chunked")
    check(loss, all_triples(modalities, scale), [leaves[trained]])


@pytest.mark.parametrize("backend", PLAIN)
def test_all_of_two_modalities_is_clip(backend):
    x, y = features(2, 9)
    scale, ids = scale_of(9, False), range(9)
    loss = ik.symile_loss([x, y], scale, negatives="all", backend=backend)
    check(loss, infonce(x, y, scale, ids, ids), [x, y, scale])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_on_every_backend(dtype, backend):
    """The error against fp64 is at most twice that of dense PyTorch (gradients: three times)."""
    half = dtype != torch.float32
    given = [x.detach().to(dtype) for x in features(3, 20, 16)]
    scale = torch.tensor(30.0, dtype=F64)

    def value_and_grads(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        value = loss(leaves, scale.to(dtype))
        return [value, *torch.autograd.grad(value, leaves)]

    def ours(modalities, _):
        return ik.symile_loss(modalities, 30.0, negatives="all", backend=backend)

    truth = value_and_grads(all_triples, F64)
    dense, found = value_and_grads(all_triples, dtype), value_and_grads(ours, dtype)
    for i, (a, b, t) in enumerate(zip(found, dense, truth, strict=True)):
        factor, eps = (3, 1e-3 if half else 1e-6) if i else (2, 1e-6)
        assert (a - t).abs().max() <= factor * (b - t).abs().max() + eps * t.abs().max()


def test_without_a_generator_it_follows_the_seed():
    modalities = features(3, 9)
    torch.manual_seed(3)
    first = ik.symile_loss(modalities, 5.0)
    assert ik.symile_loss(modalities, 5.0) != first
    torch.manual_seed(3)
    assert ik.symile_loss(modalities, 5.0) == first


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_features_that_are_not_finite_show(wrong):
    modalities = [x.detach() for x in features(3, 6)]
    modalities[1][2, 0] = wrong
    assert not ik.symile_loss(modalities, 5.0, negatives="all").isfinite()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_infinite_feature_shows_if_it_makes_its_pair_the_best(backend):
    """Its row has a positive of +inf and negatives of -inf, which no exponential shows."""
    x, y = (x.detach().float() for x in features(2, 6))
    x[2, 0], y[:, 0], y[2, 0] = torch.inf, -0.1, 0.1
    assert not ik.symile_loss([x, y], 5.0, negatives="all", backend=backend).isfinite()


X, G = torch.randn(5, 3), torch.Generator()
BAD = [
    (TypeError, "modalities must be a sequence of tensors, got Tensor", lambda: ik.symile_loss(torch.stack([X, X]), 1.0)),
    (ValueError, "modalities must hold at least 2 tensors, got 1", lambda: ik.symile_loss([X], 1.0)),
    (TypeError, r"modalities\[2\] must be a tensor of shape \(N, D\), got int", lambda: ik.symile_loss([X, X, 3], 1.0)),
    (ValueError, r"modalities\[0\] and modalities\[3\] must have the same number of rows, got 5 and 4", lambda: ik.symile_loss([X, X, X, X[:4]], 1.0)),
    (ValueError, r"modalities\[0\] and modalities\[1\] must have the same number of rows, got 5 and 4", lambda: ik.symile_loss([X, X[:4]], 1.0)),
    (ValueError, r"modalities\[0\] and modalities\[2\] must have the same width D, got 3 and 2", lambda: ik.symile_loss([X, X, X[:, :2]], 1.0)),
    (ValueError, "negatives must be one of 'shuffled', 'all', got 'n'", lambda: ik.symile_loss([X, X], 1.0, negatives="n")),
    (ValueError, r'negatives="all" takes at most 3 modalities, got 4', lambda: ik.symile_loss([X] * 4, 1.0, negatives="all")),
    (ValueError, 'generator is for negatives="shuffled"', lambda: ik.symile_loss([X, X], 1.0, negatives="all", generator=G)),
    (TypeError, "generator must be a torch.Generator or None, got int", lambda: ik.symile_loss([X, X], 1.0, generator=3)),
    (ValueError, "logit_scale must be finite and greater than 0, got 0", lambda: ik.symile_loss([X, X], 0)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
