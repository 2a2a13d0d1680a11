"""The metrics against loops that write the definitions out in fp64."""

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ito.scoring import metrics
from ito.scoring.metrics import (
    ensemble,
    mean_rank_variance,
    modality_gap,
    random_rank_variance,
    ranks,
    retrieval,
    zero_shot,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_items(text_item):
    """The pairs of item and text if each text is of one item."""
    return torch.stack([text_item, torch.arange(len(text_item))], 1)


def same(items):
    """The pairs if item n has text n."""
    return of_items(torch.arange(items))


def ranks_by_loops(queries, candidates, correct):
    """Wrong candidates before the first correct one, + 1, of the queries that have one."""
    found = []
    for n, q in enumerate(queries):
        scores = [float(F.cosine_similarity(q, c, dim=0)) for c in candidates]
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        right = [(n, j) in correct for j in order]
        if any(right):
            found.append(right.index(True) + 1)
    return found


def equal_and_several(n, m, items, seed):
    """Items of 0 to 3 of m texts, some of which others have too, and a caption given twice."""
    draw = torch.Generator().manual_seed(seed)
    owned = torch.rand(items, m, generator=draw) < 1.5 / m
    owned[0, 0] = True
    pairs = owned.nonzero()
    return torch.cat([pairs, pairs[:1]])[torch.randperm(len(pairs) + 1, generator=draw)]


# 3 rows a block: several blocks, the last one ragged
@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "m", "items"), [(1, 1, 1), (7, 5, 3), (23, 41, 9), (40, 8, 40)])
def test_retrieval_is_the_loops(n, m, items, shared, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    image, text = random(n, 6), random(m, 6, seed=1)
    image_item = torch.arange(n) % items
    pairs = equal_and_several(n, m, items, 3) if shared else of_items(torch.arange(m) % items)
    got = retrieval(image, text, image_item, pairs, ks=(1, 2, 5))
    has = {tuple(pair) for pair in pairs.tolist()}
    correct = {(p, t) for p in range(n) for t in range(m) if (int(image_item[p]), t) in has}
    both = {
        "i2t": (image, text, correct),
        "t2i": (text, image, {(t, p) for p, t in correct}),
    }
    for name, args in both.items():
        want = ranks_by_loops(*args)
        answerable = {q for q, _ in args[2]}
        for k in (1, 2, 5):
            assert got[f"{name}/R@{k}"] == sum(rank <= k for rank in want) / len(want), (name, k)
        assert got[f"{name}/mean_rank"] == pytest.approx(statistics.mean(want))
        assert got[f"{name}/median_rank"] == statistics.median(want)
        assert got[f"{name}/queries"] == len(want) == len(answerable)
        assert got[f"{name}/candidates"] == len(args[1])
        share = len(args[2]) / len(args[1]) / len(answerable)
        assert got[f"{name}/chance"] == pytest.approx(share)
        fewest = min(sum(q == other for other, _ in args[2]) for q in answerable)
        assert got[f"{name}/max_rank"] == len(args[1]) - fewest + 1


def test_chance_is_the_mean_share_of_correct_candidates():
    image_item, text_item = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0, 1])
    got = retrieval(random(3, 4), random(4, 4), image_item, of_items(text_item))
    assert got["i2t/chance"] == pytest.approx((3 / 4 + 1 / 4) / 2)  # item 2 has no text
    assert got["i2t/queries"] == 2
    assert got["t2i/chance"] == pytest.approx(1 / 3)


def test_a_text_that_several_items_have_is_right_for_each():
    """Two items with the caption 0, one of them with the caption 1 too."""
    image, text = torch.eye(2), torch.tensor([[0.9, 1.0], [1.0, 0.9]])
    got = retrieval(image, text, torch.arange(2), torch.tensor([[0, 0], [1, 0], [1, 1]]))
    assert got["i2t/R@1"] == 0.5  # the first is nearest to the caption 1, which it lacks
    assert got["t2i/R@1"] == 0.5  # and that to it; the caption 0 is right for both
    assert (got["t2i/queries"], got["t2i/candidates"], got["i2t/candidates"]) == (2, 2, 2)
    assert (got["i2t/chance"], got["t2i/chance"]) == (0.75, 0.75)


# --- the interval ---


def test_the_interval_is_the_bootstrap_over_items(monkeypatch):
    """Against resampling written out: all images and captions of a drawn item come with it."""
    monkeypatch.setattr(metrics, "RESAMPLES", 8000)
    items, image_item = 12, torch.arange(30) % 12
    pairs = equal_and_several(30, 20, items, 7)
    image, text = random(30, 4), random(20, 4, seed=1)
    got = retrieval(image, text, image_item, pairs)
    has = {tuple(pair) for pair in pairs.tolist()}
    correct = {(p, t) for p in range(30) for t in range(20) if (int(image_item[p]), t) in has}
    of_image, of_text = {item: [] for item, _ in has}, {item: [] for item, _ in has}
    answered = sorted({p for p, _ in correct})
    for p, rank in zip(answered, ranks_by_loops(image, text, correct), strict=True):
        of_image[int(image_item[p])].append((rank <= 5, 1))
    answered = sorted({t for _, t in correct})
    backward = ranks_by_loops(text, image, {(t, p) for p, t in correct})
    for t, rank in zip(answered, backward, strict=True):
        owners = [item for item, text in has if text == t]
        for item in owners:
            of_text[item].append(((rank <= 5) / len(owners), 1 / len(owners)))
    draw = np.random.default_rng(1)
    for name, of in (("i2t", of_image), ("t2i", of_text)):
        every = [query for own in of.values() for query in own]
        share = sum(h for h, _ in every) / sum(w for _, w in every)
        assert got[f"{name}/R@5"] == pytest.approx(share)
        found = []
        for _ in range(8000):
            drawn = draw.choice(list(of), len(of))
            queries = [query for item in drawn for query in of[item]]
            found.append(sum(h for h, _ in queries) / sum(w for _, w in queries))
        # below and above the ends are 2.5 % each, but for what is at them; of 8,000 draws each
        # of the two shares has a deviation of 0.17 %
        found, low, high = np.array(found), got[f"{name}/R@5/low"], got[f"{name}/R@5/high"]
        for outside, with_end in (
            (found < low - 1e-9, found < low + 1e-9),
            (found > high + 1e-9, found > high - 1e-9),
        ):
            assert outside.mean() < 0.032
            assert with_end.mean() > 0.018
        assert low < got[f"{name}/R@5"] < high


def test_the_interval_holds_the_share_19_times_in_20():
    """Of R@1 where half of the queries are right by chance: the interval of 200 data sets."""
    held = 0
    for seed in range(200):
        hit = torch.rand(100, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
        low, high = metrics.bootstrap(hit, same(100))
        held += bool(low <= 0.5 <= high)
    assert 0.9 * 200 <= held <= 0.98 * 200  # the deviation of the number is 3


def test_the_interval_of_all_or_no_right_answers_and_of_one_item():
    every = metrics.bootstrap(torch.tensor([[True, False]] * 7), torch.arange(14).view(7, 2) % 3)
    assert [x.tolist() for x in every] == [[1, 0], [1, 0]]
    alone = torch.stack([torch.arange(4), torch.zeros(4).long()], 1)
    one = metrics.bootstrap(torch.tensor([[True], [False], [False], [True]]), alone)
    assert [x.tolist() for x in one] == [[0.5], [0.5]]


# --- clip_benchmark ---


@pytest.mark.parametrize("block", [4, 1024])
def test_clip_benchmark_s_recall_is_its_definition(block, monkeypatch):
    """`recall@k > 0` of its zero-shot retrieval, with sets, in fp64: 1 to 5 captions each."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    owner = torch.tensor([n for n in range(17) for _ in range(1 + n % 5)])
    image, text, item = random(17, 8), random(len(owner), 8, seed=1), torch.arange(17)
    got = metrics.clip_benchmark_recall(image, text, item, owner)
    cosines = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    for k in (1, 5, 10):
        found = [row.argsort()[-k:].tolist() for row in cosines.numpy()]
        want = sum(int(n) in near for n, near in zip(owner, found, strict=True)) / len(owner)
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(want, abs=1e-7)
        found = [set(row.argsort()[-k:].tolist()) for row in cosines.numpy().T]
        own = [set((owner == n).nonzero()[:, 0].tolist()) for n in range(17)]
        want = sum(bool(a & b) for a, b in zip(own, found, strict=True)) / 17
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(want, abs=1e-7)
    ours = retrieval(image, text, item, of_items(owner))  # no caption is equal to another
    for k in (1, 5, 10):
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"t2i/R@{k}"], abs=1e-7)
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"i2t/R@{k}"], abs=1e-7)


def test_clip_benchmark_s_recall_counts_equal_captions_as_wrong():
    """Both captions say the same; only one of the two images is nearest to them."""
    image, text, item = torch.eye(2), torch.tensor([[1.0, 0.5], [1.0, 0.5]]), torch.arange(2)
    got = metrics.clip_benchmark_recall(image, text, item, item)
    assert got["image_retrieval_recall@1"] == 0.5
    assert got["image_retrieval_recall@10"] == got["text_retrieval_recall@10"] == 1
    assert retrieval(image, text[:1], item, torch.tensor([[0, 0], [1, 0]]))["t2i/R@1"] == 1


# --- chance, ties, bad input ---


@pytest.mark.parametrize("right", [1, 3])
def test_chance_is_what_random_embeddings_reach(right, monkeypatch):
    """Of R@1, of the mean rank, and of the rank's variance; `right` of 20 candidates are."""
    monkeypatch.setattr(metrics, "RESAMPLES", 1)
    item, text_item = torch.arange(20), torch.arange(20).repeat_interleave(right)
    texts, found = len(text_item), []
    for s in range(200):
        emb = random(20, 32, seed=s), random(texts, 32, seed=1000 + s)
        scores = retrieval(*emb, item, of_items(text_item))
        rank = ranks(*emb, of_items(text_item))[0].double()
        found.append((scores["i2t/R@1"], scores["i2t/mean_rank"], rank))
    recall, mean, rank = zip(*found, strict=True)
    # 4,000 queries: the standard deviations are 0.0034, 0.09 and, of the variance, 0.4
    assert statistics.mean(recall) == pytest.approx(scores["i2t/chance"], abs=0.014)
    assert scores["i2t/chance"] == pytest.approx(1 / 20)
    assert statistics.mean(mean) == pytest.approx(scores["i2t/mean_rank_chance"], rel=0.04)
    variance = torch.stack(rank, 1)  # as if 200 languages
    want = random_rank_variance(torch.full((20, 200), right), texts)
    assert mean_rank_variance(variance) == pytest.approx(want, rel=0.1)


def test_random_rank_variance_of_one_right_candidate_is_that_of_uniform_ranks():
    uniform = torch.arange(1, 10, dtype=torch.float64).var(correction=0)
    assert random_rank_variance(torch.ones(4, 5), 9) == pytest.approx(uniform * 4 / 5)


def test_random_rank_variance_of_languages_that_differ():
    """In number of candidates, and of correct ones where names are equal: against random orders."""
    correct, candidates = torch.tensor([[1, 3, 2], [2, 1, 1]]), torch.tensor([9, 12, 5])
    draw, found = np.random.default_rng(0), []
    for _ in range(4000):
        rank = [
            [
                1 + draw.permutation(m)[:c].min()
                for c, m in zip(row, candidates.tolist(), strict=True)
            ]
            for row in correct.tolist()
        ]
        found.append(np.var(rank, axis=1).mean())
    want = random_rank_variance(correct, candidates)
    assert np.mean(found) == pytest.approx(want, rel=0.05)  # the deviation is 1.3 %


def test_mean_rank_variance_is_the_formula():
    rank = torch.tensor([[1, 5, 3], [7, 7, 7]])
    mean = 3.0
    want = ((1 - mean) ** 2 + (5 - mean) ** 2 + (3 - mean) ** 2) / 3 / 2  # the second item: 0
    assert mean_rank_variance(rank) == pytest.approx(want)
    with pytest.raises(ValueError, match=r"rank must have shape \(N, K\), .* got \(3,\)"):
        mean_rank_variance(rank[0])


def test_ensemble_is_the_direction_of_the_mean_of_unit_prompts():
    prompts = random(3, 4, 5) * torch.tensor([1.0, 9.0, 0.1, 3.0])[:, None]
    for c, got in enumerate(ensemble(prompts)):
        mean = sum(p / math.sqrt(float(p @ p)) for p in prompts[c]) / 4
        torch.testing.assert_close(got.double(), mean / math.sqrt(float(mean @ mean)))


def test_a_collapsed_model_retrieves_nothing():
    point = torch.ones(300, 130)  # wide and ragged enough for the GEMM to round columns differently
    item = torch.arange(300)
    got = retrieval(point, point, item, same(300), ks=(1, 10, 299, 300))
    assert got["i2t/R@1"] == got["i2t/R@10"] == got["i2t/R@299"] == 0
    assert got["i2t/R@300"] == 1
    assert zero_shot(point, point[:5], item % 5)["top1"] == 0


def test_ties_are_lost_only_to_wrong_candidates():
    image = torch.tensor([[1.0, 0.0]])
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    first = torch.tensor([0])
    assert retrieval(image, twice, first, torch.tensor([[0, 0], [0, 1]]))["i2t/R@1"] == 1
    assert retrieval(image, twice, first, torch.tensor([[0, 0], [1, 1]]))["i2t/R@1"] == 0


def test_cosines_within_rounding_are_ties():
    """Of embeddings of other lengths, 1 − 2.2e-16 and 1 in fp64; but not 1 − 3e-9, which fp32
    cannot tell from 1: independent computations in fp64 find the same ranks."""
    image, item = torch.tensor([[0.3, 0.4]]), torch.tensor([0])
    for other, won in (([0.9, 1.2], 0), ([0.6001, 0.8], 1)):
        texts = torch.tensor([[0.6, 0.8], other])
        assert F.cosine_similarity(image, texts, dim=1)[1] > 1 - 1e-7
        assert retrieval(image, texts, item, same(2))["i2t/R@1"] == won


def test_nan_embeddings_score_nothing():
    item, nan = torch.arange(4), torch.full((4, 3), torch.nan)
    assert retrieval(nan, random(4, 3), item, same(4))["i2t/R@1"] == 0
    assert retrieval(random(4, 3), nan, item, same(4))["i2t/R@1"] == 0


def test_lengths_and_order_do_not_matter():
    image, text, item = random(9, 5), random(9, 5, seed=1), torch.arange(9)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 6, 5, 4])
    want = retrieval(image, text, item, same(9))
    assert retrieval(image * 7, text * 0.1, item, same(9)) == want
    assert retrieval(image[order], text, item[order], same(9)[order]) == want


@pytest.mark.parametrize(
    ("items", "pairs", "message"),
    [
        (torch.arange(2), same(3), r"image_item must have shape \(3,\), got \(2,\)"),
        (torch.arange(3), torch.arange(3), r"item_text must have shape \(P, 2\), got \(3,\)"),
        (torch.arange(3), same(4), r"item_text\[:, 1\] must be in \[0, 3\), got 0 to 3"),
        (torch.arange(3) + 3, same(3), "no query has a correct candidate"),
        (torch.arange(3), same(3)[:0], "no query has a correct candidate"),
    ],
)
def test_retrieval_names_bad_arguments(items, pairs, message):
    with pytest.raises(ValueError, match=message):
        retrieval(random(3, 2), random(3, 2), items, pairs)


def test_zero_shot():
    classes = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0], [0, 0.2, 0.8], [0.6, 0.5, 0], [0, 0.1, 0]])
    got = zero_shot(image, classes, torch.tensor([0, 2, 1, 1]))
    assert got["top1"] == 0.75
    assert got["chance"] == pytest.approx(1 / 3)
    assert got["majority"] == 0.5
    assert got["mean_per_class"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert got["top5"] == 1  # of three classes
    assert got["classes"] == 3
    for labels in ([0, 1, 2, 3], [0, 1, 2, -1]):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
            zero_shot(image, classes, torch.tensor(labels))


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 5, 3), (13, 7, 16)])
def test_modality_gap_is_the_formula(n, m, d):
    image, text = random(n, d) + 0.3, random(m, d, seed=1) * 5
    x = [v / math.sqrt(sum(v * v)) for v in image]
    y = [v / math.sqrt(sum(v * v)) for v in text]
    gap = math.sqrt(sum((sum(x) / n - sum(y) / m) ** 2))
    square = sum(float(((a - b) ** 2).sum()) for a in x for b in y) / (n * m)
    got = modality_gap(image, text)
    assert got["gap"] == pytest.approx(gap, abs=1e-6)
    assert got["relative"] == pytest.approx(gap / math.sqrt(square) if square else 0, abs=1e-6)


def test_relative_gap_ignores_contraction():
    """Shrinking both modalities towards one direction shrinks the gap, not the relative gap."""
    noise = F.normalize(random(200, 2, 8), dim=-1)
    offset = torch.zeros(2, 8, dtype=torch.float64)
    offset[0, 0], offset[1, 1] = 1.0, 1.0
    pole = torch.zeros(8, dtype=torch.float64)
    pole[2] = 20.0
    wide, narrow = noise + offset, noise + offset + pole
    before, after = modality_gap(*wide.unbind(1)), modality_gap(*narrow.unbind(1))
    assert after["gap"] < before["gap"] / 5
    assert after["relative"] == pytest.approx(before["relative"], rel=0.15)
    apart = modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert apart["relative"] == pytest.approx(1)
