"""Every loss on the rows of one rank or of all, and the truth: one process on the whole batch."""

from functools import cache, partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import ito_kernels as ik
from support.losses_table import ROWS, Inputs

N, D = 13, 5
SHARES = {1: [13], 2: [9, 4], 3: [6, 2, 5], 4: [5, 1, 3, 4]}  # rows of each rank
IDS = torch.tensor([4, 1, 4, -1, 0, 2, 1, 1, 7, -1, 0, 4, 9])
OTHER_IDS = torch.tensor([1, 4, -1, 0, 4, 4, 2, 8, 1, 9, 0, -1, 1])


class Model(nn.Module):
    """Two towers, a scale and a bias."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(6, D), nn.Linear(4, D)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor(x)) for x in (2.5, -2.0))
        self.to(dtype)

    def forward(self, x, y):
        x, y = (normalize(tower(z), dim=-1) for tower, z in ((self.image, x), (self.text, y)))
        return x, y, self.logit_scale.exp(), 1 * self.logit_bias


def ids(r):
    return {"query_ids": IDS[r], "key_ids": OTHER_IDS[r]}


def infonce(x, y, s, b, r, **o):
    return ik.multi_positive_infonce(x, y, s, **o)


def by_ids(x, y, s, b, r, **o):
    return ik.multi_positive_infonce(x, y, s, **ids(r), **o)


def one_tower(x, y, s, b, r, **o):
    return ik.multi_positive_infonce(x, x, s, query_ids=IDS[r], key_ids=IDS[r], **o)


def ito(x, y, s, b, r, denominator, **o):
    views, fused = torch.stack([x, y]), torch.stack([x, y, x - y])
    return ik.ito_loss(views, torch.stack([y, x + y]), fused, s, denominator=denominator, **o)[0]


def equal(x, y, s, b, r, captions=2, **o):
    """The ids of items in the fusion are others than those of captions."""
    text, ids = torch.stack([y, x + y])[:captions], torch.stack([IDS[r], OTHER_IDS[r]])[:captions]
    views, fused = torch.stack([x, y, x - y]), torch.stack([x, y])
    options = {"caption_ids": ids, "fused_ids": OTHER_IDS[r], "fusion_scale": 1 - b}
    return ik.ito_loss(views, text, fused, s, **options, **o)[0]


def other_towers(x, y, s, b, r, **o):
    """Queries and keys of different towers, self left out in both directions."""
    return ik.multi_positive_infonce(x, y, s, **ids(r), exclude_self=True, **o)


G = torch.Generator().manual_seed(5)
QUEUE = normalize(torch.randn(7, D, generator=G, dtype=torch.float64), dim=1)
QUEUE_IDS = torch.tensor([4, 1, -1, 30, 0, 31, 7])
WEIGHTS = torch.rand(2, N, generator=G, dtype=torch.float64)
PRIORS = torch.rand(N, generator=G, dtype=torch.float64) / 4
# pairs (query, key) that no ids can say; query 5 and key 6 have none
PAIRS = torch.tensor([(i, j) for i in range(N) for j in range(N) if (3 * i + j) % 5 < 2])
PAIRS = PAIRS[(PAIRS[:, 0] != 5) & (PAIRS[:, 1] != 6)]
PAIR_WEIGHTS = torch.rand(len(PAIRS), generator=G, dtype=torch.float64)
PAIR_WEIGHTS[::4] = 0
REFERENCE = normalize(torch.randn(2, N, 3, generator=G, dtype=torch.float64), dim=2)
CLUSTERS = torch.randint(3, (2, N), generator=G)
GUIDE = normalize(torch.randn(2, N, 4, generator=G, dtype=torch.float64), dim=2)


def pairs(x, y, s, b, r, weighted=True, **o):
    local = torch.isin(PAIRS[:, 0], r)
    weights = PAIR_WEIGHTS[local] if weighted else None
    return ik.clip_loss(
        x,
        y,
        s,
        positive_pairs=PAIRS[local],
        positive_weights=weights,
        key_bias=b * r.to(b.dtype).cos(),
        **o,
    )


def all_options(x, y, s, b, r, symmetric=True, **o):
    """Options that go together. key_bias is made of the model's bias, to compare its gradient."""
    return ik.multi_positive_infonce(
        x,
        y,
        s,
        **ids(r),
        label_smoothing=0.2,
        query_weights=WEIGHTS[0, r],
        key_weights=WEIGHTS[1, r] if symmetric else None,
        symmetric=symmetric,
        key_bias=b * r.to(b.dtype).cos(),
        queue=QUEUE,
        queue_ids=QUEUE_IDS,
        hard_negatives=torch.stack([x - y, x + y], 1),
        normalize=True,
        **o,
    )


def margin(x, y, s, b, r, **o):
    return by_ids(x, y, s, b, r, false_negative_margin=0.1, key_bias=b * r.to(b.dtype).cos(), **o)


def soft(x, y, s, b, r, more_keys=False, **o):
    c, e = REFERENCE[:, r]
    if more_keys:
        y, e = torch.cat([y, y - x]), torch.cat([e, -c])
    return ik.soft_target_infonce(x, y, s, target_queries=c, target_keys=e, target_scale=3.0, **o)


def softmax_of_pairs(x, y, s, b, r, **o):
    local = torch.isin(PAIRS[:, 0], r)
    return ik.decoupled_softmax_loss(
        *(x, y, s * (1 + r.to(s.dtype) / N)),
        symmetric=False,
        positive_pairs=PAIRS[local],
        positive_weights=PAIR_WEIGHTS[local],
        **o,
    )


def siglip_of_pairs(x, y, s, b, r, **o):
    local = torch.isin(PAIRS[:, 0], r)
    return ik.siglip_loss(
        *(x, y, s, b),
        positive_pairs=PAIRS[local],
        positive_weights=PAIR_WEIGHTS[local],
        image_weights=WEIGHTS[0, r],
        text_weights=WEIGHTS[1, r],
        **o,
    )


def symile(x, y, s, b, r, group=None, number=3, **o):
    """Generators differ between ranks; the loss must use the first rank's."""
    generator = torch.Generator().manual_seed(dist.get_rank() if group else 0)
    modalities = [x, y, x - y, x + 2 * y][:number]
    return ik.symile_loss(modalities, s, generator=generator, group=group, **o)


def clusters(x, y, s, b, r, **o):
    table = s / (1 + torch.arange(9.0, dtype=s.dtype).view(3, 3))
    rows, cols = CLUSTERS[:, r]
    return ik.cluster_weighted_infonce(
        x, y, s, query_clusters=rows, key_clusters=cols, weights=table, **o
    )


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def ranking(x, y, s, b, r, guided=False, per_query=False, hard=True, **o):
    """`mnrl_loss` with two negatives per query, a guide and a scale per query."""
    negatives = torch.stack([x - y, x + 0.3 * y], 1) if hard else None
    if guided:
        e = REFERENCE[:, r]
        o["guide"] = (*e, torch.stack([e[0] - e[1], e[1] + e[0].flip(1)], 1))[: 2 + hard]
    s = s * (1 + r.to(s.dtype) / N) if per_query else s
    return ik.mnrl_loss(x, y, negatives, s, **o)


# from the rows' features, scale, bias and numbers; with the options of the group
LOSSES = {
    "clip": lambda x, y, s, b, r, **o: ik.clip_loss(x, y, s, **o),
    "rows only": partial(infonce, symmetric=False),
    "mean": by_ids,
    "in": partial(by_ids, positives="in"),
    "sum": partial(by_ids, positives="sum", empty="drop"),
    "reduction sum": partial(by_ids, reduction="sum", positives="in"),
    "drop, rows only": partial(by_ids, symmetric=False, empty="drop"),
    "normalize": partial(by_ids, normalize=True),
    "one id given": lambda x, y, s, b, r, **o: ik.clip_loss(x, y, s, key_ids=5 * r % N, **o),
    "scale per query": lambda x, y, s, b, r, **o: by_ids(
        x, y, s * (1 + r.to(s.dtype) / N), b, r, **o
    ),
    "self excluded": other_towers,
    "one tower": partial(one_tower, exclude_self=True),
    "one tower, lse": partial(one_tower, exclude_self=True, positives="in", symmetric=False),
    "supcon": lambda x, y, s, b, r, **o: ik.supcon_loss(x, IDS[r], 1 / s, empty="drop", **o),
    "nt_xent": lambda x, y, s, b, r, **o: ik.nt_xent_loss(x, y, 1 / s, **o),
    "siglip": lambda x, y, s, b, r, **o: ik.siglip_loss(x, y, s, b, **o),
    "siglip by ids": lambda x, y, s, b, r, **o: ik.siglip_loss(
        x, y, s, b, image_ids=IDS[r], text_ids=OTHER_IDS[r], **o
    ),
    "siglip, pairs": siglip_of_pairs,
    "siglip by ids, weights": lambda x, y, s, b, r, **o: ik.siglip_loss(
        *(x, y, s * (1 + r.to(s.dtype) / N), b),
        image_ids=IDS[r],
        text_ids=OTHER_IDS[r],
        image_weights=WEIGHTS[0, r],
        text_weights=WEIGHTS[1, r],
        **o,
    ),
    "siglip, no bias": lambda x, y, s, b, r, **o: ik.siglip_loss(
        x, y, s, image_weights=WEIGHTS[0, r], **o
    ),
    "siglip sum": lambda x, y, s, b, r, **o: ik.siglip_loss(x, y, s, b, reduction="sum", **o),
    "mnrl": lambda x, y, s, b, r, **o: ik.mnrl_loss(x, y, torch.stack([-y, x + y], 1), s, **o),
    "mnrl, all directions": partial(ranking, directions=DIRECTIONS),
    "mnrl, per direction": partial(
        ranking, directions=DIRECTIONS[::2], partition_mode="per_direction", hard=False
    ),
    "mnrl, per direction, scale per query": partial(
        ranking,
        directions=DIRECTIONS[::2],
        partition_mode="per_direction",
        per_query=True,
        hard=False,
    ),
    "mnrl, margin": partial(ranking, directions=DIRECTIONS, margin=0.1),
    "mnrl, relative margin, inner products": partial(
        ranking, margin=0.2, margin_strategy="relative", normalize=False
    ),
    "mnrl, guide": partial(ranking, directions=DIRECTIONS, guided=True, margin=-0.1),
    "mnrl, guide, hard": partial(
        ranking, guided=True, hardness_mode="hard", hardness_strength=2.0
    ),
    "mnrl, in batch": partial(
        ranking, directions=DIRECTIONS, hardness_mode="in_batch", hardness_strength=2.0
    ),
    "mnrl, all, scale per query": partial(
        ranking, per_query=True, hardness_mode="all", hardness_strength=2.0, margin=0.1
    ),
    "ito pair": partial(ito, denominator="pair"),
    "ito pooled": partial(ito, denominator="pooled"),
    "ito, equal captions": partial(equal, denominator="pair"),
    "ito, equal captions left out": partial(equal, denominator="pair", equal_ids="ignore"),
    "ito pooled, equal captions": partial(equal, denominator="pooled"),
    "ito pooled, equal captions left out": partial(
        equal, denominator="pooled", equal_ids="ignore"
    ),
    "ito pooled, one caption, equal left out": partial(
        equal, captions=1, denominator="pooled", equal_ids="ignore"
    ),
    "multi head": lambda x, y, s, b, r, **o: ik.multi_head_loss(
        ik.decoupled_contrastive_loss,
        *(torch.stack([z, z.flip(1)]) for z in (x, y)),
        logit_scale=torch.stack([s, 2 * s]),
        **o,
    ),
    "options": all_options,
    "options, sum": partial(all_options, positives="in", reduction="sum"),
    "options, drop": partial(all_options, positives="sum", empty="drop"),
    "options, one way": partial(all_options, symmetric=False),
    "smoothing, self excluded": partial(one_tower, label_smoothing=0.1, exclude_self=True),
    "pairs": pairs,
    "pairs, in": partial(pairs, positives="in", exclude_self=True, empty="drop"),
    "pairs, smoothing": partial(pairs, weighted=False, label_smoothing=0.2),
    "pairs, margin": partial(pairs, false_negative_margin=0.2),
    "pairs, debias": partial(pairs, debias=0.1, hardness=0.5, exclude_self=True),
    "pairs, hardness": lambda x, y, s, b, r, **o: pairs(
        x, y, s * (1 + r.to(s.dtype) / N), b, r, hardness=0.5, **o
    ),
    "margin": margin,
    "margin, self excluded": partial(margin, exclude_self=True, queue=QUEUE, hardness=0.5),
    "margin, more keys": lambda x, y, s, b, r, **o: ik.multi_positive_infonce(
        x,
        torch.cat([y, y - x]),
        s,
        query_ids=IDS[r],
        key_ids=torch.cat([OTHER_IDS[r], IDS[r]]),
        false_negative_margin=0.1,
        **o,
    ),
    "queue alone": partial(
        by_ids, in_batch=False, symmetric=False, queue=QUEUE, queue_ids=QUEUE_IDS
    ),
    "hard negatives alone": lambda x, y, s, b, r, **o: ik.multi_positive_infonce(
        x,
        y,
        s,
        hard_negatives=torch.stack([x - y, x + y], 1),
        hard_negative_ids=torch.stack([r, 3 * r % N], 1) - 1,
        in_batch=False,
        symmetric=False,
        **o,
    ),
    "margin, relative, in batch": partial(
        by_ids,
        false_negative_margin=0.1,
        margin_type="relative",
        margin_on="in_batch",
        queue=QUEUE,
    ),
    "margin, diagonal": partial(infonce, false_negative_margin=0.1, debias=0.1),
    "margin, smoothing": partial(
        margin, label_smoothing=0.2, queue=QUEUE, queue_ids=QUEUE_IDS, exclude_self=True
    ),
    "margin, scale per query": lambda x, y, s, b, r, **o: margin(
        x, y, s * (1 + r.to(s.dtype) / N), b, r, positives="in", label_smoothing=0.2, **o
    ),
    "margin, diagonal, scale per query": lambda x, y, s, b, r, **o: ik.clip_loss(
        x, y, s * (1 + r.to(s.dtype) / N), false_negative_margin=0.1, hardness=0.5, **o
    ),
    "guide": lambda x, y, s, b, r, **o: margin(
        x, y, s, b, r, guide_queries=GUIDE[0, r], guide_keys=GUIDE[1, r], label_smoothing=0.2, **o
    ),
    "guide, pairs": lambda x, y, s, b, r, **o: pairs(
        *(x, y, s, b, r),
        false_negative_margin=0.1,
        guide_queries=GUIDE[0, r],
        guide_keys=GUIDE[1, r],
        **o,
    ),
    "equal ids ignored": partial(by_ids, equal_ids="ignore", queue=QUEUE, queue_ids=QUEUE_IDS),
    "equal ids ignored, margin, smoothing": partial(
        margin, equal_ids="ignore", label_smoothing=0.2, empty="drop"
    ),
    "hardness mode": partial(
        by_ids, hardness_mode="all", hardness_strength=2.0, queue=QUEUE, queue_ids=QUEUE_IDS
    ),
    "hardness mode, diagonal": partial(infonce, hardness_mode="in_batch", hardness_strength=2.0),
    "hardness mode, pairs": partial(pairs, hardness_mode="in_batch", hardness_strength=2.0),
    "hardness mode, scale per query": lambda x, y, s, b, r, **o: margin(
        *(x, y, s * (1 + r.to(s.dtype) / N), b, r),
        hardness_mode="all",
        hardness_strength=2.0,
        equal_ids="ignore",
        hard_negatives=torch.stack([x - y, x + y], 1),
        **o,
    ),
    "debias": partial(by_ids, debias=0.1),
    "debias per query": lambda x, y, s, b, r, **o: by_ids(x, y, s, b, r, debias=PRIORS[r], **o),
    "hardness": partial(by_ids, hardness=0.5, positives="in"),
    "hardness, debias": partial(infonce, hardness=0.5, debias=0.1, queue=QUEUE),
    "decoupled": lambda x, y, s, b, r, **o: ik.decoupled_contrastive_loss(x, y, s, **ids(r), **o),
    "decoupled softmax": lambda x, y, s, b, r, **o: ik.decoupled_softmax_loss(
        x, y, s * (1 + r.to(s.dtype) / N), **ids(r), **o
    ),
    "decoupled softmax, one way": lambda x, y, s, b, r, **o: ik.decoupled_softmax_loss(
        x, y, s, **ids(r), symmetric=False, **o
    ),
    "decoupled softmax, diagonal": lambda x, y, s, b, r, **o: ik.decoupled_softmax_loss(
        x, y, s, **o
    ),
    "decoupled, self excluded": lambda x, y, s, b, r, **o: ik.decoupled_contrastive_loss(
        x, y, s, **ids(r), exclude_self=True, **o
    ),
    "decoupled softmax, self excluded": lambda x, y, s, b, r, **o: ik.decoupled_softmax_loss(
        x, y, s, **ids(r), exclude_self=True, **o
    ),
    "decoupled softmax, pairs": softmax_of_pairs,
    "decoupled softmax, pairs, self excluded": partial(softmax_of_pairs, exclude_self=True),
    "cwcl, infonce": lambda x, y, s, b, r, **o: ik.cwcl_loss(
        x, y, s, reference=REFERENCE[0, r], symmetric="infonce", **o
    ),
    "cwcl": lambda x, y, s, b, r, **o: ik.cwcl_loss(
        x, y, s, reference=REFERENCE[0, r], symmetric=True, **o
    ),
    "soft targets": partial(soft, alpha=0.7),
    "soft targets, one way": partial(soft, symmetric=False),
    "soft targets, more keys": partial(soft, more_keys=True, alpha=0.4),
    "uniformity": lambda x, y, s, b, r, **o: ik.uniformity_loss(x + 0.1 * y, t=s.sqrt(), **o),
    "uniformity of two towers": lambda x, y, s, b, r, **o: ik.uniformity_loss(
        x + 0.1 * y, y, s.sqrt(), **o
    ),
    "symile": symile,
    "symile, four": partial(symile, number=4),
    "symile, two, scale per row": lambda x, y, s, b, r, **o: symile(
        x, y, s * (1 + r.to(s.dtype) / N), b, r, number=2, **o
    ),
    "symile, all": lambda x, y, s, b, r, **o: ik.symile_loss(
        [x, y, x - y], s * (1 + r.to(s.dtype) / N), negatives="all", **o
    ),
    "global contrastive, temperature for each row": lambda x, y, s, b, r, **o: (
        ik.global_contrastive_loss(
            x,
            y,
            tuple(weights * r.to(s.dtype).add(9) / s for weights in (0.1, 0.2)),
            *(z.detach().abs()[:, 0] for z in (x, y)),
            gamma=0.3,
            rho=2.0,
            **o,
        )[0]
    ),
    "rince, one way, scale per row": lambda x, y, s, b, r, **o: ik.rince_loss(
        x, y, s * (1 + r.to(s.dtype) / N), q=0.3, lam=0.05, symmetric=False, **o
    ),
    "mixup": lambda x, y, s, b, r, **o: ik.mixup_infonce(
        x, y, s, partners=5 * r % N, mixing=WEIGHTS[0, r], symmetric=True, **o
    ),
    "mixup, sum": lambda x, y, s, b, r, **o: ik.mixup_infonce(
        *(x, y, s),
        partners=5 * r % 4,
        mixing=WEIGHTS[0, r],
        symmetric=True,
        key_targets="sum",
        **o,
    ),
    "clusters": clusters,
    "clusters, negatives alone": lambda *z, **o: clusters(
        *z, **ids(z[-1]), include_positives=False, **o
    ),
    "clusters by ids": lambda *z, **o: clusters(*z, **ids(z[-1]), **o),
    "cacr, self excluded": lambda x, y, s, b, r, **o: ik.cacr_loss(
        x, y, **ids(r), exclude_self=True, **o
    ),
    "cacr": lambda x, y, s, b, r, **o: ik.cacr_loss(x, y, **ids(r), t_positive=2.0, **o),
}  # fmt: skip


def of_table(loss, option, x, y, s, b, r, **o):
    inputs = Inputs(x, y, normalize(x - y, dim=1), r, N, s)
    return ROWS[loss][option].call(loss, inputs, **o)


for loss, rows in ROWS.items():
    LOSSES[loss] = partial(of_table, loss, next(iter(rows)))


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=g).to(dtype), torch.randn(N, 4, generator=g).to(dtype)


def rows_of(shares, rank):
    first = sum(shares[:rank])
    return torch.arange(first, first + shares[rank])


def local_rows(even=False):
    size = dist.get_world_size()
    return rows_of([N // size] * size if even else SHARES[size], dist.get_rank())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours, truth, tolerance):
    assert ours.keys() == truth.keys()
    for name in truth:
        error = (ours[name] - truth[name]).abs().max()
        assert error <= tolerance * (1 + truth[name].abs().max()), f"{name}: off by {error:.3g}"


def single(loss, rows=None, dtype=torch.float64):
    """The loss of one process on the whole batch, and its gradients."""
    x, y = batch(dtype)
    rows = torch.arange(N) if rows is None else rows
    model = Model(dtype)
    value = loss(*model(x[rows], y[rows]), rows)
    value.backward()
    return value.detach(), gradients(model)


@cache
def replica(dtype):
    """One for all checks: its start costs more than a step."""
    return DistributedDataParallel(Model(dtype), find_unused_parameters=True)
