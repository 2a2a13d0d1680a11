"""`SupConLoss` and `NTXentLoss` of pytorch-metric-learning.

-   from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
+   from ito_kernels.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss

They are subclasses of that package's losses, with the same arguments, and work inside
`CrossBatchMemory` and `DistributedLossWrapper`. Embedding regularisers are inherited. The losses
form no score matrix, not even for pairs in a list (`indices_tuple`, from a miner,
`CrossBatchMemory` or `DistributedLossWrapper(efficient=True)`). The makers of such a list do form
the matrix, and a list of all pairs takes four times its memory. Options that would change the loss
raise a NotImplementedError that names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    BaseReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
)
from torch import Tensor
from torch.nn.functional import softplus

from ..losses.batch import check_arguments
from ..losses.common import check_temperature, scale_from_temperature
from ..losses.decoupled import softmax_over_negatives
from ..losses.infonce import multi_positive_infonce
from ..losses.precision import take_rows, to_accumulate_dtype, without_autocast
from ..options_repr import PrintsOptions
from ..similarity.panelwise import panelwise
from ..similarity.spec import check_features
from .listed_pairs import ListedPairs


class _MatrixFreeLoss(PrintsOptions):
    """A mixin that replaces `compute_loss` of a class of pytorch-metric-learning."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        check_temperature(self.temperature)
        self._check_options()

    def printed_options(self) -> dict[str, object]:
        """The options that the submodules, which torch prints, do not show."""
        names = "temperature", "embedding_reg_weight", "collect_stats"
        of_distance = ("distance", ("normalize_embeddings", "p", "power"))
        of_reducer = ("reducer", ("low", "high"))
        shown = {name: getattr(self, name) for name in names}
        for child, names in (of_distance, of_reducer):
            attributes = vars(getattr(self, child))
            shown |= {f"{child}.{name}": attributes[name] for name in names if name in attributes}
        return shown

    def _loss_reducer(self) -> BaseReducer:
        """The reducer of the loss itself. With a regulariser there is another one for that."""
        if type(self.reducer) is MultipleReducers:
            return dict(self.reducer.reducers).get("loss", self.reducer.default_reducer)
        return self.reducer

    def _check_options(self) -> None:
        name, distance, reducer = type(self).__name__, self.distance, self._loss_reducer()
        if not (_is_similarity(distance) or _is_squared_distance(distance)):
            settings = {x: getattr(distance, x, None) for x in ("p", "power")}
            raise NotImplementedError(
                f"distance: {name} of ito_kernels supports CosineSimilarity and"
                " DotProductSimilarity with power=1, and LpDistance with p=2 and power=2, got"
                f" {type(distance).__name__} with {settings}"
            )
        self._check_reducer(reducer)
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

        indices_tuple: pairs in a list, instead of those of the labels. Three tensors (a, p, n) of
            triplets, or four (a1, p, a2, n): a1[k] and p[k] are a positive pair, a2[k] and n[k] a
            negative one. Denominators have the listed pairs only.

        As in the base class, self pairs are left out if ref_labels and labels are the same tensor.
        Raises ValueError if labels are missing, or one of ref_emb and ref_labels, and ValueError or
        TypeError for an invalid `indices_tuple`.
        """
        if indices_tuple is None and labels is None:
            raise ValueError("labels are missing: they define the positive pairs")
        if indices_tuple is None and (ref_emb is None) != (ref_labels is None):
            missing = "ref_emb" if ref_emb is None else "ref_labels"
            raise ValueError(f"ref_emb and ref_labels go together: {missing} is missing")
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        self._check_options()
        check_features("embeddings", embeddings)
        check_features("ref_emb", ref_emb)
        queries = self.distance.maybe_normalize(embeddings)
        keys = queries if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        if _is_squared_distance(self.distance):
            with without_autocast(queries.device):  # as torch.cdist
                queries, keys = _with_negative_squared_distances(queries, keys)
                return self._loss_of(queries, keys, labels, ref_labels, indices_tuple)
        return self._loss_of(queries, keys, labels, ref_labels, indices_tuple)

    def _loss_of(self, queries, keys, labels, ref_labels, indices_tuple) -> dict:
        """The loss of features whose inner products are the scores of the distance."""
        if indices_tuple is not None:
            return self._loss_of_list(queries, keys, indices_tuple)
        exclude_self = ref_labels is labels
        if exclude_self:
            ids = ref_ids = torch.unique(labels, return_inverse=True)[1]
        else:
            all_labels = torch.cat([labels, ref_labels.to(labels.device)])
            ids, ref_ids = torch.unique(all_labels, return_inverse=True)[1].split(
                [len(labels), len(ref_labels)]
            )
        return self._loss_of_labels(queries, keys, ids, ref_ids, exclude_self)

    def _loss_of_list(self, queries: Tensor, keys: Tensor, indices_tuple: tuple) -> dict:
        positives, negatives = _listed_pairs(indices_tuple, queries, keys)
        if not (len(positives) and len(negatives)) or len(positives) == len(negatives) == 1:
            return self.zero_losses()  # as the base class
        scale = scale_from_temperature(self.temperature, queries)
        loss = self._panel_loss(positives, negatives)
        return self._reduced(*panelwise(loss, queries, keys, key_args=(scale,)).unbind(1))


def _is_similarity(distance: object) -> bool:
    return type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.power == 1


def _is_squared_distance(distance: object) -> bool:
    return type(distance) is LpDistance and distance.p == 2 and distance.power == 2


def _with_negative_squared_distances(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Features with the inner products 2<x, y> - ‖y‖², which are -‖x - y‖² plus a constant for each
    x. A softmax over the y is that of -‖x - y‖². The keys' mean, which changes no distance, is
    subtracted first, because small differences of large products lose digits."""
    queries, keys = to_accumulate_dtype(queries), to_accumulate_dtype(keys)
    center = keys.detach().mean(0)
    queries, keys = queries - center, keys - center
    one = queries.new_ones(len(queries), 1)
    return torch.cat([queries, one], 1), torch.cat([2 * keys, -keys.square().sum(1)[:, None]], 1)


def _listed_pairs(
    indices_tuple: tuple, queries: Tensor, keys: Tensor
) -> tuple[ListedPairs, ListedPairs]:
    """The positive and the negative pairs of triplets (a, p, n) or of pairs (a1, p, a2, n)."""
    if not isinstance(indices_tuple, (tuple, list)) or len(indices_tuple) not in (3, 4):
        size = f" of {len(indices_tuple)}" if isinstance(indices_tuple, (tuple, list)) else ""
        raise ValueError(
            "indices_tuple must be (anchors, positives, negatives) or (anchors, positives, anchors,"
            f" negatives), got {type(indices_tuple).__name__}{size}"
        )
    indices = [x.to(queries.device) if isinstance(x, Tensor) else x for x in indices_tuple]
    a1, p, a2, n = indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
    shape = len(queries), len(keys)
    return (
        ListedPairs("the positive pairs of indices_tuple", a1, p, shape),
        ListedPairs("the negative pairs of indices_tuple", a2, n, shape),
    )


def _already_reduced(loss: Tensor) -> dict:
    return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


class SupConLoss(_MatrixFreeLoss, peer.SupConLoss):
    """L_out of SupCon, by default averaged over the anchors with a positive (`AvgNonZeroReducer`).
    Other reducers get the losses of the anchors, 0 without a positive.

    With pairs in a list, each distinct pair counts once, and by default an anchor whose only
    candidate is its positive is left out of the mean.

    Differences: the base class deviates from the paper's formula. It drops anchors whose loss
    underflows to 0 from the mean, and, without a list, returns 0 for a batch without negatives or
    with at most one positive and one negative pair.
    """

    def _check_reducer(self, reducer: object) -> None:
        if not isinstance(reducer, BaseReducer):
            raise NotImplementedError(
                f"reducer: {type(self).__name__} of ito_kernels supports the reducers of"
                f" pytorch_metric_learning, got {type(reducer).__name__}"
            )

    def _loss_of_labels(self, queries, keys, ids, key_ids, exclude_self: bool) -> dict:
        default = _is_default_average(self._loss_reducer())
        losses = multi_positive_infonce(
            queries,
            keys,
            scale_from_temperature(self.temperature, queries),
            query_ids=ids,
            key_ids=key_ids,
            symmetric=False,
            exclude_self=exclude_self,
            empty="drop" if default else "zero",
            reduction="mean" if default else "none",
        )
        return _already_reduced(losses) if default else _of_anchors(losses)

    def _panel_loss(self, positives: ListedPairs, negatives: ListedPairs) -> Callable:
        def loss(products: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
            """(r, 3): the losses of the anchors, whether they are not 0 by definition, and whether
            a positive pair is also a negative one."""
            positive = positives.counts(rows, products) > 0
            negative = negatives.counts(rows, products) > 0
            number = positive.sum(1)
            anchor = number > 0
            # a row without positives takes all candidates, so that its unused gradient is finite
            candidate = positive | negative | ~anchor[:, None]
            scores = scale * products
            log_sum = scores.masked_fill(~candidate, -torch.inf).logsumexp(1)
            mean = scores.masked_fill(~positive, 0).sum(1) / number.clamp(min=1)
            losses = torch.where(anchor, log_sum - mean, 0)
            counted = anchor & (candidate.sum(1) > 1)
            return torch.stack([losses, counted, (positive & negative).any(1)], 1)

        return loss

    def _reduced(self, losses: Tensor, counted: Tensor, contradictory: Tensor) -> dict:
        if contradictory.any():
            raise ValueError("indices_tuple lists a pair as positive and as negative")
        if not _is_default_average(self._loss_reducer()):
            return _of_anchors(losses)
        return _already_reduced((losses * counted).sum() / counted.sum().clamp(min=1))


def _is_default_average(reducer: BaseReducer) -> bool:
    """Whether it averages all losses above 0."""
    return type(reducer) is AvgNonZeroReducer and reducer.low == 0 and reducer.high is None


def _of_anchors(losses: Tensor) -> dict:
    indices = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


class NTXentLoss(_MatrixFreeLoss, peer.NTXentLoss):
    """NT-Xent with a denominator of the positive and the negatives, by default averaged over the
    positive pairs (`MeanReducer`).

    `SumReducer` adds them. `AvgNonZeroReducer` averages over the pairs whose anchor has a negative.
    With pairs in a list, a pair counts as often as it is listed, as a positive and as a negative.

    Differences: without a list, the base class returns 0 for a batch with at most one positive and
    one negative pair. The loss of a pair is at most 87 in fp32 in the base class, because its
    softmax underflows, and its gradient is then 0. `AvgNonZeroReducer` there leaves out a loss that
    underflows to 0.
    """

    def _check_reducer(self, reducer: object) -> None:
        if type(reducer) not in (MeanReducer, SumReducer) and not _is_default_average(reducer):
            raise NotImplementedError(
                f"reducer: {type(self).__name__} of ito_kernels supports MeanReducer, SumReducer"
                " and AvgNonZeroReducer without arguments, because it does not form the losses of"
                f" the pairs, got {type(reducer).__name__}"
            )

    def _loss_of_labels(self, queries, keys, ids, key_ids, exclude_self: bool) -> dict:
        scale = scale_from_temperature(self.temperature, queries)
        args = check_arguments(queries, keys, scale, ids=(ids, key_ids))
        scores = args.scores(symmetric=False, exclude_self=exclude_self)
        number = scores.positive_counts("row")
        has_negatives = scores.candidate_counts("row") > number
        share = self._share(number, number * has_negatives)
        loss = softmax_over_negatives(scores, {"row": share.expand(len(queries))})
        return _already_reduced(loss)

    def _panel_loss(self, positives: ListedPairs, negatives: ListedPairs) -> Callable:
        def loss(products: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
            """(r, 3): the sums over the positive pairs of the anchors, the number of these pairs,
            and of those that are not 0 by definition."""
            negative = negatives.counts(rows, products)
            has_negatives = (negative > 0).any(1)
            # a row without negatives takes all candidates, so that its unused gradient is finite
            negative = negative.masked_fill(~has_negatives[:, None], 1)
            scores = scale * products
            log_negatives = (scores + negative.log()).logsumexp(1)
            positive = positives.positions(rows, products)
            anchor = positive // products.shape[1]
            differences = take_rows(log_negatives, anchor) - take_rows(scores.flatten(), positive)
            # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
            terms = softplus(differences, threshold=40)
            zero = torch.zeros_like(log_negatives)
            sums = zero.index_put((anchor,), terms, accumulate=True)
            number = zero.index_put((anchor,), torch.ones_like(terms), accumulate=True)
            sums = torch.where(has_negatives, sums, 0)
            return torch.stack([sums, number, number * has_negatives], 1)

        return loss

    def _reduced(self, sums: Tensor, number: Tensor, not_zero: Tensor) -> dict:
        return _already_reduced(sums.sum() * self._share(number, not_zero))

    def _share(self, number: Tensor, not_zero: Tensor) -> Tensor:
        """The weight of a positive pair. For each anchor, number: of its positive pairs; not_zero:
        of those whose loss is not 0 by definition."""
        reducer = self._loss_reducer()
        if type(reducer) is SumReducer:
            return torch.ones_like(number[0])
        counted = number if type(reducer) is MeanReducer else not_zero
        return 1 / counted.sum().clamp(min=1)
