"""The one door of the losses: arguments are checked, ids and scale get their defaults, and the
global batch is made, here and nowhere else.

A loss calls `check_arguments`, then checks what it alone has, and makes its batch after that: with
a group the ranks meet there, and one that refuses its arguments later would leave the others
waiting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import GlobalBatch, LocalBatch, check_chunk_size, global_batch
from ..similarity.spec import check_features, check_ids, check_pair, check_scale
from .common import normalized
from .precision import accumulated, as_autocast
from .scores import Scores


class Names(NamedTuple):
    """What a loss calls its arguments, for errors. query_ids: None if it takes no ids."""

    queries: str = "queries"
    keys: str = "keys"
    scale: str = "logit_scale"
    query_ids: str | None = None
    key_ids: str | None = None
    of: tuple[str, str] = ("queries", "keys")  # what there are so many of

    def unequal(self, n: int, m: int, missing: str | None) -> ValueError:
        if self.query_ids is None:
            return ValueError(
                f"{self.queries} and {self.keys} must have as many rows, got {n} and {m}"
            )
        return ValueError(
            f"{self.queries} and {self.keys} must have as many rows unless {self.query_ids} and"
            f" {self.key_ids} say what belongs together: got {n} {self.of[0]}, {m} {self.of[1]} and"
            f" no {missing}"
        )


BY_ID = Names(query_ids="query_ids", key_ids="key_ids")
PAIRED = Names()


class Arguments(NamedTuple):
    """What every loss has, checked; ids are int64, or None where row i belongs to row i alone."""

    queries: Tensor
    keys: Tensor
    scale: Tensor
    query_ids: Tensor | None
    key_ids: Tensor | None
    names: Names
    group: object
    chunk_size: int | None
    backend: str | None

    def another(self, name: str, x: object, rows: int | None = None) -> Tensor:
        """`x`, features like the queries and if `rows` is given as many, checked too."""
        _, x = check_pair(self.names.queries, self.queries, name, x)
        if rows is not None and len(x) != rows:
            raise ValueError(
                f"{self.names.queries} and {name} must have as many rows, got {rows} and {len(x)}"
            )
        return x

    def frozen(self, name: str, x: object, rows: int) -> Tensor:
        """`x`, features of any width without gradient, checked, in the dtype of the computation."""
        x = check_features(name, x)
        if len(x) != rows:
            raise ValueError(f"{name} must have {rows} rows, got {len(x)}")
        if x.device != self.queries.device:
            raise ValueError(f"{name} must be on {self.queries.device}, got {x.device}")
        return x.detach().to(self.scale.dtype)

    def promoted(self) -> Arguments:
        """bf16 and fp16 features in fp32, rounded first where autocast would have rounded them."""
        queries = accumulated(as_autocast(self.queries))
        same = self.keys is self.queries
        return self._replace(
            queries=queries, keys=queries if same else accumulated(as_autocast(self.keys))
        )

    def with_ids_of(self, batch: GlobalBatch | LocalBatch) -> Arguments:
        """With the ids of the batch: of all ranks' rows there always are some."""
        query_ids, key_ids = batch.query_ids, batch.key_ids
        if query_ids is self.query_ids and key_ids is self.key_ids:
            return self
        return self._replace(query_ids=query_ids, key_ids=key_ids)

    def normalized(self) -> Arguments:
        same = self.keys is self.queries and self.query_ids is self.key_ids
        queries = normalized(self.queries, self.query_ids)
        return self._replace(
            queries=queries, keys=queries if same else normalized(self.keys, self.key_ids)
        )

    def global_batch(self) -> GlobalBatch | LocalBatch:
        """That of all ranks of the group, who meet here."""
        return global_batch(
            *(self.group, self.queries, self.keys, self.query_ids, self.key_ids),
            *(self.chunk_size, self.backend),
        )

    def scores(self, symmetric: bool = True, exclude_self: bool = False) -> Scores:
        """In fp32 at least: for losses whose parts meet outside the kernels."""
        given = self.promoted()
        return Scores(
            given.global_batch(),
            *(given.queries, given.keys, given.scale),
            symmetric=symmetric,
            exclude_self=exclude_self,
            backend=given.backend,
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
    unequal: bool = False,
) -> Arguments:
    """The arguments that all losses share, checked, with their defaults.

    ids: of the queries and of the keys.
    unequal: without ids, too, there may be more queries than keys, or fewer.
    Raises TypeError or ValueError by name.
    """
    check_chunk_size(chunk_size)
    query_ids, key_ids = ids
    queries, keys = check_pair(names.queries, queries, names.keys, keys)
    scale = check_scale(names.scale, scale, queries)
    n, m, device = queries.size(0), keys.size(0), queries.device  # len() takes 0.4 µs
    if n != m and not unequal and (query_ids is None or key_ids is None):
        raise names.unequal(n, m, names.query_ids if query_ids is None else names.key_ids)
    if query_ids is not None or key_ids is not None:
        # with a group the batch has their default, which are the rows' numbers among all ranks'
        same = query_ids is key_ids
        rows = torch.arange(n, device=device) if group is None else None
        query_ids = rows if query_ids is None else query_ids
        key_ids = rows if key_ids is None else key_ids
        if query_ids is not None:
            query_ids = check_ids(names.query_ids, query_ids, n, names.queries, device)
        if same and n == m:
            key_ids = query_ids  # cast once, they stay one tensor
        elif key_ids is not None:
            key_ids = check_ids(names.key_ids, key_ids, m, names.keys, device)
    return Arguments(queries, keys, scale, query_ids, key_ids, names, group, chunk_size, backend)
