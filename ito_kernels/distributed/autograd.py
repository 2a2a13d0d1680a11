"""The autograd functions of the global batch: forward and backward over the keys of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..similarity import op
from ..similarity.backend import Backend
from ..similarity.spec import (
    Grads,
    Needs,
    Problem,
    SideStats,
    SideUpstream,
    Stats,
    Upstream,
    accumulate_dtype,
    without_autocast,
)
from .chunks import Chunk, ChunkCache, flat
from .collectives import (
    Started,
    all_gather_counts,
    all_gathered,
    all_reduce,
    completed,
    padded_to,
    reduce_scatter,
)
from .sharding import Sharding
from .statistics import ColumnStats, PartialStats, count_pairs

# the gradients of a problem's fields after its inputs
NO_GRADIENTS = (None,) * (len(Problem._fields) - len(Grads._fields))


class AllReduceLoss(torch.autograd.Function):
    """An all-reduce whose upstream gradient is equal on all ranks: its sum over ranks needs no
    collective."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        return completed("all-reduce of a sum", all_reduce, x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad * ctx.size, None  # averaging gradients over ranks divides by the size


class AllReduceSum(torch.autograd.Function):
    """An all-reduce whose upstream gradient differs between ranks: backward all-reduces it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return completed("all-reduce of a sum", all_reduce, x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return completed("all-reduce of the gradient of a sum", all_reduce, grad, ctx.group), None


class AllGatherRows(torch.autograd.Function):
    """All-gathers (n, …) of each rank to (N, …). Backward reduce-scatters the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.number, ctx.dtype = group, len(x), x.dtype
        ctx.counts = all_gather_counts(group, x.device, len(x)).flatten().tolist()
        ctx.max_count = max(ctx.counts)
        padded = torch.cat([x, x.new_zeros(ctx.max_count - len(x), *x.shape[1:])])
        gathered = all_gathered("rows", padded, group)
        return torch.cat([rows[:n] for rows, n in zip(gathered, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        shape = (ctx.max_count, *grad.shape[1:])
        # summed in fp32, like the gradients of keys
        sent = grad.new_zeros(len(ctx.counts), *shape, dtype=accumulate_dtype(grad.dtype))
        for rows, part in zip(sent, grad.split(ctx.counts), strict=True):
            rows[: len(part)] = part
        name, out = "reduce-scatter of the gradients of rows", sent.new_empty(shape)
        out = Started(name, reduce_scatter, out, sent.flatten(0, 1), ctx.group).wait()
        return out[: ctx.number].to(ctx.dtype), None


class Logsumexp(torch.autograd.Function):
    """The requested statistics of this rank's rows and columns, from the fields of a Problem of
    this rank's rows and keys."""

    @staticmethod
    def forward(ctx, shards: Sharding, module: Backend, needs: Needs, *fields):
        problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in fields))
        if problem.col_bias is not None:
            bias = padded_to(shards.col.max_count, problem.col_bias)
            problem = problem._replace(col_bias=all_gathered("key biases", bias, shards.group))
        cache = ChunkCache(any(needs))
        rows, cols = None, ColumnStats(shards, problem)
        for chunk in shards.transport().all_gather_chunks(problem.b):
            cache.offer(chunk.keys)
            for at, block in shards.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    stats = module.logsumexp_forward(block)
                row_count = col_count = None
                if problem.positives == "linear":
                    row_count, col_count = count_pairs(block)
                if problem.rows:
                    row = PartialStats(*stats.row, row_count)
                    rows = row if rows is None else rows.merged(row)
                if problem.cols:
                    cols.add(chunk, at, PartialStats(*stats.col, col_count))
        stats = Stats(
            rows.stats if problem.rows else None,
            cols.all_to_all().stats if problem.cols else None,
        )
        ctx.shards, ctx.module, ctx.needs, ctx.cached_chunks = shards, module, needs, cache.chunks
        ctx.options = problem.options
        ctx.set_materialize_grads(False)
        maxima = (stats.row_max, stats.row_neg_max, stats.col_max, stats.col_neg_max)
        ctx.mark_non_differentiable(*op.present(*maxima))
        out = op.present(*(x for side in stats if side for x in side))
        ctx.save_for_backward(*problem.tensors, *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *arrived):
        op.first_order_only()
        arrived = op.readable_gradients(arrived)
        shards, needs = ctx.shards, ctx.needs
        if all(x is None for x in arrived):
            return (None,) * (3 + len(Problem._fields))
        problem, out = op.saved_problem(ctx.saved_tensors, ctx.options)
        stats, grads = (op.present_stats(problem, iter(x)) for x in (out, arrived))
        upstream = op.upstream_of(grads)
        # backward needs these vectors of all ranks' columns
        sent = (stats.col_max, stats.col_logsum, stats.col_pos, *upstream.col)
        problem = problem._replace(cols=any(x is not None for x in upstream.col))
        if problem.cols:
            packed = torch.stack([x for x in sent if x is not None])
            packed = padded_to(shards.col.max_count, packed)
            columns = all_gathered("column statistics", packed, shards.group)
        collected = _Gradients(shards, problem, needs)
        for chunk in shards.transport().all_gather_chunks(problem.b, ctx.cached_chunks):
            if problem.cols:
                part = columns[chunk.owners, :, chunk.part]
                vectors = (flat(part[:, i]) for i in range(part.shape[1]))
                chunk_vectors = [None if x is None else next(vectors) for x in sent]
            for at, block in shards.blocks(problem, chunk):
                block_stats, block_upstream = Stats(stats.row), Upstream(upstream.row)
                if problem.cols:
                    maximum, logsum, pos, *grad = (
                        None if x is None else x[at] for x in chunk_vectors
                    )
                    block_stats = block_stats._replace(col=SideStats(maximum, logsum, pos))
                    block_upstream = block_upstream._replace(col=SideUpstream(*grad))
                with without_autocast(block.a.device):
                    collected.add(
                        ctx.module.logsumexp_backward(block, block_stats, block_upstream, needs)
                    )
            collected.send(chunk)
        return None, None, None, *collected.result(), *NO_GRADIENTS


class Softplus(torch.autograd.Function):
    """The softplus sums of this rank's rows, or their weighted sum, from the fields of a Problem of
    this rank's rows and keys."""

    @staticmethod
    def forward(
        ctx,
        shards: Sharding,
        module: Backend,
        needs: Needs,
        weights: Tensor | None,
        *fields,
    ):
        problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in fields))
        # compute gradients in forward, except in fp16: there the gradients of a mean underflow
        # without the loss scale, which is known only in backward
        grads_in_forward = any(needs) and weights is not None and problem.a.dtype != torch.float16
        cache = ChunkCache(any(needs) and not grads_in_forward)
        rows = problem.scale.new_zeros(problem.n)
        collected = _Gradients(shards, problem, needs if grads_in_forward else Needs())
        for chunk in shards.transport().all_gather_chunks(problem.b):
            cache.offer(chunk.keys)
            for _, block in shards.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    if not grads_in_forward:
                        rows += module.softplus_forward(block)
                    else:
                        more, grads = module.softplus_both(block, weights, needs)
                        rows += more
                        collected.add(grads)
            if grads_in_forward:
                collected.send(chunk)
        ctx.shards, ctx.module, ctx.needs, ctx.cached_chunks = shards, module, needs, cache.chunks
        ctx.options, ctx.grads_in_forward = problem.options, grads_in_forward
        if grads_in_forward:
            ctx.save_for_backward(*collected.result())
        else:
            ctx.save_for_backward(*problem.tensors, weights)
        return rows if weights is None else (rows * weights).sum()

    @staticmethod
    def backward(ctx, arrived: Tensor):
        op.first_order_only()
        (arrived,) = op.readable_gradients([arrived])
        if ctx.grads_in_forward:
            grads = (None if x is None else x * arrived for x in ctx.saved_tensors)
            return None, None, None, None, *grads, *NO_GRADIENTS
        problem, (weights,) = op.saved_problem(ctx.saved_tensors, ctx.options)
        u = arrived if weights is None else arrived * weights
        collected = _Gradients(ctx.shards, problem, ctx.needs)
        for chunk in ctx.shards.transport().all_gather_chunks(problem.b, ctx.cached_chunks):
            for _, block in ctx.shards.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    collected.add(ctx.module.softplus_backward(block, u, ctx.needs))
            collected.send(chunk)
        return None, None, None, None, *collected.result(), *NO_GRADIENTS


class _Gradients:
    """Sums gradients over the blocks, in the accumulate dtype."""

    def __init__(self, shards: Sharding, problem: Problem, needs: Needs):
        self.shards, self.problem, self.sums = shards, problem, Grads()
        self.keys = self.biases = None
        self.blocks = []  # (gradient of keys, gradient of their biases) for each block of a chunk
        if needs.b:
            out = problem.scale.new_empty(shards.col.max_count, problem.d)
            self.keys = shards.transport().reduce_scatter_grads(out)
        if needs.col_bias:
            self.biases = torch.empty_like(problem.col_bias)

    def add(self, grads: Grads) -> None:
        self.blocks.append((grads.b, grads.col_bias))
        sums = grads._replace(b=None, col_bias=None, a=_to_dtype(grads.a, self.problem.accumulate))
        self.sums = Grads(
            *(
                x if total is None else total.add_(x)
                for total, x in zip(self.sums, sums, strict=True)
            )
        )

    def send(self, chunk: Chunk) -> None:
        """Send the gradients of a chunk's keys, once all of its blocks have been added."""
        keys, biases = zip(*self.blocks, strict=True)
        self.blocks = []
        if self.keys is not None:
            x = keys[0] if len(keys) == 1 else torch.cat(keys)
            self.keys.send(chunk, x.to(self.problem.accumulate))
        if self.biases is not None:
            self.biases[chunk.owners, chunk.part] = torch.cat(biases).view(-1, chunk.step)

    def result(self) -> Grads:
        """The gradients of this rank's inputs in their dtypes. Those of keys and key biases are
        summed over ranks."""
        a, _, scale, row_bias, _ = self.sums
        b = None if self.keys is None else self.keys.result()[: self.problem.m]
        a, b = (None if x is None else x.to(self.problem.a.dtype) for x in (a, b))
        return Grads(a, b, scale, row_bias, self._bias_grads())

    def _bias_grads(self) -> Tensor | None:
        if self.biases is None:
            return None
        name, out = "reduce-scatter of the gradients of key biases", self.biases[:1].clone()
        out = Started(name, reduce_scatter, out, self.biases, self.shards.group).wait()
        return out[0, : self.problem.m]


def _to_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
