"""The processes of `torchrun` that train one model together, and their communication.

Every rank holds all data and the complete model, and takes its slice of each global batch.
Gradients are averaged by one all-reduce, for which the losses of `ito_kernels` are exact.
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
from ito_kernels.distributed.autograd import AllGatherRows, AllReduceSum

T = TypeVar("T")
LOST = "another rank has ended"  # also in errors of the losses' collectives


class RankLost(ConnectionError):
    """A collective failed: another rank has ended, or does not answer."""


class Ranks:
    """Rank, size and group as `torchrun` sets them. Without it there is one rank and no group.

    Entering the context joins the group: gloo for CPU tensors, NCCL for GPU tensors. Ranks other
    than 0 print nothing.
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
            sys.exit(1)  # all ranks have the same loss, and rank 0 prints the error
        elif kind in (RankLost, RuntimeError) and LOST in str(error):
            raise RankLost(f"rank {self.rank}: {error}") from None

    def local_slice(self, count: int) -> slice:
        """This rank's part of `count` items; sizes differ by at most 1."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def any(self, value: bool) -> bool:
        """True on all ranks if `value` is true on any of them."""
        if self.group is None:
            return value
        return bool(all_reduce(torch.tensor(float(value)), self.group, "a question to all ranks"))

    def all_gather_dicts(self, local: dict) -> dict:
        """The dicts of all ranks, merged into one."""
        if self.group is None:
            return local
        gathered: list[dict] = [{}] * self.size
        dist.all_gather_object(gathered, local)
        return {key: value for part in gathered for key, value in part.items()}

    def average_grads(self, parameters: list[Tensor]) -> None:
        """Replace gradients by their mean over ranks, with one all-reduce."""
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
        """A user's error in the body on any rank ends all ranks, and is printed once.

        The body must hold no collective: a rank that failed would not take part in it.
        """
        own_error = None
        try:
            yield
        except USER_ERRORS as error:
            own_error = error
        errors = self.all_gather_dicts({self.rank: reason(own_error)} if own_error else {})
        if errors and self.group is not None and not self.leads:
            sys.exit(2)
        if own_error:
            raise own_error
        if errors:
            raise ValueError(f"rank {min(errors)}: {errors[min(errors)]}")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Only rank 0 writes to stderr, for messages that all ranks would print, as argparse's."""
        with open(os.devnull, "w") as null, redirect_stderr(sys.stderr if self.leads else null):
            yield

    def leader_first(self, call: Callable[[], T]) -> T:
        """`call()` on rank 0 first, then on the others, which find what it has prepared."""
        result = None
        for turn in (True, False):
            with self.together():
                if self.leads == turn:
                    result = call()
        return result


def all_reduce(x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """The sum of x over ranks, in place. Raises RankLost; `what` names the sum in its message."""
    try:
        dist.all_reduce(x, group=group)
    except RuntimeError as error:
        raise RankLost(f"{what} failed: {LOST}, or does not answer") from error
    return x


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks. Backward sums the gradients of all ranks by another all-reduce, so each
    rank may use the result in its own way."""
    return x if group is None else AllReduceSum.apply(x, group)


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks in the order of the ranks, whose numbers may differ. Gradients are
    summed over ranks."""
    return x if group is None else AllGatherRows.apply(x, group)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the pictures of all ranks, whose numbers may differ.

    It shares the weights and statistics of the `BatchNorm2d` that it replaces. torch's
    SyncBatchNorm needs GPUs.
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
    """Replace every `BatchNorm2d` of the model by a `GlobalBatchNorm`.

    Raises ValueError for other kinds of batch normalisation, unless they are locked.
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
                    f"{type(child).__name__} of the image encoder sees only one rank's pictures: "
                    "train on one rank, or with --lock-image"
                )
