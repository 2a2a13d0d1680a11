"""The drop-ins for pytorch-metric-learning against the package, values to fp32 rounding, and the
paper's formula where the package leaves it. Skipped where it is not installed:
requirements-peers.txt has versions that go together."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.drop_ins import agree, both, features
from support.formulas import random_ids
from support.memory import linux, printed
from torch.nn.functional import normalize

METRIC_LOSSES = ["SupConLoss", "NTXentLoss"]


def metric_losses(name, **options):
    return [getattr(package, name)(**options) for package in both("pytorch_metric_learning")]


@pytest.mark.parametrize("name", METRIC_LOSSES)
@pytest.mark.parametrize("groups", [40, 8, 3])
@pytest.mark.parametrize("with_ref", [False, True])
def test_pytorch_metric_learning(name, groups, with_ref):
    """Its own style: labels, ref_emb; many positives, and anchors without any."""
    x, labels = features(40, 24), random_ids(40, groups, 2)
    given, leaves = {}, [x]
    if with_ref:
        m = 40 if groups == 8 else 55  # also as many as embeddings: the pairs (i, i) stay in
        ref = features(m, 24)
        given = {"ref_emb": ref, "ref_labels": random_ids(m, groups, 3)}
        leaves.append(ref)
    for temperature in ({}, {"temperature": 0.3}):
        ours, theirs = metric_losses(name, **temperature)
        agree(ours(x, labels, **given), theirs(x, labels, **given), leaves)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_against_the_batch_itself(name):
    """Where ref_labels are labels, the same tensor, nothing is compared with itself."""
    ours, theirs = metric_losses(name)
    x, other, labels = features(20, 8), features(20, 8), random_ids(20, 4, 2)
    alone = ours(x, labels)
    agree(ours(x, labels, ref_emb=x, ref_labels=labels), alone, [x])
    for ref, ref_labels in ((x, labels), (other, labels), (x, labels.clone())):
        given = {"ref_emb": ref, "ref_labels": ref_labels}
        agree(ours(x, labels, **given), theirs(x, labels, **given), [x])
    with_itself = ours(x, labels, ref_emb=x, ref_labels=labels.clone())
    assert (with_itself - alone).abs() > 0.1


@pytest.mark.parametrize("name", METRIC_LOSSES)
@pytest.mark.parametrize(
    "kind", ["float", "fractions", "nan", "bool", "uint8", "negative", "of the whole range"]
)
def test_pytorch_metric_learning_labels(name, kind):
    """Whatever can be compared: equal labels are positives."""
    ids = random_ids(20, 4, 2)
    labels = {
        "float": ids.float(),
        "fractions": ids / 7,
        "nan": torch.where(ids == 3, torch.nan, ids),  # which equals nothing, itself included
        "bool": ids > 1,
        "uint8": ids.to(torch.uint8),
        "negative": ids - 2,
        "of the whole range": torch.tensor([-(2**63), -1, 0, 2**63 - 1])[ids],
    }[kind]
    ours, theirs = metric_losses(name)
    x, ref = features(20, 8), features(30, 8)
    agree(ours(x, labels), theirs(x, labels), [x])
    given = {"ref_emb": ref, "ref_labels": labels[torch.arange(30) % 20]}
    agree(ours(x, labels, **given), theirs(x, labels, **given), [x, ref])


def random_list(of_triplets=False):
    """Pairs of 20 anchors and 30 others in any order, some listed several times, as (a1, p, a2, n),
    or triplets. Anchor 0 has one positive alone, 1 only negatives, 2 nothing."""
    g = torch.Generator().manual_seed(4)
    a = torch.cat([torch.randint(3, 20, (120,), generator=g), torch.tensor([0, 5, 5])])
    others = torch.randint(0, 15, (2, 123), generator=g)
    p, n = 2 * others[0], 2 * others[1] + 1  # no pair is positive and negative
    if of_triplets:
        return a, p, n
    a2 = torch.randint(3, 20, (123,), generator=g)
    a2[:2] = 1
    return a, p, a2, n


def options_of_metric_losses(name):
    """Every distance and reducer that both packages have."""
    both("pytorch_metric_learning")
    from pytorch_metric_learning import distances, reducers, regularizers

    l2 = partial(distances.LpDistance, p=2, power=2)
    options = {
        "nothing": {
            "distance": None,
            "reducer": None,
            "collect_stats": False,
            "embedding_regularizer": None,
        },
        "cosine": {"distance": distances.CosineSimilarity(), "temperature": 0.5},
        "dot": {"distance": distances.DotProductSimilarity(), "temperature": 0.5},
        "dot, as they are": {
            "distance": distances.DotProductSimilarity(normalize_embeddings=False),
            "temperature": 3,
        },
        "of an L1 norm": {"distance": distances.CosineSimilarity(p=1), "temperature": 0.5},
        "squared L2": {"distance": l2(), "temperature": 0.5},
        "squared L2, as they are": {"distance": l2(normalize_embeddings=False), "temperature": 3},
        "regularizer": {
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 0.3,
        },
        "regularizer and reducer": {
            "embedding_regularizer": regularizers.LpRegularizer(),
            "reducer": reducers.MeanReducer(),
        },
        "learned temperature": {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
        "mean": {"reducer": reducers.MeanReducer()},
        "sum": {"reducer": reducers.SumReducer()},
        "mean of what is not 0": {"reducer": reducers.AvgNonZeroReducer()},
    }
    if name == "SupConLoss":
        options |= {
            "threshold": {"reducer": reducers.ThresholdReducer(low=5.0, high=9.0)},
            "weighted": {"reducer": reducers.ClassWeightedReducer(torch.tensor([1.0, 2, 3, 4]))},
            "per anchor": {"reducer": reducers.PerAnchorReducer()},
            "several": {"reducer": reducers.MultipleReducers({"loss": reducers.SumReducer()})},
        }
    return options


@pytest.mark.parametrize("name", METRIC_LOSSES)
@pytest.mark.parametrize("given", ["labels", "labels and ref_emb", "pairs", "triplets"])
def test_pytorch_metric_learning_options(name, given):
    """Each with the pairs of labels and with pairs in a list."""
    x, labels, ref = features(20, 8), random_ids(20, 4, 2), features(30, 8)
    of_ref = {"ref_emb": ref, "ref_labels": random_ids(30, 4, 3)}
    arguments = {
        "labels": {},
        "labels and ref_emb": of_ref,
        "pairs": of_ref | {"indices_tuple": random_list()},
        "triplets": of_ref | {"indices_tuple": random_list(of_triplets=True)},
    }[given]
    for options in options_of_metric_losses(name).values():
        ours, theirs = metric_losses(name, **options)
        leaves = [x, *ours.parameters(), *([ref] if arguments else [])]
        agree(ours(x, labels, **arguments), theirs(x, labels, **arguments), leaves)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_in_double(name):
    """To 1e-10, where nothing underflows."""
    both("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance

    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    labels, ref_labels = random_ids(20, 4, 2), random_ids(30, 4, 3)
    for distance in (None, LpDistance(power=2)):
        for pairs in (None, random_list(), random_list(of_triplets=True)):
            tau = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
            losses = metric_losses(name, distance=distance, temperature=tau)
            values = [loss(x, labels, pairs, ref, ref_labels) for loss in losses]
            torch.testing.assert_close(*values, rtol=1e-10, atol=0)
            for grads in zip(*(torch.autograd.grad(v, [x, ref, tau]) for v in values), strict=True):
                torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_squared_distances_of_rows_far_from_0(name):
    """Products of 8 million, distances of 16: without the mean of the rows they would be 1 off."""
    both("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance

    x, labels = 1000 + torch.randn(20, 8), random_ids(20, 4, 2)
    ours, theirs = metric_losses(name, distance=LpDistance(power=2, normalize_embeddings=False))
    for pairs in (None, random_list()):
        arguments = (labels, pairs, torch.cat([x, x]), labels.repeat(2))
        truth = theirs(x.double(), *arguments[:2], arguments[2].double(), arguments[3])
        torch.testing.assert_close(ours(x, *arguments), truth.float(), rtol=1e-5, atol=1e-6)


def test_pytorch_metric_learning_losses_of_anchors():
    """DoNothingReducer returns them unreduced."""
    both("pytorch_metric_learning")
    from pytorch_metric_learning.reducers import DoNothingReducer

    x, labels = features(20, 8), random_ids(20, 4, 2)
    for pairs in (None, random_list()):
        losses = metric_losses("SupConLoss", reducer=DoNothingReducer())
        arguments = {
            "indices_tuple": pairs,
            "ref_emb": torch.cat([x, x]),
            "ref_labels": labels.repeat(2),
        }
        found = [loss(x, labels, **arguments)["loss"] for loss in losses]
        assert found[0].keys() == found[1].keys()
        assert found[0]["reduction_type"] == found[1]["reduction_type"]
        assert torch.equal(found[0]["indices"], found[1]["indices"])
        a, b = (x["losses"] for x in found)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        agree((a * a).sum(), (b * b).sum(), [x])


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_says_what_it_cannot(name):
    ours, _ = both("pytorch_metric_learning")
    from pytorch_metric_learning import distances, reducers

    loss = getattr(ours, name)
    wrong_reducers = [object()]
    if name == "NTXentLoss":
        wrong_reducers += [
            reducers.ThresholdReducer(low=0),
            reducers.AvgNonZeroReducer(high=1.0),
            reducers.ClassWeightedReducer(torch.ones(4)),
            reducers.DoNothingReducer(),
            reducers.PerAnchorReducer(),
        ]
    for argument, values in {
        "reducer": wrong_reducers,
        "distance": [
            distances.LpDistance(),
            distances.LpDistance(power=1),
            distances.LpDistance(p=1, power=2),
            distances.CosineSimilarity(power=2),
            distances.SNRDistance(),
            object(),
        ],
        "collect_stats": [True],
    }.items():
        for value in values:
            with pytest.raises(NotImplementedError, match=rf"^{argument}: {name} of ito_kernels"):
                loss(**{argument: value})
    with pytest.raises(NotImplementedError, match="collect_stats"):
        loss(distance=distances.CosineSimilarity(collect_stats=True))
    with pytest.raises(NotImplementedError, match="collect_stats"):
        loss(reducer=type(loss().reducer)(collect_stats=True))
    x, labels = torch.randn(4, 3), torch.arange(4)
    late = loss()
    late.distance = distances.LpDistance()
    with pytest.raises(NotImplementedError, match="distance"):
        late(x, labels)
    with pytest.raises(ValueError, match="labels are missing"):
        loss()(x)
    with pytest.raises(ValueError, match="ref_labels is missing"):
        loss()(x, labels, ref_emb=x)
    for wrong in (0, -0.1, torch.inf, torch.nan, torch.zeros(()), torch.ones(2)):
        with pytest.raises(ValueError, match="temperature must be"):
            loss(temperature=wrong)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_refuses_lists(name):
    ours, _ = both("pytorch_metric_learning")
    loss, x, i = getattr(ours, name)(), torch.randn(4, 3), torch.tensor
    good = i([0, 1])
    for pairs, error, message in (
        ((good, good), ValueError, r"indices_tuple must be \(anchors, positives, .* tuple of 2"),
        (torch.ones(3, 2), ValueError, "indices_tuple must be .* got Tensor"),
        (
            (good, i([1, 4]), good),
            ValueError,
            r"positive pairs of indices_tuple\[1\] .* from 0 to 3",
        ),
        ((good, good, i([0, -1])), ValueError, r"negative pairs of indices_tuple\[1\] .* -1 to 0"),
        ((good, good, good, i([2])), ValueError, "as many anchors as others, got 2 and 1"),
        ((good, good, good, i([[2, 3]])), ValueError, r"must be 1-D, got shape \(1, 2\)"),
        ((good, good, good, i([2.0, 3])), TypeError, "a tensor of integers, got torch.float32"),
        ((good, good, good, i([True, False])), TypeError, "a tensor of integers, got torch.bool"),
        ((good, good, good, [2, 3]), TypeError, "a tensor of integers, got list"),
    ):
        with pytest.raises(error, match=message):
            loss(x, indices_tuple=pairs)
    if name == "SupConLoss":
        both_kinds = good, i([2, 3]), good, i([1, 3])
        with pytest.raises(ValueError, match="lists a pair as positive and as negative"):
            loss(x, indices_tuple=both_kinds)


@pytest.mark.parametrize("name", METRIC_LOSSES)
@pytest.mark.parametrize("mined", [False, True])
def test_pytorch_metric_learning_cross_batch_memory(name, mined):
    """Over several batches, past the end of the memory; whole or only part of a batch enters."""
    losses = metric_losses(name)
    from pytorch_metric_learning.losses import CrossBatchMemory
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    miner = MultiSimilarityMiner() if mined else None
    ours, theirs = (CrossBatchMemory(x, 8, memory_size=50, miner=miner) for x in losses)
    for step in range(5):
        x, labels = features(16, 8), random_ids(16, 4, step)
        agree(ours(x, labels), theirs(x, labels), [x])
    enters = torch.arange(16) >= 8
    x, labels = features(16, 8), random_ids(16, 4, 9)
    values = (loss(x, labels, enqueue_mask=enters) for loss in (ours, theirs))
    agree(*values, [x])


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_miners(name):
    ours, theirs = metric_losses(name)
    from pytorch_metric_learning import miners
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

    x, ref, labels = features(20, 8), features(30, 8), random_ids(20, 4, 2)
    ref_labels = labels[torch.arange(30) % 20]
    for miner in (
        miners.MultiSimilarityMiner(),
        miners.TripletMarginMiner(0.2),
        miners.BatchHardMiner(),
        miners.BatchEasyHardMiner(),
        miners.PairMarginMiner(0.5, 1.5),
    ):
        pairs = miner(x, labels)
        agree(ours(x, labels, pairs), theirs(x, labels, pairs), [x])
        agree(ours(x, indices_tuple=pairs), theirs(x, indices_tuple=pairs), [x])
        pairs = miner(x, labels, ref, ref_labels)
        given = {"indices_tuple": pairs, "ref_emb": ref, "ref_labels": ref_labels}
        agree(ours(x, labels, **given), theirs(x, labels, **given), [x, ref])
    # all pairs of the labels in a list are the labels
    agree(ours(x, indices_tuple=get_all_pairs_indices(labels)), ours(x, labels), [x])


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_lists_of_little(name):
    """Nothing listed, one kind only, or one pair of both: the package returns 0."""
    losses = metric_losses(name)
    x, few, none = features(6, 4), torch.tensor([0, 0, 1]), torch.tensor([]).long()
    for pairs in (
        (none, none, none),  # a miner that found nothing
        (few, few + 2, none, none),
        (none, none, few, few + 2),
        (few[:1], few[:1] + 1, few[:1], few[:1] + 2),
        (few[:1], few[:1] + 1, few[1:], few[1:] + 2),
    ):
        agree(*(loss(x, indices_tuple=pairs) for loss in losses), [x])


@linux
@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_memory_of_lists(name):
    """Less than half of one dense fp32 matrix, 256 MiB; the package takes several."""
    both("pytorch_metric_learning")
    script = """
import sys
import torch
from ito_kernels.integrations import pytorch_metric_learning as ours
from support.memory import growth

n, loss = 8192, getattr(ours, sys.argv[1])()
x = torch.randn(n, 64, requires_grad=True)
a = torch.arange(n).repeat(8)
for size in (64, n):  # what is loaded once does not count
    pairs = a[:size], (a[:size] * 5) % size, a[:size], (a[:size] * 5 + 1) % size
    grown = growth(lambda: loss(x[:size], indices_tuple=pairs).backward())
print(grown)
"""
    assert float(*printed(script, name)) < 128


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_without_positives(name):
    ours, theirs = metric_losses(name)
    x, labels = features(6, 4), torch.arange(6)
    loss = ours(x, labels)
    assert loss == theirs(x, labels) == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(6, 4))


def pytorch_metric_learning_on_ranks(name, efficient):
    losses = metric_losses(name)
    from pytorch_metric_learning.miners import MultiSimilarityMiner
    from pytorch_metric_learning.utils.distributed import (
        DistributedLossWrapper,
        DistributedMinerWrapper,
    )

    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    everything, labels = torch.randn(20, 8, generator=g), random_ids(20, 4, 2)
    x = everything.chunk(size)[rank].requires_grad_()
    labels = labels.chunk(size)[rank]
    ours, theirs = (DistributedLossWrapper(loss, efficient=efficient) for loss in losses)
    agree(ours(x, labels), theirs(x, labels), [x])
    pairs = DistributedMinerWrapper(MultiSimilarityMiner(), efficient=efficient)(x, labels)
    agree(ours(x, labels, pairs), theirs(x, labels, pairs), [x])


def pytorch_metric_learning_memory_on_ranks(name):
    losses = metric_losses(name)
    from pytorch_metric_learning.losses import CrossBatchMemory
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    g = torch.Generator().manual_seed(dist.get_rank())
    ours, theirs = (DistributedLossWrapper(CrossBatchMemory(x, 8, memory_size=50)) for x in losses)
    for step in range(4):
        x = torch.randn(10, 8, generator=g).requires_grad_()
        labels = random_ids(10, 4, step)
        agree(ours(x, labels), theirs(x, labels), [x])


def test_where_pytorch_metric_learning_leaves_the_paper():
    """One label: SupCon, eq. 2, is positive, the peer returns 0; as for one positive and one
    negative pair. A loss that has underflowed: the peer takes the mean over the other anchors. A
    positive far below a negative: NT-Xent's loss there ends at -log of the smallest number."""
    ours, theirs = both("pytorch_metric_learning")
    x, same = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    S = (normalize(x, dim=1) @ normalize(x, dim=1).T / 0.1).fill_diagonal_(-torch.inf)
    others = ~torch.eye(5, dtype=torch.bool)
    truth = (S.logsumexp(1) - S[others].view(5, 4).mean(1)).mean()
    torch.testing.assert_close(ours.SupConLoss()(x, same), truth)
    assert theirs.SupConLoss()(x, same) == 0

    refs = {"ref_emb": x[1:3], "ref_labels": torch.arange(2)}
    truth = torch.nn.functional.softplus(S[0, 2] - S[0, 1])
    for name in METRIC_LOSSES:
        loss, peer = metric_losses(name, temperature=0.1)
        torch.testing.assert_close(loss(x[:1], same[:1], **refs), truth)
        assert peer(x[:1], same[:1], **refs) == 0

    x = torch.eye(4)[[0, 0, 1, 2]] + torch.tensor([0, 0, 0, 0.5])[:, None] * torch.eye(4)[1]
    labels = torch.tensor([0, 0, 1, 1])
    S = (normalize(x, dim=1) @ normalize(x, dim=1).T / 0.01).double()
    per_anchor = S.fill_diagonal_(-torch.inf).logsumexp(1) - S[range(4), [1, 0, 3, 2]]
    assert (per_anchor[:2] < 1e-7).all()
    truth = per_anchor.mean().float()
    torch.testing.assert_close(ours.SupConLoss(0.01)(x, labels), truth)
    assert abs(theirs.SupConLoss(0.01)(x, labels) - 2 * truth) < 1e-3 * truth + 1e-5

    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])  # every positive at -100, every nearest negative at 100
    loss, peer = metric_losses("NTXentLoss", temperature=0.01)
    torch.testing.assert_close(loss(far, labels), torch.tensor(200.0))
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(peer(far, labels), -smallest.log())


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_prints_its_options(name):
    """Beside the names of the distance and the reducer, which the package prints."""
    ours, _ = both("pytorch_metric_learning")
    from pytorch_metric_learning import distances, regularizers

    temperature, reducer = {
        "SupConLoss": ("0.1", "reducer.low=0, reducer.high=None"),
        "NTXentLoss": ("0.07", ""),
    }[name]
    loss = getattr(ours, name)()
    reducer = reducer and f", {reducer}"
    assert loss.extra_repr() == (
        f"temperature={temperature}, embedding_reg_weight=1, collect_stats=False,"
        f" distance.normalize_embeddings=True, distance.p=2, distance.power=1{reducer}"
    )
    assert "(distance): CosineSimilarity()" in repr(loss)
    loss = getattr(ours, name)(
        distance=distances.LpDistance(power=2, normalize_embeddings=False),
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.3,
        temperature=torch.nn.Parameter(torch.tensor(0.5)),
    )
    for text in (
        *("temperature=tensor(0.5000)", "embedding_reg_weight=0.3", "(distance): LpDistance()"),
        *("distance.normalize_embeddings=False", "distance.power=2", "LpRegularizer"),
    ):
        assert text in repr(loss)


ON_RANKS = {
    f"{name}, efficient={efficient}": partial(pytorch_metric_learning_on_ranks, name, efficient)
    for name in METRIC_LOSSES
    for efficient in (False, True)
} | {
    f"{name}, memory": partial(pytorch_metric_learning_memory_on_ranks, name)
    for name in METRIC_LOSSES
}


def all_on_ranks():
    return processes.findings(ON_RANKS)


def test_on_two_ranks():
    both("pytorch_metric_learning")
    assert processes.run(all_on_ranks, 2, seconds=60) == [dict.fromkeys(ON_RANKS)] * 2
