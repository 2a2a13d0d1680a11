"""The problem that a backend solves and its results, as structs, and checks of tensors.

The similarity matrix S is defined by

    S_ij = scale_i * <a_i, b_j> + row_bias_i + col_bias_j

Pairs (i, j) fall into three kinds:

- *excluded*: a row or column with a negative id (padding); self pairs under `exclude_self`; pairs
  above `row_limit`, that is <a_i, b_j> > row_limit_i, that are not positive.
- *positive*: equal ids; without ids, j = i + diagonal.
- *negative*: the rest.

The checks of the primitive's tensors and numbers, and their error texts, are in this file.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_OR_NONE = {*_PLAIN, type(None)}


class Problem(NamedTuple):
    """A similarity matrix, and which statistics of it to compute.

    a: (N, D). b: (M, D), or None for a self-similarity, where it would be `a`.
    scale: 0-d or (N,); row_bias: (N,); col_bias: (M,); in the accumulate dtype.
    row_ids: (N,), col_ids: (M,), int64; both or neither.
    row_limit: (N,), accumulate dtype, without gradient.
    positives: None, "linear" or "lse": see `SideStats.pos`.
    exclude_self: exclude the self pairs. exclude_positives: leave the positives out of max and
        logsum.
    diagonal: column i + diagonal is the self pair of row i, and without ids its positive. Other
        than 0 for a block of a larger matrix.
    rows, cols: which statistics to compute. hardest: whether to compute `SideStats.neg_max`.
    exact_max: whether `SideStats.max` must be the maximum. False lets a backend put another number
        of about the same size in its place; -inf still says that there was nothing to sum.
    half_values: whether the features, in fp32, are values of bf16 or fp16.
    """

    a: Tensor
    b: Tensor | None
    scale: Tensor
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    positives: str | None = None
    exclude_self: bool = False
    exclude_positives: bool = False
    diagonal: int = 0
    rows: bool = True
    cols: bool = True
    hardest: bool = False
    exact_max: bool = True
    half_values: bool = False

    @property
    def n(self) -> int:
        return self.a.size(0)

    @property
    def m(self) -> int:
        return (self.a if self.b is None else self.b).size(0)

    @property
    def d(self) -> int:
        return self.a.size(1)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The tensors that can have a gradient, in the order of `Needs`."""
        return self.a, self.b, self.scale, self.row_bias, self.col_bias

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that hold tensors, which come first; the others are `options`."""
        return *self.inputs, self.row_ids, self.col_ids, self.row_limit

    @property
    def options(self) -> tuple:
        return (
            self.positives,
            self.exclude_self,
            self.exclude_positives,
            self.diagonal,
            self.rows,
            self.cols,
            self.hardest,
            self.exact_max,
            self.half_values,
        )

    def scale_grad(self, rows: Tensor | None) -> Tensor | None:
        """The gradient of the scale from the gradient of each row's scale, (N,)."""
        return rows if rows is None or self.scale.ndim else rows.sum()

    def new_stats(self) -> Stats:
        """Uninitialised memory for the statistics."""
        row = self.new_side(self.n) if self.rows else None
        return Stats(row, self.new_side(self.m) if self.cols else None)

    def new_side(self, length: int) -> SideStats:
        """Uninitialised memory for the statistics of one side."""
        new = self.scale.new_empty
        return SideStats(
            new(length),
            new(length),
            new(length) if self.positives is not None else None,
            new(length) if self.hardest else None,
        )

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of scores, statistics and scale: fp32, or fp64 for fp64 features."""
        return accumulate_dtype(self.a.dtype)


class SideStats(NamedTuple):
    """Statistics of the rows, or of the columns, in the accumulate dtype.

    max:     maximum over the pairs that are not excluded, or with `exclude_positives` over the
             negatives alone; -inf without any. It has no gradient: it only shifts the other
             statistics, and `max + logsum` has the right gradient. With `exact_max` False it may be
             another finite number near `max + logsum`.
    logsum:  log Σ exp(S - max) over the same pairs; -inf without any.
    pos:     "linear": Σ (S - max) over the positives; "lse": log Σ exp(S - max) over them. A `max`
             of -inf counts as 0 here. None if positives are not asked for.
    neg_max: maximum over the negatives; -inf without any. It has no gradient. None if it is not
             asked for.
    """

    max: Tensor | None
    logsum: Tensor | None
    pos: Tensor | None = None
    neg_max: Tensor | None = None


class Stats(NamedTuple):
    """Statistics of the rows and of the columns; None for a side that was not asked for.

    `row_max` is short for `row.max`, or None if `row` is None; likewise the others.
    """

    row: SideStats | None = None
    col: SideStats | None = None

    row_max = property(lambda self: self.row.max if self.row else None)
    row_logsum = property(lambda self: self.row.logsum if self.row else None)
    row_pos = property(lambda self: self.row.pos if self.row else None)
    row_neg_max = property(lambda self: self.row.neg_max if self.row else None)
    col_max = property(lambda self: self.col.max if self.col else None)
    col_logsum = property(lambda self: self.col.logsum if self.col else None)
    col_pos = property(lambda self: self.col.pos if self.col else None)
    col_neg_max = property(lambda self: self.col.neg_max if self.col else None)


class SideUpstream(NamedTuple):
    """The upstream gradients of one side's logsum and pos (or their weights); None means 0.

    A weight may be a number, which holds for every row or column: a mean then needs no tensors.
    """

    logsum: Tensor | float | None = None
    pos: Tensor | float | None = None

    def tensors(self, length: int, like: Tensor) -> SideUpstream:
        logsum, pos = (
            x if x is None or isinstance(x, Tensor) else like.new_full((length,), x) for x in self
        )
        return SideUpstream(logsum, pos)


class Upstream(NamedTuple):
    row: SideUpstream = SideUpstream()
    col: SideUpstream = SideUpstream()

    def tensors(self, problem: Problem) -> Upstream:
        """The same with a tensor for each number."""
        like = problem.scale
        return Upstream(self.row.tensors(problem.n, like), self.col.tensors(problem.m, like))


class Needs(NamedTuple):
    """Which gradients to compute."""

    a: bool = False
    b: bool = False
    scale: bool = False
    row_bias: bool = False
    col_bias: bool = False


class Grads(NamedTuple):
    """The gradients; None for those that are not needed.

    a, b: in the dtype of the features. Of a self-similarity `a` has the gradient of both sides.
    scale: in the shape of the scale. scale, row_bias and col_bias: in the accumulate dtype.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: Tensor | None = None
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without its 2 µs if x has that dtype. A step of a small batch has 8 calls."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_enabled(device: torch.device) -> bool:
    # For the meta device PyTorch raises. torch.amp.is_autocast_available would tell, but
    # torch.compile of 2.11 cannot trace it.
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager:
    if autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def can_skip_dispatcher(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether a call may bypass PyTorch's dispatcher without anything noticing: it is not compiled
    or traced, no dispatch mode or transform of torch.func is active, and its tensors are plain.

    The dispatcher takes 25 µs for an operator of 26 arguments, twice in a forward pass, whose
    kernels take 20 µs for 8 rows.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or not _PLAIN_OR_NONE.issuperset(map(type, inputs))
    )


def is_number(x: object) -> bool:
    """Whether `x` is a real number, also NumPy's, and not a bool."""
    return isinstance(x, (int, float, Real)) and not isinstance(x, bool)


def check_tensor(name: str, x: object, wanted: str = "a tensor") -> Tensor:
    """`x`, made readable for kernels. Raises TypeError if it is not a dense tensor, ValueError as
    `readable`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be {wanted}, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            f"{name} must be {wanted}, got a nested tensor: pad it, and give padding a negative id"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}: use to_dense()")
    return readable(name, x)


def readable(name: str, x: Tensor) -> Tensor:
    """`x` with its values in memory, because kernels read them by address.

    PyTorch marks a negated view (`z.conj().imag`) by a bit, and allocates no memory for gradients
    known to be zero: both are materialised. FSDP frees the storage of tensors that are still
    referenced; reading one would crash the process, so it raises ValueError.
    """
    if type(x) not in _PLAIN or torch.compiler.is_compiling():
        # These go through PyTorch's dispatcher, which materialises them. Code compiled by inductor
        # does not: it reads a negated input without the sign, for PyTorch's own operators too.
        return x
    if x.is_neg():
        x = x.resolve_neg()
    if x._is_zerotensor():
        return x + torch.zeros_like(x)  # with its gradient
    try:
        size = x.untyped_storage().nbytes()
    except NotImplementedError:  # inside torch.func transforms
        return x
    # the second condition allows expanded tensors, whose elements share memory
    if size < x.nbytes + x.storage_offset() * x.itemsize and size < _extent(x):
        raise ValueError(
            f"{name} must have its values in memory, got storage of {size} bytes for shape"
            f" {tuple(x.shape)}: it was freed or resized"
        )
    return x


def _extent(x: Tensor) -> int:
    """Bytes from the start of the storage to the end of the last element."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.itemsize


def check_features(name: str, x: object) -> Tensor:
    """`x`, checked to be an (N, D) floating-point tensor with N, D ≥ 1."""
    x = check_tensor(name, x, "a tensor of shape (N, D)")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(x.shape)}")
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{name} must have at least one row and one column, got {tuple(x.shape)}")
    return x


def check_pair(a_name: str, a: object, b_name: str, b: object) -> tuple[Tensor, Tensor]:
    """Both feature matrices, checked. If `b` is `a`, the two results are the same tensor."""
    same = b is a
    a = check_features(a_name, a)
    b = a if same else check_features(b_name, b)
    if a.size(1) != b.size(1):
        raise ValueError(
            f"{a_name} and {b_name} must have the same width D, got {a.shape[1]} and {b.shape[1]}"
        )
    if a.device != b.device:
        raise ValueError(
            f"{a_name} and {b_name} must be on the same device, got {a.device} and {b.device}"
        )
    if not same_dtype(a, b):
        raise TypeError(f"{a_name} and {b_name} must have the same dtype, got {a.dtype}, {b.dtype}")
    return a, b


def same_dtype(a: Tensor, b: Tensor) -> bool:
    """Whether features have the same dtype: under autocast after the cast, which leaves fp64 as it
    is."""
    if a.dtype == b.dtype:
        return True
    return autocast_enabled(a.device) and torch.float64 not in (a.dtype, b.dtype)


def check_ids(name: str, ids: object, length: int, of: str, device: torch.device) -> Tensor:
    """`ids` as int64, checked to have one integer for each row of `of`."""
    ids = check_tensor(name, ids, "a tensor of integers")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} must have an integer dtype, got {ids.dtype}")
    if tuple(ids.shape) != (length,):
        raise ValueError(
            f"{name} must have shape ({length},), one id for each row of {of},"
            f" got {tuple(ids.shape)}"
        )
    if ids.device != device:
        raise ValueError(f"{name} must be on {device} like {of}, got {ids.device}")
    if ids.dtype == torch.uint64:
        _check_uint64(name, ids)
    return cast(ids, torch.int64)


def _check_uint64(name: str, ids: Tensor) -> None:
    """Refuses values from 2^63 up: as int64 they would be negative, which means padding. Waits for
    the device."""
    if torch.compiler.is_compiling():
        raise TypeError(f"{name} must be int64 under torch.compile, got torch.uint64")
    if (ids.view(torch.int64) < 0).any():
        raise ValueError(f"{name} must be less than 2^63, got {max(ids.tolist())}")


def scalar(x: Tensor) -> Tensor:
    """A tensor of shape (1,) as 0-d, any other as it is."""
    return x.reshape(()) if x.ndim == 1 and x.shape[0] == 1 else x


def check_scale(name: str, scale: object, like: Tensor) -> Tensor:
    """`scale` as a tensor on the device of `like`: from a positive finite number, a 0-d tensor or
    one value per row.

    Shape (1,), which open_clip's parameter may have, is treated as 0-d. The values of a tensor are
    not checked: that would wait for the device.
    """
    dtype = accumulate_dtype(like.dtype)
    if isinstance(scale, Tensor):
        scale = check_tensor(name, scale)
        if not scale.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {scale.dtype}")
        scale = scalar(scale)
        if scale.ndim != 0 and tuple(scale.shape) != (like.shape[0],):
            raise ValueError(
                f"{name} must be a number, a 0-d tensor or have shape ({like.shape[0]},),"
                f" got {tuple(scale.shape)}"
            )
        if scale.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, got {scale.device}")
        return cast(scale, dtype)
    if not is_number(scale):
        raise TypeError(f"{name} must be a number or a tensor, got {type(scale).__name__}")
    if not 0 < scale < math.inf:  # torch.compile follows comparisons, not math.isfinite
        raise ValueError(f"{name} must be finite and greater than 0, got {scale}")
    return torch.full((), float(scale), dtype=dtype, device=like.device)


def check_bias(name: str, bias: object, length: int, like: Tensor) -> Tensor:
    """`bias` in the accumulate dtype, checked to have shape (length,)."""
    bias = check_tensor(name, bias)
    if not bias.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {bias.dtype}")
    if bias.ndim != 1 or bias.size(0) != length:
        raise ValueError(f"{name} must have shape ({length},), got {tuple(bias.shape)}")
    if bias.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {bias.device}")
    return cast(bias, accumulate_dtype(like.dtype))


def check_weight(name: str, weight: object, length: int, like: Tensor) -> Tensor:
    """Like `check_bias`, for a tensor that must not require a gradient."""
    weight = check_bias(name, weight, length, like)
    if weight.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is a constant")
    return weight


def check_weights(
    name: str, weights: object, problem: Problem, wanted: bool, length: int
) -> SideUpstream:
    """The weights of one side's logsum and pos, checked."""
    if weights is None:
        return SideUpstream()
    if not (isinstance(weights, (tuple, list)) and len(weights) == 2):
        raise TypeError(f"{name} must be a pair: a weight of logsum, one of pos or None")
    if not wanted:
        raise ValueError(f"{name} is given, but that side's statistics are not asked for")
    logsum, pos = weights
    logsum = check_weight(f"{name}[0]", logsum, length, problem.a)
    if pos is not None:
        if problem.positives is None:
            raise ValueError(f"{name}[1] must be None without positives")
        pos = check_weight(f"{name}[1]", pos, length, problem.a)
    return SideUpstream(logsum, pos)


def make_problem(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_limit: Tensor | None = None,
    **flags,
) -> Problem:
    """A Problem from the primitive's arguments, checked. `b is a` makes it a self-similarity."""
    same = b is a
    a, b = check_pair("a", a, "b", b)
    if (row_ids is None) != (col_ids is None):
        missing = "row_ids" if row_ids is None else "col_ids"
        raise ValueError(f"row_ids and col_ids go together: {missing} is missing")
    if row_ids is not None:
        row_ids = check_ids("row_ids", row_ids, a.shape[0], "a", a.device)
        col_ids = check_ids("col_ids", col_ids, b.shape[0], "b", a.device)
    if flags.get("positives") not in (None, "linear", "lse"):
        raise ValueError(f'positives must be None, "linear" or "lse", got {flags["positives"]!r}')
    if not (flags.get("rows", True) or flags.get("cols", True)):
        raise ValueError("rows and cols are both False: nothing is asked for")
    scale = check_scale("scale", scale, a)
    if row_bias is not None:
        row_bias = check_bias("row_bias", row_bias, a.shape[0], a)
    if col_bias is not None:
        col_bias = check_bias("col_bias", col_bias, b.shape[0], a)
    if row_limit is not None:
        row_limit = check_weight("row_limit", row_limit, a.shape[0], a)
    b = None if same else b
    problem = Problem(a, b, scale, row_bias, col_bias, row_ids, col_ids, row_limit, **flags)
    return as_autocast_problem(problem)


def as_autocast_problem(problem: Problem) -> Problem:
    """Under autocast, the problem with its features in the autocast dtype, as for a matrix product.

    Everything else stays in fp32: a scale of 100 rounded to bf16 would move scores by up to 0.2.
    """
    a, b = problem.a, problem.b
    if not autocast_enabled(a.device):
        return problem
    dtype = torch.get_autocast_dtype(a.device.type)
    a, b = (x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (a, b))
    if b is not None and a.dtype != b.dtype:
        raise TypeError(f"a and b must have the same dtype, got {a.dtype}, {b.dtype}")
    accumulate = accumulate_dtype(a.dtype)
    vectors = ("scale", "row_bias", "col_bias", "row_limit")
    values = {name: getattr(problem, name) for name in vectors}
    cast_values = {k: None if x is None else x.to(accumulate) for k, x in values.items()}
    return problem._replace(a=a, b=b, **cast_values)
