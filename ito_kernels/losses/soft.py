"""Targets that are not positives and negatives: every key is one to a degree.

Of a target distribution q the loss needs Σ_j q_ij S_ij alone, and neither q nor S is ever formed:
where q is linear in an embedding this is a product of D × D_c matrices, where it is a softmax it is
attention. Target and logsumexp meet outside the kernels: bf16 and fp16 are computed in fp32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from ..distributed import check_chunk_size, whole_batch
from ..similarity.pairs import finite_shift
from ..similarity.spec import check_features, check_pair, check_scale
from .batch import Batch
from .options import check_number
from .precision import accumulated, as_autocast, inner, without_autocast


def cwcl_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    reference: Tensor,
    symmetric: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Continuously weighted contrastive loss: the more alike two items, the more positive.

        L = mean_i [ logsumexp_j S_ij - Σ_j w_ij S_ij / Σ_j w_ij ],   w_ij = ½ + ½<c_i, c_j>

    with S = logit_scale · queries · keysᵀ and the embedding c of a frozen model. Time of the second
    term: O(N·D·D_c).

    Args:
        queries, keys: (N, D), L2-normalised; row i of both belongs together.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        reference: (N, D_c), c, L2-normalised; takes no gradient.
        symmetric: average with the same along the columns.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Srinivasa et al. 2023 (CWCL).
    """
    batch = _paired(queries, keys, logit_scale, symmetric, backend, group, chunk_size)
    c = _target("reference", reference, len(queries), batch)
    with without_autocast(queries.device):
        everyones = batch.whole.shared_sum
        weight = 0.5 * (batch.whole.number_of_keys + (c * everyones(c.sum(0))).sum(1))

        def target(mine: Tensor, others: Tensor) -> Tensor:
            weighted = c @ everyones(c.T @ others)  # Σ_j <c_i, c_j> other_j
            return 0.5 * (mine * (everyones(others.sum(0)) + weighted)).sum(1) / weight

        return _soft_cross_entropy(batch, target, target)


def soft_target_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    target_queries: Tensor,
    target_keys: Tensor,
    target_scale: float | Tensor,
    alpha: float = 1.0,
    symmetric: bool = True,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy against the softmax of other embeddings: distillation, momentum teachers.

        L = mean_i [ logsumexp_j S_ij - Σ_j q_ij S_ij ]
        q_ij = alpha · softmax_j(target_scale · <c_i, e_j>) + (1 - alpha) · [i = j]

    with S = logit_scale · queries · keysᵀ; where symmetric the mean of this and the same along the
    columns, with the softmax over i. Σ_j q_ij S_ij is attention of c to e with the keys as values.

    Args:
        queries, keys: (N, D) and (M, D), L2-normalised. N must equal M unless alpha = 1.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        target_queries, target_keys: (N, D_c) and (M, D_c), c and e, L2-normalised; no gradient.
        target_scale: the teacher's multiplier: a number or a 0-d tensor; no gradient.
        alpha: the share of the soft targets, from 0 to 1.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Li et al. 2021 (ALBEF), eq. 6.
    """
    alpha = check_number("alpha", alpha, 0, 1)
    batch = _paired(
        queries, keys, logit_scale, symmetric, backend, group, chunk_size, square=alpha < 1
    )
    check_pair("target_queries", target_queries, "target_keys", target_keys)
    c = _target("target_queries", target_queries, len(queries), batch)
    e = _target("target_keys", target_keys, len(keys), batch)
    scale = check_scale("target_scale", target_scale, c).detach()
    if scale.ndim:
        raise ValueError(f"target_scale must be one for all, got shape {tuple(scale.shape)}")
    everyones = batch.whole.rows
    with without_autocast(queries.device):

        def target(c: Tensor, e: Tensor, mine: Tensor, others: Tensor) -> Tensor:
            score = 0
            if alpha > 0:
                score = alpha * inner(mine, attention(scale * c, everyones(e), everyones(others)))
            return score + (1 - alpha) * inner(mine, others) if alpha < 1 else score

        return _soft_cross_entropy(
            batch,
            lambda mine, others: target(c, e, mine, others),
            lambda mine, others: target(e, c, mine, others),
        )


def _paired(
    queries, keys, logit_scale, symmetric, backend, group, chunk_size, square=True
) -> Batch:
    """The batch, without ids: all that counts is that rows belong together where `square`."""
    check_chunk_size(chunk_size)
    check_pair("queries", queries, "keys", keys)
    n, m = len(queries), len(keys)
    if square and n != m:
        raise ValueError(f"queries and keys must have as many rows, got {n} and {m}")
    scale = check_scale("logit_scale", logit_scale, queries)
    queries, keys = (accumulated(as_autocast(x)) for x in (queries, keys))
    whole = whole_batch(group, queries, keys, chunk_size=chunk_size)
    return Batch(whole, queries, keys, scale, symmetric, backend)


def _target(name: str, x: object, rows: int, batch: Batch) -> Tensor:
    """A frozen embedding in the dtype of the computation."""
    check_features(name, x)
    if len(x) != rows:
        raise ValueError(f"{name} must have {rows} rows, got {len(x)}")
    if x.device != batch.queries.device:
        raise ValueError(f"{name} must be on {batch.queries.device}, got {x.device}")
    return x.detach().to(batch.queries.dtype)


def _soft_cross_entropy(batch: Batch, row_target, col_target) -> Tensor:
    """mean_i [ logsumexp_j S_ij - target_i ]. A target takes the anchors, scaled, and the others,
    and gives Σ_j q_ij <anchor_i, other_j>."""
    scaled = batch.scale.reshape(-1, 1) * batch.queries
    losses = []
    for side, found in batch.statistics().items():
        row = side == "row"
        target = row_target(scaled, batch.keys) if row else col_target(batch.keys, scaled)
        losses.append(batch.mean(side, found.logsum - (target - finite_shift(found.max))))
    return sum(losses) / len(losses)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(queries · keysᵀ) · values, never by PyTorch's N × M form: on the CPU that is avoided
    where keys and values have one width, on the GPU a kernel that cannot run says so."""
    width = -(-max(keys.shape[1], values.shape[1]) // 8) * 8  # which the GPU's kernels want
    q, k, v = (pad(x, (0, width - x.shape[1]))[None, None] for x in (queries, keys, values))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = scaled_dot_product_attention(q, k, v, scale=1.0)
    return out[0, 0, :, : values.shape[1]]
