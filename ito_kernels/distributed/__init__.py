"""The batch of all ranks: the primitive over keys that other ranks hold, in chunks.

Every rank holds its rows of both towers. Keys are gathered chunk by chunk, the next one in flight
while the kernels work on the current one. A rank's row statistics are complete after the last
chunk, those of its columns after an all-to-all of O(B) numbers. Backward goes over the chunks
again, and reduce-scatters the gradients of the keys. Memory is O(local·D + chunk·D + B) on each
rank.

A loss is written once, for `global_batch`: that of all ranks or that of this process, which has the
same interface. It needs of it

- the primitive, of its rows against all ranks' keys, column statistics included;
- `all_reduce_loss`, whose result all ranks differentiate alike;
- `all_reduce_sum` and `all_reduce_max`, whose results each rank uses in its own way;
- `all_gather_rows`, all ranks' rows at once, for what the primitive cannot say: O(global·D).

Each is adjoint to its backward for the sum over ranks of what they differentiate, which is W times
the loss, and averaging divides by W: so is any composition of them.

All ranks must call the same losses in the same order, with the same options: `agreement` compares
what they call, and raises on all of them where it differs.

Environment, the same on every rank: ITO_TRANSPORT, how keys travel: "gather", the default, by
all-gathers and reduce-scatters, or "ring", from neighbour to neighbour. ITO_GATHER_CACHE_BYTES
(64 MiB by default) bounds the chunks that are kept for backward; the rest travels again.
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
    """The batch of all ranks of `group`, or that of this process where it is None.

    backend: the one that will be asked to run: with a group one that cannot is refused before ranks
    meet. "reference", which runs everywhere, where no kernels are needed.
    """
    check_chunk_size(chunk_size)
    if group is None:
        return LocalBatch(queries.size(0), keys.size(0), query_ids, key_ids)
    if dispatch.requested(backend)[0] is not None:
        dispatch.choose(Problem(queries, keys, queries.new_ones(())), backend)
    return GlobalBatch(group, queries, keys, query_ids, key_ids, chunk_size)
