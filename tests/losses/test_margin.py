"""The margin for false negatives, against its definition on the dense matrix in fp64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.similarity import panelwise

D, SCALE = 24, 5.0
BACKENDS = [x for x in ("reference", "chunked", "cpu") if ik.backends()[x].available]


def dense(a, b, ids_a, ids_b, margin, *, positives="mean", exclude_self=False, extra=None, **o):
    """One direction: (N,) losses. extra: inner products beyond the batch, (N, E), and which of them
    are candidates. scale: one, or for each anchor (N, 1) or candidate (1, M)."""
    dot = a @ b.T
    positive = ids_a[:, None] == ids_b[None, :]
    allowed = (ids_a >= 0)[:, None] & (ids_b >= 0)[None, :]
    if exclude_self:
        allowed &= ~torch.eye(len(a), dtype=torch.bool)
    positive &= allowed
    if extra is not None:
        dot = torch.cat([dot, extra[0]], 1)
        positive = torch.cat([positive, torch.zeros_like(extra[1])], 1)
        allowed = torch.cat([allowed, extra[1]], 1)
    top = dot.masked_fill(~positive, -torch.inf).amax(1)
    compared = dot.detach()
    if o.get("guide") is not None:  # it says nothing of what is beyond the batch
        compared = torch.full_like(compared, -torch.inf)
        compared[:, : len(b)] = o["guide"][0] @ o["guide"][1].T
        top = compared.masked_fill(~positive, -torch.inf).amax(1)
    margin = margin * top.abs() if o.get("margin_type") == "relative" else margin
    limit = torch.where(top == -torch.inf, torch.inf, top + margin)
    above = compared > limit[:, None]
    if o.get("margin_on") == "in_batch":
        above[:, len(b) :] = False
    negative = allowed & ~positive & ~above
    S, k = o.get("scale", SCALE) * dot, positive.sum(1).double()
    if o.get("hardness_mode") == "all":
        S = S + o["hardness_strength"] * (dot * ~positive).detach()
    if o.get("key_bias") is not None:
        S = torch.cat([S[:, : len(b)] + o["key_bias"], S[:, len(b) :]], 1)
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
    loss = log_denominator - target
    if o.get("label_smoothing"):
        mean = (S * (positive | negative)).sum(1) / (k + number).clamp(min=1)
        loss = loss + o["label_smoothing"] * (target - mean)
    return torch.where(some, loss, 0)


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


def with_more(*options: dict) -> list[tuple]:
    """(backend, options): all backends without any, one with each: there they only add passes."""
    return [*((backend, {}) for backend in BACKENDS), *(("chunked", more) for more in options)]


@pytest.mark.parametrize(
    ("backend", "more"),
    with_more({"debias": 0.1}, {"hardness": 0.7}, {"margin_type": "relative"}),
)
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.15])
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


@pytest.mark.parametrize(
    ("backend", "more"), with_more({"label_smoothing": 0.3}, {"hardness": 0.7})
)
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("per_query", [False, True])
def test_what_the_kernels_do_not_sum(backend, positives, per_query, more):
    """The scores that the margin leaves, and columns with a limit each and a scale for each row."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    a, b, ids_a, ids_b = make(m=53, groups=25)
    assert not torch.isin(ids_a, ids_b).all()  # some anchors have no positive
    scale, bias = torch.linspace(2, 8, 41).double(), torch.linspace(-1, 1, 53).double()
    inputs = tuple(x.requires_grad_() for x in (a, b, scale, bias))
    scales = scale if per_query else scale[0]
    padding = (x.masked_fill((i < 0)[:, None], torch.nan) for x, i in ((a, ids_a), (b, ids_b)))
    bias = bias.masked_fill(ids_b < 0, torch.nan)
    ours = ik.multi_positive_infonce(
        *(x.to(dtype) for x in (*padding, scales)),
        query_ids=ids_a,
        key_ids=ids_b,
        positives=positives,
        false_negative_margin=0.0,
        reduction="none",
        key_bias=bias.to(dtype),
        backend=backend,
        **more,
    )
    more = {**more, "positives": positives}
    rows = {**more, "scale": scales.reshape(-1, 1), "key_bias": inputs[3]}
    cols = {**more, "scale": scales.reshape(1, -1)}
    truth = (
        dense(a, b, ids_a, ids_b, 0.0, **rows),
        dense(b, a, ids_b, ids_a, 0.0, **cols),
    )
    assert (dense(b, a, ids_b, ids_a, 10.0, **cols) - truth[1]).abs().max() > 1e-2
    compare(ours, truth, inputs, 1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("one_tower", [False, True])
def test_one_tower_and_no_ids(one_tower, per_query):
    a, b, ids, _ = make(padded=False)
    scale = torch.linspace(2, 8, 41).double() if per_query else torch.tensor(SCALE).double()
    smoothing = {"label_smoothing": 0.3} if per_query else {}
    shared = {"false_negative_margin": 0.05, "reduction": "none", "backend": "chunked"}
    if one_tower:
        b, shared = a, {**shared, "query_ids": ids, "key_ids": ids, "exclude_self": True}
    else:
        ids = torch.arange(41)
    ours = ik.multi_positive_infonce(a, b, scale, **shared, **smoothing)
    truth = (
        dense(x, y, ids, ids, 0.05, exclude_self=one_tower, scale=scale.reshape(s), **smoothing)
        for x, y, s in ((a, b, (-1, 1)), (b, a, (1, -1)))
    )
    for x, y in zip(ours, truth, strict=True):
        assert (x - y).abs().max() < 1e-11


@pytest.mark.parametrize("margin_on", ["all", "in_batch"])
@pytest.mark.parametrize("more", [{}, {"debias": 0.1}, {"hardness": 0.7}, {"label_smoothing": 0.3}])
def test_queue_and_hard_negatives(more, margin_on):
    more = more | {"margin_on": margin_on}
    a, b, ids_a, ids_b = make(padded=False)
    g = torch.Generator().manual_seed(5)
    queue = normalize(torch.randn(30, D, generator=g, dtype=torch.float64), dim=1)
    queue_ids = torch.randint(-3, 12, (30,), generator=g)
    hard = normalize(torch.randn(41, 4, D, generator=g, dtype=torch.float64), dim=2)
    a.requires_grad_(), hard.requires_grad_()
    ours = ik.multi_positive_infonce(
        a,
        b,
        SCALE,
        query_ids=ids_a,
        key_ids=ids_b,
        queue=queue.masked_fill((queue_ids < 0)[:, None], torch.nan),
        queue_ids=queue_ids,
        hard_negatives=hard,
        false_negative_margin=0.0,
        reduction="none",
        **more,
    )
    others = (queue_ids >= 0) & (ids_a[:, None] != queue_ids)
    extra = torch.cat([a @ queue.T, (hard * a[:, None]).sum(2)], 1)
    extra = extra, torch.cat([others, torch.ones(41, 4, dtype=torch.bool)], 1)
    truth = (
        dense(a, b, ids_a, ids_b, 0.0, extra=extra, **more),
        dense(b, a, ids_b, ids_a, 0.0, **more),
    )
    compare(ours, truth, (a, hard), 1e-11)


@pytest.mark.parametrize("more", [{}, {"debias": 0.1, "hardness": 0.7}, {"label_smoothing": 0.3}])
@pytest.mark.parametrize("norm", [1.0, 30.0])
def test_pairs(norm, more):
    """Pairs that say what ids would say give the same loss."""
    a, b, ids_a, ids_b = make(padded=False)
    a, b = ((norm * x).float() for x in (a, b))
    pairs = (ids_a[:, None] == ids_b[None, :]).nonzero()
    scale = torch.linspace(2, 8, 41) if "label_smoothing" in more else SCALE
    by_ids, by_pairs = (
        ik.multi_positive_infonce(a, b, scale / norm**2, false_negative_margin=0.0, **kind, **more)
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


def test_a_self_pair_that_is_left_out_sets_no_margin():
    a, b, ids_a, ids_b = make(padded=False)
    own = torch.arange(41).expand(2, -1).T
    pairs = (ids_a[:, None] == ids_b[None, :]).fill_diagonal_(False).nonzero()
    with_own, without = (
        ik.multi_positive_infonce(
            a, b, SCALE, positive_pairs=listed, exclude_self=True, false_negative_margin=0.0
        )
        for listed in (torch.cat([pairs, own]), pairs)
    )
    torch.testing.assert_close(with_own, without)


def test_half_precision_meets_in_fp32():
    """Of columns whose denominators the kernels do not sum, and whose positives they do."""
    a, b, ids_a, ids_b = make()
    a, b = (x.bfloat16().requires_grad_() for x in (a, b))
    options = {"query_ids": ids_a, "key_ids": ids_b, "false_negative_margin": 0.0}
    losses = [
        ik.multi_positive_infonce(x, y, torch.linspace(2, 8, 41), **options)
        for x, y in ((a, b), (a.float(), b.float()))
    ]
    assert torch.equal(*losses)
    for x, y in zip(*(torch.autograd.grad(loss, (a, b)) for loss in losses), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_relative_margin_of_pairs(margin):
    """Those of ids, where both say the same."""
    a, b, ids_a, ids_b = (x for x in make(padded=False))
    options = {"false_negative_margin": margin, "margin_type": "relative"}
    pairs = (ids_a[:, None] == ids_b).nonzero()
    ours = ik.multi_positive_infonce(a, b, SCALE, positive_pairs=pairs, **options)
    losses = (
        dense(a, b, ids_a, ids_b, margin, **options),
        dense(b, a, ids_b, ids_a, margin, **options),
    )
    torch.testing.assert_close(ours, (losses[0].mean() + losses[1].mean()) / 2)


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of 10 rows or so. Kept for backward are the masks of the first three, or the inner
    products of the first."""
    monkeypatch.setattr(panelwise, "PANEL_SCORES", 512)
    monkeypatch.setattr(panelwise, "MIN_ROWS", 1)
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", "6000")


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("margin_type", ["absolute", "relative"])
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"label_smoothing": 0.3},
        {"debias": 0.1, "hardness": 0.7},
        {"hardness_mode": "all", "hardness_strength": 3.0},
    ],
)
def test_guide(more, per_query, positives, margin_type):
    """GISTEmbed: the margin compares embeddings of another model. A queue and hard negatives have
    none and stay."""
    a, b, ids_a, ids_b = make(m=53, groups=25)
    guide = tuple(x[:, :7] + 0.3 * y[:, :7] for x, y in ((a, a.roll(1, 1)), (b, b.roll(1, 1))))
    scale, bias = torch.linspace(2, 8, 41).double(), torch.linspace(-1, 1, 53).double()
    g = torch.Generator().manual_seed(5)
    queue = normalize(torch.randn(30, D, generator=g, dtype=torch.float64), dim=1)
    hard = normalize(torch.randn(41, 4, D, generator=g, dtype=torch.float64), dim=2)
    inputs = tuple(x.requires_grad_() for x in (a, b, scale, bias, hard))
    scales = scale if per_query else scale[-1]
    if "debias" in more:  # needs one scale for the keys' direction
        scales = torch.tensor(SCALE).double()
        inputs = (a, b, bias, hard)
    nan = [(i < 0)[:, None] for i in (ids_a, ids_b)]
    padded = (x.masked_fill(i, torch.nan) for x, i in zip((a, b), nan, strict=True))
    padded_guide = [x.masked_fill(i, torch.nan) for x, i in zip(guide, nan, strict=True)]
    options = {"false_negative_margin": -0.05, "margin_type": margin_type, **more}
    ours = ik.multi_positive_infonce(
        *padded,
        scales,
        query_ids=ids_a,
        key_ids=ids_b,
        positives=positives,
        key_bias=bias.masked_fill(ids_b < 0, torch.nan),
        queue=queue,
        hard_negatives=hard,
        guide_queries=padded_guide[0],
        guide_keys=padded_guide[1],
        reduction="none",
        **options,
    )
    extra = torch.cat([a @ queue.T, (hard * a[:, None]).sum(2)], 1)
    extra = extra, (ids_a >= 0)[:, None].expand(-1, 34)
    rows = {**options, "positives": positives, "guide": guide, "scale": scales.reshape(-1, 1)}
    cols = {**rows, "guide": guide[::-1], "scale": scales.reshape(1, -1)}
    truth = (
        dense(a, b, ids_a, ids_b, -0.05, key_bias=bias, extra=extra, **rows),
        dense(b, a, ids_b, ids_a, -0.05, **cols),
    )
    unguided = dense(b, a, ids_b, ids_a, -0.05, **{**cols, "guide": None})
    assert (unguided - truth[1]).abs().max() > 1e-2
    compare(ours, truth, inputs, 1e-11)


def test_guide_without_ids_and_of_pairs():
    a, b, *_ = make(padded=False)
    guide = (a + b.roll(1, 0), b + a.roll(3, 0))
    given = {"guide_queries": guide[0], "guide_keys": guide[1], "normalize": True}
    given |= {"false_negative_margin": 0.0}
    ids = torch.arange(41)
    norm = tuple(normalize(x, dim=1) for x in guide)
    truth = (
        dense(a, b, ids, ids, 0.0, guide=norm).mean()
        + dense(b, a, ids, ids, 0.0, guide=norm[::-1]).mean()
    ) / 2
    torch.testing.assert_close(ik.clip_loss(2 * a, 3 * b, SCALE, **given), truth)
    own = {"positive_pairs": ids.expand(2, -1).T}
    torch.testing.assert_close(ik.clip_loss(a, b, SCALE, **own, **given), truth)
    own = {"query_ids": ids % 9, "key_ids": ids % 9, "equal_ids": "ignore"}
    assert ik.clip_loss(a, b, SCALE, **own, **given) != truth


def test_bad_guides():
    a, b, _, _ = make(padded=False)
    both = {"guide_queries": a, "guide_keys": b}
    for option in ("guide_queries", "guide_keys", "false_negative_margin"):
        given = {**both, "false_negative_margin": 0.1}
        del given[option]
        if option != "false_negative_margin":
            with pytest.raises(ValueError, match=f"{option} is missing"):
                ik.clip_loss(a, b, SCALE, **given)
        else:
            with pytest.raises(ValueError, match="false_negative_margin is missing"):
                ik.clip_loss(a, b, SCALE, **given)
    both["false_negative_margin"] = 0.1
    with pytest.raises(ValueError, match="guide_keys must have 41 rows, got 40"):
        ik.clip_loss(a, b, SCALE, **{**both, "guide_keys": b[:40]})
    with pytest.raises(ValueError, match="guide_queries and guide_keys must have the same"):
        ik.clip_loss(a, b, SCALE, **{**both, "guide_keys": b[:, :4]})
    with pytest.raises(ValueError, match="in_batch=False"):
        ik.clip_loss(a, b, SCALE, symmetric=False, in_batch=False, queue=a, **both)


def test_bad_margins():
    a, b, _, _ = make(padded=False)
    with pytest.raises(ValueError, match="margin_type must be one of 'absolute', 'relative', got"):
        ik.clip_loss(a, b, SCALE, false_negative_margin=0.1, margin_type="cosine")
    with pytest.raises(ValueError, match="margin_on='in_batch' needs false_negative_margin"):
        ik.clip_loss(a, b, SCALE, margin_on="in_batch")
    with pytest.raises(ValueError, match="margin_type='relative' needs false_negative_margin"):
        ik.clip_loss(a, b, SCALE, margin_type="relative")
    with pytest.raises(ValueError, match="false_negative_margin must be finite, got nan"):
        ik.clip_loss(a, b, SCALE, false_negative_margin=float("nan"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_margin_of_pairs_does_not_depend_on_the_norms_of_other_rows(backend):
    pairs = {"positive_pairs": torch.tensor([[0, 0], [1, 2]])}
    ids = {"query_ids": torch.tensor([0, 1]), "key_ids": torch.tensor([0, 5, 1])}
    q = torch.tensor([[1.0, 0.0], [0.0, 300.0]])
    k = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.0, 300.0]])
    options = {"false_negative_margin": 0.1, "symmetric": False, "reduction": "none"}
    truth = torch.logsumexp(torch.tensor([0.5, 0.0]), 0) - 0.5  # key 1 is left out
    for kind in (pairs, ids):
        losses = ik.multi_positive_infonce(q, k, 1.0, backend=backend, **kind, **options)
        assert losses[0] == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("margin", [-0.2, 0.0])
def test_pairs_with_a_negative_margin(margin):
    a, b, ids_a, ids_b = make(padded=False)
    pairs = {"positive_pairs": (ids_a[:, None] == ids_b).nonzero()}
    ids = {"query_ids": ids_a, "key_ids": ids_b}
    by_ids, by_pairs = (
        ik.clip_loss(a, b, SCALE, false_negative_margin=margin, label_smoothing=0.2, **kind)
        for kind in (ids, pairs)
    )
    torch.testing.assert_close(by_pairs, by_ids, rtol=1e-12, atol=0)
    inputs = a.requires_grad_(), b.requires_grad_()
    gradients = (
        torch.autograd.grad(
            ik.clip_loss(a, b, SCALE, false_negative_margin=margin, label_smoothing=0.2, **kind),
            inputs,
        )
        for kind in (ids, pairs)
    )
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("d", [33, 512])
def test_copies_of_the_positive_stay_with_a_margin_of_0(d, with_ids, guided, backend):
    """They are not above it; only rounding may say so."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    g = torch.Generator().manual_seed(d)
    texts = normalize(torch.randn(20, d, generator=g, dtype=dtype), dim=1).repeat(3, 1)
    images = normalize(texts + 0.3 * torch.randn(60, d, generator=g, dtype=dtype) / d**0.5, dim=1)
    given = {"query_ids": torch.arange(60), "key_ids": torch.arange(60)} if with_ids else {}
    if guided:
        given |= {"guide_queries": images, "guide_keys": texts}
    zero, more = (
        ik.multi_positive_infonce(
            *(images, texts, 10.0),
            false_negative_margin=margin,
            symmetric=False,
            reduction="none",
            backend=backend,
            **given,
        )
        for margin in (0.0, 1e-4)
    )
    torch.testing.assert_close(zero, more)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_through_a_margin(value):
    a, b, *_ = make(padded=False)
    hard = torch.stack([a, b], 1)
    options = {"false_negative_margin": 0.1, "hard_negatives": hard, "queue": b.clone()}
    options |= {"guide_queries": a.clone(), "guide_keys": b.clone()}
    for name in ("hard_negatives", "queue", "guide_queries", "guide_keys"):
        spoilt = options[name].clone()
        spoilt.view(-1)[0] = value
        found = ik.clip_loss(a.abs(), b, SCALE, **{**options, name: spoilt})
        assert not found.isfinite(), name
        if not name.startswith("guide"):
            plain = {k: x for k, x in options.items() if not k.startswith("guide")}
            assert not ik.clip_loss(a.abs(), b, SCALE, **{**plain, name: spoilt}).isfinite(), name


def test_small_guided_losses_keep_their_digits():
    """The loss is 1.4e-6, of scores of 100: their rounding alone would be 4e-6."""
    g = torch.Generator().manual_seed(0)
    a = normalize(torch.randn(64, 512, generator=g, dtype=torch.float64), dim=1)
    b = normalize(a + 0.9 * normalize(torch.randn(64, 512, generator=g).double(), dim=1), dim=1)
    given = {"guide_queries": a.float(), "guide_keys": b.float(), "false_negative_margin": 0.0}
    for ids in ({}, {"query_ids": torch.arange(64), "key_ids": torch.arange(64)}):
        truth = ik.clip_loss(a, b, 30.0, backend="reference", **ids, **given)
        found = ik.clip_loss(a.float(), b.float(), 30.0, **ids, **given)
        assert truth < 1e-6
        assert found.item() == pytest.approx(truth.item(), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"guide": True},
        {"guide": True, "hardness_mode": "all", "hardness_strength": 2.0},
        {"pairs": True, "debias": 0.1},
        {"pairs": True, "false_negative_margin": 0.1},
    ],
    ids=str,
)
def test_backward_under_autocast(options):
    a, b, *_ = make(padded=False)
    a, b = (x.float().requires_grad_() for x in (a, b))
    options = dict(options)
    if options.pop("guide", False):
        options |= {"guide_queries": a.detach(), "guide_keys": b.detach()}
        options["false_negative_margin"] = 0.1
    if options.pop("pairs", False):
        options["positive_pairs"] = torch.arange(41).expand(2, -1).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(ik.clip_loss(a, b, SCALE, **options), (a, b))
        loss = ik.clip_loss(a, b, SCALE, **options)
    for x, y in zip(inside, torch.autograd.grad(loss, (a, b)), strict=True):
        assert torch.equal(x, y)


def test_a_guide_that_was_modified_raises_in_backward():
    a, b, *_ = make(padded=False)
    guide = a.clone()
    loss = ik.clip_loss(
        *(a.requires_grad_(), b, SCALE),
        guide_queries=guide,
        guide_keys=b,
        false_negative_margin=0.0,
    )
    guide.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
