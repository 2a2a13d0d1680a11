"""The options of `multi_positive_infonce`: alone and together, against the formulas written out for
one anchor after the other in fp64; bad input, padding and features that are not finite."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from support.formulas import check, random_ids, unit
from support.infonce_formula import infonce_formula
from support.problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.losses.reweighting import debiased

F64 = torch.float64


def pairs_of(n, m, count, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, x, (count,), generator=g) for x in (n, m)], 1)


def rand(*shape, seed=6):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make(name, n, m, d):
    """The options of a case, for queries (n, d) and keys (m, d)."""
    queue = unit(9, d, seed=11)
    queue_ids = random_ids(9, 4, 12, padded=True)
    hard = unit(n, 3, d, seed=13).requires_grad_()
    bias = (rand(m) - 0.5).requires_grad_()
    return {
        "smoothing": {"label_smoothing": 0.2},
        "weights": {"query_weights": rand(n), "key_weights": rand(m, seed=7)},
        "weights, drop": {"query_weights": rand(n), "empty": "drop"},
        "bias": {"key_bias": bias},
        "bias, smoothing": {"key_bias": bias, "label_smoothing": 0.3},
        "queue": {"queue": queue},
        "queue ids": {"queue": queue, "queue_ids": queue_ids},
        "hard": {"hard_negatives": hard},
        "hard ids": {
            "hard_negatives": hard,
            "hard_negative_ids": random_ids(3 * n, 4, 14, padded=True).view(n, 3),
        },
        "debias": {"debias": 0.1},
        "debias floor": {"debias": 0.9},
        "hardness": {"hardness": 0.7},
        "debias, hardness": {"debias": 0.05, "hardness": 1.5},
        "queue ids, hard, smoothing": {
            "queue": queue,
            "queue_ids": queue_ids,
            "hard_negatives": hard,
            "label_smoothing": 0.1,
        },
        "all but smoothing": {
            "queue": queue,
            "queue_ids": queue_ids,
            "hard_negatives": hard,
            "key_bias": bias,
            "query_weights": rand(n),
            "key_weights": rand(m, seed=7),
            "debias": 0.05,
            "hardness": 0.4,
            "empty": "drop",
        },
    }[name]


NAMES = """smoothing; weights; weights, drop; bias; bias, smoothing; queue; queue ids; hard;
hard ids; debias; debias floor; hardness; debias, hardness; queue ids, hard, smoothing;
all but smoothing"""
NAMES = [x.strip() for x in NAMES.split(";")]


def leaves_of(q, k, scale, options):
    extra = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return [q, k, scale, *extra]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 3, 2), (9, 13, 5)])
def test_by_ids(n, m, d, symmetric, positives, name):
    """Unequal groups, anchors without positives or without negatives, and padding."""
    q, k = unit(n, d).requires_grad_(), unit(m, d, seed=1).requires_grad_()
    scale = torch.tensor(4.0, dtype=F64, requires_grad=True)
    ids = random_ids(n, 5, 2, padded=n > 1), random_ids(m, 4, 3, padded=n > 1)
    if n == 1:
        ids = torch.zeros(1, dtype=torch.long), torch.tensor([0, 1, 0])
    options = make(name, n, m, d) | {"positives": positives, "symmetric": symmetric}
    if not symmetric:
        options.pop("key_weights", None)
    for backend in ("reference", "chunked"):
        loss = ik.multi_positive_infonce(
            q, k, scale, query_ids=ids[0], key_ids=ids[1], backend=backend, **options
        )
        check(loss, infonce_formula(q, k, scale, *ids, **options), leaves_of(q, k, scale, options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("same", [True, False])
def test_paired_rows_and_one_tower(name, same):
    """Without ids, and with queries that are the keys, self left out."""
    q = unit(8, 5).requires_grad_()
    k = q if same else unit(8, 5, seed=1).requires_grad_()
    options = make(name, 8, 8, 5) | {"exclude_self": same}
    ids = [torch.arange(8) // 3] * 2 if same else [None, None]
    given = {"query_ids": ids[0], "key_ids": ids[1]}
    scale = torch.tensor(4.0, dtype=F64, requires_grad=True)
    loss = ik.multi_positive_infonce(q, k, scale, **given, **options)
    leaves = leaves_of(q, k, scale, options)
    check(loss, infonce_formula(q, k, scale, *ids, **options), leaves[:1] + leaves[1 + same :])


@pytest.mark.parametrize("name", ["smoothing", "debias, hardness"])
def test_self_pairs_of_sides_padded_differently(name):
    q, k = unit(9, 5).requires_grad_(), unit(9, 5, seed=1).requires_grad_()
    ids = torch.tensor([0, -1, 1, 2, 1, 0, 3, 2, -1]), torch.tensor([-1, 0, 1, 2, 1, -1, 3, 0, 2])
    options = make(name, 9, 9, 5) | {"exclude_self": True}
    loss = ik.multi_positive_infonce(q, k, 4.0, query_ids=ids[0], key_ids=ids[1], **options)
    check(loss, infonce_formula(q, k, 4.0, *ids, **options), [q, k])


@pytest.mark.parametrize(
    "name", ["queue", "hard", "queue ids, hard, smoothing", "all but smoothing"]
)
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("by", ["row", "ids", "pairs"])
def test_in_batch(by, positives, name):
    """MoCo: the other keys of the batch are no candidates."""
    q, k = unit(9, 5).requires_grad_(), unit(9, 5, seed=1).requires_grad_()
    scale = torch.tensor(4.0, dtype=F64, requires_grad=True)
    options = make(name, 9, 9, 5) | {"in_batch": False, "symmetric": False, "positives": positives}
    options.pop("key_weights", None)
    ids = (None, None)
    if by == "ids":
        ids = random_ids(9, 5, 2, padded=True), random_ids(9, 4, 3, padded=True)
        options["exclude_self"] = True
    if by == "pairs":
        options.pop("queue_ids", None)
        options["positive_pairs"] = pairs_of(9, 9, 12)
        options["positive_pairs"] = options["positive_pairs"].unique(dim=0)
    given = dict(zip(("query_ids", "key_ids"), ids, strict=True))
    loss = ik.multi_positive_infonce(q, k, scale, **given, **options)
    check(loss, infonce_formula(q, k, scale, *ids, **options), leaves_of(q, k, scale, options))


@pytest.mark.parametrize("mode", ["in_batch", "hard", "all"])
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("by", ["row", "ids", "self", "pairs", "ignore"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_query", [True, False])
def test_hardness_mode(per_query, symmetric, by, positives, mode):
    """LLaVE: negatives score S_ij + α·sg(<q_i, k_j>)."""
    q, k = unit(9, 5).requires_grad_(), unit(9, 5, seed=1).requires_grad_()
    scale = torch.linspace(2, 6, 9, dtype=F64) if per_query else torch.tensor(4.0, dtype=F64)
    scale.requires_grad_()
    options = make("queue ids, hard, smoothing", 9, 9, 5) | {"positives": positives}
    options |= {"symmetric": symmetric, "hardness_mode": mode, "hardness_strength": 3.0}
    options["key_bias"] = make("bias", 9, 9, 5)["key_bias"]
    del options["label_smoothing"]
    ids = (None, None)
    if by in ("ids", "self", "ignore"):
        ids = random_ids(9, 5, 2, padded=True), random_ids(9, 4, 3, padded=True)
        options["exclude_self"] = by == "self"
        options["equal_ids"] = "ignore" if by == "ignore" else "positive"
    if by == "pairs":
        options.pop("queue_ids")
        options["positive_pairs"] = pairs_of(9, 9, 12).unique(dim=0)
    given = dict(zip(("query_ids", "key_ids"), ids, strict=True))
    for backend in ("reference", "chunked"):
        loss = ik.multi_positive_infonce(q, k, scale, **given, backend=backend, **options)
        check(loss, infonce_formula(q, k, scale, *ids, **options), leaves_of(q, k, scale, options))


def test_hardness_mode_has_the_names_of_sentence_transformers():
    q, k, hard = unit(6, 5), unit(6, 5, seed=1), unit(6, 2, 5, seed=2)
    for mode in ("in_batch", "hard", "all"):
        short, long = (
            ik.clip_loss(q, k, 4.0, hard_negatives=hard, hardness_mode=x, hardness_strength=3.0)
            for x in (mode, f"{mode}_negatives")
        )
        assert short == long != ik.clip_loss(q, k, 4.0, hard_negatives=hard)
        assert ik.clip_loss(q, k, 4.0, hard_negatives=hard, hardness_mode=mode) == ik.clip_loss(
            q, k, 4.0, hard_negatives=hard
        )


@pytest.mark.parametrize("name", ["plain", "in_batch", *NAMES])
@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_ids_are_ignored(symmetric, positives, name):
    """Accidental hits: key i is the only positive of query i, whatever their own ids say."""
    q, k = unit(9, 5).requires_grad_(), unit(9, 5, seed=1).requires_grad_()
    scale = torch.tensor(4.0, dtype=F64, requires_grad=True)
    options = {} if name == "plain" else make(name, 9, 9, 5) if name != "in_batch" else {}
    if name == "in_batch":
        options, symmetric = make("queue ids", 9, 9, 5) | {"in_batch": False}, False
    options |= {"positives": positives, "symmetric": symmetric, "equal_ids": "ignore"}
    if not symmetric:
        options.pop("key_weights", None)
    ids = random_ids(9, 4, 2, padded=True), random_ids(9, 4, 3, padded=True)
    truth = infonce_formula(q, k, scale, *ids, **options)
    padded = (x.masked_fill((i < 0)[:, None], torch.nan) for x, i in zip((q, k), ids, strict=True))
    if options.get("key_bias") is not None:
        bias = options["key_bias"].masked_fill(ids[1] < 0, torch.nan)
        options["key_bias"] = bias
    given = dict(zip(("query_ids", "key_ids"), ids, strict=True))
    loss = ik.multi_positive_infonce(*padded, scale, **given, **options)
    check(loss, truth, [x for x in leaves_of(q, k, scale, options) if x.is_leaf])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("hardness_strength=2.0 needs hardness_mode", {"hardness_strength": 2.0}),
        ("hardness_strength must be from 0", {"hardness_mode": "all", "hardness_strength": -1.0}),
        ("hardness_mode must be one of", {"hardness_mode": "hardest", "hardness_strength": 1.0}),
        ("needs hard_negatives", {"hardness_mode": "hard", "hardness_strength": 1.0}),
        ("label_smoothing is not", {"hardness_mode": "in_batch", "label_smoothing": 0.1}),
        ("debias is not", {"hardness_mode": "in_batch", "debias": 0.1}),
        ("hardness is not", {"hardness_mode": "in_batch", "hardness": 0.1}),
        (
            "hardness_mode='in_batch_negatives' needs in_batch=True",
            {"hardness_mode": "in_batch_negatives", "in_batch": False, "symmetric": False}
            | {"queue": torch.ones(3, 5, dtype=F64)},
        ),
        ("equal_ids must be one of", {"equal_ids": "drop"}),
        ("exclude_self", {"equal_ids": "ignore", "exclude_self": True}),
        ("positive_pairs", {"equal_ids": "ignore", "positive_pairs": torch.zeros(1, 2).long()}),
    ],
)
def test_bad_modes(message, options):
    with pytest.raises(ValueError, match=message):
        ik.clip_loss(unit(6, 5), unit(6, 5, seed=1), 4.0, **options)


def test_ignored_ids_need_as_many_keys_as_queries():
    ids = {"query_ids": torch.arange(6), "key_ids": torch.arange(7)}
    with pytest.raises(ValueError, match="equal_ids='ignore' needs the same number of queries"):
        ik.multi_positive_infonce(unit(6, 5), unit(7, 5), 4.0, equal_ids="ignore", **ids)


@pytest.mark.parametrize("padded", ["query_ids", "key_ids"])
@pytest.mark.parametrize(
    "more", [{}, {"hardness_mode": "in_batch", "hardness_strength": 2.0}, {"label_smoothing": 0.1}]
)
def test_ignored_ids_of_which_none_is_left(padded, more):
    q, k = unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    ids = {"query_ids": torch.zeros(6).long(), "key_ids": torch.zeros(6).long()}
    ids[padded] = ids[padded] - 1
    loss = ik.multi_positive_infonce(q, k, 4.0, equal_ids="ignore", **ids, **more)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (q, k)):
        assert not grad.any()


def test_equal_ids_without_ids_change_nothing():
    q, k = unit(9, 5), unit(9, 5, seed=1)
    assert ik.clip_loss(q, k, 4.0, equal_ids="ignore") == ik.clip_loss(q, k, 4.0)


def test_stats_of_equal_ids_that_are_ignored():
    """The accuracy asks whether key i is above all candidates with another id."""
    q = torch.eye(4, 5, dtype=F64)
    k = q.roll(1, 0) + 0.5 * q  # of key i and key i - 1, the latter is more similar to query i
    ids = torch.tensor([0, 0, 1, 2])
    _, stats = ik.clip_loss(
        q, k, 2.0, query_ids=ids, key_ids=ids, equal_ids="ignore", return_stats=True
    )
    dots = q @ k.T
    other = ids[:, None] != ids
    correct = dots.diag() > dots.masked_fill(~other, -torch.inf).amax(1)
    assert stats["row_accuracy"] == correct.double().mean() == 0.25
    torch.testing.assert_close(stats["positive_score"], 2 * dots.diag().mean())


@pytest.mark.parametrize("positives", ["mean", "in"])
def test_in_batch_keeps_its_digits(positives):
    """A key of the batch that is no candidate, and far above all that are: it must not matter."""
    q = unit(2, 4)
    k = torch.stack([0.1 * q[0], q[0]])  # the second query's key is like the first query
    queue, ids = 0.02 * unit(5, 4, seed=3), torch.arange(2)
    options = {"in_batch": False, "symmetric": False, "positives": positives, "query_ids": ids}
    options |= {"key_ids": ids, "query_weights": torch.tensor([1.0, 0.0])}
    truth = infonce_formula(
        *(q, k, 100.0, ids, ids),
        **(options | {"queue": queue, "query_weights": torch.tensor([1.0, 0.0], dtype=F64)}),
    )
    loss = ik.multi_positive_infonce(q.float(), k.float(), 100.0, queue=queue.float(), **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", ["weights", "queue ids", "debias, hardness", "smoothing"])
def test_reductions(name, reduction):
    q, k = unit(7, 4), unit(5, 4, seed=1)
    ids = random_ids(7, 3, 2, padded=True), random_ids(5, 3, 3, padded=True)
    options = make(name, 7, 5, 4) | {"reduction": reduction}
    loss = ik.multi_positive_infonce(q, k, 4.0, query_ids=ids[0], key_ids=ids[1], **options)
    torch.testing.assert_close(loss, infonce_formula(q, k, 4.0, *ids, **options))


REWEIGHTED = ["debias", "debias floor", "hardness", "debias, hardness", "reweighted self"]


@pytest.mark.parametrize("positives", ["mean", "in", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "more",
    ["", "smoothing", "bias", "queue", "hard", "weights", "drop", "self", *REWEIGHTED],
)
def test_positive_pairs(monkeypatch, more, weighted, positives):
    """Pairs that no ids can say, some of them twice, some anchors without one."""
    monkeypatch.setattr("ito_kernels.similarity.panelwise.panel_rows", lambda columns: 3)
    n, m = (8, 8) if "self" in more else (8, 11)
    q, k = unit(n, 5).requires_grad_(), unit(m, 5, seed=1).requires_grad_()
    scale = torch.tensor(4.0, dtype=F64, requires_grad=True)
    pairs = pairs_of(n, m, 12)
    extra = {
        "self": {"exclude_self": True, "label_smoothing": 0.1},
        "reweighted self": {"exclude_self": True, "debias": 0.1, "hardness": 0.6}
        | {"hard_negatives": unit(8, 2, 5, seed=4), "queue": unit(4, 5, seed=3)},
        "drop": {"empty": "drop"},
        "": {},
    }
    options = extra[more] if more in extra else make(more, n, m, 5)
    options = options | {"positive_pairs": pairs, "positives": positives}
    if weighted:
        options["positive_weights"] = rand(12)
    if weighted and positives == "sum":
        with pytest.raises(ValueError, match="positive_weights are normalised per anchor"):
            ik.multi_positive_infonce(q, k, scale, **options)
        return
    if not weighted:  # one that comes twice would count twice as a positive, once as a candidate
        options["positive_pairs"] = pairs.unique(dim=0)
    check(
        ik.multi_positive_infonce(q, k, scale, **options),
        infonce_formula(q, k, scale, **options),
        leaves_of(q, k, scale, options),
    )


@pytest.mark.parametrize("options", [{"debias": 0.01}, {"hardness": 0.5}])
def test_negatives_beside_dominant_pairs(options):
    """Positives e^50 times the negatives: their difference from the whole would be noise."""
    x, count = unit(40, 24), torch.arange(40)
    y = normalize(x + 0.01 * unit(40, 24, seed=1), dim=1)
    options = options | {"positive_pairs": torch.stack([count, count], 1)}

    def grads(dtype, **options):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        return torch.autograd.grad(ik.clip_loss(*leaves, 100.0, **options), leaves)

    for a, b in zip(grads(torch.float32, **options), grads(F64, **options), strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_pairs_of_ids_are_the_ids():
    q, k = unit(9, 5), unit(7, 5, seed=1)
    ids = random_ids(9, 4, 2), random_ids(7, 4, 3)
    pairs = (ids[0][:, None] == ids[1]).nonzero()
    for positives in ("mean", "in", "sum"):
        by_ids = ik.multi_positive_infonce(
            q, k, 5.0, query_ids=ids[0], key_ids=ids[1], positives=positives, return_stats=True
        )
        by_pairs = ik.multi_positive_infonce(
            q, k, 5.0, positive_pairs=pairs, positives=positives, return_stats=True
        )
        torch.testing.assert_close(by_pairs[0], by_ids[0])
        for name, value in by_pairs[1].items():
            if value is not None:  # accuracies and negatives: the kernels cannot tell
                torch.testing.assert_close(value, by_ids[1][name])


def test_scale_and_prior_per_query():
    """Of iSogCLR's temperatures; a prior of false negatives for each anchor."""
    q, k = unit(8, 5).requires_grad_(), unit(8, 5, seed=1).requires_grad_()
    scale = (1 + 5 * rand(8)).requires_grad_()
    hard = unit(8, 2, 5, seed=4).requires_grad_()
    options = {
        "debias": 0.3 * rand(8),
        "hardness": 0.5,
        "hard_negatives": hard,
        "symmetric": False,
        "queue": unit(4, 5, seed=3),
    }
    loss = ik.multi_positive_infonce(q, k, scale, **options)
    check(loss, infonce_formula(q, k, scale, **options), [q, k, scale, hard])
    options = {"debias": 0.3 * rand(8)}
    loss = ik.multi_positive_infonce(q, k, 4.0, **options)
    check(loss, infonce_formula(q, k, 4.0, **options), [q, k])
    options = {"label_smoothing": 0.2, "queue": unit(4, 5, seed=3), "hard_negatives": hard}
    loss = ik.multi_positive_infonce(q, k, scale, **options)
    check(loss, infonce_formula(q, k, scale, **options), [q, k, scale, hard])


def test_label_smoothing_is_cross_entropys():
    q, k = unit(9, 5), unit(9, 5, seed=1)
    ours = ik.multi_positive_infonce(q, k, 6.0, label_smoothing=0.3, symmetric=False)
    theirs = torch.nn.functional.cross_entropy(6 * q @ k.T, torch.arange(9), label_smoothing=0.3)
    torch.testing.assert_close(ours, theirs)


def test_normalize_is_of_all_candidates():
    q, k, queue = (torch.randn(5, 3, dtype=F64) for _ in range(3))
    options = {"queue": queue, "hard_negatives": torch.randn(5, 2, 3, dtype=F64)}
    units = {name: torch.nn.functional.normalize(x, dim=-1) for name, x in options.items()}
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    loss = ik.clip_loss(q, k, 5.0, normalize=True, **options)
    torch.testing.assert_close(loss, ik.clip_loss(a, b, 5.0, **units))


def test_no_hardness_is_the_plain_loss():
    q, k = unit(9, 5), unit(9, 5, seed=1)
    assert ik.clip_loss(q, k, 6.0, hardness=0) == ik.clip_loss(q, k, 6.0)
    torch.testing.assert_close(ik.clip_loss(q, k, 6.0, hardness=1e-9), ik.clip_loss(q, k, 6.0))
    torch.testing.assert_close(ik.clip_loss(q, k, 6.0, debias=0.0), ik.clip_loss(q, k, 6.0))


def test_debiased_at_its_floor():
    """Where nothing is left of the negatives, where less than the floor is, and above it."""
    negatives = torch.tensor([2.0, 2.0, 2.0, -torch.inf], dtype=F64, requires_grad=True)
    prior, number = torch.tensor(0.5, dtype=F64), torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=F64)
    positive = torch.tensor([2.0, 1.9999999, 0.0, 0.0], dtype=F64, requires_grad=True)
    out = debiased(negatives, positive, number, prior, torch.full((4,), -5.0, dtype=F64))
    above, floor = (math.exp(2.0) - 2 * 0.5 * 1.0) / 0.5, 2 * math.exp(-5.0)
    truth = torch.tensor([floor, floor, above, 0.0], dtype=F64).log()
    torch.testing.assert_close(out, truth)
    for grad in torch.autograd.grad(out[:3].sum(), [negatives, positive]):
        assert grad.isfinite().all()
        assert (grad[:2] == 0).all()


def test_the_queue_has_no_gradient():
    q, queue = unit(5, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_()
    loss = ik.multi_positive_infonce(q, unit(5, 3, seed=2), 5.0, queue=queue)
    assert torch.autograd.grad(loss, queue, allow_unused=True)[0] is None


@pytest.mark.parametrize("positives", ["mean", "in"])
def test_stats(positives):
    q, k = unit(7, 4), unit(9, 4, seed=1)
    ids = random_ids(7, 4, 2), random_ids(9, 4, 3)
    given = {"query_ids": ids[0], "key_ids": ids[1], "positives": positives}
    plain = ik.multi_positive_infonce(q, k, 5.0, return_stats=True, **given)[1]
    options = {"queue": unit(3, 4, seed=2), "query_weights": rand(7), "hardness": 0.5}
    loss, stats = ik.multi_positive_infonce(q, k, 5.0, return_stats=True, **options, **given)
    assert loss == ik.multi_positive_infonce(q, k, 5.0, **options, **given)
    assert not any(x.requires_grad for x in stats.values())
    for name in ("row_accuracy", "col_accuracy", "positive_score", "hardest_negative_score"):
        torch.testing.assert_close(stats[name], plain[name])
    options.pop("query_weights")
    rows, cols = infonce_formula(q, k, 5.0, *ids, positives=positives, reduction="none", **options)
    torch.testing.assert_close(stats["row_loss"], rows)
    torch.testing.assert_close(stats["col_loss"], cols)
    queue = {"queue": options["queue"]}
    stats = ik.multi_positive_infonce(q, k, 5.0, return_stats=True, **queue, **given)[1]
    torch.testing.assert_close(
        stats["row_lse"], (5 * q @ torch.cat([k, queue["queue"]]).T).logsumexp(1)
    )


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend(name, dtype, backend):
    """At scale 50, where digits are lost if scores are not relative to their maximum."""
    n, m, d = 40, 50, 24
    q, k = unit(n, d, dtype=dtype), unit(m, d, seed=1, dtype=dtype)
    ids = {"query_ids": random_ids(n, 12, 2, padded=True)}
    ids["key_ids"] = random_ids(m, 12, 3, padded=True)

    def value_and_grads(q, k, backend):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
        options = {
            key: x.detach().to(q.dtype if key in ("queue", "hard_negatives") else torch.float32)
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for key, x in make(name, n, m, d).items()
        }
        loss = ik.multi_positive_infonce(*leaves, 50.0, **ids, **options, backend=backend)
        return loss, *torch.autograd.grad(loss, leaves)

    ours = value_and_grads(q, k, backend)
    truth = value_and_grads(q.double(), k.double(), "reference")
    fp32 = dtype == torch.float32
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=5e-5 if fp32 else 1e-2)
    for x, y in zip(ours[1:], truth[1:], strict=True):
        assert x.dtype == dtype
        assert (x - y).abs().max() <= (1e-4 if fp32 else 2e-2) * y.abs().max()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("name", ["hardness", "debias, hardness", "pairs"])
def test_half_precision_is_rounded_once(name, backend):
    """A hard negative beside each positive at scale 50: parts of several passes cancel."""
    x = unit(40, 24)
    y = (x + 0.02 * unit(40, 24, seed=1)).to(torch.bfloat16)
    y = torch.cat([y, (y + 0.02 * unit(40, 24, seed=2)).to(torch.bfloat16)])
    x, count = x.to(torch.bfloat16), torch.arange(40)
    options = {"symmetric": False, "query_ids": count, "key_ids": torch.arange(80)}
    if name == "pairs":
        options = {"symmetric": False, "positive_pairs": torch.stack([count, count], 1)}
    else:
        options |= make(name, 40, 80, 24)

    def grads(dtype, backend):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        loss = ik.multi_positive_infonce(*leaves, 50.0, backend=backend, **options)
        return torch.autograd.grad(loss, leaves)

    for a, b in zip(grads(torch.bfloat16, backend), grads(F64, "reference"), strict=True):
        assert (a - b).abs().max() <= 5e-3 * b.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """Features as autocast rounds them, everything else in fp32."""
    q, k = unit(13, 24, dtype=torch.float32), unit(9, 24, seed=1, dtype=torch.float32)
    ids = {"query_ids": random_ids(13, 5, 2), "key_ids": random_ids(9, 4, 3)}
    options = {
        key: x.detach().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in make(name, 13, 9, 24).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        loss = ik.multi_positive_infonce(q, k, 30.0, **ids, **options)
    for key in ("queue", "hard_negatives"):
        if key in options:
            options[key] = options[key].bfloat16().float()
    truth = ik.multi_positive_infonce(
        q.bfloat16().float(), k.bfloat16().float(), 30.0, **ids, **options
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-4)


def test_clip_loss_takes_pairs():
    q, k, pairs = unit(5, 4), unit(7, 4, seed=1), pairs_of(5, 7, 6).unique(dim=0)
    loss = ik.clip_loss(q, k, 5.0, positive_pairs=pairs)
    torch.testing.assert_close(loss, infonce_formula(q, k, 5.0, positive_pairs=pairs))


def test_gradcheck():
    q, k = unit(5, 3).requires_grad_(), unit(6, 3, seed=1).requires_grad_()
    ids = {"query_ids": random_ids(5, 3, 2), "key_ids": random_ids(6, 3, 3)}
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    for name in NAMES:
        options = {
            key: x.detach() if isinstance(x, torch.Tensor) else x
            for key, x in make(name, 5, 6, 3).items()
        }
        torch.autograd.gradcheck(
            lambda *x: ik.multi_positive_infonce(*x, **ids, **options),  # noqa: B023
            (q, k, scale),
        )


@pytest.mark.parametrize("more", ["queue", "hard_negatives"])
def test_bf16_near_a_hard_negative_beyond_the_batch(more):
    """A candidate 0.02 from the positive, scale 100: the gradient stays within 0.03 of fp64."""
    a = normalize(torch.randn(64, 128), dim=1)
    b = normalize(a + 0.05 * torch.randn(64, 128), dim=1)
    extra = normalize(b + 0.02 * normalize(torch.randn(64, 128), dim=1), dim=1)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        x, y, z = (v.bfloat16().to(dtype) for v in (a, b, extra))
        x.requires_grad_()
        given = {"queue": z} if more == "queue" else {"hard_negatives": z[:, None]}
        loss = ik.clip_loss(x, y, 100.0, symmetric=False, **given)
        grads.append(torch.autograd.grad(loss, x)[0].double())
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[1].norm()


# ---- bad input, padding, features that are not finite
X, Y, IDS = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)


def test_padding_may_hold_anything():
    q, k = unit(6, 4), unit(6, 4, seed=1)
    ids = torch.tensor([0, 1, -1, 2, 3, -1])
    queue, queue_ids = unit(3, 4, seed=2), torch.tensor([7, -1, 8])
    options = {"query_ids": ids, "key_ids": ids, "hard_negatives": unit(6, 2, 4, seed=3)}
    options |= {"queue": queue, "queue_ids": queue_ids, "key_bias": torch.rand(6, dtype=F64)}
    no_ids = {"queue_ids": None}
    for more in ({"label_smoothing": 0.1}, {"debias": 0.1, "hardness": 1.0}, no_ids):
        given = options | more
        clean = ik.multi_positive_infonce(q, k, 5.0, **given)
        q2, k2 = q.clone(), k.clone()
        q2[ids < 0], k2[ids < 0] = torch.nan, torch.inf
        q2.requires_grad_(), k2.requires_grad_()
        loss = ik.multi_positive_infonce(q2, k2, 5.0, **given)
        torch.testing.assert_close(loss, clean)
        for grad in torch.autograd.grad(loss, [q2, k2]):
            assert grad.isfinite().all()
            assert (grad[ids < 0] == 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_padded_hard_negatives_may_hold_anything(normalize):
    hard = unit(6, 2, 4, seed=3)
    ids = torch.tensor([[7, -1], [-1, -1], [8, 9], [3, 3], [7, 7], [-1, 9]])
    bad = hard.masked_fill((ids < 0)[:, :, None], torch.nan).requires_grad_()
    results = []
    for h in (hard, bad):
        options = {"hard_negatives": h, "hard_negative_ids": ids, "normalize": normalize}
        results.append(ik.multi_positive_infonce(unit(6, 4), unit(6, 4, seed=1), 5.0, **options))
    assert torch.equal(*results)
    grad = torch.autograd.grad(results[1], bad)[0]
    assert grad.isfinite().all()
    assert (grad[ids < 0] == 0).all()
    assert (grad[3] == 0).all()  # both are the anchor's own


def test_features_that_are_not_finite_show():
    q, k = unit(6, 4), unit(6, 4, seed=1)
    q[2, 0] = torch.nan
    ids = torch.arange(6)
    for options in (
        {"label_smoothing": 0.1},
        {"debias": 0.1},
        {"hardness": 0.5},
        {"queue": unit(3, 4, seed=2)},
        {"hard_negatives": unit(6, 2, 4, seed=2)},
        {"query_weights": torch.ones(6, dtype=F64)},
    ):
        assert not ik.multi_positive_infonce(q, k, 5.0, **options).isfinite()
        alone = {"query_ids": ids + 10 * (ids == 2), "key_ids": ids}  # without a positive, too
        alone["symmetric"] = False
        assert not ik.multi_positive_infonce(q, k, 5.0, **alone, **options).isfinite()


PAIRS = torch.tensor([[0, 1], [2, 4]])
BAD = [
    (TypeError, "label_smoothing must be a number, got str", {"label_smoothing": "a"}),
    (ValueError, "label_smoothing must be from 0 to 1, got 1.5", {"label_smoothing": 1.5}),
    (
        ValueError,
        "label_smoothing is defined for a softmax",
        {"label_smoothing": 0.1, "debias": 0.1},
    ),
    (ValueError, "hardness must be from 0 upwards, finite, got -1", {"hardness": -1}),
    (ValueError, "debias must be from 0 to 1, got 2", {"debias": 2}),
    (ValueError, "debias, .* must be less than 1, got 1", {"debias": 1.0}),
    (ValueError, r"debias must have shape \(5,\)", {"debias": torch.ones(4)}),
    (ValueError, "debias bounds the negatives of a key", {"debias": 0.1, "scale": torch.ones(5)}),
    (ValueError, r"query_weights must have shape \(5,\)", {"query_weights": torch.ones(4)}),
    (TypeError, "key_weights must have a floating-point dtype", {"key_weights": IDS}),
    (ValueError, "query_weights must be 0 or more, got -1 to 1", {"query_weights": 1 - IDS / 2}),
    (ValueError, "key_weights must be 0 or more, got -1 to 1", {"key_weights": 1 - IDS / 2}),
    (ValueError, "key_weights must be 0 or more, got nan to nan", {"key_weights": 0 * IDS / 0}),
    (TypeError, "symmetric must be True or False, got 'no'", {"symmetric": "no"}),
    (TypeError, "normalize must be True or False, got None", {"normalize": None}),
    (
        ValueError,
        "positive_weights must be 0 or more, got -1 to -1",
        {"positive_pairs": PAIRS, "positive_weights": -torch.ones(2)},
    ),
    (ValueError, "debias must be from 0 to 1, got 1.5 to 1.5", {"debias": torch.full((5,), 1.5)}),
    (TypeError, "label_smoothing must be a number, got NoneType", {"label_smoothing": None}),
    (ValueError, "key_weights apply", {"key_weights": torch.ones(5), "symmetric": False}),
    (
        ValueError,
        "query_weights must not require a gradient",
        {"query_weights": torch.ones(5, requires_grad=True)},
    ),
    (ValueError, r"key_bias must have shape \(5,\)", {"key_bias": torch.ones(4)}),
    (ValueError, r"queue must have shape \(Q, D\) with D = 3", {"queue": torch.randn(4, 2)}),
    (TypeError, "queue must be torch.float32", {"queue": torch.randn(4, 3).double()}),
    (TypeError, "query_weights must be a tensor, got ndarray", {"query_weights": np.ones(5)}),
    (TypeError, "queue must be a tensor, got ndarray", {"queue": np.ones((4, 3))}),
    (
        ValueError,
        "margin_on='in_batch' spares",
        {"in_batch": False, "symmetric": False, "queue": X}
        | {"false_negative_margin": 0.1, "margin_on": "in_batch"},
    ),
    (
        ValueError,
        "in_batch=False .* got neither queue nor",
        {"in_batch": False, "symmetric": False},
    ),
    (ValueError, "in_batch=False .* symmetric=True", {"in_batch": False, "queue": X}),
    (TypeError, "in_batch must be True or False, got 0", {"in_batch": 0}),
    (ValueError, "queue_ids need queue", {"queue_ids": IDS}),
    (ValueError, r"queue_ids must have shape \(5,\)", {"queue": X, "queue_ids": IDS[:3]}),
    (ValueError, "queue_ids are compared", {"queue": X, "queue_ids": IDS, "positive_pairs": PAIRS}),
    (ValueError, r"hard_negatives must have shape \(N, K, D\)", {"hard_negatives": X}),
    (ValueError, "hard_negatives must hold K keys for each of 5", {"hard_negatives": X[:4, None]}),
    (ValueError, "hard_negative_ids need hard_negatives", {"hard_negative_ids": IDS}),
    (
        ValueError,
        r"hard_negative_ids must have shape \(5, 2\).* got \(5,\)",
        {"hard_negatives": torch.randn(5, 2, 3), "hard_negative_ids": IDS},
    ),
    (
        TypeError,
        "hard_negative_ids must have an integer dtype",
        {"hard_negatives": torch.randn(5, 1, 3), "hard_negative_ids": torch.ones(5, 1)},
    ),
    (
        ValueError,
        "hard_negative_ids are compared",
        {"hard_negatives": X[:, None], "hard_negative_ids": IDS[:, None], "positive_pairs": PAIRS},
    ),
    (TypeError, "positive_pairs must be a tensor", {"positive_pairs": [[0, 1]]}),
    (TypeError, "positive_pairs must have an integer dtype", {"positive_pairs": PAIRS.float()}),
    (ValueError, r"positive_pairs must have shape \(P, 2\)", {"positive_pairs": IDS}),
    (ValueError, "positive_pairs must be row numbers of 5 keys", {"positive_pairs": PAIRS + 1}),
    (ValueError, "row numbers of 5 queries, 0 to 4, got -1 to 1", {"positive_pairs": PAIRS - 1}),
    (ValueError, "positive_pairs replace", {"positive_pairs": PAIRS, "query_ids": IDS}),
    (ValueError, "positive_weights need positive_pairs", {"positive_weights": torch.ones(2)}),
    (
        ValueError,
        r"positive_weights must have shape \(2,\)",
        {"positive_pairs": PAIRS, "positive_weights": torch.ones(3)},
    ),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[x[1][:40] for x in BAD])
def test_bad_input(error, message, options):
    options = {"scale": 1.0} | options
    with pytest.raises(error, match=message):
        ik.multi_positive_infonce(X, Y, options.pop("scale"), **options)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options", [{"debias": 0.1}, {"hardness": 0.5}, {"debias": 0.1, "hardness": 0.5}]
)
def test_what_is_not_finite_shows_in_reweighted_negatives(backend, bad, options):
    queries, keys = (normalize(torch.randn(12, 8), dim=1) for _ in range(2))
    queries[4, 3] = bad
    ids = torch.arange(12) // 3
    for symmetric in (True, False):
        loss = ik.multi_positive_infonce(
            queries,
            keys,
            5.0,
            query_ids=ids,
            key_ids=ids + 2,
            symmetric=symmetric,
            backend=backend,
            **options,
        )
        assert not loss.isfinite()


@pytest.mark.parametrize("options", [{}, {"debias": 0.1, "hardness": 0.5}])
def test_padding_may_hold_anything_beyond_the_batch_too(options):
    queries, keys = (normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ids = torch.tensor([0, 1, -1, 2, 3, 4])
    hard, weights = normalize(torch.randn(6, 3, 8), dim=2), torch.rand(6)
    bad, bad_weights = hard.clone(), weights.clone()
    bad[2], bad_weights[2] = torch.nan, torch.nan
    results = []
    for h, w in ((hard, weights), (bad, bad_weights)):
        leaves = [x.clone().requires_grad_() for x in (queries, h)]
        loss = ik.multi_positive_infonce(
            leaves[0],
            keys,
            5.0,
            query_ids=ids,
            key_ids=ids,
            hard_negatives=leaves[1],
            query_weights=w,
            **options,
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for clean, padded in zip(*results, strict=True):
        assert torch.equal(clean, padded)


@pytest.mark.parametrize("given", ["query_ids", "key_ids"])
def test_pairs_and_ids_of_one_side_with_more_keys(given):
    ids = torch.arange(5 if given == "query_ids" else 7)
    with pytest.raises(ValueError, match="positive_pairs replace query_ids and key_ids"):
        ik.multi_positive_infonce(X, torch.randn(7, 3), 1.0, positive_pairs=PAIRS, **{given: ids})


def test_an_unknown_option_is_told_by_the_loss_that_got_it():
    x = torch.eye(3)
    for name in ("clip_loss", "multi_positive_infonce"):
        loss = getattr(ik, name)
        for call in (loss, partial(ik.matryoshka_loss, loss, dims=[3])):
            with pytest.raises(TypeError, match=rf"^{name}\(\) got .* argument 'bad_option'$"):
                call(x, x, logit_scale=1.0, bad_option=1)


def test_hard_negatives_of_padded_queries_are_not_read_when_they_are_normalised():
    q, k, hard = (unit(*x, 5, seed=i) for i, x in enumerate([(6,), (6,), (6, 2)]))
    ids = torch.tensor([0, 1, 2, 3, -1, -1])
    hard[4:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, hard)]
    loss = ik.clip_loss(
        *(q, k, 4.0), query_ids=ids, key_ids=ids, hard_negatives=hard, normalize=True
    )
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("more", [{"hardness": 0.5}, {"debias": 0.1}])
def test_hard_negatives_alone_in_fp64(more):
    """Of three equal ones, hardness changes nothing; debias is 1 / (1 - τ) of what exceeds."""
    q, k = unit(6, 5), unit(6, 5, seed=1)
    hard = unit(6, 1, 5, seed=2).repeat(1, 3, 1)
    alone = {"hard_negatives": hard, "in_batch": False, "symmetric": False, "reduction": "none"}
    found = ik.multi_positive_infonce(q, k, 5.0, **alone, **more)
    pos, neg = 5 * (q * k).sum(1), 5 * (q * hard[:, 0]).sum(1)
    negatives = 3 * neg.exp()
    if "debias" in more:
        negatives = torch.clamp((negatives - 0.3 * pos.exp()) / 0.9, min=3 * math.exp(-5))
    torch.testing.assert_close(found, (pos.exp() + negatives).log() - pos, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [x for x in ("reference", "chunked", "cpu") if x in AVAILABLE])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}, {"hardness": 0.5}])
def test_scales_of_padded_queries_are_not_read(more, backend):
    q, k = (unit(6, 5, seed=i).float().requires_grad_() for i in range(2))
    ids, scale = torch.tensor([0, 1, 2, -1, 3, -1]), torch.full((6,), 4.0)
    spoilt = scale.masked_fill(ids < 0, torch.nan).requires_grad_()
    losses = [
        ik.clip_loss(q, k, x, query_ids=ids, key_ids=ids, backend=backend, **more)
        for x in (scale, spoilt)
    ]
    assert losses[0] == losses[1]
    for grad in torch.autograd.grad(losses[1], (q, k, spoilt)):
        assert grad.isfinite().all()


def test_a_prior_of_1_raises_for_each_query_too():
    with pytest.raises(ValueError, match=r"debias, the proportions .* must be less than 1"):
        ik.clip_loss(unit(6, 5), unit(6, 5, seed=1), 4.0, debias=torch.ones(6))
