"""InfoNCE with any number of positives per anchor."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import (
    GlobalBatch,
    LocalBatch,
    check_chunk_size,
    global_numbers,
    same_on_every_rank,
    whole_batch,
)
from ..similarity.pairs import count_positives
from ..similarity.spec import SideStats, Stats, accumulate_dtype, check_ids, check_pair, check_scale
from .common import REDUCTIONS, check_choice, check_flags, normalized
from .composed import infonce_with_options
from .options import Options, check_options, placed_pairs


@same_on_every_rank
def multi_positive_infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    positives: str = "mean",
    symmetric: bool = True,
    exclude_self: bool = False,
    empty: str = "zero",
    label_smoothing: float = 0.0,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    key_bias: Tensor | None = None,
    positive_pairs: Tensor | None = None,
    positive_weights: Tensor | None = None,
    queue: Tensor | None = None,
    queue_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    false_negative_margin: float | None = None,
    debias: float | Tensor | None = None,
    hardness: float | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple:
    """Contrastive loss of queries against keys, with in-batch negatives.

    With S = logit_scale · queries · keysᵀ, D_i = Σ_j exp S_ij and the k_i positives P_i of
    query i, a query's loss is

        "mean"  log D_i - (1/k_i) Σ_{j ∈ P_i} S_ij             L_out of SupCon
        "in"    log D_i - log Σ_{j ∈ P_i} exp(S_ij) + log k_i  L_in of SupCon
        "sum"   log D_i - log Σ_{j ∈ P_i} exp(S_ij)            MIL-NCE

    and a key's is the same along the columns, with its own number of positives k'_j. S is never
    formed: memory is O((N + M)·D).

    Args:
        queries, keys: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked
            backends), L2-normalised unless `normalize`.
        logit_scale: the multiplier itself (1 / temperature), not its logarithm: a number, a 0-d
            tensor or an (N,) tensor.
        query_ids, key_ids: (N,) and (M,) integers; equal ids are positives. Each defaults to the
            row number, then N must equal M. A negative id is a padded row: no anchor, no candidate,
            no part of the mean; its features are not looked at.
        positives: "mean", "in" or "sum", as above.
        symmetric: average query→key and key→query; else query→key alone.
        exclude_self: leave out the pairs (i, i): for queries and keys of one tower. Needs N = M,
            and ids: without them (i, i) are the only positives, and the loss is 0.
        empty: an anchor without a positive counts as 0 in the mean ("zero"), or is left out of
            it ("drop"; 0 if none is left).
        label_smoothing: ε, a number from 0 to 1: (1 - ε)·loss + ε·(log D_i - mean of S over all
            candidates of i), as `F.cross_entropy`.
        query_weights, key_weights: (N,) and (M,): each anchor's loss is multiplied by its weight,
            and the mean divides by their sum. Constants.
        key_bias: (M,), added to the scores of each key: -log q_j corrects for the frequency of
            keys that are sampled (logQ). For query→key.
        positive_pairs, positive_weights: (P, 2) integers, pairs (i, j) in place of the ids where
            positives are no partition, and (P,) weights: P_i becomes a weighted mean, of S ("mean")
            or of exp S ("in"). A pair that is listed twice counts twice as a positive and once in
            D_i; one with a weight of 0 is a negative. Memory O(P·D). With debias or hardness their
            negatives are summed in PyTorch, a panel of rows at a time, whatever the backend.
        queue, queue_ids: (Q, D) keys without gradient, further negatives for query→key, and (Q,)
            integers: those with a query's id are left out of it, those with a negative id of all.
        hard_negatives: (N, K, D), further negatives of their own query alone, with gradient. For
            query→key.
        false_negative_margin: m: a candidate that is no positive leaves D_i if its inner product
            with the anchor is above that of the anchor's largest positive by more than m. Queue
            and hard negatives too; in key→query with the key as the anchor. One or two more passes
            over S, or none with symmetric=False; and one for each direction with debias or
            hardness, which need the number of those that are left. label_smoothing is over those
            that are left: their sum, and in key→query with one logit_scale for each query D too,
            are formed in PyTorch, a panel of rows at a time, whatever the backend.
        debias: τ⁺ < 1, the share of negatives that are false, a number or (N,). The negatives' part
            of D_i becomes max{(Σ_neg exp S - n·τ⁺·mean_pos exp S) / (1 - τ⁺), n·exp(-logit_scale)}
            with n the number of negatives. Both directions (a τ⁺ per query: then N = M).
        hardness: β ≥ 0: negatives are weighted by exp(βS), relative to the mean of exp(βS) over
            them, before they are debiased. Both directions. Three passes over S instead of one.
        normalize: L2-normalise queries, keys, queue and hard negatives first.
        reduction: "mean" over the anchors, "sum", or "none": (N,), as a pair (N,), (M,) where
            symmetric.
        return_stats: also return a dict without gradients: `row_loss`, `row_lse` (N,), `col_loss`,
            `col_lse` (M,), without the weights, with log D as lse; means over the anchors with a
            positive: `row_accuracy`, `col_accuracy` (the largest score of the anchor is
            a positive's; a tie with a negative counts as wrong) and `positive_score`;
            `hardest_negative_score`, the mean over the queries that have a negative. The last four
            are of the batch, in units of S. `col_*` is None unless symmetric; with positive_pairs
            so are the accuracies and the hardest negative, which the kernels find by ids.
        backend: see `ito_kernels.backends()`; None chooses. What torch.compile has compiled keeps
            the backend it was compiled with, whatever `use_backend` and ITO_BACKEND say later.

        group: a process group or a one-dimensional DeviceMesh: the batch is that of all its ranks,
            each of which gives its own rows and gets the global loss, with gradients that are
            those of one process on the whole batch once averaged over ranks (DDP, FSDP). Ids
            count across ranks and default to global row numbers; means divide by global counts;
            what is per anchor is this rank's, `queue` and `hard_negatives` too: it is for one queue
            on all ranks that the loss is that of one process. `positive_pairs` are global row
            numbers, each pair given by the rank of its query. See `ito_kernels.distributed`.
        chunk_size: with a group: how many keys of all ranks are gathered at a time.

        With `debias`, `hardness`, `positive_pairs`, `queue` or `hard_negatives`, and if symmetric
        with `false_negative_margin` and one logit_scale for each query, half precision is computed
        in fp32: parts of several passes cancel.

    Returns:
        The loss, a 0-d fp32 tensor (fp64 for fp64 features), or as `reduction` says; with
        `return_stats` a pair of it and the dict.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before any kernel runs, or
            two that have no meaning together. With a group ValueError on every rank, at once, where
            ranks call otherwise or one of them has raised so.
        RuntimeError: the backend asked for cannot run here.

    Sources: van den Oord et al. 2018 (InfoNCE); Khosla et al. 2020, eq. 2 and 3 (SupCon);
    Miech et al. 2020 (MIL-NCE); He et al. 2020 (queue); Yi et al. 2019 (logQ correction); Chuang et
    al. 2020 (debias); Robinson et al. 2021 (hardness).
    """
    check_chunk_size(chunk_size)
    options = Options(
        label_smoothing,
        query_weights,
        key_weights,
        key_bias,
        positive_pairs,
        positive_weights,
        queue,
        queue_ids,
        hard_negatives,
        false_negative_margin,
        debias,
        hardness,
    )
    check_flags(
        symmetric=symmetric,
        exclude_self=exclude_self,
        normalize=normalize,
        return_stats=return_stats,
    )
    check_choice("positives", positives, ("mean", "sum", "in"))
    check_choice("empty", empty, ("zero", "drop"))
    check_choice("reduction", reduction, REDUCTIONS)
    queries, keys = check_pair("queries", queries, "keys", keys)
    scale = check_scale("logit_scale", logit_scale, queries)
    n, m = queries.size(0), keys.size(0)  # len() takes 0.4 µs
    if n != m and exclude_self:
        raise ValueError(f"exclude_self needs as many queries as keys, got {n} and {m}")
    if n != m and (query_ids is None or key_ids is None) and positive_pairs is None:
        raise ValueError(
            f"query_ids and key_ids are needed where queries and keys differ in number:"
            f" got {n} queries, {m} keys and no "
            + ("query_ids" if query_ids is None else "key_ids")
        )
    if query_ids is not None or key_ids is not None:
        rows = torch.arange(n, device=queries.device) if group is None else None
        query_ids = rows if query_ids is None else query_ids
        key_ids = rows if key_ids is None else key_ids
        if query_ids is not None:
            query_ids = check_ids("query_ids", query_ids, n, "queries", queries.device)
        if key_ids is not None:
            key_ids = check_ids("key_ids", key_ids, m, "keys", queries.device)
        if positive_pairs is not None:
            raise ValueError("positive_pairs replace query_ids and key_ids: give one or the other")
    if options.given():
        options = check_options(
            *(options, queries, keys, scale, query_ids, key_ids),
            positives=positives,
            symmetric=symmetric,
        )
        if positive_pairs is not None:
            options = placed_pairs(options, *global_numbers(n, m, group, queries.device))
    whole = whole_batch(group, queries, keys, query_ids, key_ids, chunk_size, backend)
    query_ids, key_ids = whole.query_ids, whole.key_ids
    if normalize:
        same = keys is queries and query_ids is key_ids
        queries = normalized(queries, query_ids)
        keys = queries if same else normalized(keys, key_ids)
    if options.given():
        return infonce_with_options(
            queries,
            keys,
            scale,
            options,
            whole,
            positives=positives,
            symmetric=symmetric,
            exclude_self=exclude_self,
            empty=empty,
            normalize=normalize,
            reduction=reduction,
            return_stats=return_stats,
            backend=backend,
        )

    call = partial(
        whole.similarity_logsumexp,
        queries,
        keys,
        scale,
        row_ids=query_ids,
        col_ids=key_ids,
        exclude_self=exclude_self,
        backend=backend,
    )
    shape = {"positives": "linear" if positives == "mean" else "lse", "hardest": return_stats}
    rows = _Anchors.of(queries, query_ids, key_ids, exclude_self, empty, whole)
    same = query_ids is key_ids or not symmetric
    cols = rows if same else _Anchors.of(keys, key_ids, query_ids, exclude_self, empty, whole)

    if reduction == "none":
        stats = call(cols=symmetric, **shape)
        loss = rows.losses(stats.row_logsum, stats.row_pos, positives)
        if symmetric:
            loss = loss, cols.losses(stats.col_logsum, stats.col_pos, positives)
    else:
        share = 0.5 if symmetric else 1.0
        weights = {"row_weights": rows.weights(share, positives, reduction)}
        if symmetric:
            weights["col_weights"] = (
                weights["row_weights"] if same else cols.weights(share, positives, reduction)
            )
        out = call(cols=symmetric, **shape, **weights, return_stats=return_stats)
        loss, stats = out if return_stats else (out, None)
        if positives == "in":
            counts = rows.log_counts(share, reduction)
            if symmetric:
                counts = counts + cols.log_counts(share, reduction)
            loss = loss + whole.sum(counts)
    if not return_stats:
        return loss
    with torch.no_grad():
        positive = stats.row_pos
        if positives != "mean":  # "lse" positives do not give their mean: one more forward pass
            positive = call(positives="linear", cols=False).row_pos
        positive = positive / rows.k.clamp(min=1)
        return loss, _diagnostics(stats, rows, cols, positives, positive, whole.mean_where)


class _Anchors(NamedTuple):
    """One side's anchors: k, the number of positives of each, and how many the mean divides by.

    `single`: every anchor has one positive.
    """

    k: Tensor
    number: Tensor | int
    single: bool = False

    @classmethod
    def of(
        cls,
        features: Tensor,
        ids: Tensor | None,
        other_ids: Tensor | None,
        exclude_self: bool,
        empty: str,
        whole: GlobalBatch | LocalBatch,
    ) -> _Anchors:
        n, dtype = features.size(0), accumulate_dtype(features.dtype)
        if ids is None:  # row i's positive is key i, and itself where self is left out
            k = torch.full((n,), 0 if exclude_self else 1, dtype=dtype, device=features.device)
            return cls(k, 1 if exclude_self and empty == "drop" else n, not exclude_self)
        k = count_positives(ids, whole.everyones(other_ids))
        if exclude_self:
            k = k - ((ids == other_ids) & (ids >= 0)).long()
        counted = k > 0 if empty == "drop" else ids >= 0
        number = whole.sum(counted.sum())
        return cls(k.to(dtype), number.clamp(min=1).to(dtype))

    def share(self, share: float, reduction: str) -> Tensor:
        """What an anchor's loss is multiplied by: 0 for anchors without a positive."""
        return self.k.clamp(max=1) * (share / self.number if reduction == "mean" else share)

    def weights(self, share: float, positives: str, reduction: str) -> tuple[Tensor, Tensor]:
        """Of logsum and pos, relative to the maximum, where digits do not cancel. Statistics that
        are not finite show in the sum even with a weight of 0."""
        if self.single:  # two small operations instead of seven: 20 µs
            u = torch.full_like(self.k, share / self.number if reduction == "mean" else share)
            return u, -u
        u = self.share(share, reduction)
        return u, -u / self.k.clamp(min=1) if positives == "mean" else -u

    def log_counts(self, share: float, reduction: str) -> Tensor:
        return (self.share(share, reduction) * self.k.clamp(min=1).log()).sum()

    def losses(self, logsum: Tensor, pos: Tensor, positives: str) -> Tensor:
        """Each anchor's loss."""
        k = self.k.clamp(min=1)
        loss = logsum - (pos / k if positives == "mean" else pos)
        if positives == "in":
            loss = loss + k.log()
        # a non-finite anchor shows even where it has no positive
        return torch.where((self.k > 0) | logsum.isnan(), loss, 0)


def _diagnostics(
    stats: Stats, rows: _Anchors, cols: _Anchors, positives: str, mean_positive: Tensor, mean
) -> dict:
    def side(name: str, stats: SideStats | None, anchors: _Anchors) -> dict:
        if stats is None:
            return dict.fromkeys((f"{name}_loss", f"{name}_lse", f"{name}_accuracy"))
        top, logsum, pos, neg_max = stats
        return {
            f"{name}_loss": anchors.losses(logsum, pos, positives),
            f"{name}_lse": top + logsum,
            f"{name}_accuracy": mean((top > neg_max).to(top.dtype), anchors.k > 0),
        }

    return {
        **side("row", stats.row, rows),
        **side("col", stats.col, cols),
        "positive_score": mean(mean_positive + stats.row_max, rows.k > 0),
        "hardest_negative_score": mean(stats.row_neg_max, stats.row_neg_max != -torch.inf),
    }
