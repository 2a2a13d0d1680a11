"""The interface of a backend."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .spec import Grads, Needs, Problem, SideStats, SideUpstream, Stats, Upstream


class Backend:
    """Computes the primitive. To add one, write a subclass and enter it in `dispatch.REGISTRY`.

    name: the name by which users ask for it.
    priority: the automatic choice takes the backend with the largest priority that supports the
        problem. None: never chosen automatically.
    device: the device type ("cpu", "cuda") whose tensors it may be chosen for; None: any.
    native: whether it needs the compiled module.
    """

    name: ClassVar[str]
    priority: ClassVar[int | None] = None
    device: ClassVar[str | None] = None
    native: ClassVar[bool] = False

    def status(self) -> tuple[bool, str]:
        """Whether the backend can run on this machine, and a description or the reason."""
        raise NotImplementedError

    def supports(self, problem: Problem) -> tuple[bool, str]:
        """Whether the backend can compute `problem`, and the reason if it cannot."""
        raise NotImplementedError

    def missed(self, problem: Problem) -> str:
        """A warning if the installation lacks a part that would compute `problem` faster."""
        return ""

    def describe(self, problem: Problem) -> str:
        """Tile shapes and other choices for `problem`, as text."""
        raise NotImplementedError

    def cache_bytes(self, problem: Problem) -> int:
        """Bytes of memory that the forward pass can use to keep scores for backward; 0 for none."""
        return 0

    def new_cache(self, problem: Problem, size: int) -> Tensor:
        """`size` bytes for the scores that the forward pass of `problem` keeps for backward."""
        return problem.a.new_empty(size, dtype=torch.uint8)

    def logsumexp_forward(self, problem: Problem, cache: Tensor | None = None) -> Stats:
        raise NotImplementedError

    def logsumexp_backward(
        self,
        problem: Problem,
        stats: Stats,
        upstream: Upstream,
        needs: Needs,
        cache: Tensor | None = None,
    ) -> Grads:
        """cache: the memory that the forward pass filled."""
        raise NotImplementedError

    def logsumexp_both(
        self,
        problem: Problem,
        with_stats: bool,
        upstream: Upstream,
        needs: Needs,
    ) -> tuple[Tensor, Stats, Grads]:
        """The weighted sum of the statistics, the statistics themselves if `with_stats`, and the
        gradients, if any. The weights are the upstream gradient, which is known in advance."""
        upstream = upstream.tensors(problem)
        size = self.cache_bytes(problem) * (needs.a or needs.b)
        cache = self.new_cache(problem, size) if size else None
        stats = self.logsumexp_forward(problem, cache)
        grads = Grads()
        if any(needs):
            grads = self.logsumexp_backward(problem, stats, upstream, needs, cache)
        return weighted_sum(stats, upstream), stats if with_stats else Stats(), grads

    def softplus_forward(self, problem: Problem) -> Tensor:
        raise NotImplementedError

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        raise NotImplementedError

    def softplus_both(self, problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
        """The row sums, and the gradients for an upstream gradient `u` known in advance."""
        return self.softplus_forward(problem), self.softplus_backward(problem, u, needs)

    def softplus_total(
        self, problem: Problem, weights: Tensor | float, needs: Needs
    ) -> tuple[Tensor, Grads]:
        """The weighted sum of the row sums and its gradients, if any. A number is the weight of
        every row."""
        if not isinstance(weights, Tensor):
            weights = problem.scale.new_full((problem.n,), weights)
        if any(needs):
            rows, grads = self.softplus_both(problem, weights, needs)
        else:
            rows, grads = self.softplus_forward(problem), Grads()
        return (rows * weights).sum(), grads


def weighted_sum(stats: Stats, weights: Upstream) -> Tensor | None:
    """The weighted sum of the statistics; None without weights.

    A statistic of -inf, which is a sum over nothing, counts as 0 where its weight is 0. Any other
    value that is not finite makes the total not finite.
    """

    def weighted(weight: Tensor, x: Tensor) -> Tensor:
        return weight * torch.where((weight == 0) & (x == -math.inf), 0, x)

    def total(side: SideStats, weight: SideUpstream) -> Tensor:
        terms = weighted(weight.logsum, side.logsum)
        if weight.pos is not None:
            terms = terms + weighted(weight.pos, side.pos)
        return terms.sum()

    row = col = None
    if weights.row.logsum is not None:
        row = total(stats.row, weights.row)
    if weights.col.logsum is not None:
        col = total(stats.col, weights.col)
    return col if row is None else row if col is None else row + col
