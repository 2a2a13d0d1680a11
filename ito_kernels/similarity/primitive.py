"""The primitive: reductions of a similarity matrix that is never formed."""

from __future__ import annotations

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
    row_weights: tuple[Tensor, Tensor | None] | None = None,
    col_weights: tuple[Tensor, Tensor | None] | None = None,
    return_stats: bool = True,
    backend: str | None = None,
) -> Stats | Tensor | tuple[Tensor, Stats]:
    """Row and column logsumexp of S = scale·a·bᵀ + biases, without forming S.

    Args:
        a, b: (N, D) and (M, D), fp32, bf16 or fp16 (fp64 on the reference and chunked backends);
            any strides. The same tensor for both is a self-similarity.
        scale: multiplier of the inner products: a number, a 0-d tensor, one of shape (1,) or (N,).
        row_bias, col_bias: (N,) and (M,), added to the scores.
        row_ids, col_ids: (N,) and (M,) integers. Equal ids are positives; a negative id is padding
            that takes no part. Without ids the positive of row i is column i + diagonal.
        row_limit: (N,) without gradient. Pairs that are not positive and have an inner product
            <a_i, b_j> above row_limit_i are left out of everything.
        positives: also give, per row and column, the positives' Σ (S - max) ("linear") or
            log Σ exp(S - max) ("lse").
        exclude_self: leave out the pairs (i, i + diagonal): without ids, every positive.
        exclude_positives: leave the positives out of max and logsum.
        rows, cols: which side's statistics are wanted.
        hardest: also give the maximum over the negatives.
        row_weights, col_weights: (u, alpha) of (N,) and (v, beta) of (M,), tensors without
            gradient; alpha and beta may be None. Ask for the sum of all statistics, weighted:

                Σ_i u_i·row_logsum_i + alpha_i·row_pos_i + Σ_j v_j·col_logsum_j + beta_j·col_pos_j

            in which statistics of -inf with a weight of 0 count as 0. Gradients that are wanted
            are then formed in the forward pass, except in fp16, and backward only multiplies them:
            with cols=False 3 matrix products instead of 4 where the backend can (cpu).
        return_stats: with weights: whether the statistics are wanted too, or their sum alone.
        backend: see `ito_kernels.backends()`; None chooses. A function that torch.compile has
            compiled keeps the backend it was compiled with: later `use_backend` and ITO_BACKEND do
            not reach it.

    Returns:
        Stats of fp32 tensors (fp64 for fp64 features): `row` (N,) and `col` (M,), each with `max`
        (constant for autograd), `logsum`, `pos`, `neg_max`; None where not wanted. `row_max` is
        `row.max`, and so on. The logsumexp is
        `max + logsum`; a loss is best written `logsum - pos / k`, which keeps the digits that
        `logsumexp - positive` cancels at a large scale.
        With weights the pair of their 0-d sum and the Stats, which then carry no gradient, or the
        sum alone without `return_stats`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
        RuntimeError: the backend asked for cannot run this problem; a gradient of a gradient or
            forward-mode differentiation is asked for.

    Under autocast a and b are computed in the autocast dtype and everything else in fp32.
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
    """Per row, the sum over columns of softplus(S) at negatives and softplus(-S) at positives.

    S = scale·a·bᵀ + biases is not formed. Arguments and errors as in `similarity_logsumexp`, but
    `row_weights` is one (N,) tensor without gradient. With it the result is the 0-d sum
    Σ_i row_weights_i · row_i, and gradients that are wanted are formed in the forward pass, except
    in fp16: 3 matrix products instead of 4 where the backend can (cpu, triton).

    Returns (N,), or 0-d with `row_weights`, in fp32, fp64 for fp64 features.
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
    """Which backend and tile shape a call with these tensors would use, and why. Runs nothing.

    queries, keys, logit_scale, `options`: a, b, scale and the options of `similarity_logsumexp`.
    """
    check_pair("queries", queries, "keys", keys)
    names = ("row_bias", "col_bias", "row_ids", "col_ids")
    for name in options.keys() - {*Problem._fields}:
        raise TypeError(f"explain takes the options of similarity_logsumexp, and no {name}")
    problem = make_problem(
        queries, keys, logit_scale, **{name: options.pop(name, None) for name in names}, **options
    )
    chosen = dispatch.choose(problem, backend)
    what = "self-similarity" if problem.b is None else "similarity"
    return (
        f"{what} of {problem.n} x {problem.m}, D = {problem.d}, {problem.a.dtype} on"
        f" {problem.a.device.type}\n"
        f"backend {chosen.name}: {dispatch.why(problem, backend)}\n"
        f"tiles: {chosen.describe(problem)}"
    )
