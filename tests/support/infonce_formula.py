"""`multi_positive_infonce` by its definition, with every option: one anchor after the other, on
Python lists. It shares nothing with the library."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Candidate(NamedTuple):
    """A key of the batch for one anchor. compared: what the margin compares, an inner product.
    weight: as a positive; 0 for a negative."""

    score: Tensor
    product: Tensor
    compared: Tensor
    weight: Tensor


def infonce_formula(q, k, scale, row_ids=None, col_ids=None, stats=None, **o):
    """The loss, in the dtype of q. It takes exp of the scores as they are: for scores up to 30.

    stats: a dict that gets {anchor: value} for `row_loss`, `row_lse`, `row_accuracy`, the mean
        score of the positives `row_positive` and the largest of the negatives `row_negative`, of
        the anchors that have them, and the same for `col`.
    """
    n, m = len(q), len(k)
    row_ids, col_ids = ids_or_row_numbers(row_ids, n), ids_or_row_numbers(col_ids, m)
    if o.get("positive_pairs") is not None:
        row_ids, col_ids = [0] * n, [0] * m  # nobody is padded
    weights = positive_weights(row_ids, col_ids, q.dtype, o)
    scale = torch.as_tensor(scale, dtype=q.dtype)
    scale = scale if scale.ndim else scale.expand(n)
    guide = o.get("guide_queries"), o.get("guide_keys")
    dtype = q.dtype
    # one by one, because padded rows may be NaN, which may get into no sum of gradients
    unit = partial(normalize, dim=-1) if o.get("normalize") else lambda x: x
    q, k, *guide = (x if x is None else [unit(row) for row in x] for x in (q, k, *guide))

    def candidates(i, rows) -> list[Candidate]:
        """The batch's candidates of anchor i, positives and negatives."""
        found = []
        own, others = (row_ids, col_ids) if rows else (col_ids, row_ids)
        for j in range(len(others)):
            if others[j] < 0 or (o.get("exclude_self") and i == j):
                continue
            if o.get("equal_ids") == "ignore" and i != j and own[i] == others[j]:
                continue
            a, b = (i, j) if rows else (j, i)
            score = product = q[a] @ k[b]
            score = scale[a] * score
            if rows and o.get("key_bias") is not None:
                score = score + o["key_bias"][b]
            compared = product if guide[0] is None else guide[0][a].detach() @ guide[1][b].detach()
            found.append(Candidate(score, product, compared, weights[a, b]))
        return found

    def limit_of(positives: list[Candidate]) -> float:
        margin = o.get("false_negative_margin")
        if margin is None or not positives:
            return math.inf
        top = max(x.compared.item() for x in positives)
        return top + margin * (abs(top) if o.get("margin_type") == "relative" else 1)

    def harder(score, product, *modes):
        if (o.get("hardness_mode") or "").removesuffix("_negatives") in modes:
            return score + o["hardness_strength"] * product.detach()
        return score

    def negatives(i, rows, batch: list[Candidate], limit: float) -> list[Tensor]:
        """The scores of the negatives that are left, of the batch, the queue and the hard ones."""
        left = [x for x in batch if not x.weight and x.compared <= limit]
        found = [harder(x.score, x.product, "in_batch", "all") for x in left]
        found = found if o.get("in_batch", True) else []
        if not rows:
            return found
        if guide[0] is not None or o.get("margin_on") == "in_batch":
            limit = math.inf
        extra = []
        if o.get("queue") is not None:
            ids = o.get("queue_ids")
            for j, key in enumerate(o["queue"].detach()):
                if ids is None or (ids[j] >= 0 and ids[j] != row_ids[i]):
                    extra.append((q[i] @ unit(key), "all"))
        if o.get("hard_negatives") is not None:
            ids = o.get("hard_negative_ids")
            for j, key in enumerate(o["hard_negatives"][i]):
                if ids is None or (ids[i, j] >= 0 and ids[i, j] != row_ids[i]):
                    extra.append((q[i] @ unit(key), "hard"))
        for product, kind in extra:
            if product <= limit:
                found.append(harder(scale[i] * product, product, kind, "all"))
        return found

    def log_denominator(pos, w, neg, tau, scale):
        total = neg.exp().sum()
        if len(neg) and o.get("hardness"):
            importance = (o["hardness"] * neg).exp()
            total = (neg.exp() * importance / importance.mean()).sum()
        if len(neg) and tau is not None:
            total = (total - len(neg) * tau * (w * pos.exp()).sum() / w.sum()) / (1 - tau)
            total = torch.maximum(total, len(neg) * (-scale).exp())
        return (pos.exp().sum() + total).log()

    def anchor_loss(log_d, pos, w, neg):
        if o.get("positives", "mean") == "mean":
            loss = log_d - (w * pos).sum() / w.sum()
        else:
            total = w.sum() if o["positives"] == "in" else 1
            loss = log_d - ((w * pos.exp()).sum() / total).log()
        smoothing = o.get("label_smoothing", 0)
        uniform = log_d - torch.cat([pos, neg]).mean()
        return (1 - smoothing) * loss + smoothing * uniform

    def direction(rows):
        side, (own, others) = ("row", (row_ids, col_ids)) if rows else ("col", (col_ids, row_ids))
        anchors, losses = [], {}  # losses: of the anchors that have a positive
        notes = {name: {} for name in ("lse", "accuracy", "positive", "negative")}
        for i in range(len(own)):
            if own[i] < 0:
                continue
            batch = candidates(i, rows)
            positives = [x for x in batch if x.weight]
            hardest = max((x.score for x in batch if not x.weight), default=-math.inf)
            notes["negative"] |= {i: hardest} if hardest > -math.inf else {}
            if o.get("equal_ids") == "ignore" and others[i] < 0:
                continue
            anchors.append(i)
            if not positives:
                continue
            pos = torch.stack([x.score for x in positives])
            w = torch.stack([x.weight for x in positives])
            neg = negatives(i, rows, batch, limit_of(positives))
            neg = torch.stack(neg) if neg else pos.new_zeros(0)
            tau = o.get("debias")
            tau = tau[i] if isinstance(tau, Tensor) and tau.ndim else tau
            log_d = log_denominator(pos, w, neg, tau, scale[i if rows else 0])
            losses[i] = anchor_loss(log_d, pos, w, neg)
            notes["lse"][i], notes["accuracy"][i] = log_d, float(pos.max() > hardest)
            notes["positive"][i] = (w * pos).sum() / w.sum()
        if stats is not None:
            stats.update({f"{side}_{name}": x for name, x in {"loss": losses, **notes}.items()})
        w = o.get("query_weights" if rows else "key_weights")
        w = torch.ones(len(own), dtype=dtype) if w is None else w
        zero = torch.zeros((), dtype=dtype)
        out = torch.stack([w[i] * losses[i] if i in losses else zero for i in range(len(own))])
        if o.get("reduction") == "none":
            return out
        if o.get("reduction") == "sum":
            return out.sum()
        total = sum(w[i] for i in (losses if o.get("empty") == "drop" else anchors))
        return out.sum() / (total or 1)

    rows = direction(True)
    if not o.get("symmetric", True):
        return rows
    cols = direction(False)
    return (rows, cols) if o.get("reduction") == "none" else 0.5 * (rows + cols)


def ids_or_row_numbers(ids: Tensor | None, count: int) -> list[int]:
    return list(range(count)) if ids is None else ids.tolist()


def positive_weights(row_ids: list[int], col_ids: list[int], dtype, o: dict) -> Tensor:
    """(N, M): the weight of each pair as a positive, 0 for a negative."""
    weights = torch.zeros(len(row_ids), len(col_ids), dtype=dtype)
    if o.get("positive_pairs") is not None:
        for p, (i, j) in enumerate(o["positive_pairs"].tolist()):
            weights[i, j] += 1 if o.get("positive_weights") is None else o["positive_weights"][p]
        return weights
    for i, row in enumerate(row_ids):
        for j, col in enumerate(col_ids):
            equal = i == j and col >= 0 if o.get("equal_ids") == "ignore" else row == col
            weights[i, j] = float(row >= 0 and equal)
    return weights
