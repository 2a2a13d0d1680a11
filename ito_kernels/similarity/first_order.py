"""Errors for modes of differentiation that are not supported: only first-order reverse mode is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def first_order_only() -> None:
    """Raise RuntimeError if the gradient itself would be differentiated. Called in backward."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ito_kernels gives first-order gradients only: differentiate without create_graph=True."
            " For a gradient of a gradient (a gradient penalty, a Hessian) write the loss on the"
            " dense similarity matrix"
        )


def reverse_mode_only(*inputs: Tensor | None) -> None:
    """Raise RuntimeError under forward-mode differentiation, where the operators would silently
    drop the tangent, and inside torch.func transforms."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise RuntimeError(
            "ito_kernels supports reverse mode only, not forward-mode differentiation"
            " (torch.func.jvp, torch.autograd.forward_ad): use backward() or"
            " torch.autograd.grad()"
        )
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "ito_kernels does not run inside torch.func transforms (grad, vjp, vmap, ...): use"
            " backward() or torch.autograd.grad(), and a loop instead of vmap"
        )
