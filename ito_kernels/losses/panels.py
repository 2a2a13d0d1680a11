"""What a loss needs of the scores that the kernels do not give, a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..similarity.op import first_order_only
from ..similarity.primitive import reverse_mode_only

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


def in_panels(
    function: Callable[..., Tensor], rows: tuple[Tensor, ...], columns: int, *others: object
) -> Tensor:
    """`function(*rows, *others)`, whose first dimension is that of each of `rows`, for a few of
    them at a time. Panels are computed again in backward: memory is that of one.

    columns: how many scores `function` makes of each row.
    """
    reverse_mode_only(*rows, *(x for x in others if isinstance(x, Tensor)))
    panels = zip(*(x.split(panel_rows(columns)) for x in rows), strict=True)
    run = [
        checkpoint(function, *panel, *others, use_reentrant=False, preserve_rng_state=False)
        for panel in panels
    ]
    return torch.cat(run)
