"""The public functions of the primitive: reductions of a similarity matrix that is never formed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import dispatch
from .op import logsumexp_of, softplus_of
from .spec import (
    Problem,
    Stats,
    Upstream,
    check_pair,
    check_weight,
    check_weights,
    make_problem,
)


def similarity_logsumexp(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    row_limit: Tensor | None = None,
    positives: str | None = None,
    exclude_self: bool = False,
    exclude_positives: bool = False,
    diagonal: int = 0,
    rows: bool = True,
    cols: bool = True,
    hardest: bool = False,
    exact_max: bool = True,
    half_values: bool = False,
    row_weights: tuple[Tensor, Tensor | None] | None = None,
    col_weights: tuple[Tensor, Tensor | None] | None = None,
    return_stats: bool = True,
    backend: str | None = None,
) -> Stats | Any:  # Any: with weights, the loss or the pair of it and the statistics
    """Row and column logsumexp of S = scale·a·bᵀ + biases, without forming S.

    Args:
        a, b: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked backends);
            any strides. Passing the same tensor twice computes a self-similarity.
        scale: multiplier of the inner products: a number, a 0-d tensor, or of shape (1,) or (N,).
        row_bias, col_bias: (N,) and (M,), added to the scores.
        row_ids, col_ids: (N,) and (M,) integers. Equal ids are positives. A negative id marks
            padding, which is ignored. Without ids the positive of row i is column i + diagonal.
        row_limit: (N,) without gradient. Negatives with an inner product <a_i, b_j> above
            row_limit_i are left out of all statistics.
        positives: also compute, for each row and column, Σ (S - max) over the positives ("linear")
            or log Σ exp(S - max) over the positives ("lse").
        exclude_self: leave out the pairs (i, i + diagonal). Without ids these are all positives.
        exclude_positives: leave the positives out of max and logsum.
        diagonal: the offset of the self pairs, and without ids of the positives.
        rows, cols: whether to compute the row statistics and the column statistics.
        hardest: also compute the maximum over the negatives.
        exact_max: False if `max` serves as a shift only. Another finite number near the logsumexp
            may then stand in its place: in half precision, the GPU backends then compute row and
            column statistics in one pass over S instead of two.
        half_values: True promises that the fp32 features are values of bf16 or fp16; this is not
            checked. The GPU backends then compute each matrix product of the gradients as three
            bf16 products, accurate to 2^-17. Triton computes the scores by one tf32 product, in
            which these values are exact.
        row_weights, col_weights: (u, alpha) of shape (N,) and (v, beta) of shape (M,), tensors
            without gradient; alpha and beta may be None. With weights the result is the weighted
            sum of the statistics

                Σ_i u_i·row_logsum_i + alpha_i·row_pos_i + Σ_j v_j·col_logsum_j + beta_j·col_pos_j

            A statistic of -inf with weight 0 counts as 0. The gradients are then computed in the
            forward pass, except in fp16, and backward only multiplies them by the upstream
            gradient. With cols=False this takes 3 matrix products instead of 4 on the cpu backend.
        return_stats: with weights, whether to return the statistics too.
        backend: see `ito_kernels.backends()`; None chooses automatically. A function compiled by
            torch.compile keeps the backend that it was compiled with, whatever `use_backend` and
            ITO_BACKEND are set to later.

    Returns:
        Stats of fp32 tensors (fp64 for fp64 features): `row` with tensors (N,) and `col` with
        tensors (M,). Each has `max` (constant for autograd), `logsum`, `pos` and `neg_max`, None if
        not requested. `row_max` is `row.max`, and so on. The logsumexp is `max + logsum`. A loss
        should be written as `logsum - pos / k`: `logsumexp - positive` would lose digits by
        cancellation at a large scale.
        With weights, the pair (0-d weighted sum, Stats), where the Stats have no gradient; with
        return_stats=False only the sum.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it.
        RuntimeError: the requested backend cannot run this problem, or a gradient of a gradient or
            forward-mode differentiation is requested.

    Under autocast the matrix products take a and b in the autocast dtype. Everything else is fp32.
    """
    problem = make_problem(
        a,
        b,
        scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        row_limit=row_limit,
        positives=positives,
        exclude_self=exclude_self,
        exclude_positives=exclude_positives,
        diagonal=diagonal,
        rows=rows,
        cols=cols,
        hardest=hardest,
        exact_max=exact_max,
        half_values=half_values,
    )
    weights = Upstream(
        check_weights("row_weights", row_weights, problem, rows, problem.n),
        check_weights("col_weights", col_weights, problem, cols, problem.m),
    )
    return logsumexp_of(problem, weights, return_stats, backend)


def similarity_softplus(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_self: bool = False,
    diagonal: int = 0,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """For each row of S, the sum of softplus(S) over its negatives and of softplus(-S) over its
    positives, without forming S.

        row_i = Σ_{j ∉ P_i} softplus(S_ij) + Σ_{p ∈ P_i} softplus(-S_ip)

    with S = scale·a·bᵀ + biases. Arguments and errors are as in `similarity_logsumexp`,
    except that `row_weights` is one (N,) tensor without gradient. With it the result is the 0-d sum
    Σ_i row_weights_i · row_i. Its gradients are computed in the forward pass, except in fp16: 3
    matrix products instead of 4 on the cpu and triton backends.

    Returns (N,), or 0-d with `row_weights`, in fp32 (fp64 for fp64 features).
    """
    problem = make_problem(
        a,
        b,
        scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        exclude_self=exclude_self,
        diagonal=diagonal,
    )
    if row_weights is not None:
        row_weights = check_weight("row_weights", row_weights, problem.n, problem.a)
    return softplus_of(problem, row_weights, backend)


def explain(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options,
) -> str:
    """Describe which backend and tile shape a call with these tensors would use, and why.

    Runs no kernel.

    Args:
        queries, keys, logit_scale, options: a, b, scale and the options of `similarity_logsumexp`.
        backend: as in `similarity_logsumexp`.

    Returns a text of several lines.
    Raises TypeError or ValueError for invalid arguments, RuntimeError if the requested backend
    cannot run here.
    """
    check_pair("queries", queries, "keys", keys)
    names = ("row_bias", "col_bias", "row_ids", "col_ids")
    for name in options.keys() - {*Problem._fields}:
        raise TypeError(f"explain takes the options of similarity_logsumexp, got {name}")
    problem = make_problem(
        queries, keys, logit_scale, **{name: options.pop(name, None) for name in names}, **options
    )
    chosen = dispatch.choose(problem, backend)
    kind = "self-similarity" if problem.b is None else "similarity"
    return (
        f"{kind} of {problem.n} x {problem.m}, D = {problem.d}, {problem.a.dtype} on"
        f" {problem.a.device.type}\n"
        f"backend {chosen.name}: {dispatch.why(problem, backend)}\n"
        f"tiles: {chosen.describe(problem)}"
    )
