"""Retrieval, zero-shot accuracy, modality gap and others, as pure functions of embeddings.

Embeddings are (N, D) and (M, D), of any float dtype; computations are in fp32. They need not be
normalised: similarities are cosines. At most BLOCK rows of the N × M similarities are in memory.
"""

import torch
import torch.nn.functional as F

BLOCK = 1024  # queries at a time
TIE = 1e-6  # closer cosines count as equal: fp32 matrix products round equal ones differently


def retrieval(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    image_item: torch.Tensor,
    text_item: torch.Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k and rank in both directions. All candidates of a query's item are correct.

    R@k, in [0, 1], is the share of queries with a correct candidate among the k most similar
    (Karpathy & Li 2015; several correct ones as for COCO's five captions). `mean_rank` and
    `median_rank` are of the best correct candidate, from 1. A tie with a wrong candidate counts
    against the query: a model that maps everything to one point scores 0, not 1. `chance` is R@1 of
    a random order, which is the mean share of correct candidates, `mean_rank_chance` its mean rank.
    Queries without a correct candidate are left out; `queries` counts the others. With at most k
    candidates R@k is always 1.

    image_emb (N, D), text_emb (M, D), image_item (N,) and text_item (M,) integer item ids.
    Returns `i2t/R@1` …, `i2t/chance`, `i2t/mean_rank`, `i2t/mean_rank_chance`, `i2t/median_rank`,
    `i2t/candidates`, `i2t/queries`, and the same for `t2i`.
    Raises ValueError if shapes do not match, or if no query has a correct candidate.
    """
    check_ids("image_item", image_item, image_emb)
    check_ids("text_item", text_item, text_emb)
    scores = {}
    for name, args in (
        ("i2t", (image_emb, text_emb, image_item, text_item)),
        ("t2i", (text_emb, image_emb, text_item, image_item)),
    ):
        rank, share = ranks(*args)
        answerable = rank > 0
        rank, share = rank[answerable], share[answerable]
        if not len(rank):
            raise ValueError("no query has a correct candidate: image_item, text_item share no id")
        scores |= {f"{name}/R@{k}": (rank <= k).float().mean().item() for k in ks}
        scores |= {
            f"{name}/mean_rank": rank.double().mean().item(),
            f"{name}/mean_rank_chance": random_rank(share, len(args[1])),
            f"{name}/median_rank": rank.double().quantile(0.5).item(),
            f"{name}/chance": share.mean().item(),
            f"{name}/candidates": len(args[1]),
            f"{name}/queries": len(rank),
        }
    return scores


def ranks(
    query_emb: torch.Tensor,
    candidate_emb: torch.Tensor,
    query_item: torch.Tensor,
    candidate_item: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's rank and share of correct candidates, both (N,).

    The rank is int64: 1 + the number of wrong candidates at least as similar as the best correct
    one. It is at most M, and 0 if no candidate is correct.
    """
    queries, candidates = unit_rows(query_emb), unit_rows(candidate_emb)
    rank, shares = [], []
    for q, item in zip(queries.split(BLOCK), query_item.split(BLOCK), strict=True):
        scores = q @ candidates.T
        correct = item[:, None] == candidate_item[None, :]
        best = scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
        # not(<) instead of >=: a NaN score counts against the query
        above = ~(scores < best - TIE) & ~correct
        rank.append((1 + above.sum(1)) * correct.any(1))
        shares.append(correct.float().mean(1))
    return torch.cat(rank), torch.cat(shares)


def random_rank(share: torch.Tensor, candidates: int) -> float:
    """The mean rank in random order: `1 + (M − c) / (c + 1)` with c of M candidates correct."""
    c = share.double() * candidates
    return (1 + (candidates - c) / (c + 1)).mean().item()


def unit_rows(emb: torch.Tensor) -> torch.Tensor:
    return F.normalize(emb.float(), dim=1)


def check_ids(name: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
    if ids.shape != rows.shape[:1]:
        raise ValueError(f"{name} must have shape ({len(rows)},), got {tuple(ids.shape)}")


def zero_shot(
    image_emb: torch.Tensor, class_emb: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Accuracy of the most similar class (Radford et al. 2021); a tie counts as wrong.

    image_emb (N, D), class_emb (C, D) one embedding per class, labels (N,) class indices.
    `top1`, `top5`: the true class is the first, or among the first five; `mean_per_class`: top1
    averaged over the classes that occur. `chance` is 1/C, `majority` the accuracy of always naming
    the most frequent class. Raises ValueError if a label is not in [0, C).
    """
    check_ids("labels", labels, image_emb)
    if labels.min() < 0 or labels.max() >= len(class_emb):
        raise ValueError(
            f"labels must be in [0, {len(class_emb)}), got {labels.min()} to {labels.max()}"
        )
    item = torch.arange(len(class_emb), device=labels.device)
    rank, _ = ranks(image_emb, class_emb, labels, item)
    return {
        "top1": (rank == 1).float().mean().item(),
        "top5": (rank <= 5).float().mean().item(),
        "mean_per_class": mean_per_class(rank == 1, labels),
        "chance": 1 / len(class_emb),
        "majority": labels.bincount().max().item() / len(labels),
        "classes": len(class_emb),
    }


def mean_per_class(right: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of `right` (N,) among the rows of a class, averaged over the classes that occur."""
    _, index, count = labels.unique(return_inverse=True, return_counts=True)
    hits = torch.zeros(len(count), dtype=torch.float64).index_add_(0, index, right.double())
    return (hits / count).mean().item()


def ensemble(prompt_emb: torch.Tensor) -> torch.Tensor:
    """The normalised mean of each class's P prompts: (C, P, D) to unit rows (C, D).

    Source: Radford et al. 2021, section 3.1.4.
    """
    return F.normalize(F.normalize(prompt_emb.float(), dim=-1).mean(1), dim=-1)


def mean_rank_variance(rank: torch.Tensor) -> float:
    """The variance of an item's rank over K languages, averaged over N items; ranks are (N, K).

    `(1/N) Σ_i (1/K) Σ_k (r_ik − r̄_i)²`, where r̄_i is the mean over the languages.

    Source: Nie et al. 2024, "Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with
    1-to-K Contrastive Learning". Raises ValueError for another shape.
    """
    if rank.ndim != 2 or not rank.numel():
        raise ValueError(f"rank must have shape (N, K), N, K >= 1, got {tuple(rank.shape)}")
    return rank.double().var(1, correction=0).mean().item()


def random_rank_variance(correct: torch.Tensor, candidates: int, languages: int) -> float:
    """The expected `mean_rank_variance` of `ranks` for random orders of `candidates`.

    The number of wrong candidates before the best of c correct ones, of M, is negative
    hypergeometric, with variance `W (M + 1) c / ((c + 1)² (c + 2))`, W = M − c; for c = 1 it is
    uniform, with (M² − 1) / 12. `correct` (N,) is the number of correct candidates of each query.
    """
    c = correct.double()
    variance = (candidates - c) * (candidates + 1) * c / ((c + 1) ** 2 * (c + 2))
    return (1 - 1 / languages) * variance.mean().item()


def modality_gap(image_emb: torch.Tensor, text_emb: torch.Tensor) -> dict[str, float]:
    """The distance between the two modalities, of normalised embeddings.

    `gap = ‖mean_i x_i − mean_j y_j‖` (Liang et al. 2022, "Mind the Gap"), in [0, 2].
    `relative = gap / √(mean_ij ‖x_i − y_j‖²)`, in [0, 1]: the gap relative to the distance between
    an image and a text. It is 1 if each modality is a single point, so a model that only contracts
    both does not seem to close the gap.

    image_emb (N, D), text_emb (M, D); no pairing is assumed.
    """
    image, text = unit_rows(image_emb), unit_rows(text_emb)
    gap = (image.mean(0) - text.mean(0)).norm()
    # mean_ij ‖x_i − y_j‖² of unit vectors, without an N × M matrix
    distance = (2 - 2 * image.mean(0) @ text.mean(0)).clamp_min(0).sqrt()
    return {"gap": gap.item(), "relative": (gap / distance.clamp_min(1e-12)).item()}
