"""The collectives that a global batch needs, each an asynchronous start that can be waited for.

torch 2.13 has new names for some: they start here and nowhere else.
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
    """x to the next rank of the group, `out` from the one before."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # peers are numbered as in the default group
    after, before = (dist.get_global_rank(group, (rank + i) % size) for i in (1, -1))
    pair = (dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, out, before, group))
    return Works(dist.batch_isend_irecv(list(pair)))


class Works(NamedTuple):
    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Started:
    """A transfer under way. `wait` returns its output, or raises with its name."""

    def __init__(self, what: str, collective: Callable, out: Tensor, x: Tensor, group):
        self.what, self.out, self.group = what, out, group
        self.x = x  # until it has been sent
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
            f"{self.what} failed on rank {dist.get_rank(self.group)} of"
            f" {dist.get_world_size(self.group)}: another rank has ended, does not answer within"
            " the group's time-out, or is at another call"
        )


def completed(what: str, collective: Callable, x: Tensor, group) -> Tensor:
    """Of a collective whose output is like its input."""
    x = x.detach().contiguous()
    return Started(what, collective, torch.empty_like(x), x, group).wait()


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


def all_gathered(what: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank, which all have one shape: (ranks, *x.shape)."""
    x = x[None].contiguous()
    out = x.new_empty(dist.get_world_size(group), *x.shape[1:])
    return Started(f"all-gather of {what}", all_gather, out, x, group).wait()


def padded_to(length: int, x: Tensor, value: float = 0) -> Tensor:
    """(…, k) as (…, length)."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=value)


def all_gather_counts(group: dist.ProcessGroup, device: torch.device, *counts: int) -> Tensor:
    """(ranks, len(counts)), those of every rank, on the host."""
    return all_gathered("batch sizes", torch.tensor(counts, device=device), group).cpu()
