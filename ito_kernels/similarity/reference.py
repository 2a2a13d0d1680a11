"""The backend `reference`: the primitive on the dense matrix, forward and gradients.

It defines the results: all other backends are tested against it in fp64. It runs on any device in
any supported dtype and holds several N × M matrices, so it is for tests and small problems.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .backend import Backend
from .pairs import classify, features, finite_shift
from .spec import Grads, Needs, Problem, SideStats, SideUpstream, Stats, Upstream


class Reference(Backend):
    name = "reference"

    def status(self) -> tuple[bool, str]:
        return True, "plain PyTorch, any device"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        return True, "runs everywhere"

    def describe(self, problem: Problem) -> str:
        return f"dense {problem.n} x {problem.m} matrix in {problem.accumulate}"

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
        dot, scores = _scores(problem)
        pairs = classify(problem, dot)

        def reduce(dim: int) -> SideStats:
            maximum = scores.masked_fill(pairs.masked, -torch.inf).amax(dim)
            relative = scores - finite_shift(maximum).unsqueeze(dim)
            logsum = relative.exp().masked_fill(pairs.masked, 0).sum(dim).log()
            pos = None
            if problem.positives == "linear":
                pos = relative.masked_fill(~pairs.positive, 0).sum(dim)
            elif problem.positives == "lse":
                pos = relative.masked_fill(~pairs.positive, -torch.inf).logsumexp(dim)
            neg_max = None
            if problem.hardest:
                neg_max = scores.masked_fill(pairs.positive | pairs.excluded, -torch.inf).amax(dim)
            return SideStats(maximum, logsum, pos, neg_max)

        row = reduce(1) if problem.rows else None
        return Stats(row, reduce(0) if problem.cols else None)

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        dot, scores = _scores(problem)
        pairs = classify(problem, dot)
        weights = torch.zeros_like(scores)

        def add(side: SideStats, grad: SideUpstream, dim: int) -> None:
            relative = scores - finite_shift(side.max).unsqueeze(dim)
            # finite_shift: where all scores are -inf, so that their gradient is 0 instead of NaN
            if grad.logsum is not None:
                softmax = (relative - finite_shift(side.logsum).unsqueeze(dim)).exp()
                weights.add_((softmax * grad.logsum.unsqueeze(dim)).masked_fill(pairs.masked, 0))
            if grad.pos is not None:
                term = grad.pos.unsqueeze(dim).expand_as(scores)
                if problem.positives == "lse":
                    term = term * (relative - finite_shift(side.pos).unsqueeze(dim)).exp()
                weights.add_(term.masked_fill(~pairs.positive, 0))

        if problem.rows:
            add(stats.row, upstream.row, 1)
        if problem.cols:
            add(stats.col, upstream.col, 0)
        return _gradients(problem, dot, weights, needs)

    def softplus_forward(self, problem: Problem) -> Tensor:
        dot, scores = _scores(problem)
        pairs = classify(problem, dot)
        signed = torch.where(pairs.positive, -scores, scores)
        # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
        return softplus(signed, threshold=40).masked_fill(pairs.excluded, 0).sum(1)

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        dot, scores = _scores(problem)
        pairs = classify(problem, dot)
        derivative = torch.where(pairs.positive, -torch.sigmoid(-scores), torch.sigmoid(scores))
        weights = (u[:, None] * derivative).masked_fill(pairs.excluded, 0)
        return _gradients(problem, dot, weights, needs)


def _scores(problem: Problem) -> tuple[Tensor, Tensor]:
    """The inner products <a_i, b_j>, and S."""
    a, b = features(problem)
    dot = a @ b.T
    scores = problem.scale.reshape(-1, 1) * dot
    if problem.row_bias is not None:
        scores = scores + problem.row_bias[:, None]
    if problem.col_bias is not None:
        scores = scores + problem.col_bias[None, :]
    return dot, scores


def _gradients(problem: Problem, dot: Tensor, weights: Tensor, needs: Needs) -> Grads:
    """The gradients of all inputs of S from W = ∂L/∂S."""
    a, b = features(problem)
    scaled = problem.scale.reshape(-1, 1) * weights
    grad_a = grad_b = None
    if needs.a:
        grad_a = scaled @ b
        if problem.b is None:
            grad_a = grad_a + scaled.T @ a
        grad_a = grad_a.to(problem.a.dtype)
    if needs.b:
        grad_b = (scaled.T @ a).to(problem.b.dtype)
    return Grads(
        grad_a,
        grad_b,
        problem.scale_grad((weights * dot).sum(1) if needs.scale else None),
        weights.sum(1) if needs.row_bias else None,
        weights.sum(0) if needs.col_bias else None,
    )
