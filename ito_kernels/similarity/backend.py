"""What a backend is: the protocol that the dispatcher knows."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .spec import Grads, Needs, Problem, SideStats, SideUpstream, Stats, Upstream


class Backend:
    """Computes the primitive. A new one is a file and an entry of `dispatch.REGISTRY`.

    name: how it is asked for.
    priority: of those that are chosen automatically the largest that can run goes first; None: runs
        only where it is asked for by name.
    device: the kind of device ("cpu", "cuda") whose tensors it is chosen for; None: any.
    native: whether it is part of the native module.
    """

    name: ClassVar[str]
    priority: ClassVar[int | None] = None
    device: ClassVar[str | None] = None
    native: ClassVar[bool] = False

    def status(self) -> tuple[bool, str]:
        """Whether anything can run on this machine; what, or why not."""
        raise NotImplementedError

    def supports(self, problem: Problem) -> tuple[bool, str]:
        """Whether `problem` can run, and why not."""
        raise NotImplementedError

    def missed(self, problem: Problem) -> str:
        """A warning, if `problem` would run here and faster were the installation complete."""
        return ""

    def describe(self, problem: Problem) -> str:
        """Tile shapes and the like, in words."""
        raise NotImplementedError

    def cache_bytes(self, problem: Problem) -> int:
        """Memory worth having for what forward keeps for backward. 0: no `cache` is given."""
        return 0

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
        """`cache`: what forward filled."""
        raise NotImplementedError

    def logsumexp_both(
        self,
        problem: Problem,
        with_stats: bool,
        upstream: Upstream,
        needs: Needs,
    ) -> tuple[Tensor, Stats, Grads]:
        """The weighted sum, the statistics if wanted and the gradients, for an upstream gradient
        that is known before."""
        stats = self.logsumexp_forward(problem)
        grads = self.logsumexp_backward(problem, stats, upstream, needs)
        return weighted_sum(stats, upstream), stats if with_stats else Stats(), grads

    def softplus_forward(self, problem: Problem) -> Tensor:
        raise NotImplementedError

    def softplus_backward(self, problem: Problem, u: Tensor, needs: Needs) -> Grads:
        raise NotImplementedError

    def softplus_both(self, problem: Problem, u: Tensor, needs: Needs) -> tuple[Tensor, Grads]:
        """The row sums and the gradients, for an upstream gradient `u` that is known before."""
        return self.softplus_forward(problem), self.softplus_backward(problem, u, needs)


def weighted_sum(stats: Stats, weights: Upstream) -> Tensor | None:
    """The weighted sum of the statistics, None without weights. Where the weight is 0, a statistic
    of -inf counts as 0: there was nothing to sum. Anything else that is not finite makes the total
    so."""

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
