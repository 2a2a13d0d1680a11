"""The process group over which the losses of other libraries gather."""

from __future__ import annotations

import torch.distributed as dist


def gathering_group(gather: bool) -> dist.ProcessGroup | None:
    """The default group if `gather` is set and it has more than one rank; else None."""
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None
