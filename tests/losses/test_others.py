# ruff: noqa: E501 (a call and its message read best on one line)
"""Decoupled, retrieval, soft-target and geometric losses against their formulas in fp64."""

import math

import pytest
import torch
from support.formulas import check, random_ids, unit
from support.problems import AVAILABLE
from torch.nn.functional import cross_entropy, log_softmax, normalize

import ito_kernels as ik

F64, BF16 = torch.float64, torch.bfloat16
PLAIN = ["reference", "chunked"]


def leaf(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


# ---- decoupled


def decoupled(S, row_ids, col_ids, softmax, exclude_self=False):
    """One direction: for each anchor its positives against its negatives."""
    total, anchors = torch.zeros((), dtype=F64), 0
    for i in range(len(S)):
        if row_ids[i] < 0:
            continue
        anchors += 1
        keys = [j for j in range(S.shape[1]) if col_ids[j] >= 0 and not (exclude_self and i == j)]
        pos = [S[i, j] for j in keys if col_ids[j] == row_ids[i]]
        neg = [S[i, j] for j in keys if col_ids[j] != row_ids[i]]
        if not pos or not neg:
            continue
        others = sum(s.exp() for s in neg)
        for p in pos:
            log_denominator = (others + p.exp()).log() if softmax else others.log()
            total = total + (log_denominator - p) / len(pos)
    return total / max(anchors, 1)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 5, 3), (13, 9, 5), (6, 17, 40)])
def test_decoupled(n, m, d, softmax, symmetric, backend):
    q, k = unit(n, d).requires_grad_(), unit(m, d, seed=1).requires_grad_()
    scale = leaf(4.0)
    ids = random_ids(n, 4, 2, padded=n > 1), random_ids(m, 4, 3, padded=n > 1)
    loss = ik.decoupled_softmax_loss if softmax else ik.decoupled_contrastive_loss
    ours = loss(q, k, scale, query_ids=ids[0], key_ids=ids[1], symmetric=symmetric, backend=backend)
    truth = decoupled(scale * q @ k.T, *ids, softmax)
    if symmetric:
        truth = 0.5 * (truth + decoupled((scale * q @ k.T).T, *ids[::-1], softmax))
    if truth.requires_grad:
        check(ours, truth, [q, k, scale])
    else:
        assert ours == 0


@pytest.mark.parametrize("softmax", [True, False])
def test_decoupled_pairs_and_a_scale_per_query(softmax):
    q, k = unit(8, 5).requires_grad_(), unit(8, 5, seed=1).requires_grad_()
    scale = torch.linspace(1, 8, 8, dtype=F64, requires_grad=True)
    loss = ik.decoupled_softmax_loss if softmax else ik.decoupled_contrastive_loss
    S, ids = scale[:, None] * (q @ k.T), range(8)
    truth = 0.5 * (decoupled(S, ids, ids, softmax) + decoupled(S.T, ids, ids, softmax))
    check(loss(q, k, scale), truth, [q, k, scale])
    if softmax:  # with one positive it is InfoNCE
        check(loss(q, k, scale), ik.clip_loss(q, k, scale), [q, k, scale])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
def test_decoupled_without_self(softmax, symmetric, backend):
    """Towers that differ, so that (i, i) is no key with itself; some anchors have no positives."""
    q, k, scale = unit(11, 5).requires_grad_(), unit(11, 5, seed=1).requires_grad_(), leaf(4.0)
    ids = random_ids(11, 4, 2, padded=True), random_ids(11, 4, 3, padded=True)
    loss = ik.decoupled_softmax_loss if softmax else ik.decoupled_contrastive_loss
    options = {"symmetric": symmetric, "exclude_self": True, "backend": backend}
    ours = loss(q, k, scale, query_ids=ids[0], key_ids=ids[1], **options)
    S = scale * q @ k.T
    truth = decoupled(S, *ids, softmax, exclude_self=True)
    if symmetric:
        truth = 0.5 * (truth + decoupled(S.T, *ids[::-1], softmax, exclude_self=True))
    check(ours, truth, [q, k, scale])
    for given in ({}, {"query_ids": torch.arange(11)}):  # only (i, i) would be positive
        empty = loss(q, k, scale, **given, **options)
        assert empty == 0
        assert not any(g.any() for g in torch.autograd.grad(empty, [q, k, scale]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_decoupled_contrastive_loss_of_two_views(symmetric):
    """DCL as its paper writes it: for view k of item i, the other view against both views of all
    other items. Two towers of the same features give it too, with self left out."""
    views, scale = unit(2, 6, 5).requires_grad_(), leaf(7.0)
    total = 0
    for view in range(2):
        for i in range(6):
            others = [views[v, j] @ views[view, i] for v in range(2) for j in range(6) if j != i]
            positive = scale * (views[0, i] @ views[1, i])
            total = total - positive + (scale * torch.stack(others)).exp().sum().log()
    z, ids = views.flatten(0, 1), torch.arange(6).repeat(2)
    options = {"query_ids": ids, "key_ids": ids, "exclude_self": True}
    ours = ik.decoupled_contrastive_loss(z, z, scale, **options, symmetric=symmetric)
    check(ours, total / 12, [views, scale])  # S is symmetric


def test_sincere():
    """As its paper writes it: each pair of a class against the other classes alone."""
    z, labels, scale = unit(12, 5).requires_grad_(), torch.arange(12) % 3, leaf(6.0)
    total = 0
    for s in range(12):
        same = [p for p in range(12) if labels[p] == labels[s] and p != s]
        noise = sum((scale * z[s] @ z[n]).exp() for n in range(12) if labels[n] != labels[s])
        for p in same:
            e = (scale * z[s] @ z[p]).exp()
            total = total - (e / (e + noise)).log() / len(same)
    options = {"query_ids": labels, "key_ids": labels, "exclude_self": True, "symmetric": False}
    check(ik.decoupled_softmax_loss(z, z, scale, **options), total / 12, [z, scale])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_decoupled_pairs(monkeypatch, weighted, exclude_self, backend):
    """Query 2 has no positive, query 3 no negative; the pair (0, 1) is listed twice."""
    monkeypatch.setattr("ito_kernels.similarity.panelwise.panel_rows", lambda columns: 3)
    n, m = (7, 7) if exclude_self else (7, 9)
    q, k = unit(n, 5).requires_grad_(), unit(m, 5, seed=1).requires_grad_()
    scale = torch.linspace(1, 8, n, dtype=F64, requires_grad=True)
    pairs = [(0, 1), (0, 1), (0, 0), (1, 4), (4, 4), (4, 0), (5, 3), (6, 2), (6, 5)]
    pairs = torch.tensor(pairs + [(3, j) for j in range(m)])
    g = torch.Generator().manual_seed(4)
    weights = torch.rand(len(pairs), generator=g, dtype=F64) if weighted else None
    if weighted:
        weights[5] = 0  # (4, 0) is a negative
    given = torch.ones(len(pairs), dtype=F64) if weights is None else weights
    S, total = scale[:, None] * (q @ k.T), 0
    for i in range(n):
        mine = {}
        for (a, b), w in zip(pairs.tolist(), given, strict=True):
            if a == i and w > 0 and not (exclude_self and a == b):
                mine[b] = mine.get(b, 0) + w
        negatives = [j for j in range(m) if j not in mine and not (exclude_self and i == j)]
        if not mine or not negatives:
            continue
        noise = S[i, negatives].exp().sum()
        for p, w in mine.items():
            term = (S[i, p].exp() + noise).log() - S[i, p]
            total = total + w / sum(mine.values()) * term
    options = {"positive_pairs": pairs, "positive_weights": weights, "symmetric": False}
    ours = ik.decoupled_softmax_loss(
        q, k, scale, exclude_self=exclude_self, backend=backend, **options
    )
    check(ours, total / n, [q, k, scale])


def test_decoupled_pairs_of_none_and_of_a_bad_query():
    q, k = unit(4, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_()
    none = torch.empty(0, 2, dtype=torch.long)
    loss = ik.decoupled_softmax_loss(q, k, 5.0, symmetric=False, positive_pairs=none)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [q, k]))
    bad = q.detach().clone()
    bad[3] = torch.nan  # a query without positives
    one = torch.tensor([[0, 1]])
    assert ik.decoupled_softmax_loss(bad, k, 5.0, symmetric=False, positive_pairs=one).isnan()


def test_decoupled_pairs_in_fp32_are_as_close_as_dense_pytorch():
    """Well-separated pairs at a scale of 100: the loss is near 1e-4, the scores near 100."""
    g = torch.Generator().manual_seed(3)
    q = unit(64, 16)
    k = normalize(q + 0.05 * torch.randn(64, 16, generator=g, dtype=F64))
    q, k, rows = q.float(), k.float(), torch.arange(64)

    def dense(q, k):
        S = 100 * q @ k.T
        noise = S.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf).logsumexp(1)
        return (torch.logaddexp(S.diagonal(), noise) - S.diagonal()).mean()

    truth = dense(q.double(), k.double())
    pairs = torch.stack([rows, rows], 1)
    ours = ik.decoupled_softmax_loss(q, k, 100.0, symmetric=False, positive_pairs=pairs)
    assert abs(ours - truth) <= 2 * abs(dense(q, k) - truth) + 1e-7


def test_decoupled_softmax_in_panels(monkeypatch):
    """Panels that end inside an anchor's positives."""
    q, k = unit(9, 4).requires_grad_(), unit(30, 4, seed=1).requires_grad_()
    ids = random_ids(9, 3, 2), random_ids(30, 3, 3)
    whole = ik.decoupled_softmax_loss(q, k, 5.0, query_ids=ids[0], key_ids=ids[1])
    monkeypatch.setattr("ito_kernels.losses.tiles.ROWS", 2)
    monkeypatch.setattr("ito_kernels.losses.tiles.COLS", 3)
    panels = ik.decoupled_softmax_loss(q, k, 5.0, query_ids=ids[0], key_ids=ids[1])
    check(panels, whole, [q, k])


def test_anchors_without_negatives_are_zero():
    q, same = unit(4, 3).requires_grad_(), torch.zeros(4, dtype=torch.long)
    for loss in (ik.decoupled_contrastive_loss, ik.decoupled_softmax_loss):
        value = loss(q, unit(4, 3, seed=1), 5.0, query_ids=same, key_ids=same)
        assert value == 0
        assert torch.equal(torch.autograd.grad(value, q)[0], torch.zeros_like(q))


# ---- retrieval


@pytest.mark.parametrize("negatives", [None, (7, 5), (7, 3, 5)])
@pytest.mark.parametrize("normalized", [True, False])
def test_mnrl(negatives, normalized):
    q, p = (torch.randn(7, 5, dtype=F64, requires_grad=True) for _ in range(2))
    keys, leaves = [p], [q, p]
    if negatives:
        hard = torch.randn(negatives, dtype=F64, requires_grad=True)
        keys.append(hard.reshape(-1, 5))
        leaves.append(hard)
    a, b = q, torch.cat(keys)
    if normalized:
        a, b = normalize(a), normalize(b)
    truth = cross_entropy(20 * a @ b.T, torch.arange(7))
    ours = ik.mnrl_loss(q, p, hard if negatives else None, normalize=normalized)
    check(ours, truth, leaves)


# ---- soft targets


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("symmetric", [True, False, "infonce"])
@pytest.mark.parametrize(("n", "d", "c"), [(1, 1, 1), (9, 5, 3), (30, 7, 40)])
def test_cwcl(n, d, c, symmetric, backend):
    q, k, e = unit(n, d).requires_grad_(), unit(n, d, seed=1).requires_grad_(), unit(n, c, seed=2)
    scale = leaf(5.0)
    w = 0.5 + 0.5 * e @ e.T
    S, w = scale * q @ k.T, w / w.sum(1, keepdim=True)
    truth = -(w * log_softmax(S, 1)).sum(1).mean()
    if symmetric == "infonce":
        truth = 0.5 * (truth + cross_entropy(S.T, torch.arange(n)))
    elif symmetric:
        truth = 0.5 * (truth - (w * log_softmax(S.T, 1)).sum(1).mean())
    ours = ik.cwcl_loss(q, k, scale, reference=e, symmetric=symmetric, backend=backend)
    check(ours, truth, [q, k, scale])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "m", "d", "c"), [(1, 1, 1, 1), (9, 9, 5, 3), (12, 30, 7, 40), (8, 5, 4, 3)]
)
def test_soft_targets(n, m, d, c, symmetric, alpha):
    """Key i is query i's; the first keys, one for each query, are the anchors of key→query."""
    if m < n and alpha < 1:
        return  # raises: see BAD
    q, k = unit(n, d).requires_grad_(), unit(m, d, seed=1).requires_grad_()
    e, f = unit(n, c, seed=2).requires_grad_(), unit(m, c, seed=3).requires_grad_()
    scale = leaf(5.0)
    S, T = scale * q @ k.T, (3.0 * e @ f.T).detach()

    def direction(S, T):
        target = alpha * T.softmax(1) + (1 - alpha) * torch.eye(*S.shape, dtype=F64)
        return -(target * log_softmax(S, 1)).sum(1).mean()

    truth = direction(S, T)
    if symmetric:
        truth = 0.5 * (truth + direction(S.T[:n], T.T[:n]))
    options = {"target_queries": e, "target_keys": f, "target_scale": 3.0, "alpha": alpha}
    ours = ik.soft_target_infonce(q, k, scale, symmetric=symmetric, **options)
    check(ours, truth, [q, k, scale])
    assert torch.autograd.grad(ours, [e, f], allow_unused=True) == (None, None)


def test_soft_targets_with_a_scale_per_query():
    q, k = unit(9, 5).requires_grad_(), unit(9, 5, seed=1).requires_grad_()
    e, f, scale = unit(9, 4, seed=2), unit(9, 4, seed=3), torch.linspace(1, 9, 9, dtype=F64)
    S, T = scale[:, None] * (q @ k.T), 6 * e @ f.T
    truth = -0.5 * (T.softmax(1) * log_softmax(S, 1)).sum(1).mean()
    truth = truth - 0.5 * (T.softmax(0) * log_softmax(S, 0)).sum(0).mean()
    options = {"target_queries": e, "target_keys": f, "target_scale": 6.0}
    check(ik.soft_target_infonce(q, k, scale, **options), truth, [q, k])


# ---- geometry


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (33, 7), (60, 70)])
@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("towers", [1, 2])
def test_uniformity(n, d, t, backend, towers):
    x = (1.3 * unit(n, d)).requires_grad_()  # not unit vectors: the norms count
    y = x if towers == 1 else (0.8 * unit(n, d, seed=1)).requires_grad_()
    t, given = leaf(t), [] if towers == 1 else [y]
    pairs = [(x[i] - y[j]).square().sum() for i in range(n) for j in range(n) if i != j]
    truth = torch.stack([(-t * p).exp() for p in pairs]).mean().log()
    check(ik.uniformity_loss(x, *given, t=t, backend=backend), truth, [x, *given, t])


@pytest.mark.parametrize("number", [2.0, 2, torch.tensor(2.0)])
def test_uniformity_takes_t_by_name(number):
    """t was the second argument before y was."""
    with pytest.raises(TypeError, match=r"y must be a tensor.*got .*2.*: give t by name, as t="):
        ik.uniformity_loss(X, number)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_alignment(alpha):
    x, y = unit(6, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    check(ik.alignment_loss(x, y, alpha), ((x - y).norm(dim=1) ** alpha).mean(), [x, y])
    same = x.detach().clone().requires_grad_()
    loss = ik.alignment_loss(same, x.detach(), alpha)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, same)[0], torch.zeros_like(x))


def negatives_of(x, y):
    """<x_i, y_j> for i ≠ j."""
    return torch.stack([x[i] @ y[j] for i in range(len(x)) for j in range(len(y)) if i != j])


@pytest.mark.parametrize(("n", "d"), [(2, 3), (9, 4), (5, 12)])
def test_spectral(n, d):
    x, y = (1.3 * unit(n, d, seed=s) for s in range(2))
    x, y = x.requires_grad_(), y.requires_grad_()
    truth = negatives_of(x, y).square().mean() - 2 * torch.stack([*map(torch.dot, x, y)]).mean()
    check(ik.spectral_contrastive_loss(x, y), truth, [x, y])


@pytest.mark.parametrize(("n", "d"), [(2, 3), (9, 4), (5, 12)])
@pytest.mark.parametrize("same", [False, True])
def test_orthogonality(same, n, d):
    x, y = unit(n, d).requires_grad_(), unit(n, d, seed=1).requires_grad_()
    products = negatives_of(x, x if same else y)
    truth = products.mean() ** 2 + (products.square().mean() - 1 / d).clamp(min=0)
    loss = ik.orthogonality_loss(x) if same else ik.orthogonality_loss(x, y)
    check(loss, truth, [x] if same else [x, y])


@pytest.mark.parametrize("loss", [ik.spectral_contrastive_loss, ik.orthogonality_loss])
def test_moments_need_two_rows(loss):
    with pytest.raises(ValueError, match="x must have at least 2 rows, got 1"):
        loss(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="x and y must have the same number of rows, got 3 and 2"):
        loss(torch.ones(3, 3), torch.ones(2, 3))


# ---- classes


def test_supcon_l_in():
    x, labels = unit(20, 7).requires_grad_(), random_ids(20, 6, 5)
    S = x @ x.T / 0.2
    total = 0
    for i in range(20):
        same = [j for j in range(20) if j != i and labels[j] == labels[i]]
        if same:
            others = [j for j in range(20) if j != i]
            total = total + S[i, others].logsumexp(0) - S[i, same].exp().mean().log()
    check(ik.supcon_loss(x, labels, 0.2, positives="in"), total / 20, [x])


# ---- all of them


def calls(x, y, z, ids, backend=None):
    """Every loss of this file, as a value."""
    where = {"backend": backend}
    by_id = {"query_ids": ids, "key_ids": ids, **where}
    targets = {"target_queries": z, "target_keys": z, "target_scale": 10.0}

    def seeded():
        return torch.Generator().manual_seed(7)

    return {
        "decoupled": lambda: ik.decoupled_contrastive_loss(x, y, 20.0, **by_id),
        "decoupled softmax": lambda: ik.decoupled_softmax_loss(x, y, 20.0, **by_id),
        "mnrl": lambda: ik.mnrl_loss(x, y, z, normalize=False, **where),
        "cwcl": lambda: ik.cwcl_loss(x, y, 20.0, reference=z, **where),
        "soft": lambda: ik.soft_target_infonce(x, y, 20.0, **targets, **where),
        "uniformity": lambda: ik.uniformity_loss(x, **where),
        "alignment": lambda: ik.alignment_loss(x, y, **where),
        "rince": lambda: ik.rince_loss(x, y, 20.0, q=0.3, lam=0.1, **where),
        "symile": lambda: ik.symile_loss([x, y, z], 20.0, generator=seeded(), **where),
    }


NAMES = list(calls(None, None, None, None))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(
    ("name", "dtype"),
    # mnrl is InfoNCE itself: in bf16 they meet inside the kernels, tested with the primitive
    [(x, t) for x in NAMES for t in (torch.float32, BF16) if (x, t) != ("mnrl", BF16)],
)
def test_every_backend(name, dtype, backend):
    """A hard negative beside each positive: half precision is rounded once, after they have met."""
    x = unit(40, 24)
    y = normalize(x + 0.02 * unit(40, 24, seed=1))
    x, y = torch.cat([x, x + 0.02 * unit(40, 24, seed=2)]), torch.cat([y, y])
    z = y + 0.02 * unit(80, 24, seed=3)
    x, y, z = (normalize(v).to(dtype) for v in (x, y, z))
    ids = torch.arange(80)
    ids[60:] = ids[:20] + 40  # some have two positives

    def value_and_grads(dtype, backend):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        loss = calls(*leaves, z.to(dtype), ids, backend)[name]()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss, [g for g in grads if g is not None]

    ours, truth = value_and_grads(dtype, backend), value_and_grads(F64, "reference")
    fp32 = dtype == torch.float32
    assert ours[0].dtype == torch.float32
    assert ours[0].shape == ()
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=2e-5 if fp32 else 2e-3)
    for a, b in zip(ours[1], truth[1], strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= (1e-4 if fp32 else 1e-2) * b.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """Features as autocast rounds them, everything else in fp32."""
    x, y, z = (unit(20, 8, seed=s, dtype=torch.float32) for s in range(3))
    ids = torch.arange(20) // 2
    truth = calls(*(v.bfloat16().float() for v in (x, y)), z.bfloat16().float(), ids)[name]()
    with torch.autocast("cpu", torch.bfloat16):
        loss = calls(x, y, z, ids)[name]()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_show(name):
    x, y, z = (unit(6, 4, seed=s, dtype=torch.float32) for s in range(3))
    for wrong in (math.nan, math.inf):
        bad = x.clone()
        bad[2, 0] = wrong
        assert not calls(bad, y, z, torch.arange(6))[name]().isfinite()
        assert not calls(bad, y, z, torch.arange(6) // 2)[name]().isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    x, y = unit(5, 3).requires_grad_(), unit(5, 3, seed=1).requires_grad_()
    z, ids = unit(5, 3, seed=2), torch.tensor([0, 1, 0, 2, 2])
    torch.autograd.gradcheck(lambda x, y: calls(x, y, z, ids)[name](), (x, y))


X, Y = torch.randn(5, 3), torch.randn(5, 3)
SOFT = {"target_queries": X, "target_keys": Y, "target_scale": 1.0}
BAD = [
    (ValueError, "no query_ids", lambda: ik.decoupled_softmax_loss(X, Y[:4], 1.0)),
    (ValueError, "same width", lambda: ik.decoupled_contrastive_loss(X, Y[:, :2], 1.0)),
    (ValueError, "the same number of rows, got 5 and 4", lambda: ik.mnrl_loss(X, Y[:4])),
    (ValueError, r"negatives must have shape \(N, D\) or", lambda: ik.mnrl_loss(X, Y, Y[:4])),
    (ValueError, "queries and negatives must have the same width", lambda: ik.mnrl_loss(X, Y, Y[:, :2])),
    (TypeError, "negatives must be a tensor", lambda: ik.mnrl_loss(X, Y, [Y])),
    (ValueError, "logit_scale must be finite", lambda: ik.cwcl_loss(X, Y, 0.0, reference=X)),
    (ValueError, "reference must have 5 rows, got 4", lambda: ik.cwcl_loss(X, Y, 1.0, reference=X[:4])),
    (TypeError, "reference must be a tensor", lambda: ik.cwcl_loss(X, Y, 1.0, reference=None)),
    (ValueError, "the same number of rows", lambda: ik.cwcl_loss(X, Y[:4], 1.0, reference=X)),
    (TypeError, "^scale must be a number or a tensor, got str", lambda: ik.mnrl_loss(X, Y, scale="a")),
    (TypeError, "alpha must be a number, got NoneType", lambda: ik.soft_target_infonce(X, Y, 1.0, **SOFT, alpha=None)),
    (ValueError, r"temperature must be a number or 0-d, got shape \(5,\)", lambda: ik.nt_xent_loss(X, Y, torch.ones(5))),
    (ValueError, "alpha must be from 0 to 1, got 2", lambda: ik.soft_target_infonce(X, Y, 1.0, **SOFT, alpha=2)),
    (ValueError, "keys must have at least as many rows as queries unless alpha is 1.*got 4 keys, 5 queries and alpha = 0.5", lambda: ik.soft_target_infonce(X, Y[:4], 1.0, **SOFT, alpha=0.5)),
    (ValueError, "target_keys must have 4 rows", lambda: ik.soft_target_infonce(X, Y[:4], 1.0, **SOFT)),
    (ValueError, "target_scale must be a number or a 0-d tensor", lambda: ik.soft_target_infonce(X, Y, 1.0, **{**SOFT, "target_scale": torch.ones(5)})),
    (ValueError, r"alpha must be a number or a 0-d tensor, got shape \(5,\)", lambda: ik.alignment_loss(X, Y, torch.ones(5))),
    (ValueError, "x must have at least 2 rows", lambda: ik.uniformity_loss(X[:1])),
    (ValueError, "t must be finite and greater than 0", lambda: ik.uniformity_loss(X, t=-1.0)),
    (ValueError, "t must be a number or a 0-d", lambda: ik.uniformity_loss(X, t=torch.ones(5))),
    (ValueError, "x and y must have the same number of rows, got 5 and 4", lambda: ik.uniformity_loss(X, Y[:4])),
    (TypeError, "y must be a tensor of shape .*, got list", lambda: ik.uniformity_loss(X, [Y])),
    (ValueError, "x and y must have the same number of rows", lambda: ik.alignment_loss(X, Y[:4])),
    (ValueError, "exclude_self needs the same number of queries and keys, got 5 and 4", lambda: ik.decoupled_contrastive_loss(X, Y[:4], 1.0, query_ids=torch.arange(5), key_ids=torch.arange(4), exclude_self=True)),
    (ValueError, "exclude_self needs the same number of queries and keys, got 5 and 4", lambda: ik.decoupled_softmax_loss(X, Y[:4], 1.0, symmetric=False, positive_pairs=torch.zeros(1, 2).long(), exclude_self=True)),
    (TypeError, "exclude_self must be True or False, got 1", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, exclude_self=1)),
    (ValueError, "positive_pairs are for rows only: use symmetric=False, got True", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, positive_pairs=torch.zeros(1, 2).long())),
    (ValueError, "positive_weights need positive_pairs, which are missing", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, symmetric=False, positive_weights=torch.ones(1))),
    (ValueError, "positive_pairs replace query_ids and key_ids", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, symmetric=False, query_ids=torch.arange(5), positive_pairs=torch.zeros(1, 2).long())),
    (ValueError, r"positive_pairs must have shape \(P, 2\), got \(2, 3\)", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, symmetric=False, positive_pairs=torch.zeros(2, 3).long())),
    (ValueError, "positive_pairs must be row numbers of 5 keys, 0 to 4, got 5 to 5", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, symmetric=False, positive_pairs=torch.tensor([[0, 5]]))),
    (ValueError, "positive_weights must be 0 or more, got -1", lambda: ik.decoupled_softmax_loss(X, Y, 1.0, symmetric=False, positive_pairs=torch.zeros(1, 2).long(), positive_weights=-torch.ones(1))),
    (TypeError, "symmetric must be True, False or 'infonce', got 1", lambda: ik.cwcl_loss(X, Y, 1.0, reference=X, symmetric=1)),
    (TypeError, "symmetric must be True, False or 'infonce', got 'clip'", lambda: ik.cwcl_loss(X, Y, 1.0, reference=X, symmetric="clip")),
    (ValueError, "alpha must be finite and greater", lambda: ik.alignment_loss(X, Y, 0)),
    (ValueError, "positives must be one of 'mean', 'in'", lambda: ik.supcon_loss(X, torch.arange(5), positives="sum")),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_decoupled_softmax_compiles_in_one_graph():
    """Although the ids' values decide how many tiles there are."""
    x, y = (unit(20, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(2))
    ids = torch.arange(20) // 3

    def loss(x, y):
        return ik.decoupled_softmax_loss(x, y, 20.0, query_ids=ids, key_ids=ids)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check(compiled(x, y), loss(x, y), [x, y])


def test_orthogonality_has_no_gradient_at_its_bound():
    """D = 1: the mean square is 1 / D, and the mean is 0."""
    x = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    y = torch.tensor([[1.0], [-1.0]])
    loss = ik.orthogonality_loss(x, y)
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()
