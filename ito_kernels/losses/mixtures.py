"""Mixed samples: anchors with two weighted positives, and negatives mixed from hard ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..distributed import global_row_numbers, same_on_every_rank
from ..similarity.panelwise import row_panels
from ..similarity.spec import check_bias, check_ids, check_pair
from .batch import PAIRED, check_arguments
from .common import check_generator
from .infonce import infonce
from .options import Options, check_number, check_rows, check_values
from .precision import accumulated


@same_on_every_rank(free=("mixing",))
def mixup_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    partners: Tensor,
    mixing: float | Tensor,
    symmetric: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of mixed samples: the key of each part is a positive, weighted by its share.

        L = mean_i [ logsumexp_j S_ij - λ_i S_ii - (1 - λ_i) S_i,π(i) ]

    with S = logit_scale · queries · keysᵀ, query i being mixed of samples i and π(i).

    Args:
        queries, keys: (N, D), L2-normalised; the keys are not mixed.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        partners: (N,) integers, π; with a group row numbers of the global batch.
        mixing: λ, from 0 to 1: a number or (N,); no gradient.
        symmetric: average with the keys as anchors, whose positives are the queries that hold a
            part of them, by the same weights, normalised.
        chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Liu et al. 2024 (M3CoL), Kim et al. 2020 (MixCo).
    """
    given = check_arguments(queries, keys, logit_scale, group, chunk_size, backend, names=PAIRED)
    queries, n, device = given.queries, len(given.queries), given.queries.device
    partners = check_ids("partners", partners, n, "queries", device)
    if group is None:  # else they are those of other ranks too, and checked as pairs
        check_rows("partners", partners, range(n), "queries")
    if isinstance(mixing, Tensor):
        share = check_values("mixing", check_bias("mixing", mixing, n, queries).detach(), 1)
    else:
        mixing = check_number("mixing", mixing, 0, 1)
        share = given.scale.new_full((n,), mixing)
    rows = global_row_numbers(n, group, device)
    options = Options(
        positive_pairs=torch.stack([rows.repeat(2), torch.cat([rows, partners])], 1),
        positive_weights=torch.cat([share, 1 - share]),
        symmetric=symmetric,
    )
    return infonce(given, options)


# A panel of similarities of queries and queue: 2^22 scores, 16 MiB in fp32.
PANEL_SCORES = 1 << 22


@torch.no_grad()
def mix_hard_negatives(
    queries: Tensor,
    queue: Tensor,
    *,
    hardest: int = 1024,
    mixed: int = 128,
    with_query: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hard negatives of each query, mixed from those of a queue: for `hard_negatives`.

        `mixed` times       normalize(α n_i + (1 - α) n_j),   α uniform in (0, 1)
        `with_query` times  normalize(β q + (1 - β) n_i),     β uniform in (0, ½)

    with n_i, n_j drawn from the `hardest` rows of the queue by inner product with the query.

    Args:
        queries, queue: (N, D) and (Q, D), L2-normalised.
        hardest: how many rows of the queue a query draws from; all if there are fewer.
        generator: of the draws, on the device of the queries.

    Returns (N, mixed + with_query, D) in the dtype of the queries, without gradient.
    Source: Kalantidis et al. 2020 (MoCHi), eq. 5 and 6.
    """
    check_pair("queries", queries, "queue", queue)
    for name, value, least in (
        ("hardest", hardest, 1),
        ("mixed", mixed, 0),
        ("with_query", with_query, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} upwards, got {value!r}")
    check_generator("generator", generator)
    n, q, device = len(queries), len(queue), queries.device
    top = min(hardest, q)
    out = queries.new_empty(n, mixed + with_query, queries.shape[1])
    bank = accumulated(queue)
    for at in row_panels(n, q, max(1, PANEL_SCORES // q)):
        rows = accumulated(queries[at])
        found = (rows @ bank.T).topk(top, dim=1).indices

        def draw(count: int, found=found) -> Tensor:
            at = torch.randint(top, (len(found), count), generator=generator, device=device)
            return bank[found.gather(1, at)]

        def uniform(count: int, high: float, found=found) -> Tensor:
            size = (len(found), count, 1)
            return high * torch.rand(size, generator=generator, device=device, dtype=bank.dtype)

        alpha, beta = uniform(mixed, 1.0), uniform(with_query, 0.5)
        pairs = alpha * draw(mixed) + (1 - alpha) * draw(mixed)
        nearer = beta * rows[:, None] + (1 - beta) * draw(with_query)
        out[at] = normalize(torch.cat([pairs, nearer], 1), dim=2)
    return out
