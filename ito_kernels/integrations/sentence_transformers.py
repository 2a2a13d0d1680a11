"""`MultipleNegativesRankingLoss` of sentence-transformers, and its cached form.

-   from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
+   from ito_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

Everything but the loss of the embeddings is theirs: arguments, encoding, gradient caching. All
directions and both partition modes; similarities other than the cosine and the inner product,
hardness modes and gathering across devices raise.
"""

from __future__ import annotations

import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor
from torch.nn.functional import normalize

from ..losses.precision import accumulated, as_autocast, inner, without_autocast
from ..similarity import similarity_logsumexp


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        return _ranking_loss(self, embeddings[0], list(embeddings[1:]))


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """The score matrix needs no mini-batches, so that the cache is of the encoder alone."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        columns = [torch.cat(column) for column in reps]
        loss = _ranking_loss(self, columns[0], columns[1:])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _ranking_loss(settings, queries: Tensor, docs: list[Tensor]) -> Tensor:
    """mean_i [ log Z_i - S_ii ], with Z_i the sum over the candidates of all directions ("joint")
    or the geometric mean of their sums ("per_direction").

    queries: (N, D). docs: the positives and each column of negatives, (N, D). In half precision
    they are computed in fp32: positives and denominators meet outside the kernels.
    """
    if settings.similarity_fct not in (cos_sim, dot_score):
        raise NotImplementedError("similarity_fct must be cos_sim or dot_score")
    if settings.hardness_mode is not None and settings.hardness_strength > 0:
        raise NotImplementedError("hardness_mode is not in this version of ito_kernels")
    if settings.gather_across_devices:
        raise NotImplementedError("gather_across_devices is not in this version of ito_kernels")
    queries, *docs = (accumulated(as_autocast(x)) for x in (queries, *docs))
    with without_autocast(queries.device):
        if settings.similarity_fct is cos_sim:
            queries, *docs = (normalize(x, dim=1) for x in (queries, *docs))
        scale, rows = float(settings.scale), torch.arange(len(queries), device=queries.device)
        positives, everything = docs[0], torch.cat(docs)

        def log_sum(a: Tensor, b: Tensor, **leave_out) -> Tensor:
            stats = similarity_logsumexp(a, b, scale, cols=False, **leave_out)
            return stats.row_max + stats.row_logsum

        own = {"row_ids": rows, "col_ids": rows.repeat(len(docs)), "exclude_positives": True}
        directions = {
            "query_to_doc": lambda: log_sum(queries, everything),
            "query_to_query": lambda: log_sum(queries, queries, exclude_self=True),
            "doc_to_query": lambda: log_sum(positives, queries),
            "doc_to_doc": lambda: log_sum(positives, everything, **own),
        }
        log_sums = torch.stack([directions[name]() for name in settings.directions])
        joint = settings.partition_mode == "joint"
        log_z = log_sums.logsumexp(0) if joint else log_sums.mean(0)
        return (log_z - scale * inner(queries, positives)).mean()
