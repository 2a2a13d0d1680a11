"""What a loss needs of the scores that the kernels do not give, a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..similarity.op import first_order_only, reverse_mode_only
from ..similarity.pairs import classify, features, finite_shift
from ..similarity.spec import Problem

# 2^20 scores are 4 MiB in fp32; a panel's function keeps up to ten such matrices while it runs.
# Below 64 rows the matrix products no longer reach the machine's speed.
PANEL_SCORES = 1 << 20
MIN_ROWS = 64


def panel_rows(columns: int) -> int:
    return max(MIN_ROWS, PANEL_SCORES // columns)


def sum_of_panels(
    a: Tensor, b: Tensor, panel: Callable[[slice], tuple[Tensor | None, Tensor]]
) -> Tensor:
    """Σ f(dot) over the panels dot of a·bᵀ, 0-d in fp64, with gradients of a and b.

    panel: takes the rows and gives f and ∂f/∂dot, or where f is linear None and its coefficients.
    Both are constants for autograd. Gradients are formed in the forward pass: 3 matrix products
    where f is not linear, 2 where it is.
    """
    reverse_mode_only(a, b)
    return _SumOfPanels.apply(a, b, panel)


class _SumOfPanels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, panel: Callable) -> Tensor:
        need_a, need_b, _ = ctx.needs_input_grad
        grad_a = torch.empty_like(a) if need_a else None
        grad_b = torch.zeros_like(b) if need_b else None
        total = a.new_zeros((), dtype=torch.float64)
        step = panel_rows(len(b))
        for start in range(0, len(a), step):
            rows = slice(start, start + step)
            value, slope = panel(rows)
            if need_a or value is None:
                of_rows = slope @ b
                value = (of_rows * a[rows]).sum() if value is None else value
            if need_a:
                grad_a[rows] = of_rows
            if need_b:
                grad_b.addmm_(slope.T, a[rows])
            total += value
        ctx.save_for_backward(grad_a, grad_b)
        return total

    @staticmethod
    def backward(ctx, by: Tensor) -> tuple:
        first_order_only()
        return *(None if x is None else x * by.to(x.dtype) for x in ctx.saved_tensors), None


def log_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    left_out: Callable[[slice, Tensor], Tensor],
    powers: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of S = scale·a·bᵀ + bias without some pairs: the rows' maximum, -inf where nothing is left,
    the number that are left, and (len(powers), N) log Σ_j exp(p·(S_ij - max_i)) for each power.

    scale: (N, 1) or (M,); bias: (M,) or None. left_out: takes the rows and their inner products and
    gives a mask. Maximum and number are constants. 4 matrix products.
    """
    reverse_mode_only(a, b, scale, bias)
    return _LogSums.apply(a, b, scale, bias, left_out, powers)


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, bias, left_out, powers) -> tuple[Tensor, Tensor, Tensor]:
        # written to in place: small results between large panels would break up the heap
        top, number = a.new_empty(len(a)), a.new_empty(len(a))
        sums = a.new_empty(len(powers), len(a))
        for rows, _, scores, gone in _scores(a, b, scale, bias, left_out):
            scores.masked_fill_(gone, -torch.inf)
            torch.amax(scores, 1, out=top[rows])
            number[rows] = len(b) - gone.sum(1)
            scores.sub_(finite_shift(top[rows])[:, None])
            for power, out in zip(powers, sums, strict=True):
                out[rows] = (power * scores).exp_().sum(1).log_()
        ctx.save_for_backward(a, b, scale, bias, top, sums)
        ctx.left_out, ctx.powers = left_out, powers
        ctx.mark_non_differentiable(top, number)
        return top, number, sums

    @staticmethod
    def backward(ctx, _top, _number, grad: Tensor) -> tuple:
        first_order_only()
        a, b, scale, bias, top, sums = ctx.saved_tensors
        top, sums = finite_shift(top), finite_shift(sums)
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        grad_scale = torch.zeros_like(scale)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for rows, dot, scores, gone in _scores(a, b, scale, bias, ctx.left_out):
            scores.masked_fill_(gone, -torch.inf).sub_(top[rows, None])
            weights = torch.zeros_like(scores)
            for power, of_rows, by in zip(ctx.powers, sums, grad, strict=True):
                terms = (power * scores).sub_(of_rows[rows, None]).exp_()
                weights.addcmul_(terms, power * by[rows, None])
            if bias is not None:
                grad_bias += weights.sum(0)
            if scale.ndim == 2:
                torch.linalg.vecdot(weights, dot, out=grad_scale[rows, 0])
                weights *= scale[rows]
            else:
                grad_scale += dot.mul_(weights).sum(0)
                weights *= scale
            torch.mm(weights, b, out=grad_a[rows])
            grad_b.addmm_(weights.T, a[rows])
        return grad_a, grad_b, grad_scale, grad_bias, None, None


def barred_by(problem: Problem) -> Callable[[slice, Tensor], Tensor]:
    """What a problem leaves out of a panel, as `log_sums` takes it."""
    return lambda rows, dot: classify(problem, dot, rows.start, rows.start + len(dot)).barred


def sums_of_rest(problem: Problem, x: Tensor) -> Tensor:
    """Σ_j x_j over the columns that a problem leaves to each row: (N, C) of an x of (M, C), which
    has gradients. Scale and biases of the problem play no part. 4 matrix products."""
    reverse_mode_only(x)
    a, b = (side.detach() for side in features(problem))
    return _SumsOfRest.apply(x, a, b, barred_by(problem))


class _SumsOfRest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, barred: Callable) -> Tensor:
        out = x.new_empty(len(a), x.shape[1])
        for rows, rest in _rest(a, b, barred):
            torch.mm(rest, x, out=out[rows])
        ctx.save_for_backward(a, b)
        ctx.barred = barred
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        first_order_only()
        a, b = ctx.saved_tensors
        grad_x = grad.new_zeros(len(b), grad.shape[1])
        for rows, rest in _rest(a, b, ctx.barred):
            grad_x.addmm_(rest.T, grad[rows])
        return grad_x, None, None, None


def _rest(a: Tensor, b: Tensor, barred: Callable) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each panel, and 1 where a column is left to them, 0 elsewhere."""
    step = panel_rows(len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, barred(rows, a[rows] @ b.T).logical_not_().to(a.dtype)


def _scores(a, b, scale, bias, left_out) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The rows, inner products, scores and mask of each panel."""
    step = panel_rows(len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        dot = a[rows] @ b.T
        scores = dot * (scale[rows] if scale.ndim == 2 else scale)
        yield rows, dot, scores if bias is None else scores.add_(bias), left_out(rows, dot)
