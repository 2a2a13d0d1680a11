"""The batch of all ranks: its sums and rows, and the primitive over all ranks' keys."""

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
from .agreement import described, exchanged_sizes
from .autograd import AllGatherRows, AllReduceLoss, AllReduceSum, Logsumexp, Softplus
from .chunks import gather_cache_bytes
from .collectives import Started, all_reduce_max, broadcast, completed, process_group
from .sharding import Sharding, SideShards
from .transport import chosen_transport


def not_compiled(method: Callable) -> Callable:
    """`torch.compiler.disable`, whose import of dynamo takes 2 s: only for those who compile."""

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
    """The row numbers of this rank's queries among those of all ranks, in the order of ranks, and
    of all ranks' keys; without a group, of these alone. A batch of the same group must follow."""
    if group is None:
        return range(queries), range(keys)
    group = process_group(group)
    words = [("the call", "row numbers")]
    sizes = exchanged_sizes(group, device, queries, keys, words, more=True)
    row, col = (SideShards.of(counts, dist.get_rank(group)) for counts in sizes.T.tolist())
    return row.local, range(col.total)


def global_row_numbers(count: int, group, device: torch.device) -> Tensor:
    """(count,) the numbers of this rank's rows among those of all ranks."""
    local, _ = global_ranges(count, count, group, device)
    return torch.arange(local.start, local.stop, device=device)


class GlobalBatch:
    """The rows of all ranks of a group, of which this rank holds its own.

    Args:
        group: a `ProcessGroup` or a one-dimensional `DeviceMesh` that this process belongs to.
        queries, keys: this rank's (n, D) and (m, D); the numbers may differ between ranks.
        query_ids, key_ids: (n,) and (m,) integers, equal across ranks for positives; by default
            the row numbers in the global batch. Negative ids are padding.
        chunk_size: keys that a rank gets at a time: of all ranks, rounded up to as many from each;
            on a ring of one. By default 512 of each rank, from 32,768 to 131,072.

    A `side` is "row" for the queries and "col" for the keys.

    Its sums and statistics are those of the global batch, and so are gradients if every rank
    differentiates what it was given and parameters' gradients are *averaged* over ranks, as
    DistributedDataParallel and `fully_shard` do. Features get W times their
    own gradient, W being the number of ranks.
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
        # transfers of other sizes end the process on gloo, and may hang or mix up numbers elsewhere
        words = [
            ("the call", "GlobalBatch"),
            ("queries", described(queries)),
            ("keys", described(keys)),
            ("query_ids", described(query_ids)),
            ("key_ids", described(key_ids)),
            ("whether query_ids and key_ids are one tensor", str(query_ids is key_ids)),
            ("chunk_size", str(chunk_size)),
            ("ITO_TRANSPORT", transport),
            ("ITO_GATHER_CACHE_BYTES", str(gather_cache_bytes())),
        ]
        sizes = exchanged_sizes(group, device, len(queries), len(keys), words)
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
        return self._of(self.shards.with_ids(query_ids, key_ids))

    def swapped(self) -> GlobalBatch:
        """The keys as queries and the queries as keys."""
        return self._of(self.shards.swapped())

    def _of(self, shards: Sharding) -> GlobalBatch:
        other = copy(self)
        other.shards = shards
        return other

    def local_range(self, side: str) -> range:
        """The numbers of this rank's rows of a side among those of all ranks."""
        return self.shards.side(side).local

    def global_count(self, side: str) -> int:
        """How many rows of a side all ranks have."""
        return self.shards.side(side).total

    def global_ids(self, side: str) -> Tensor:
        """The ids of all ranks' rows of a side, with some padding."""
        return self.shards.side(side).all_ids.flatten()

    def local_columns(self, x: Tensor) -> Tensor:
        """Of (…, keys of all ranks) this rank's part."""
        local = self.shards.col.local
        return x[..., local.start : local.stop]

    def all_reduce_loss(self, x: Tensor) -> Tensor:
        """The sum over ranks of 0-d tensors: a loss, which every rank differentiates alike, so
        that backward needs no collective."""
        return AllReduceLoss.apply(x, self.shards.group)

    @not_compiled
    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, which each rank may use in its own way: in
        backward their gradients are added up by another all-reduce."""
        return AllReduceSum.apply(x, self.shards.group)

    def all_reduce_mean(self, x: Tensor, where: Tensor) -> Tensor:
        """The mean of all ranks' x over `where`, 0 if that is nowhere; as `all_reduce_loss`."""
        total = self.all_reduce_loss(torch.where(where, x, 0).sum())
        return total / self.all_reduce_sum(where.sum()).clamp(min=1)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The maximum over ranks of tensors of one shape, without gradient."""
        what, group = "all-reduce of a maximum", self.shards.group
        return Started(what, all_reduce_max, torch.empty_like(x), x.detach(), group).wait()

    def broadcast(self, x: Tensor) -> Tensor:
        """What the first rank has in place of x, without gradient."""
        return completed("broadcast", broadcast, x, self.shards.group)

    @not_compiled
    def all_gather_rows(self, x: Tensor) -> Tensor:
        """(n, …) of each rank one after the other, n differing between them. Memory is that of the
        batch of all ranks: for what the chunks of `similarity_logsumexp` cannot say."""
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
        row_weights: tuple[Tensor, Tensor | None] | None = None,
        col_weights: tuple[Tensor, Tensor | None] | None = None,
        return_stats: bool = True,
        backend: str | None = None,
    ) -> Stats | Tensor | tuple[Tensor, Stats]:
        """`ito_kernels.similarity_logsumexp` of all ranks' rows of a and b.

        Statistics of this rank's rows over all ranks' columns, and of its columns over all ranks'
        rows; the weighted sum is over all ranks. `row_ids` and `col_ids` are `self.query_ids` and
        `self.key_ids`; biases and limits are of this rank's rows and columns.
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
        out = Softplus.apply(self.shards, module, needs, row_weights, *arguments)
        return out if row_weights is None else self.all_reduce_loss(out)

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
