"""`NTXentLoss` of lightly, with its memory bank, `DCLLoss` and `DCLWLoss`.

-   from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss
+   from ito_kernels.integrations.lightly import DCLLoss, DCLWLoss, NTXentLoss

With `gather_distributed` and several ranks in the default group, the batch is that of all ranks,
and every rank gets the loss of that batch. In lightly a rank gets the loss of its own rows; the
gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from ..distributed import global_batch, global_row_numbers
from ..losses.common import check_temperature, scale_from_temperature
from ..losses.decoupled import decoupled_contrastive_loss
from ..losses.precision import row_dot, to_accumulate_dtype, to_autocast_dtype, without_autocast
from ..losses.supcon import nt_xent_loss
from ..options_repr import PrintsOptions
from ..similarity import similarity_logsumexp
from ..similarity.spec import check_pair, check_scale
from .gathering import gathering_group


class NTXentLoss(PrintsOptions, nn.Module):
    """NT-Xent of two views; with a memory bank, the loss of MoCo.

        without a bank:  `nt_xent_loss` of the L2-normalised views
        with a bank:     mean_i [ log(exp S_i + Σ_j exp(<out0_i, bank_j> / temperature)) - S_i ],
                         S_i = <out0_i, out1_i> / temperature

    Args:
        temperature: a number, at least 1e-8, or a tensor that holds one.
        memory_bank_size: 0 for no bank, or (rows, D). The bank holds embeddings of earlier batches
            and starts with random ones. Each call in which out0 requires a gradient replaces the
            oldest embeddings by out1. 0 rows are no bank.
        gather_distributed: take the batch of all ranks (see above). With a bank, the bank is filled
            from all ranks, and a rank gets the loss of its own rows.

    Raises ValueError or TypeError for an invalid temperature or size.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        if temperature < 1e-8:
            raise ValueError(f"temperature must be at least 1e-8, got {temperature}")
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or size[0] < 0 or size[1] < 1):
            raise ValueError(f"memory_bank_size must be 0 or (rows, D), got {memory_bank_size}")
        self.temperature, self.memory_bank_size = temperature, memory_bank_size
        self.gather_distributed = gather_distributed
        bank = None if size[0] == 0 else normalize(torch.randn(size), dim=1)
        self.register_buffer("bank", bank, persistent=False)
        self._next = 0  # the row that the next batch is written to

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_views(out0, out1)
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        group = gathering_group(self.gather_distributed)
        if self.bank is None:
            return nt_xent_loss(out0, out1, self.temperature, group=group)
        scale = scale_from_temperature(self.temperature, out0)
        a, b = (
            to_accumulate_dtype(to_autocast_dtype(out0)),
            to_accumulate_dtype(to_autocast_dtype(out1)),
        )
        bank = to_autocast_dtype(self.bank.to(device=a.device, dtype=out0.dtype, copy=True)).to(
            a.dtype
        )
        if out0.requires_grad:
            self._remember(global_batch(group, out1, out1).all_gather_rows(out1.detach()))
        with without_autocast(a.device):
            stats = similarity_logsumexp(a, bank, scale, cols=False, exact_max=False)
            negatives = stats.row_logsum + stats.row_max
            return softplus(negatives - scale * row_dot(a, b), threshold=40).mean()

    def _remember(self, batch: Tensor) -> None:
        """Write a batch to the bank. As in lightly, rows that do not fit before the end are dropped
        and the next batch is written to the start."""
        room = min(len(batch), len(self.bank) - self._next)
        self.bank[self._next : self._next + room] = batch[:room].to(self.bank)
        self._next += room
        if self._next == len(self.bank):
            self._next = 0


def _check_views(out0: Tensor, out1: Tensor) -> None:
    check_pair("out0", out0, "out1", out1)
    if len(out0) != len(out1):
        raise ValueError(
            f"out0 and out1 must have the same number of rows, got {len(out0)} and {len(out1)}"
        )


class DCLLoss(PrintsOptions, nn.Module):
    """Decoupled contrastive loss of two views: NT-Xent without the positive in the denominator.

        mean over both views v and the items i of
            log Σ_{j ≠ i} (exp <v_i, v_j>/τ + exp <v_i, w_j>/τ) - weight_i · <v_i, w_i>/τ

    with τ the temperature and the L2-normalised v and w, the other view. S is never formed.

    Args:
        temperature: a positive number, or a tensor that holds one.
        weight_fn: a function of the normalised (v, w) of this rank that returns the weights, (N,).
            It is called for both orders of the views. By default the weights are 1.
        gather_distributed: take the batch of all ranks (see above). Weights are still a function of
            a rank's own rows, as in lightly.

    Raises ValueError or TypeError for an invalid temperature, weight function or number of weights,
    and ValueError for a batch of one item, which has no negatives; lightly returns -inf.
    Source: Yeh et al. 2022 (Decoupled contrastive learning), eq. 6.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        if weight_fn is not None and not callable(weight_fn):
            raise TypeError(f"weight_fn must be a function or None, got {weight_fn!r}")
        self.temperature, self.weight_fn = temperature, weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_views(out0, out1)
        n, group = len(out0), gathering_group(self.gather_distributed)
        if n == 1 and group is None:
            raise ValueError("out0 must have at least 2 rows, because the others are negatives")
        scale = scale_from_temperature(self.temperature, out0)
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        if self.weight_fn is not None:
            weights = (self._weights(out0, out1) + self._weights(out1, out0)) / 2
        views, ids = torch.cat([out0, out1]), global_row_numbers(n, group, out0.device).repeat(2)
        by_item = {"query_ids": ids, "key_ids": ids, "exclude_self": True, "symmetric": False}
        loss = decoupled_contrastive_loss(views, views, scale, **by_item, group=group)
        if self.weight_fn is None:
            return loss
        with without_autocast(out0.device):
            positives = scale * row_dot(to_autocast_dtype(out0), to_autocast_dtype(out1))
            everything = torch.ones_like(ids[:n], dtype=torch.bool)
            batch = global_batch(group, out0, out1)
            return loss + batch.all_reduce_mean((1 - weights) * positives, everything)

    def _weights(self, v: Tensor, w: Tensor) -> Tensor:
        weights = self.weight_fn(v, w)
        if not isinstance(weights, Tensor):
            raise TypeError(f"weight_fn must return a tensor, got {type(weights).__name__}")
        if weights.shape != (len(v),):
            raise ValueError(
                f"weight_fn must return one weight for each of {len(v)} rows, got shape"
                f" {tuple(weights.shape)}"
            )
        return weights


class DCLWLoss(DCLLoss):
    """`DCLLoss` with weights that are larger for positives that are far apart.

        weight_i = 2 - N · softmax_i(<v_i, w_i> / sigma)

    The softmax is over the N rows of this rank. The weights have no gradient.

    Args:
        temperature, gather_distributed: as in `DCLLoss`.
        sigma: a positive number.

    Raises as `DCLLoss`; ValueError or TypeError for an invalid sigma.
    Source: Yeh et al. 2022 (Decoupled contrastive learning), eq. 6 with its negative von
    Mises-Fisher weights.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ):
        check_scale("sigma", sigma, torch.empty(1))
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)
        self.sigma = sigma


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """The weights of `DCLWLoss`, (N,), for (N, D) views."""
    similarity = row_dot(out0.detach(), out1.detach()) / sigma
    return 2 - len(out0) * similarity.softmax(0)
