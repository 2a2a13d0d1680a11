"""The global batch: sums and rows over all ranks, and the primitive over the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..similarity import dispatch, op
from ..similarity.backend import Backend, weighted_sum
from ..similarity.spec import Needs, Problem, SideUpstream, Stats, Upstream, make_problem
from .agreement import describe, exchanged_sizes
from .autograd import AllGatherRows, AllReduceLoss, AllReduceSum, Logsumexp, Softplus
from .chunks import gather_cache_bytes
from .collectives import Started, all_reduce_max, broadcast, completed, process_group
from .sharding import Sharding, SideShards
from .transport import chosen_transport


def not_compiled(method: Callable) -> Callable:
    """`torch.compiler.disable`, applied only when compiling: it imports dynamo, which takes 2 s."""

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


def global_ranges(queries: int, keys: int, group, device: torch.device) -> tuple[range, range]:
    """The global row numbers of this rank's queries, and those of all ranks' keys.

    Ranks are numbered in order. Without a group both start at 0. With a group this runs a
    collective, and the batch of the same group must be created next.
    """
    if group is None:
        return range(queries), range(keys)
    group = process_group(group)
    description = [("the call", "row numbers")]
    sizes = exchanged_sizes(group, device, queries, keys, description, another_follows=True)
    row, col = (SideShards.of(counts, dist.get_rank(group)) for counts in sizes.T.tolist())
    return row.local, range(col.total)


def global_row_numbers(count: int, group, device: torch.device) -> Tensor:
    """The global row numbers of this rank's rows, (count,)."""
    local, _ = global_ranges(count, count, group, device)
    return torch.arange(local.start, local.stop, device=device)


class GlobalBatch:
    """The rows of all ranks of a group. Each rank holds its local rows.

    Args:
        group: a `ProcessGroup` or a one-dimensional `DeviceMesh` that contains this process.
        queries, keys: the local rows, (n, D) and (m, D). n and m may differ between ranks.
        query_ids, key_ids: (n,) and (m,) integers. Equal ids are positives, also across ranks. By
            default they are the global row numbers. A negative id marks padding.
        chunk_size: the number of keys that a rank receives at a time. With "gather" these are keys
            of all ranks, rounded up to the same number from each; with "ring" keys of one rank. By
            default 512 per rank, at least 32,768 and at most 131,072.

    A `side` is "row" for the queries and "col" for the keys.

    Sums and statistics are those of the global batch. Gradients are too, if every rank
    differentiates its result and the gradients of parameters are *averaged* over ranks, as
    DistributedDataParallel and `fully_shard` do. Before that average, the gradient of the features
    is W times that of one process, where W is the number of ranks.
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
        group, transport, device = process_group(group), chosen_transport(), queries.device
        # Collectives with different sizes on different ranks abort the process on gloo; other
        # backends may hang or return wrong numbers.
        description = [
            ("the call", "GlobalBatch"),
            ("queries", describe(queries)),
            ("keys", describe(keys)),
            ("query_ids", describe(query_ids)),
            ("key_ids", describe(key_ids)),
            ("whether query_ids and key_ids are one tensor", str(query_ids is key_ids)),
            ("chunk_size", str(chunk_size)),
            ("ITO_TRANSPORT", transport),
            ("ITO_GATHER_CACHE_BYTES", str(gather_cache_bytes())),
        ]
        sizes = exchanged_sizes(group, device, len(queries), len(keys), description)
        rank = dist.get_rank(group)
        row, col = (SideShards.of(counts, rank) for counts in sizes.T.tolist())
        if query_ids is None or key_ids is None:
            row_numbers = row.numbers(device)
            col_numbers = row_numbers if row.counts == col.counts else col.numbers(device)
            query_ids = row_numbers if query_ids is None else query_ids
            key_ids = col_numbers if key_ids is None else key_ids
        shards = Sharding(group, rank, row, col, transport, chunk_size)
        self.shards = shards.with_ids(query_ids, key_ids)

    @property
    def query_ids(self) -> Tensor:
        return self.shards.row.ids

    @property
    def key_ids(self) -> Tensor:
        return self.shards.col.ids

    def with_ids(self, query_ids: Tensor, key_ids: Tensor) -> GlobalBatch:
        """The same rows with other ids."""
        return self._with_shards(self.shards.with_ids(query_ids, key_ids))

    def swapped(self) -> GlobalBatch:
        """The same batch with queries and keys exchanged."""
        return self._with_shards(self.shards.swapped())

    def _with_shards(self, shards: Sharding) -> GlobalBatch:
        other = copy(self)
        other.shards = shards
        return other

    def local_range(self, side: str) -> range:
        """The global row numbers of this rank's rows of a side."""
        return self.shards.side(side).local

    def global_count(self, side: str) -> int:
        """The number of rows of a side on all ranks."""
        return self.shards.side(side).total

    def global_ids(self, side: str) -> Tensor:
        """The ids of all ranks' rows of a side. Each rank's are padded with -1 to the same length:
        positions are not global row numbers."""
        return self.shards.side(side).all_ids.flatten()

    def local_columns(self, x: Tensor) -> Tensor:
        """This rank's part of x, (…, keys of all ranks)."""
        local = self.shards.col.local
        return x[..., local.start : local.stop]

    def all_reduce_loss(self, x: Tensor) -> Tensor:
        """The sum over ranks of a 0-d loss.

        Every rank differentiates the result in the same way, so backward needs no collective.
        """
        return AllReduceLoss.apply(x, self.shards.group)

    @not_compiled
    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of the same shape.

        Ranks may use the result in different ways: backward all-reduces the gradients.
        """
        return AllReduceSum.apply(x, self.shards.group)

    def all_reduce_mean(self, x: Tensor, where: Tensor) -> Tensor:
        """The mean over all ranks' elements of x where `where` is True, 0 if there are none.
        Differentiated like `all_reduce_loss`."""
        total = self.all_reduce_loss(torch.where(where, x, 0).sum())
        return total / self.all_reduce_sum(where.sum()).clamp(min=1)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The element-wise maximum over ranks of tensors of the same shape, without gradient."""
        name, group = "all-reduce of a maximum", self.shards.group
        return Started(name, all_reduce_max, torch.empty_like(x), x.detach(), group).wait()

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x, without gradient."""
        return completed("broadcast", broadcast, x, self.shards.group)

    @not_compiled
    def all_gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate (n, …) of all ranks in order; n may differ between ranks.

        It takes the memory of the global batch. Use it only for what `similarity_logsumexp`, which
        works in chunks, cannot compute.
        """
        return AllGatherRows.apply(x, self.shards.group)

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
        exact_max: bool = True,
        half_values: bool = False,
        row_weights: tuple[Tensor, Tensor | None] | None = None,
        col_weights: tuple[Tensor, Tensor | None] | None = None,
        return_stats: bool = True,
        backend: str | None = None,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """`ito_kernels.similarity_logsumexp` of the global batch.

        a, b, the biases and the limits are those of this rank's rows and columns. `row_ids` and
        `col_ids` are `self.query_ids` and `self.key_ids`.

        Returns the statistics of this rank's rows over all ranks' columns, and of its columns over
        all ranks' rows. The weighted sum is over all ranks.
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
            exact_max=exact_max,
            half_values=half_values,
        )
        out = iter(Logsumexp.apply(self.shards, module, needs, *arguments))
        stats = op.present_stats(Problem(*arguments), out)
        if row_weights is None and col_weights is None:
            return stats
        weights = Upstream(*(SideUpstream(*(x or ())) for x in (row_weights, col_weights)))
        total = self.all_reduce_loss(weighted_sum(stats, weights))
        return (total, op.detached(stats)) if return_stats else total

    def logsumexp_of(
        self,
        problem: Problem,
        weights: Upstream,
        return_stats: bool,
        backend: str | None,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """`similarity_logsumexp` of a `Problem` of this rank's rows."""
        fields = problem._asdict()
        del fields["diagonal"]
        fields["b"] = fields["a"] if problem.b is None else problem.b
        weights = weights.tensors(problem)
        return self.similarity_logsumexp(
            **fields,
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
        """`ito_kernels.similarity_softplus` of the global batch.

        Returns the sums of this rank's rows, or with weights the weighted sum over all ranks. The
        gradients of the weighted sum are computed in forward, except in fp16, so that keys are
        gathered only once.
        """
        needs, module, arguments = self._prepare(
            a, b, scale, backend, row_bias=row_bias, col_bias=None, row_ids=row_ids, col_ids=col_ids
        )
        out = Softplus.apply(self.shards, module, needs, row_weights, *arguments)
        return out if row_weights is None else self.all_reduce_loss(out)

    def _prepare(
        self, a: Tensor, b: Tensor, scale: float | Tensor, backend: str | None, **options
    ) -> tuple[Needs, Backend, tuple]:
        """Validate the arguments. Returns the needed gradients, the backend, and the fields of the
        Problem, whose b is never None."""
        problem = make_problem(a, b, scale, **options)
        module = dispatch.choose(problem, backend)
        problem = problem._replace(b=problem.a if problem.b is None else problem.b)
        enabled = torch.is_grad_enabled()
        needs = Needs(*(enabled and x is not None and x.requires_grad for x in problem.inputs))
        return needs, module, tuple(problem)
