"""Any function of the scores, computed a panel of rows at a time.

The full score matrix never exists. Forward saves only its inputs, and backward computes each panel
again, so memory is O((N + M)·D) plus one panel. `torch.utils.checkpoint` around each panel would
take more: autograd keeps the gradients of the keys from all panels until it adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .first_order import first_order_only, reverse_mode_only
from .spec import accumulate_dtype, check_pair, check_tensor, without_autocast

# 2^20 scores are 4 MiB in fp32; a last-level cache holds several such panels. Matrix products of
# fewer than 64 rows are slow, so very wide problems take larger panels.
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
    """Apply your own function of the scores to each query, without forming all scores.

        out_i = function(<q_i, k_1>, …, <q_i, k_M>)

    For example, the cross-entropy of each query against the keys:

        def loss(scores, rows, scale):
            scores = scale * scores
            return scores.logsumexp(1) - scores.gather(1, rows[:, None])[:, 0]

        panelwise(loss, queries, keys, key_args=(scale,)).mean()

    Args:
        function: called as `function(scores, rows, *row_args, *key_args)` with the inner products
            (r, M) of r queries with all keys, the row numbers (r,) of these queries, int64, the
            same rows of `row_args`, and `key_args`. It returns a tensor of shape (r,) or (r, …). It
            runs again in backward and must then return the same: no random numbers. A tensor that
            needs a gradient must be an argument: one of the surrounding code raises an error. The
            function must not modify its arguments in place.
        queries, keys: (N, D) and (M, D). Scores are fp32, fp64 for fp64 features, also under
            autocast.
        row_args: tensors with N rows each.
        key_args: tensors of any shape.
        panel_bytes: memory for the scores of one panel. Each intermediate result of the function
            takes as much. By default 4 MiB in fp32, and at least 64 rows.
        gradient: a handwritten gradient, for functions whose differentiation by autograd is too
            slow. Called as `gradient(grad, value, scores, rows, *row_args, *key_args)` with the
            upstream gradients and the values of the panel, it returns the gradients of the scores
            and of each argument, None for no gradient. Autograd then differentiates neither
            function, and both may modify `scores` in place.

    Returns (N,), or (N, …) if the function returns (r, …). Queries, keys and all tensors in
    `row_args` and `key_args` get gradients. It takes 1 matrix product in forward, 3 in backward.

    Raises:
        TypeError, ValueError: an argument or the result of the function is invalid. The message
            names it.
        RuntimeError: a gradient of a gradient or forward-mode differentiation is requested.
    """
    if torch.compiler.is_compiling() and gradient is None:
        # torch.compile does not trace autograd inside the backward of an autograd.Function
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
    if keys is queries and torch.compiler.is_compiling():
        keys = keys.view_as(keys)  # torch.compile cannot trace one tensor that is passed twice
    tensors = queries.to(dtype), keys.to(dtype), *row_args, *key_args
    by_autograd = gradient is None and torch.is_grad_enabled()
    return _PerRow.apply(function, gradient, by_autograd, step, len(row_args), *tensors)


def panelwise_sum(
    function: Callable[..., tuple[Tensor, Sequence[Tensor | None]]],
    queries: Tensor,
    keys: Tensor,
    *,
    row_args: Sequence[Tensor] = (),
    key_args: Sequence[Tensor] = (),
) -> Tensor:
    """The sum over the panels of a function's values, with gradients computed in forward.

    No panel is computed twice: 3 matrix products instead of 4 in `panelwise`.

    Args:
        function: takes the arguments of that of `panelwise` and may modify the scores in place. It
            returns the panel's part of the sum and a sequence of gradients of that part: of the
            scores and of each argument, None for no gradient.
        queries, keys: (N, D) and (M, D), fp32 or fp64, with autocast off. They are not checked.

    Returns a 0-d fp64 tensor.
    """
    reverse_mode_only(queries, keys, *row_args, *key_args)
    return _Sum.apply(function, len(row_args), queries, keys, *row_args, *key_args)


def _check_arguments(
    name: str, args: object, queries: Tensor, rows: int | None = None
) -> tuple[Tensor, ...]:
    if isinstance(args, Tensor) or not isinstance(args, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(args).__name__}")
    for i, x in enumerate(args):
        x = check_tensor(f"{name}[{i}]", x)
        if rows is not None and (x.ndim == 0 or len(x) != rows):
            raise ValueError(
                f"{name}[{i}] must have {rows} rows, one for each query, got shape {tuple(x.shape)}"
            )
        if x.device != queries.device:
            raise ValueError(
                f"{name}[{i}] must be on {queries.device} like queries, got {x.device}"
            )
    return tuple(args)


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, gradient, by_autograd, step, row_args, queries, keys, *args):
        out = None
        args_of_function = [x.detach() for x in args]
        with without_autocast(queries.device):
            for rows, scores, numbers, panel_args in _panels(
                step, row_args, queries, keys, args_of_function
            ):
                # No argument needs a gradient here, so only another tensor can give one to `value`.
                with torch.set_grad_enabled(by_autograd):
                    value = function(scores, numbers, *panel_args)
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
        needs_grad = ctx.needs_input_grad[5:]
        gradients = _Gradients(queries, keys, args, ctx.row_args, needs_grad)
        with without_autocast(queries.device):
            for rows, scores, numbers, panel_args in _panels(
                ctx.step, ctx.row_args, queries, keys, args
            ):
                if ctx.gradient is None:
                    grads = _panel_gradients(
                        ctx.function, scores, numbers, panel_args, needs_grad, grad[rows]
                    )
                else:
                    grads = ctx.gradient(grad[rows], out[rows], scores, numbers, *panel_args)
                gradients.add(rows, *grads)
        return None, None, None, None, None, *gradients.result()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, row_args, queries, keys, *args) -> Tensor:
        total = queries.new_zeros((), dtype=torch.float64)
        gradients = _Gradients(queries, keys, args, row_args, ctx.needs_input_grad[2:])
        step = panel_rows(len(keys))
        for rows, scores, numbers, panel_args in _panels(step, row_args, queries, keys, args):
            value, grads = function(scores, numbers, *panel_args)
            total += value
            gradients.add(rows, *grads)
        ctx.save_for_backward(*gradients.result())
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        first_order_only()
        scaled = (None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)
        return None, None, *scaled


def _panels(
    step: int, row_args: int, queries: Tensor, keys: Tensor, args: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
    """Iterates over the panels: (rows, scores, row numbers, arguments for these rows)."""
    numbers = torch.arange(len(queries), device=queries.device)
    for rows in row_panels(len(queries), len(keys), step):
        panel_args = [x[rows] if i < row_args else x for i, x in enumerate(args)]
        yield rows, queries[rows] @ keys.T, numbers[rows], panel_args


def _check_value(value: object, rows: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"function must return a tensor, got {type(value).__name__}")
    if value.ndim == 0 or len(value) != rows:
        raise ValueError(
            f"function must return a value or a row for each of the {rows} rows of its panel, got"
            f" shape {tuple(value.shape)}"
        )
    if value.requires_grad:
        raise ValueError(
            "function uses a tensor that needs a gradient and is not among its arguments: it would"
            " get none; pass it in row_args or key_args, or detach it"
        )


def _panel_gradients(
    function: Callable, scores: Tensor, numbers: Tensor, args: list, needs_grad: tuple, grad: Tensor
) -> list[Tensor | None]:
    """The gradients of the scores and the arguments by autograd. needs_grad: see `_Gradients`."""
    flags = any(needs_grad[:2]), *needs_grad[2:]
    inputs = [x.detach().requires_grad_(w) for x, w in zip((scores, *args), flags, strict=True)]
    with torch.enable_grad():
        value = function(inputs[0], numbers, *inputs[1:])
    if not value.requires_grad:  # a constant for this panel
        return [None] * len(inputs)
    leaves = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(value, leaves, grad, allow_unused=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


class _Gradients:
    """Sums the gradients of queries, keys and arguments over the panels, in fp32 at least: the sum
    over 128 panels of a bf16 scale would be 7 % off.

    needs_grad: whether queries, keys and each argument need a gradient.
    """

    def __init__(self, queries, keys, args, row_args: int, needs_grad: Sequence[bool]):
        self.queries, self.keys, self.row_args = queries, keys, row_args
        self.tensors = (queries, keys, *args)
        self.sums = [
            torch.zeros_like(x, dtype=accumulate_dtype(x.dtype)) if w else None
            for x, w in zip(self.tensors, needs_grad, strict=True)
        ]

    def add(self, rows: slice, scores_grad: Tensor | None, *arg_grads: Tensor | None) -> None:
        queries_grad, keys_grad, *arg_sums = self.sums
        if scores_grad is not None and queries_grad is not None:
            torch.mm(scores_grad, self.keys, out=queries_grad[rows])
        if scores_grad is not None and keys_grad is not None:
            keys_grad.addmm_(scores_grad.T, self.queries[rows])
        for i, (total, x) in enumerate(zip(arg_sums, arg_grads, strict=True)):
            if total is not None and x is not None:
                (total[rows] if i < self.row_args else total).add_(x)

    def result(self) -> list[Tensor | None]:
        """The gradients in the dtypes of their tensors."""
        pairs = zip(self.sums, self.tensors, strict=True)
        return [None if total is None else total.to(x.dtype) for total, x in pairs]
