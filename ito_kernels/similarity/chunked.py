"""The backend `chunked`: plain PyTorch, a panel of rows at a time, on any device.

A panel is a block of rows × M scores. About four panels are alive at once, so memory is
O(panel + (N+M)·D). A panel completes the statistics of its rows; column statistics are merged over
the panels. Backward computes the scores of each panel again: 4 matrix products in all, 2 if neither
side needs a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .backend import Backend
from .pairs import Pairs, classify, features, finite_shift
from .panelwise import panel_rows, row_panels
from .spec import Grads, Needs, Problem, SideStats, Stats, Upstream


class Chunked(Backend):
    name = "chunked"
    priority = 1

    def status(self) -> tuple[bool, str]:
        return True, "plain PyTorch, any device"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        return True, "runs everywhere"

    def describe(self, problem: Problem) -> str:
        rows = min(panel_rows(problem.m), problem.n)
        return f"panels of {rows} x {problem.m} scores in {problem.accumulate}"

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
        panels = _Panels(problem)
        row_side = _SideStatistics(problem, problem.n) if problem.rows else None
        col_side = _SideStatistics(problem, problem.m) if problem.cols else None
        for rows, _, scores, pairs in panels:
            allowed = panels.allowed(scores, pairs)
            if row_side:
                row_side.merge(rows, scores, allowed, pairs, 1)
            if col_side:
                col_side.merge(slice(None), scores, allowed, pairs, 0)
        return Stats(row_side and row_side.stats(), col_side and col_side.stats())

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        panels, gradients = _Panels(problem), _Gradients(problem, needs)

        # -inf is replaced by 0: scores of -inf, as of masked pairs, then add exp(-inf - 0) = 0
        sides = []
        for dim, side, grads in ((1, stats.row, upstream.row), (0, stats.col, upstream.col)):
            if side is not None:
                norms = (x if x is None else finite_shift(x) for x in side[:3])
                sides.append((dim, *norms, *grads))

        for rows, dot, scores, pairs in panels:
            allowed = panels.allowed(scores, pairs)
            weights = torch.zeros_like(scores)
            for dim, *vectors in sides:
                shift, logsum, pos, grad_logsum, grad_pos = (
                    x[rows, None] if dim == 1 and x is not None else x for x in vectors
                )
                if grad_logsum is not None:
                    weights += (allowed - shift).sub_(logsum).exp_().mul_(grad_logsum)
                if grad_pos is not None:
                    term = grad_pos
                    if problem.positives == "lse":
                        term = (scores - shift).sub_(pos).exp_() * grad_pos
                    weights += torch.where(pairs.positive, term, 0)
            gradients.add(panels, rows, dot, weights)
        return gradients.grads()

    def softplus_forward(self, problem: Problem) -> Tensor:
        panels = _Panels(problem)
        out = torch.empty(problem.n, dtype=problem.accumulate, device=problem.a.device)
        for rows, _, scores, pairs in panels:
            signed = torch.where(pairs.positive, -scores, scores)
            # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
            terms = softplus(signed, threshold=40)
            out[rows] = (terms.masked_fill_(pairs.excluded, 0) if panels.excludes else terms).sum(1)
        return out

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        panels, gradients = _Panels(problem), _Gradients(problem, needs)
        for rows, dot, scores, pairs in panels:
            # with s = -1 at positives and 1 elsewhere, the derivative of softplus(s·S) is s·σ(s·S)
            sign = torch.where(pairs.positive, -1.0, 1.0).to(scores.dtype)
            weights = scores.mul_(sign).sigmoid_().mul_(sign).mul_(u[rows, None])
            if panels.excludes:
                weights.masked_fill_(pairs.excluded, 0)
            gradients.add(panels, rows, dot, weights)
        return gradients.grads()


class _Panels:
    """Iterates over the panels of a problem: (rows, inner products, scores, masks)."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.a, self.b = features(problem)
        self.scale = problem.scale.reshape(-1, 1).expand(problem.n, 1)
        self.excludes = (
            problem.row_ids is not None or problem.exclude_self or problem.row_limit is not None
        )
        self.masks = self.excludes or problem.exclude_positives

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Pairs]]:
        p = self.problem
        for rows in row_panels(p.n, p.m):
            dot = self.a[rows] @ self.b.T
            scores = self.scale[rows] * dot
            if p.row_bias is not None:
                scores += p.row_bias[rows, None]
            if p.col_bias is not None:
                scores += p.col_bias
            yield rows, dot, scores, classify(p, dot, rows.start, rows.stop)

    def allowed(self, scores: Tensor, pairs: Pairs) -> Tensor:
        """The scores, -inf at pairs that max and logsum leave out."""
        return scores.masked_fill(pairs.masked, -torch.inf) if self.masks else scores


class _SideStatistics:
    """The statistics of the rows or of the columns, merged over the panels."""

    def __init__(self, problem: Problem, length: int):
        def full(value: float) -> Tensor:
            return torch.full((length,), value, dtype=problem.accumulate, device=problem.a.device)

        self.kind, self.hardest = problem.positives, problem.hardest
        self.max, self.sum, self.neg_max = full(-torch.inf), full(0), full(-torch.inf)
        # the sum of the positives' scores and their number, or the logsumexp of the positives
        # relative to the running maximum
        self.pos, self.count = full(-torch.inf if self.kind == "lse" else 0), full(0)

    def merge(self, at: slice, scores: Tensor, allowed: Tensor, pairs: Pairs, dim: int) -> None:
        old = self.max[at]
        new = torch.maximum(old, allowed.amax(dim))
        shift = finite_shift(new)
        total = (allowed - shift.unsqueeze(dim)).exp_().sum(dim)
        self.sum[at] = self.sum[at] * (old - shift).exp() + total
        if self.kind == "linear":
            self.pos[at] += torch.where(pairs.positive, scores, 0).sum(dim)
            self.count[at] += pairs.positive.sum(dim)
        elif self.kind == "lse":
            relative = torch.where(pairs.positive, scores - shift.unsqueeze(dim), -torch.inf)
            before = self.pos[at] + (finite_shift(old) - shift)
            self.pos[at] = torch.logaddexp(before, relative.logsumexp(dim))
        if self.hardest:
            negative = scores.masked_fill(pairs.positive | pairs.excluded, -torch.inf)
            self.neg_max[at] = torch.maximum(self.neg_max[at], negative.amax(dim))
        self.max[at] = new

    def stats(self) -> SideStats:
        pos = self.pos
        if self.kind == "linear":
            pos = pos - self.count * finite_shift(self.max)
        return SideStats(
            self.max,
            self.sum.log(),
            pos if self.kind else None,
            self.neg_max if self.hardest else None,
        )


class _Gradients:
    """Sums the gradients over the panels, in the accumulate dtype."""

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
        a, b = (None if x is None else x.to(dtype) for x in (self.sums.a, self.sums.b))
        return self.sums._replace(a=a, b=b, scale=self.problem.scale_grad(self.sums.scale))
