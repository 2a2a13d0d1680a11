"""Losses and negatives from mixed samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..distributed import global_ranges, same_on_every_rank
from ..similarity.panelwise import row_panels
from ..similarity.spec import check_bias, check_ids, check_pair
from .batch import PAIRED, check_arguments
from .common import check_choice, check_flags, check_generator
from .options import check_number, check_row_numbers, check_value_range
from .positive_pairs import PositivePairs, PositivesByPair
from .precision import to_accumulate_dtype, without_autocast


@same_on_every_rank(free=("mixing",))
def mixup_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    partners: Tensor,
    mixing: float | Tensor,
    symmetric: bool = False,
    key_targets: str = "normalized",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of mixed samples: the keys of both mixed samples are positives, weighted by λ.

        L = mean_i [ logsumexp_j S_ij - λ_i S_ii - (1 - λ_i) S_i,π(i) ]

    with S = logit_scale · queries · keysᵀ. Query i is a mixture of the samples i and π(i).

    Args:
        queries, keys: (N, D), L2-normalised; dtypes as in `multi_positive_infonce` (bf16 and fp16
            are computed in fp32). The keys are not mixed.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), one per query.
        partners: π, (N,) integers. With a group these are row numbers of the global batch. Checking
            them synchronises with the device.
        mixing: λ from 0 to 1, a number or (N,); no gradient.
        symmetric: average with key→query, mean_j Σ_i T_ij (logsumexp_n S_nj - S_ij). The positives
            of key j are the queries that contain its sample; a key in no query contributes 0.
        key_targets: with symmetric, the weights T_ij of these positives: "normalized", λ_i and
            1 - λ_i divided by their sum over i; or "sum", as they are, so that a key counts by
            their sum.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`, and
    ValueError for key_targets="sum" without symmetric.
    Sources: Kumar et al. 2024 (M3CoL): symmetric=True with key_targets="sum", for one mixed
    modality; the authors' code adds the losses of both, and gives a sample that is its own partner
    the weight 1 - λ instead of 1. Kim et al. 2020 (MixCo): symmetric=False; their code mixes the
    two halves of a batch, for which `multi_positive_infonce` takes positive_pairs with
    positive_weights. key_targets="normalized" is in neither.
    """
    check_flags(symmetric=symmetric)
    check_choice("key_targets", key_targets, ("normalized", "sum"))
    if key_targets == "sum" and not symmetric:
        raise ValueError(
            "key_targets='sum' weights the key→query direction: it needs symmetric=True, got False"
        )
    args = check_arguments(queries, keys, logit_scale, group, chunk_size, backend, names=PAIRED)
    queries, n, device = args.queries, len(args.queries), args.queries.device
    partners = check_ids("partners", partners, n, "queries", device)
    if isinstance(mixing, Tensor):
        share = check_value_range("mixing", check_bias("mixing", mixing, n, queries).detach(), 1)
    else:
        mixing = check_number("mixing", mixing, 0, 1)
        share = args.scale.new_full((n,), mixing)
    rows, cols = global_ranges(n, n, group, device)
    check_row_numbers("partners", partners, cols, "queries")
    scores = args.scores(symmetric)
    with without_autocast(device):
        own = torch.arange(n, device=device)
        pairs = PositivePairs(
            scores,
            rows=own.repeat(2),
            cols=torch.cat([own + rows.start, partners]),
            weights=torch.cat([share, 1 - share]),
        )
        losses = []
        for side, direction in scores.statistics().items():
            positives = PositivesByPair(pairs, side)
            k = positives.count()
            weight = k if key_targets == "sum" else (k > 0)
            loss = direction.logsum - positives.mean(direction.shift)
            losses.append(scores.mean(side, weight * loss))
        return sum(losses) / len(losses)


# Similarities of queries and queue in one panel: 2^22 scores are 16 MiB in fp32.
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
    """Synthetic hard negatives for the argument `hard_negatives`, mixed from rows of a queue.

        `mixed` of them       normalize(α n_i + (1 - α) n_j),   α uniform in (0, 1)
        `with_query` of them  normalize(β q + (1 - β) n_i),     β uniform in (0, ½)

    for each query q. n_i and n_j are drawn from the `hardest` rows of the queue, those with the
    largest inner products with q.

    Args:
        queries, queue: (N, D) and (Q, D), L2-normalised; dtypes as in `multi_positive_infonce`.
        hardest: the number of rows of the queue to draw from; at most Q are used.
        mixed, with_query: the numbers of negatives of each kind, 0 or more.
        generator: random generator on the device of the queries; None takes PyTorch's default.

    Returns (N, mixed + with_query, D) in the dtype of the queries, without gradient.
    Raises TypeError or ValueError that names an invalid argument.
    Source: Kalantidis et al. 2020 (MoCHi), sections 4.1 and 4.2.
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
    candidates = min(hardest, q)
    out = queries.new_empty(n, mixed + with_query, queries.shape[1])
    bank = to_accumulate_dtype(queue)
    for panel in row_panels(n, q, max(1, PANEL_SCORES // q)):
        rows = to_accumulate_dtype(queries[panel])
        indices = (rows @ bank.T).topk(candidates, dim=1).indices

        def draw(count: int, indices=indices) -> Tensor:
            size = (len(indices), count)
            choice = torch.randint(candidates, size, generator=generator, device=device)
            return bank[indices.gather(1, choice)]

        def uniform(count: int, high: float, indices=indices) -> Tensor:
            size = (len(indices), count, 1)
            return high * torch.rand(size, generator=generator, device=device, dtype=bank.dtype)

        alpha, beta = uniform(mixed, 1.0), uniform(with_query, 0.5)
        pairs = alpha * draw(mixed) + (1 - alpha) * draw(mixed)
        with_queries = beta * rows[:, None] + (1 - beta) * draw(with_query)
        out[panel] = normalize(torch.cat([pairs, with_queries], 1), dim=2)
    return out
