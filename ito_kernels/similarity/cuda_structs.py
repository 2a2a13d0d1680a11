"""The arguments of the CUDA kernels: the structs of csrc/cuda/problem.hpp with the same members in
the same order. They hold tensors, or None; `flatten` converts these to addresses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gpu import Operands, SideWeights, Split, Weights, dense, matmul_precision
from .spec import Problem, SideStats

# in the order of the enumerations in problem.hpp
ARITHMETIC = ("bf16", "fp16", "tf32", "tf32x3")
POSITIVES = (None, "linear", "lse")
SCALE_OF = ("all", "row", "col")


class Side(NamedTuple):
    features: Tensor
    stride: int  # in units of 16 bytes
    length: int
    bias: Tensor | None
    ids: Tensor | None
    limit: Tensor | None
    weights: Tensor | None
    exact: Tensor | None
    shifts: Tensor | None

    @classmethod
    def of(
        cls,
        features: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        limit: Tensor | None,
        weights: SideWeights | None,
    ) -> Side:
        return cls(
            features=features,
            stride=features.stride(0) * features.element_size() // 16,
            length=features.shape[0],
            bias=bias,
            ids=ids,
            limit=limit,
            weights=weights and weights.fixed,
            exact=weights and weights.exact,
            shifts=weights and weights.shifts,
        )


class Scores(NamedTuple):
    arithmetic: int
    row: Side
    col: Side
    row_bytes: int
    scale: Tensor
    scale_of: int
    shift: Tensor | None
    underflowed: Tensor | None
    positives: int
    exclude_self: bool
    exclude_positives: bool
    softplus: bool
    positives_matter: bool
    diagonal: int

    @classmethod
    def of(
        cls,
        problem: Problem,
        op: Operands,
        weights: Weights = Weights(),  # noqa: B008 (immutable)
        *,
        softplus: bool = False,
        transposed: bool = False,
    ) -> Scores:
        """transposed: whether `op` and `weights` are those of the transposed matrix."""
        p = problem
        limit = dense(p.row_limit)
        row_limit, col_limit = (None, limit) if transposed else (limit, None)
        scale_of = "all" if op.scale.ndim == 0 else "col" if transposed else "row"
        return cls(
            arithmetic=ARITHMETIC.index(arithmetic(p.a.dtype)),
            row=Side.of(op.a, op.row_bias, op.row_ids, row_limit, weights.row),
            col=Side.of(op.b, op.col_bias, op.col_ids, col_limit, weights.col),
            row_bytes=p.d * op.a.element_size(),
            scale=op.scale,
            scale_of=SCALE_OF.index(scale_of),
            shift=weights.shift,
            underflowed=weights.underflowed,
            positives=POSITIVES.index(p.positives),
            exclude_self=p.exclude_self,
            exclude_positives=p.exclude_positives,
            softplus=softplus,
            positives_matter=bool(p.positives or p.exclude_positives or p.hardest or softplus),
            diagonal=-p.diagonal if transposed else p.diagonal,
        )


class Forward(NamedTuple):
    scores: Scores
    split: Split
    row_slots: Tensor | None
    col_slots: Tensor | None


class Merge(NamedTuple):
    slots: Tensor
    length: int
    count: int
    positives: int
    biased: bool
    ids: Tensor | None
    shift: Tensor
    out: SideStats
    underflowed: Tensor


class Fallback(NamedTuple):
    scores: Scores
    underflowed: Tensor | None
    slots: Tensor
    out: SideStats


class Panel(NamedTuple):
    scores: Scores
    split: Split
    first_row: int
    last_row: int
    first_col: int
    last_col: int
    panel: Tensor | None
    stride: int  # in units of 8 bytes
    scale_sums: Tensor | None
    row_sums: Tensor | None
    col_sums: Tensor | None


class Gradient(NamedTuple):
    scores: Scores
    grad: Tensor | None
    stride: int  # in units of 8 bytes
    scale_sums: Tensor | None
    row_sums: Tensor | None


def arithmetic(dtype: torch.dtype) -> str:
    """The arithmetic of the scores, in forward and backward.

    For fp32 it follows `torch.set_float32_matmul_precision`: "highest" and "high" are 3×tf32, which
    has the accuracy of fp32; "medium" is tf32. The products W·B and Wᵀ·A of the gradients are
    PyTorch's own, and on a GPU tf32 at "high" too.
    """
    if dtype == torch.float32:
        return "tf32" if matmul_precision() == "medium" else "tf32x3"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def flatten(struct: tuple) -> tuple[int, ...]:
    """A struct as the flat list of integers that bind.cpp reads.

    A tensor becomes its address and the number of bytes from its first to its last element. The
    emulator checks that kernels access nothing else.
    """
    out: list[int] = []
    for member in struct:
        if isinstance(member, int):
            out.append(member)
        elif member is None:
            out += (0, 0)
        elif isinstance(member, Tensor):
            out += (member.data_ptr(), _span(member) * member.element_size())
        else:
            out += flatten(member)
    return tuple(out)


def _span(x: Tensor) -> int:
    if x.is_contiguous():
        return x.numel()
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
