"""Argument checks and small helpers that several losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.spec import check_scale

REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_generator(name: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {type(generator).__name__}")


def check_0d(name: str, value: Tensor) -> None:
    if value.ndim:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")


def scale_from_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature. Raises ValueError for a number that is not finite and positive."""
    return 1.0 / check_scale("temperature", temperature, like)


def check_temperature(temperature: float | Tensor) -> None:
    """Check the temperature of a module: a finite positive number, or a tensor of one element."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature must be one number, got shape {tuple(temperature.shape)}"
            )
        temperature = temperature.item()
    check_scale("temperature", temperature, torch.empty(1))


def normalize_rows(features: Tensor, ids: Tensor | None) -> Tensor:
    """L2-normalise the rows. Padded rows become 0 and get no gradient, whatever they contain."""
    if ids is not None:
        features = features.masked_fill((ids < 0)[:, None], 0)
    return torch.nn.functional.normalize(features, dim=1)
