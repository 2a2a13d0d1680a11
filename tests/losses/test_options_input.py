"""What the options of `multi_positive_infonce` are given: bad input by name, padding that may hold
anything, features that are not finite."""

from functools import partial

import pytest
import torch
from support.formulas import unit
from support.problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik

F64 = torch.float64
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
    (ValueError, "debias must be less than 1", {"debias": 1.0}),
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
    (ValueError, "queue_ids need queue", {"queue_ids": IDS}),
    (ValueError, r"queue_ids must have shape \(5,\)", {"queue": X, "queue_ids": IDS[:3]}),
    (ValueError, "queue_ids are compared", {"queue": X, "queue_ids": IDS, "positive_pairs": PAIRS}),
    (ValueError, r"hard_negatives must have shape \(N, K, D\)", {"hard_negatives": X}),
    (ValueError, "hard_negatives must hold K keys for each of 5", {"hard_negatives": X[:4, None]}),
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


def test_an_unknown_option_is_told_by_the_loss_that_got_it():
    x = torch.eye(3)
    for name in ("clip_loss", "multi_positive_infonce"):
        loss = getattr(ik, name)
        for call in (loss, partial(ik.matryoshka_loss, loss, dims=[3])):
            with pytest.raises(TypeError, match=rf"^{name}\(\) got .* argument 'bad_option'$"):
                call(x, x, logit_scale=1.0, bad_option=1)
