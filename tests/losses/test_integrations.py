"""The drop-ins against the packages they replace, values to fp32 rounding, and the paper's formula
where a peer leaves it. The tests of a package that is not installed are skipped:
requirements-peers.txt has a set that goes together."""

import functools
import importlib
import inspect
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.formulas import random_ids
from support.memory import linux, printed
from torch.nn.functional import normalize

import ito_kernels as ik

PACKAGES = {
    "open_clip": "open_clip.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "lightly": "lightly.loss",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
}


def both(package):
    """The module of the drop-ins, and theirs."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    ours = importlib.import_module(f"ito_kernels.integrations.{package}")
    return ours, importlib.import_module(PACKAGES[package])


def agree(ours, theirs, leaves):
    """Two fp32 losses of the same leaves, to rounding, in value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def features(*shape):
    return torch.randn(*shape, requires_grad=True)


# ---- open_clip


def images_and_texts(n=33, d=24):
    return [normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("shape", [(), (1,)])  # of the model's parameters
def test_open_clip(bias, shape):
    ours, theirs = (package.ClipLoss() for package in both("open_clip"))
    leaves = [*images_and_texts(), torch.full(shape, 14.0, requires_grad=True)]
    inputs = [*leaves, None if bias is None else torch.full(shape, bias)]
    agree(ours(*inputs), theirs(*inputs), leaves)
    assert ours(*inputs, output_dict=True).keys() == theirs(*inputs, output_dict=True).keys()
    if bias:  # a gradient of 0 where theirs has one of rounding
        inputs[3].requires_grad_()
        grads = (torch.autograd.grad(loss(*inputs), inputs[3])[0] for loss in (ours, theirs))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_open_clip_siglip(bias, shape):
    """chunk_size is of the main branch, not of the releases."""
    ours, theirs = both("open_clip")
    x, y = images_and_texts()
    leaves = [x, y, torch.full(shape, 10.0, requires_grad=True)]
    bias = bias and torch.full(shape, bias, requires_grad=True)
    wanted = leaves if bias is None else [*leaves, bias]
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        values = [x.SigLipLoss(dist_impl=dist_impl)(*leaves, bias) for x in (ours, theirs)]
        agree(*values, wanted)
    for flags in ({"chunk_size": 10}, {"cache_labels": True}):  # which change neither value
        agree(ours.SigLipLoss(**flags)(*leaves, bias), values[1], wanted)
        if flags.keys() <= inspect.signature(theirs.SigLipLoss).parameters.keys():
            agree(values[0], theirs.SigLipLoss(**flags)(*leaves, bias), wanted)


def rebuilt(name):
    """open_clip's subclass with our ClipLoss in place of theirs, from its own source."""
    ours, theirs = both("open_clip")
    names = {**vars(theirs), "ClipLoss": ours.ClipLoss}
    exec(inspect.getsource(getattr(theirs, name)), names)
    return names[name], getattr(theirs, name)


def distill_inputs():
    leaves = [*images_and_texts(), torch.tensor(14.0, requires_grad=True)]
    return leaves, [*leaves, *(x.detach() for x in images_and_texts(d=16)), torch.tensor(20.0)]


@pytest.mark.parametrize("flags", [{}, {"local_loss": True, "cache_labels": True}])
def test_open_clip_distill(flags):
    ours, theirs = (x(**flags) for x in rebuilt("DistillClipLoss"))
    leaves, inputs = distill_inputs()
    for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
        agree(a, b, leaves)


def test_open_clip_coca():
    ours, theirs = (x(2.0, 1.0, pad_id=0) for x in rebuilt("CoCaLoss"))
    leaves = [*images_and_texts(), torch.tensor(14.0, requires_grad=True), features(33, 7, 11)]
    x, y, scale, logits = leaves
    labels = torch.randint(11, (33, 7))
    values = [loss(x, y, logits, labels, scale) for loss in (ours, theirs)]
    agree(*(sum(x) for x in values), leaves)


def test_open_clip_signatures():
    """Those of the release and of the main branch, which differ in two arguments."""
    ours, theirs = both("open_clip")
    extra = {
        ("ClipLoss", "__init__"): {"use_horovod": False},
        ("SigLipLoss", "__init__"): {"chunk_size": 0},
        ("SigLipLoss", "forward"): {"logit_bias": None},  # theirs must be passed
    }
    for name in ("ClipLoss", "SigLipLoss"):
        for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
            a, b = (
                {k: p.default for k, p in inspect.signature(function).parameters.items()}
                for function in (getattr(getattr(x, name), method) for x in (ours, theirs))
            )
            assert a == b | extra.get((name, method), {})
        loss, peer = getattr(ours, name)(), getattr(theirs, name)()
        public = {k for k in vars(peer) if not k.startswith("_")} - {"training"}
        assert {k: getattr(loss, k) for k in public} == {k: getattr(peer, k) for k in public}


def open_clip_on_ranks():
    """Of open_clip's four ways to gather, those with gradients give ours after averaging. Without,
    and without local_loss, those of the features are 1/W of ours and that of the scale is the same:
    what docs/losses.md says about learning rates."""
    ours, theirs = both("open_clip")
    rank, size = dist.get_rank(), dist.get_world_size()
    where = {"rank": rank, "world_size": size}
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 8, 5, generator=g)
    x, y = torch.randn(2, 12, 8, generator=g).chunk(size, dim=1)[rank]

    def step(loss):
        towers = weight.clone().requires_grad_()
        scale = torch.tensor(5.0, requires_grad=True)
        value = loss(normalize(x @ towers[0], dim=1), normalize(y @ towers[1], dim=1), scale)
        value.backward()
        found = value.detach(), towers.grad, scale.grad
        for z in found:
            dist.all_reduce(z)
        return [z / size for z in found]

    truth = step(ours.ClipLoss(**where))
    for flags in ({"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}):
        torch.testing.assert_close(step(theirs.ClipLoss(**flags, **where)), truth)
    value, of_towers, of_scale = step(theirs.ClipLoss(**where))
    torch.testing.assert_close([value, size * of_towers, of_scale], truth)
    _, of_towers, _ = step(theirs.ClipLoss(local_loss=True, **where))
    assert (of_towers - truth[1]).abs().max() > 0.02 * truth[1].abs().max()  # another gradient

    def siglip(package, **options):
        loss = package.SigLipLoss(**options, **where)
        return step(lambda x, y, scale: loss(x, y, scale, -3.0))

    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        torch.testing.assert_close(siglip(theirs, dist_impl=dist_impl), siglip(ours))


def open_clip_distill_on_ranks():
    """Values are theirs, gradients theirs with gather_with_grad."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaves, inputs = distill_inputs()
    for local_loss in (False, True):
        flags = {"local_loss": local_loss, "rank": rank, "world_size": size}
        ours, theirs = (x(gather_with_grad=True, **flags) for x in rebuilt("DistillClipLoss"))
        for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
            agree(a, b, leaves)


# ---- pytorch-metric-learning

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


# ---- lightly


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.1},
        {"memory_bank_size": (0, 24)},
        {"gather_distributed": True},  # of one process: theirs
        {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
    ],
)
def test_lightly(options):
    ours, theirs = (package.NTXentLoss(**options) for package in both("lightly"))
    x, y = features(33, 24), features(33, 24)
    agree(ours(x, y), theirs(x, y), [x, y, *ours.parameters()])


@pytest.mark.parametrize("gather", [False, True])
def test_lightly_with_a_memory_bank(gather):
    """Over several batches, past the end of the bank, and without a gradient."""
    ours, theirs = both("lightly")
    options = {"memory_bank_size": (20, 8), "gather_distributed": gather}
    torch.manual_seed(5)
    ours = ours.NTXentLoss(0.2, **options)
    torch.manual_seed(5)
    theirs = theirs.NTXentLoss(0.2, **options)
    for size in (7, 7, 7, 7, 20):
        x, y = features(size, 8), features(size, 8)
        agree(ours(x, y), theirs(x, y), [x, y])
    with torch.no_grad():
        for _ in range(2):
            x, y = torch.randn(7, 8), torch.randn(7, 8)
            torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert not ours.state_dict()


DCL_OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
    {"gather_distributed": True},  # of one process: theirs
]
OF_DCL = [
    *(("DCLLoss", options) for options in DCL_OPTIONS),
    ("DCLLoss", {"weight_fn": lambda x, y: (x - y).square().sum(1)}),  # it has a gradient
    ("DCLLoss", {"weight_fn": lambda x, y: x[:, 0].detach(), "temperature": 0.2}),  # not symmetric
    *(("DCLWLoss", options) for options in DCL_OPTIONS),
    ("DCLWLoss", {"sigma": 0.2, "temperature": 0.2}),
]
# lightly makes a tensor of a tensor
quiet = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


@quiet
@pytest.mark.parametrize(("name", "options"), OF_DCL)
def test_lightly_decoupled(name, options):
    ours, theirs = (getattr(package, name)(**options) for package in both("lightly"))
    for size in (33, 2):
        x, y = features(size, 24), features(size, 24)
        agree(ours(x, y), theirs(x, y), [x, y, *ours.parameters()])


def test_decoupled_contrastive_loss_of_two_views_is_lightly_s():
    _, theirs = both("lightly")
    x, y = features(33, 24), features(33, 24)
    z, ids = torch.cat([normalize(x, dim=1), normalize(y, dim=1)]), torch.arange(33).repeat(2)
    options = {"query_ids": ids, "key_ids": ids, "exclude_self": True, "symmetric": False}
    loss = ik.decoupled_contrastive_loss(z, z, 1 / 0.3, **options)
    agree(loss, theirs.DCLLoss(0.3)(x, y), [x, y])


def test_lightly_signatures():
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        a, b = (
            {k: p.default for k, p in inspect.signature(getattr(x, name)).parameters.items()}
            for x in both("lightly")
        )
        assert a == b


def lightly_on_ranks():
    ours, theirs = both("lightly")
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(6, 8, generator=g).requires_grad_() for _ in range(2))
    for name, options in (
        ("NTXentLoss", {}),
        ("DCLLoss", {}),
        ("DCLLoss", {"weight_fn": lambda x, y: (x - y).square().sum(1)}),
        ("DCLWLoss", {"sigma": 0.3}),
    ):
        for gather in (True, False):
            loss, peer = (
                getattr(p, name)(0.2, gather_distributed=gather, **options)(x, y)
                for p in (ours, theirs)
            )
            parts = peer.detach().clone()
            if gather:
                dist.all_reduce(parts)  # theirs are each of this rank's rows
                parts /= size
            torch.testing.assert_close(loss, parts)
            grads = [torch.autograd.grad(z, (x, y)) for z in (loss, peer)]
            torch.testing.assert_close(*grads)

    options = {"memory_bank_size": (20, 8), "gather_distributed": True}
    torch.manual_seed(5)
    ours = ours.NTXentLoss(0.2, **options)
    torch.manual_seed(5)
    theirs = theirs.NTXentLoss(0.2, **options)
    for _ in range(4):
        x, y = (torch.randn(6, 8, generator=g).requires_grad_() for _ in range(2))
        agree(ours(x, y), theirs(x, y), [x, y])


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9, torch.tensor(0.0)])
def test_lightly_refuses_at_construction(temperature):
    for package in both("lightly"):
        with pytest.raises(ValueError, match="temperature"):
            package.NTXentLoss(temperature)


# ---- sentence-transformers

DIRECTIONS = [
    {},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
]


class Encoder(torch.nn.Module):
    """What the losses need of a SentenceTransformer. seed: of its weights."""

    max_seq_length, device = 6, torch.device("cpu")

    def __init__(self, seed=1, words=None):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.EmbeddingBag(50, 24)
        if words is not None:
            self.tokenizer = tokenizer(words)

    def __getitem__(self, index):
        return self.table

    def preprocess(self, texts):
        return {"input_ids": torch.tensor(self.tokenizer(texts)["input_ids"])}

    def forward(self, features):
        ids = features["input_ids"]
        if "cu_seq_lens_q" in features:
            embedding = self.table(ids[0], features["cu_seq_lens_q"][:-1])
        else:
            embedding = self.table(ids)
        features["sentence_embedding"] = embedding
        return features


def tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def inputs(columns, n=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (n, 6), generator=g)} for _ in range(columns)]


def in_one_row(column):
    """The texts of a column one after the other, without padding."""
    ids = column["input_ids"]
    starts = torch.arange(0, ids.numel() + 1, ids.shape[1])
    return {"input_ids": ids.reshape(1, -1), "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}


def twice(column):
    """The second half of the texts are those of the first."""
    return {"input_ids": column["input_ids"][:6].repeat(2, 1)}


WORDS = [f"w{i}" for i in range(50)]


def ranked(name, columns, seed=2, guide_words=None, layout=dict, **options):
    """Of both packages the value and the gradient of one step. guide_words: the vocabulary of a
    guide, for the losses that have one."""
    found = []
    for package in both("sentence_transformers"):
        model, guide = Encoder(words=WORDS), ()
        if guide_words is not None:
            guide = (Encoder(seed=5, words=guide_words),)
        loss = getattr(package, name)(model, *guide, **options)
        value = loss([layout(f) for f in inputs(columns, seed=seed)], None)
        value.backward()
        found.append((value.detach(), model.table.weight.grad, loss.get_config_dict()))
    return found


def assert_ranked_alike(*args, **options):
    (value, grad, config), (value2, grad2, config2) = ranked(*args, **options)
    torch.testing.assert_close(value, value2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, grad2, rtol=1e-3, atol=1e-6 * grad2.abs().max().item())
    assert config.pop("guide", None).__class__ is config2.pop("guide", None).__class__
    assert config == config2


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_sentence_transformers(directions, columns):
    """(anchor, positive) and with one or two columns of hard negatives."""
    both("sentence_transformers")
    from sentence_transformers.util import dot_score

    for more in (
        {},
        {"similarity_fct": dot_score, "scale": 1.5},
        {"gather_across_devices": True},  # of one process: theirs
        {"hardness_mode": "all_negatives"},  # of strength 0
    ):
        assert_ranked_alike("MultipleNegativesRankingLoss", columns, **directions, **more)


@pytest.mark.parametrize("columns", [2, 3])
def test_cached_sentence_transformers(columns):
    name, packages = "CachedMultipleNegativesRankingLoss", both("sentence_transformers")
    for gather in (False, True):
        assert_ranked_alike(name, columns, mini_batch_size=5, gather_across_devices=gather)
    with torch.no_grad():
        model = Encoder()
        values = [getattr(x, name)(model)(inputs(columns), None) for x in packages]
        torch.testing.assert_close(*values)


def test_sentence_transformers_similarities():
    """Recognised by what they give, whoever wraps them."""
    ours, _ = both("sentence_transformers")
    from sentence_transformers import util

    def cosine(a, b, eps=0.0):
        return util.normalize_embeddings(a) @ util.normalize_embeddings(b).T + eps

    name = "MultipleNegativesRankingLoss"
    for similarity in (
        lambda a, b: util.cos_sim(a, b),
        functools.partial(cosine, eps=0.0),
        functools.partial(util.dot_score),
        lambda a, b: a @ b.T,
        lambda a, b: util.cos_sim(b, a).T,
        util.SimilarityFunction.to_similarity_fn("cosine"),
    ):
        for options in ({}, *DIRECTIONS[1:]):
            assert_ranked_alike(name, 3, similarity_fct=similarity, scale=2.0, **options)
    for similarity in (
        util.euclidean_sim,
        util.pairwise_cos_sim,
        lambda a, b: 2 * util.cos_sim(a, b),
        lambda a, b: util.cos_sim(a, b).abs(),
        lambda a, b: util.cos_sim(a[:, :16], b[:, :16]),  # of the 24 features there are
        lambda a, b: util.cos_sim(b, a),
        functools.partial(cosine, eps=1e-3),
        lambda a, b: a.half() @ b.half().T,
    ):
        loss = ours.MultipleNegativesRankingLoss(Encoder(), similarity_fct=similarity)
        state = torch.random.get_rng_state()
        with pytest.raises(NotImplementedError, match="similarity_fct must be cos_sim or dot"):
            loss.compute_loss_from_embeddings([torch.ones(3, 24), torch.ones(3, 24)], None)
        assert torch.equal(torch.random.get_rng_state(), state)


def sentence_transformers_on_ranks(name, directions):
    for columns in (2, 3):
        options = {"gather_across_devices": True, **directions}
        if name.startswith("Cached"):
            options["mini_batch_size"] = 5
        assert_ranked_alike(name, columns, seed=dist.get_rank(), **options)


def test_sentence_transformers_default_is_mnrl():
    ours, _ = both("sentence_transformers")
    model = Encoder()
    loss = ours.MultipleNegativesRankingLoss(model)(inputs(3), None)
    a, p, n = (model(f)["sentence_embedding"] for f in inputs(3))
    torch.testing.assert_close(loss, ik.mnrl_loss(a, p, n))


RANKING = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
HARDNESS = ["in_batch_negatives", "hard_negatives", "all_negatives"]


@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_sentence_transformers_hardness(directions, mode):
    """Without negatives in the batch "hard_negatives" does nothing, as theirs."""
    both("sentence_transformers")
    from sentence_transformers.util import dot_score

    hardness = {"hardness_mode": mode, "hardness_strength": 5.0}
    for name, columns in product(RANKING, (2, 3, 4)):
        for more in ({}, {"similarity_fct": dot_score, "scale": 1.5}):
            assert_ranked_alike(name, columns, **directions, **hardness, **more)


def test_sentence_transformers_options_set_later():
    ours, theirs = both("sentence_transformers")
    for name in RANKING:
        values = []
        for package in (ours, theirs):
            loss = getattr(package, name)(Encoder())
            loss.hardness_mode, loss.hardness_strength, loss.scale = "all_negatives", 5.0, 3.0
            loss.directions = ("query_to_doc", "query_to_query")
            values.append(loss(inputs(3), None))
        torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    "name",
    ["MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers_symmetric(name):
    for columns, scale in product((2, 3), (20.0, 5.0)):
        assert_ranked_alike(name, columns, scale=scale)
    ours, theirs = (
        inspect.signature(getattr(x, name).__init__) for x in both("sentence_transformers")
    )
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


GUIDED = ["GISTEmbedLoss", "CachedGISTEmbedLoss"]
CONTRASTS = [
    {"contrast_anchors": a, "contrast_positives": p} for a in (True, False) for p in (True, False)
]


@pytest.mark.parametrize("words", [WORDS, WORDS[::-1]], ids=["one tokenizer", "two"])
@pytest.mark.parametrize("name", GUIDED)
def test_sentence_transformers_gist(name, words):
    cached = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    for columns, margin, contrasts in product(
        (2, 3, 4) if cached else (2, 3),
        ((0.0, "absolute"), (0.1, "absolute"), (-0.1, "absolute"), (0.3, "relative")),
        CONTRASTS,
    ):
        options = {"margin": margin[0], "margin_strategy": margin[1], "temperature": 0.2}
        layout = (dict, in_one_row, twice, dict)[CONTRASTS.index(contrasts)]
        assert_ranked_alike(
            name, columns, guide_words=words, layout=layout, **options, **contrasts, **cached
        )
    if not cached:
        for package in both("sentence_transformers"):
            loss = package.GISTEmbedLoss(Encoder(words=WORDS), Encoder(words=words))
            with pytest.raises(ValueError, match="Expected 2 or 3 embeddings, got 4"):
                loss(inputs(4), None)


def test_sentence_transformers_print_their_settings():
    ours, _ = both("sentence_transformers")
    loss = ours.MultipleNegativesRankingLoss(Encoder(), hardness_mode="all_negatives")
    assert "scale=20.0" in repr(loss)
    assert "hardness_mode='all_negatives'" in repr(loss)
    loss = ours.CachedGISTEmbedLoss(Encoder(words=WORDS), Encoder(words=WORDS), margin=0.1)
    assert "margin=0.1" in loss.extra_repr()
    assert "guide" not in loss.extra_repr()


def test_sentence_transformers_gist_of_a_text_with_itself():
    """Where the guide takes anchor and positive for equal, a text is no candidate of itself."""
    ours, _ = both("sentence_transformers")
    model, guide = Encoder(words=WORDS), Encoder(seed=5, words=WORDS)
    (column,) = inputs(1)
    loss = ours.GISTEmbedLoss(model, guide, temperature=0.5)
    x, e = (normalize(m(dict(column))["sentence_embedding"]) for m in (model, guide))
    assert (e @ e.T).fill_diagonal_(0).max() < 0.999  # all candidates stay
    S = 2 * x @ x.T
    others = S[~torch.eye(12, dtype=torch.bool)].view(12, 11)
    truth = (torch.cat([S, others, others], 1).logsumexp(1) - S.diagonal()).mean()
    torch.testing.assert_close(loss([dict(column), dict(column)], None), truth)


def gist_on_ranks(name):
    options = {"gather_across_devices": True, "temperature": 0.2, "guide_words": WORDS}
    if name.startswith("Cached"):
        options["mini_batch_size"] = 5
    for columns, contrasts in product((2, 3), CONTRASTS):
        assert_ranked_alike(name, columns, seed=dist.get_rank(), **options, **contrasts)


# ---- on two ranks

ON_RANKS = {
    "open_clip": {
        "losses": open_clip_on_ranks,
        "distill": open_clip_distill_on_ranks,
    },
    "pytorch_metric_learning": {
        f"{name}, efficient={efficient}": partial(pytorch_metric_learning_on_ranks, name, efficient)
        for name in METRIC_LOSSES
        for efficient in (False, True)
    }
    | {
        f"{name}, memory": partial(pytorch_metric_learning_memory_on_ranks, name)
        for name in METRIC_LOSSES
    },
    "lightly": {"both": lightly_on_ranks},
    "sentence_transformers": {
        f"{name}, {i}": partial(sentence_transformers_on_ranks, name, directions)
        for name in RANKING
        for i, directions in enumerate(
            [
                *DIRECTIONS,
                *({"hardness_mode": mode, "hardness_strength": 5.0} for mode in HARDNESS),
            ]
        )
    }
    | {name: partial(gist_on_ranks, name) for name in GUIDED},
}


def all_on_ranks(package):
    return processes.findings(ON_RANKS[package])


@pytest.mark.parametrize("package", ON_RANKS)
def test_on_two_ranks(package):
    both(package)
    expected = [dict.fromkeys(ON_RANKS[package])] * 2
    assert processes.run(all_on_ranks, 2, package, seconds=60) == expected
