"""The batch of all ranks: the primitive over keys that other ranks hold, gathered in chunks.

Every rank holds its rows of both towers. Keys travel chunk by chunk, the next one in flight while
the kernels work on the current one; a rank's row statistics are complete after the last chunk, and
those of its columns after one exchange of O(B) numbers. Backward walks over the chunks again and
returns the gradients of the keys to their owners. Memory is O(local·D + chunk·D + B) on each rank.

All ranks must call the same losses in the same order, with the same options.

Environment: ITO_GATHER_CACHE_BYTES (64 MiB by default, the same on every rank) bounds the gathered
keys that are kept for backward; the rest is gathered again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .similarity import dispatch, op
from .similarity.pairs import count_positives, finite_shift
from .similarity.spec import Grads, Needs, Problem, Stats, Upstream, make_problem

# Enough rows for full-speed matrix products; 16 MiB of keys at D = 512 in fp32.
MIN_CHUNK = 8192
GATHER_CACHE_BYTES = 64 << 20


# ---- collectives: torch 2.13 has new names for some. They start here and nowhere else.


def _all_gather(out: Tensor, x: Tensor, group) -> dist.Work:
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(out, x, group=group, async_op=True)


def _reduce_scatter(out: Tensor, x: Tensor, group) -> dist.Work:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(out, x, group=group, async_op=True)


def _all_to_all(out: Tensor, x: Tensor, group) -> dist.Work:
    return dist.all_to_all_single(out, x, group=group, async_op=True)


def _all_reduce(out: Tensor, x: Tensor, group) -> dist.Work:
    out.copy_(x)
    return dist.all_reduce(out, group=group, async_op=True)


class _Started:
    """A collective under way. `wait` returns its output, or raises with its name."""

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


# ---- the batch


def _not_compiled(method: Callable) -> Callable:
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


def global_rows(count: int, group, device: torch.device) -> Tensor:
    """(count,) the numbers of this rank's rows among those of all ranks, in the order of ranks;
    without a group, of these alone."""
    if group is None:
        return torch.arange(count, device=device)
    group = _process_group(group)
    counts = _sizes(group, device, count)[:, 0]
    first = int(counts[: dist.get_rank(group)].sum())
    return torch.arange(first, first + count, device=device)


class GlobalBatch:
    """The rows of all ranks of a group, of which this rank holds its own.

    Args:
        group: a `ProcessGroup` or a one-dimensional `DeviceMesh` that this process belongs to.
        queries, keys: this rank's (n, D) and (m, D); the numbers may differ between ranks.
        query_ids, key_ids: (n,) and (m,) integers, equal across ranks for positives; by default
            the row numbers in the global batch, then n must equal m. Negative ids are padding.
        chunk_size: keys of all ranks that are gathered at a time, rounded up to as many from each;
            by default as many as the largest local batch, at least 8,192.

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
        self.group = _process_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        n, m, device = len(queries), len(keys), queries.device
        sizes = _sizes(self.group, device, n, m)
        self.most_queries, self.most_keys = sizes.max(0).values.tolist()
        if query_ids is None or key_ids is None:
            if n != m:
                raise ValueError(f"ids are needed for {n} queries and {m} keys")
            first = int(sizes[: self.rank, 0].sum())
            rows = torch.arange(first, first + n, device=device)
            query_ids = rows if query_ids is None else query_ids
            key_ids = rows if key_ids is None else key_ids
        self.query_ids, self.key_ids = query_ids, key_ids
        # (size, most), padded by -1
        self.all_query_ids = self._gather("query ids", query_ids, self.most_queries, -1)
        self.all_key_ids = self.all_query_ids
        if key_ids is not query_ids:
            self.all_key_ids = self._gather("key ids", key_ids, self.most_keys, -1)
        chunk = chunk_size or max(MIN_CHUNK, self.most_keys)
        step = min(-(-chunk // self.size), self.most_keys)
        self.parts = [
            slice(start, min(start + step, self.most_keys))
            for start in range(0, self.most_keys, step)
        ]

    def everyones(self, ids: Tensor) -> Tensor:
        """`query_ids` or `key_ids` of all ranks, with some padding."""
        return (self.all_query_ids if ids is self.query_ids else self.all_key_ids).flatten()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of 0-d tensors."""
        return _Sum.apply(x, self)

    def mean_where(self, x: Tensor, where: Tensor) -> Tensor:
        """The mean of all ranks' x over `where`, 0 if that is nowhere."""
        return self.sum(torch.where(where, x, 0).sum()) / self.sum(where.sum()).clamp(min=1)

    @_not_compiled
    def similarity_logsumexp(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        *,
        row_ids: Tensor,
        col_ids: Tensor,
        positives: str | None = None,
        exclude_self: bool = False,
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
        `self.query_ids` and `self.key_ids`.
        """
        needs, module, arguments = self._prepare(
            a,
            b,
            scale,
            backend,
            row_ids=row_ids,
            col_ids=col_ids,
            positives=positives,
            exclude_self=exclude_self,
            cols=cols,
            hardest=hardest,
        )
        out = iter(_Logsumexp.apply(self, module, needs, *arguments))
        side = (True, True, positives is not None, hardest)
        stats = Stats(*(next(out) if x else None for x in (*side, *(cols and x for x in side))))
        if row_weights is None and col_weights is None:
            return stats
        (u, alpha), (v, beta) = row_weights or (None, None), col_weights or (None, None)
        total = self.sum(op._total(stats, Upstream(u, v, alpha, beta)))
        return (total, Stats(*(_detached(x) for x in stats))) if return_stats else total

    @_not_compiled
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
            a, b, scale, backend, row_bias=row_bias, row_ids=row_ids, col_ids=col_ids
        )
        out = _Softplus.apply(self, module, needs, row_weights, *arguments)
        return out if row_weights is None else self.sum(out)

    def _prepare(
        self, a: Tensor, b: Tensor, scale: float | Tensor, backend: str | None, **what
    ) -> tuple[Needs, ModuleType, tuple]:
        """The gradients that are wanted, the backend, and a Problem's fields; b is never None."""
        what.setdefault("row_bias", None)
        problem = make_problem(a, b, scale, col_bias=None, **what)
        module = dispatch.load(dispatch.choose(problem, backend))
        problem = problem._replace(b=problem.a if problem.b is None else problem.b)
        live = torch.is_grad_enabled()
        needs = Needs(*(live and x is not None and x.requires_grad for x in problem[:4]), False)
        return needs, module, tuple(problem)

    def _gather(self, what: str, x: Tensor, length: int, fill: float = 0) -> Tensor:
        """(…, k) of each rank as (size, …, length)."""
        x = torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=fill)
        return self._start_gather(what, x[None]).wait()

    def _start_gather(self, what: str, x: Tensor) -> _Started:
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        return _Started(f"all-gather of {what}", _all_gather, out, x.contiguous(), self.group)

    def _chunks(self, b: Tensor, kept: Sequence[Tensor] = ()) -> Iterator[tuple[slice, Tensor]]:
        """All ranks' rows of a part after the other, (size·part, D); the next part travels while
        this one is used. `kept`: the first parts, from an earlier walk."""

        def start(part: slice) -> _Started:
            x = b[part]
            missing = part.stop - part.start - len(x)
            if missing:
                x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
            return self._start_gather(f"keys {part.start} to {part.stop} of each rank", x)

        b = b.detach()
        yield from zip(self.parts, kept, strict=False)
        rest = self.parts[len(kept) :]
        coming = start(rest[0]) if rest else None
        for part, after in zip(rest, [*rest[1:], None], strict=False):
            keys = coming.wait()
            coming = None if after is None else start(after)
            yield part, keys

    def _blocks(self, problem: Problem, part: slice, keys: Tensor) -> Iterator[tuple]:
        """The problem of this rank's rows with a chunk's keys, with the range of those keys.

        One; under `exclude_self` up to three: self pairs are with this rank's own part alone.
        """
        ids = _flat(self.all_key_ids[:, part])
        step, end = part.stop - part.start, len(keys)
        own = (self.rank * step, (self.rank + 1) * step)
        bounds = (0, *own, end) if problem.exclude_self else (0, end)
        for low, high in pairwise(bounds):
            if low == high:
                continue
            mine = problem.exclude_self and (low, high) == own
            yield (
                slice(low, high),
                problem._replace(
                    b=keys[low:high],
                    col_ids=ids[low:high],
                    exclude_self=mine,
                    diagonal=-part.start if mine else 0,
                ),
            )


def _process_group(group: object) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim}")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not hold this process: call the loss on its members alone")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def _sizes(group: dist.ProcessGroup, device: torch.device, *mine: int) -> Tensor:
    """(ranks, len(mine)) of every rank, on the host."""
    x = torch.tensor([mine], device=device)
    out = x.new_empty(dist.get_world_size(group), len(mine))
    return _Started("all-gather of batch sizes", _all_gather, out, x, group).wait().cpu()


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _gather_cache_bytes() -> int:
    text = os.environ.get("ITO_GATHER_CACHE_BYTES", GATHER_CACHE_BYTES)
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"ITO_GATHER_CACHE_BYTES must be a whole number of bytes, got {text!r}")
    return budget


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: GlobalBatch) -> Tensor:
        ctx.size = whole.size
        out = torch.empty_like(x)
        return _Started("all-reduce of a sum", _all_reduce, out, x.detach(), whole.group).wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad * ctx.size, None  # which averaging over ranks divides by


# ---- statistics of parts of a row or column, and their union


class _Side(NamedTuple):
    """As in `Stats`; count: the number of positives, where `pos` is a sum relative to `max`."""

    max: Tensor
    logsum: Tensor
    pos: Tensor | None
    neg_max: Tensor | None
    count: Tensor | None

    def merged(self, other: _Side) -> _Side:
        top = torch.maximum(self.max, other.max)
        x, y = self._relative_to(top), other._relative_to(top)
        pos, count, neg_max = x.pos, x.count, x.neg_max
        if count is not None:
            pos, count = pos + y.pos, count + y.count
        elif pos is not None:
            pos = torch.logaddexp(pos, y.pos)
        if neg_max is not None:
            neg_max = torch.maximum(neg_max, y.neg_max)
        return _Side(top, torch.logaddexp(x.logsum, y.logsum), pos, neg_max, count)

    def _relative_to(self, top: Tensor) -> _Side:
        shift = finite_shift(self.max) - finite_shift(top)
        pos = self.pos
        if pos is not None:
            pos = pos + (shift if self.count is None else self.count * shift)
        return self._replace(logsum=self.logsum + shift, pos=pos)

    @staticmethod
    def union(sides: list[_Side]) -> _Side:
        whole, *rest = sides
        for side in rest:
            whole = whole.merged(side)
        return whole


def _counts(problem: Problem) -> tuple[Tensor, Tensor]:
    """The number of positives of each row and column."""
    rows = count_positives(problem.row_ids, problem.col_ids)
    cols = count_positives(problem.col_ids, problem.row_ids)
    if problem.exclude_self:
        first = -problem.diagonal  # the row whose own column is the first one
        mine = problem.row_ids[first : first + problem.m]
        same = ((mine == problem.col_ids[: len(mine)]) & (mine >= 0)).long()
        rows[first : first + len(mine)] -= same
        cols[: len(mine)] -= same
    return rows.to(problem.accumulate), cols.to(problem.accumulate)


class _Columns:
    """Statistics of everyone's columns over this rank's rows; then of its own over everyone's."""

    def __init__(self, whole: GlobalBatch, problem: Problem):
        self.whole, self.number, self.present = whole, len(problem.b), []
        self.sent = problem.scale.new_empty(0)  # (owner, statistic, column)

    def add(self, part: slice, at: slice, side: _Side) -> None:
        """Of the columns `at` of the chunk `part`: those of one owner or of several."""
        vectors = [x for x in side if x is not None]
        if not self.present:
            self.present = [x is not None for x in side]
            shape = (self.whole.size, len(vectors), self.whole.most_keys)
            self.sent = self.sent.new_empty(shape)
        step = part.stop - part.start
        owners = slice(at.start // step, at.stop // step)
        for i, x in enumerate(vectors):
            self.sent[owners, i, part] = x.view(-1, step)

    def exchanged(self) -> _Side:
        what, arrived = "all-to-all of column statistics", torch.empty_like(self.sent)
        arrived = _Started(what, _all_to_all, arrived, self.sent, self.whole.group).wait()
        return _Side.union(
            [
                _Side(*(next(vectors) if x else None for x in self.present))
                for vectors in map(iter, arrived[:, :, : self.number].clone())
            ]
        )


class _Kept:
    """The first chunks of keys, as many as the budget holds, for backward."""

    def __init__(self, wanted: bool):
        self.chunks, self.budget = [], _gather_cache_bytes() if wanted else 0

    def offer(self, keys: Tensor) -> None:
        self.budget -= keys.nbytes
        if self.budget >= 0:
            self.chunks.append(keys)


class _Logsumexp(torch.autograd.Function):
    """Problem fields of this rank's rows and keys to the statistics of both, those wanted."""

    @staticmethod
    def forward(ctx, whole: GlobalBatch, module: ModuleType, needs: Needs, *fields):
        problem = Problem(*(_detached(x) if isinstance(x, Tensor) else x for x in fields))
        kept = _Kept(any(needs))
        rows, cols = None, _Columns(whole, problem)
        for part, keys in whole._chunks(problem.b):
            kept.offer(keys)
            for at, block in whole._blocks(problem, part, keys):
                with torch.autocast(keys.device.type, enabled=False):
                    stats = module.logsumexp_forward(block)
                counts = _counts(block) if problem.positives == "linear" else (None, None)
                row = _Side(*stats[:4], counts[0])
                rows = row if rows is None else rows.merged(row)
                if problem.cols:
                    cols.add(part, at, _Side(*stats[4:], counts[1]))
        out = list(rows[:4])
        if problem.cols:
            out += cols.exchanged()[:4]
        ctx.whole, ctx.module, ctx.needs, ctx.kept = whole, module, needs, kept.chunks
        ctx.flags = problem[7:]
        ctx.set_materialize_grads(False)
        ctx.present = [x is not None for x in out]
        constant = [x for i, x in enumerate(out) if x is not None and i % 4 in (0, 3)]  # maxima
        ctx.mark_non_differentiable(*constant)
        out = [x for x in out if x is not None]
        ctx.save_for_backward(*problem[:7], *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *arrived):
        op._first_order_only()
        whole, needs = ctx.whole, ctx.needs
        nothing = (None,) * (len(Problem._fields) + 3)
        if all(x is None for x in arrived):
            return nothing
        problem = Problem(*ctx.saved_tensors[:7], *ctx.flags)
        stats = _unpacked(ctx.saved_tensors[7:], ctx.present)
        grads = _unpacked(arrived, ctx.present)
        # of the columns: what backward needs, of everyone
        sent = (stats.col_max, stats.col_logsum, stats.col_pos, grads.col_logsum, grads.col_pos)
        problem = problem._replace(cols=any(x is not None for x in sent[3:]))
        if problem.cols:
            packed = torch.stack([x for x in sent if x is not None])
            columns = whole._gather("column statistics", packed, whole.most_keys)
        walk = _Gradients(whole, problem, needs)
        for part, keys in whole._chunks(problem.b, ctx.kept):
            if problem.cols:
                vectors = (_flat(columns[:, i, part]) for i in range(columns.shape[1]))
                everyone = [None if x is None else next(vectors) for x in sent]
            for at, block in whole._blocks(problem, part, keys):
                cols = (None,) * 5
                if problem.cols:
                    cols = [None if x is None else x[at] for x in everyone]
                top, logsum, pos, v, beta = cols
                upstream = Upstream(grads.row_logsum, v, grads.row_pos, beta)
                block_stats = Stats(*stats[:4], top, logsum, pos)
                with torch.autocast(keys.device.type, enabled=False):
                    walk.add(ctx.module.logsumexp_backward(block, block_stats, upstream, needs))
            walk.send(part)
        return (None,) * 3 + walk.result() + nothing[8:]


def _unpacked(tensors: tuple, present: list[bool]) -> Stats:
    tensors = iter(tensors)
    return Stats(*(next(tensors) if x else None for x in present))


class _Softplus(torch.autograd.Function):
    """Problem fields of this rank's rows and keys to the rows' sums, or their weighted sum."""

    @staticmethod
    def forward(
        ctx,
        whole: GlobalBatch,
        module: ModuleType,
        needs: Needs,
        weights: Tensor | None,
        *fields,
    ):
        problem = Problem(*(_detached(x) if isinstance(x, Tensor) else x for x in fields))
        # in fp16 the gradients of a mean underflow unless a loss scale has reached them
        early = any(needs) and weights is not None and problem.a.dtype != torch.float16
        kept = _Kept(any(needs) and not early)
        rows = problem.scale.new_zeros(problem.n)
        walk = _Gradients(whole, problem, needs if early else Needs())
        for part, keys in whole._chunks(problem.b):
            kept.offer(keys)
            for _, block in whole._blocks(problem, part, keys):
                with torch.autocast(keys.device.type, enabled=False):
                    if not early:
                        rows += module.softplus_forward(block)
                    elif hasattr(module, "softplus_both"):
                        more, grads = module.softplus_both(block, weights, needs)
                        rows += more
                        walk.add(grads)
                    else:
                        rows += module.softplus_forward(block)
                        walk.add(module.softplus_backward(block, weights, needs))
            if early:
                walk.send(part)
        ctx.whole, ctx.module, ctx.needs, ctx.kept = whole, module, needs, kept.chunks
        ctx.flags, ctx.early = problem[7:], early
        if early:
            ctx.save_for_backward(*walk.result())
        else:
            ctx.save_for_backward(*problem[:7], weights)
        return rows if weights is None else (rows * weights).sum()

    @staticmethod
    def backward(ctx, arrived: Tensor):
        op._first_order_only()
        nothing = (None,) * (len(Problem._fields) - 5)
        if ctx.early:
            grads = (None if x is None else x * arrived for x in ctx.saved_tensors)
            return *(None,) * 4, *grads, *nothing
        *fields, weights = ctx.saved_tensors
        problem = Problem(*fields, *ctx.flags)
        u = arrived if weights is None else arrived * weights
        walk = _Gradients(ctx.whole, problem, ctx.needs)
        for part, keys in ctx.whole._chunks(problem.b, ctx.kept):
            for _, block in ctx.whole._blocks(problem, part, keys):
                with torch.autocast(keys.device.type, enabled=False):
                    walk.add(ctx.module.softplus_backward(block, u, ctx.needs))
            walk.send(part)
        return *(None,) * 4, *walk.result(), *nothing


class _Gradients:
    """Collects gradients block by block in the accumulate dtype; those of keys are summed over
    ranks by their owner, a part travelling while the next is computed."""

    def __init__(self, whole: GlobalBatch, problem: Problem, needs: Needs):
        self.whole, self.problem, self.sums = whole, problem, Grads()
        self.keys, self.pending, self.blocks = None, None, []
        if needs.b:
            self.keys = problem.scale.new_empty(whole.most_keys, problem.d)

    def add(self, grads: Grads) -> None:
        if self.keys is not None:
            self.blocks.append(grads.b)
        sums = grads._replace(b=None, a=_wide(grads.a, self.problem.accumulate))
        self.sums = Grads(
            *(
                x if total is None else total.add_(x)
                for total, x in zip(self.sums, sums, strict=True)
            )
        )

    def send(self, part: slice) -> None:
        """The blocks of a part are complete."""
        if self.keys is None:
            return
        x = self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks)
        x = x.to(self.problem.accumulate)
        self.blocks = []
        if self.pending is not None:
            self.pending.wait()
        what = f"reduce-scatter of the gradients of keys {part.start} to {part.stop} of each rank"
        out = self.keys[part]
        self.pending = _Started(what, _reduce_scatter, out, x, self.whole.group)

    def result(self) -> tuple:
        """Of a, b, scale, row_bias and col_bias."""
        a, _, scale, row_bias, _ = self.sums
        if scale is not None and self.problem.scale.ndim == 0:
            scale = scale.sum()
        b = None
        if self.keys is not None:
            self.pending.wait()
            b = self.keys[: len(self.problem.b)].to(self.problem.a.dtype)
        return None if a is None else a.to(self.problem.a.dtype), b, scale, row_bias, None


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
