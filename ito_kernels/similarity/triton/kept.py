"""Which exponentials does the forward pass keep for the gradients, and in what memory?

With the exponentials E of the forward pass (`gpu.fixed_shift`), W_ij is E_ij·(u_i + v_j) except at
positives. So a gradient that finds E in memory computes no scores: 3 matrix products instead of 4.
E is kept in bf16, from the first row on, by whole panels of W. Its rounding error, about 2e-3 of an
element, adds to that of rounding W to bf16 (as large) or fp16. W at positives is a difference of
nearly equal terms; it is computed in fp32, from the positives' scores.

E is kept for the plain losses in half precision whose gradients are computed in panels: one scale,
no ids, biases, limit or self-similarity, positives on the diagonal if any. For all other losses and
for rows that do not fit, backward computes the scores again. If a sum has underflowed, it does so
for all rows and does not use E.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..budget import tile_cache_left
from ..spec import Problem

BLOCK = (64, 128)  # of E, that one program turns into W
# Without ITO_TILE_CACHE_BYTES: where keeping is predicted to pay (docs/gpu-static.md), and the
# share of the memory that is free.
LEAST_D = 384
LEAST_SCORES = 6000 * 6000
SHARE = 1 / 4
WIDEST = 2**22  # columns: a tile of E spans fewer than 2^31 elements

_decided: dict[tuple, int] = {}


def size(plan) -> int:
    """Bytes that a forward pass takes to keep exponentials; 0 if it keeps none.

    At most ITO_TILE_CACHE_BYTES, for all passes together that await their gradients. Where it is
    not set, at most a quarter of the memory that is free at the first call of a device and size:
    the same for all later calls, so that the same inputs give the same bits.
    """
    p = plan.problem
    chosen = bool(os.environ.get("ITO_TILE_CACHE_BYTES"))
    if chosen:
        tile_cache_left()  # raises for a bad value
    if plan.gradient or not _plain(p):
        return 0
    if not chosen and (p.d < LEAST_D or p.n * p.m < LEAST_SCORES):
        return 0
    left = tile_cache_left(p.a.device.type, 0 if chosen else _share_of_free(p))
    return _bytes(p, rows(plan, left))


def rows(plan, memory: int) -> int:
    """The rows whose exponentials are kept in so many bytes: whole panels, or all."""
    p = plan.problem
    if _bytes(p, p.n) <= memory:
        return p.n
    height, _ = plan.panel_size()
    kept = (p.n - 1) // height * height
    while kept > 0 and _bytes(p, kept) > memory:
        kept -= height
    return kept


def _plain(p: Problem) -> bool:
    options = (p.row_ids, p.row_bias, p.col_bias, p.row_limit)
    return (
        all(x is None for x in options)
        and p.scale.ndim == 0
        and p.m < WIDEST
        and not (p.exclude_self or p.exclude_positives or p.positives == "lse")
        and not (gpu.is_symmetric(p) or gpu.needs_maxima(p))
    )


def _share_of_free(p: Problem) -> int:
    """Nothing for a CUDA graph that is captured before a first call outside has decided."""
    device = p.a.device
    if device.type == "cpu":
        return 0
    key = device, p.n, p.m
    if key not in _decided:
        if torch.cuda.is_current_stream_capturing():
            return 0
        free, _ = torch.cuda.mem_get_info(device)
        # what PyTorch holds and does not use is free too
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _decided[key] = int(free * SHARE)
    return _decided[key]


def _bytes(p: Problem, kept: int) -> int:
    """The memory of so many rows, and of a score in fp32 for each row of the problem."""
    return kept and 4 * gpu.aligned(p.n) + 2 * gpu.aligned(kept) * gpu.aligned(p.m)


class Kept(NamedTuple):
    """exponentials: E, in bf16, of whole tiles. pair_scores: S·log2 e - T of each row's pair.
    rows: the rows that are kept."""

    exponentials: Tensor
    pair_scores: Tensor
    rows: int

    @classmethod
    def of(cls, plan, memory: Tensor) -> Kept:
        """memory: of `size` bytes."""
        p = plan.problem
        number, start = rows(plan, memory.numel()), 4 * gpu.aligned(p.n)
        exponentials = memory[start:].view(torch.bfloat16).view(-1, gpu.aligned(p.m))
        return cls(exponentials, memory[: 4 * p.n].view(torch.float32), number)

    def pair_weights(
        self, p: Problem, row_weights: Tensor | None, col_weights: Tensor | None
    ) -> Tensor:
        """W at column i + diagonal of each row i. The weights are `gpu.SideWeights.fixed`."""
        out = self.pair_scores.new_zeros(gpu.aligned(p.n))
        first, last = max(0, -p.diagonal), min(p.n, p.m - p.diagonal)
        if first < last:
            e = torch.exp2(self.pair_scores[first:last])
            for weights, start in ((row_weights, first), (col_weights, first + p.diagonal)):
                if weights is not None:
                    of_all, of_positives = weights[start : start + last - first].unbind(1)
                    out[first:last] += e * of_all + of_positives
        return out
