"""The metrics against loops that write the definitions out in fp64."""

import math
import statistics

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


def ranks_by_loops(queries, candidates, query_item, candidate_item):
    """Wrong candidates before the first correct one, + 1, of the queries that have one."""
    found = []
    for q, item in zip(queries, query_item.tolist(), strict=True):
        scores = [float(F.cosine_similarity(q, c, dim=0)) for c in candidates]
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        right = [int(candidate_item[j]) == item for j in order]
        if any(right):
            found.append(right.index(True) + 1)
    return found


# 3 rows a block: several blocks, the last one ragged
@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize(("n", "m", "items"), [(1, 1, 1), (7, 5, 3), (23, 41, 9), (40, 8, 40)])
def test_retrieval_is_the_loops(n, m, items, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    image, text = random(n, 6), random(m, 6, seed=1)
    image_item, text_item = torch.arange(n) % items, torch.arange(m) % items
    got = retrieval(image, text, image_item, text_item, ks=(1, 2, 5))
    both = {
        "i2t": (image, text, image_item, text_item),
        "t2i": (text, image, text_item, image_item),
    }
    for name, args in both.items():
        want = ranks_by_loops(*args)
        for k in (1, 2, 5):
            recall = sum(rank <= k for rank in want) / len(want)
            assert got[f"{name}/R@{k}"] == pytest.approx(recall, abs=1e-6), (name, k)
        assert got[f"{name}/mean_rank"] == pytest.approx(statistics.mean(want))
        assert got[f"{name}/median_rank"] == statistics.median(want)
        assert got[f"{name}/queries"] == len(want)
        assert got[f"{name}/candidates"] == len(args[1])


def test_chance_is_the_mean_share_of_correct_candidates():
    image_item, text_item = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0, 1])
    got = retrieval(random(3, 4), random(4, 4), image_item, text_item)
    assert got["i2t/chance"] == pytest.approx((3 / 4 + 1 / 4) / 2)  # item 2 has no text
    assert got["i2t/queries"] == 2
    assert got["t2i/chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("right", [1, 3])
def test_chance_is_what_random_embeddings_reach(right):
    """Of R@1, of the mean rank, and of the rank's variance; `right` of 20 candidates are."""
    item, text_item = torch.arange(20), torch.arange(20).repeat_interleave(right)
    texts, found = len(text_item), []
    for s in range(200):
        emb = random(20, 32, seed=s), random(texts, 32, seed=1000 + s)
        scores = retrieval(*emb, item, text_item)
        rank = ranks(*emb, item, text_item)[0].double()
        found.append((scores["i2t/R@1"], scores["i2t/mean_rank"], rank))
    recall, mean, rank = zip(*found, strict=True)
    # 4,000 queries: the standard deviations are 0.0034, 0.09 and, of the variance, 0.4
    assert statistics.mean(recall) == pytest.approx(scores["i2t/chance"], abs=0.014)
    assert scores["i2t/chance"] == pytest.approx(1 / 20)
    assert statistics.mean(mean) == pytest.approx(scores["i2t/mean_rank_chance"], rel=0.04)
    variance = torch.stack(rank, 1)  # as if 200 languages
    want = random_rank_variance(torch.full((20,), right), texts, 200)
    assert mean_rank_variance(variance) == pytest.approx(want, rel=0.1)


def test_random_rank_variance_of_one_right_candidate_is_that_of_uniform_ranks():
    uniform = torch.arange(1, 10, dtype=torch.float64).var(correction=0)
    assert random_rank_variance(torch.ones(4), 9, 5) == pytest.approx(uniform * 4 / 5)


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
    got = retrieval(point, point, item, item, ks=(1, 10, 299, 300))
    assert got["i2t/R@1"] == got["i2t/R@10"] == got["i2t/R@299"] == 0
    assert got["i2t/R@300"] == 1
    assert zero_shot(point, point[:5], item % 5)["top1"] == 0


def test_ties_are_lost_only_to_wrong_candidates():
    image = torch.tensor([[1.0, 0.0]])
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    first = torch.tensor([0])
    assert retrieval(image, twice, first, torch.tensor([0, 0]))["i2t/R@1"] == 1
    assert retrieval(image, twice, first, torch.tensor([0, 1]))["i2t/R@1"] == 0


def test_cosines_within_rounding_are_ties():
    """1 − 2.4e-7 is below 1 in fp32, and may be above it in another GEMM; 1 − 4.5e-6 may not."""
    image, item = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    for offset, won in ((6.9e-4, 0), (3e-3, 1)):
        texts = torch.tensor([[1.0, 0.0], [1.0, offset]])
        assert F.normalize(texts, dim=1)[1, 0] < 1
        assert retrieval(image, texts, item, torch.tensor([0, 1]))["i2t/R@1"] == won


def test_nan_embeddings_score_nothing():
    item, nan = torch.arange(4), torch.full((4, 3), torch.nan)
    assert retrieval(nan, random(4, 3), item, item)["i2t/R@1"] == 0
    assert retrieval(random(4, 3), nan, item, item)["i2t/R@1"] == 0


def test_lengths_and_order_do_not_matter():
    image, text, item = random(9, 5), random(9, 5, seed=1), torch.arange(9)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 6, 5, 4])
    want = retrieval(image, text, item, item)
    assert retrieval(image * 7, text * 0.1, item, item) == want
    assert retrieval(image[order], text, item[order], item) == want


def test_retrieval_names_bad_arguments():
    with pytest.raises(ValueError, match=r"image_item must have shape \(3,\), got \(2,\)"):
        retrieval(random(3, 2), random(3, 2), torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"text_item must have shape \(3,\), got \(3, 1\)"):
        retrieval(random(3, 2), random(3, 2), torch.arange(3), torch.arange(3)[:, None])
    with pytest.raises(ValueError, match="share no id"):
        retrieval(random(3, 2), random(3, 2), torch.arange(3), torch.arange(3) + 3)


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
