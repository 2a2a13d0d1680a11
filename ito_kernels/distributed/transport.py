"""Which transport brings the keys."""

from __future__ import annotations

import os

from .gather import Gather
from .ring import Ring

TRANSPORTS = {"gather": Gather, "ring": Ring}


def chosen_transport() -> type[Gather | Ring]:
    """The one that the environment's ITO_TRANSPORT names."""
    name = os.environ.get("ITO_TRANSPORT") or "gather"
    if name not in TRANSPORTS:
        raise ValueError(f"ITO_TRANSPORT must be 'gather' or 'ring', got {name!r}")
    return TRANSPORTS[name]
