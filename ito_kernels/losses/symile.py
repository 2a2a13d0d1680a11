"""Three modalities at once, by their multilinear inner product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import check_chunk_size, same_on_every_rank, whole_batch
from ..similarity.spec import check_pair, check_scale
from .common import check_generator
from .precision import accumulated, as_autocast, inner, take, without_autocast


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
    check_chunk_size(chunk_size)
    x, y = check_pair("x", x, "y", y)
    x, z = check_pair("x", x, "z", z)
    for name, other in (("y", y), ("z", z)):
        if len(other) != len(x):
            raise ValueError(f"x and {name} must have as many rows, got {len(x)} and {len(other)}")
    scale = check_scale("logit_scale", logit_scale, x)
    check_generator("generator", generator)
    whole = whole_batch(group, x, x, chunk_size=chunk_size, backend=backend)
    x, y, z = (accumulated(as_autocast(v)) for v in (x, y, z))
    device = x.device if generator is None else generator.device

    mine, n = whole.numbers(1), whole.count(1)

    def shuffled(v: Tensor) -> Tensor:
        """This rank's part of everyone's rows in a random order, the first rank's."""
        order = whole.first(torch.randperm(n, generator=generator, device=device).to(v.device))
        return take(v, order[mine.start : mine.stop])

    with without_autocast(x.device):
        own, everyones = (x, y, z), [whole.rows(v) for v in (x, y, z)]
        total = 0
        for anchor, second, third in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            others = shuffled(everyones[second]) * shuffled(everyones[third])
            stats = whole.similarity_logsumexp(
                own[anchor],
                others,
                scale,
                row_ids=whole.query_ids,
                col_ids=whole.key_ids,
                exclude_self=True,
                cols=False,
                backend=backend,
            )
            true = scale * inner(own[anchor], own[second] * own[third])
            negatives = stats.row_logsum + stats.row_max
            total = total + softplus(negatives - true, threshold=40).sum()
        return whole.sum(total) / (3 * n)
