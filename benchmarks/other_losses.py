"""Further benchmarked losses: dense in plain PyTorch, and with this library.

Inputs beyond the two towers (a teacher's features, hard negatives, a queue) are copies of the
towers' features without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from inputs import Inputs
from torch import Tensor

import ito_kernels as ik

RINCE_Q, RINCE_LAMBDA = 0.1, 0.01
PRIOR, HARDNESS, STRENGTH, MARGIN, SOFT, MIXED, CLUSTERS = 0.1, 0.5, 9.0, 0.1, 0.4, 0.7, 8


class Loss(NamedTuple):
    eager: Callable[[Inputs], Tensor]
    ours: Callable[..., Tensor]  # (inputs, scale, backend=...) → loss
    grouped: bool = False  # several rows share an id
    one_tower: bool = False  # scores of all 2N rows against each other


def constant_features(x: Inputs) -> Tensor:
    """(N, D) without gradient; each row belongs to another item than that row of x."""
    return x.b.detach().roll(1, 0)


def mean_of_directions(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    return (loss(scores) + loss(scores.T)) / 2


def scores_of(x: Inputs) -> Tensor:
    return x.log_scale.exp() * x.a @ x.b.T


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def mnrl(x: Inputs) -> Tensor:
    return cross_entropy(x.log_scale.exp() * x.a @ torch.cat([x.b, constant_features(x)]).T)


def queue(x: Inputs) -> Tensor:
    return cross_entropy(x.log_scale.exp() * x.a @ torch.cat([x.b, constant_features(x)]).T)


def decoupled(x: Inputs) -> Tensor:
    positive = x.ids[:, None] == x.ids

    def rows(scores: Tensor) -> Tensor:
        negatives = scores.masked_fill(positive, -torch.inf).logsumexp(1)
        return (negatives - scores.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()

    return mean_of_directions(rows, scores_of(x))


def decoupled_softmax(x: Inputs) -> Tensor:
    positive = x.ids[:, None] == x.ids

    def rows(scores: Tensor) -> Tensor:
        negatives = scores.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
        terms = F.softplus(negatives - scores) * positive
        return (terms.sum(1) / positive.sum(1)).mean()

    return mean_of_directions(rows, scores_of(x))


def cwcl(x: Inputs) -> Tensor:
    c = constant_features(x)
    weights = 0.5 + 0.5 * c @ c.T
    return F.cross_entropy(scores_of(x), weights / weights.sum(1, keepdim=True))


def soft_target(x: Inputs) -> Tensor:
    teacher = 10.0 * x.a.detach() @ x.b.detach().T
    self_pairs = torch.eye(len(teacher), dtype=teacher.dtype, device=teacher.device)

    def rows(scores: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(scores, SOFT * teacher.softmax(1) + (1 - SOFT) * self_pairs)

    scores = scores_of(x)
    return (rows(scores, teacher) + rows(scores.T, teacher.T)) / 2


def uniformity(x: Inputs) -> Tensor:
    # pdist gives the pairs i < j, which have the same mean as all pairs i ≠ j
    squares = torch.pdist(torch.cat([x.a, x.b])).square()
    return (-x.log_scale.exp() * squares).exp().mean().log()


def symile(x: Inputs) -> Tensor:
    rng, z, scale = torch.Generator().manual_seed(0), constant_features(x), x.log_scale.exp()
    total = 0
    for anchor, second, third in ((x.a, x.b, z), (x.b, x.a, z), (z, x.a, x.b)):
        orders = (torch.randperm(len(z), generator=rng).to(z.device) for _ in "23")
        candidates = second[next(orders)] * third[next(orders)]
        positive = scale * (anchor * second * third).sum(1)
        self_pairs = torch.eye(len(z), dtype=torch.bool, device=z.device)
        total = total + cross_entropy(
            torch.where(self_pairs, positive[:, None], scale * anchor @ candidates.T)
        )
    return total / 3


def hard_debiased(x: Inputs) -> Tensor:
    scale = x.log_scale.exp()
    self_pairs = torch.eye(len(x.a), dtype=torch.bool, device=x.a.device)

    def rows(scores: Tensor) -> Tensor:
        n = len(scores) - 1
        positive = scores.diagonal().exp()
        weights = (HARDNESS * scores).exp().masked_fill(self_pairs, 0)
        hard = n * (weights * scores.exp()).sum(1) / weights.sum(1)
        negatives = torch.maximum(
            (hard - n * PRIOR * positive) / (1 - PRIOR), n * torch.exp(-scale)
        )
        return ((positive + negatives).log() - scores.diagonal()).mean()

    return mean_of_directions(rows, scale * x.a @ x.b.T)


def margin(x: Inputs) -> Tensor:
    self_pairs = torch.eye(len(x.a), dtype=torch.bool, device=x.a.device)

    def rows(dot: Tensor) -> Tensor:
        false = ~self_pairs & (dot > dot.diagonal()[:, None] + MARGIN)
        return cross_entropy((x.log_scale.exp() * dot).masked_fill(false, -torch.inf))

    return mean_of_directions(rows, x.a @ x.b.T)


def equal_ids(x: Inputs) -> Tensor:
    same = (x.ids[:, None] == x.ids).fill_diagonal_(False)
    return mean_of_directions(
        lambda scores: cross_entropy(scores.masked_fill(same, -torch.inf)), scores_of(x)
    )


def hardness_mode(x: Inputs) -> Tensor:
    dot = x.a @ x.b.T
    harder = STRENGTH * dot.detach().clone().fill_diagonal_(0)
    return mean_of_directions(cross_entropy, x.log_scale.exp() * dot + harder)


def guide(x: Inputs) -> Tensor:
    guide = guides(x)
    products = guide[0] @ guide[1].T
    scores = scores_of(x)

    def rows(scores: Tensor, products: Tensor) -> Tensor:
        false = products > products.diagonal()[:, None] + MARGIN
        return cross_entropy(scores.masked_fill(false, -torch.inf))

    return (rows(scores, products) + rows(scores.T, products.T)) / 2


def guides(x: Inputs) -> tuple[Tensor, Tensor]:
    return x.b.detach(), x.a.detach()


def one_to_k(x: Inputs) -> Tensor:
    scores = x.log_scale.exp() * x.a @ torch.cat([x.b, constant_features(x)]).T
    rows = torch.arange(len(x.a), device=scores.device).repeat(2)
    own = F.one_hot(rows).T.to(scores.dtype) / 2
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, rows)) / 2


def next_rows(x: Inputs) -> Tensor:
    return torch.arange(len(x.a), device=x.a.device).roll(-1)


def mixup(x: Inputs) -> Tensor:
    scores = scores_of(x)
    return MIXED * cross_entropy(scores) + (1 - MIXED) * F.cross_entropy(scores, next_rows(x))


def pairs(x: Inputs) -> Tensor:
    """(2N, 2): two positive keys for each query."""
    rows = torch.arange(len(x.a), device=x.a.device)
    return torch.stack([rows.repeat(2), torch.cat([rows, next_rows(x)])], 1)


def positive_pairs(x: Inputs) -> Tensor:
    rows, cols = pairs(x).T
    scores = scores_of(x)
    weights = torch.zeros_like(scores)
    weights[rows, cols] = 0.5
    return (F.cross_entropy(scores, weights) + F.cross_entropy(scores.T, weights.T)) / 2


def clusters(x: Inputs) -> tuple[Tensor, Tensor]:
    """The cluster of each row, (N,), and the (C, C) table of weights."""
    table = torch.linspace(0.5, 2.0, CLUSTERS**2, device=x.a.device).reshape(CLUSTERS, CLUSTERS)
    return torch.arange(len(x.a), device=x.a.device) % CLUSTERS, table


def cluster_weighted(x: Inputs) -> Tensor:
    cluster, table = clusters(x)
    log_weights = table.log()[cluster][:, cluster].fill_diagonal_(0)
    scores = scores_of(x)
    return (cross_entropy(scores + log_weights) + cross_entropy(scores.T + log_weights.T)) / 2


def dcl(x: Inputs) -> Tensor:
    """DCL: both views of all items, without self pairs."""
    z = torch.cat([x.a, x.b])
    scores = x.log_scale.exp() * z @ z.T
    same = torch.eye(len(x.a), dtype=torch.bool, device=z.device).repeat(2, 2)
    positive = x.log_scale.exp() * (x.a * x.b).sum(1)
    return scores.masked_fill(same, -torch.inf).logsumexp(1).mean() - positive.mean()


def both_views(x: Inputs) -> dict[str, Tensor]:
    ids = torch.arange(len(x.a), device=x.a.device).repeat(2)
    return {"query_ids": ids, "key_ids": ids, "exclude_self": True}


def softmax_of_pairs(x: Inputs) -> Tensor:
    rows, cols = pairs(x).T
    scores = scores_of(x)
    listed = torch.zeros_like(scores, dtype=torch.bool)
    listed[rows, cols] = True
    negatives = scores.masked_fill(listed, -torch.inf).logsumexp(1)
    return F.softplus(negatives[rows] - scores[rows, cols]).mean()


def cacr(x: Inputs) -> Tensor:
    costs = 2 - 2 * x.a @ x.b.T
    own = torch.eye(len(costs), dtype=torch.bool, device=costs.device)
    weights = (-0.9 * costs).masked_fill(own, -torch.inf).softmax(1)
    # the scale takes no part, but every contender has its gradient
    return costs.diagonal().mean() - (weights * costs).sum(1).mean() + 0 * x.log_scale


def siglip_weights(x: Inputs) -> Tensor:
    logits = scores_of(x) + x.bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    weights = row_weights(x)
    return -(F.logsigmoid(signs * logits) * weights[:, None] * weights).sum() / len(logits)


def row_weights(x: Inputs) -> Tensor:
    return 0.5 + torch.arange(len(x.a), device=x.a.device) % 8 / 8


def rince(x: Inputs) -> Tensor:
    def rows(scores: Tensor) -> Tensor:
        sums = (RINCE_Q * (math.log(RINCE_LAMBDA) + scores.logsumexp(1))).exp()
        return ((sums - (RINCE_Q * scores.diagonal()).exp()) / RINCE_Q).mean()

    return mean_of_directions(rows, scores_of(x))


def global_contrastive(x: Inputs) -> Tensor:
    """SogCLR's surrogate plus the value, whose gradient is that of the temperature."""
    dot, tau = x.a @ x.b.T, (-x.log_scale).exp()
    own, n = torch.eye(len(dot), dtype=torch.bool, device=dot.device), len(dot)

    def rows(dot: Tensor, u: Tensor) -> Tensor:
        g = ((dot - dot.diagonal()[:, None]) / tau).exp().masked_fill(own, 0).sum(1) / (n - 1)
        u = (0.1 * u + 0.9 * g).detach() + 1e-14
        surrogate = tau.detach() * (g / u).mean()
        return tau * u.log().mean() + surrogate - surrogate.detach()

    u = row_weights(x)
    return rows(dot, u) + rows(dot.T, u)


def joint_mnrl(x: Inputs) -> Tensor:
    scale, own = x.log_scale.exp(), torch.eye(len(x.a), dtype=torch.bool, device=x.a.device)
    docs = torch.cat([x.b, constant_features(x)])
    query_to_doc = scale * x.a @ docs.T
    scores = [
        query_to_doc,
        (scale * x.a @ x.a.T).masked_fill(own, -torch.inf),
        scale * x.b @ x.a.T,
        (scale * x.b @ docs.T).masked_fill(own.repeat(1, 2), -torch.inf),
    ]
    return cross_entropy(torch.cat(scores, 1))


def by_ids(x: Inputs) -> dict[str, Tensor]:
    return {"query_ids": x.ids, "key_ids": x.ids}


def infonce(**options) -> Callable[..., Tensor]:
    def run(x: Inputs, scale: Tensor, **call_options) -> Tensor:
        arguments = {k: v(x) if callable(v) else v for k, v in options.items()}
        return ik.clip_loss(x.a, x.b, scale, **arguments, **call_options)

    return run


OTHER_LOSSES = {
    "mnrl": Loss(
        mnrl,
        lambda x, scale, **call_options: ik.mnrl_loss(
            x.a, x.b, constant_features(x), scale, normalize=False, **call_options
        ),
    ),
    "queue": Loss(queue, infonce(queue=constant_features, symmetric=False)),
    "decoupled": Loss(
        decoupled,
        lambda x, scale, **call_options: ik.decoupled_contrastive_loss(
            x.a, x.b, scale, **by_ids(x), **call_options
        ),
        grouped=True,
    ),
    "decoupled_softmax": Loss(
        decoupled_softmax,
        lambda x, scale, **call_options: ik.decoupled_softmax_loss(
            x.a, x.b, scale, **by_ids(x), **call_options
        ),
        grouped=True,
    ),
    "cwcl": Loss(
        cwcl,
        lambda x, scale, **call_options: ik.cwcl_loss(
            x.a, x.b, scale, reference=constant_features(x), **call_options
        ),
    ),
    "soft_target": Loss(
        soft_target,
        lambda x, scale, **call_options: ik.soft_target_infonce(
            x.a,
            x.b,
            scale,
            target_queries=x.a.detach(),
            target_keys=x.b.detach(),
            target_scale=10.0,
            alpha=SOFT,
            **call_options,
        ),
    ),
    "uniformity": Loss(
        uniformity,
        lambda x, scale, **call_options: ik.uniformity_loss(
            torch.cat([x.a, x.b]), t=scale, **call_options
        ),
        one_tower=True,
    ),
    "symile": Loss(
        symile,
        lambda x, scale, **call_options: ik.symile_loss(
            [x.a, x.b, constant_features(x)],
            scale,
            generator=torch.Generator().manual_seed(0),
            **call_options,
        ),
    ),
    "hard_debiased": Loss(hard_debiased, infonce(hardness=HARDNESS, debias=PRIOR)),
    "one_to_k": Loss(
        one_to_k,
        lambda x, scale, **call_options: ik.one_to_k_loss(
            x.a, torch.stack([x.b, constant_features(x)], 1), scale, **call_options
        ),
    ),
    "mixup": Loss(
        mixup,
        lambda x, scale, **call_options: ik.mixup_infonce(
            x.a, x.b, scale, partners=next_rows(x), mixing=MIXED, **call_options
        ),
    ),
    "positive_pairs": Loss(positive_pairs, infonce(positive_pairs=pairs)),
    "clusters": Loss(
        cluster_weighted,
        lambda x, scale, **call_options: ik.cluster_weighted_infonce(
            x.a,
            x.b,
            scale,
            query_clusters=clusters(x)[0],
            key_clusters=clusters(x)[0],
            weights=clusters(x)[1],
            **call_options,
        ),
    ),
    "margin": Loss(margin, infonce(false_negative_margin=MARGIN)),
    "joint_mnrl": Loss(
        joint_mnrl,
        lambda x, scale, **call_options: ik.mnrl_loss(
            *(x.a, x.b, constant_features(x), scale),
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            normalize=False,
            **call_options,
        ),
    ),
    "dcl": Loss(
        dcl,
        lambda x, scale, **call_options: ik.decoupled_contrastive_loss(
            *(torch.cat([x.a, x.b]),) * 2, scale, symmetric=False, **both_views(x), **call_options
        ),
        one_tower=True,
    ),
    "softmax_of_pairs": Loss(
        softmax_of_pairs,
        lambda x, scale, **call_options: ik.decoupled_softmax_loss(
            x.a, x.b, scale, symmetric=False, positive_pairs=pairs(x), **call_options
        ),
    ),
    "cacr": Loss(
        cacr,
        lambda x, scale, **call_options: ik.cacr_loss(x.a, x.b, **call_options) + 0 * scale,
    ),
    "siglip_weights": Loss(
        siglip_weights,
        lambda x, scale, **call_options: ik.siglip_loss(
            *(x.a, x.b, scale, x.bias),
            image_weights=row_weights(x),
            text_weights=row_weights(x),
            **call_options,
        ),
    ),
    "rince": Loss(
        rince,
        lambda x, scale, **call_options: ik.rince_loss(
            x.a, x.b, scale, q=RINCE_Q, lam=RINCE_LAMBDA, **call_options
        ),
    ),
    "global_contrastive": Loss(
        global_contrastive,
        lambda x, scale, **call_options: ik.global_contrastive_loss(
            x.a, x.b, 1 / scale, row_weights(x), row_weights(x), gamma=0.9, **call_options
        )[0],
    ),
    "equal_ids": Loss(
        equal_ids,
        infonce(equal_ids="ignore", query_ids=lambda x: x.ids, key_ids=lambda x: x.ids),
        grouped=True,
    ),
    "hardness_mode": Loss(
        hardness_mode, infonce(hardness_mode="in_batch", hardness_strength=STRENGTH)
    ),
    "guide": Loss(
        guide,
        infonce(
            false_negative_margin=MARGIN,
            guide_queries=lambda x: guides(x)[0],
            guide_keys=lambda x: guides(x)[1],
        ),
    ),
}
