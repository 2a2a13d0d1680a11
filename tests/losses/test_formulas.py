"""InfoNCE, CLIP, SigLIP, SupCon, NT-Xent and ITO against their formulas, written out per anchor."""

import numpy as np
import pytest
import torch
from support.formulas import anchor_losses, check, infonce, nt_xent, random_ids, unit
from support.problems import AVAILABLE
from torch.nn.functional import cross_entropy, normalize

import ito_kernels as ik

SHAPES = [(1, 1, 1), (1, 7, 3), (7, 1, 70), (13, 31, 70), (31, 13, 3)]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_multi_positive_infonce(n, m, d, empty, symmetric, positives, backend):
    """Unequal groups, anchors without positives and padding, in value and gradient."""
    q, k = unit(n, d).requires_grad_(), unit(m, d, seed=1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    groups = max(1, min(n, m) // 2)
    ids = random_ids(n, groups, 2, padded=n > 7), random_ids(m, groups + 1, 3, padded=m > 7)
    options = {"positives": positives, "symmetric": symmetric, "empty": empty}
    loss = ik.multi_positive_infonce(
        q, k, scale, query_ids=ids[0], key_ids=ids[1], backend=backend, **options
    )
    truth = infonce(q, k, scale, *ids, **options)
    if truth.requires_grad:
        check(loss, truth, [q, k, scale])
    else:  # no anchor has a positive
        assert loss == 0


@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
def test_exclude_self(positives):
    x = unit(30, 8).requires_grad_()
    ids = random_ids(30, 9, 4, padded=True)
    options = {"exclude_self": True, "positives": positives}
    loss = ik.multi_positive_infonce(x, x, 9.0, query_ids=ids, key_ids=ids, **options)
    check(loss, infonce(x, x, 9.0, ids, ids, **options), [x])
    y = unit(30, 8, seed=1).requires_grad_()
    loss = ik.multi_positive_infonce(x, y, 9.0, query_ids=ids, key_ids=ids, **options)
    check(loss, infonce(x, y, 9.0, ids, ids, **options), [x, y])


@pytest.mark.parametrize("given", ["query_ids", "key_ids"])
def test_a_side_without_ids_has_its_row_numbers(given):
    q, k = unit(6, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    ids, rows = torch.tensor([3, 1, 3, -1, 0, 5]), torch.arange(6)
    sides = (ids, rows) if given == "query_ids" else (rows, ids)
    loss = ik.multi_positive_infonce(q, k, 5.0, **{given: ids})
    check(loss, infonce(q, k, 5.0, *sides), [q, k])


def test_scale_per_row():
    q, k = unit(12, 5).requires_grad_(), unit(12, 5, seed=1).requires_grad_()
    scale = torch.linspace(1, 30, 12, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(12)
    check(ik.multi_positive_infonce(q, k, scale), infonce(q, k, scale, ids, ids), [q, k, scale])


def test_clip_loss_by_ids():
    x, y = unit(9, 5).requires_grad_(), unit(7, 5, seed=1).requires_grad_()
    ids, others = random_ids(9, 4, seed=2), random_ids(7, 4, seed=3, padded=True)
    loss = ik.clip_loss(x, y, 10.0, query_ids=ids, key_ids=others, positives="sum")
    check(loss, infonce(x, y, 10.0, ids, others, positives="sum"), (x, y))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 200.0])
def test_clip_loss_in_fp32(scale, backend):
    """At most twice the error of dense PyTorch in fp32 (gradients: three times), plus ε."""
    x, y = unit(300, 70), unit(300, 70, seed=1)
    y = normalize(x + 0.3 * y, dim=1)
    target = torch.arange(300)

    def dense(x, y, s):
        S = s * x @ y.T
        return 0.5 * (cross_entropy(S, target) + cross_entropy(S.T, target))

    def value_and_grads(f, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in (x.float(), y.float(), torch.tensor(scale))]
        loss = f(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = value_and_grads(lambda x, y, s: ik.clip_loss(x, y, s, backend=backend), torch.float32)
    peer, truth = value_and_grads(dense, torch.float32), value_and_grads(dense, torch.float64)
    for i, (v, p, t) in enumerate(zip(ours, peer, truth, strict=True)):
        eps = 1e-6 * (1 + scale) if i == 0 else 1e-5 * t.abs().max()
        assert (v - t).abs().max() <= (2 if i == 0 else 3) * (p - t).abs().max() + eps


def test_reductions():
    q, k = unit(6, 4), unit(9, 4, seed=1)
    ids = random_ids(6, 3, 2), random_ids(9, 4, 3)
    S = 5 * q @ k.T
    rows, cols = anchor_losses(S, *ids), anchor_losses(S.T, ids[1], ids[0])
    rows, cols = ([x or torch.zeros((), dtype=torch.float64) for x in v] for v in (rows, cols))
    options = {"query_ids": ids[0], "key_ids": ids[1]}
    ours = ik.multi_positive_infonce(q, k, 5.0, reduction="none", **options)
    torch.testing.assert_close(ours, (torch.stack(rows), torch.stack(cols)))
    ours = ik.multi_positive_infonce(q, k, 5.0, reduction="none", symmetric=False, **options)
    torch.testing.assert_close(ours, torch.stack(rows))
    ours = ik.multi_positive_infonce(q, k, 5.0, reduction="sum", **options)
    torch.testing.assert_close(ours, 0.5 * (sum(rows) + sum(cols)))


@pytest.mark.parametrize("n", [1, 4])
def test_every_anchor_padded_is_zero(n):
    q, none = unit(n, 3).requires_grad_(), torch.full((n,), -1)
    for empty in ("zero", "drop"):
        for scale in (5.0, torch.full((n,), torch.nan)):
            loss = ik.multi_positive_infonce(
                q, q.detach(), scale, query_ids=none, key_ids=none, empty=empty
            )
            assert loss == 0
            assert torch.equal(torch.autograd.grad(loss, q)[0], torch.zeros_like(q))


def test_normalize():
    q, k = torch.randn(5, 3), torch.randn(5, 3)
    loss = ik.clip_loss(q, k, 3.0, normalize=True)
    torch.testing.assert_close(loss, ik.clip_loss(normalize(q), normalize(k), 3.0))


def test_normalize_leaves_padding_alone():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    x[1] = torch.nan
    x.requires_grad_()
    ids = torch.tensor([0, -1, 1, 2])
    options = {"query_ids": ids, "key_ids": ids.abs()}
    ik.multi_positive_infonce(x, y, 20.0, normalize=True, **options).backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[1], torch.zeros(3))


def test_a_nan_anchor_without_positives_shows():
    x = unit(5, 3)
    x[2] = torch.nan
    assert ik.supcon_loss(x, torch.arange(5)).isnan()


@pytest.mark.parametrize("positives", ["mean", "in"])
def test_stats(positives):
    q, k = unit(20, 6), unit(25, 6, seed=1)
    row_ids, col_ids = random_ids(20, 8, 2, padded=True), random_ids(25, 8, 3, padded=True)
    S = 4 * q @ k.T
    loss, stats = ik.multi_positive_infonce(
        q, k, 4.0, query_ids=row_ids, key_ids=col_ids, positives=positives, return_stats=True
    )
    plain = ik.multi_positive_infonce(
        q, k, 4.0, query_ids=row_ids, key_ids=col_ids, positives=positives
    )
    assert loss == plain
    valid = [j for j in range(25) if col_ids[j] >= 0]
    right, positive, hardest = [], [], []
    for i in range(20):
        if row_ids[i] < 0:
            assert stats["row_lse"][i] == -torch.inf
            continue
        torch.testing.assert_close(stats["row_lse"][i], S[i, valid].logsumexp(0))
        same = [j for j in valid if col_ids[j] == row_ids[i]]
        others = [j for j in valid if col_ids[j] != row_ids[i]]
        hardest.append(S[i, others].max())
        if same:
            right.append(float(S[i, same].max() > S[i, others].max()))
            positive.append(S[i, same].mean())
    torch.testing.assert_close(stats["row_accuracy"].item(), sum(right) / len(right))
    torch.testing.assert_close(stats["positive_score"], torch.stack(positive).mean())
    torch.testing.assert_close(stats["hardest_negative_score"], torch.stack(hardest).mean())
    best = S.masked_fill((row_ids < 0)[:, None], -torch.inf).argmax(0)
    cols = [j for j in valid if (row_ids == col_ids[j]).any()]
    right = [float(row_ids[best[j]] == col_ids[j]) for j in cols]
    torch.testing.assert_close(stats["col_accuracy"].item(), sum(right) / len(right))
    torch.testing.assert_close(
        0.5 * (_mean_loss(stats, "row", row_ids) + _mean_loss(stats, "col", col_ids)), loss
    )
    _, stats = ik.clip_loss(q, k[:20], 4.0, symmetric=False, return_stats=True)
    assert stats["col_loss"] is stats["col_lse"] is stats["col_accuracy"] is None


def _mean_loss(stats, side, ids):
    return stats[f"{side}_loss"].sum() / (ids >= 0).sum()


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_siglip_loss(n, m, d):
    x, y = unit(n, d).requires_grad_(), unit(m, d, seed=1).requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, -10.0))
    ids = random_ids(n, 5, 2, padded=n > 7), random_ids(m, 5, 3, padded=m > 7)
    sign = torch.where(ids[0][:, None] == ids[1], 1.0, -1.0)
    pair = torch.log1p(torch.exp(-sign * (scale * x @ y.T + bias)))
    pair = pair * ((ids[0] >= 0)[:, None] & (ids[1] >= 0))
    options = {"image_ids": ids[0], "text_ids": ids[1]}
    truth = pair.sum() / (ids[0] >= 0).sum()
    check(ik.siglip_loss(x, y, scale, bias, **options), truth, [x, y, scale, bias])
    rows = ik.siglip_loss(x, y, scale, bias, reduction="none", **options)
    torch.testing.assert_close(rows, pair.sum(1))
    torch.testing.assert_close(
        ik.siglip_loss(x, y, scale, bias, reduction="sum", **options), pair.sum()
    )


def test_siglip_default_ids_are_the_diagonal():
    x, y = unit(9, 4), unit(9, 4, seed=1)
    sign = 2 * torch.eye(9, dtype=torch.float64) - 1
    truth = torch.log1p(torch.exp(-sign * (10 * x @ y.T - 10))).sum() / 9
    torch.testing.assert_close(ik.siglip_loss(x, y, 10.0, -10.0), truth)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (33, 70)])
def test_nt_xent_loss(n, d):
    z1, z2 = unit(n, d).requires_grad_(), unit(n, d, seed=1).requires_grad_()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    check(ik.nt_xent_loss(z1, z2, tau), nt_xent(z1, z2, 1 / tau), [z1, z2, tau])


def test_supcon_loss():
    x, labels = unit(33, 7).requires_grad_(), random_ids(33, 12, 5)
    options = {"symmetric": False, "exclude_self": True}
    for empty in ("zero", "drop"):
        truth = infonce(x, x, 1 / 0.07, labels, labels, empty=empty, **options)
        check(ik.supcon_loss(x, labels, empty=empty), truth, [x])
    scaled = ik.supcon_loss(x, labels, 0.1, base_temperature=0.07)
    torch.testing.assert_close(scaled, ik.supcon_loss(x, labels, 0.1) * 0.1 / 0.07)


def views(count, n=6, d=5, seed=0):
    return unit(count, n, d, seed=seed).requires_grad_()


@pytest.mark.parametrize(("v", "c"), [(2, 1), (1, 1), (3, 2)])
def test_ito_loss_pair(v, c):
    x, y, h = views(v), views(c, seed=1), views(2, seed=2)
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6)
    align = torch.stack([infonce(a, b, scale, ids, ids) for a in x for b in y]).mean()
    fusion = nt_xent(h[0], h[1], scale)
    loss, terms = ik.ito_loss(x, y if c > 1 else y[0], h, scale, lambda_fusion=1.5)
    torch.testing.assert_close(terms, {"align": align, "fusion": fusion})
    check(loss, align + 1.5 * fusion, [x, y, h, scale])


def test_ito_loss_pooled():
    x, y, h = views(3), views(2, seed=1), views(4, seed=2)
    items = torch.arange(6)
    align = infonce(x.flatten(0, 1), y.flatten(0, 1), 6.0, items.repeat(3), items.repeat(2))
    flat, ids = h.flatten(0, 1), items.repeat(4)
    fusion = infonce(flat, flat, 6.0, ids, ids, symmetric=False, exclude_self=True)
    loss, terms = ik.ito_loss(x, y, h, 6.0, denominator="pooled")
    torch.testing.assert_close(terms, {"align": align, "fusion": fusion})
    check(loss, align + 2.0 * fusion, [x, y, h])
    pair, _ = ik.ito_loss(x, y, h, 6.0, denominator="pair")
    assert abs(pair - loss) > 0.1  # two different objectives


def test_ito_loss_without_fusion():
    x, y, h = views(2), views(1, seed=1), views(2, seed=2)
    alone, terms = ik.ito_loss(x, y, None, 6.0, lambda_fusion=0)
    assert terms["fusion"] == 0
    loss, terms = ik.ito_loss(x, y, h, 6.0, lambda_fusion=0)
    assert loss == alone
    torch.testing.assert_close(terms["fusion"], nt_xent(h[0], h[1], 6.0))
    assert not terms["fusion"].requires_grad


def test_modules_are_their_functions():
    x, y, z = unit(8, 5), unit(8, 5, seed=1), unit(8, 5, seed=2)
    scale, bias, labels = torch.tensor(9.0, dtype=torch.float64), -3.0, torch.arange(8) // 2
    clip, siglip = ik.clip_loss(x, y, scale), ik.siglip_loss(x, y, scale, bias)
    open_clip_flags = {"local_loss": True, "gather_with_grad": True, "cache_labels": True}
    assert ik.ClipLoss(**open_clip_flags)(x, y, scale) == clip
    assert ik.ClipLoss()(x, y, scale, output_dict=True) == {"contrastive_loss": clip}
    assert ik.SigLipLoss(cache_labels=True)(x, y, scale, bias) == siglip
    assert ik.SigLipLoss()(x, y, scale, bias, output_dict=True) == {"contrastive_loss": siglip}
    options = {"positives": "in", "symmetric": False}
    assert ik.MultiPositiveInfoNCE(**options)(x, y, scale, labels, labels) == (
        ik.multi_positive_infonce(x, y, scale, query_ids=labels, key_ids=labels, **options)
    )
    of_batch = {"queue": z}
    assert ik.MultiPositiveInfoNCE(**options)(x, y, scale, **of_batch) == (
        ik.multi_positive_infonce(x, y, scale, **options, **of_batch)
    )
    assert ik.SupConLoss(0.1)(x, labels) == ik.supcon_loss(x, labels, 0.1)
    by_sum = ik.SupConLoss(0.1, positives="in")(x, labels)
    assert by_sum == ik.supcon_loss(x, labels, 0.1, positives="in")
    assert ik.NTXentLoss(0.1)(x, y) == ik.nt_xent_loss(x, y, 0.1)
    images, fused = torch.stack([x, y]), torch.stack([y, z])
    assert (
        ik.ItoLoss(1.0, "pooled")(images, z, fused, scale)[0]
        == (ik.ito_loss(images, z, fused, scale, lambda_fusion=1.0, denominator="pooled")[0])
    )
    ids = {"caption_ids": labels, "fused_ids": labels // 2, "fusion_scale": 5.0}
    of_ids = ik.ItoLoss(equal_ids="ignore")(images, z, fused, scale, **ids)
    assert of_ids == ik.ito_loss(images, z, fused, scale, equal_ids="ignore", **ids)


def test_numbers_of_numpy_are_numbers():
    x, y = unit(8, 5), unit(8, 5, seed=1)
    ours = ik.clip_loss(x, y, np.float32(9), hardness=np.float64(0.5))
    assert ours == ik.clip_loss(x, y, 9.0, hardness=0.5)


def test_losses_are_fp32_scalars():
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x, y = unit(8, 5, dtype=dtype), unit(8, 5, seed=1, dtype=dtype)
        for loss in (
            ik.clip_loss(x, y, 5.0),
            ik.siglip_loss(x, y, 5.0, -5.0),
            ik.nt_xent_loss(x, y),
            ik.ito_loss(x[None], y, torch.stack([x, y]), 5.0)[0],
        ):
            assert loss.shape == ()
            assert loss.dtype == out


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_features_that_are_not_finite_show(backend, wrong, symmetric, trains):
    a, b = (normalize(torch.rand(5, 3), dim=1) for _ in range(2))  # the scores are positive
    b[2, 0] = wrong  # a score of -inf at a positive among them
    a.requires_grad_(trains)
    for reduction in ("mean", "sum"):
        options = {"symmetric": symmetric, "reduction": reduction, "backend": backend}
        assert not ik.clip_loss(a, b, 10.0, **options).isfinite()
        one = ik.clip_loss(a[:1], b[2:3], 10.0, **options)
        assert not one.isfinite()
