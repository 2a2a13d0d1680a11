"""Which transport brings the keys, and how many at a time."""

from __future__ import annotations

import os

from .gather import Gather
from .ring import Ring

TRANSPORTS = {"gather": Gather, "ring": Ring}


def chosen_transport() -> str:
    """The one that the environment's ITO_TRANSPORT names."""
    name = os.environ.get("ITO_TRANSPORT") or "gather"
    if name not in TRANSPORTS:
        raise ValueError(f"ITO_TRANSPORT must be 'gather' or 'ring', got {name!r}")
    return name


def default_chunk_size(ranks: int) -> int:
    """Keys gathered at a time. With fewer than 512 of each rank the latency of a transfer counts
    more than what overlaps: within 13 % of the best up to 256 GPUs (docs/scaling.md); 131,072 at
    D = 512 are 256 MiB in fp32, and as much again for each of a chunk's other three matrices."""
    return min(max(512 * ranks, 32768), 131072)
