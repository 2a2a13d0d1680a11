"""What the losses share: counting positives, reductions, options that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.spec import check_scale

REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def check_generator(name: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {type(generator).__name__}")


def not_yet(**options: object) -> None:
    """Raise for an option that is part of the interface but not of this version."""
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not implemented in this version of ito_kernels")


def scale_from_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature; a number must be finite and greater than 0."""
    return 1.0 / check_scale("temperature", temperature, like)


def normalized(features: Tensor, ids: Tensor | None) -> Tensor:
    """Unit rows; padding, which may hold anything, becomes 0 and takes no gradient."""
    if ids is not None:
        features = features.masked_fill((ids < 0)[:, None], 0)
    return torch.nn.functional.normalize(features, dim=1)


def mean_where(x: Tensor, where: Tensor) -> Tensor:
    """The mean of x over `where`, 0 if that is nowhere."""
    return torch.where(where, x, 0).sum() / where.sum().clamp(min=1)
