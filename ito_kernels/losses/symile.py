"""Three modalities at once, by their multilinear inner product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import same_on_every_rank
from .batch import Names, check_arguments
from .common import check_generator
from .precision import accumulated, as_autocast, inner, take, without_autocast

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
    """InfoNCE of triples: x_i is compared with products of a y and a z.

        L_x = mean_i [ log(exp T_i + Σ_{j ≠ i} exp S_ij) - T_i ]
        S_ij = logit_scale · <x_i, y_π(j) ∘ z_σ(j)>,   T_i = logit_scale · <x_i, y_i ∘ z_i>

    with random permutations π and σ; L is the mean of L_x, L_y and L_z, each with permutations of
    its own. No S is formed.

    Args:
        x, y, z: (N, D); row i of all three belongs together. bf16 and fp16 are computed in fp32:
            the true triples and the others meet outside the kernels.
        logit_scale: the multiplier itself: a number, a 0-d tensor or an (N,) tensor.
        generator: of the permutations, two for each of x, y and z in this order; on the device of
            x or on the CPU. PyTorch's default one otherwise.
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features).
    Raises TypeError or ValueError for an argument that does not fit, by name.
    Source: Saporta et al. 2024 (Symile), with N - 1 negatives of each positive.
    """
    given = check_arguments(x, y, logit_scale, group, chunk_size, backend, names=SYMILE)
    z = given.another("z", z, rows=len(given.queries))
    check_generator("generator", generator)
    batch = given.global_batch()
    x, y, z = (accumulated(as_autocast(v)) for v in (*given[:2], z))
    device = x.device if generator is None else generator.device
    local, n = batch.local_range("col"), batch.global_count("col")

    def shuffled(v: Tensor) -> Tensor:
        """This rank's part of all ranks' rows in a random order, the first rank's."""
        order = batch.broadcast(torch.randperm(n, generator=generator, device=device).to(v.device))
        return take(v, order[local.start : local.stop])

    with without_autocast(x.device):
        own, of_all = (x, y, z), [batch.all_gather_rows(v) for v in (x, y, z)]
        total = 0
        for anchor, second, third in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            others = shuffled(of_all[second]) * shuffled(of_all[third])
            stats = batch.similarity_logsumexp(
                own[anchor],
                others,
                given.scale,
                row_ids=batch.query_ids,
                col_ids=batch.key_ids,
                exclude_self=True,
                cols=False,
                backend=backend,
            )
            true = given.scale * inner(own[anchor], own[second] * own[third])
            negatives = stats.row_logsum + stats.row_max
            total = total + softplus(negatives - true, threshold=40).sum()
        return batch.all_reduce_loss(total) / (3 * n)
