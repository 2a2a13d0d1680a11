"""The primitive in plain PyTorch, a panel of rows at a time: the fallback for any device.

A panel is `rows × M` scores; about four of them are alive at once, so memory is O(panel + (N+M)·D).
Row statistics are complete after their panel, column statistics are merged panel by panel, and
backward computes each panel's scores again: 4 matrix products in all, 2 with frozen sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .pairs import Pairs, classify, features, finite_shift
from .spec import Grads, Needs, Problem, Stats, Upstream

# 2^20 scores are 4 MiB in fp32: four of them stay in a last-level cache. Below 64 rows the matrix
# products no longer reach the machine's speed, so very wide problems take larger panels.
PANEL_SCORES = 1 << 20
MIN_ROWS = 64


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "runs everywhere"


def describe(problem: Problem) -> str:
    rows = min(_panel_rows(problem), problem.n)
    return f"panels of {rows} x {problem.m} scores in {problem.accumulate}"


def _panel_rows(problem: Problem) -> int:
    return max(MIN_ROWS, PANEL_SCORES // problem.m)


class _Panels:
    """The panels of a problem: their inner products, scores and masks."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.a, self.b = features(problem)
        self.scale = problem.scale.reshape(-1, 1).expand(problem.n, 1)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Pairs]]:
        p = self.problem
        rows = _panel_rows(p)
        for start in range(0, p.n, rows):
            stop = min(start + rows, p.n)
            dot = self.a[start:stop] @ self.b.T
            yield slice(start, stop), dot, classify(p, start, stop)

    def scores(self, rows: slice, dot: Tensor) -> Tensor:
        scores = self.scale[rows] * dot
        if self.problem.row_bias is not None:
            scores += self.problem.row_bias[rows, None]
        if self.problem.col_bias is not None:
            scores += self.problem.col_bias
        return scores


class _Side:
    """Statistics along one side, merged over panels. Positives are kept relative to the maximum."""

    def __init__(self, problem: Problem, length: int):
        def full(value: float) -> Tensor:
            return torch.full((length,), value, dtype=problem.accumulate, device=problem.a.device)

        self.kind, self.hardest = problem.positives, problem.hardest
        self.max, self.sum, self.neg_max = full(-torch.inf), full(0), full(-torch.inf)
        self.pos = full(-torch.inf if self.kind == "lse" else 0)
        self.count = full(0)

    def merge(self, at: slice, scores: Tensor, pairs: Pairs, dim: int) -> None:
        old = self.max[at]
        new = torch.maximum(old, scores.masked_fill(~pairs.allowed, -torch.inf).amax(dim))
        old_shift, shift = finite_shift(old), finite_shift(new)
        relative = scores - shift.unsqueeze(dim)
        moved = old_shift - shift
        total = relative.exp().masked_fill_(~pairs.allowed, 0).sum(dim)
        self.sum[at] = self.sum[at] * moved.exp() + total
        if self.kind == "linear":
            self.pos[at] += self.count[at] * moved
            self.pos[at] += relative.masked_fill(~pairs.positive, 0).sum(dim)
            self.count[at] += pairs.positive.sum(dim)
        elif self.kind == "lse":
            here = relative.masked_fill_(~pairs.positive, -torch.inf).logsumexp(dim)
            self.pos[at] = torch.logaddexp(self.pos[at] + moved, here)
        if self.hardest:
            here = scores.masked_fill(~pairs.negative, -torch.inf).amax(dim)
            self.neg_max[at] = torch.maximum(self.neg_max[at], here)
        self.max[at] = new

    def stats(self) -> tuple[Tensor | None, ...]:
        pos = None if self.kind is None else self.pos
        return self.max, self.sum.log(), pos, self.neg_max if self.hardest else None


def logsumexp_forward(problem: Problem) -> Stats:
    panels = _Panels(problem)
    row_side = _Side(problem, problem.n) if problem.rows else None
    col_side = _Side(problem, problem.m) if problem.cols else None
    for rows, dot, pairs in panels:
        scores = panels.scores(rows, dot)
        if row_side:
            row_side.merge(rows, scores, pairs, 1)
        if col_side:
            col_side.merge(slice(None), scores, pairs, 0)
    nothing = (None,) * 4
    return Stats(
        *(row_side.stats() if row_side else nothing), *(col_side.stats() if col_side else nothing)
    )


def logsumexp_backward(problem: Problem, stats: Stats, upstream: Upstream, needs: Needs) -> Grads:
    panels, total = _Panels(problem), _Gradients(problem, needs)
    row_shift = finite_shift(stats.row_max) if problem.rows else None
    col_shift = finite_shift(stats.col_max) if problem.cols else None

    def add(weights, relative, logsum, pos, grad_logsum, grad_pos, pairs: Pairs) -> None:
        if grad_logsum is not None:
            softmax = (relative - logsum).exp_().mul_(grad_logsum)
            weights += softmax.masked_fill_(~pairs.allowed, 0)
        if grad_pos is not None:
            term = grad_pos.expand_as(weights)
            if problem.positives == "lse":
                term = (relative - pos).exp_() * term
            weights += term.masked_fill(~pairs.positive, 0)

    def column(x: Tensor | None, rows: slice) -> Tensor | None:
        return None if x is None else x[rows, None]

    for rows, dot, pairs in panels:
        scores = panels.scores(rows, dot)
        weights = torch.zeros_like(scores)
        if problem.rows:
            per_row = (stats.row_logsum, stats.row_pos, upstream.u, upstream.alpha)
            relative = scores - row_shift[rows, None]
            add(weights, relative, *(column(x, rows) for x in per_row), pairs)
        if problem.cols:
            relative = scores - col_shift
            add(
                weights, relative, stats.col_logsum, stats.col_pos, upstream.v, upstream.beta, pairs
            )
        total.add(panels, rows, dot, weights)
    return total.grads()


def softplus_forward(problem: Problem) -> Tensor:
    panels = _Panels(problem)
    out = torch.empty(problem.n, dtype=problem.accumulate, device=problem.a.device)
    for rows, dot, pairs in panels:
        scores = panels.scores(rows, dot)
        signed = torch.where(pairs.positive, -scores, scores)
        # torch's default threshold of 20 returns x itself beyond it, off by 2e-9
        terms = softplus(signed, threshold=40)
        out[rows] = terms.masked_fill_(~(pairs.positive | pairs.negative), 0).sum(1)
    return out


def softplus_backward(problem: Problem, u: Tensor, needs: Needs) -> Grads:
    panels, total = _Panels(problem), _Gradients(problem, needs)
    for rows, dot, pairs in panels:
        scores = panels.scores(rows, dot)
        # the slope of softplus(-S) is -σ(-S); both signs in one sigmoid
        sign = torch.where(pairs.positive, -1.0, 1.0).to(scores.dtype)
        weights = torch.sigmoid(scores.mul_(sign)).mul_(sign).mul_(u[rows, None])
        weights.masked_fill_(~(pairs.positive | pairs.negative), 0)
        total.add(panels, rows, dot, weights)
    return total.grads()


class _Gradients:
    """Collects the gradients panel by panel, in the accumulate dtype."""

    def __init__(self, problem: Problem, needs: Needs):
        self.problem, self.needs = problem, needs
        sizes = ((problem.n, problem.d), (problem.m, problem.d), (problem.n,), (problem.n,))
        sizes += ((problem.m,),)
        self.sums = Grads(
            *(
                torch.zeros(size, dtype=problem.accumulate, device=problem.a.device)
                if need
                else None
                for size, need in zip(sizes, needs, strict=True)
            )
        )

    def add(self, panels: _Panels, rows: slice, dot: Tensor, weights: Tensor) -> None:
        sums = self.sums
        if sums.scale is not None:
            sums.scale[rows] = (weights * dot).sum(1)
        if sums.row_bias is not None:
            sums.row_bias[rows] = weights.sum(1)
        if sums.col_bias is not None:
            sums.col_bias.add_(weights.sum(0))
        if sums.a is None and sums.b is None:
            return
        weights = weights.mul_(panels.scale[rows])
        if sums.a is not None:
            sums.a[rows].addmm_(weights, panels.b)
        other = sums.a if self.problem.b is None else sums.b
        if other is not None:
            other.addmm_(weights.T, panels.a[rows])

    def grads(self) -> Grads:
        dtype = self.problem.a.dtype
        a, b = (None if x is None else x.to(dtype) for x in self.sums[:2])
        return Grads(a, b, *self.sums[2:])
