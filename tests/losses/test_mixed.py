# ruff: noqa: E501 (a call and its message read best on one line)
"""Mixed samples, clusters, captions in several languages, prefixes and heads, in fp64."""

import pytest
import torch
from support.formulas import check, random_ids, unit
from support.problems import AVAILABLE
from torch.nn.functional import cross_entropy, normalize

import ito_kernels as ik

F64 = torch.float64


def leaf(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("captions", [1, 3])
def test_one_to_k(captions, symmetric):
    q, k = unit(7, 5).requires_grad_(), unit(7, captions, 5, seed=1).requires_grad_()
    scale = leaf(4.0)
    S = scale * torch.einsum("nd,mkd->nmk", q, k)
    own = torch.stack([S[i, i] for i in range(7)])
    truth = (S.flatten(1).logsumexp(1) - own.mean(1)).mean()
    if symmetric:  # each caption against the items
        truth = 0.5 * (truth + (S.logsumexp(0) - own).mean())
    check(ik.one_to_k_loss(q, k, scale, symmetric=symmetric), truth, [q, k, scale])


@pytest.mark.parametrize("mixing", [0.3, 1.0, "per query"])
def test_mixup(mixing):
    """λ · cross-entropy to the own key plus (1 - λ) · that to the partner's."""
    q, k = unit(8, 5).requires_grad_(), unit(8, 5, seed=1).requires_grad_()
    scale, rows, partners = leaf(4.0), torch.arange(8), torch.tensor([1, 2, 0, 3, 7, 4, 5, 6])
    share = torch.linspace(0, 1, 8, dtype=F64) if mixing == "per query" else mixing

    def queries_as_anchors():
        S = scale * q @ k.T
        own, other = (cross_entropy(S, t, reduction="none") for t in (rows, partners))
        return (share * own + (1 - share) * other).mean()

    truth, options = queries_as_anchors(), {"partners": partners, "mixing": share}
    check(ik.mixup_infonce(q, k, scale, **options), truth, [q, k, scale])

    weights = torch.zeros(8, 8, dtype=F64)
    weights[rows, rows] += torch.as_tensor(share, dtype=F64)
    weights[rows, partners] += 1 - torch.as_tensor(share, dtype=F64)
    total = weights.sum(0)
    target, S = (weights / torch.where(total == 0, 1, total)).T, scale * q @ k.T
    columns = torch.where(total > 0, S.T.logsumexp(1) - (target * S.T).sum(1), 0).mean()
    both = ik.mixup_infonce(q, k, scale, **options, symmetric=True)
    check(both, 0.5 * (queries_as_anchors() + columns), [q, k, scale])

    S = scale * q @ k.T
    columns = sum(weights[i, j] * (S[:, j].logsumexp(0) - S[i, j]) for i in rows for j in rows) / 8
    both = ik.mixup_infonce(q, k, scale, **options, symmetric=True, key_targets="sum")
    check(both, 0.5 * (queries_as_anchors() + columns), [q, k, scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_targets", ["normalized", "sum"])
def test_mixup_in_lower_precision_is_as_close_as_dense_pytorch(key_targets, dtype):
    q, k = unit(48, 16).to(dtype), unit(48, 16, seed=1).to(dtype)
    rows, partners = torch.arange(48), (torch.arange(48) * 5 + 3) % 48
    T = torch.zeros(48, 48, dtype=F64)
    T[rows, rows] += 0.3
    T[rows, partners] += 0.7

    def dense(q, k):
        S = 50 * q @ k.T
        keys = T.T if key_targets == "sum" else T.T / T.sum(0)[:, None]
        return 0.5 * (cross_entropy(S, T.to(S.dtype)) + cross_entropy(S.T, keys.to(S.dtype)))

    truth = dense(q.double(), k.double())
    options = {"partners": partners, "mixing": 0.3, "symmetric": True, "key_targets": key_targets}
    ours = ik.mixup_infonce(q, k, 50.0, **options)
    assert abs(ours - truth) <= 2 * abs(dense(q, k) - truth) + 1e-5


@pytest.mark.parametrize("panel", [1 << 22, 40])
def test_mixed_hard_negatives(monkeypatch, panel):
    """Each is on an arc between two of the hardest, or nearer to one of them than to the query."""
    monkeypatch.setattr("ito_kernels.losses.mixtures.PANEL_SCORES", panel)
    q, queue = unit(6, 5), unit(20, 5, seed=1)
    g = torch.Generator().manual_seed(3)
    sizes = {"hardest": 4, "mixed": 30, "with_query": 20}
    out = ik.mix_hard_negatives(q.requires_grad_(), queue, **sizes, generator=g)
    assert out.shape == (6, 50, 5)
    assert not out.requires_grad
    torch.testing.assert_close(out.norm(dim=2), torch.ones(6, 50, dtype=F64))
    hardest = queue[(q @ queue.T).topk(4).indices]
    for i in range(6):

        def best(ends, at, i=i):
            """The least distance of out[i, at] to an arc between the pairs of `ends`."""
            t = torch.linspace(0, 1, 20001, dtype=F64)[:, None]
            return min(
                (normalize(t * a + (1 - t) * b, dim=1) - out[i, at]).norm(dim=1).min()
                for a, b in ends
            )

        pairs = [(a, b) for a in hardest[i] for b in hardest[i]]
        with_query = [(0.5 * (q[i] + a), a) for a in hardest[i]]
        for at in (0, 7, 29):
            assert best(pairs, at) < 1e-3
        for at in (30, 41, 49):
            assert best(with_query, at) < 1e-3
    cosines = torch.einsum("nkd,nd->nk", out, q).detach()
    assert all(len(row[30:].unique()) == 20 for row in cosines)  # each is drawn anew
    again = ik.mix_hard_negatives(q, queue, **sizes, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out, again)
    ik.multi_positive_infonce(q, unit(6, 5, seed=2), 5.0, hard_negatives=out).backward()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("include_positives", [True, False])
def test_cluster_weights(with_ids, symmetric, per_row, include_positives):
    n, m = (9, 7) if with_ids else (9, 9)
    q, k = unit(n, 5).requires_grad_(), unit(m, 5, seed=1).requires_grad_()
    scale = torch.linspace(1, 5, n, dtype=F64) if per_row else torch.tensor(4.0, dtype=F64)
    scale.requires_grad_()
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.7, 3.0], [0.2, 1.5, 1.0]], dtype=F64)
    weights.requires_grad_()
    c, e = torch.arange(n) % 3, torch.arange(m) % 3
    ids = (torch.arange(n), torch.arange(m))
    given = {}
    if with_ids:
        ids = random_ids(n, 4, 2, padded=True), random_ids(m, 4, 3, padded=True)
        given = {"query_ids": ids[0], "key_ids": ids[1]}
    S, w = scale.reshape(-1, 1) * (q @ k.T), weights[c][:, e]

    def direction(S, w, a, b):
        total = 0
        for i in range(len(S)):
            same = [j for j in range(len(b)) if b[j] >= 0 and b[j] == a[i]]
            others = [j for j in range(len(b)) if b[j] >= 0 and b[j] != a[i]]
            if same and (include_positives or w[i, others].sum() > 0):
                z = (w[i, others] * S[i, others].exp()).sum()
                z = z + S[i, same].exp().sum() if include_positives else z
                total = total + z.log() - S[i, same].mean()
        return total / (a >= 0).sum()

    truth = direction(S, w, *ids)
    if symmetric:
        truth = 0.5 * (truth + direction(S.T, w.T, *ids[::-1]))
    given |= {"query_clusters": c, "key_clusters": e, "weights": weights, "symmetric": symmetric}
    given |= {"include_positives": include_positives}
    loss = ik.cluster_weighted_infonce(q, k, scale, **given)
    torch.testing.assert_close(loss, truth)
    ours = torch.autograd.grad(loss, [q, k, scale, weights])
    theirs = torch.autograd.grad(truth, [q, k, scale, weights])
    theirs = (*theirs[:3], theirs[3].masked_fill(weights == 0, 0))  # as the docstring says
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_a_weight_of_0_leaves_negatives_out_at_any_scale():
    q = torch.eye(2)
    loss = ik.cluster_weighted_infonce(
        q,
        q.flip(0),
        100.0,
        query_clusters=torch.arange(2),
        key_clusters=torch.arange(2),
        weights=torch.eye(2),
        symmetric=False,
    )
    assert loss == 0


@pytest.mark.parametrize("by_id", [True, False])
def test_anchors_without_negatives_in_their_denominator_are_0(by_id):
    """All of weight 0, none of another id, all padded, one row: 0 with a gradient of 0."""
    rows, zero = torch.arange(4), torch.zeros(4, dtype=torch.long)
    cases = [(rows, torch.eye(4))]
    cases += [(zero, torch.ones(4, 4)), (zero - 1, torch.ones(4, 4))] if by_id else []
    for ids, weights in cases:
        q, k = unit(4, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_()
        weights = weights.double().requires_grad_()
        loss = ik.cluster_weighted_infonce(
            q,
            k,
            100.0,
            query_clusters=rows,
            key_clusters=rows,
            weights=weights,
            query_ids=ids if by_id else None,
            key_ids=ids if by_id else None,
            include_positives=False,
        )
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, [q, k, weights]))
    q = unit(1, 3).requires_grad_()
    options = {"query_clusters": zero[:1], "key_clusters": zero[:1], "weights": torch.ones(1, 1)}
    loss = ik.cluster_weighted_infonce(q, q, 9.0, **options, include_positives=False)
    assert loss == 0
    assert not torch.autograd.grad(loss, q)[0].any()


def test_a_nan_shows_without_positives_in_the_denominator():
    q, k, c = unit(6, 4), unit(6, 4, seed=1), torch.arange(6) % 2
    q[5] = torch.nan
    options = {"query_clusters": c, "key_clusters": c, "weights": torch.ones(2, 2)}
    for ids in ({}, {"query_ids": torch.arange(6), "key_ids": torch.arange(6) % 5}):
        loss = ik.cluster_weighted_infonce(q, k, 9.0, **options, **ids, include_positives=False)
        assert loss.isnan()


def test_equal_cluster_weights_are_infonce():
    q, k, c = unit(9, 5), unit(9, 5, seed=1), torch.arange(9) % 3
    options = {"query_clusters": c, "key_clusters": c, "weights": torch.ones(3, 3)}
    for backend in AVAILABLE:
        x, y = q.float(), k.float()
        loss = ik.cluster_weighted_infonce(x, y, 50.0, backend=backend, **options)
        torch.testing.assert_close(loss, ik.clip_loss(x, y, 50.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(
    ("t_positive", "t_negative"), [(1.0, 0.9), (0.0, 2.0), (10.0, 30.0), (2.0, 0.0)]
)
def test_cacr(monkeypatch, with_ids, t_positive, t_negative):
    monkeypatch.setattr("ito_kernels.similarity.panelwise.panel_rows", lambda columns: 4)
    n, m = (13, 11) if with_ids else (9, 9)
    q, k = unit(n, 5).requires_grad_(), unit(m, 5, seed=1).requires_grad_()
    ids, given = (torch.arange(n), torch.arange(m)), {}
    if with_ids:
        ids = random_ids(n, 4, 2, padded=True), random_ids(m, 4, 3, padded=True)
        given = {"query_ids": ids[0], "key_ids": ids[1]}
    attraction, repulsion = [], []
    for i in range(n):
        if ids[0][i] < 0:
            continue
        cost = 2 - 2 * k @ q[i]
        same, others = ids[1] == ids[0][i], (ids[1] >= 0) & (ids[1] != ids[0][i])
        if same.any():
            weights = (t_positive * cost[same]).softmax(0)
            attraction.append((weights * cost[same]).sum())
        if others.any():
            weights = (-t_negative * cost[others]).softmax(0)
            repulsion.append((weights * cost[others]).sum())
    truth = torch.stack(attraction).mean() - torch.stack(repulsion).mean()
    loss = ik.cacr_loss(q, k, t_positive=t_positive, t_negative=t_negative, **given)
    check(loss, truth, [q, k])


@pytest.mark.parametrize("with_ids", [True, False])
def test_cacr_without_self(monkeypatch, with_ids):
    """Two towers, so that (i, i) is no key with itself. Without ids only repulsion is left."""
    monkeypatch.setattr("ito_kernels.similarity.panelwise.panel_rows", lambda columns: 4)
    q, k = unit(11, 5).requires_grad_(), unit(11, 5, seed=1).requires_grad_()
    ids, given = (torch.arange(11), torch.arange(11)), {}
    if with_ids:
        ids = random_ids(11, 4, 2, padded=True), random_ids(11, 4, 3, padded=True)
        given = {"query_ids": ids[0], "key_ids": ids[1]}
    means = []
    for positives, t in ((True, 2.0), (False, -3.0)):
        found = []
        for i in range(11):
            keys = [j for j in range(11) if j != i and ids[1][j] >= 0 and ids[0][i] >= 0]
            keys = [j for j in keys if (ids[0][i] == ids[1][j]) == positives]
            if keys:
                cost = 2 - 2 * k[keys] @ q[i]
                found.append(((t * cost).softmax(0) * cost).sum())
        means.append(torch.stack(found).mean() if found else 0)
    assert with_ids or means[0] == 0
    loss = ik.cacr_loss(q, k, t_positive=2.0, t_negative=3.0, exclude_self=True, **given)
    check(loss, means[0] - means[1], [q, k])


def test_cacr_without_self_of_one_row():
    q = unit(1, 3).requires_grad_()
    loss = ik.cacr_loss(q, q, exclude_self=True)
    assert loss == 0
    assert not torch.autograd.grad(loss, q)[0].any()


def test_cacr_without_negatives_or_positives():
    q, k, same = unit(4, 3), unit(4, 3, seed=1), torch.zeros(4, dtype=torch.long)
    q.requires_grad_()
    cost = 2 - 2 * q @ k.T
    truth = (cost.softmax(1) * cost).sum(1).mean()
    check(ik.cacr_loss(q, k, query_ids=same, key_ids=same), truth, [q])
    cost = 2 - 2 * q @ k.T
    truth = -((-0.9 * cost).softmax(1) * cost).sum(1).mean()
    check(ik.cacr_loss(q, k, query_ids=same, key_ids=same + 1), truth, [q])
    assert ik.cacr_loss(q, k, query_ids=same - 1, key_ids=same - 1) == 0


@pytest.mark.parametrize("normalized", [True, False])
def test_matryoshka(normalized):
    x, y, scale = unit(7, 8).requires_grad_(), unit(7, 8, seed=1).requires_grad_(), leaf(4.0)
    truth = 0
    for d, weight in ((2, 0.5), (5, 1.5), (8, 1.0)):
        a, b = x[:, :d], y[:, :d]
        if normalized:
            a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
        truth = truth + weight * ik.clip_loss(a, b, scale, backend="reference")
    options = {"weights": (0.5, 1.5, 1.0), "normalize": normalized, "logit_scale": scale}
    loss = ik.matryoshka_loss(ik.clip_loss, x, y, dims=(2, 5, 8), **options)
    check(loss, truth, [x, y, scale])
    loss = ik.matryoshka_loss(ik.supcon_loss, x, dims=[8], labels=torch.arange(7) // 2)
    torch.testing.assert_close(loss, ik.supcon_loss(x, torch.arange(7) // 2))


def test_multi_head():
    x, y = unit(3, 7, 5).requires_grad_(), unit(3, 7, 5, seed=1).requires_grad_()
    for scale in (torch.tensor([2.0, 5.0, 9.0], dtype=F64), 1 + 5 * torch.rand(3, 7).double()):
        scale.requires_grad_()
        rows, truth = torch.arange(7), 0
        for h in range(3):
            S = scale[h].reshape(-1, 1) * (x[h] @ y[h].T)
            truth = truth + 0.5 * (cross_entropy(S, rows) + cross_entropy(S.T, rows)) / 3
        check(ik.multi_head_loss(ik.clip_loss, x, y, logit_scale=scale), truth, [x, y, scale])


def options_of_families(x, y, ids):
    """The options of the families' losses that leave pairs out or weight them, as values."""
    by_id = {"query_ids": ids, "key_ids": ids, "exclude_self": True}
    more = {"target_queries": y.detach(), "target_keys": torch.cat([x, y]).detach()}
    mixed = {"partners": (torch.arange(6) + 1) % 6, "mixing": 0.3, "symmetric": True}
    return {
        "decoupled": lambda: ik.decoupled_contrastive_loss(x, y, 9.0, **by_id),
        "decoupled softmax": lambda: ik.decoupled_softmax_loss(x, y, 9.0, **by_id),
        "cacr": lambda: ik.cacr_loss(x, y, **by_id),
        "cwcl": lambda: ik.cwcl_loss(x, y, 9.0, reference=y, symmetric="infonce"),
        "soft": lambda: ik.soft_target_infonce(
            x, torch.cat([y, x]), 9.0, **more, target_scale=3.0, alpha=0.5
        ),
        "mixup": lambda: ik.mixup_infonce(x, y, 9.0, **mixed),
        "mixup, sum": lambda: ik.mixup_infonce(x, y, 9.0, **mixed, key_targets="sum"),
        "uniformity": lambda: ik.uniformity_loss(x, y),
    }


OPTIONS = list(options_of_families(*(torch.ones(6, 2) for _ in range(3))))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_with_features_that_are_not_finite(name):
    x, y = (unit(6, 4, seed=s, dtype=torch.float32) for s in range(2))
    for wrong in (torch.nan, torch.inf):
        for side in range(2):
            pair = [x.clone(), y.clone()]
            pair[side][2, 0] = wrong
            for ids in (torch.arange(6), torch.arange(6) // 2):
                assert not options_of_families(*pair, ids)[name]().isfinite()


@pytest.mark.parametrize("name", ["decoupled", "decoupled softmax", "cacr"])
def test_options_with_nothing_left(name):
    """All padded, and without anything beside (i, i)."""
    x, y = (unit(6, 4, seed=s).requires_grad_() for s in range(2))
    with torch.no_grad():
        x[1] = y[1] = torch.nan
    ids = torch.full((6,), -1)
    for rows in (6, 1):
        a, b = (v[:rows].detach().requires_grad_() for v in (x, y))
        loss = options_of_families(a, b, ids[:rows] + (rows == 1))[name]()
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, [a, b]))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_fp16(name):
    x, y = (unit(6, 4, seed=s, dtype=torch.float16).requires_grad_() for s in range(2))
    loss = options_of_families(x, y, torch.arange(6) // 2)[name]()
    truth = options_of_families(x.float(), y.float(), torch.arange(6) // 2)[name]()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert all(g.dtype == torch.float16 for g in torch.autograd.grad(loss, [x, y]))


X, Y, IDS = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)
CLUSTERS = {"query_clusters": IDS, "key_clusters": IDS, "weights": torch.ones(5, 5)}
BAD = [
    (ValueError, r"keys must have shape \(N, K, D\) with N = 5", lambda: ik.one_to_k_loss(X, Y, 1.0)),
    (ValueError, r"keys must have shape .*, got \(4, 1, 3\)", lambda: ik.one_to_k_loss(X, Y[:4, None], 1.0)),
    (TypeError, "keys must be a tensor", lambda: ik.one_to_k_loss(X, [Y], 1.0)),
    (ValueError, "the same number of rows", lambda: ik.mixup_infonce(X, Y[:4], 1.0, partners=IDS, mixing=0.5)),
    (ValueError, "mixing must be from 0 to 1, got 2", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=2)),
    (ValueError, "key_targets must be one of 'normalized', 'sum', got 'mean'", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=0.5, symmetric=True, key_targets="mean")),
    (ValueError, "key_targets='sum' weights the key→query direction: it needs symmetric=True", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=0.5, key_targets="sum")),
    (TypeError, "symmetric must be True or False, got 1", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=0.5, symmetric=1)),
    (TypeError, "include_positives must be True or False, got None", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **CLUSTERS, include_positives=None)),
    (ValueError, "exclude_self needs the same number of queries and keys, got 5 and 4", lambda: ik.cacr_loss(X, Y[:4], query_ids=IDS, key_ids=IDS[:4], exclude_self=True)),
    (TypeError, "exclude_self must be True or False, got 0", lambda: ik.cacr_loss(X, Y, exclude_self=0)),
    (ValueError, r"mixing must have shape \(5,\)", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=torch.ones(4))),
    (ValueError, r"partners must have shape \(5,\)", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS[:4], mixing=0.5)),
    (ValueError, "queries and queue must have the same width", lambda: ik.mix_hard_negatives(X, Y[:, :2])),
    (ValueError, "hardest must be a whole number from 1 upwards, got 0", lambda: ik.mix_hard_negatives(X, Y, hardest=0)),
    (ValueError, "mixed must be a whole number from 0 upwards, got -1", lambda: ik.mix_hard_negatives(X, Y, mixed=-1)),
    (ValueError, "weights must be a", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **{**CLUSTERS, "weights": X})),
    (ValueError, "weights must be 0 or more, got nan", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **{**CLUSTERS, "weights": torch.nan * torch.ones(5, 5)})),
    (ValueError, "mixing must be from 0 to 1, got nan", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=torch.nan * torch.ones(len(X)))),
    (TypeError, "symmetric must be True or False, got 1", lambda: ik.decoupled_contrastive_loss(X, Y, 1.0, symmetric=1)),
    (TypeError, "explain takes the options of similarity_logsumexp, got query_ids", lambda: ik.explain(X, Y, query_ids=IDS)),
    (ValueError, "weights must be 0 or more, got -1", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **{**CLUSTERS, "weights": -torch.ones(5, 5)})),
    (ValueError, "key_clusters must be from 0 to 4, got 1 to 5", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **{**CLUSTERS, "key_clusters": IDS + 1})),
    (ValueError, "t_positive must be from 0 upwards, finite, got -1", lambda: ik.cacr_loss(X, Y, t_positive=-1)),
    (ValueError, "unknown backend .nonsense.", lambda: ik.cacr_loss(X, Y, backend="nonsense")),
    (ValueError, "no query_ids", lambda: ik.cacr_loss(X, Y[:4])),
    (TypeError, "t_negative must be a number, got NoneType", lambda: ik.cacr_loss(X, Y, t_negative=None)),
    (TypeError, "mixing must be a number, got NoneType", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=None)),
    (ValueError, "mixing must be from 0 to 1, got 1.5 to 1.5", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=torch.full((5,), 1.5))),
    (ValueError, "partners must be row numbers of 5 queries, 0 to 4, got 1 to 5", lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS + 1, mixing=0.5)),
    (TypeError, "generator must be a torch.Generator or None, got int", lambda: ik.mix_hard_negatives(X, Y, generator=3)),
    (TypeError, "weights must have a floating-point dtype", lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **{**CLUSTERS, "weights": torch.ones(5, 5).long()})),
    (TypeError, "dims must be a sequence of widths, got the number 2", lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=2, logit_scale=1.0)),
    (TypeError, "weights must be a sequence of numbers, got 2.0", lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[2], weights=2.0, logit_scale=1.0)),
    (TypeError, "features 0 must be a tensor .*, got list", lambda: ik.matryoshka_loss(ik.clip_loss, [X], Y, dims=[2], logit_scale=1.0)),
    (TypeError, "loss must be a function of the features, got Tensor", lambda: ik.matryoshka_loss(X, Y, dims=[2], logit_scale=1.0)),
    (TypeError, "logit_scale must be a tensor, got list", lambda: ik.multi_head_loss(ik.clip_loss, X[None], Y[None], logit_scale=[1.0])),
    (TypeError, "MultiPositiveInfoNCE has no option foo: expected some of positives", lambda: ik.MultiPositiveInfoNCE(foo=1)),
    (TypeError, "has no option query_ids", lambda: ik.MultiPositiveInfoNCE(query_ids=IDS)),
    (TypeError, "x must be dense, got torch.sparse_coo", lambda: ik.uniformity_loss(X.to_sparse())),
    (ValueError, "dims must be widths from 1 to 3", lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[4], logit_scale=1.0)),
    (ValueError, "weights must be one for each of 2 dims", lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[1, 2], weights=[1.0], logit_scale=1.0)),
    (TypeError, "needs the features", lambda: ik.matryoshka_loss(ik.clip_loss, dims=[1])),
    (ValueError, r"features 1 must have shape \(2, N, D\)", lambda: ik.multi_head_loss(ik.clip_loss, X.expand(2, 5, 3), X, logit_scale=torch.ones(2))),
    (ValueError, r"logit_scale must have shape \(2,\)", lambda: ik.multi_head_loss(ik.clip_loss, X.expand(2, 5, 3), X.expand(2, 5, 3), logit_scale=torch.ones(3))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
