"""Whether all ranks call alike, found out before anything else travels.

Ranks that differ would wait for each other until the group's time-out, or take each other's bytes
for something else. So the exchange of sizes, with which every batch begins, carries a digest of the
call: what must be the same on every rank, in words. Where digests differ all ranks see it, tell
each other the words, and raise. A rank that refuses its arguments takes part in that exchange with
REFUSED for a digest, and its error for words.

Therefore a loss checks all of its arguments before it makes its batch: behind that exchange there
is no way to tell the others.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from ..similarity.spec import autocast_enabled, is_number
from .collectives import all_gather_counts, process_group

Words = list[tuple[str, str]]  # what is compared, and what it is on this rank

REFUSED = -1
# each rank's own: results do not depend on who computes them, and one generator is used
FREE = frozenset({"group", "backend", "generator"})


class _Call(threading.local):
    """What this rank is calling. words: of the losses under way, the outermost first.
    before_exchange: whether the next collective of the other ranks is an exchange of sizes."""

    def __init__(self):
        self.words: Words = []
        self.before_exchange = False


_now = _Call()


def same_on_every_rank(
    loss: Callable | None = None,
    *,
    stacked: Sequence[str] = (),
    free: Sequence[str] = (),
    options_of: Callable | None = None,
) -> Callable:
    """A loss that, with a group, all ranks must call alike: else it raises on every one of them.

    Compared are the loss, which arguments are given, their values but for those of tensors, and of
    floating-point tensors whether a gradient is wanted and, where they are matrices, dtype and
    width. stacked: arguments of shape (count, N, D), whose count is compared too. free: arguments
    that are each rank's own. options_of: the loss whose keyword arguments `**options` are; what
    goes into `**options` elsewhere is compared by the loss that it goes to.

    The loss raises ValueError where ranks differ, and where another one refused its arguments.
    """
    if loss is None:
        return partial(same_on_every_rank, stacked=stacked, free=free, options_of=options_of)
    parameters = [*inspect.signature(loss).parameters.values()]
    if options_of is not None:
        more = inspect.signature(options_of).parameters.values()
        parameters += [p for p in more if p.kind is p.KEYWORD_ONLY]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    defaults = {
        p.name: (p.name, described(p.default))
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in {*FREE, *free}
    }

    def words(args: tuple, options: dict) -> Words:
        given = {**options, **dict(zip(positional, args, strict=False))}
        out = [("the call", loss.__name__)]
        for name, default in defaults.items():
            word = name in given and (name, described(given[name], name in stacked))
            out.append(word or default)
        if rest is not None:
            more = args[len(positional) :]
            out.append((f"the number of {rest}", str(len(more))))
            out += [(f"{rest} {i}", described(x, rest in stacked)) for i, x in enumerate(more)]
        return out

    @wraps(loss)
    def call(*args, group=None, **options):
        if group is None:
            return loss(*args, **options)
        if torch.compiler.is_compiling():  # every collective would break the graph
            return torch.compiler.disable(call)(*args, group=group, **options)
        group, outer = process_group(group), len(_now.words)
        _now.before_exchange = True
        try:
            _now.words += words(args, options)
            return loss(*args, group=group, **options)
        except Exception as error:
            if _now.before_exchange:
                _refuse(group, (*args, *options.values()), error)
            raise
        finally:
            del _now.words[outer:]

    return call


def exchanged_sizes(
    group: dist.ProcessGroup,
    device: torch.device,
    queries: int,
    keys: int,
    words: Words,
    more: bool = False,
) -> Tensor:
    """(ranks, 2) the numbers of queries and keys of every rank, on the host, once it is known that
    all are at the same call. more: the next collective is another exchange of sizes.

    Raises ValueError, on every rank, for the first difference.
    """
    if device.type not in _served(group):
        raise ValueError(
            f"group must serve {device.type}, the device of the features, got one of"
            f" {dist.get_backend_config(group)}"
        )
    _now.before_exchange = False
    words = [*_now.words, *words]
    found = all_gather_counts(group, device, queries, keys, _digest(words))
    if len(set(found[:, 2].tolist())) > 1:
        raise ValueError(_difference(_told(group, words)))
    _now.before_exchange = more
    return found[:, :2]


def described(x: object, stacked: bool = False) -> str:
    """An argument in words, which are the same wherever a loss takes the same course."""
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
        return f"[{', '.join(map(described, x))}]"
    return getattr(x, "__name__", type(x).__name__)


def _dtype(x: Tensor) -> torch.dtype:
    """In which features are computed, and travel."""
    if x.dtype != torch.float64 and autocast_enabled(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _digest(words: Words) -> int:
    """63 bits, the same in every process."""
    text = "\0".join(chain.from_iterable(words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _served(group: dist.ProcessGroup) -> list[str]:
    """The kinds of device for which the group has a backend."""
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _refuse(group: dist.ProcessGroup, given: Iterable, error: Exception) -> None:
    """Tells the other ranks, which are at an exchange of sizes or on their way to it."""
    _now.before_exchange = False
    kinds = _served(group)
    devices = (x.device for x in given if isinstance(x, Tensor) and x.device.type in kinds)
    device = next(devices, torch.device(kinds[0]))
    with suppress(RuntimeError):  # where the others do not answer, this rank's own error stands
        all_gather_counts(group, device, 0, 0, REFUSED)
        _told(group, f"{type(error).__name__}: {error}")


def _told(group: dist.ProcessGroup, what: Words | str) -> list[Words | str]:
    told: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, what, group)
    return told


def _difference(told: list[Words | str]) -> str:
    """Of words that differ: their names do so only behind a value that does."""
    for rank, words in enumerate(told):
        if isinstance(words, str):
            return f"rank {rank} refused its arguments: {words}"
    rank, name, first, x = next(
        (rank, name, a, b)
        for rank, words in enumerate(told)
        for (name, a), (_, b) in zip(told[0], words, strict=False)
        if a != b
    )
    return f"{name} must be the same on every rank, got {first} on rank 0 and {x} on rank {rank}"
