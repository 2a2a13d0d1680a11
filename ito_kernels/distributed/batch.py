"""The batch of all ranks: who holds what, and the primitive over everyone's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import wraps
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..similarity import dispatch, op
from ..similarity.backend import Backend, weighted_sum
from ..similarity.spec import Needs, Problem, SideUpstream, Stats, Upstream, make_problem
from .agreement import described, exchanged_sizes
from .chunks import Chunk, Transport, flat, gather_cache_bytes
from .collectives import (
    Started,
    all_gather,
    all_reduce_max,
    broadcast,
    completed,
    process_group,
)
from .gradients import Logsumexp, Rows, SharedSum, Softplus, Sum
from .transport import chosen_transport


def default_chunk(ranks: int) -> int:
    """Keys gathered at a time. With fewer than 512 of each rank the latency of a transfer counts
    more than what overlaps: within 13 % of the best up to 256 GPUs (docs/scaling.md); 131,072 at
    D = 512 are 256 MiB in fp32, and as much again for each of a chunk's other three matrices."""
    return min(max(512 * ranks, 32768), 131072)


def not_compiled(method: Callable) -> Callable:
    """`torch.compiler.disable`, which imports dynamo: 2 s, for those alone who compile."""

    @wraps(method)
    def call(self, *args, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(self, *args, **options)
        return method(self, *args, **options)

    return call


def check_chunk_size(chunk_size: object) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be a whole number, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def global_numbers(queries: int, keys: int, group, device: torch.device) -> tuple[range, range]:
    """Of this rank's queries among those of all ranks, and of the keys of all ranks, in the order
    of ranks; without a group, of these alone. A batch of the same group must follow."""
    if group is None:
        return range(queries), range(keys)
    group = process_group(group)
    words = [("the call", "row numbers")]
    sizes = exchanged_sizes(group, device, queries, keys, words, more=True)
    first = int(sizes[: dist.get_rank(group), 0].sum())
    return range(first, first + queries), range(int(sizes[:, 1].sum()))


def global_rows(count: int, group, device: torch.device) -> Tensor:
    """(count,) the numbers of this rank's rows among those of all ranks."""
    rows, _ = global_numbers(count, count, group, device)
    return torch.arange(rows.start, rows.stop, device=device)


class GlobalBatch:
    """The rows of all ranks of a group, of which this rank holds its own.

    Args:
        group: a `ProcessGroup` or a one-dimensional `DeviceMesh` that this process belongs to.
        queries, keys: this rank's (n, D) and (m, D); the numbers may differ between ranks.
        query_ids, key_ids: (n,) and (m,) integers, equal across ranks for positives; by default
            the row numbers in the global batch. Negative ids are padding.
        chunk_size: keys that a rank gets at a time: of all ranks, rounded up to as many from each;
            on a ring of one. By default 512 of each rank, from 32,768 to 131,072.

    Its sums and statistics are those of the global batch, and so are gradients if every rank
    differentiates what it was given and parameters' gradients are *averaged* over ranks, as
    DistributedDataParallel and `fully_shard` do. Features get `size` times their own gradient.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        queries: Tensor,
        keys: Tensor,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        chunk_size: int | None = None,
    ):
        check_chunk_size(chunk_size)
        self.group, self.chunk_size = process_group(group), chunk_size
        self._transport = chosen_transport()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        # transfers of other sizes end the process on gloo, and may hang or mix up numbers elsewhere
        words = [
            ("the call", "GlobalBatch"),
            ("queries", described(queries)),
            ("keys", described(keys)),
            ("query_ids", described(query_ids)),
            ("key_ids", described(key_ids)),
            ("whether query_ids and key_ids are one tensor", str(query_ids is key_ids)),
            ("chunk_size", str(chunk_size)),
            ("ITO_TRANSPORT", self._transport.__name__.lower()),
            ("ITO_GATHER_CACHE_BYTES", str(gather_cache_bytes())),
        ]
        self.sizes = exchanged_sizes(self.group, queries.device, len(queries), len(keys), words)
        if query_ids is None or key_ids is None:
            rows, cols = self._numbers(0, queries.device), self._numbers(1, queries.device)
            if torch.equal(*self.sizes.T):
                cols = rows
            query_ids = rows if query_ids is None else query_ids
            key_ids = cols if key_ids is None else key_ids
        self._set_ids(query_ids, key_ids)

    def _set_ids(self, query_ids: Tensor, key_ids: Tensor) -> None:
        self.query_ids, self.key_ids = query_ids, key_ids
        most_queries, self.most_keys = self.sizes.max(0).values.tolist()
        # (size, most), padded by -1
        self.all_query_ids = self.gather("query ids", query_ids, most_queries, -1)
        self.all_key_ids = self.all_query_ids
        if key_ids is not query_ids:
            self.all_key_ids = self.gather("key ids", key_ids, self.most_keys, -1)

    def with_ids(self, query_ids: Tensor, key_ids: Tensor) -> GlobalBatch:
        """The same rows by other names."""
        other = copy(self)
        other._set_ids(query_ids, key_ids)
        return other

    def swapped(self) -> GlobalBatch:
        """The keys as queries and the queries as keys."""
        other = copy(self)
        other.sizes, other.most_keys = self.sizes.flip(1), self.all_query_ids.shape[1]
        other.query_ids, other.key_ids = self.key_ids, self.query_ids
        other.all_query_ids, other.all_key_ids = self.all_key_ids, self.all_query_ids
        return other

    @property
    def transport(self) -> Transport:
        chunk_size = self.chunk_size or default_chunk(self.size)
        return self._transport(self.group, self.most_keys, chunk_size)

    def numbers(self, side: int) -> range:
        """Of this rank's queries (0) or keys (1) among those of all ranks."""
        first = int(self.sizes[: self.rank, side].sum())
        return range(first, first + int(self.sizes[self.rank, side]))

    def _numbers(self, side: int, device: torch.device) -> Tensor:
        rows = self.numbers(side)
        return torch.arange(rows.start, rows.stop, device=device)

    def count(self, side: int) -> int:
        """Of the queries (0) or keys (1) of all ranks."""
        return int(self.sizes[:, side].sum())

    def everyones(self, ids: Tensor) -> Tensor:
        """`query_ids` or `key_ids` of all ranks, with some padding."""
        return (self.all_query_ids if ids is self.query_ids else self.all_key_ids).flatten()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of 0-d tensors: a loss, which every rank differentiates alike."""
        return Sum.apply(x, self)

    @not_compiled
    def shared_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, of which every rank may make its own use."""
        return SharedSum.apply(x, self)

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over ranks of tensors of one shape, without gradient."""
        out = torch.empty_like(x)
        return Started(
            "all-reduce of a maximum", all_reduce_max, out, x.detach(), self.group
        ).wait()

    def first(self, x: Tensor) -> Tensor:
        """What the first rank has in place of x, without gradient."""
        return completed("broadcast", broadcast, x, self.group)

    @not_compiled
    def rows(self, x: Tensor) -> Tensor:
        """(n, …) of each rank one after the other, n differing between them. Memory is that of the
        batch of all ranks: for what the chunks of `similarity_logsumexp` cannot say."""
        return Rows.apply(x, self)

    def mine(self, x: Tensor) -> Tensor:
        """Of (…, keys of all ranks) this rank's part."""
        keys = self.numbers(1)
        return x[..., keys.start : keys.stop]

    def mean_where(self, x: Tensor, where: Tensor) -> Tensor:
        """The mean of all ranks' x over `where`, 0 if that is nowhere."""
        return self.sum(torch.where(where, x, 0).sum()) / self.sum(where.sum()).clamp(min=1)

    @not_compiled
    def similarity_logsumexp(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        *,
        row_ids: Tensor,
        col_ids: Tensor,
        row_bias: Tensor | None = None,
        col_bias: Tensor | None = None,
        row_limit: Tensor | None = None,
        positives: str | None = None,
        exclude_self: bool = False,
        exclude_positives: bool = False,
        rows: bool = True,
        cols: bool = True,
        hardest: bool = False,
        row_weights: tuple[Tensor, Tensor | None] | None = None,
        col_weights: tuple[Tensor, Tensor | None] | None = None,
        return_stats: bool = True,
        backend: str | None = None,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """`ito_kernels.similarity_logsumexp` of all ranks' rows of a and b.

        Statistics of this rank's rows over everybody's columns, and of its columns over
        everybody's rows; the weighted sum is over all ranks. `row_ids` and `col_ids` are
        `self.query_ids` and `self.key_ids`; biases and limits are of this rank's rows and columns.
        """
        needs, module, arguments = self._prepare(
            a,
            b,
            scale,
            backend,
            row_bias=row_bias,
            col_bias=col_bias,
            row_ids=row_ids,
            col_ids=col_ids,
            row_limit=row_limit,
            positives=positives,
            exclude_self=exclude_self,
            exclude_positives=exclude_positives,
            rows=rows,
            cols=cols,
            hardest=hardest,
        )
        out = iter(Logsumexp.apply(self, module, needs, *arguments))
        stats = op.present_stats(Problem(*arguments), out)
        if row_weights is None and col_weights is None:
            return stats
        weights = Upstream(*(SideUpstream(*(x or ())) for x in (row_weights, col_weights)))
        total = self.sum(weighted_sum(stats, weights))
        return (total, op.detached(stats)) if return_stats else total

    def logsumexp_of(
        self,
        problem: Problem,
        weights: Upstream,
        return_stats: bool,
        backend: str | None,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """`similarity_logsumexp` of a problem of this rank's rows, as the primitive takes it."""
        what = problem._asdict()
        del what["diagonal"]
        what["b"] = what["a"] if problem.b is None else problem.b
        return self.similarity_logsumexp(
            **what,
            row_weights=weights.row,
            col_weights=weights.col,
            return_stats=return_stats,
            backend=backend,
        )

    @not_compiled
    def similarity_softplus(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        *,
        row_ids: Tensor,
        col_ids: Tensor,
        row_bias: Tensor | None = None,
        row_weights: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """`ito_kernels.similarity_softplus` of all ranks' rows of a and b: the sums of this rank's
        rows, or the weighted sum over all ranks, whose gradients are formed in the forward pass
        (not in fp16): keys are then gathered once."""
        needs, module, arguments = self._prepare(
            a, b, scale, backend, row_bias=row_bias, col_bias=None, row_ids=row_ids, col_ids=col_ids
        )
        out = Softplus.apply(self, module, needs, row_weights, *arguments)
        return out if row_weights is None else self.sum(out)

    def _prepare(
        self, a: Tensor, b: Tensor, scale: float | Tensor, backend: str | None, **what
    ) -> tuple[Needs, Backend, tuple]:
        """The gradients that are wanted, the backend, and a Problem's fields; b is never None."""
        problem = make_problem(a, b, scale, **what)
        module = dispatch.choose(problem, backend)
        problem = problem._replace(b=problem.a if problem.b is None else problem.b)
        live = torch.is_grad_enabled()
        needs = Needs(*(live and x is not None and x.requires_grad for x in problem.inputs))
        return needs, module, tuple(problem)

    def gather(self, what: str, x: Tensor, length: int, fill: float = 0) -> Tensor:
        """(…, k) of each rank as (size, …, length)."""
        x = torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=fill)
        return self.start_gather(what, x[None]).wait()

    def start_gather(self, what: str, x: Tensor) -> Started:
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        return Started(f"all-gather of {what}", all_gather, out, x.contiguous(), self.group)

    def blocks(self, problem: Problem, chunk: Chunk) -> Iterator[tuple]:
        """The problem of this rank's rows with a chunk's keys, with the range of those keys.
        problem.col_bias: everyone's, (size, most).

        One; under `exclude_self` up to three: self pairs are with this rank's own part alone.
        """
        owners, part, keys = chunk
        ids = flat(self.all_key_ids[owners, part])
        bias = None if problem.col_bias is None else flat(problem.col_bias[owners, part])
        own = tuple((self.rank - owners.start + i) * chunk.step for i in (0, 1))
        with_own = problem.exclude_self and self.rank in range(owners.start, owners.stop)
        bounds = (0, *own, len(keys)) if with_own else (0, len(keys))
        for low, high in pairwise(bounds):
            if low == high:
                continue
            mine = with_own and (low, high) == own
            yield (
                slice(low, high),
                problem._replace(
                    b=keys[low:high],
                    col_bias=None if bias is None else bias[low:high],
                    col_ids=ids[low:high],
                    exclude_self=mine,
                    diagonal=-part.start if mine else 0,
                ),
            )
