"""Argument checks that all losses share, and the construction of their batch.

A loss first calls `check_arguments`, then checks its own further arguments, and creates its batch
last. Creating the batch of a process group runs the first collective. A rank that raised after it
would leave the other ranks waiting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, check_chunk_size, global_batch
from ..similarity.spec import check_features, check_ids, check_pair, check_scale
from .common import normalize_rows
from .precision import has_half_values, to_accumulate_dtype, to_autocast_dtype
from .scores import Scores


class Names(NamedTuple):
    """The argument names of a loss, for error messages.

    query_ids, key_ids: None for a loss without ids.
    row_nouns: what the rows of both sides are called in a sentence.
    """

    queries: str = "queries"
    keys: str = "keys"
    scale: str = "logit_scale"
    query_ids: str | None = None
    key_ids: str | None = None
    row_nouns: tuple[str, str] = ("queries", "keys")

    def row_count_error(self, n: int, m: int, missing: str | None) -> ValueError:
        if self.query_ids is None:
            return ValueError(
                f"{self.queries} and {self.keys} must have the same number of rows, got {n} and {m}"
            )
        return ValueError(
            f"{self.queries} and {self.keys} must have the same number of rows unless"
            f" {self.query_ids} and {self.key_ids} define the positives: got"
            f" {n} {self.row_nouns[0]}, {m} {self.row_nouns[1]} and no {missing}"
        )


BY_ID = Names(query_ids="query_ids", key_ids="key_ids")
PAIRED = Names()


class Arguments(NamedTuple):
    """The checked arguments that every loss has.

    query_ids, key_ids: int64, or None where row i of the queries and row i of the keys are the only
    positive pairs.
    """

    queries: Tensor
    keys: Tensor
    scale: Tensor
    query_ids: Tensor | None
    key_ids: Tensor | None
    names: Names
    group: object
    chunk_size: int | None
    backend: str | None

    def check_features_like_queries(self, name: str, x: object, rows: int | None = None) -> Tensor:
        """Check that `x` has the width, dtype and device of the queries, and `rows` rows if that is
        given. Return it."""
        _, x = check_pair(self.names.queries, self.queries, name, x)
        if rows is not None and len(x) != rows:
            raise ValueError(
                f"{self.names.queries} and {name} must have the same number of rows, got {rows} and"
                f" {len(x)}"
            )
        return x

    def check_constant_features(self, name: str, x: object, rows: int) -> Tensor:
        """Check features of any width that are constant for autograd. Return them detached, in the
        accumulate dtype."""
        x = check_features(name, x)
        if len(x) != rows:
            raise ValueError(f"{name} must have {rows} rows, got {len(x)}")
        if x.device != self.queries.device:
            raise ValueError(f"{name} must be on {self.queries.device}, got {x.device}")
        return x.detach().to(self.scale.dtype)

    def in_accumulate_dtype(self) -> Arguments:
        """Convert the features to the accumulate dtype (fp32, fp64 for fp64).

        Under autocast they are rounded to the autocast dtype first, as a matrix product would.
        """
        queries = to_accumulate_dtype(to_autocast_dtype(self.queries))
        same = self.keys is self.queries
        return self._replace(
            queries=queries,
            keys=queries if same else to_accumulate_dtype(to_autocast_dtype(self.keys)),
        )

    def with_batch_ids(self, batch: GlobalBatch | LocalBatch) -> Arguments:
        """Replace the ids by those of the batch. A global batch always has ids."""
        query_ids, key_ids = batch.query_ids, batch.key_ids
        if query_ids is self.query_ids and key_ids is self.key_ids:
            return self
        return self._replace(query_ids=query_ids, key_ids=key_ids)

    def with_normalized_rows(self) -> Arguments:
        same = self.keys is self.queries and self.query_ids is self.key_ids
        queries = normalize_rows(self.queries, self.query_ids)
        return self._replace(
            queries=queries, keys=queries if same else normalize_rows(self.keys, self.key_ids)
        )

    def global_batch(self) -> GlobalBatch | LocalBatch:
        """Create the batch. With a group this is its first collective."""
        return global_batch(
            *(self.group, self.queries, self.keys, self.query_ids, self.key_ids),
            *(self.chunk_size, self.backend),
        )

    def scores(self, symmetric: bool = True, exclude_self: bool = False) -> Scores:
        """The scores of features in the accumulate dtype.

        For losses that combine the results of several calls of the primitive. These must not be
        rounded to half precision in between.
        """
        args = self.in_accumulate_dtype()
        return Scores(
            args.global_batch(),
            *(args.queries, args.keys, args.scale),
            symmetric=symmetric,
            exclude_self=exclude_self,
            backend=args.backend,
            half_values=has_half_values(self.queries),
        )


def check_arguments(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
    *,
    ids: tuple[Tensor | None, Tensor | None] = (None, None),
    names: Names = BY_ID,
    allow_unequal_rows: bool = False,
) -> Arguments:
    """Check the arguments that all losses share and fill in their defaults.

    ids: query ids and key ids.
    allow_unequal_rows: N and M may differ even without ids.
    Raises TypeError or ValueError that names the argument.
    """
    check_chunk_size(chunk_size)
    query_ids, key_ids = ids
    queries, keys = check_pair(names.queries, queries, names.keys, keys)
    scale = check_scale(names.scale, scale, queries)
    n, m, device = queries.size(0), keys.size(0), queries.device  # len() takes 0.4 µs
    if n != m and not allow_unequal_rows and (query_ids is None or key_ids is None):
        raise names.row_count_error(n, m, names.query_ids if query_ids is None else names.key_ids)
    if query_ids is not None or key_ids is not None:
        # with a group, GlobalBatch fills in the default: the global row numbers
        same = query_ids is key_ids
        if group is None and query_ids is None:
            query_ids = torch.arange(n, device=device)
        elif group is None and key_ids is None:
            key_ids = torch.arange(m, device=device)
        if query_ids is not None:
            query_ids = check_ids(names.query_ids, query_ids, n, names.queries, device)
        if same and n == m:
            key_ids = query_ids  # one tensor before the cast to int64 and after it
        elif key_ids is not None:
            key_ids = check_ids(names.key_ids, key_ids, m, names.keys, device)
        if query_ids is not None:
            scale = _without_padding(scale, query_ids)
    return Arguments(queries, keys, scale, query_ids, key_ids, names, group, chunk_size, backend)


def _without_padding(scale: Tensor, query_ids: Tensor) -> Tensor:
    """Replace the scales of padded queries, which may be anything, also NaN, by 1.

    The scale of a single query is 0-d here and may also be meant for all ranks: it is replaced only
    if it is not finite.
    """
    if scale.ndim:
        return scale.masked_fill(query_ids < 0, 1)
    if len(query_ids) == 1:
        return torch.where((query_ids[0] < 0) & ~scale.isfinite(), 1, scale)
    return scale


def same_scale_shape_on_all_ranks(scale: Tensor, batch: GlobalBatch, queries: int) -> Tensor:
    """Expand the scale to (queries,) if any rank has one per query.

    The shape decides which collectives are called, and a scale of shape (1,) is read as 0-d: on a
    rank with a single query, a scale per query looks like a scale for all.
    """
    per_query = batch.all_reduce_max(scale.new_tensor(float(scale.ndim))) > 0
    return scale.expand(queries) if per_query else scale
