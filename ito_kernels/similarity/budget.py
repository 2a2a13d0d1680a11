"""Memory budgets that are set by environment variables."""

from __future__ import annotations

import os


def byte_budget(variable: str, default: int) -> int:
    """The value of an environment variable in bytes, `default` if it is not set.

    Raises ValueError unless it is a whole number of 0 or more.
    """
    text = os.environ.get(variable, default)
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"{variable} must be a whole number of bytes, got {text!r}")
    return budget
