"""Statistics and sums of the scores for masks that no kernel has, a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..similarity.budget import count_as_kept, tile_cache_left
from ..similarity.first_order import first_order_only, reverse_mode_only
from ..similarity.pairs import finite_shift
from ..similarity.panelwise import panelwise, row_panels
from ..similarity.spec import without_autocast


class Mask(NamedTuple):
    """Which pairs (i, j) are left out. It holds only constants, so autograd can keep it for
    backward.

    row_ids, col_ids: a pair with a negative id is left out. Equal ids are positives; without ids
        the positive of row i is column i + diagonal. row_ids may be (N, K): a pair is then positive
        if any of the K ids is equal, and a row is left out if all are negative.
    row_limit, col_limit: for the direction of the rows or of the columns, negatives with an inner
        product above it are left out.
    guide: features of rows and columns, (N, E) and (M, E). The limits compare their inner products
        instead.
    pairs: linear indices i·M + j of further pairs to leave out; negative entries are ignored.
    exclude_self: leave out (i, i + diagonal).
    exclude_positives: leave out the positives.
    """

    row_ids: Tensor | None
    col_ids: Tensor | None
    row_limit: Tensor | None = None
    pairs: Tensor | None = None
    exclude_self: bool = False
    exclude_positives: bool = False
    diagonal: int = 0
    col_limit: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        fields = (self.row_ids, self.col_ids, self.row_limit, self.pairs, self.col_limit)
        return [x for x in (*fields, *(self.guide or ())) if x is not None]

    def __call__(self, rows: Tensor, dot: Tensor) -> Tensor:
        """The mask of a panel in the direction of the rows, True where a pair is left out.

        rows: the row numbers of the panel. dot: its inner products.
        """
        return self.by_side(rows, dot, ("row",))[0]

    def by_side(self, rows: Tensor, dot: Tensor, sides: tuple[str, ...]) -> list[Tensor]:
        """The masks of a panel in the directions `sides`, "row" or "col"."""
        limits = {"row": self.row_limit, "col": self.col_limit}
        limited = any(limits[side] is not None for side in sides)
        positive = self.positives(rows, dot) if limited or self.exclude_positives else None
        shared = self._without_limits(rows, dot, positive)
        if not limited:
            return [shared] * len(sides)
        guided = dot if self.guide is None else self.guide[0][rows] @ self.guide[1].T
        masks = []
        for side in sides:
            above = guided > (limits[side][rows, None] if side == "row" else limits[side])
            if positive is not None:
                above.logical_and_(~positive)
            masks.append(above.logical_or_(shared))
        return masks

    def _without_limits(self, rows: Tensor, dot: Tensor, positive: Tensor | None) -> Tensor:
        masked = []
        if self.pairs is not None:
            # scatter into a flat panel with one more element, which takes the pairs of other panels
            size = dot.numel()
            position = self.pairs - rows[0] * dot.shape[1]
            in_panel = (self.pairs >= 0) & (position >= 0) & (position < size)
            listed = torch.zeros(size + 1, dtype=torch.bool, device=dot.device)
            listed.scatter_(0, torch.where(in_panel, position, size), True)
            masked.append(listed[:-1].view(dot.shape))
        if self.row_ids is not None:
            ids = self.row_ids[rows].view(len(rows), -1).amax(1, keepdim=True)
            masked.append((ids < 0) | (self.col_ids < 0))
        if self.exclude_self:
            masked.append(self._diagonal(rows, dot))
        if self.exclude_positives:
            masked.append(positive)
        if not masked:
            return torch.zeros_like(dot, dtype=torch.bool)
        total = masked[0]
        for mask in masked[1:]:
            total = total | mask
        return total

    def positives(self, rows: Tensor, dot: Tensor) -> Tensor | None:
        """The positives of a panel; None if they are `pairs`, which are left out."""
        if self.pairs is not None:
            return None
        if self.row_ids is not None:
            first, *more = self.row_ids[rows].view(len(rows), -1, 1).unbind(1)
            equal = first == self.col_ids
            for ids in more:
                equal |= ids == self.col_ids
            return equal
        return self._diagonal(rows, dot)

    def _diagonal(self, rows: Tensor, dot: Tensor) -> Tensor:
        columns = torch.arange(dot.shape[1], device=dot.device)
        return columns == rows[:, None] + self.diagonal


class MaskedStatistics(NamedTuple):
    """Statistics of S for each row or column, over the pairs that are not left out.

    max: -inf without pairs. number: of the pairs. log_sums: for each power p, log Σ exp(p·(S -
    max)), (powers, N) or (powers, M). total: Σ S, or 0 if it is not asked for. Only the last two
    have gradients.
    """

    max: Tensor
    number: Tensor
    log_sums: Tensor
    total: Tensor


def masked_statistics(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mask: Mask,
    powers: tuple[float, ...],
    sides: tuple[str, ...],
    boost: float = 0.0,
    totals: bool = False,
) -> dict[str, MaskedStatistics]:
    """Statistics of S = scale·a·bᵀ over the pairs that `mask` does not leave out, in the directions
    `sides`. One pass over the panels for both.

    Args:
        scale: (N,). bias: (M,) or None, added to S in the direction "row".
        powers: exponents p.
        boost: α; S has the further term α·a·bᵀ without gradient.
        totals: also compute Σ S.
    """
    reverse_mode_only(a, b, scale, *(() if bias is None else (bias,)))
    if b is a and torch.compiler.is_compiling():
        b = b.view_as(b)  # torch.compile cannot trace one tensor that is passed twice
    panels = _Panels(mask, powers, sides, boost, totals)
    values = _Statistics.apply(panels, a, b, scale, bias)
    return {side: MaskedStatistics(*values[4 * i : 4 * i + 4]) for i, side in enumerate(sides)}


class _Panels(NamedTuple):
    """The constants of `masked_statistics`."""

    mask: Mask
    powers: tuple[float, ...]
    sides: tuple[str, ...]
    boost: float
    totals: bool

    def scores(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, kept: Sequence[Tensor] = ()
    ) -> Iterator[tuple[slice, Tensor, dict[str, Tensor], list[Tensor]]]:
        """For each panel: its rows, its inner products, and by direction its scores, -inf where a
        pair is left out, and its mask.

        kept: the masks of the first panels if there is a guide, else their inner products.
        """
        numbers, kept = torch.arange(len(a), device=a.device), list(kept)
        guided = self.mask.guide is not None
        for rows in row_panels(len(a), len(b)):
            dot = kept.pop(0) if kept and not guided else a[rows] @ b.T
            if kept and guided:
                masks, kept = kept[: len(self.sides)], kept[len(self.sides) :]
            else:
                masks = self.mask.by_side(numbers[rows], dot, self.sides)
            scores = {}
            for side, masked in zip(self.sides, masks, strict=True):
                x = dot * (scale[rows, None] + self.boost if self.boost else scale[rows, None])
                if side == "row" and bias is not None:
                    x += bias
                scores[side] = x.masked_fill_(masked, -torch.inf)
            yield rows, dot, scores, masks


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, panels: _Panels, a, b, scale, bias) -> tuple[Tensor, ...]:
        powers = panels.powers
        out = {}
        for side in panels.sides:
            size = len(a) if side == "row" else len(b)
            sums = a.new_zeros(len(powers), size)
            out[side] = [a.new_full((size,), -torch.inf), a.new_zeros(size), sums, sums[0] * 0]
        # Kept for backward: the inner products. With a guide, the masks instead: they also cost a
        # matrix product and take a quarter of the memory. They get half of the budget, because a
        # guided loss of four directions takes another 100 MiB. All lie in one buffer: separate
        # tensors between the temporary ones of the panels would fragment the heap by 30 to 60 MiB
        # for 8192 rows.
        guided, size = panels.mask.guide is not None, len(a) * len(b)
        size *= len(panels.sides) if guided else a.element_size()
        size = min(tile_cache_left() // 2 if guided else tile_cache_left(), size)
        # Not when compiled: torch.compile drops writes to views, and gradients would be wrong.
        keep = any(ctx.needs_input_grad) and not torch.compiler.is_compiling()
        buffer = a.new_empty(size * keep, dtype=torch.bool)
        buffer = buffer if guided else buffer[: size // 8 * 8].view(a.dtype)
        kept, used = [], 0
        for rows, dot, scores, masks in panels.scores(a, b, scale, bias):
            worth_keeping = masks if guided else [dot]
            end = used + sum(x.numel() for x in worth_keeping)
            if end <= len(buffer):
                for x in worth_keeping:
                    copy = buffer[used : used + x.numel()].view(x.shape).copy_(x)
                    kept.append(count_as_kept(copy))
                    used += x.numel()
            else:
                buffer = buffer[:used]  # the panels that are kept are the first
            for (side, x), masked in zip(scores.items(), masks, strict=True):
                maximum, number, sums, total_score = out[side]
                if panels.totals and side == "row":
                    total_score[rows] = x.masked_fill(masked, 0).sum(1)
                elif panels.totals:
                    total_score += x.masked_fill(masked, 0).sum(0)
                if side == "row":
                    maximum[rows] = x.amax(1)
                    number[rows] = (~masked).sum(1).to(number.dtype)
                    x.sub_(finite_shift(maximum[rows])[:, None])
                    for total, p in zip(sums, powers, strict=True):
                        total[rows] = (p * x).exp_().sum(1)
                else:
                    largest = torch.maximum(maximum, x.amax(0))
                    number += (~masked).sum(0)
                    shift = finite_shift(largest)
                    x.sub_(shift)
                    for total, p in zip(sums, powers, strict=True):
                        total.mul_((p * (maximum - shift)).exp_()).add_((p * x).exp_().sum(0))
                    out[side][0] = largest
        for _, _, sums, _ in out.values():
            sums.log_()
        values = [x for statistics in out.values() for x in statistics]
        # those of the mask so that backward raises if they were modified in place
        ctx.save_for_backward(a, b, scale, bias, *values, *kept, *panels.mask.tensors())
        ctx.panels, ctx.kept = panels, len(kept)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(values) if i % 4 < 2))
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        first_order_only()
        with without_autocast(ctx.saved_tensors[0].device):
            return _Statistics._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx, grads: tuple[Tensor, ...]) -> tuple:
        a, b, scale, bias, *values = ctx.saved_tensors
        panels, needs = ctx.panels, ctx.needs_input_grad[1:]
        values, kept = values[: len(grads)], values[len(grads) : len(grads) + ctx.kept]
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        grad_scale, grad_bias = torch.empty_like(scale), None
        if bias is not None:
            grad_bias = torch.zeros_like(bias)
        for rows, dot, scores, masks in panels.scores(a, b, scale, bias, kept):
            weights = torch.zeros_like(dot)
            for i, (side, x) in enumerate(scores.items()):
                shift, log_sums = (finite_shift(values[4 * i + j]) for j in (0, 2))
                grad, grad_total = grads[4 * i + 2 : 4 * i + 4]
                part = (rows, None) if side == "row" else slice(None)
                x.sub_(shift[part])
                for p, log_sum, g in zip(panels.powers, log_sums, grad, strict=True):
                    terms = (p * x).sub_(log_sum[part]).exp_()
                    weights.addcmul_(terms, p * g[part])
                if panels.totals:
                    weights += grad_total[part].masked_fill(masks[i], 0)
                if side == "row" and needs[3]:
                    grad_bias += weights.sum(0)
            grad_scale[rows] = torch.linalg.vecdot(weights, dot)
            weights *= scale[rows, None]
            grad_a[rows] = weights @ b
            grad_b.addmm_(weights.T, a[rows])
        found = (grad_a, grad_b, grad_scale, grad_bias)
        return None, *(x if needed else None for x, needed in zip(found, needs, strict=True))


def unmasked_sums(
    a: Tensor, b: Tensor, mask: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """Σ_j x_j over the columns j of a·bᵀ that `mask` does not leave out, for every row.

    x: (M, C). Returns (N, C). Only x has a gradient.
    """

    def unmasked(dot: Tensor, rows: Tensor) -> Tensor:
        return mask(rows, dot).logical_not_().to(dot.dtype)

    def function(dot: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        return unmasked(dot, rows) @ x

    def gradient(grad: Tensor, _, dot: Tensor, rows: Tensor, x: Tensor) -> tuple:
        return None, unmasked(dot, rows).T @ grad

    return panelwise(function, a.detach(), b.detach(), key_args=(x,), gradient=gradient)


def masked_softplus_sums(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, mask: Mask
) -> Tensor:
    """Σ_j weights_j · softplus(±S_ij) for every row of S = scale·a·bᵀ + bias, (N,), over the pairs
    that `mask` does not leave out: softplus(-S) at its positives, else softplus(S).

    scale: (N,). bias: 0-d. weights: (M,), without gradient.
    """

    def signed_scores(dot: Tensor, rows: Tensor, scale: Tensor, bias: Tensor) -> tuple:
        positive = mask.positives(rows, dot)
        sign = 1 if positive is None else 1 - 2 * positive.to(dot.dtype)
        scores = (dot * scale[:, None]).add_(bias).mul_(sign)
        return scores.masked_fill_(mask(rows, dot), -torch.inf), sign

    def function(dot: Tensor, rows: Tensor, scale: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        scores, _ = signed_scores(dot, rows, scale, bias)
        # above its default threshold of 20, torch's softplus returns x, with an error of 2e-9
        return softplus(scores, threshold=40) @ weights

    def gradient(
        grad: Tensor,
        _,
        dot: Tensor,
        rows: Tensor,
        scale: Tensor,
        bias: Tensor,
        weights: Tensor,
    ) -> tuple:
        scores, sign = signed_scores(dot, rows, scale, bias)
        # the derivative of softplus is the sigmoid
        grads = scores.sigmoid_().mul_(sign).mul_(weights).mul_(grad[:, None])
        grad_scale, grad_bias = torch.linalg.vecdot(grads, dot), grads.sum()
        return grads.mul_(scale[:, None]), grad_scale, grad_bias, None

    key_args = (bias, weights)
    return panelwise(function, a, b, row_args=(scale,), key_args=key_args, gradient=gradient)
