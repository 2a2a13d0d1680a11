"""The drop-ins against the packages they replace, where those are installed; values to fp32
rounding, and the paper's formula where a peer leaves it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_losses import random_ids
from torch.nn.functional import normalize

import ito_kernels as ik


def agree(ours, theirs, leaves):
    """Two fp32 losses of the same leaves, to rounding, in value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def features(*shape):
    return torch.randn(*shape, requires_grad=True)


def load_alone(package: str, file: str):
    """A file of an installed package without the package's own imports (torchvision, timm)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{package}_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- open_clip


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0)])
def test_open_clip(bias):
    from ito_kernels.integrations.open_clip import ClipLoss

    theirs = load_alone("open_clip", "loss.py").ClipLoss()
    x, y = (normalize(torch.randn(33, 24), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    agree(ClipLoss()(x, y, scale, bias), theirs(x, y, scale, bias), [x, y, scale])
    named = ClipLoss()(x, y, scale, output_dict=True)
    assert named.keys() == theirs(x, y, scale, output_dict=True).keys()


def test_open_clip_siglip():
    from ito_kernels.integrations.open_clip import SigLipLoss

    theirs = load_alone("open_clip", "loss.py").SigLipLoss()
    x, y = (normalize(torch.randn(33, 24), dim=1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -10.0))
    agree(SigLipLoss()(x, y, scale, bias), theirs(x, y, scale, bias), [x, y, scale, bias])


# ---- pytorch-metric-learning


def peers():
    return pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
    )


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
@pytest.mark.parametrize("groups", [40, 8, 3])
@pytest.mark.parametrize("with_ref", [False, True])
def test_pytorch_metric_learning(name, groups, with_ref):
    """Its own style: labels, ref_emb; many positives, and anchors without any."""
    from ito_kernels.integrations import pytorch_metric_learning as ours

    x, labels = features(40, 24), random_ids(40, groups, 2)
    given, leaves = {}, [x]
    if with_ref:
        m = 40 if groups == 8 else 55  # also as many as embeddings: the pairs (i, i) stay in
        ref = features(m, 24)
        given = {"ref_emb": ref, "ref_labels": random_ids(m, groups, 3)}
        leaves.append(ref)
    for temperature in ({}, {"temperature": 0.3}):
        loss, peer = getattr(ours, name)(**temperature), getattr(peers(), name)(**temperature)
        agree(loss(x, labels, **given), peer(x, labels, **given), leaves)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pytorch_metric_learning_without_positives(name):
    from ito_kernels.integrations import pytorch_metric_learning as ours

    x, labels = features(6, 4), torch.arange(6)
    loss = getattr(ours, name)()(x, labels)
    assert loss == getattr(peers(), name)()(x, labels) == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(6, 4))


def test_where_pytorch_metric_learning_leaves_the_paper():
    """One label: SupCon, eq. 2, is positive, the peer returns 0. A loss that has underflowed: the
    peer takes the mean over the other anchors."""
    from ito_kernels.integrations.pytorch_metric_learning import SupConLoss

    x, same = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    S = (normalize(x, dim=1) @ normalize(x, dim=1).T / 0.1).fill_diagonal_(-torch.inf)
    others = ~torch.eye(5, dtype=torch.bool)
    truth = (S.logsumexp(1) - S[others].view(5, 4).mean(1)).mean()
    torch.testing.assert_close(SupConLoss()(x, same), truth)
    assert peers().SupConLoss()(x, same) == 0

    x = torch.eye(4)[[0, 0, 1, 2]] + torch.tensor([0, 0, 0, 0.5])[:, None] * torch.eye(4)[1]
    labels = torch.tensor([0, 0, 1, 1])
    S = (normalize(x, dim=1) @ normalize(x, dim=1).T / 0.01).double()
    per_anchor = S.fill_diagonal_(-torch.inf).logsumexp(1) - S[range(4), [1, 0, 3, 2]]
    assert (per_anchor[:2] < 1e-7).all()
    truth = per_anchor.mean().float()
    torch.testing.assert_close(SupConLoss(0.01)(x, labels), truth)
    assert abs(peers().SupConLoss(0.01)(x, labels) - 2 * truth) < 1e-3 * truth + 1e-5


def test_pytorch_metric_learning_says_what_it_cannot():
    from ito_kernels.integrations.pytorch_metric_learning import NTXentLoss

    x, labels = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(NotImplementedError, match="reducer"):
        NTXentLoss(0.1, reducer=object())
    with pytest.raises(NotImplementedError, match="indices_tuple"):
        NTXentLoss()(x, labels, (labels, labels, labels, labels))
    with pytest.raises(ValueError, match="labels are needed"):
        NTXentLoss()(x)
    with pytest.raises(ValueError, match="ref_labels is missing"):
        NTXentLoss()(x, labels, ref_emb=x)


# ---- lightly


@pytest.fixture
def lightly_loss(monkeypatch):
    """lightly's class; its package imports torchvision, which would replace the CPU build here."""
    if importlib.util.find_spec("torchvision"):
        return pytest.importorskip("lightly.loss", reason="lightly is not installed").NTXentLoss
    spec = importlib.util.find_spec("lightly")
    if spec is None:
        pytest.skip("lightly is not installed")
    for name in ("", ".loss", ".models", ".models.modules", ".utils", ".models.utils"):
        module = ModuleType(f"lightly{name}")
        path = Path(spec.submodule_search_locations[0], *name.split(".")[1:])
        module.__path__ = [str(path)] if name != ".models.utils" else []
        monkeypatch.setitem(sys.modules, f"lightly{name}", module)
    sys.modules["lightly.models"].utils = sys.modules["lightly.models.utils"]
    found = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss
    for name in [name for name in sys.modules if name.startswith("lightly.")]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return found


@pytest.mark.parametrize("temperature", [{}, {"temperature": 0.1}])
def test_lightly(lightly_loss, temperature):
    from ito_kernels.integrations.lightly import NTXentLoss

    x, y = features(33, 24), features(33, 24)
    agree(NTXentLoss(**temperature)(x, y), lightly_loss(**temperature)(x, y), [x, y])


def test_lightly_with_a_memory_bank(lightly_loss):
    """Over several batches, past the end of the bank, and without a gradient."""
    from ito_kernels.integrations.lightly import NTXentLoss

    torch.manual_seed(5)
    ours = NTXentLoss(0.2, memory_bank_size=(20, 8))
    torch.manual_seed(5)
    theirs = lightly_loss(0.2, memory_bank_size=(20, 8))
    for size in (7, 7, 7, 7, 20):
        x, y = features(size, 8), features(size, 8)
        agree(ours(x, y), theirs(x, y), [x, y])
    with torch.no_grad():
        for _ in range(2):
            x, y = torch.randn(7, 8), torch.randn(7, 8)
            torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert not ours.state_dict()


def test_lightly_says_what_it_cannot():
    from ito_kernels.integrations.lightly import NTXentLoss

    with pytest.raises(ValueError, match="memory_bank_size must be 0 or"):
        NTXentLoss(memory_bank_size=16)
    with pytest.raises(NotImplementedError, match="gather_distributed"):
        NTXentLoss(gather_distributed=True)


# ---- sentence-transformers


@pytest.fixture
def ranking():
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer import losses as theirs

    from ito_kernels.integrations import sentence_transformers as ours

    return ours, theirs


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


def inputs(columns, n=12):
    g = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 50, (n, 6), generator=g)} for _ in range(columns)]


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_sentence_transformers(ranking, directions, columns):
    """(anchor, positive) and with one or two columns of hard negatives."""
    from sentence_transformers.util import dot_score

    for more in ({}, {"similarity_fct": dot_score, "scale": 1.5}):
        model = Encoder()
        losses = [x.MultipleNegativesRankingLoss(model, **directions, **more) for x in ranking]
        values = [x([dict(f) for f in inputs(columns)], None) for x in losses]
        agree(*values, [model.table.weight])
        assert losses[0].get_config_dict() == losses[1].get_config_dict()


@pytest.mark.parametrize("columns", [2, 3])
def test_cached_sentence_transformers(ranking, columns):
    results = []
    for package in ranking:
        model = Encoder()
        loss = package.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
        value = loss([dict(f) for f in inputs(columns)], None)
        value.backward()
        results.append((value.detach(), model.table.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        model = Encoder()
        values = [
            x.CachedMultipleNegativesRankingLoss(model)(inputs(columns), None) for x in ranking
        ]
        torch.testing.assert_close(*values)


def test_sentence_transformers_default_is_mnrl(ranking):
    model = Encoder()
    loss = ranking[0].MultipleNegativesRankingLoss(model)(inputs(3), None)
    a, p, n = (model(f)["sentence_embedding"] for f in inputs(3))
    torch.testing.assert_close(loss, ik.mnrl_loss(a, p, n))


def test_sentence_transformers_says_what_it_cannot(ranking):
    model = Encoder()
    for options, message in (
        ({"similarity_fct": lambda a, b: a @ b.T}, "similarity_fct"),
        ({"hardness_mode": "all_negatives", "hardness_strength": 5.0}, "hardness_mode"),
        ({"gather_across_devices": True}, "gather_across_devices"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            ranking[0].MultipleNegativesRankingLoss(model, **options)(inputs(2), None)
