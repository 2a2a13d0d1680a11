"""A problem's tensors as kernels on a GPU read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Problem


class Operands(NamedTuple):
    """Dense vectors, features on 16-byte boundaries, ids as int32; b is a where they are one."""

    a: Tensor
    b: Tensor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> Operands:
        p = problem
        a = _features(p.a, p.row_ids)
        shared = p.b is None and (p.row_ids is None or is_symmetric(p))
        b = a if shared else _features(p.a if p.b is None else p.b, p.col_ids)
        vectors = (dense(x) for x in (p.scale, p.row_bias, p.col_bias))
        return cls(a, b, *vectors, *_ranks(p))

    def exchanged(self) -> Operands:
        a, b, scale, row_bias, col_bias, row_ids, col_ids = self
        return Operands(b, a, scale, col_bias, row_bias, col_ids, row_ids)


def is_symmetric(problem: Problem) -> bool:
    """Whether S and the masks are symmetric. A limit is of rows alone. Ids are compared by place:
    values would need a wait for the device."""
    p = problem
    if p.b is not None or p.scale.ndim or p.row_bias is not None or p.col_bias is not None:
        return False
    if p.row_limit is not None or p.diagonal != 0:
        return False
    return p.row_ids is None or (
        p.row_ids.data_ptr() == p.col_ids.data_ptr() and p.row_ids.stride() == p.col_ids.stride()
    )


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _features(x: Tensor, ids: Tensor | None) -> Tensor:
    """Features with rows on 16-byte boundaries, as tensor descriptors and 16-byte loads want them.

    Padded rows, which may hold anything, become 0: in a matrix product 0 · NaN would spread.
    """
    step = 16 // x.element_size()
    aligned = x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0
    if ids is None and aligned:
        return x
    rows, d = x.shape
    out = x.new_empty(rows, -(-d // step) * step)[:, :d]
    if ids is None:
        return out.copy_(x)
    return torch.where((ids >= 0)[:, None], x, x.new_zeros(()), out=out)


def _ranks(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 with the same equalities, negative for padding: half the comparisons of int64.

    An id's rank is its place among the sorted column ids, M for a row's that is not there.
    """
    p = problem
    if p.row_ids is None:
        return None, None
    order = p.col_ids.sort().values
    cols = torch.searchsorted(order, p.col_ids)
    cols = torch.where(p.col_ids < 0, -1, cols).int()
    if is_symmetric(p):
        return cols, cols
    rows = torch.searchsorted(order, p.row_ids)
    found = order[rows.clamp(max=p.m - 1)] == p.row_ids
    return torch.where(p.row_ids < 0, -1, torch.where(found, rows, p.m)).int(), cols


def accumulate(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x @ y, accumulated in fp32 whatever the dtype of x and y."""
    if x.dtype == torch.float32 or not x.is_cuda:
        out.addmm_(x.float(), y.float())
    else:
        torch.addmm(out, x, y, out_dtype=torch.float32, out=out)
