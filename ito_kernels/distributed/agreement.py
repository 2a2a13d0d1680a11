"""Checks that all ranks make the same call, before any other collective.

Ranks with different calls would wait for each other until the time-out of the group, or misread
each other's data. So the exchange of batch sizes, which starts every batch, also carries a digest
of a description of the call: a list of everything that must be equal on all ranks. If the digests
differ, all ranks exchange their descriptions and raise. A rank whose arguments are invalid takes
part with the digest INVALID and sends its error instead of a description.

After this exchange an error can no longer be reported to the other ranks. Therefore a loss checks
all of its arguments before it creates its batch.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import chain
from typing import TypeVar, overload
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..similarity.spec import autocast_enabled, is_number
from .collectives import all_gather_counts, process_group

CallDescription = list[tuple[str, str]]  # pairs (name of what is compared, value on this rank)

INVALID = -1  # the digest of a rank with invalid arguments
# Arguments that may differ between ranks. All backends give the same loss, and only the first
# rank's generator is used.
FREE = frozenset({"group", "backend", "generator"})


class _Call(threading.local):
    """The current call of this rank.

    description: that of the losses in progress, the outermost first.
    before_exchange: whether other ranks may be waiting in an exchange of sizes. An error is then
        sent to them.
    """

    def __init__(self):
        self.description: CallDescription = []
        self.before_exchange = False


_current = _Call()

# How many calls each group has had. If a rank's own function raises between two heads of
# `multi_head_loss`, that rank's next call may look like the head that the other ranks compute, but
# its number differs.
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
CALL_NUMBER = "the number of the call"
Loss = TypeVar("Loss", bound=Callable)


@overload
def same_on_every_rank(loss: Loss) -> Loss: ...


@overload
def same_on_every_rank(
    *, stacked: Sequence[str] = (), free: Sequence[str] = (), options_of: Callable | None = None
) -> Callable[[Loss], Loss]: ...


def same_on_every_rank(
    loss: Callable | None = None,
    *,
    stacked: Sequence[str] = (),
    free: Sequence[str] = (),
    options_of: Callable | None = None,
) -> Callable:
    """Decorate a loss that, with a group, all ranks must call with the same arguments.

    It compares the name of the loss and its arguments; a missing argument has its default. Tensors
    are compared by whether they hold integers and whether they require a gradient, floating-point
    matrices also by dtype and width. Other arguments are compared by value, functions by name.

    Args:
        stacked: names of arguments of shape (count, N, D), whose count is compared too.
        free: names of arguments that may differ between ranks.
        options_of: the loss that defines the `**options` of this one. Without it they are compared
            by the loss to which they are passed.

    The decorated loss raises ValueError on every rank if the calls differ, or if another rank has
    invalid arguments.
    """
    if loss is None:
        return partial(same_on_every_rank, stacked=stacked, free=free, options_of=options_of)
    parameters = [*inspect.signature(loss).parameters.values()]
    if options_of is not None:
        more = inspect.signature(options_of).parameters.values()
        parameters += [p for p in more if p.kind is p.KEYWORD_ONLY]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    defaults = {
        p.name: (p.name, describe(p.default))
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in {*FREE, *free}
    }

    def describe_call(args: tuple, options: dict) -> CallDescription:
        given = {**options, **dict(zip(positional, args, strict=False))}
        out = [("the call", loss.__name__)]
        for name, default in defaults.items():
            entry = name in given and (name, describe(given[name], name in stacked))
            out.append(entry or default)
        if variadic is not None:
            more = args[len(positional) :]
            out.append((f"the number of {variadic}", str(len(more))))
            out += [
                (f"{variadic} {i}", describe(x, variadic in stacked)) for i, x in enumerate(more)
            ]
        return out

    @wraps(loss)
    def call(*args, group=None, **options):
        if group is None:
            return loss(*args, **options)
        if torch.compiler.is_compiling():  # every collective would cause a graph break
            return torch.compiler.disable(call)(*args, group=group, **options)
        group, outer = process_group(group), len(_current.description)
        if outer == 0:
            _count_call(group)
        _current.before_exchange = True
        try:
            _current.description += describe_call(args, options)
            return loss(*args, group=group, **options)
        except Exception as error:
            if _current.before_exchange:
                _report_invalid_arguments(group, (*args, *options.values()), error)
            raise
        finally:
            del _current.description[outer:]

    return call


def exchanged_sizes(
    group: dist.ProcessGroup,
    device: torch.device,
    queries: int,
    keys: int,
    description: CallDescription,
    another_follows: bool = False,
) -> Tensor:
    """All-gather the numbers of queries and keys, after checking that all ranks make the same call.

    description: what to compare in addition to the losses in progress.
    another_follows: whether the next collective is another exchange of sizes.

    Returns (ranks, 2) on the CPU. Raises ValueError on every rank that names the first difference.
    """
    if device.type not in _device_types(group):
        raise ValueError(
            f"group must serve {device.type}, the device of the features, got one of"
            f" {dist.get_backend_config(group)}"
        )
    _current.before_exchange = False
    if not _current.description:
        _count_call(group)
    number = (CALL_NUMBER, str(_calls.get(group, 0)))
    description = [*_current.description, *description, number]
    counts = all_gather_counts(group, device, queries, keys, _digest(description))
    if len(set(counts[:, 2].tolist())) > 1:
        descriptions = _all_gather_object(group, description)
        # now that all ranks know of the difference, they continue from the same number
        numbers = [int(x[-1][1]) for x in descriptions if not isinstance(x, str)]
        _calls[group] = max(numbers)
        raise ValueError(_first_difference(descriptions))
    _current.before_exchange = another_follows
    return counts[:, :2]


def describe(x: object, stacked: bool = False) -> str:
    """Describe an argument by all that decides which collectives a loss calls."""
    if isinstance(x, Tensor):
        if x.is_nested or x.layout != torch.strided:
            return f"a {'nested' if x.is_nested else x.layout} tensor"
        if not x.is_floating_point():
            return "a tensor of integers"
        gradient = "with" if x.requires_grad and torch.is_grad_enabled() else "without"
        if x.ndim < 2:
            return f"a tensor {gradient} gradient"
        count = f"{len(x) if x.ndim == 3 else 1}, " if stacked else ""
        return f"a {_dtype(x)} tensor ({count}…, {x.shape[-1]}) {gradient} gradient"
    if is_number(x):
        return repr(float(x)).removesuffix(".0")
    if x is None or isinstance(x, (bool, str)):
        return repr(x)
    if isinstance(x, Sequence):
        return f"[{', '.join(map(describe, x))}]"
    return getattr(x, "__name__", type(x).__name__)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which features are computed and transferred."""
    if x.dtype != torch.float64 and autocast_enabled(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _count_call(group: dist.ProcessGroup) -> None:
    _calls[group] = _calls.get(group, 0) + 1


def _digest(description: CallDescription) -> int:
    """A hash of 63 bits that is the same in every process."""
    text = "\0".join(chain.from_iterable(description)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _device_types(group: dist.ProcessGroup) -> list[str]:
    """The device types for which the group has a backend."""
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _report_invalid_arguments(
    group: dist.ProcessGroup, arguments: Iterable, error: Exception
) -> None:
    """Send the error to the other ranks, which are in an exchange of sizes or will enter it."""
    _current.before_exchange = False
    types = _device_types(group)
    devices = (x.device for x in arguments if isinstance(x, Tensor) and x.device.type in types)
    device = next(devices, torch.device(types[0]))
    with suppress(RuntimeError):  # if the others do not answer, this rank raises its own error
        all_gather_counts(group, device, 0, 0, INVALID)
        _all_gather_object(group, f"{type(error).__name__}: {error}")


def _all_gather_object(
    group: dist.ProcessGroup, x: CallDescription | str
) -> list[CallDescription | str]:
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, x, group)
    return gathered


def _first_difference(descriptions: list[CallDescription | str]) -> str:
    """The error message for descriptions that differ, or for the error of a rank.

    Up to the first value that differs, all descriptions have the same names.
    """
    for rank, description in enumerate(descriptions):
        if isinstance(description, str):
            return f"rank {rank} has invalid arguments: {description}"
    rank, name, first, x = next(
        (rank, name, a, b)
        for rank, description in enumerate(descriptions)
        for (name, a), (_, b) in zip(descriptions[0], description, strict=False)
        if a != b
    )
    return f"{name} must be the same on every rank, got {first} on rank 0 and {x} on rank {rank}"
