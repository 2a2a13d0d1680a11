"""Contrastive loss of two or more modalities by their multilinear inner product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import mul

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..distributed import same_on_every_rank
from ..similarity.first_order import first_order_only, reverse_mode_only
from ..similarity.op import logsumexp_gradients, logsumexp_of, readable_gradients
from ..similarity.pairs import finite_shift
from ..similarity.spec import Needs, Problem, SideStats, SideUpstream, Stats, Upstream
from .batch import Names, check_arguments
from .common import check_choice, check_generator
from .precision import row_dot, take_rows, to_accumulate_dtype, to_autocast_dtype, without_autocast

SYMILE = Names("modalities[0]", "modalities[1]")
# 1 MiB of candidates in fp32, unless one row of y takes more. Backward takes about ten such blocks;
# at N = 512, D = 64 blocks of 16 MiB are no faster and take 161 MiB.
BLOCK_NUMBERS = 1 << 18


@same_on_every_rank
def symile_loss(
    modalities: Sequence[Tensor],
    logit_scale: float | Tensor,
    *,
    negatives: str = "shuffled",
    generator: torch.Generator | None = None,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of m modalities: the candidates of a row are products of the other modalities' rows.

        L_x = mean_i [ log(exp T_i + Σ_c exp S_ic) - T_i ]
        S_ic = logit_scale · <x_i, c>,   T_i = logit_scale · <x_i, y_i ∘ z_i>

    for three modalities x, y and z, where ∘ is the element-wise product. L is the mean of L_x, L_y
    and L_z. The candidates c are

    - "shuffled": y_π(j) ∘ z_σ(j) for all j ≠ i, with random permutations π and σ, drawn for each of
      L_x, L_y and L_z; N - 1 of them, of which a few may be the row's own product;
    - "all": y_j ∘ z_k for all pairs (j, k) except (i, i); N² - 1 of them. For two modalities this
      is CLIP's symmetric loss.

    S is never formed. With "all", three modalities take 24·N³·D operations forward and backward.
    The N²·D products are formed a block at a time, and again in backward: memory is O(N·D).

    Args:
        modalities: two or more tensors (N, D); row i of all of them is a positive tuple. bf16 and
            fp16 are computed in fp32, because positives and negatives are combined outside the
            kernels.
        logit_scale: 1 / temperature, not its log: a number, a 0-d tensor, or (N,), where scale i
            holds for row i of every modality.
        negatives: "shuffled", or "all" for at most three modalities.
        generator: random generator of the permutations, on the device of the features or on the
            CPU; None takes PyTorch's default. For each modality as the anchor it draws one
            permutation for each of the others, in order. Only for "shuffled".
        group, chunk_size, backend: as in `multi_positive_infonce`.

    Returns a 0-d fp32 tensor (fp64 for fp64 features); 0 for N = 1, where there are no negatives.
    Raises as `multi_positive_infonce`.
    Source: Saporta et al. 2024 (Symile), section 3: the candidates are the released code's
    `negative_sampling` "n" and "n_squared".
    """
    if isinstance(modalities, Tensor) or not isinstance(modalities, Sequence):
        raise TypeError(
            f"modalities must be a sequence of tensors, got {type(modalities).__name__}"
        )
    number = len(modalities)
    if number < 2:
        raise ValueError(f"modalities must hold at least 2 tensors, got {number}")
    check_choice("negatives", negatives, ("shuffled", "all"))
    check_generator("generator", generator)
    if negatives == "all" and number > 3:
        raise ValueError(
            f'negatives="all" takes at most 3 modalities, got {number}: there would be'
            f" N^{number - 1} candidates"
        )
    if negatives == "all" and generator is not None:
        raise ValueError('generator is for negatives="shuffled", got one with "all"')
    args = check_arguments(*modalities[:2], logit_scale, group, chunk_size, backend, names=SYMILE)
    rest = [
        args.check_features_like_queries(f"modalities[{i}]", x, rows=len(args.queries))
        for i, x in enumerate(modalities[2:], 2)
    ]
    batch = args.global_batch()
    local = [to_accumulate_dtype(to_autocast_dtype(x)) for x in (*args[:2], *rest)]
    device, n = local[0].device, batch.global_count("col")
    at, row_numbers = batch.local_range("row"), torch.arange(n, device=device)

    def shuffled(x: Tensor) -> Tensor:
        """This rank's part of all ranks' rows, in a random order drawn on the first rank."""
        where = device if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=where).to(device)
        return take_rows(x, batch.broadcast(order)[at.start : at.stop])

    with without_autocast(device):
        gathered = local
        if negatives == "shuffled" or number == 3:
            gathered = [batch.all_gather_rows(x) for x in local]
        total = 0
        for index, anchor in enumerate(local):
            others = [i for i in range(number) if i != index]
            positive = args.scale * row_dot(anchor, _product([local[i] for i in others]))
            if negatives == "all" and number == 3:
                pairs = [gathered[i] for i in others]
                reverse_mode_only(anchor, *pairs, args.scale)
                maximum, logsum = _LogSumOverPairs.apply(
                    anchor, *pairs, args.scale, row_numbers[at.start : at.stop], backend
                )
            else:
                rows = [
                    shuffled(gathered[i]) if negatives == "shuffled" else local[i] for i in others
                ]
                stats = batch.similarity_logsumexp(
                    anchor,
                    _product(rows),
                    args.scale,
                    row_ids=batch.query_ids,
                    col_ids=batch.key_ids,
                    exclude_self=True,
                    cols=False,
                    exact_max=False,
                    backend=backend,
                )
                maximum, logsum = stats.row_max, stats.row_logsum
            losses = softplus(logsum + (maximum - positive), threshold=40)
            total = total + (losses + 0 * positive).sum()  # NaN where the positive is infinite
        return batch.all_reduce_loss(total) / (number * n)


def _product(tensors: list[Tensor]) -> Tensor:
    return reduce(mul, tensors)


class _LogSumOverPairs(torch.autograd.Function):
    """max and log Σ exp(S - max) of each anchor over the products y_j ∘ z_k of all pairs of rows
    except its own pair; max is constant for autograd.

    numbers: (n,), the row of y and z that each anchor belongs to.
    """

    @staticmethod
    def forward(ctx, anchors, y, z, scale, numbers, backend) -> tuple[Tensor, Tensor]:
        maximum = anchors.new_full((len(anchors),), -torch.inf)
        total = maximum.double()  # of thousands of blocks, therefore in fp64
        for _, problem in _blocks(anchors, y, z, scale, numbers):
            row = logsumexp_of(problem, Upstream(), True, backend).row
            maximum = torch.maximum(maximum, row.max)
            total = torch.logaddexp(total, row.max.double() + row.logsum)
        logsum = (total - finite_shift(maximum)).to(anchors.dtype)
        ctx.save_for_backward(anchors, y, z, scale, numbers, maximum, logsum)
        ctx.backend = backend
        ctx.mark_non_differentiable(maximum)
        return maximum, logsum

    @staticmethod
    def backward(ctx, _, grad: Tensor) -> tuple:
        first_order_only()
        anchors, y, z, scale, numbers, maximum, logsum = ctx.saved_tensors
        (grad,) = readable_gradients([grad])
        sums = [torch.zeros_like(x) for x in (anchors, y, z, scale)]
        stats, upstream = Stats(SideStats(maximum, logsum)), Upstream(SideUpstream(grad))
        of_anchors, of_y, of_z, of_scale, *_ = ctx.needs_input_grad
        needs = Needs(a=of_anchors, b=of_y or of_z, scale=of_scale)
        for block, problem in _blocks(anchors, y, z, scale, numbers):
            found = logsumexp_gradients(problem, stats, upstream, needs, ctx.backend)
            if needs.a:
                sums[0] += found.a
            if needs.b:
                products = found.b.view(-1, *z.shape)
                sums[1][block] = (products * z).sum(1)
                sums[2] += (products * y[block, None]).sum(0)
            if needs.scale:
                sums[3] += found.scale
        return *sums, None, None


def _blocks(
    anchors: Tensor, y: Tensor, z: Tensor, scale: Tensor, numbers: Tensor
) -> Iterator[tuple[slice, Problem]]:
    """Blocks of rows of y, with the problem of the anchors and these rows' products with all z."""
    n, step = len(z), max(1, BLOCK_NUMBERS // z.numel())
    rows = torch.arange(n, device=z.device)
    for start in range(0, n, step):
        block = slice(start, start + step)
        # the own pair of an anchor is its only positive; n is no anchor's number
        ids = torch.where(rows[block, None] == rows, rows, n).flatten()
        products = (y[block, None] * z).flatten(0, 1)
        yield (
            block,
            Problem(
                *(anchors, products, scale),
                row_ids=numbers,
                col_ids=ids,
                exclude_positives=True,
                cols=False,
                exact_max=False,
            ),
        )
