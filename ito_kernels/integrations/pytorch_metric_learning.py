"""`SupConLoss` and `NTXentLoss` of pytorch-metric-learning.

-   from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
+   from ito_kernels.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss

Embeddings are L2-normalised first, as there by default. Miners (`indices_tuple`) choose single
pairs of the matrix that is never formed: they raise, as do other distances, reducers and
regularisers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses.batch import check_arguments
from ..losses.common import normalized, scale_from_temperature
from ..losses.decoupled import softmax_over_negatives
from ..losses.infonce import multi_positive_infonce
from ..similarity.spec import check_features, check_ids


class _Loss(nn.Module):
    def __init__(self, temperature: float, **options):
        super().__init__()
        if options:
            raise NotImplementedError(
                f"{', '.join(options)}: {type(self).__name__} of ito_kernels has cosine similarity"
                " and the reducer that its namesake has by default"
            )
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings: (N, D), labels: (N,); compared with ref_emb (M, D) and ref_labels (M,) where
        they are given, else with each other."""
        if indices_tuple is not None:
            raise NotImplementedError("indices_tuple: the pairs of a miner need the dense matrix")
        if labels is None:
            raise ValueError("labels are needed: they say which pairs are positive")
        check_features("embeddings", embeddings)
        device = embeddings.device
        labels = check_ids("labels", labels.to(device), len(embeddings), "embeddings", device)
        if (ref_emb is None) != (ref_labels is None):
            missing = "ref_emb" if ref_emb is None else "ref_labels"
            raise ValueError(f"ref_emb and ref_labels go together: {missing} is missing")
        queries = normalized(embeddings, None)
        if ref_emb is None:
            labels = labels - labels.min()  # -1 is a label like any other there
            return self._loss(queries, queries, labels, labels, exclude_self=True)
        check_features("ref_emb", ref_emb)
        ref_labels = check_ids("ref_labels", ref_labels.to(device), len(ref_emb), "ref_emb", device)
        least = torch.minimum(labels.min(), ref_labels.min())
        keys = normalized(ref_emb, None)
        return self._loss(queries, keys, labels - least, ref_labels - least, False)


class SupConLoss(_Loss):
    """L_out of SupCon: mean over the anchors with a positive (`AvgNonZeroReducer`).

    Two differences, where the peer leaves the paper's formula: it drops anchors whose loss has
    underflowed to 0 from the mean, and returns 0 for a batch of one label.
    """

    def __init__(self, temperature: float = 0.1, **options):
        super().__init__(temperature, **options)

    def _loss(self, queries, keys, ids, key_ids, exclude_self: bool) -> Tensor:
        return multi_positive_infonce(
            queries,
            keys,
            scale_from_temperature(self.temperature, queries),
            query_ids=ids,
            key_ids=key_ids,
            symmetric=False,
            exclude_self=exclude_self,
            empty="drop",
        )


class NTXentLoss(_Loss):
    """Each positive against the negatives alone: mean over the positive pairs (`MeanReducer`)."""

    def __init__(self, temperature: float = 0.07, **options):
        super().__init__(temperature, **options)

    def _loss(self, queries, keys, ids, key_ids, exclude_self: bool) -> Tensor:
        scale = scale_from_temperature(self.temperature, queries)
        given = check_arguments(queries, keys, scale, ids=(ids, key_ids))
        scores = given.scores(symmetric=False, exclude_self=exclude_self)
        number = scores.positives("row").sum().clamp(min=1)
        return softmax_over_negatives(scores, {"row": (1 / number).expand(len(queries))})
