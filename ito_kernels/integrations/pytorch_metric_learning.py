"""`SupConLoss` and `NTXentLoss` of pytorch-metric-learning.

-   from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
+   from ito_kernels.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss

They are subclasses of that package's losses, with the same arguments, and work inside
`CrossBatchMemory` and `DistributedLossWrapper`. Embedding regularisers are inherited. Options that
would change the loss raise NotImplementedError that names them: reducers other than the default,
distances that are not an inner product, `collect_stats`.

Pairs in a list (`indices_tuple`, from a miner, `CrossBatchMemory` or
`DistributedLossWrapper(efficient=True)`) are computed by the base class with the dense matrix.
Miners form that matrix too, and a list of all pairs takes four times its memory.
"""

from __future__ import annotations

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import BaseReducer, MultipleReducers
from torch import Tensor

from ..losses.batch import check_arguments
from ..losses.common import check_temperature, scale_from_temperature
from ..losses.decoupled import softmax_over_negatives
from ..losses.infonce import multi_positive_infonce
from ..similarity.spec import check_features


class _MatrixFreeLoss:
    """A mixin that replaces `compute_loss` of a class of pytorch-metric-learning."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        check_temperature(self.temperature)
        self._check_options()

    def _check_options(self) -> None:
        name, distance, reducer = type(self).__name__, self.distance, self.reducer
        if type(reducer) is MultipleReducers:  # one for the loss, one for a regulariser
            reducer = dict(reducer.reducers).get("loss", reducer.default_reducer)
        if type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.power != 1:
            raise NotImplementedError(
                f"distance: {name} of ito_kernels supports CosineSimilarity and"
                f" DotProductSimilarity with power=1, got {type(distance).__name__}"
            )
        if _reducer_key(reducer) != _reducer_key(self.get_default_reducer()):
            default = type(self.get_default_reducer()).__name__
            raise NotImplementedError(
                f"reducer: {name} of ito_kernels supports the default {default}() without"
                f" arguments, got {type(reducer).__name__}"
            )
        if self.collect_stats or distance.collect_stats or reducer.collect_stats:
            raise NotImplementedError(
                f"collect_stats: {name} of ito_kernels does not form the scores of the statistics"
            )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,) against ref_emb (M, D) with ref_labels
        (M,), by default against themselves.

        As in the base class, self pairs are left out if ref_labels and labels are the same tensor.
        Raises ValueError if labels are missing, or one of ref_emb and ref_labels.
        """
        if indices_tuple is None and labels is None:
            raise ValueError("labels are missing: they define the positive pairs")
        if indices_tuple is None and (ref_emb is None) != (ref_labels is None):
            missing = "ref_emb" if ref_emb is None else "ref_labels"
            raise ValueError(f"ref_emb and ref_labels go together: {missing} is missing")
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        self._check_options()
        if indices_tuple is not None:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        check_features("embeddings", embeddings)
        check_features("ref_emb", ref_emb)
        exclude_self = ref_labels is labels
        if exclude_self:
            ids = ref_ids = torch.unique(labels, return_inverse=True)[1]
        else:
            all_labels = torch.cat([labels, ref_labels.to(labels.device)])
            ids, ref_ids = torch.unique(all_labels, return_inverse=True)[1].split(
                [len(labels), len(ref_labels)]
            )
        queries = self.distance.maybe_normalize(embeddings)
        keys = queries if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        loss = self._loss(queries, keys, ids, ref_ids, exclude_self)
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


def _reducer_key(reducer: BaseReducer) -> tuple:
    """The type and the settings by which the supported reducer is recognised."""
    return type(reducer), *(getattr(reducer, x, None) for x in ("low", "high"))


class SupConLoss(_MatrixFreeLoss, peer.SupConLoss):
    """L_out of SupCon, averaged over the anchors with a positive (`AvgNonZeroReducer`).

    Differences: the base class deviates from the paper's formula. It drops anchors whose loss
    underflows to 0 from the mean, and returns 0 for a batch without negatives or with at most one
    positive and one negative pair.
    """

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


class NTXentLoss(_MatrixFreeLoss, peer.NTXentLoss):
    """NT-Xent with a denominator of the positive and the negatives, averaged over the positive
    pairs (`MeanReducer`).

    Differences: the base class returns 0 for a batch with at most one positive and one negative
    pair. There the loss of a pair is at most 87 in fp32, where its softmax underflows and the
    gradient becomes 0.
    """

    def _loss(self, queries, keys, ids, key_ids, exclude_self: bool) -> Tensor:
        scale = scale_from_temperature(self.temperature, queries)
        args = check_arguments(queries, keys, scale, ids=(ids, key_ids))
        scores = args.scores(symmetric=False, exclude_self=exclude_self)
        number = scores.positive_counts("row").sum().clamp(min=1)
        return softmax_over_negatives(scores, {"row": (1 / number).expand(len(queries))})
