"""Retrieval, zero-shot accuracy, modality gap and others, as pure functions of embeddings.

Embeddings are (N, D) and (M, D), of any float dtype. They need not be normalised: similarities are
cosines. Those that decide on a rank are in fp64, other computations in fp32. At most BLOCK rows of
the N × M similarities are in memory.
"""

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 512  # queries at a time
# Closer cosines count as equal: matrix products round those of equal embeddings differently, by
# 1e-15 in fp64. In fp32 the limit had to be 1e-6, on which 2 in 90 scores of 240 drawings depended.
TIE = 1e-12
RESAMPLES = 1000  # of the bootstrap


def retrieval(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    image_item: torch.Tensor,
    item_text: torch.Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k and rank in both directions. An item may have several images and texts, and a text
    several items: an image and a text are right for each other if the image's item has the text.

    R@k, in [0, 1], is the share of queries with a correct candidate among the k most similar
    (Karpathy & Li 2015; several correct ones as for COCO's five captions). `R@k/low` and `R@k/high`
    are its 95 % interval over the items (`bootstrap`). `mean_rank` and `median_rank` are of the
    best correct candidate, from 1. A tie with a wrong candidate counts against the query: a model
    that maps everything to one point scores 0, not 1. `chance` is R@1 of a random order, which is
    the mean share of correct candidates, `mean_rank_chance` its mean rank. `max_rank` is the lowest
    rank that a query can have: with k of at least that, R@k is 1 for any model.
    Queries without a correct candidate are left out; `queries` counts the others.

    image_emb (N, D), text_emb (M, D), image_item (N,) the item of each image, item_text (P, 2) the
    item and the text, an index into text_emb, of each caption; all indices are integers.
    Returns these as `i2t/…` and `t2i/…`, and the number of `candidates`.
    Raises ValueError if shapes do not match, if a text is not in [0, M), or if no query has a
    correct candidate.
    """
    check_ids("image_item", image_item, image_emb)
    check_pairs("item_text", item_text, None, len(text_emb))
    item_text = item_text[torch.isin(item_text[:, 0], image_item)].unique(dim=0)
    if not len(item_text):
        raise ValueError("no query has a correct candidate: image_item, item_text share no item")
    pairs = image_text_pairs(image_item, item_text)
    image = torch.arange(len(image_item), device=image_item.device)
    scores = {}
    for name, args, query_item in (
        ("i2t", (image_emb, text_emb, pairs), torch.stack([image, image_item], 1)),
        ("t2i", (text_emb, image_emb, pairs.flip(1)), item_text.flip(1)),
    ):
        rank, correct = ranks(*args)
        query_item = query_item[rank[query_item[:, 0]] > 0]
        hit = rank[:, None] <= torch.tensor(ks, device=rank.device)
        low, high = bootstrap(hit, query_item)
        rank, correct, hit = (x[rank > 0] for x in (rank, correct, hit))
        c, candidates = correct.double(), len(args[1])
        for n, k in enumerate(ks):
            scores[f"{name}/R@{k}"] = int(hit[:, n].sum()) / len(rank)
            scores |= {f"{name}/R@{k}/low": low[n].item(), f"{name}/R@{k}/high": high[n].item()}
        scores |= {
            f"{name}/mean_rank": rank.double().mean().item(),
            f"{name}/mean_rank_chance": (1 + (candidates - c) / (c + 1)).mean().item(),
            f"{name}/median_rank": rank.double().quantile(0.5).item(),
            f"{name}/max_rank": candidates - int(correct.min()) + 1,
            f"{name}/chance": int(correct.sum()) / (candidates * len(rank)),
            f"{name}/candidates": candidates,
            f"{name}/queries": len(rank),
        }
    return scores


def image_text_pairs(image_item: torch.Tensor, item_text: torch.Tensor) -> torch.Tensor:
    """The image and the text of all that are right for each other, (R, 2), sorted.

    The image's item has the text: image_item (N,), item_text (P, 2) as in `retrieval`.
    """
    item, text = item_text.unique(dim=0).T.contiguous()
    first = torch.searchsorted(item, image_item.contiguous())
    count = torch.searchsorted(item, image_item.contiguous(), right=True) - first
    image = torch.arange(len(count), device=count.device).repeat_interleave(count)
    place = torch.arange(len(image), device=count.device) - (count.cumsum(0) - count)[image]
    return torch.stack([image, text[first[image] + place]], 1)


def ranks(
    query_emb: torch.Tensor, candidate_emb: torch.Tensor, pairs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's rank and its number of correct candidates, both int64 (N,).

    The rank is 1 + the number of wrong candidates at least as similar as the best correct one. It
    is at most M, and 0 if no candidate is correct. pairs (P, 2): a query and a correct candidate.
    Raises ValueError if pairs has another shape, or an index out of range.
    """
    check_pairs("pairs", pairs, len(query_emb), len(candidate_emb))
    queries, candidates = (F.normalize(x.double(), dim=1) for x in (query_emb, candidate_emb))
    blocks = queries.split(BLOCK)
    pairs = pairs.unique(dim=0)  # and sorted
    sizes = (pairs[:, 0] // BLOCK).bincount(minlength=len(blocks))
    rank, count = [], []
    for n, (q, own) in enumerate(zip(blocks, pairs.split(sizes.tolist()), strict=True)):
        scores = q @ candidates.T
        row, column = own[:, 0] - n * BLOCK, own[:, 1]
        best = scores.new_full((len(q),), -torch.inf)
        best = best.scatter_reduce(0, row, scores[row, column], "amax")
        # not(<) instead of >=: a NaN score counts against the query
        above = ~(scores < best[:, None] - TIE)
        wrong = above.sum(1).index_add(0, row, above[row, column].long(), alpha=-1)
        correct = row.bincount(minlength=len(q))
        rank.append((1 + wrong) * (correct > 0))
        count.append(correct)
    return torch.cat(rank), torch.cat(count)


def bootstrap(hit: torch.Tensor, query_item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 95 % interval of the share of `hit` (Q, K) over the items: low and high, each (K,).

    The items are drawn with replacement, as many as there are, RESAMPLES times, and the interval is
    between the 2.5 % and 97.5 % quantiles of the share (Efron 1979). query_item (P, 2) has the
    items of each query; one that has several is a part of each, so that all queries together count
    as they do in the share itself. The draws are the same in each call.
    10,000 items take 0.05 s. Of few items or few queries, or close to 0 or 1, the interval is too
    narrow: of none or all right it has no width.
    """
    query, item = query_item.T
    _, item = item.unique(return_inverse=True)
    weight = 1 / query.bincount()[query].double()
    parts = torch.cat([hit[query].double(), torch.ones_like(weight)[:, None]], 1) * weight[:, None]
    items = int(item.max()) + 1
    sums = parts.new_zeros(items, parts.shape[1]).index_add_(0, item, parts).cpu().numpy()
    draw, totals = np.random.default_rng(0), []
    rows = max(1, 65536 // items)  # counted at once: twice as fast as one by one, in the cache
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start), items
        drawn = draw.integers(items, size=size) + items * np.arange(size[0])[:, None]
        count = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(size)
        totals.append(count.astype(float) @ sums)
    totals = torch.from_numpy(np.concatenate(totals))
    share = totals[:, :-1] / totals[:, -1:]
    low, high = share.quantile(share.new_tensor([0.025, 0.975]), 0)
    return low, high


def clip_benchmark_recall(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    image_item: torch.Tensor,
    text_item: torch.Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall as clip_benchmark's zero-shot retrieval computes it, by its names.

    Every caption is a query and a candidate, also one that is equal to another, and is right for
    its own item only. The k most similar are those of `torch.topk`, which decides among ties.
    clip_benchmark has no items of several images: here all images of its item are right for a
    caption. With fewer than k candidates, where it fails, all are taken.

    image_emb (N, D), text_emb (M, D), image_item (N,), text_item (M,). Returns
    `image_retrieval_recall@1` …, of texts as queries, and `text_retrieval_recall@1` ….
    Raises ValueError if shapes do not match.
    """
    check_ids("image_item", image_item, image_emb)
    check_ids("text_item", text_item, text_emb)
    image, text = (unit_rows(image_emb), image_item), (unit_rows(text_emb), text_item)
    recall = {}
    for name, (queries, query_item), (candidates, candidate_item) in (
        ("image", text, image),
        ("text", image, text),
    ):
        hits = {k: [] for k in ks}
        for q, item in zip(queries.split(BLOCK), query_item.split(BLOCK), strict=True):
            scores = q @ candidates.T
            for k, found in hits.items():
                nearest = scores.topk(min(k, len(candidates))).indices
                found.append((candidate_item[nearest] == item[:, None]).any(1))
        for k, found in hits.items():
            recall[f"{name}_retrieval_recall@{k}"] = torch.cat(found).float().mean().item()
    return recall


def unit_rows(emb: torch.Tensor) -> torch.Tensor:
    return F.normalize(emb.float(), dim=1)


def check_ids(name: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
    if ids.shape != rows.shape[:1]:
        raise ValueError(f"{name} must have shape ({len(rows)},), got {tuple(ids.shape)}")


def check_pairs(name: str, pairs: torch.Tensor, first: int | None, second: int) -> None:
    """Raises ValueError unless pairs is (P, 2), of indices below `first` and `second`."""
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{name} must have shape (P, 2), got {tuple(pairs.shape)}")
    for column, limit in enumerate((first, second)):
        if limit is not None:
            check_range(f"{name}[:, {column}]", pairs[:, column], limit)


def check_range(name: str, found: torch.Tensor, limit: int) -> None:
    if len(found) and not 0 <= found.min() <= found.max() < limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {found.min()} to {found.max()}")


def zero_shot(
    image_emb: torch.Tensor, class_emb: torch.Tensor, labels: torch.Tensor, intervals: bool = False
) -> dict[str, float]:
    """Accuracy of the most similar class (Radford et al. 2021); a tie counts as wrong.

    image_emb (N, D), class_emb (C, D) one embedding per class, labels (N,) class indices.
    `top1`, `top5`: the true class is the first, or among the first five; `top1/low` … with
    `intervals`: the 95 % interval over the images (`bootstrap`); `mean_per_class`: top1 averaged
    over the classes that occur. `chance` is 1/C, `majority` the accuracy of always naming
    the most frequent class. Raises ValueError if a label is not in [0, C).
    """
    check_ids("labels", labels, image_emb)
    check_range("labels", labels, len(class_emb))
    image = torch.arange(len(labels), device=labels.device)
    rank, _ = ranks(image_emb, class_emb, torch.stack([image, labels], 1))
    ends = {}
    if intervals:
        hit = rank[:, None] <= torch.tensor([1, 5], device=rank.device)
        low, high = bootstrap(hit, torch.stack([image, image], 1))
        for n, top in enumerate(("top1", "top5")):
            ends |= {f"{top}/low": low[n].item(), f"{top}/high": high[n].item()}
    return ends | {
        "top1": (rank == 1).double().mean().item(),
        "top5": (rank <= 5).double().mean().item(),
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


def random_rank_variance(correct: torch.Tensor, candidates: torch.Tensor | int) -> float:
    """The expected `mean_rank_variance` of `ranks` for random orders.

    `correct` (N, K) is the number of correct candidates of each item's query in each language,
    `candidates`, M, the number of all, of each language (K,) or the same. The number of wrong
    candidates before the best of c correct ones is negative hypergeometric: its mean is
    `W / (c + 1)`, its variance `W (M + 1) c / ((c + 1)² (c + 2))`, with W = M − c. For c = 1 it is
    uniform, with variance (M² − 1) / 12. An item's ranks vary by `(1 − 1/K)` times the mean of
    their variances, plus the variance of their means.
    """
    c, languages = correct.double(), correct.shape[1]
    wrong = candidates - c
    within = wrong * (candidates + 1) * c / ((c + 1) ** 2 * (c + 2))
    between = (wrong / (c + 1)).var(1, correction=0).mean()
    return ((1 - 1 / languages) * within.mean() + between).item()


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
