"""The drop-ins against the packages they replace, values to fp32 rounding, and the paper's formula
where a peer leaves it. The tests of a package that is not installed are skipped:
requirements-peers.txt has a set that goes together."""

import functools
import importlib
import inspect
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.formulas import random_ids
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
def test_open_clip(bias):
    ours, theirs = (package.ClipLoss() for package in both("open_clip"))
    leaves = [*images_and_texts(), torch.tensor(14.0, requires_grad=True)]
    inputs = [*leaves, None if bias is None else torch.tensor(bias)]
    agree(ours(*inputs), theirs(*inputs), leaves)
    assert ours(*inputs, output_dict=True).keys() == theirs(*inputs, output_dict=True).keys()
    if bias:  # a gradient of 0 where theirs has one of rounding
        inputs[3].requires_grad_()
        grads = (torch.autograd.grad(loss(*inputs), inputs[3])[0] for loss in (ours, theirs))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [None, -10.0])
def test_open_clip_siglip(bias):
    ours, theirs = both("open_clip")
    x, y = images_and_texts()
    leaves = [x, y, torch.tensor(10.0, requires_grad=True)]
    bias = bias and torch.tensor(bias, requires_grad=True)
    wanted = leaves if bias is None else [*leaves, bias]
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        values = [x.SigLipLoss(dist_impl=dist_impl)(*leaves, bias) for x in (ours, theirs)]
        agree(*values, wanted)


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
    ours, theirs = both("open_clip")
    for name in ("ClipLoss", "SigLipLoss"):
        for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
            a, b = (
                {k: p.default for k, p in inspect.signature(function).parameters.items()}
                for function in (getattr(getattr(x, name), method) for x in (ours, theirs))
            )
            of_main = {"__init__": {"chunk_size": 0}, "forward": {"logit_bias": None}}
            assert a == b | (of_main.get(method, {}) if name == "SigLipLoss" else {})
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


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_options(name):
    both("pytorch_metric_learning")
    from pytorch_metric_learning import distances, reducers, regularizers

    own = {"SupConLoss": reducers.AvgNonZeroReducer, "NTXentLoss": reducers.MeanReducer}[name]
    x, labels = features(20, 8), random_ids(20, 4, 2)
    for options in (
        {"distance": None, "reducer": None, "collect_stats": False, "embedding_regularizer": None},
        {"distance": distances.CosineSimilarity(), "reducer": own()},
        {"distance": distances.DotProductSimilarity(), "temperature": 0.5},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 3},
        {"distance": distances.CosineSimilarity(p=1), "temperature": 0.5},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
        {"embedding_regularizer": regularizers.LpRegularizer(), "reducer": own()},
        {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
    ):
        ours, theirs = metric_losses(name, **options)
        leaves = [x, *ours.parameters()]
        agree(ours(x, labels), theirs(x, labels), leaves)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_says_what_it_cannot(name):
    ours, _ = both("pytorch_metric_learning")
    from pytorch_metric_learning import distances, reducers

    loss = getattr(ours, name)
    other = reducers.MeanReducer if name == "SupConLoss" else reducers.AvgNonZeroReducer
    for argument, values in {
        "reducer": [other(), reducers.SumReducer(), reducers.AvgNonZeroReducer(high=1.0), object()],
        "distance": [
            distances.LpDistance(),
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

    x, labels = features(20, 8), random_ids(20, 4, 2)
    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner(0.2)):
        pairs = miner(x, labels)
        agree(ours(x, labels, pairs), theirs(x, labels, pairs), [x])
        agree(ours(x, indices_tuple=pairs), theirs(x, indices_tuple=pairs), [x])


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_pytorch_metric_learning_without_positives(name):
    ours, theirs = metric_losses(name)
    x, labels = features(6, 4), torch.arange(6)
    loss = ours(x, labels)
    assert loss == theirs(x, labels) == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(6, 4))


def pytorch_metric_learning_on_ranks(name, efficient):
    losses = metric_losses(name)
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    everything, labels = torch.randn(20, 8, generator=g), random_ids(20, 4, 2)
    x = everything.chunk(size)[rank].requires_grad_()
    labels = labels.chunk(size)[rank]
    ours, theirs = (DistributedLossWrapper(loss, efficient=efficient) for loss in losses)
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


def lightly_on_ranks():
    ours, theirs = both("lightly")
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(6, 8, generator=g).requires_grad_() for _ in range(2))
    loss, peer = (p.NTXentLoss(0.2, gather_distributed=True)(x, y) for p in (ours, theirs))
    parts = peer.detach().clone()
    dist.all_reduce(parts)  # theirs are each of this rank's rows
    torch.testing.assert_close(loss, parts / size)
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
    """What the losses need of a SentenceTransformer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.EmbeddingBag(50, 24)

    def __getitem__(self, index):
        return self.table

    def forward(self, features):
        return {"sentence_embedding": self.table(features["input_ids"])}


def inputs(columns, n=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (n, 6), generator=g)} for _ in range(columns)]


def ranked(name, columns, seed=2, **options):
    """Of both packages the value and the gradient of one step."""
    found = []
    for package in both("sentence_transformers"):
        model = Encoder()
        loss = getattr(package, name)(model, **options)
        value = loss([dict(f) for f in inputs(columns, seed=seed)], None)
        value.backward()
        found.append((value.detach(), model.table.weight.grad, loss.get_config_dict()))
    return found


def assert_ranked_alike(*args, **options):
    (value, grad, config), (value2, grad2, config2) = ranked(*args, **options)
    torch.testing.assert_close(value, value2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, grad2, rtol=1e-3, atol=1e-6)
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


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
def test_sentence_transformers_says_what_it_cannot(name):
    ours, _ = both("sentence_transformers")
    hard = {"hardness_mode": "all_negatives", "hardness_strength": 5.0}
    with pytest.raises(NotImplementedError, match="hardness_mode"):
        getattr(ours, name)(Encoder(), **hard)
    late = getattr(ours, name)(Encoder())
    late.hardness_mode, late.hardness_strength = hard.values()
    with pytest.raises(NotImplementedError, match="hardness_mode"):
        late(inputs(2), None)


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
    },
    "lightly": {"both": lightly_on_ranks},
    "sentence_transformers": {
        f"{name}, {i}": partial(sentence_transformers_on_ranks, name, directions)
        for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
        for i, directions in enumerate(DIRECTIONS)
    },
}


def all_on_ranks(package):
    return processes.findings(ON_RANKS[package])


@pytest.mark.parametrize("package", ON_RANKS)
def test_on_two_ranks(package):
    both(package)
    expected = [dict.fromkeys(ON_RANKS[package])] * 2
    assert processes.run(all_on_ranks, 2, package, seconds=60) == expected
