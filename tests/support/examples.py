"""Hypothesis, with few examples in every run, always the same, and many in the slow tests."""

import pytest
from hypothesis import Phase, given, settings


def examples(few: int, many: int, **strategies):
    """Decorates a test whose arguments are drawn from `strategies`."""

    def decorate(check):
        @pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(number):
            fixed = settings(
                max_examples=number,
                derandomize=number == few,
                database=None,
                deadline=None,
                print_blob=False,
            )
            fixed(given(**strategies)(check))()

        test.__name__, test.__doc__, test.__module__ = (
            check.__name__,
            check.__doc__,
            check.__module__,
        )
        return test

    return decorate


def drawn(number: int, strategy, fixed: bool) -> list:
    """So many examples, for processes that must all have the same: what they find shrinks none."""
    found = []

    @settings(
        max_examples=number,
        derandomize=fixed,
        database=None,
        deadline=None,
        phases=[Phase.generate],
    )
    @given(strategy)
    def draw(example):
        found.append(example)

    draw()
    return found
