"""The global batch of a process group: the primitive over the keys of all ranks, in chunks.

Every rank holds local rows of both towers. Keys are all-gathered in chunks, and the next chunk is
in flight while the kernels process the current one. The row statistics of a rank are complete after
the last chunk. Its column statistics are complete after an all-to-all of O(B) numbers, with B the
number of keys of all ranks. Backward iterates over the chunks again and reduce-scatters the
gradients of the keys. Memory per rank is O(local·D + chunk·D + B).

A loss is written once, for the batch that `global_batch` returns. `GlobalBatch` and `LocalBatch`
have the same interface:

- the primitive, of the local rows against the keys of all ranks, including column statistics;
- `all_reduce_loss`, for a result that every rank differentiates in the same way;
- `all_reduce_sum` and `all_reduce_max`, for results that ranks use in different ways;
- `all_gather_rows`, the rows of all ranks at once, for what the primitive cannot compute, in memory
  O(global·D).

In backward each of them gives the gradient of the sum of all ranks' losses. These are equal, so for
W ranks the sum is W times the loss, and averaging the gradients of parameters over ranks gives the
gradient of the loss. The same holds for every composition of the four.

All ranks must call the same losses in the same order with the same options. `agreement` compares
the calls and raises on all ranks if they differ.

Environment variables, equal on all ranks: ITO_TRANSPORT selects the transport of keys: "gather"
(default) uses all-gather and reduce-scatter, "ring" sends them from neighbour to neighbour.
ITO_GATHER_CACHE_BYTES (default 64 MiB) bounds the memory for chunks that are kept for backward;
other chunks are transferred again.
"""

from __future__ import annotations

from torch import Tensor

from ..similarity import dispatch
from ..similarity.spec import Problem
from .agreement import same_on_every_rank
from .batch import GlobalBatch, check_chunk_size, global_ranges, global_row_numbers
from .local import LocalBatch

__all__ = [
    "GlobalBatch",
    "LocalBatch",
    "check_chunk_size",
    "global_batch",
    "global_ranges",
    "global_row_numbers",
    "same_on_every_rank",
]


def global_batch(
    group,
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> GlobalBatch | LocalBatch:
    """The batch of all ranks of `group`, or the local batch if it is None.

    backend: the backend that the loss will use. With a group, one that cannot run here raises
        before the first collective. A loss that runs no kernel passes "reference", which runs
        everywhere.
    """
    check_chunk_size(chunk_size)
    if group is None:
        return LocalBatch(queries.size(0), keys.size(0), query_ids, key_ids)
    if dispatch.requested(backend)[0] is not None:
        dispatch.choose(Problem(queries, keys, queries.new_ones(())), backend)
    return GlobalBatch(group, queries, keys, query_ids, key_ids, chunk_size)
