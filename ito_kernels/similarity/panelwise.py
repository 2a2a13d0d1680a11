"""Any function of the scores of all pairs, a panel of rows at a time.

The scores never exist at once. Forward keeps what it was given and backward computes each panel
again, so memory is O((N + M)·D) and one panel. `torch.utils.checkpoint` around each panel would not
do: autograd then holds the gradients of the keys of all panels until they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .first_order import first_order_only, reverse_mode_only
from .spec import accumulate_dtype, check_pair, check_tensor, without_autocast

# 2^20 scores are 4 MiB in fp32, of which a last-level cache holds several. Below 64 rows the matrix
# products no longer reach the machine's speed, so very wide problems take larger panels.
PANEL_SCORES = 1 << 20
MIN_ROWS = 64


def panel_rows(columns: int) -> int:
    return max(MIN_ROWS, PANEL_SCORES // columns)


def row_panels(rows: int, columns: int, step: int | None = None) -> Iterator[slice]:
    """The rows of each panel of a rows × columns matrix."""
    step = panel_rows(columns) if step is None else step
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def panelwise(
    function: Callable[..., Tensor],
    queries: Tensor,
    keys: Tensor,
    *,
    row_args: Sequence[Tensor] = (),
    key_args: Sequence[Tensor] = (),
    panel_bytes: int | None = None,
    gradient: Callable[..., Sequence[Tensor | None]] | None = None,
) -> Tensor:
    """A loss of one's own from scores that never exist at once: a value for every query.

        out_i = function(<q_i, k_1>, …, <q_i, k_M>)

    With the cross-entropy of each query against the keys as an example:

        def loss(scores, rows, scale):
            scores = scale * scores
            return scores.logsumexp(1) - scores.gather(1, rows[:, None])[:, 0]

        panelwise(loss, queries, keys, key_args=(scale,)).mean()

    Args:
        function: `function(scores, rows, *row_args, *key_args)` takes the inner products (r, M) of
            r queries with all keys, the queries' numbers (r,), int64, `row_args` of these rows and
            `key_args` whole. Returns a tensor of r values, or of r rows. It runs again in backward
            and must then do the same: no random numbers. Whatever needs a gradient must be an
            argument, not a variable of the surrounding code. It may overwrite nothing it was given.
        queries, keys: (N, D) and (M, D). Scores are fp32, fp64 for fp64 features, also under
            autocast.
        row_args: tensors of N rows each. key_args: tensors of any shape.
        panel_bytes: memory for one panel's scores; the function's intermediate results are as
            large, each. By default 4 MiB in fp32, but no fewer than 64 rows.
        gradient: the function's gradient by hand, where autograd's passes over the panel take too
            long: `gradient(grad, value, scores, rows, *row_args, *key_args)`, given those of the
            values and the values, returns one for scores and for each argument, or None. Neither it
            nor `function` is then differentiated, and both may overwrite `scores`.

    Returns (N,), or (N, …) as the function returns (r, …). Gradients reach queries, keys and every
    tensor in `row_args` and `key_args`. Time: 1 matrix product forward, 3 backward.

    Raises:
        TypeError, ValueError: an argument, or what the function returns, does not fit, by name.
        RuntimeError: a gradient of a gradient or forward-mode differentiation is asked for.
    """
    if torch.compiler.is_compiling() and gradient is None:  # which traces no autograd in backward
        options = {"row_args": row_args, "key_args": key_args, "panel_bytes": panel_bytes}
        return torch.compiler.disable(panelwise)(function, queries, keys, **options)
    for name, x in (("function", function), ("gradient", gradient)):
        if not (callable(x) or (name == "gradient" and x is None)):
            raise TypeError(f"{name} must be a function of a panel, got {type(x).__name__}")
    queries, keys = check_pair("queries", queries, "keys", keys)
    row_args = _check_arguments("row_args", row_args, queries, len(queries))
    key_args = _check_arguments("key_args", key_args, queries)
    dtype = accumulate_dtype(queries.dtype)
    step = panel_rows(len(keys))
    if panel_bytes is not None:
        if isinstance(panel_bytes, bool) or not isinstance(panel_bytes, int):
            raise TypeError(f"panel_bytes must be a whole number, got {panel_bytes!r}")
        if panel_bytes < 1:
            raise ValueError(f"panel_bytes must be at least 1, got {panel_bytes}")
        step = max(1, panel_bytes // (len(keys) * dtype.itemsize))
    reverse_mode_only(queries, keys, *row_args, *key_args)
    tensors = queries.to(dtype), keys.to(dtype), *row_args, *key_args
    return _Rows.apply(function, gradient, step, len(row_args), *tensors)


def panelwise_sum(
    function: Callable[..., tuple[Tensor, Sequence[Tensor | None]]],
    queries: Tensor,
    keys: Tensor,
    *,
    row_args: Sequence[Tensor] = (),
    key_args: Sequence[Tensor] = (),
) -> Tensor:
    """The sum over panels of what the function gives, 0-d in fp64, with gradients formed in the
    forward pass: no panel is computed twice, 3 matrix products instead of 4.

    The function takes what that of `panelwise` takes, and may overwrite the scores. It returns its
    part of the sum and the gradients of the scores and of each argument, None for none. queries and
    keys are fp32 or fp64, and autocast is off. Nothing is checked.
    """
    reverse_mode_only(queries, keys, *row_args, *key_args)
    return _Sum.apply(function, len(row_args), queries, keys, *row_args, *key_args)


def _check_arguments(
    name: str, given: object, queries: Tensor, rows: int | None = None
) -> tuple[Tensor, ...]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(given).__name__}")
    for i, x in enumerate(given):
        x = check_tensor(f"{name}[{i}]", x)
        if rows is not None and (x.ndim == 0 or len(x) != rows):
            raise ValueError(
                f"{name}[{i}] must have {rows} rows, one for each query, got shape {tuple(x.shape)}"
            )
        if x.device != queries.device:
            raise ValueError(
                f"{name}[{i}] must be on {queries.device} like queries, got {x.device}"
            )
    return tuple(given)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, gradient, step, row_args, queries, keys, *args) -> Tensor:
        out = None
        with without_autocast(queries.device):
            for rows, scores, numbers, here in _panels(step, row_args, queries, keys, args):
                value = function(scores, numbers, *here)
                if out is None:
                    _check_value(value, len(numbers))
                    out = value.new_empty(len(queries), *value.shape[1:])
                out[rows] = value
        ctx.save_for_backward(queries, keys, *args, *(() if gradient is None else (out,)))
        ctx.function, ctx.gradient, ctx.step, ctx.row_args = function, gradient, step, row_args
        if not out.is_floating_point():
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        first_order_only()
        queries, keys, *args = ctx.saved_tensors
        out = None
        if ctx.gradient is not None:
            *args, out = args
        wanted = ctx.needs_input_grad[4:]
        total = _Gradients(queries, keys, args, ctx.row_args, wanted)
        with without_autocast(queries.device):
            for rows, scores, numbers, here in _panels(ctx.step, ctx.row_args, queries, keys, args):
                if ctx.gradient is None:
                    found = _differentiated(ctx.function, scores, numbers, here, wanted, grad[rows])
                else:
                    found = ctx.gradient(grad[rows], out[rows], scores, numbers, *here)
                total.add(rows, *found)
        return None, None, None, None, *total.sums


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, row_args, queries, keys, *args) -> Tensor:
        total = queries.new_zeros((), dtype=torch.float64)
        grads = _Gradients(queries, keys, args, row_args, ctx.needs_input_grad[2:])
        step = panel_rows(len(keys))
        for rows, scores, numbers, here in _panels(step, row_args, queries, keys, args):
            value, found = function(scores, numbers, *here)
            total += value
            grads.add(rows, *found)
        ctx.save_for_backward(*grads.sums)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        first_order_only()
        scaled = (None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)
        return None, None, *scaled


def _panels(
    step: int, row_args: int, queries: Tensor, keys: Tensor, args: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
    """Of each panel the rows, the scores, the rows' numbers and the arguments."""
    numbers = torch.arange(len(queries), device=queries.device)
    for rows in row_panels(len(queries), len(keys), step):
        here = [x[rows] if i < row_args else x for i, x in enumerate(args)]
        yield rows, queries[rows] @ keys.T, numbers[rows], here


def _check_value(value: object, rows: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"function must return a tensor, got {type(value).__name__}")
    if value.ndim == 0 or len(value) != rows:
        raise ValueError(
            f"function must return a value or a row for each of the {rows} rows of its panel, got"
            f" shape {tuple(value.shape)}"
        )


def _differentiated(
    function: Callable, scores: Tensor, numbers: Tensor, here: list, wanted: tuple, grad: Tensor
) -> list[Tensor | None]:
    """The gradients of scores and arguments, by autograd. wanted: as in `_Gradients`."""
    flags = any(wanted[:2]), *wanted[2:]
    inputs = [x.detach().requires_grad_(w) for x, w in zip((scores, *here), flags, strict=True)]
    with torch.enable_grad():
        value = function(inputs[0], numbers, *inputs[1:])
    if not value.requires_grad:  # a constant for this panel
        return [None] * len(inputs)
    leaves = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(value, leaves, grad, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


class _Gradients:
    """The gradients of queries, keys and arguments, collected panel by panel.

    wanted: of queries, keys and each argument, whether it needs one.
    """

    def __init__(self, queries, keys, args, row_args: int, wanted: Sequence[bool]):
        self.queries, self.keys, self.row_args = queries, keys, row_args
        self.sums = [
            torch.zeros_like(x) if w else None
            for x, w in zip((queries, keys, *args), wanted, strict=True)
        ]

    def add(self, rows: slice, of_scores: Tensor | None, *of_args: Tensor | None) -> None:
        of_queries, of_keys, *sums = self.sums
        if of_scores is not None and of_queries is not None:
            torch.mm(of_scores, self.keys, out=of_queries[rows])
        if of_scores is not None and of_keys is not None:
            of_keys.addmm_(of_scores.T, self.queries[rows])
        for i, (total, x) in enumerate(zip(sums, of_args, strict=True)):
            if total is not None and x is not None:
                (total[rows] if i < self.row_args else total).add_(x)
