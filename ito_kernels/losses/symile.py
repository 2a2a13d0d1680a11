"""Contrastive loss of three modalities by their multilinear inner product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import same_on_every_rank
from .batch import Names, check_arguments
from .common import check_generator
from .precision import row_dot, take_rows, to_accumulate_dtype, to_autocast_dtype, without_autocast

SYMILE = Names("x", "y")


@same_on_every_rank
def symile_loss(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    logit_scale: float | Tensor,
    generator: torch.Generator | None = None,
    *,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of triples: the candidates of x_i are element-wise products of a y and a z.

        L_x = mean_i [ log(exp T_i + Σ_{j ≠ i} exp S_ij) - T_i ]
        S_ij = logit_scale · <x_i, y_π(j) ∘ z_σ(j)>,   T_i = logit_scale · <x_i, y_i ∘ z_i>

    with random permutations π and σ. L is the mean of L_x, L_y and L_z, each with its own
    permutations. S is never formed.

    Args:
        x, y, z: (N, D); row i of all three is a positive triple. bf16 and fp16 are computed in
            fp32, because positives and negatives are combined outside the kernels.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        generator: random generator of the permutations, on the device of x or on the CPU; None
            takes PyTorch's default. It draws two permutations for each of x, y and z, in this
            order.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError that names an invalid argument.
    Source: Saporta et al. 2024 (Symile), with N - 1 negatives per positive.
    """
    args = check_arguments(x, y, logit_scale, group, chunk_size, backend, names=SYMILE)
    z = args.check_features_like_queries("z", z, rows=len(args.queries))
    check_generator("generator", generator)
    batch = args.global_batch()
    x, y, z = (to_accumulate_dtype(to_autocast_dtype(v)) for v in (*args[:2], z))
    device = x.device if generator is None else generator.device
    local, n = batch.local_range("col"), batch.global_count("col")

    def shuffled(v: Tensor) -> Tensor:
        """This rank's part of all ranks' rows, in a random order drawn on the first rank."""
        order = batch.broadcast(torch.randperm(n, generator=generator, device=device).to(v.device))
        return take_rows(v, order[local.start : local.stop])

    with without_autocast(x.device):
        local_rows, all_rows = (x, y, z), [batch.all_gather_rows(v) for v in (x, y, z)]
        total = 0
        for anchor, second, third in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            candidates = shuffled(all_rows[second]) * shuffled(all_rows[third])
            stats = batch.similarity_logsumexp(
                local_rows[anchor],
                candidates,
                args.scale,
                row_ids=batch.query_ids,
                col_ids=batch.key_ids,
                exclude_self=True,
                cols=False,
                backend=backend,
            )
            products = local_rows[second] * local_rows[third]
            positive = args.scale * row_dot(local_rows[anchor], products)
            negatives = stats.row_logsum + stats.row_max
            total = total + softplus(negatives - positive, threshold=40).sum()
        return batch.all_reduce_loss(total) / (3 * n)
