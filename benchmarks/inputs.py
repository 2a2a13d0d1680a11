"""The inputs of a benchmarked loss."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """One batch.

    a, b: (N, D), L2-normalised. log_scale, bias: 0-d. ids: (N,), the item of each row.
    """

    a: Tensor
    b: Tensor
    log_scale: Tensor
    bias: Tensor
    ids: Tensor

    def leaves(self, loss: str) -> tuple[Tensor, ...]:
        """The tensors whose gradients are computed."""
        return self[:4] if loss == "siglip" else self[:3]
