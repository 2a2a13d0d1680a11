"""Losses for one tower: every embedding is an anchor, and all others are its candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import global_row_numbers, same_on_every_rank
from ..similarity.primitive import logsumexp_of
from ..similarity.spec import (
    Problem,
    SideUpstream,
    Upstream,
    as_autocast_problem,
    check_scale,
)
from .batch import Names, check_arguments
from .common import check_choice
from .infonce import infonce
from .options import Options

SUPCON = Names("features", "features", "temperature", "labels", "labels", ("features", "features"))
NT_XENT = Names("z1", "z2", "temperature")


@same_on_every_rank
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    empty: str = "zero",
    *,
    positives: str = "mean",
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss.

        L_out = mean_i [ logsumexp_{j ≠ i} S_ij - (1/k_i) Σ_{j ∈ P_i} S_ij ]
        L_in  = mean_i [ logsumexp_{j ≠ i} S_ij - log (1/k_i) Σ_{j ∈ P_i} exp S_ij ]

    with S = features · featuresᵀ / temperature and P_i the k_i other rows with the label of row i.
    S is never formed.

    Args:
        features: (N, D), L2-normalised; dtypes as in `multi_positive_infonce`. The views of a
            sample are rows with the same label.
        labels: (N,) integers. A negative label marks a padded row, which is ignored.
        temperature: a number, a 0-d tensor, or (N,), one per row.
        base_temperature: if given, the loss is multiplied by temperature / base_temperature, as in
            the authors' code. Needs one temperature for all rows.
        empty: a row without a positive counts as 0 in the mean ("zero") or is left out of it
            ("drop").
        positives: "mean" for L_out, "in" for L_in.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Khosla et al. 2020 (SupCon), eq. 2 and 3. The paper sums over the rows; this function
    takes the mean.
    """
    check_choice("positives", positives, ("mean", "in"))
    args = check_arguments(
        features,
        features,
        temperature,
        group,
        chunk_size,
        backend,
        ids=(labels, labels),
        names=SUPCON,
    )
    factor = None
    if base_temperature is not None:
        if args.scale.ndim:
            raise ValueError(
                "base_temperature needs one temperature for all rows,"
                f" got one of shape {tuple(args.scale.shape)}"
            )
        factor = args.scale / check_scale("base_temperature", base_temperature, args.queries)
    options = Options(positives=positives, symmetric=False, exclude_self=True, empty=empty)
    loss = infonce(args._replace(scale=1.0 / args.scale), options)
    return loss if factor is None else loss * factor


@same_on_every_rank
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross-entropy (NT-Xent) of two views.

        L = (1/2N) Σ_i [ logsumexp_{j ≠ i} S_ij - S_i,p(i) ],   S = z · zᵀ / temperature

    over the 2N rows z = [z1; z2], with p(i) the other view of row i. S is never formed.

    Args:
        z1, z2: (N, D), L2-normalised; row i of both is a view of the same sample; dtypes as in
            `multi_positive_infonce`.
        temperature: a number or a 0-d tensor.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features). Raises as `multi_positive_infonce`.
    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    args = check_arguments(z1, z2, temperature, group, chunk_size, backend, names=NT_XENT)
    scale = 1.0 / args.scale
    if scale.ndim:
        raise ValueError(f"temperature must be a number or 0-d, got shape {tuple(scale.shape)}")
    z, device = torch.cat(args[:2]), args.queries.device
    if group is not None:
        ids = global_row_numbers(len(z1), group, device).repeat(2)
        args = args._replace(queries=z, keys=z, scale=scale, query_ids=ids, key_ids=ids)
        return infonce(args, Options(symmetric=False, exclude_self=True))
    ids = torch.arange(len(z1), device=device).repeat(2)
    share = 1 / len(z)
    # Every row has exactly one positive. Counting them would take half of supcon_loss's time at
    # N = 64, so the primitive is called directly.
    problem = Problem(
        *(z, None, scale),
        row_ids=ids,
        col_ids=ids,
        positives="linear",
        exclude_self=True,
        cols=False,
        exact_max=False,
    )
    weights = Upstream(SideUpstream(share, -share))
    return logsumexp_of(as_autocast_problem(problem), weights, False, backend)
