"""`mnrl_loss`: every direction, partition mode, hardness mode, margin and guide against the
formula, written out for one query after the other."""

import math
from itertools import product

import pytest
import torch
from support.formulas import check, unit
from support.problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.gradcache import gradcache_backward

N, D, E = 6, 5, 4
F64 = torch.float64
PLAIN = ("reference", "chunked")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETS = [
    (DIRECTIONS[:1], "joint"),
    (DIRECTIONS[:1], "per_direction"),
    (("query_to_doc", "query_to_query"), "joint"),
    (("doc_to_query", "query_to_doc"), "joint"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
    (("query_to_doc", "doc_to_doc"), "joint"),
    (DIRECTIONS, "joint"),
]
MARGINS = [
    {},
    {"margin": 0.0},
    {"margin": -0.2},
    {"margin": 0.2},
    {"margin": 0.4, "margin_strategy": "relative"},
    {"guide": True},
    {"guide": True, "margin": 0.2},
    {"guide": True, "margin": -0.3, "margin_strategy": "relative"},
]
HARDNESS = [(None, 0.0), ("in_batch", 3.0), ("hard", 2.0), ("all", 3.0)]


def made(n=N, k=2, dtype=F64, seed=0, noise=0.6):
    """Queries, positives, (N, K, D) negatives, the scale, and the guide's three."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    q = drawn(n, D)
    features = [q, q + noise * drawn(n, D), q[:, None] + noise * drawn(n, k, D)]
    features = [x.to(dtype).requires_grad_() for x in features]
    e = drawn(n, E)
    guide = e, e + 0.5 * drawn(n, E), e[:, None] + 0.5 * drawn(n, k, E)
    return *features, torch.tensor(7.0, dtype=dtype, requires_grad=True), guide


def normalized(x):
    return normalize(x, dim=-1)


def candidates(direction, i, n, k):
    """The candidates of query i as (anchor, candidate) among all texts: the queries, then the
    documents of each query, of which the first is its positive."""
    docs = [(j, n + j * (k + 1) + c) for j in range(n) for c in range(k + 1)]
    positive = n + i * (k + 1)
    return {
        "query_to_doc": [(i, d) for _, d in docs],
        "query_to_query": [(i, j) for j in range(n) if j != i],
        "doc_to_query": [(positive, j) for j in range(n)],
        "doc_to_doc": [(positive, d) for j, d in docs if j != i],
    }[direction]


def formula(
    q,
    p,
    h=None,
    scale=20.0,
    directions=("query_to_doc",),
    partition_mode="joint",
    hardness_mode=None,
    hardness_strength=0.0,
    guide=None,
    margin=None,
    margin_strategy="absolute",
    normalize=True,
):
    n, k = len(q), 0 if h is None else h.shape[1]

    def texts(q, p, h=None):
        docs = p[:, None] if h is None else torch.cat([p[:, None], h], 1)
        return torch.cat([q, docs.flatten(0, 1)])

    features = texts(q, p, h)
    unit = normalized(features)
    judged = unit.detach() if guide is None else normalized(texts(*guide))
    similarity = unit @ unit.T if normalize else features @ features.T
    cosine, losses = judged @ judged.T, []
    for i in range(n):
        own = i, n + i * (k + 1)
        s = scale[i] if torch.is_tensor(scale) and scale.ndim else scale
        limit = math.inf
        if margin is not None or guide is not None:
            m = margin or 0.0
            m = abs(cosine[own]) * m if margin_strategy == "relative" else m
            limit = cosine[own] - m + 1e-9
        pools = []
        for direction in directions:
            pool = []
            for pair in candidates(direction, i, n, k):
                positive = set(pair) == set(own)
                if not positive and cosine[pair] > limit:
                    continue
                kind = "hard" if own[1] < pair[1] <= own[1] + k else "in_batch"
                boosted = hardness_mode in (kind, "all") and not positive
                pool.append((*pair, hardness_strength * (boosted and direction == "query_to_doc")))
            a, b, boost = zip(*pool, strict=True) if pool else ((), (), ())
            x = similarity[list(a), list(b)]
            pools.append(s * x + x.new_tensor(boost) * x.detach())
        if partition_mode == "joint":
            log_z = torch.cat(pools).logsumexp(0)
        else:
            log_z = sum(x.logsumexp(0) for x in pools) / len(directions)
        losses.append(log_z - s * similarity[own])
    return sum(losses) / n


def call(q, p, h, scale, judge, negatives=True, **options):
    """`mnrl_loss` and the formula, with or without negatives."""
    if options.get("guide"):
        options["guide"] = judge if negatives else judge[:2]
    h = h if negatives else None
    where = {"backend": options.pop("backend", None)}
    return ik.mnrl_loss(q, p, h, scale, **options, **where), formula(q, p, h, scale, **options)


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize(("directions", "partition_mode"), SETS, ids=str)
def test_directions(directions, partition_mode, margin):
    """With every hardness mode, with and without negatives, on the backends that compute in fp64;
    gradients of queries, positives, negatives and scale."""
    options = {"directions": directions, "partition_mode": partition_mode, **margin}
    for i, ((mode, strength), negatives) in enumerate(product(HARDNESS, (True, False))):
        if mode == "hard" and not negatives:
            continue
        q, p, h, scale, guide = made(seed=i)
        hardness = {"hardness_mode": mode, "hardness_strength": strength}
        ours, truth = call(
            *(q, p, h, scale, guide, negatives),
            **options,
            **hardness,
            backend=PLAIN[i % 2],
        )
        check(ours, truth, [q, p, scale, *[h] * negatives])


@pytest.mark.parametrize("cosines", [True, False])
@pytest.mark.parametrize(("mode", "strength"), HARDNESS)
def test_scale_per_query_and_inner_products(mode, strength, cosines):
    """A margin compares cosines, whatever the scores are."""
    for i, (directions, partition_mode) in enumerate(SETS[::2]):
        q, p, h, _, guide = made(seed=i)
        scale = torch.linspace(0.5, 2, N, dtype=F64, requires_grad=True)
        for margin in MARGINS[0], MARGINS[3], MARGINS[6]:
            ours, truth = call(
                *(q, p, h, scale, guide),
                directions=directions,
                partition_mode=partition_mode,
                hardness_mode=mode,
                hardness_strength=strength,
                normalize=cosines,
                **margin,
            )
            check(ours, truth, [q, p, h, scale])


def test_names_of_sentence_transformers():
    q, p, h, scale, _ = made()
    for mode in ("in_batch", "hard", "all"):
        ours, theirs = (
            ik.mnrl_loss(q, p, h, scale, hardness_mode=name, hardness_strength=2.0)
            for name in (mode, f"{mode}_negatives")
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("guided", [False, True])
def test_texts_that_occur_twice_stay(guided):
    """Their cosine is that of the positive, but for rounding."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(300, 48, generator=g)
    q, p = map(normalized, (q, q + torch.randn(300, 48, generator=g)))
    p[150:] = p[:150]
    q[150:] = q[:150]
    guide = {"guide": (q, p)} if guided else {}
    options = {"directions": ("query_to_doc", "doc_to_query"), "margin": 0.0}
    ours = ik.mnrl_loss(q, p, scale=1.0, **options, **guide)
    cosines = q.double() @ p.double().T
    own = cosines.diagonal()[:, None]
    both = torch.cat([cosines, cosines.T], 1)
    truth = (both.masked_fill(both > own + 1e-9, -torch.inf).logsumexp(1) - own[:, 0]).mean()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b in ("cpu", "chunked")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_accuracy(noise, dtype, backend):
    """Errors against fp64 are at most 2 times (gradients: 3 times) those of dense PyTorch in the
    same dtype; also of a batch that training has separated (noise 0.02)."""
    if dtype != torch.float32 and backend != "cpu":
        return  # computed in fp32
    for i, (options, negatives) in enumerate(product(ACCURACY, (True, False))):
        if options.get("hardness_mode") == "hard" and not negatives:
            continue
        features = made(n=12, dtype=dtype, seed=i, noise=noise)
        leaves = [x.detach() for x in features[: 2 + negatives]]
        options = {**options, "scale": 30.0}
        if options.get("guide"):
            options["guide"] = [x.float() for x in features[4]][: 2 + negatives]

        def value_and_grads(function, dtype, leaves=leaves, options=options):
            if options.get("guide"):
                options = {**options, "guide": [x.to(F64) for x in options["guide"]]}
            moved = [x.to(dtype).requires_grad_() for x in leaves]
            value = function(*moved, *[None] * (3 - len(moved)), **options)
            return value.double(), [x.double() for x in torch.autograd.grad(value, moved)]

        ours = value_and_grads(
            lambda *a, **o: ik.mnrl_loss(*a, **o, backend=backend), dtype, options=options
        )
        truth, dense = (value_and_grads(formula, t) for t in (F64, dtype))
        eps = torch.finfo(torch.float32).eps
        bound = 2 * (dense[0] - truth[0]).abs() + 8 * eps * truth[0].abs() + 1e-9
        assert (ours[0] - truth[0]).abs() <= bound, (options, negatives)
        for a, b, c in zip(ours[1], truth[1], dense[1], strict=True):
            bound = 3 * (c - b).abs().max() + 16 * eps * b.abs().max() + 1e-9
            bound = bound + torch.finfo(dtype).eps * b.abs().max()  # the result is rounded once
            assert (a - b).abs().max() <= bound, (options, negatives)


ACCURACY = [
    {"directions": DIRECTIONS},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"margin": 0.1},
    {"directions": DIRECTIONS, "guide": True},
    {"hardness_mode": "in_batch", "hardness_strength": 5.0},
    {"hardness_mode": "hard", "hardness_strength": 5.0},
]


@pytest.mark.parametrize("margin", MARGINS[1:], ids=str)
def test_without_any_negative_left(margin):
    """All candidates are above the limit: 0, or log 2 where the pair counts twice, and zero
    gradients."""
    margin = {**margin, "margin": 1e6}
    for directions, partition_mode in SETS:
        twice = partition_mode == "joint" and "doc_to_query" in directions
        for (mode, strength), negatives in product(HARDNESS, (True, False)):
            if mode == "hard" and not negatives:
                continue
            q, p, h, scale, guide = made(seed=1)
            if margin.get("guide"):
                margin["guide"] = guide if negatives else guide[:2]
            loss = ik.mnrl_loss(
                *(q, p, h if negatives else None, scale),
                directions=directions,
                partition_mode=partition_mode,
                hardness_mode=mode,
                hardness_strength=strength,
                **margin,
            )
            torch.testing.assert_close(loss, torch.tensor(math.log(2) * twice, dtype=F64))
            grads = torch.autograd.grad(loss, [q, p, scale, *[h] * negatives])
            assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)


def test_a_single_pair():
    q, p, h, scale, _ = made(n=1)
    for directions, partition_mode in SETS:
        options = {"directions": directions, "partition_mode": partition_mode}
        check(*call(q, p, h, scale, None, **options), [q, p, h, scale])
        check(*call(q, p, h, scale, None, negatives=False, **options), [q, p, scale])


def test_autocast():
    """Features are rounded as autocast rounds them, and everything else is computed in fp32."""
    for options in ACCURACY:
        q, p, h, _, guide = made(dtype=torch.float32)
        if options.get("guide"):
            options = {**options, "guide": guide}
        truth = ik.mnrl_loss(*(x.bfloat16().float() for x in (q, p, h)), **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ik.mnrl_loss(q, p, h.bfloat16(), **options)
        assert loss.dtype == torch.float32
        check(loss, truth, [q, p, h], rtol=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_features_that_are_not_finite_show(wrong):
    for options, tensor in product(({}, *ACCURACY), range(3)):
        q, p, h, _, guide = made(dtype=torch.float32)
        if options.get("guide"):
            options = {**options, "guide": guide}
        features = [x.detach().clone() for x in (q, p, h)]
        features[tensor].view(-1, D)[2, 1] = wrong
        assert not ik.mnrl_loss(*features, **options).isfinite(), (options, tensor)


def test_compiles_in_one_graph():
    q, p, _, _, guide = made(dtype=torch.float32)

    def loss(q, p):
        return ik.mnrl_loss(q, p, directions=DIRECTIONS[:2], guide=guide[:2])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check(compiled(q, p), loss(q, p), [q, p], rtol=1e-6)


def test_gradcache():
    """In micro-batches, with the guide's embeddings beside the features."""
    q, p, h, _, guide = made(dtype=torch.float32)
    tower = torch.nn.Linear(D, D)

    def encode(q, p, h, *guide):
        return *map(tower, (q, p, h)), *guide

    def loss(q, p, h, *guide):
        return ik.mnrl_loss(q, p, h, directions=DIRECTIONS, guide=guide, margin=0.1)

    rows = [x.detach() for x in (q, p, h)] + [x.float() for x in guide]
    truth = loss(*encode(*rows))
    truth.backward()
    grads = [x.grad.clone() for x in tower.parameters()]
    tower.zero_grad()
    micro_batches = list(zip(*(x.split(4) for x in rows), strict=True))
    value = gradcache_backward(encode, micro_batches, loss)
    torch.testing.assert_close(value, truth.detach())
    for x, y in zip(tower.parameters(), grads, strict=True):
        torch.testing.assert_close(x.grad, y, rtol=1e-4, atol=1e-6)


X, Y = (unit(5, 3, seed=i, dtype=torch.float32) for i in range(2))
HARD = {"hardness_mode": "all"}
TWICE = ("query_to_doc", "query_to_doc")
INTERNAL = ("query_to_doc", "positive_to_positive")
BAD = [
    (TypeError, "directions must be a sequence of names, got str", {"directions": "query_to_doc"}),
    (ValueError, "directions must be one of 'query_to_doc'.*got 'all'", {"directions": ["all"]}),
    (ValueError, "directions must be one of", {"directions": INTERNAL}),
    (ValueError, r"directions must name each direction once.*got \(\)", {"directions": ()}),
    (ValueError, "'query_to_doc', which has the positive", {"directions": ("doc_to_query",)}),
    (ValueError, "each direction once", {"directions": TWICE}),
    (ValueError, "partition_mode must be one of 'joint'", {"partition_mode": "each"}),
    (
        ValueError,
        "every direction, which doc_to_doc and query_to_query in directions do not have",
        {"directions": DIRECTIONS, "partition_mode": "per_direction"},
    ),
    (ValueError, "hardness_mode must be one of None, 'in_batch'", {"hardness_mode": "easy"}),
    (ValueError, "hardness_mode='hard' needs negatives", {"hardness_mode": "hard"}),
    (ValueError, "hardness_strength=2.0 needs hardness_mode", {"hardness_strength": 2.0}),
    (ValueError, "hardness_strength must be from 0 upw", {**HARD, "hardness_strength": -1.0}),
    (TypeError, "hardness_strength must be a number", {**HARD, "hardness_strength": "5"}),
    (ValueError, "margin must be finite, got nan", {"margin": math.nan}),
    (TypeError, "margin must be a number, got str", {"margin": "0.1"}),
    (ValueError, "margin_strategy must be one of 'absolute', 'relative'", {"margin_strategy": "m"}),
    (ValueError, "='relative' needs margin or guide", {"margin_strategy": "relative"}),
    (TypeError, "guide must be a sequence", {"guide": X}),
    (TypeError, "guide_positives must be a tensor", {"guide": (X, [1.0])}),
    (ValueError, "guide must have the 2 tensors .*with no negatives, got 3", {"guide": (X, X, X)}),
    (
        ValueError,
        "guide must have the 3 tensors .*guide_negatives with negatives, got 2",
        {"negatives": X, "guide": (X, X)},
    ),
    (
        ValueError,
        r"guide_negatives must have shape \(5, 'E'\) like negatives, got \(5, 1, 3\)",
        {"negatives": X, "guide": (X, X, X[:, None])},
    ),
    (ValueError, "guide_positives must have 5 rows, got 4", {"guide": (X, X[:4])}),
    (ValueError, "guide_positives must have the same width", {"guide": (X, X[:, :2])}),
    (TypeError, "normalize must be True or False", {"normalize": 1}),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[m[:50] for _, m, _ in BAD])
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        ik.mnrl_loss(X, Y, **options)
