"""The drop-ins for sentence-transformers against the package, values to fp32 rounding. Skipped
where it is not installed: requirements-peers.txt has versions that go together."""

import functools
import inspect
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.drop_ins import both
from torch.nn.functional import normalize

import ito_kernels as ik

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


ON_RANKS = {
    f"{name}, {i}": partial(sentence_transformers_on_ranks, name, directions)
    for name in RANKING
    for i, directions in enumerate(
        [
            *DIRECTIONS,
            *({"hardness_mode": mode, "hardness_strength": 5.0} for mode in HARDNESS),
        ]
    )
} | {name: partial(gist_on_ranks, name) for name in GUIDED}


def all_on_ranks():
    return processes.findings(ON_RANKS)


def test_on_two_ranks():
    both("sentence_transformers")
    assert processes.run(all_on_ranks, 2, seconds=60) == [dict.fromkeys(ON_RANKS)] * 2
