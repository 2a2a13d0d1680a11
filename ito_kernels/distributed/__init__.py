"""The batch of all ranks: the primitive over keys that other ranks hold, in chunks.

Every rank holds its rows of both towers. Keys travel chunk by chunk, the next one in flight while
the kernels work on the current one; a rank's row statistics are complete after the last chunk, and
those of its columns after one exchange of O(B) numbers. Backward walks over the chunks again and
returns the gradients of the keys to their owners. Memory is O(local·D + chunk·D + B) on each rank.

A loss is written once, for `whole_batch`: that of all ranks or that of this process, which has the
same interface. It needs of it

- the primitive, of its rows against everyone's keys, column statistics included;
- `sum`, of losses and counts, and `shared_sum` and `largest`, of vectors that ranks use each in
  their own way;
- `rows`, everyone's rows at once, for what the primitive cannot say: O(global·D).

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
from .batch import GlobalBatch, check_chunk_size, global_numbers, global_rows
from .local import LocalBatch

__all__ = [
    "GlobalBatch",
    "LocalBatch",
    "check_chunk_size",
    "global_numbers",
    "global_rows",
    "same_on_every_rank",
    "whole_batch",
]


def whole_batch(
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
        return LocalBatch((queries.size(0), keys.size(0)), query_ids, key_ids)
    if dispatch.requested(backend)[0] is not None:
        dispatch.choose(Problem(queries, keys, queries.new_ones(())), backend)
    return GlobalBatch(group, queries, keys, query_ids, key_ids, chunk_size)
