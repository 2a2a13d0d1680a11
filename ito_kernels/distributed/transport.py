"""The choice of the transport of keys and of the chunk size."""

from __future__ import annotations

import os

from .gather import Gather
from .ring import Ring

TRANSPORTS = {"gather": Gather, "ring": Ring}


def chosen_transport() -> str:
    """The transport named by the environment variable ITO_TRANSPORT, "gather" by default.

    Raises ValueError for an unknown name.
    """
    name = os.environ.get("ITO_TRANSPORT") or "gather"
    if name not in TRANSPORTS:
        raise ValueError(f"ITO_TRANSPORT must be 'gather' or 'ring', got {name!r}")
    return name


def default_chunk_size(ranks: int) -> int:
    """The number of keys gathered at a time: 512 per rank, at least 32,768 and at most 131,072.

    With fewer than 512 per rank, the latency of a transfer outweighs the overlap. The default is
    within 13 % of the best size up to 256 GPUs (docs/scaling.md). 131,072 keys at D = 512 are
    256 MiB in fp32, as is each of the three other matrices of a chunk.
    """
    return min(max(512 * ranks, 32768), 131072)
