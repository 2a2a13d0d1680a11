"""The collectives of a global batch, started asynchronously.

torch 2.13 renamed some of them. All calls of torch.distributed collectives are in this file, except
`all_gather_object` in `agreement.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

NO_MEMBER = "group does not hold this process: call the loss on its members alone"


def all_gather(out: Tensor, x: Tensor, group) -> dist.Work:
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(out, x, group=group, async_op=True)


def reduce_scatter(out: Tensor, x: Tensor, group) -> dist.Work:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(out, x, group=group, async_op=True)


def all_to_all(out: Tensor, x: Tensor, group) -> dist.Work:
    return dist.all_to_all_single(out, x, group=group, async_op=True)


def all_reduce(out: Tensor, x: Tensor, group) -> dist.Work:
    out.copy_(x)
    return dist.all_reduce(out, group=group, async_op=True)


def all_reduce_max(out: Tensor, x: Tensor, group) -> dist.Work:
    out.copy_(x)
    return dist.all_reduce(out, dist.ReduceOp.MAX, group=group, async_op=True)


def broadcast(out: Tensor, x: Tensor, group) -> dist.Work:
    out.copy_(x)
    return dist.broadcast(out, dist.get_global_rank(group, 0), group=group, async_op=True)


def shift(out: Tensor, x: Tensor, group) -> Works:
    """Send x to the next rank of the group and receive `out` from the previous one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # peers are global ranks
    after, before = (dist.get_global_rank(group, (rank + i) % size) for i in (1, -1))
    pair = (dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, out, before, group))
    return Works(dist.batch_isend_irecv(list(pair)))


class Works(NamedTuple):
    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Started:
    """A collective in flight. `wait` returns its output. Raises RuntimeError that names it.

    name: the name for error messages.
    """

    def __init__(self, name: str, collective: Callable, out: Tensor, x: Tensor, group):
        self.name, self.out, self.group = name, out, group
        self.x = x  # keeps the input alive until it has been sent
        try:
            self.work = collective(out, x, group)
        except RuntimeError as error:
            raise self._failed() from error

    def wait(self) -> Tensor:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self._failed() from error
        self.x = None
        return self.out

    def _failed(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} failed on rank {dist.get_rank(self.group)} of"
            f" {dist.get_world_size(self.group)}: another rank has ended, does not answer within"
            " the group's time-out, or is at another call"
        )


def completed(name: str, collective: Callable, x: Tensor, group) -> Tensor:
    """Run a collective whose output has the shape and dtype of its input, and wait for it."""
    x = x.detach().contiguous()
    return Started(name, collective, torch.empty_like(x), x, group).wait()


def process_group(group: object) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim}")
        if group.get_coordinate() is None:
            raise ValueError(NO_MEMBER)
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(NO_MEMBER)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def all_gathered(name: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather tensors of the same shape on all ranks: (ranks, *x.shape)."""
    x = x[None].contiguous()
    out = x.new_empty(dist.get_world_size(group), *x.shape[1:])
    return Started(f"all-gather of {name}", all_gather, out, x, group).wait()


def padded_to(length: int, x: Tensor, value: float = 0) -> Tensor:
    """Pad x, (…, k), to (…, length)."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=value)


def all_gather_counts(group: dist.ProcessGroup, device: torch.device, *counts: int) -> Tensor:
    """All-gather integers: (ranks, len(counts)), on the CPU."""
    return all_gathered("batch sizes", torch.tensor(counts, device=device), group).cpu()
