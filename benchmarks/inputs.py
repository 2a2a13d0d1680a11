"""What a benchmarked loss is computed from."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """One batch. a, b: (N, D), L2-normalised; ids: (N,), which item a row belongs to."""

    a: Tensor
    b: Tensor
    log_scale: Tensor
    bias: Tensor
    ids: Tensor

    def leaves(self, loss: str) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self[:4] if loss == "siglip" else self[:3]
