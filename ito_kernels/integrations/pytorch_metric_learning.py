"""`SupConLoss` and `NTXentLoss` of pytorch-metric-learning.

-   from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
+   from ito_kernels.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss

They are subclasses of theirs, with the same arguments, and go into `CrossBatchMemory` and
`DistributedLossWrapper`. Embedding regularisers are theirs. Only what would give another loss is
refused, by name: reducers other than the loss's own, distances that are no inner product,
`collect_stats`.

Pairs given as a list (`indices_tuple`: those of a miner, of `CrossBatchMemory` and of
`DistributedLossWrapper(efficient=True)`) are computed by theirs, with the dense matrix: miners form
it too, and a list of all pairs takes four times its memory.
"""

from __future__ import annotations

import torch
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import BaseReducer, MultipleReducers
from torch import Tensor

from ..losses.batch import check_arguments
from ..losses.common import check_temperature, scale_from_temperature
from ..losses.decoupled import softmax_over_negatives
from ..losses.infonce import multi_positive_infonce
from ..similarity.spec import check_features


class _WithoutMatrix:
    """What the two have in common, before a class of theirs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        check_temperature(self.temperature)
        self._check_options()

    def _check_options(self) -> None:
        name, distance, reducer = type(self).__name__, self.distance, self.reducer
        if type(reducer) is MultipleReducers:  # beside that of a regulariser
            reducer = dict(reducer.reducers).get("loss", reducer.default_reducer)
        if type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.power != 1:
            raise NotImplementedError(
                f"distance: {name} of ito_kernels has CosineSimilarity and DotProductSimilarity,"
                f" with power=1, got {type(distance).__name__}"
            )
        if _kind(reducer) != _kind(self.get_default_reducer()):
            default = type(self.get_default_reducer()).__name__
            raise NotImplementedError(
                f"reducer: {name} of ito_kernels has {default}() as by default, without arguments,"
                f" got {type(reducer).__name__}"
            )
        if self.collect_stats or distance.collect_stats or reducer.collect_stats:
            raise NotImplementedError(
                f"collect_stats: {name} of ito_kernels forms no scores to take statistics of"
            )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings: (N, D), labels: (N,); compared with ref_emb (M, D) and ref_labels (M,) where
        they are given, else with each other. As there, an embedding is not compared with itself
        where ref_labels are labels, the same tensor."""
        if indices_tuple is None and labels is None:
            raise ValueError("labels are needed: they say which pairs are positive")
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
        itself = ref_labels is labels
        if itself:
            ids = ref_ids = torch.unique(labels, return_inverse=True)[1]
        else:
            both = torch.cat([labels, ref_labels.to(labels.device)])
            ids, ref_ids = torch.unique(both, return_inverse=True)[1].split(
                [len(labels), len(ref_labels)]
            )
        queries = self.distance.maybe_normalize(embeddings)
        keys = queries if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        loss = self._loss(queries, keys, ids, ref_ids, itself)
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


def _kind(reducer: BaseReducer) -> tuple:
    """What tells the reducers that are supported from all others."""
    return type(reducer), *(getattr(reducer, x, None) for x in ("low", "high"))


class SupConLoss(_WithoutMatrix, theirs.SupConLoss):
    """L_out of SupCon: mean over the anchors with a positive (`AvgNonZeroReducer`).

    Differences, where the peer leaves the paper's formula: it drops anchors whose loss has
    underflowed to 0 from the mean, and returns 0 for a batch without a negative, or with at most
    one positive and one negative pair.
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


class NTXentLoss(_WithoutMatrix, theirs.NTXentLoss):
    """Each positive against the negatives alone: mean over the positive pairs (`MeanReducer`).

    Differences: the peer returns 0 for a batch with at most one positive and one negative pair, and
    a pair's loss and its gradient end where its softmax underflows, at 87 in fp32.
    """

    def _loss(self, queries, keys, ids, key_ids, exclude_self: bool) -> Tensor:
        scale = scale_from_temperature(self.temperature, queries)
        args = check_arguments(queries, keys, scale, ids=(ids, key_ids))
        scores = args.scores(symmetric=False, exclude_self=exclude_self)
        number = scores.positive_counts("row").sum().clamp(min=1)
        return softmax_over_negatives(scores, {"row": (1 / number).expand(len(queries))})
