"""The batch of all ranks: the primitive over keys that other ranks hold, in chunks.

Every rank holds its rows of both towers. Keys travel chunk by chunk, the next one in flight while
the kernels work on the current one; a rank's row statistics are complete after the last chunk, and
those of its columns after one exchange of O(B) numbers. Backward walks over the chunks again and
returns the gradients of the keys to their owners. Memory is O(local·D + chunk·D + B) on each rank.

All ranks must call the same losses in the same order, with the same options.

Environment, the same on every rank: ITO_TRANSPORT, how keys travel: "gather", the default, by
all-gathers and reduce-scatters, or "ring", from neighbour to neighbour. ITO_GATHER_CACHE_BYTES
(64 MiB by default) bounds the chunks that are kept for backward; the rest travels again.
"""

from .batch import GlobalBatch, check_chunk_size, global_rows

__all__ = ["GlobalBatch", "check_chunk_size", "global_rows"]
