"""The processes of `torchrun` that train one model together, and what they tell each other.

Every rank holds the whole data and the whole model, and takes its slice of each batch. Gradients
are averaged by one all-reduce, as the global batch of `ito_kernels` needs it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ito.cli import USER_ERRORS, reason

T = TypeVar("T")
LOST = "another rank has ended"  # the losses' collectives say so too


class RankLost(ConnectionError):
    """A collective failed: another rank has ended, or does not answer."""


class Ranks:
    """Rank, size and group as `torchrun` sets them; alone (`group` None) without it.

    As a context it joins the group, on gloo for tensors of the CPU and NCCL for those of a GPU.
    Ranks other than 0 print nothing.
    """

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            self.group = dist.group.WORLD
            if not self.leads:
                sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(self, kind, error, _) -> None:
        if self.group is None:
            return
        if not self.leads:
            sys.stdout = sys.__stdout__
        if kind is None:
            dist.destroy_process_group()
        elif kind is FloatingPointError and not self.leads:
            sys.exit(1)  # the loss is that of all ranks, and rank 0 says so
        elif kind in (RankLost, RuntimeError) and LOST in str(error):
            raise RankLost(f"rank {self.rank}: {error}") from None

    def local_slice(self, count: int) -> slice:
        """This rank's of `count` items: as even as can be, each item on one rank."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def any(self, asked: bool) -> bool:
        """Whether any rank was asked: the same answer on all."""
        if self.group is None:
            return asked
        return bool(all_reduce(torch.tensor(float(asked)), self.group, "a question to all"))

    def all_gather_dicts(self, found: dict) -> dict:
        """The dicts of all ranks in one, the same on all."""
        if self.group is None:
            return found
        every: list[dict] = [{}] * self.size
        dist.all_gather_object(every, found)
        return {key: value for part in every for key, value in part.items()}

    def average_grads(self, parameters: list[Tensor]) -> None:
        """Gradients become their mean over ranks, by one all-reduce."""
        if self.group is None:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        flat = all_reduce(flat, self.group, "the average of gradients").div_(self.size)
        parts = flat.split([g.numel() for g in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    @contextmanager
    def together(self) -> Iterator[None]:
        """The body on every rank; a user's error on any ends all of them, and is told once.

        The body must hold no collective: a rank that failed would not take part.
        """
        found = None
        try:
            yield
        except USER_ERRORS as error:
            if self.group is None:
                raise
            found = error
        if self.group is None:
            return
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, reason(found) if found else None)
        failed = [rank for rank, text in enumerate(told) if text is not None]
        if failed and not self.leads:
            sys.exit(2)
        if found:
            raise found
        if failed:
            raise ValueError(f"rank {failed[0]}: {told[failed[0]]}")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What every rank would say alike, as argparse's complaint, is said by rank 0 alone."""
        with open(os.devnull, "w") as null, redirect_stderr(sys.stderr if self.leads else null):
            yield

    def leader_first(self, call: Callable[[], T]) -> T:
        """`call()` on rank 0, then on the others, who find what it prepared."""
        result = None
        for turn in (True, False):
            with self.together():
                if self.leads == turn:
                    result = call()
        return result


def all_reduce(x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """The sum of x over ranks, in place. Raises RankLost naming what failed."""
    try:
        dist.all_reduce(x, group=group)
    except RuntimeError as error:
        raise RankLost(f"{what} failed: {LOST}, or does not answer") from error
    return x


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x.detach().clone(), group, "a sum over ranks")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return all_reduce(grad.clone(), ctx.group, "the gradient of a sum over ranks"), None


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, which each rank may use in its own way: in backward their gradients are
    added up by another all-reduce."""
    return x if group is None else _AllReduceSum.apply(x, group)


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The rows of all ranks, rank after rank, and the place of this rank's first.

    Numbers of rows may differ. Gradients are added up over ranks, as in `all_reduce_sum`.
    """
    if group is None:
        return x, 0
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=x.device)
    counts[dist.get_rank(group)] = len(x)
    counts = all_reduce(counts, group, "the number of rows").tolist()
    first = sum(counts[: dist.get_rank(group)])
    after = sum(counts) - first - len(x)
    padded = torch.cat([x.new_zeros(first, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])])
    return all_reduce_sum(padded, group), first


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the pictures of all ranks, whose numbers may differ.

    torch's SyncBatchNorm needs GPUs. The weights and statistics are those of the `BatchNorm2d`
    that it takes the place of.
    """

    def __init__(self, like: nn.BatchNorm2d, group: dist.ProcessGroup):
        super().__init__(like.num_features, like.eps, like.momentum)
        self.group = group
        self._parameters, self._buffers = like._parameters, like._buffers

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        pixels = wide.new_tensor([x.numel() / x.shape[1]])
        total = all_reduce_sum(torch.cat([wide.sum((0, 2, 3)), pixels]), self.group)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = wide - mean[:, None, None]
        variance = all_reduce_sum(centred.square().sum((0, 2, 3)), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        gain = self.weight * (variance + self.eps).rsqrt()
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def normalise_globally(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Every `BatchNorm2d` of the model becomes one over all ranks.

    Raises ValueError for batch normalisation of another kind, unless it is locked.
    """
    if group is None:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, GlobalBatchNorm(child, group))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm) and any(
                p.requires_grad for p in child.parameters()
            ):
                raise ValueError(
                    f"{type(child).__name__} of the image encoder sees one rank's pictures alone: "
                    "train on one rank, or with --lock-image"
                )
