"""The global batch as autograd functions: forward and backward walks over everyone's keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
from .chunks import Chunk, Kept, flat
from .collectives import Started, all_reduce, completed, gathered_sizes, reduce_scatter
from .statistics import Columns, Side, count_pairs

if TYPE_CHECKING:
    from .batch import GlobalBatch


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: GlobalBatch) -> Tensor:
        ctx.size = whole.size
        return completed("all-reduce of a sum", all_reduce, x, whole.group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad * ctx.size, None  # which averaging over ranks divides by


class SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: GlobalBatch) -> Tensor:
        ctx.whole = whole
        return completed("all-reduce of a shared sum", all_reduce, x, whole.group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        what = "all-reduce of the gradient of a shared sum"
        return completed(what, all_reduce, grad, ctx.whole.group), None


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: GlobalBatch) -> Tensor:
        ctx.whole, ctx.number, ctx.dtype = whole, len(x), x.dtype
        ctx.counts = gathered_sizes(whole.group, x.device, len(x))[:, 0].tolist()
        ctx.most = max(ctx.counts)
        padded = torch.cat([x, x.new_zeros(ctx.most - len(x), *x.shape[1:])])
        everyone = whole.start_gather("rows", padded).wait().view(whole.size, *padded.shape)
        return torch.cat([rows[:n] for rows, n in zip(everyone, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        size, shape = ctx.whole.size, (ctx.most, *grad.shape[1:])
        # summed in fp32, as the gradients of keys are
        sent = grad.new_zeros(size, *shape, dtype=accumulate_dtype(grad.dtype))
        for rows, own in zip(sent, grad.split(ctx.counts), strict=True):
            rows[: len(own)] = own
        what, out = "reduce-scatter of the gradients of rows", sent.new_empty(shape)
        out = Started(what, reduce_scatter, out, sent.flatten(0, 1), ctx.whole.group).wait()
        return out[: ctx.number].to(ctx.dtype), None


class Logsumexp(torch.autograd.Function):
    """Problem fields of this rank's rows and keys to the statistics of both, those wanted."""

    @staticmethod
    def forward(ctx, whole: GlobalBatch, module: Backend, needs: Needs, *fields):
        problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in fields))
        if problem.col_bias is not None:
            bias = whole.gather("key biases", problem.col_bias, whole.most_keys)
            problem = problem._replace(col_bias=bias)
        kept = Kept(any(needs))
        rows, cols = None, Columns(whole, problem)
        for chunk in whole.transport.walk(problem.b):
            kept.offer(chunk.keys)
            for at, block in whole.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    stats = module.logsumexp_forward(block)
                counts = count_pairs(block) if problem.positives == "linear" else (None, None)
                if problem.rows:
                    row = Side(*stats.row, counts[0])
                    rows = row if rows is None else rows.merged(row)
                if problem.cols:
                    cols.add(chunk, at, Side(*stats.col, counts[1]))
        stats = Stats(
            rows.stats if problem.rows else None,
            cols.exchanged().stats if problem.cols else None,
        )
        ctx.whole, ctx.module, ctx.needs, ctx.kept = whole, module, needs, kept.chunks
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
        arrived = op.arrived_gradients(arrived)
        whole, needs = ctx.whole, ctx.needs
        nothing = (None,) * (len(Problem._fields) + 3)
        if all(x is None for x in arrived):
            return nothing
        problem, out = op.saved_problem(ctx.saved_tensors, ctx.options)
        stats, grads = (op.present_stats(problem, iter(x)) for x in (out, arrived))
        upstream = op.upstream_of(grads)
        # of the columns: what backward needs, of everyone
        sent = (stats.col_max, stats.col_logsum, stats.col_pos, *upstream.col)
        problem = problem._replace(cols=any(x is not None for x in upstream.col))
        if problem.cols:
            packed = torch.stack([x for x in sent if x is not None])
            columns = whole.gather("column statistics", packed, whole.most_keys)
        walk = _Gradients(whole, problem, needs)
        for chunk in whole.transport.walk(problem.b, ctx.kept):
            if problem.cols:
                own = columns[chunk.owners, :, chunk.part]
                vectors = (flat(own[:, i]) for i in range(own.shape[1]))
                everyone = [None if x is None else next(vectors) for x in sent]
            for at, block in whole.blocks(problem, chunk):
                block_stats, block_upstream = Stats(stats.row), Upstream(upstream.row)
                if problem.cols:
                    own = [None if x is None else x[at] for x in everyone]
                    top, logsum, pos, *grad = own
                    block_stats = block_stats._replace(col=SideStats(top, logsum, pos))
                    block_upstream = block_upstream._replace(col=SideUpstream(*grad))
                with without_autocast(block.a.device):
                    walk.add(
                        ctx.module.logsumexp_backward(block, block_stats, block_upstream, needs)
                    )
            walk.send(chunk)
        return (None,) * 3 + walk.result() + nothing[8:]


class Softplus(torch.autograd.Function):
    """Problem fields of this rank's rows and keys to the rows' sums, or their weighted sum."""

    @staticmethod
    def forward(
        ctx,
        whole: GlobalBatch,
        module: Backend,
        needs: Needs,
        weights: Tensor | None,
        *fields,
    ):
        problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in fields))
        # in fp16 the gradients of a mean underflow unless a loss scale has reached them
        early = any(needs) and weights is not None and problem.a.dtype != torch.float16
        kept = Kept(any(needs) and not early)
        rows = problem.scale.new_zeros(problem.n)
        walk = _Gradients(whole, problem, needs if early else Needs())
        for chunk in whole.transport.walk(problem.b):
            kept.offer(chunk.keys)
            for _, block in whole.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    if not early:
                        rows += module.softplus_forward(block)
                    else:
                        more, grads = module.softplus_both(block, weights, needs)
                        rows += more
                        walk.add(grads)
            if early:
                walk.send(chunk)
        ctx.whole, ctx.module, ctx.needs, ctx.kept = whole, module, needs, kept.chunks
        ctx.options, ctx.early = problem.options, early
        if early:
            ctx.save_for_backward(*walk.result())
        else:
            ctx.save_for_backward(*problem.tensors, weights)
        return rows if weights is None else (rows * weights).sum()

    @staticmethod
    def backward(ctx, arrived: Tensor):
        op.first_order_only()
        (arrived,) = op.arrived_gradients([arrived])
        nothing = (None,) * (len(Problem._fields) - 5)
        if ctx.early:
            grads = (None if x is None else x * arrived for x in ctx.saved_tensors)
            return *(None,) * 4, *grads, *nothing
        problem, (weights,) = op.saved_problem(ctx.saved_tensors, ctx.options)
        u = arrived if weights is None else arrived * weights
        walk = _Gradients(ctx.whole, problem, ctx.needs)
        for chunk in ctx.whole.transport.walk(problem.b, ctx.kept):
            for _, block in ctx.whole.blocks(problem, chunk):
                with without_autocast(block.a.device):
                    walk.add(ctx.module.softplus_backward(block, u, ctx.needs))
            walk.send(chunk)
        return *(None,) * 4, *walk.result(), *nothing


class _Gradients:
    """Collects gradients block by block in the accumulate dtype."""

    def __init__(self, whole: GlobalBatch, problem: Problem, needs: Needs):
        self.whole, self.problem, self.sums = whole, problem, Grads()
        self.keys = self.biases = None
        self.blocks = []  # gradients of keys and of their biases
        if needs.b:
            sums = problem.scale.new_empty(whole.most_keys, problem.d)
            self.keys = whole.transport.homeward(sums)
        if needs.col_bias:
            self.biases = torch.empty_like(problem.col_bias)

    def add(self, grads: Grads) -> None:
        self.blocks.append((grads.b, grads.col_bias))
        sums = grads._replace(b=None, col_bias=None, a=_wide(grads.a, self.problem.accumulate))
        self.sums = Grads(
            *(
                x if total is None else total.add_(x)
                for total, x in zip(self.sums, sums, strict=True)
            )
        )

    def send(self, chunk: Chunk) -> None:
        """The blocks of a chunk are complete."""
        keys, biases = zip(*self.blocks, strict=True)
        self.blocks = []
        if self.keys is not None:
            x = keys[0] if len(keys) == 1 else torch.cat(keys)
            self.keys.send(chunk, x.to(self.problem.accumulate))
        if self.biases is not None:
            self.biases[chunk.owners, chunk.part] = torch.cat(biases).view(-1, chunk.step)

    def result(self) -> tuple:
        """Of a, b, scale, row_bias and col_bias."""
        a, _, scale, row_bias, _ = self.sums
        if scale is not None and self.problem.scale.ndim == 0:
            scale = scale.sum()
        b = None if self.keys is None else self.keys.result()[: self.problem.m]
        a, b = (None if x is None else x.to(self.problem.a.dtype) for x in (a, b))
        return a, b, scale, row_bias, None if self.biases is None else self._own_biases()

    def _own_biases(self) -> Tensor:
        what, out = "reduce-scatter of the gradients of key biases", self.biases[:1].clone()
        out = Started(what, reduce_scatter, out, self.biases, self.whole.group).wait()
        return out[0, : self.problem.m]


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
