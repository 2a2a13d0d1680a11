"""Dtypes of a loss outside the kernels, and operations that are safe for -inf and deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.spec import accumulate_dtype, autocast_enabled, without_autocast

__all__ = [
    "has_half_values",
    "logaddexp",
    "multiply_gradient",
    "row_dot",
    "take_rows",
    "to_accumulate_dtype",
    "to_autocast_dtype",
    "without_autocast",
]


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Convert features to the dtype that the primitive would give them under autocast."""
    if autocast_enabled(x.device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def has_half_values(x: Tensor) -> bool:
    """Whether features are in bf16 or fp16, or would be under autocast."""
    return to_autocast_dtype(x[:0]).dtype in (torch.bfloat16, torch.float16)


def to_accumulate_dtype(x: Tensor) -> Tensor:
    """Convert features to the accumulate dtype: fp32, fp64 for fp64.

    For losses that subtract scores of different computations. With a positive close to a hard
    negative and a scale of 50 to 100, rounding both scores to bf16 first would leave an error of
    0.4 to 0.8 in the gradient. In fp32 only the result is rounded.
    """
    return x.to(accumulate_dtype(x.dtype))


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products <a_i, b_i> of corresponding rows, in the accumulate dtype."""
    return (to_accumulate_dtype(a) * to_accumulate_dtype(b)).sum(-1)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """log(e^x + e^y). Where both are -inf the gradient is 0; that of torch.logaddexp is NaN."""
    both_empty = (x == -torch.inf) & (y == -torch.inf)
    total = torch.logaddexp(x.masked_fill(both_empty, 0), y.masked_fill(both_empty, 0))
    return total.masked_fill(both_empty, -torch.inf)


def multiply_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x, with a gradient that is multiplied by `factor`. The values are the same bits."""
    return x.detach() + factor * (x - x.detach())


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] with a deterministic gradient.

    On CUDA the gradient of indexing sorts and is deterministic. On the CPU the gradient of
    index_select adds in order, and is faster: 0.1 s against 2.9 s for 65,536 × 512.
    """
    return x[rows] if x.is_cuda else x.index_select(0, rows)
