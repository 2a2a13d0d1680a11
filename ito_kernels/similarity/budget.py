"""Memory budgets from environment variables."""

from __future__ import annotations

import os
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

TILE_CACHE_BYTES = (64 << 20) + 64  # all scores of 4096 × 4096, and a header
# Memory that forward passes keep until autograd frees it in their backward passes. With one budget
# for each pass instead of one for all, a loss of three passes would keep 192 MiB.
_kept: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_numbers = count()


def tile_cache_left(device: str = "cpu", default: int = TILE_CACHE_BYTES) -> int:
    """What other passes have left of ITO_TILE_CACHE_BYTES, for tiles kept for backward in the
    memory of a type of device. default: the budget where it is not set."""
    budget = byte_budget("ITO_TILE_CACHE_BYTES", default)
    # a compiled call always has the budget that it was compiled for
    if torch.compiler.is_compiling() or not _kept:
        return budget
    return max(0, budget - sum(x.nbytes for x in _kept.values() if x.device.type == device))


def count_as_kept(x: Tensor) -> Tensor:
    """Return x, whose memory counts until it is freed."""
    if not torch.compiler.is_compiling():
        _kept[next(_numbers)] = x
    return x


def byte_budget(variable: str, default: int) -> int:
    """The number of bytes in an environment variable, `default` where it is not set or empty.

    Raises ValueError for anything but a whole number of at least 0.
    """
    # where it is not set, `get` takes twice as long: it raises an error inside
    if variable not in os.environ or not (text := os.environ[variable]):
        return default
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"{variable} must be a whole number of bytes, got {text!r}")
    return budget
