"""`MultipleNegativesRankingLoss` of sentence-transformers, and its cached form.

-   from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
+   from ito_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

They are subclasses that replace only the loss of the embeddings. Arguments, encoding and gradient
caching are inherited. All directions, both partition modes and gathering across devices are
supported. Hardness modes, and similarities other than the cosine and the inner product, raise
NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor
from torch.nn.functional import normalize

from ..distributed import global_batch, global_row_numbers
from ..losses.precision import row_dot, to_accumulate_dtype, to_autocast_dtype, without_autocast
from ..similarity.spec import check_scale
from .gathering import gathering_group


class MultipleNegativesRankingLoss(peer.MultipleNegativesRankingLoss):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        _check_hardness(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        return _ranking_loss(self, embeddings[0], list(embeddings[1:]))


class CachedMultipleNegativesRankingLoss(peer.CachedMultipleNegativesRankingLoss):
    """The loss is computed for the whole batch at once, because no score matrix is formed. Only the
    encoder runs in mini-batches."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        _check_hardness(self)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        columns = [torch.cat(column) for column in reps]
        loss = _ranking_loss(self, columns[0], columns[1:])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _check_hardness(settings) -> None:
    if settings.hardness_mode is not None and settings.hardness_strength > 0:
        raise NotImplementedError("hardness_mode is not in this version of ito_kernels")


def _similarity(function: Callable, like: Tensor) -> Callable:
    """Return cos_sim or dot_score, whichever gives the same results as `function`.

    Wrappers are recognised by their results for four rows. The rows have the width of the
    embeddings, because a wrapper may truncate them.
    """
    if function in (cos_sim, dot_score):
        return function
    numbers = torch.arange(1.0, 8 * like.shape[1] + 1, device=like.device).sin()
    lengths = torch.arange(1.0, 5, device=like.device)[:, None]
    a, b = lengths * numbers.view(2, 4, -1)
    with torch.no_grad(), without_autocast(like.device):
        result = function(a, b)
        for candidate in (cos_sim, dot_score):
            scores = candidate(a, b)
            if (
                isinstance(result, Tensor)
                and result.shape == scores.shape
                and (result - scores).abs().max() <= 1e-5 * scores.abs().max()
            ):
                return candidate
    raise NotImplementedError(
        "similarity_fct must be cos_sim or dot_score of sentence_transformers.util, or return the"
        f" same values, got {function!r}"
    )


def _ranking_loss(settings, queries: Tensor, docs: list[Tensor]) -> Tensor:
    """mean_i [ log Z_i - S_ii ]

    Z_i is the sum over the candidates of all directions ("joint"), or the geometric mean of the
    sums of the directions ("per_direction").

    Args:
        queries: (N, D).
        docs: the positives and each column of negatives, (N, D) each.

    Half precision is computed in fp32, because positives and denominators are combined outside the
    kernels. When gathering, the candidates are those of all ranks and the mean is over this rank's
    queries, as in the base class.
    """
    _check_hardness(settings)
    similarity = _similarity(settings.similarity_fct, queries)
    group = gathering_group(settings.gather_across_devices)
    queries, *docs = (to_accumulate_dtype(to_autocast_dtype(x)) for x in (queries, *docs))
    with without_autocast(queries.device):
        if similarity is cos_sim:
            queries, *docs = (normalize(x, dim=1) for x in (queries, *docs))
        scale = check_scale("scale", settings.scale, queries)
        positives, all_docs = docs[0], torch.cat(docs)

        def logsumexp(a: Tensor, b: Tensor, ids=(None, None), **options) -> Tensor:
            batch = global_batch(group, a, b, *ids)
            ids = {"row_ids": batch.query_ids, "col_ids": batch.key_ids}
            stats = batch.similarity_logsumexp(a, b, scale, cols=False, **ids, **options)
            return stats.row_max + stats.row_logsum

        def doc_to_doc() -> Tensor:
            rows = global_row_numbers(len(queries), group, queries.device)
            ids = rows, rows.repeat(len(docs))
            return logsumexp(positives, all_docs, ids, exclude_positives=True)

        directions = {
            "query_to_doc": lambda: logsumexp(queries, all_docs),
            "query_to_query": lambda: logsumexp(queries, queries, exclude_self=True),
            "doc_to_query": lambda: logsumexp(positives, queries),
            "doc_to_doc": doc_to_doc,
        }
        log_sums = torch.stack([directions[name]() for name in settings.directions])
        joint = settings.partition_mode == "joint"
        log_z = log_sums.logsumexp(0) if joint else log_sums.mean(0)
        return (log_z - scale * row_dot(queries, positives)).mean()
