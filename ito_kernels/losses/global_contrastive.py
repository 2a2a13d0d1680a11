"""The global contrastive loss (SogCLR, iSogCLR, FastCLIP): for small batches, with a moving average
of each row's denominator over all batches in which the row occurred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..distributed import global_batch, same_on_every_rank
from ..options_repr import PrintsOptions
from ..similarity.spec import check_features, check_ids, check_scale, check_tensor
from .batch import Arguments, Names, check_arguments
from .options import check_number, check_row_numbers, check_value_range
from .precision import row_dot, without_autocast
from .scores import Direction, Scores

NAMES = Names("image_features", "text_features", "temperature")


@same_on_every_rank
def global_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor | tuple[Tensor, Tensor],
    u_image: Tensor,
    u_text: Tensor,
    *,
    gamma: float,
    eps: float = 1e-14,
    rho: float | None = None,
    group=None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Global contrastive loss: negatives of earlier batches count through a moving average.

    With images x, texts y and the temperature τ, each row has a sum over its negatives,

        g1_i = 1/(N-1) · Σ_{j ≠ i} exp((<x_i, y_j> - <x_i, y_i>) / τ)
        g2_i = 1/(N-1) · Σ_{j ≠ i} exp((<x_j, y_i> - <x_i, y_i>) / τ)

    whose moving average estimates the sum over the data set:

        u1_i ← (1 - gamma)·u1_i + gamma·g1_i, or g1_i where u1_i is 0; likewise u2 of g2.

    The value is that of the loss over the data set,

        L = τ · mean_i [ log(eps + u1_i) + log(eps + u2_i) ] + 2·rho·τ

    but the gradients are not the derivatives of L. Those of the features are the derivatives of

        R = τ · mean_i [ g1_i / (eps + u1_i) + g2_i / (eps + u2_i) ]

    at the new u, held constant. That of τ is mean_i [ log(eps + u1_i) + log(eps + u2_i) ] + 2·rho
    plus the derivative of R with respect to the τ inside g1 and g2. No N × N matrix is formed.

    Args:
        image_features, text_features: (N, D) with N ≥ 2, L2-normalised; row i of both is a positive
            pair. bf16 and fp16 are computed in fp32, because positives and negatives are combined
            outside the kernels.
        temperature: τ: a number, a 0-d tensor, or a pair of (N,) tensors, the temperatures of the
            images (in g1) and of the texts (in g2). With a pair τ is inside the means, and the last
            term is rho · mean_i (τ1_i + τ2_i).
        u_image, u_text: u1 and u2 of these rows, (N,), fp32 or fp64, 0 or more; 0 before a row's
            first batch.
        gamma: the weight of the new value, from 0 to 1; with 1 there is no history.
        eps: a number of at least 0 that bounds the weights of the gradient.
        rho: 0 or more, the weight of the term that keeps a learned temperature from becoming small.
            None adds no term.
        group, chunk_size, backend: as in `multi_positive_infonce`. With a group, N is the number of
            rows of all ranks; each rank passes and gets u of its own rows.

    Returns the loss, a 0-d fp32 tensor (fp64 for fp64 features), and the new u_image and u_text in
    their dtypes, without gradient. The loss and its gradients are computed from log u: they are
    finite where g exceeds the largest number of fp32 (at a temperature of 0.01, g reaches e^200).
    The returned u is then that largest number, and 0 where it is too small for its dtype. Raises as
    `multi_positive_infonce`.
    Source: Yuan et al. 2022 (SogCLR), Algorithm 1; Qiu et al. 2023 (iSogCLR), Algorithm 1, for a
    pair of temperatures; Wei et al. 2024 (FastCLIP), Algorithm 1, eq. 1 and 2, and the objective
    RGCL-g, for one learned temperature and eps. g leaves out the positive, as in FastCLIP; the
    released iSogCLR counts it. The released FastCLIP starts with gamma = 1 in the first epoch; here
    a u of 0 does the same for each row.
    """
    gamma = check_number("gamma", gamma, 0, 1)
    eps = check_number("eps", eps, 0, math.inf)
    rho = 0.0 if rho is None else check_number("rho", rho, 0, math.inf)
    one_each = isinstance(temperature, Sequence) and not isinstance(temperature, str)
    args = check_arguments(
        image_features,
        text_features,
        1.0 if one_each else temperature,
        group,
        chunk_size,
        backend,
        names=NAMES,
    )
    if one_each:
        temperatures = _check_pair_of_temperatures(temperature, args)
    else:
        temperatures = (args.scale, args.scale)
        if args.scale.ndim:
            raise ValueError(
                "temperature must be a number, a 0-d tensor or a pair of (N,) tensors, got shape"
                f" {tuple(args.scale.shape)}"
            )
    averages = (_check_average("u_image", u_image, args), _check_average("u_text", u_text, args))
    scores = args._replace(scale=1 / temperatures[0]).scores(not one_each, exclude_self=True)
    batch, n = scores.global_batch, scores.global_count("row")
    if n < 2:
        raise ValueError(
            f"image_features must have at least 2 rows, got {n}: a row's negatives are the others"
        )
    with without_autocast(scores.queries.device):
        sides = [*scores.statistics().values()]
        if one_each:
            sides.append(_text_statistics(scores, 1 / temperatures[1]))
        positive = row_dot(scores.queries, scores.keys).double()
        total, averages_out = 0, []
        for side, tau, u in zip(sides, temperatures, averages, strict=True):
            log_g = side.logsum.double() + (side.max.double() - (1 / tau).double() * positive)
            # g is greater than 0 unless a feature is infinite
            log_g = torch.where(log_g == -torch.inf, torch.nan, log_g - math.log(n - 1))
            log_u = _log_moving_average(u.double(), log_g.detach(), gamma)
            log_denominator = torch.logaddexp(log_u, torch.full_like(log_u, _log(eps)))
            # only its gradients count: those of the features, and a part of that of τ
            surrogate = (tau.detach() * (log_g - log_denominator).exp()).sum()
            value = (tau.double() * (log_denominator + rho)).sum()
            total = total + value + (surrogate - surrogate.detach())
            new_u = log_u.exp().clamp(max=torch.finfo(u.dtype).max)
            new_u = torch.where(log_u < torch.inf, new_u, log_u)  # inf and NaN of the features
            averages_out.append(new_u.to(u.dtype))
        loss = (batch.all_reduce_loss(total) / n).to(scores.queries.dtype)
    return loss, *averages_out


def _check_pair_of_temperatures(pair: Sequence, args: Arguments) -> tuple[Tensor, Tensor]:
    if len(pair) != 2:
        raise ValueError(
            f"temperature must be a number, a 0-d tensor or a pair of (N,) tensors, got {len(pair)}"
            " of them"
        )
    n, checked = len(args.queries), []
    for i, tau in enumerate(pair):
        tau = check_scale(f"temperature[{i}]", tau, args.queries)
        if tau.ndim == 0 and n > 1:
            raise ValueError(f"temperature[{i}] must have shape ({n},), got a single number")
        checked.append(tau.reshape(n))
    return tuple(checked)


def _check_average(name: str, u: Tensor, args: Arguments) -> Tensor:
    u, n = check_tensor(name, u), len(args.queries)
    if u.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {u.dtype}")
    if tuple(u.shape) != (n,):
        raise ValueError(
            f"{name} must have shape ({n},), one value for each row of image_features, got"
            f" {tuple(u.shape)}"
        )
    if u.device != args.queries.device:
        raise ValueError(
            f"{name} must be on {args.queries.device} like image_features, got {u.device}"
        )
    if u.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is a moving average")
    return check_value_range(name, u)


def _text_statistics(scores: Scores, scale: Tensor) -> Direction:
    """The statistics of the texts with scales of their own."""
    transposed = Scores(
        scores.global_batch.swapped(),
        *(scores.keys, scores.queries, scale),
        symmetric=False,
        exclude_self=True,
        backend=scores.backend,
        half_values=scores.half_values,
    )
    return transposed.statistics()["row"]


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _log_moving_average(u: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma)·u + gamma·g), and log g where u is 0."""
    updated = torch.logaddexp(u.log() + _log(1 - gamma), log_g + _log(gamma))
    return torch.where(u == 0, log_g, updated)


class GlobalContrastiveLoss(PrintsOptions, nn.Module):
    """`global_contrastive_loss` with the moving averages u of a data set.

    In training mode a call updates u of the rows in `indices`; in evaluation mode it does not. If a
    sample occurs twice in a batch, both rows use its u, and the last row's new u is kept. A new u
    that is not finite is not kept: the step can be skipped, as `GradScaler` does.

    With a group, every rank keeps u of the whole data set and gets the values of all ranks: u is
    equal on all ranks, the sampler may give any sample to any rank, and one rank's `state_dict` is
    complete.

    Args:
        num_samples: the number of samples of the data set.
        gamma, eps, rho, group, chunk_size: as in `global_contrastive_loss`. The default of gamma is
            that of SogCLR's experiments. FastCLIP lowers gamma from 1 during training: it may be
            assigned between calls.

    `u_image` and `u_text` are fp32 buffers (num_samples,), 0 for samples that have not occurred.
    """

    def __init__(
        self,
        num_samples: int,
        gamma: float = 0.9,
        eps: float = 1e-14,
        rho: float | None = None,
        group=None,
        chunk_size: int | None = None,
    ):
        super().__init__()
        if not isinstance(num_samples, Integral) or isinstance(num_samples, bool):
            raise TypeError(f"num_samples must be a whole number, got {num_samples!r}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.gamma = check_number("gamma", gamma, 0, 1)
        self.eps = check_number("eps", eps, 0, math.inf)
        self.rho = None if rho is None else check_number("rho", rho, 0, math.inf)
        self.num_samples, self.group, self.chunk_size = num_samples, group, chunk_size
        self.register_buffer("u_image", torch.zeros(num_samples))
        self.register_buffer("u_text", torch.zeros(num_samples))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        temperature: float | Tensor | tuple[Tensor, Tensor],
        indices: Tensor,
    ) -> Tensor:
        """The loss. The first three arguments are as in `global_contrastive_loss`; indices: (N,)
        integers, the rows' positions in the data set. Checking them synchronises with the device.

        Raises ValueError for an index that is not from 0 to num_samples - 1.
        """
        return _loss_of_data_set(
            image_features,
            text_features,
            temperature,
            indices,
            self.u_image,
            self.u_text,
            update=self.training,
            gamma=self.gamma,
            eps=self.eps,
            rho=self.rho,
            group=self.group,
            chunk_size=self.chunk_size,
        )


@same_on_every_rank
def _loss_of_data_set(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor | tuple[Tensor, Tensor],
    indices: Tensor,
    u_image: Tensor,
    u_text: Tensor,
    *,
    update: bool,
    group=None,
    chunk_size: int | None = None,
    **options,
) -> Tensor:
    """The loss of the samples `indices` of a data set, whose u_image and u_text it updates."""
    n = len(check_features("image_features", image_features))
    indices = check_tensor("indices", indices, "a tensor of integers")
    indices = check_ids("indices", indices, n, "image_features", indices.device)
    check_row_numbers("indices", indices, range(len(u_image)), "samples")
    indices = indices.to(u_image.device)
    loss, *averages = global_contrastive_loss(
        image_features,
        text_features,
        temperature,
        u_image[indices],
        u_text[indices],
        group=group,
        chunk_size=chunk_size,
        **options,
    )
    if update:
        with torch.no_grad():
            batch = global_batch(group, image_features, text_features, chunk_size=chunk_size)
            indices = batch.all_gather_rows(indices)
            averages = batch.all_gather_rows(torch.stack(averages, 1))
            # For each row the last row of its sample: all its rows write the same, in any order.
            order = indices.argsort(stable=True)
            last = order[torch.searchsorted(indices[order], indices, right=True) - 1]
            for u, new in zip((u_image, u_text), averages[last].unbind(1), strict=True):
                u[indices] = torch.where(new.isfinite(), new, u[indices])
    return loss
