"""The margin for false negatives, against its definition on the dense matrix in fp64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import ito_kernels as ik

D, SCALE = 24, 5.0
BACKENDS = [x for x in ("reference", "chunked", "cpu") if ik.backends()[x].available]


def dense(a, b, ids_a, ids_b, margin, *, positives="mean", exclude_self=False, extra=None, **o):
    """One direction: (N,) losses. extra: scores' inner products beyond the batch, (N, E)."""
    dot = a @ b.T
    positive = ids_a[:, None] == ids_b[None, :]
    allowed = (ids_a >= 0)[:, None] & (ids_b >= 0)[None, :]
    if exclude_self:
        allowed &= ~torch.eye(len(a), dtype=torch.bool)
    positive &= allowed
    if extra is not None:
        dot = torch.cat([dot, extra], 1)
        none = torch.zeros(extra.shape, dtype=torch.bool)
        positive, allowed = torch.cat([positive, none], 1), torch.cat([allowed, ~none], 1)
    top = dot.masked_fill(~positive, -torch.inf).amax(1)
    limit = torch.where(top == -torch.inf, torch.inf, top + margin)
    negative = allowed & ~positive & ~(dot > limit[:, None])
    S, k = SCALE * dot, positive.sum(1).double()
    exp, some = S.exp(), k > 0
    pos, neg = (exp * positive).sum(1), (exp * negative).sum(1)
    number = negative.sum(1).double()
    if o.get("hardness"):
        w = (o["hardness"] * S).exp()
        neg = number * (w * exp * negative).sum(1) / (w * negative).sum(1).clamp(min=1e-300)
    if o.get("debias"):
        tau = o["debias"]
        true = (neg - number * tau * pos / k.clamp(min=1)) / (1 - tau)
        neg = torch.maximum(true, number * math.exp(-SCALE))
    log_denominator = torch.where(some, pos + neg, 1).log()
    if positives == "mean":
        target = (S * positive).sum(1) / k.clamp(min=1)
    else:
        target = torch.where(some, pos, 1).log()
        if positives == "in":
            target = target - k.clamp(min=1).log()
    return torch.where(some, log_denominator - target, 0)


def make(n=41, m=41, groups=12, padded=True, seed=0):
    """Noisy pairs: many negatives lie above an anchor's positive."""
    g = torch.Generator().manual_seed(seed)
    ids_a, ids_b = (torch.randint(0, groups, (k,), generator=g) for k in (n, m))
    if padded:
        ids_a, ids_b = (
            torch.where(torch.rand(len(i), generator=g) < 0.1, -1, i) for i in (ids_a, ids_b)
        )
    a, b = (normalize(torch.randn(k, D, generator=g, dtype=torch.float64), dim=1) for k in (n, m))
    return a, b, ids_a, ids_b


def compare(ours, truth, inputs, tolerance):
    for x, y in zip(ours, truth, strict=True):
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())
    gradients = [
        torch.autograd.grad(sum((z * z).sum() for z in zs), inputs) for zs in (ours, truth)
    ]
    for x, y in zip(*gradients, strict=True):
        assert (x - y).abs().max() <= 10 * tolerance * (1 + y.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.15])
@pytest.mark.parametrize("more", [{}, {"debias": 0.1}, {"hardness": 0.7}])
def test_both_directions(backend, positives, margin, more):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    a, b, ids_a, ids_b = make(m=53)
    a, b = (x.requires_grad_() for x in (a, b))
    ours = ik.multi_positive_infonce(
        a.to(dtype),
        b.to(dtype),
        SCALE,
        query_ids=ids_a,
        key_ids=ids_b,
        positives=positives,
        false_negative_margin=margin,
        reduction="none",
        backend=backend,
        **more,
    )
    truth = (
        dense(a, b, ids_a, ids_b, margin, positives=positives, **more),
        dense(b, a, ids_b, ids_a, margin, positives=positives, **more),
    )
    plain = dense(a, b, ids_a, ids_b, 10.0, positives=positives, **more)
    assert (plain - truth[0]).abs().max() > 1e-2  # the margin does something here
    compare(ours, truth, (a, b), 1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_one_tower_and_no_ids(exclude_self):
    a, b, ids, _ = make(padded=False)
    if exclude_self:
        (ours, _), x = (
            ik.multi_positive_infonce(
                a,
                a,
                SCALE,
                query_ids=ids,
                key_ids=ids,
                exclude_self=True,
                reduction="none",
                false_negative_margin=0.05,
                backend="chunked",
            ),
            a,
        )
        truth = dense(a, x, ids, ids, 0.05, exclude_self=True)
    else:
        ours, _ = ik.clip_loss(
            a, b, SCALE, false_negative_margin=0.05, reduction="none", backend="chunked"
        )
        truth = dense(a, b, torch.arange(41), torch.arange(41), 0.05)
    assert (ours - truth).abs().max() < 1e-11


@pytest.mark.parametrize("more", [{}, {"debias": 0.1}, {"hardness": 0.7}])
def test_queue_and_hard_negatives(more):
    a, b, ids_a, ids_b = make(padded=False)
    g = torch.Generator().manual_seed(5)
    queue = normalize(torch.randn(30, D, generator=g, dtype=torch.float64), dim=1)
    hard = normalize(torch.randn(41, 4, D, generator=g, dtype=torch.float64), dim=2)
    a.requires_grad_(), hard.requires_grad_()
    ours = ik.multi_positive_infonce(
        a,
        b,
        SCALE,
        query_ids=ids_a,
        key_ids=ids_b,
        symmetric=False,
        queue=queue,
        hard_negatives=hard,
        false_negative_margin=0.0,
        reduction="none",
        **more,
    )
    extra = torch.cat([a @ queue.T, (hard * a[:, None]).sum(2)], 1)
    truth = dense(a, b, ids_a, ids_b, 0.0, extra=extra, **more)
    compare([ours], [truth], (a, hard), 1e-11)


@pytest.mark.parametrize("more", [{}, {"debias": 0.1, "hardness": 0.7}])
@pytest.mark.parametrize("norm", [1.0, 30.0])
def test_pairs(norm, more):
    """Pairs that say what ids would say give the same loss."""
    a, b, ids_a, ids_b = make(padded=False)
    a, b = ((norm * x).float() for x in (a, b))
    pairs = (ids_a[:, None] == ids_b[None, :]).nonzero()
    by_ids, by_pairs = (
        ik.multi_positive_infonce(a, b, SCALE / norm**2, false_negative_margin=0.0, **kind, **more)
        for kind in ({"query_ids": ids_a, "key_ids": ids_b}, {"positive_pairs": pairs})
    )
    assert abs(by_ids - by_pairs) < 1e-3  # limits differ by 1e-5 of the norms' product


def test_a_pair_without_weight_sets_no_margin():
    a, b, ids_a, ids_b = make(padded=False)
    pairs = (ids_a[:, None] == ids_b[None, :]).nonzero()
    others = torch.stack([pairs[:, 0], (a @ b.T).argmax(1)[pairs[:, 0]]], 1)
    others = others[ids_a[others[:, 0]] != ids_b[others[:, 1]]]
    listed = {
        "positive_pairs": torch.cat([pairs, others]),
        "positive_weights": torch.cat([torch.ones(len(pairs)), torch.zeros(len(others))]).double(),
    }
    options = {"false_negative_margin": 0.1}
    alone = ik.multi_positive_infonce(a, b, SCALE, positive_pairs=pairs, **options)
    assert ik.multi_positive_infonce(a, b, SCALE, **listed, **options) == alone


def test_one_scale_for_each_query():
    a, b, ids_a, ids_b = make(padded=False)
    scale = torch.full((41,), SCALE, dtype=torch.float64)
    options = {"query_ids": ids_a, "key_ids": ids_b, "false_negative_margin": 0.0}
    ours = ik.multi_positive_infonce(a, b, scale, symmetric=False, reduction="none", **options)
    assert (ours - dense(a, b, ids_a, ids_b, 0.0)).abs().max() < 1e-11
    with pytest.raises(NotImplementedError, match="needs symmetric=False"):
        ik.multi_positive_infonce(a, b, scale, **options)
    with pytest.raises(NotImplementedError, match="label_smoothing with false_negative_margin"):
        ik.clip_loss(a, b, SCALE, false_negative_margin=0.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="false_negative_margin must be finite, got nan"):
        ik.clip_loss(a, b, SCALE, false_negative_margin=float("nan"))
    with pytest.raises(ValueError, match="0 or more with positive_pairs"):
        ik.multi_positive_infonce(
            a, b, SCALE, positive_pairs=torch.zeros(1, 2).long(), false_negative_margin=-0.1
        )
