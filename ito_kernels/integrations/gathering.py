"""Where the losses of other libraries gather: over the default group, if there is more than one
rank. In one process their flag does nothing."""

from __future__ import annotations

import torch.distributed as dist


def gathering_group(gather: bool) -> dist.ProcessGroup | None:
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None
