"""What happens at the edge of the numbers: extreme scales and features, rows with nothing allowed,
one-hot softmax, a million equal scores, scores of -inf, values that are not finite."""

import math
import re

import pytest
import torch
from support.losses_table import ROWS, Inputs, Row
from support.problems import AVAILABLE, safe_logsumexp
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.similarity.cpu import instruction_sets

F64 = torch.float64
N, D = 12, 6
NATIVE = "cpu" if "cpu" in AVAILABLE else "chunked"
CASES = [(loss, option) for loss, rows in ROWS.items() for option in rows]
ISAS = [x for x in instruction_sets() if x != "amx_emulated"]
rows = pytest.mark.parametrize(("loss", "option"), CASES, ids=[f"{a} {b}" for a, b in CASES])


def features(factor: float = 1.0) -> list[torch.Tensor]:
    return [factor * normalize(torch.randn(N, D), dim=1) for _ in range(3)]


def value_and_gradients(row: Row, loss: str, xyz, dtype, backend, scale=12.0) -> dict:
    x, y, z = (v.to(dtype) for v in xyz)
    scale = torch.tensor(scale, dtype=dtype)
    leaves = {"x": x, "y": y, "scale": scale}
    for leaf in leaves.values():
        leaf.requires_grad_()
    value = row.call(loss, Inputs.of(x, y, z)._replace(scale=scale), backend=backend)
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return {"loss": value.detach()} | dict(zip(leaves, gradients, strict=True))


# ---- large and small numbers

# (scale, norm of the features)
EDGES = [(1e-3, 1.0), (1e4, 1.0), (1.0, 1e4), (1e-4, 1e4), (1.0, 1e-20), (1.0, 1e-40)]
# What dense PyTorch cannot do in fp32 either, {loss: edges}: differences of squared norms, powers
# of e that are not of a softmax, products below 1e-38 that a margin compares.
BEYOND_FP32 = {
    "uniformity_loss": [(1.0, 1e4), (1e-4, 1e4)],
    "cacr_loss": [(1.0, 1e4), (1e-4, 1e4)],
    "rince_loss": [(1e4, 1.0), (1.0, 1e4), (1e-4, 1e4)],
    "alignment_loss": [(1.0, 1e-20), (1.0, 1e-40)],
}


@pytest.mark.parametrize(("scale", "norm"), EDGES)
@rows
def test_extreme_scales_and_features(loss, option, scale, norm):
    """In fp32, with the accuracy of ordinary numbers, but for the rounding of the scores."""
    if (scale, norm) in BEYOND_FP32.get(loss, []) or ("relative" in option and norm < 1e-10):
        return
    row, xyz = ROWS[loss][option], features(norm)
    rounding = 1e-7 * min(scale * norm**2, 1e4)  # at 1e8, the softmax is one-hot
    truth = value_and_gradients(row, loss, xyz, F64, "reference", scale)
    for backend in dict.fromkeys((NATIVE, "chunked")):
        ours = value_and_gradients(row, loss, xyz, torch.float32, backend, scale)
        for name, x in truth.items():
            error, size = (ours[name] - x).abs().max(), x.abs().max()
            if name == "scale":  # a sum of parts of the loss, which may cancel
                size = max(size, truth["loss"].abs() / scale)
            assert error <= (2e-5 + rounding) * size + 1e-6, f"{backend}, {name}"


@pytest.mark.parametrize("scale", [1e-3, 12.0, 1e4])
def test_a_cluster_weight_of_0_leaves_negatives_out_at_any_scale(scale):
    """Against the same loss without these negatives. As the bias of a feature divided by the scale,
    the weights took the digits of small scores, and left too little room below large ones."""
    x, y, _ = features()
    clusters = torch.arange(N) % 2
    y[clusters == 0] = -x[0] + 0.01 * y[clusters == 0]  # the kept negatives are the farthest
    weights = torch.tensor([[0.7, 0.0], [0.0, 1.9]])
    given = {"query_clusters": clusters, "key_clusters": clusters, "weights": weights}
    for more in ({}, {"include_positives": False}):
        leaf = torch.tensor(scale, requires_grad=True)
        ours = ik.cluster_weighted_infonce(x, y, leaf, symmetric=False, **given, **more)
        S = leaf.double() * (x.double() @ y.double().T)
        own = torch.eye(N, dtype=torch.bool)
        w = weights.double()[clusters][:, clusters].masked_fill(own, 0 if more else 1)
        truth = ((S + w.log()).logsumexp(1) - S.diag()).mean()
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
        grads = (torch.autograd.grad(loss, leaf)[0] for loss in (ours, truth))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


# ---- nothing left, and one thing alone

BY_IDS = [
    (loss, option)
    for loss, option in CASES
    if re.search("ids|temperature, empty|base_temp", option) and option != "hard_negative_ids"
]


@pytest.mark.parametrize(("loss", "option"), BY_IDS)
def test_a_batch_of_padding_is_0(loss, option):
    x, y, z = (torch.full_like(v, torch.nan).requires_grad_() for v in features())
    inputs = Inputs(x, y, z, torch.arange(N) - 5 * N, N)  # from which the ids are made
    for backend in dict.fromkeys((NATIVE, "chunked", "reference")):
        value = ROWS[loss][option].call(loss, inputs, backend=backend)
        assert value == 0
        for grad in torch.autograd.grad(value, (x, y), materialize_grads=True):
            assert not grad.any()


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_one_hot_softmax(backend, scale):
    """All probability on the positive: 0 with a gradient of 0. All of it on a negative: the whole
    difference of the two scores."""
    x = torch.eye(N, 16)
    for keys, truth in ((x, 0.0), (x.roll(1, 0), scale), (-x, scale + math.log(N - 1))):
        for positives in ("mean", "in", "sum"):
            leaves = [v.clone().requires_grad_() for v in (x, keys, torch.tensor(scale))]
            options = {"positives": positives, "backend": backend}
            loss = ik.multi_positive_infonce(*leaves, **options)
            assert loss.item() == pytest.approx(truth, rel=1e-6)
            a, b, of_scale = torch.autograd.grad(loss, leaves)
            assert of_scale.item() == pytest.approx(0 if truth == 0 else 1, rel=1e-6)
            assert a.isfinite().all()
            assert b.isfinite().all()
            assert a.any() == b.any() == (truth > 0)


# ---- long sums


@pytest.mark.parametrize("isa", ISAS)
def test_a_million_equal_scores(isa, monkeypatch):
    """In tiles of 256, the sum of the tiles alone would lose 2.7e-5 in fp32: so did softplus, and
    the mean of as many positives 1.9e-4, because it is taken from the maximum."""
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    check_equal_scores("cpu", 1_000_000, 1e-4)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b not in ("cpu", "triton")])
def test_many_equal_scores(backend):
    """PyTorch's product of a softmax of 10⁶ and the keys is wrong by 6e-3."""
    check_equal_scores(backend, 4_000 if backend == "simt" else 1_000_000, 1e-2)


def check_equal_scores(backend: str, count: int, of_product: float) -> None:
    """Of one row against many columns and of many rows against one column."""
    score = 11 * torch.tensor(0.7).double() * torch.tensor(0.9).double()
    for sizes, side in (((1, count), "row"), ((count, 1), "col")):
        values = (0.7, 0.9)
        leaves = [
            torch.full((k, 1), x).requires_grad_() for k, x in zip(sizes, values, strict=True)
        ]
        sides = {"rows": side == "row", "cols": side == "col"}

        def statistics(leaves=leaves, sides=sides, **options):
            stats = ik.similarity_logsumexp(*leaves, 11.0, **sides, **options, backend=backend)
            return stats.row or stats.col

        def ids(row, col, sizes=sizes):
            return {"row_ids": torch.full(sizes[:1], row), "col_ids": torch.full(sizes[1:], col)}

        logsum = statistics().logsum
        assert abs(logsum.item() - math.log(count)) <= 2e-6
        # W is 1 / count at each; the one that is alone on its side gets the mean of the others
        gradients = torch.autograd.grad(logsum.sum(), leaves)
        for k, x, grad in zip(sizes, values[::-1], gradients, strict=True):
            expected = torch.full((k, 1), 11 * x / k)
            torch.testing.assert_close(grad, expected, rtol=of_product if k == 1 else 1e-5, atol=0)
        for positives, truth in (("linear", 0.0), ("lse", math.log(count))):
            pos = statistics(positives=positives, **ids(0, 0)).pos.item()
            assert abs(pos / (count if positives == "linear" else 1) - truth) <= 3e-5
        softplus = ik.similarity_softplus(*leaves, 11.0, **ids(0, 1), backend=backend)
        total = softplus.double().sum()
        torch.testing.assert_close(total, count * score.exp().log1p(), rtol=5e-6, atol=0)


# ---- scores of -inf


def with_bias(a, b, scale, bias, side, positives, backend):
    """logsumexp over all and over the positives (or their sum) for each of the 4 rows of a; backend
    None: dense."""
    ids = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 2, 2, 9])
    options = {"positives": positives, "backend": backend}
    if backend is None:
        S, positive = scale * (a @ b.T) + bias, ids[0][:, None] == ids[1]
        of_positives = S.masked_fill(~positive, -torch.inf)
        linear = torch.where(positive, S, 0).sum(1)
        pos = linear if positives == "linear" else safe_logsumexp(of_positives, 1)
        return safe_logsumexp(S, 1), pos
    if side == "row":
        by_ids = {"row_ids": ids[0], "col_ids": ids[1]}
        stats = ik.similarity_logsumexp(
            a, b, scale, col_bias=bias, cols=False, **by_ids, **options
        ).row
    else:
        by_ids = {"row_ids": ids[1], "col_ids": ids[0]}
        stats = ik.similarity_logsumexp(
            b, a, scale, row_bias=bias, rows=False, **by_ids, **options
        ).col
    shift = stats.max.masked_fill(stats.max == -torch.inf, 0)
    k = torch.tensor([2, 2, 2, 0]) if positives == "linear" else 1
    return shift + stats.logsum, stats.pos + k * shift


@pytest.mark.parametrize("gone", [(6,), (0,), (0, 1), (4, 5), range(7)], ids=str)
@pytest.mark.parametrize("positives", ["linear", "lse"])
@pytest.mark.parametrize("side", ["row", "col"])
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "triton"])
def test_scores_of_minus_infinity(backend, side, positives, gone):
    """They weigh nothing. Where all positives of a row have them, so has their logarithm, with a
    gradient of 0 and not NaN: a caller may leave such rows out of the sum."""
    bias = torch.zeros(7)
    bias[list(gone)] = -torch.inf
    a, b = (normalize(torch.randn(k, 5), dim=1) for k in (4, 7))
    found = []
    for dtype, which in ((F64, None), (torch.float32, backend)):
        leaves = [v.to(dtype).requires_grad_() for v in (a, b, torch.tensor(5.0), bias)]
        everything, pos = with_bias(*leaves, side, positives, which)
        kept = torch.where(everything.isfinite(), everything, 0).sum()
        kept = kept - 0.3 * torch.where(pos.isfinite(), pos, 0).sum()
        gradients = torch.autograd.grad(kept, leaves)
        found.append([everything, pos, *gradients])
    for ours, truth in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


# ---- values that are not finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@rows
def test_what_is_not_finite_shows(loss, option, bad):
    """In one element of any of the features that the loss reads."""
    row, xyz = ROWS[loss][option], features()
    for backend in dict.fromkeys((NATIVE, "chunked", "reference")):

        def value(i, of_row, backend=backend):
            changed = [v.clone() for v in xyz]
            changed[i][3] = of_row
            return row.call(loss, Inputs.of(*changed), backend=backend)

        for i in range(3):
            if value(i, 0.5 * xyz[i][4]) == value(i, xyz[i][3]):
                continue  # a feature that is not read
            spoilt = xyz[i][3].abs()
            spoilt[2] = bad
            assert not value(i, spoilt).isfinite(), f"{backend}, {'xyz'[i]}"


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "triton"])
def test_an_infinite_distance_shows_in_uniformity(backend):
    """Its potential is 0, if all inner products are -inf."""
    x = features()[0].abs()
    x[3, 2] = -torch.inf
    assert not ik.uniformity_loss(x, backend=backend).isfinite()
