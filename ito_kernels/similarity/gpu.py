"""Host code that the Triton and CUDA backends share: what they need of torch and of a GPU, the
operands of the kernels, the split of work into programs, and the gradients assembled from kernel
results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import e, isqrt, log, log2
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .spec import Grads, Needs, Problem, SideStats, SideUpstream, Stats, Upstream

PANEL_BYTES = 256 << 20  # memory of one W panel: docs/gpu-static.md
# In fp16, W is scaled so that its largest terms have this value. A sum of 4 of them stays below
# 65,504, and a softmax entry of 1/N keeps its 11 bits down to 1e-8.
FP16_SCALED_MAX = 4096.0
ALIGNED_ROWS = 256  # a multiple of the rows and of the columns of any tile
MIN_TORCH = (2, 13)  # as in pyproject.toml


# Requirements.


def older(version: str, wanted: tuple[int, int]) -> bool:
    """Whether a version such as "2.13.0+cu130" is below `wanted`."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < wanted


def unsuitable(device: torch.device) -> str:
    """Why this torch or this GPU is too old; empty if neither is, and for the CPU, where the
    kernels are interpreted or emulated."""
    if device.type == "cpu":
        return ""
    if older(torch.__version__, MIN_TORCH):
        return f"needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]}, got {torch.__version__}"
    if torch.version.hip:
        return ""
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8:
        return f"needs compute capability 8.0, {gpu.name} has {gpu.major}.{gpu.minor}"
    return ""


# torch.compile uses the value at compilation; it cannot trace `older`
unsuitable._dynamo_marked_constant = True


def matmul_precision() -> str:
    """PyTorch's setting for fp32 matrix products: "highest", "high" or "medium".

    Where it was set by `torch.backends.*.fp32_precision`, `torch.get_float32_matmul_precision`
    raises. "tf32" there means "medium" here: that setting has no name for 3×tf32, which is "high".
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "medium" if tf32 else "highest"


# The operands of the kernels.


class Operands(NamedTuple):
    """Contiguous vectors, features with aligned rows, ids as int32, followed by -1 up to a multiple
    of `ALIGNED_ROWS`: tiles that extend beyond the end read them without a mask.

    b is the same tensor as a for a self-similarity, unless padding differs between the sides.
    """

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

    def transposed(self) -> Operands:
        a, b, scale, row_bias, col_bias, row_ids, col_ids = self
        return Operands(b, a, scale, col_bias, row_bias, col_ids, row_ids)


def is_symmetric(problem: Problem) -> bool:
    """Whether S and its masks are known to be symmetric.

    Ids are compared by address: comparing values would synchronise with the device. A limit belongs
    to the rows only, so it breaks the symmetry.
    """
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
    """Features whose rows are 16 elements or a multiple of that apart and start at 16 bytes.

    Tensor descriptors need 16 bytes, and rows that do not overlap as those of `expand` do. All that
    Triton knows of a stride is whether 16 divides it. If not, and without descriptors, it loads one
    element at a time, and the kernels spill (840 bytes on sm_80).
    Padded rows may contain any values and become 0: in a matrix product 0 · NaN would spread.
    """
    apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    if ids is None and apart and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    rows, d = x.shape
    out = x.new_empty(rows, -(-d // 16) * 16)[:, :d]
    if ids is None:
        return out.copy_(x)
    return torch.where((ids >= 0)[:, None], x, x.new_zeros(()), out=out)


def _ranks(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Replace the int64 ids by int32 ranks with the same equalities, -1 for padding.

    Comparing int32 takes half the instructions. The rank of an id is its position among the sorted
    column ids. The rank of a row id that no column has is M.
    """
    p = problem
    if p.row_ids is None:
        return None, None
    order = p.col_ids.sort().values
    cols = torch.searchsorted(order, p.col_ids)
    cols = _padded_ids(torch.where(p.col_ids < 0, -1, cols))
    if is_symmetric(p):
        return cols, cols
    rows = torch.searchsorted(order, p.row_ids)
    found = order[rows.clamp(max=p.m - 1)] == p.row_ids
    return _padded_ids(torch.where(p.row_ids < 0, -1, torch.where(found, rows, p.m))), cols


def _padded_ids(ids: Tensor) -> Tensor:
    out = ids.new_full((aligned(len(ids)),), -1, dtype=torch.int32)
    out[: len(ids)] = ids
    return out[: len(ids)]


def aligned(rows: int) -> int:
    return -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS


def padded_pairs(x: Tensor, y: Tensor) -> Tensor:
    """(length, 2) with the columns x and y, followed by 0 up to a multiple of `ALIGNED_ROWS`."""
    out = x.new_zeros((aligned(len(x)), 2))
    torch.stack([x, y], 1, out=out[: len(x)])
    return out


def accumulate(out: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """out += Σ x @ Σ y, accumulated in fp32 for any dtype of x and y.

    x and y are each one matrix, or the two of `halves`. The product of both second matrices is left
    out: it is below 2^-17. Three products in bf16 take 1/5 of the time of one in fp32, by the peaks
    of an H100 (990 and 67 TFLOPS).
    """
    for n, left in enumerate(x):
        for right in y[: len(y) - n]:
            if left.dtype == torch.float32 or not left.is_cuda:
                out.addmm_(left.float(), right.float())
            else:
                torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x rounded to bf16, and the remainder in bf16. Their sum is exact for values of bf16 and fp16,
    and accurate to 2^-17 for any other. `x` is overwritten."""
    large = x.bfloat16()
    return large, x.sub_(large).bfloat16()


# One exponential per score.

LOG2E, LN2 = log2(e), log(2)
HEADROOM = 60 * LOG2E  # no exponential exceeds 2^HEADROOM, so that sums of 2^40 of them fit fp32
# A smaller sum counts as underflowed. Exponentials that a sum may have lost are below 2^-126 each:
# 2^20 of them are less than 2^-26 of a sum of at least LEAST.
LEAST = 2.0**-80


def exact_gradient(problem: Problem) -> bool:
    """Whether the gradient takes true maxima, and an exponential for each side, from the start.

    It does so in fp32. Relative to its own maximum, the softmax of a row that is sure of its
    positive is exactly 1, and its gradient 0. With one exponential for both sides, the softmax is a
    product of rounded factors, which differs from 1 by 1e-7. In half precision that does not
    matter: W is rounded to 4e-3.
    """
    return problem.a.dtype == torch.float32


def needs_maxima(problem: Problem) -> bool:
    """Whether the statistics have the true maxima from the start."""
    return problem.exact_max or problem.hardest or exact_gradient(problem)


def fixed_shift(problem: Problem, op: Operands) -> Tensor:
    """The shift T of all exponentials of a problem, in base 2, as a 0-d fp32 tensor.

    No score exceeds max |scale|·‖a‖ · max ‖b‖ + max row_bias + max col_bias, so with T = that
    bound - 60 nats, but at least 0, every E = 2^(S·log2 e - T) is at most e^60. One T for all rows
    and columns means that one exponential serves both sides, that no maxima are needed, and that
    statistics are plain sums: logsumexp = log Σ E + T, and the softmax of a row is E / Σ E.

    A row or column far below the bound underflows, which shows in its sum: see `underflowed`. Such
    problems are computed again with true maxima, by kernels that are always launched and leave at
    once if a tensor on the device says that nothing underflowed: the host never waits.

    NaN or infinite if a feature is; the statistics are then not finite.
    """

    def largest(x: Tensor, ids: Tensor | None, least: float) -> Tensor:
        """The largest element of x without padding, which may hold any values."""
        return (x if ids is None else x.masked_fill(ids < 0, least)).amax()

    longest = [vector_norm(x, dim=1, dtype=torch.float32) for x in (op.a, op.b)]
    row, col = (
        largest(longest[0] * op.scale.abs(), op.row_ids, 0),
        largest(longest[1], op.col_ids, 0),
    )
    bound = row * col
    for bias, ids in ((op.row_bias, op.row_ids), (op.col_bias, op.col_ids)):
        if bias is not None:
            bound = bound + largest(bias, ids, -torch.inf)
    return (bound * LOG2E - HEADROOM).clamp(min=0)


# The split of work.


class Split(NamedTuple):
    """Row tiles and column tiles in groups. Each pair of groups is one program."""

    row_tiles: int  # in one group
    col_tiles: int
    row_groups: int
    col_groups: int
    triangle: bool  # only pairs with row group ≤ column group

    @property
    def programs(self) -> int:
        if self.triangle:
            return self.row_groups * (self.row_groups + 1) // 2
        return self.row_groups * self.col_groups


@lru_cache(maxsize=256)
def split(n: int, m: int, tile_rows: int, tile_cols: int, processors: int, triangle: bool) -> Split:
    """The split with the least work for the busiest processor, and among these the fewest groups.

    Statistics are stored per row and column group, and per column and row group. Memory is
    O((N + M)·√processors), and programs share nothing.
    """
    if triangle:
        # row groups and column groups must cover the same rows
        unit = max(tile_rows, tile_cols)
        units = -(-n // unit)

        def cost(groups: int) -> tuple[int, int]:
            waves = -(-(groups * (groups + 1) // 2) // processors)
            return waves * (-(-units // groups)) ** 2, groups

        max_groups = min(units, 2 * isqrt(2 * processors) + 1)
        size = -(-units // min(range(1, max_groups + 1), key=cost))
        groups = -(-units // size)
        return Split(size * unit // tile_rows, size * unit // tile_cols, groups, groups, True)
    tiles_m, tiles_n = -(-n // tile_rows), -(-m // tile_cols)

    def cut(groups: int) -> Split:
        row_tiles = -(-tiles_m // groups)
        col_tiles = -(-tiles_n // min(tiles_n, processors // groups))
        row_groups, col_groups = -(-tiles_m // row_tiles), -(-tiles_n // col_tiles)
        return Split(row_tiles, col_tiles, row_groups, col_groups, False)

    cuts = [cut(groups) for groups in range(1, min(tiles_m, processors) + 1)]
    return min(cuts, key=lambda s: (s.row_tiles * s.col_tiles, s.row_groups + s.col_groups))


# Forward.


def both_sides(
    problem: Problem, row: Callable[[], SideStats], col: Callable[[], SideStats]
) -> Stats:
    """The requested statistics.

    row, col: functions that merge the slots of the rows and of the columns. For a symmetric S only
    `row` is called, and its result is copied.
    """
    symmetric = is_symmetric(problem)
    rows = row() if problem.rows or symmetric else None
    cols = None
    if problem.cols:
        cols = col() if not symmetric else SideStats(*map(_copied, rows))
    return Stats(rows if problem.rows else None, cols)


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


# Backward.


class Side(NamedTuple):
    """The upstream gradients and the statistics of one side. Softplus has no statistics."""

    upstream: SideUpstream = SideUpstream()
    stats: SideStats = SideStats(None, None)

    def merge(self, other: Side) -> Side:
        """Both sides of a symmetric S as one.

        dA is (W + Wᵀ)·A. W + Wᵀ is the W of a problem in which both sides have the same statistics
        and the sum of both upstream vectors.
        """

        def first(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return y if x is None else x

        def total(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return first(x, y) if x is None or y is None else x + y

        return Side(
            SideUpstream(*map(total, self.upstream, other.upstream)),
            SideStats(*map(first, self.stats, other.stats)),
        )

    def weights(self, problem: Problem, shift: Tensor, norm: Tensor | None) -> SideWeights | None:
        """What the backward kernels read; None if the side has no upstream gradient.

        shift: that of `fixed_shift`. norm: fp16 only, a divisor of W.
        """
        u, alpha = map(_fp32, self.upstream)
        if u is None and alpha is None:
            return None
        maximum, logsum, pos = map(_fp32, (self.stats.max, self.stats.logsum, self.stats.pos))
        zero = torch.zeros_like(maximum)
        u, alpha = (zero if x is None else x if norm is None else x / norm for x in (u, alpha))
        maximum = maximum.masked_fill(maximum == -torch.inf, 0)
        base = shift.double() - maximum.double() * LOG2E

        def inverse(logsum: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """log2 of 1 / Σ E, the logsum and the weight; all 0 for a sum over nothing."""
            nothing = logsum == -torch.inf
            logarithm = (base - logsum * LOG2E).float()
            return tuple(x.masked_fill(nothing, 0) for x in (logarithm, logsum, weight))

        inverse_sum, logsum, u = inverse(logsum, u)
        inverse_pos, of_positives = zero, alpha
        if problem.positives == "lse" and pos is not None:
            inverse_pos, pos, alpha = inverse(pos, alpha)
            of_positives = alpha * torch.exp2(inverse_pos)
        biased = problem.row_bias is not None or problem.col_bias is not None
        underflowed = torch.maximum(inverse_sum, inverse_pos).amax() > -log2(LEAST)
        return SideWeights(
            padded_pairs(u * torch.exp2(inverse_sum), of_positives),
            padded_pairs(u * torch.exp(-logsum), alpha),
            padded_pairs(maximum, zero if pos is None else pos),
            underflowed if biased else underflowed & (shift > 0),
        )


class Weights(NamedTuple):
    """What W needs besides the problem. A forward pass needs only `shift`. Softplus has neither
    `shift` nor `underflowed`."""

    shift: Tensor | None = None
    underflowed: Tensor | None = None  # 0-d, int32: whether W is computed with true maxima
    row: SideWeights | None = None  # None if the side has no upstream gradient
    col: SideWeights | None = None

    def transposed(self) -> Weights:
        return self._replace(row=self.col, col=self.row)


class SideWeights(NamedTuple):
    """What the backward kernels read of one side.

    W is the sum over both sides of u·e^S / Σ e^S, and at positives of alpha ("linear") or of
    alpha·e^S / Σ e^S over the positives ("lse").

    The tensors are `padded_pairs`.

    fixed: (length, 2), the factors of E in W: u / Σ E, and for positives alpha ("linear", which no
        E multiplies) or alpha / Σ E over them. For the kernels with one exponential per score.
    exact: (length, 2), u·e^-logsum and alpha, and shifts: (length, 2), the maximum and pos. For the
        kernels with one exponential per score and side.
    underflowed: 0-d, whether a sum of E is too small for the first kind.
    """

    fixed: Tensor
    exact: Tensor | None = None
    shifts: Tensor | None = None
    underflowed: Tensor | None = None


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class Backward(NamedTuple):
    """The inputs of a backward pass, fused or in panels."""

    problem: Problem
    op: Operands
    row: Side
    col: Side
    symmetric: bool  # compute W + Wᵀ from `row`
    softplus: bool

    @classmethod
    def of_logsumexp(cls, problem: Problem, stats: Stats, upstream: Upstream) -> Backward:
        row = Side(upstream.row, stats.row) if problem.rows else Side()
        col = Side(upstream.col, stats.col) if problem.cols else Side()
        return cls._of(problem, row, col, softplus=False)

    @classmethod
    def of_softplus(cls, problem: Problem, u: Tensor) -> Backward:
        return cls._of(problem, Side(SideUpstream(u)), Side(), softplus=True)

    @classmethod
    def _of(cls, problem: Problem, row: Side, col: Side, softplus: bool) -> Backward:
        symmetric = is_symmetric(problem)
        if symmetric:
            row = col = row.merge(col)
        return cls(problem, Operands.of(problem), row, col, symmetric, softplus)

    def transposed(self) -> Backward:
        """The same for Sᵀ. `problem` is not transposed."""
        return self._replace(op=self.op.transposed(), row=self.col, col=self.row)

    def norm(self, of_scale: bool) -> Tensor | None:
        """A divisor that brings W, or scale·W, into the range of fp16: it is of the order of 1/N².
        None for other dtypes."""
        if self.problem.a.dtype != torch.float16:
            return None
        vectors = (*self.row.upstream, *self.col.upstream)
        norm = torch.stack([x.abs().max().float() for x in vectors if x is not None]).max()
        if of_scale:
            norm = norm * self.problem.scale.abs().max()
        norm = norm / FP16_SCALED_MAX
        return torch.where((norm > 0) & norm.isfinite(), norm, 1.0)

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """(norm, factor): in fp16 W is divided by the norm; W·B is to be multiplied by the factor.

        A scale that is one number is part of the factor. One per row multiplies W itself.
        """
        scale = self.op.scale
        norm = self.norm(of_scale=scale.ndim == 1)
        if scale.ndim:
            return norm, norm
        return norm, scale if norm is None else scale * norm

    def weights(self, norm: Tensor | None) -> Weights:
        """The weights of both sides, divided by the norm."""
        sides = self.row, self.col
        if self.softplus:

            def pairs(u: Tensor | None) -> SideWeights | None:
                if u is None:
                    return None
                u = u.float() if norm is None else u.float() / norm
                return SideWeights(padded_pairs(u, torch.zeros_like(u)))

            return Weights(None, None, *(pairs(side.upstream.logsum) for side in sides))
        shift = fixed_shift(self.problem, self.op)
        row, col = (side.weights(self.problem, shift, norm) for side in sides)
        underflowed = torch.stack([x.underflowed for x in (row, col) if x]).any()
        if exact_gradient(self.problem):
            underflowed = torch.ones_like(underflowed)
        return Weights(shift, underflowed.int(), row, col)


def restored(sums: tuple, norm: Tensor | None) -> list[Tensor | None]:
    """Sums of W from those of W divided by the norm."""
    return [x if x is None or norm is None else x * norm for x in sums]


class RowGradient(NamedTuple):
    """Results for the rows of a call: dA, Σ_j W·<a, b> and Σ_j W; None if not needed."""

    grad: Tensor | None
    scale_sums: Tensor | None
    row_sums: Tensor | None


def fused_gradients(
    call: Backward,
    needs: Needs,
    run: Callable[[Backward, bool, Needs], RowGradient],
    factor: Tensor | None,
) -> Grads:
    """The gradients by a kernel that keeps rows of the gradient in registers, run once per side.

    run: launches the kernel. Its arguments are the call, whether that is transposed, and which of
        the gradients of a, scale and row_bias are needed.
    factor: a factor that the results of `run` do not contain yet, or None.
    """
    dtype, same = call.problem.a.dtype, call.problem.b is None
    if call.symmetric:
        out = run(call, False, Needs(a=needs.a, scale=needs.scale))
        scale = None if out.scale_sums is None else out.scale_sums * 0.5
        return Grads(_to_dtype(out.grad, dtype, factor), None, call.problem.scale_grad(scale))
    together = needs.a and same  # the gradients of both sides are added
    row = run(call, False, Needs(a=needs.a, scale=needs.scale, row_bias=needs.row_bias))
    col = run(call.transposed(), True, Needs(a=needs.b or together, row_bias=needs.col_bias))
    grad_a, grad_b = row.grad, col.grad
    if together:
        grad_a, grad_b = grad_a + grad_b, None
    return Grads(
        _to_dtype(grad_a, dtype, factor),
        _to_dtype(grad_b, dtype, factor),
        call.problem.scale_grad(row.scale_sums),
        row.row_sums,
        col.row_sums,
    )


class PanelSums(NamedTuple):
    """Partial sums over a panel of W, [slot][row or column]; None if not needed.

    scale: Σ_j W·<a, b>. row: Σ_j W. col: Σ_i W.
    """

    scale: Tensor | None
    row: Tensor | None
    col: Tensor | None

    @classmethod
    def new(
        cls, like: Tensor, needs: Needs, rows: tuple[int, int], cols: tuple[int, int]
    ) -> PanelSums:
        """rows, cols: (number of slots, number of rows or columns)."""

        def new(shape: tuple[int, int], needed: bool) -> Tensor | None:
            return like.new_empty(shape, dtype=torch.float32) if needed else None

        return cls(new(rows, needs.scale), new(rows, needs.row_bias), new(cols, needs.col_bias))


def panel_elements(problem: Problem) -> int:
    """The largest number of elements of a W panel. With `half_values` its `halves` take the same
    memory again."""
    return PANEL_BYTES // (problem.a.element_size() * (1 + problem.half_values))


def panel_gradients(
    call: Backward,
    needs: Needs,
    size: tuple[int, int],
    tile: tuple[int, int],
    run: Callable[[slice, slice, Tensor | None], PanelSums],
    factor: Tensor | None,
    scale_of_products: bool = False,
) -> Grads:
    """The gradients from panels of W, by the vendor's matrix products.

    size: rows and columns of a panel. tile: those of a tile.
    run: launches the kernel that writes W of the given rows and columns to the workspace, in whole
        tiles.
    factor: a factor that the products do not contain yet, or None.
    scale_of_products: form the gradient of a scale that is one number from the products. It is
        Σ <a, W·B>, in fp32, and takes no sums in the kernel.
    """
    p, op = call.problem, call.op

    def zeros(*shape: int) -> Tensor:
        return op.a.new_zeros(shape, dtype=torch.float32)

    grad_a = zeros(p.n, p.d) if needs.a else None
    grad_b = grad_a if p.b is None else zeros(p.m, p.d) if needs.b else None
    scale = zeros(p.n) if needs.scale and not scale_of_products else None
    row_bias = zeros(p.n) if needs.row_bias else None
    col_bias = zeros(p.m) if needs.col_bias else None
    workspace = None
    if needs.a or needs.b:
        workspace = op.a.new_empty([-(-x // y) * y for x, y in zip(size, tile, strict=True)])
    height, width = size
    a = halves(op.a.clone()) if p.half_values and workspace is not None else (op.a,)
    b = (op.b,)
    if op.b is op.a:
        b = a
    elif len(a) > 1:
        b = halves(op.b.clone())

    for row0 in range(0, p.n, height):
        rows = slice(row0, min(row0 + height, p.n))
        for col0 in range(row0 if call.symmetric else 0, p.m, width):
            cols = slice(col0, min(col0 + width, p.m))
            sums = run(rows, cols, workspace)
            diagonal = call.symmetric and row0 == col0
            if scale is not None:
                # On the diagonal, W + Wᵀ contains each pair twice. A panel off the diagonal stands
                # for its transpose too.
                scale[rows].add_(sums.scale.sum(0), alpha=0.5 if diagonal else 1.0)
            if row_bias is not None:
                row_bias[rows] += sums.row.sum(0)
            if col_bias is not None:
                col_bias[cols] += sums.col.sum(0)
            if workspace is None:
                continue
            weights = (workspace[: rows.stop - rows.start, : cols.stop - cols.start],)
            if p.half_values:
                weights = halves(*weights)
            if grad_a is not None:
                accumulate(grad_a[rows], weights, [y[cols] for y in b])
            if grad_b is not None and not diagonal:
                accumulate(grad_b[cols], [w.T for w in weights], [x[rows] for x in a])

    dtype = p.a.dtype
    if needs.scale and scale_of_products:
        x, grad = (op.b, grad_b) if grad_a is None else (op.a, grad_a)
        scale = (x * grad).sum()
        if p.b is None:  # it holds the gradients of both sides
            scale = scale * 0.5
        norm = call.norm(of_scale=False)
        scale = scale if norm is None else scale * norm
    grad_a = _to_dtype(grad_a, dtype, factor)
    grad_b = None if p.b is None else _to_dtype(grad_b, dtype, factor)
    return Grads(grad_a, grad_b, p.scale_grad(scale), row_bias, col_bias)


def _to_dtype(x: Tensor | None, dtype: torch.dtype, factor: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    x = x if factor is None else x * factor
    return x.to(dtype, memory_format=torch.contiguous_format)
