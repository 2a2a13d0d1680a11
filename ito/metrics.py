"""Retrieval, zero-shot accuracy and the modality gap, as pure functions of embeddings.

Embeddings are (N, D) and (M, D), any float dtype, computed in fp32. They need not be normalised:
similarities are cosines. No N × M matrix is held, only BLOCK rows of it.
"""

import torch
import torch.nn.functional as F

BLOCK = 1024  # queries at a time
TIE = 1e-6  # cosines closer than this are equal: fp32 GEMMs round equal ones differently


def retrieval(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    image_item: torch.Tensor,
    text_item: torch.Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k in both directions, in [0, 1]; candidates of a query's item are all correct.

    R@k is the share of queries with a correct candidate among the k most similar (Karpathy & Li
    2015; with several correct ones as for COCO's five captions). A tie with a wrong candidate
    counts as lost: a model that maps everything to one point scores 0, not 1. `chance` is R@1 of a
    random order, the mean share of correct candidates. Queries without a correct candidate are
    left out; `queries` counts the others.

    image_emb (N, D), text_emb (M, D), image_item (N,) and text_item (M,) integer item ids.
    Returns `i2t/R@1` …, `i2t/chance`, `i2t/candidates`, `i2t/queries`, and the same for `t2i`.
    Raises ValueError where shapes disagree, or if no query has a correct candidate.
    """
    check("image_item", image_item, image_emb)
    check("text_item", text_item, text_emb)
    image, text = F.normalize(image_emb.float(), dim=1), F.normalize(text_emb.float(), dim=1)
    return {
        f"{name}/{key}": value
        for name, args in (
            ("i2t", (image, text, image_item, text_item)),
            ("t2i", (text, image, text_item, image_item)),
        )
        for key, value in recall(*args, ks).items()
    }


def recall(queries, candidates, query_item, candidate_item, ks) -> dict[str, float]:
    ranks, shares = [], []
    for q, item in zip(queries.split(BLOCK), query_item.split(BLOCK), strict=True):
        scores = q @ candidates.T
        correct = item[:, None] == candidate_item[None, :]
        best = scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
        # not(<) rather than >=: a NaN score must not count as beaten
        above = ~(scores < best - TIE) & ~correct
        answerable = correct.any(1)
        ranks.append(above.sum(1)[answerable])
        shares.append(correct.float().mean(1)[answerable])
    rank, share = torch.cat(ranks), torch.cat(shares)
    if not len(rank):
        raise ValueError("no query has a correct candidate: image_item and text_item share no id")
    result = {f"R@{k}": (rank < k).float().mean().item() for k in ks}
    return result | {
        "chance": share.mean().item(),
        "candidates": len(candidates),
        "queries": len(rank),
    }


def check(name: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
    if ids.shape != rows.shape[:1]:
        raise ValueError(f"{name} must have shape ({len(rows)},), got {tuple(ids.shape)}")


def zero_shot(
    image_emb: torch.Tensor, class_emb: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Top-1 accuracy of the most similar class (Radford et al. 2021); a tie counts as wrong.

    image_emb (N, D), class_emb (C, D) one embedding per class, labels (N,) class indices.
    `chance` is 1/C, `majority` the accuracy of always naming the most frequent class.
    Raises ValueError if a label is not in [0, C).
    """
    check("labels", labels, image_emb)
    if labels.min() < 0 or labels.max() >= len(class_emb):
        raise ValueError(
            f"labels must be in [0, {len(class_emb)}), got {labels.min()} to {labels.max()}"
        )
    item = torch.arange(len(class_emb), device=labels.device)
    image, classes = F.normalize(image_emb.float(), dim=1), F.normalize(class_emb.float(), dim=1)
    scores = recall(image, classes, labels, item, ks=(1,))
    return {
        "top1": scores["R@1"],
        "chance": 1 / len(class_emb),
        "majority": labels.bincount().max().item() / len(labels),
        "classes": len(class_emb),
    }


def modality_gap(image_emb: torch.Tensor, text_emb: torch.Tensor) -> dict[str, float]:
    """How far apart the two modalities lie, of normalised embeddings.

    `gap = ‖mean_i x_i − mean_j y_j‖` (Liang et al. 2022, "Mind the Gap"), in [0, 2].
    `relative = gap / √(mean_ij ‖x_i − y_j‖²)`, in [0, 1]: the gap in units of the distance between
    an image and a text. It is 1 where each modality is a point, so that a model that merely
    contracts both does not look as if it had closed the gap.

    image_emb (N, D), text_emb (M, D); no pairing is assumed.
    """
    image, text = F.normalize(image_emb.float(), dim=1), F.normalize(text_emb.float(), dim=1)
    gap = (image.mean(0) - text.mean(0)).norm()
    # mean_ij ‖x_i − y_j‖² of unit vectors, with no N×M matrix
    distance = (2 - 2 * image.mean(0) @ text.mean(0)).clamp_min(0).sqrt()
    return {"gap": gap.item(), "relative": (gap / distance.clamp_min(1e-12)).item()}
