"""The classifiers on frozen embeddings against their definitions written out in fp64."""

import math

import pytest
import torch

from ito.scoring import probes
from ito.scoring.probes import fit, knn, linear_probe, modality_classifier, place_in_class


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("start", [None, (random(3, 4), random(3))])
def test_the_fit_is_the_minimum(start):
    """The gradient, written out, is zero there; the loss is convex."""
    x, y, penalty = random(30, 4), torch.arange(30) % 3, 0.01
    weight, bias = fit(x, y, 3, penalty, start)
    p = torch.stack([torch.exp(weight @ row + bias) for row in x])
    p = p / p.sum(1, keepdim=True)
    error = p - torch.eye(3, dtype=torch.float64)[y]
    assert (error.T @ x / 30).abs().max() > 2e-3  # the penalty's share
    assert (error.T @ x / 30 + penalty * weight).abs().max() < 5e-4
    assert error.mean(0).abs().max() < 5e-4


def test_linear_probe_finds_what_is_linear_and_only_that():
    labels = torch.arange(120) % 4
    centres = 3 * random(4, 16, seed=3)
    train = centres[labels] + random(120, 16)
    test = centres[labels] + random(120, 16, seed=1)
    got = linear_probe(train, labels * 10, test, labels * 10)  # labels need not be 0 ... C-1
    assert got["top1"] > 0.95
    assert (got["classes"], got["train"], got["test"], got["chance"]) == (4, 120, 120, 0.25)
    assert got["mean_per_class"] == pytest.approx(got["top1"])  # equal classes
    noise = linear_probe(random(120, 16), labels, random(120, 16, seed=1), labels)
    assert noise["top1"] < 0.5
    assert noise["top5"] == 1


def test_the_penalty_is_the_best_on_pictures_held_out_of_the_training_ones(monkeypatch):
    """Under the strongest one all that is left is the bias, for the larger class."""
    y = (torch.arange(200) % 5 == 0).long()
    clean = random(200, 20)
    clean[:, 0] = 2.0 * y - 1
    monkeypatch.setattr(probes, "PENALTIES", (1e4, 1e3, 1e-3))
    got = linear_probe(clean, y, clean, y)
    assert got["penalty"] == 1e-3
    assert got["top1"] == 1
    one_each = linear_probe(random(5, 8), torch.arange(5), random(5, 8), torch.arange(5))
    assert one_each["penalty"] == 1e3  # the middle


def test_labels_of_one_side_do_not_count():
    emb = random(6, 5)
    train, test = torch.tensor([0, 0, 1, 1, 7, 7]), torch.tensor([0, 1, 1, 9, 9, 9])
    for probe in (linear_probe, knn):
        got = probe(emb, train, emb, test)
        assert (got["classes"], got["train"], got["test"]) == (2, 4, 3)
        with pytest.raises(ValueError, match="at least 2 labels that occur in both sets, got 1"):
            probe(emb, train, emb, torch.tensor([0, 9, 9, 9, 9, 9]))
        with pytest.raises(ValueError, match=r"test_labels must have shape \(6,\), got \(5,\)"):
            probe(emb, train, emb, test[:5])


@pytest.mark.parametrize("k", [1, 4, 50])
def test_knn_is_the_loops(k):
    x, y = random(23, 6), torch.arange(23) % 3
    queries, labels = random(11, 6, seed=1), torch.arange(11) % 3
    right = 0
    for q, label in zip(queries, labels.tolist(), strict=True):
        cos = [float(q @ row / q.norm() / row.norm()) for row in x]
        near = sorted(range(23), key=lambda i: -cos[i])[:k]
        votes = [sum(math.exp(cos[i] / 0.5) for i in near if y[i] == c) for c in range(3)]
        right += votes.index(max(votes)) == label
    got = knn(x, y, queries, labels, k=k, temperature=0.5)
    assert got["top1"] == pytest.approx(right / 11)
    assert got["k"] == min(k, 23)


def test_modality_classifier():
    def classify(images, texts):
        return modality_classifier(
            images, texts, torch.arange(len(images)), torch.arange(len(texts))
        )

    cloud = random(400, 8)
    apart = classify(cloud[:200] + 3, cloud[200:] - 3)
    assert apart == {"classifier": 1.0, "classifier_chance": 0.5}
    # 300 scored rows of chance 1/2: the standard deviation is at most 0.04
    mixed = classify(cloud[:300], random(300, 8, seed=5))["classifier"]
    assert mixed == pytest.approx(0.5, abs=0.13)
    # 16 rows of 64 numbers are told apart by heart: only the others count
    wide = classify(random(16, 64), random(16, 64, seed=5))["classifier"]
    assert wide < 0.9
    # all that one side says is its size: it must not pay
    many = torch.arange(300) % 30
    uneven = modality_classifier(cloud[:300], random(30, 8, seed=5), many, torch.arange(30))
    assert uneven["classifier"] == pytest.approx(0.5, abs=0.2)
    with pytest.raises(ValueError, match="need at least 2 items of both modalities, got 1"):
        classify(cloud, cloud[:1])


def test_modality_classifier_is_scored_on_other_items():
    """Six rows of each of 40 items and modalities, which say nothing but which of them they are."""
    item = torch.arange(240) // 6  # so that every other row would split each item
    images, texts = (
        random(40, 64, seed=seed)[item] + 0.01 * random(240, 64, seed=seed + 1) for seed in (5, 7)
    )
    by_item = modality_classifier(images, texts, item, item)["classifier"]
    assert by_item == pytest.approx(0.5, abs=0.2)  # by rows 1.0


def test_place_in_class():
    labels = torch.tensor([2, 0, 2, 2, 5, 0])
    assert place_in_class(labels).tolist() == [0, 0, 1, 2, 0, 1]
