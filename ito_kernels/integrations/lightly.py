"""`NTXentLoss` of lightly, with its memory bank.

-   from lightly.loss import NTXentLoss
+   from ito_kernels.integrations.lightly import NTXentLoss
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from ..distributed import global_batch
from ..losses.common import check_temperature, scale_from_temperature
from ..losses.precision import row_dot, to_accumulate_dtype, to_autocast_dtype, without_autocast
from ..losses.supcon import nt_xent_loss
from ..similarity import similarity_logsumexp
from ..similarity.spec import check_pair
from .gathering import gathering_group


class NTXentLoss(nn.Module):
    """NT-Xent of two views; with a memory bank, the loss of MoCo.

        without a bank:  `nt_xent_loss` of the L2-normalised views
        with a bank:     mean_i [ log(exp S_i + Σ_j exp(<out0_i, bank_j> / temperature)) - S_i ],
                         S_i = <out0_i, out1_i> / temperature

    Args:
        temperature: a number, at least 1e-8, or a tensor that holds one.
        memory_bank_size: 0 for no bank, or (rows, D). The bank holds embeddings of earlier batches
            and starts with random ones. Each call in which out0 requires a gradient replaces the
            oldest embeddings by out1. 0 rows are no bank.
        gather_distributed: with several ranks in the default group: without a bank, the batch is
            that of all ranks and every rank gets its loss. In lightly a rank gets the loss of its
            own rows, with the same gradients. With a bank, the bank is filled from all ranks.

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
        self.temperature, self.gather_distributed = temperature, gather_distributed
        bank = None if size[0] == 0 else normalize(torch.randn(size), dim=1)
        self.register_buffer("bank", bank, persistent=False)
        self._next = 0  # the row that the next batch is written to

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        check_pair("out0", out0, "out1", out1)
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
            stats = similarity_logsumexp(a, bank, scale, cols=False)
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
