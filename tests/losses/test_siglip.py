# ruff: noqa: E501 (a call and its message read best on one line)
"""SigLIP with pairs, weights and without bias, against the formula in fp64, one term at a time."""

import pytest
import torch
from support.formulas import check, random_ids, unit
from support.problems import AVAILABLE
from torch.nn.functional import logsigmoid, normalize

import ito_kernels as ik

F64 = torch.float64
PLAIN = ["reference", "chunked"]


def rand(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(n, m, d=5, per_row=False):
    scale = torch.linspace(2, 9, n, dtype=F64) if per_row else torch.tensor(7.0, dtype=F64)
    bias = torch.tensor(-3.0, dtype=F64)
    return [x.requires_grad_() for x in (unit(n, d), unit(m, d, seed=1), scale, bias)]


def small_panels(monkeypatch):
    monkeypatch.setattr("ito_kernels.similarity.panelwise.panel_rows", lambda columns: 3)


def check_reductions(call, terms, number, leaves):
    """terms: a list of terms for each image."""
    rows = [sum(row, torch.zeros((), dtype=F64)) for row in terms]
    for reduction, truth in (("mean", sum(rows) / number), ("sum", sum(rows))):
        truth = truth + 0 * sum(x.sum() for x in leaves)  # gradients may be asked for twice
        ours = call(reduction=reduction)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        theirs = torch.autograd.grad(truth, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(ours, leaves), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    check(
        call(reduction="none") @ rand(len(rows), 9), torch.stack(rows) @ rand(len(rows), 9), leaves
    )


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("weighted", ["images", "texts", "both"])
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_ids(monkeypatch, per_row, with_ids, weighted, backend):
    """Weights of rows, two of them 0. The divisor is still the number of images."""
    small_panels(monkeypatch)
    n, m = (8, 10) if with_ids else (8, 8)
    leaves = x, y, scale, bias = inputs(n, m, per_row=per_row)
    ids, given = (torch.arange(n), torch.arange(m)), {}
    if with_ids:
        ids = random_ids(n, 3, 2, padded=True), random_ids(m, 3, 3, padded=True)
        given = {"image_ids": ids[0], "text_ids": ids[1]}
    u, v = torch.ones(n, dtype=F64), torch.ones(m, dtype=F64)
    if weighted in ("images", "both"):
        u = rand(n, 5)
        u[3] = 0
        given["image_weights"] = u
    if weighted in ("texts", "both"):
        v = rand(m, 6)
        v[4] = 0
        given["text_weights"] = v
    S = scale.reshape(-1, 1) * (x @ y.T) + bias
    terms = [
        [
            -u[i] * v[j] * logsigmoid(S[i, j] if ids[0][i] == ids[1][j] else -S[i, j])
            for j in range(m)
            if ids[0][i] >= 0 and ids[1][j] >= 0
        ]
        for i in range(n)
    ]

    def call(**options):
        return ik.siglip_loss(x, y, scale, bias, backend=backend, **given, **options)

    check_reductions(call, terms, (ids[0] >= 0).sum(), leaves)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("row_weights", [True, False])
def test_pairs(monkeypatch, row_weights, weighted, backend):
    """N ≠ M; (0, 1) is listed twice, (2, 4) has weight 0, image 5 has no positive, image 6 no
    negative."""
    small_panels(monkeypatch)
    n, m = 7, 9
    leaves = x, y, scale, bias = inputs(n, m, per_row=True)
    pairs = [(0, 1), (2, 4), (0, 1), (0, 0), (1, 4), (4, 4), (2, 7), (3, 3)]
    pairs = torch.tensor(pairs + [(6, j) for j in range(m)])
    weights = rand(len(pairs), 4) if weighted else torch.ones(len(pairs), dtype=F64)
    weights[1] = 0 if weighted else 1
    given = {"positive_pairs": pairs, "positive_weights": weights if weighted else None}
    u, v = torch.ones(n, dtype=F64), torch.ones(m, dtype=F64)
    if row_weights:
        u, v = rand(n, 5), rand(m, 6)
        u[1] = v[3] = 0
        given |= {"image_weights": u, "text_weights": v}
    total = {}
    for pair, w in zip(map(tuple, pairs.tolist()), weights, strict=True):
        total[pair] = total.get(pair, 0) + w
    S = scale[:, None] * (x @ y.T) + bias
    terms = [
        [
            -u[i] * v[j] * (total[i, j] * logsigmoid(S[i, j]) if (i, j) in total else logsigmoid(-S[i, j]))
            for j in range(m)
        ]
        for i in range(n)
    ]  # fmt: skip

    def call(**options):
        return ik.siglip_loss(x, y, scale, bias, backend=backend, **given, **options)

    check_reductions(call, terms, n, leaves)


def test_pairs_of_the_diagonal_are_the_default():
    for n in (1, 6):
        leaves = x, y, scale, bias = inputs(n, n)
        pairs = torch.arange(n).repeat(2, 1).T
        ours = ik.siglip_loss(x, y, scale, bias, positive_pairs=pairs)
        check(ours, ik.siglip_loss(x, y, scale, bias), leaves)


def test_no_positive_pairs():
    leaves = x, y, scale, bias = inputs(5, 4)
    truth = -logsigmoid(-(scale * x @ y.T + bias)).sum() / 5
    none = torch.empty(0, 2, dtype=torch.long)
    check(ik.siglip_loss(x, y, scale, bias, positive_pairs=none), truth, leaves)


@pytest.mark.parametrize("given", ["nothing", "text_weights"])
def test_no_bias(given):
    x, y, scale, _ = inputs(6, 6)
    v = rand(6, 3) if given == "text_weights" else torch.ones(6, dtype=F64)
    sign = 2 * torch.eye(6, dtype=F64) - 1
    truth = -(v * logsigmoid(sign * scale * (x @ y.T))).sum() / 6
    options = {"text_weights": v} if given == "text_weights" else {}
    check(ik.siglip_loss(x, y, scale, **options), truth, [x, y, scale])
    assert ik.siglip_loss(x, y, scale, None, **options) == ik.siglip_loss(x, y, scale, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positives_with_large_scores_keep_their_digits(dtype):
    """The positives score 25, so that their terms are 1e-11, and the negatives about -15. As a sum
    of all pairs as negatives, corrected at the positives, the loss would be off by 1e-6."""
    x = torch.eye(32, 64).to(dtype)
    y = (0.999 * x + 0.001 * x.roll(1, 0)).to(dtype)
    pairs = torch.arange(32).repeat(2, 1).T

    def dense(x, y):
        sign = 2 * torch.eye(32, dtype=x.dtype) - 1
        return -logsigmoid(sign * (40 * x @ y.T - 15)).sum() / 32

    def loss(x, y):
        return ik.siglip_loss(x, y, 40.0, -15.0, positive_pairs=pairs)

    def errors(f, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        value = f(*leaves)
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]

    truth = errors(dense, F64)
    assert truth[0] < 1e-4
    for ours, theirs, exact in zip(errors(loss, dtype), errors(dense, dtype), truth, strict=True):
        off = (ours - exact).abs().max()
        assert off <= 2 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_on_every_backend(backend, reduction):
    """The weights of images go to the kernel, those of texts do not: the same loss transposed."""
    x, y = unit(20, 8, dtype=torch.float32), unit(20, 8, seed=1, dtype=torch.float32)
    w, ids = rand(20, 3).float(), torch.arange(20) // 2
    given = {"image_ids": ids, "text_ids": ids, "reduction": reduction}
    rows = ik.siglip_loss(x, y, 9.0, -4.0, image_weights=w, backend=backend, **given)
    cols = ik.siglip_loss(y, x, 9.0, -4.0, text_weights=w, backend=backend, **given)
    torch.testing.assert_close(rows.sum(), cols.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", ["image_weights", "text_weights"])
def test_padding_is_never_read(weighted):
    x, y = unit(6, 4), unit(6, 4, seed=1)
    ids = torch.tensor([0, 1, -1, 2, 0, -1])
    w = rand(6, 3)
    kept = ids >= 0
    truth = ik.siglip_loss(
        x[kept], y[kept], 9.0, -4.0, image_ids=ids[kept], text_ids=ids[kept], **{weighted: w[kept]}
    )
    x[~kept] = y[~kept] = w[~kept] = torch.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = ik.siglip_loss(x, y, 9.0, -4.0, image_ids=ids, text_ids=ids, **{weighted: w})
    torch.testing.assert_close(loss, truth)
    for grad in torch.autograd.grad(loss, [x, y]):
        assert grad.isfinite().all()
        assert not grad[~kept].any()


@pytest.mark.parametrize("nothing", ["padding", "images", "texts", "pairs"])
def test_nothing_left(nothing):
    leaves = x, y, scale, bias = inputs(4, 4)
    zeros, none = torch.zeros(4, dtype=F64), torch.full((4,), -1)
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    given = {
        "padding": {"image_ids": none, "text_ids": none, "text_weights": zeros + 1},
        "images": {"image_weights": zeros},
        "texts": {"text_weights": zeros},
        "pairs": {"positive_pairs": every, "positive_weights": zeros.repeat(4)},
    }
    loss = ik.siglip_loss(x, y, scale, bias, **given[nothing])
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_what_is_not_finite_shows():
    x, y = unit(6, 4), unit(6, 4, seed=1)
    pairs = torch.tensor([[0, 1]])
    for options in ({"positive_pairs": pairs}, {"text_weights": torch.ones(6, dtype=F64)}):
        for row in (0, 3):
            bad = x.clone()
            bad[row, 0] = torch.nan
            assert ik.siglip_loss(bad, y, 9.0, -4.0, **options).isnan()


def test_normalize_and_autocast_with_pairs():
    x, y = torch.randn(6, 4), torch.randn(5, 4)
    pairs = torch.tensor([[0, 1], [3, 4]])
    truth = ik.siglip_loss(normalize(x), normalize(y), 9.0, -4.0, positive_pairs=pairs)
    ours = ik.siglip_loss(x, y, 9.0, -4.0, positive_pairs=pairs, normalize=True)
    torch.testing.assert_close(ours, truth)
    a, b = (normalize(v).bfloat16().float() for v in (x, y))
    truth = ik.siglip_loss(a, b, 9.0, -4.0, positive_pairs=pairs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = ik.siglip_loss(normalize(x), normalize(y), 9.0, -4.0, positive_pairs=pairs)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth)


def test_pairs_compile_in_one_graph():
    x, y = (unit(6, 4, seed=s, dtype=torch.float32).requires_grad_() for s in range(2))
    pairs, w = torch.tensor([[0, 1], [3, 4]]), torch.rand(6)

    def loss(x, y):
        return ik.siglip_loss(x, y, 9.0, -4.0, positive_pairs=pairs, text_weights=w)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check(compiled(x, y), loss(x, y), [x, y], rtol=1e-6)


X, Y, IDS, W = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5), torch.ones(5)
PAIRS = torch.stack([IDS, IDS], 1)
BAD = [
    (ValueError, "positive_pairs replace image_ids and text_ids", {"positive_pairs": PAIRS, "text_ids": IDS}),
    (ValueError, "positive_weights need positive_pairs, which are missing", {"positive_weights": W}),
    (ValueError, r"positive_pairs must have shape \(P, 2\), got \(5,\)", {"positive_pairs": IDS}),
    (TypeError, "positive_pairs must have an integer dtype, got torch.float32", {"positive_pairs": X[:, :2]}),
    (ValueError, "positive_pairs must be row numbers of 5 .*, 0 to 4, got 1 to 5", {"positive_pairs": PAIRS + 1}),
    (ValueError, r"positive_weights must have shape \(5,\), got \(4,\)", {"positive_pairs": PAIRS, "positive_weights": W[:4]}),
    (ValueError, "positive_weights must be 0 or more, got -1", {"positive_pairs": PAIRS, "positive_weights": -W}),
    (ValueError, "positive_weights must not require a gradient", {"positive_pairs": PAIRS, "positive_weights": W.clone().requires_grad_()}),
    (ValueError, r"image_weights must have shape \(5,\), got \(4,\)", {"image_weights": W[:4]}),
    (ValueError, "image_weights must be 0 or more, got -1", {"image_weights": -W}),
    (ValueError, "image_weights must not require a gradient", {"image_weights": W.clone().requires_grad_()}),
    (TypeError, "text_weights must be a tensor, got float", {"text_weights": 1.0}),
    (TypeError, "text_weights must have a floating-point dtype", {"text_weights": IDS}),
    (ValueError, "text_weights must be 0 or more, got nan", {"text_weights": W * torch.nan}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        ik.siglip_loss(X, Y, 1.0, 0.0, **options)
