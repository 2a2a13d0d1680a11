"""Memory budgets from environment variables."""

from __future__ import annotations

import os


def byte_budget(variable: str, default: int) -> int:
    """The number of bytes in an environment variable, `default` where it is not set.

    Raises ValueError for what is no whole number, and for a negative one.
    """
    text = os.environ.get(variable, default)
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"{variable} must be a whole number of bytes, got {text!r}")
    return budget
