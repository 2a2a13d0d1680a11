"""Do the errors in docs/accuracy.md hold, and do they obey the rule for all backends?"""

import pytest
from support.accuracy_table import BACKENDS, DTYPES, LOSSES, SCALES, Errors, read, worst
from support.problems import AVAILABLE

ROWS = [(loss, dtype) for loss in LOSSES for dtype in DTYPES]


def test_the_table_obeys_the_rule():
    """At most twice the error of dense PyTorch and three times for gradients, plus ε."""
    table = read()
    assert table.keys() == {(*row, name) for row in ROWS for name in ("PyTorch", *BACKENDS)}
    for (loss, dtype, name), found in table.items():
        peer = table[loss, dtype, "PyTorch"]
        eps = Errors(1e-6 * (1 + max(SCALES)), 1e-5) if dtype == "fp32" else Errors(1e-2, 2e-2)
        assert found.value <= 2 * peer.value + eps.value, (loss, dtype, name)
        assert found.gradient <= 3 * peer.gradient + eps.gradient, (loss, dtype, name)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x in AVAILABLE])
@pytest.mark.parametrize(("loss", "dtype"), ROWS)
def test_the_table_holds(loss, dtype, backend):
    """Up to a factor of two, for other processors, and the last digits of fp32."""
    table, found = read()[loss, dtype, backend], worst(loss, dtype, backend, 1)
    assert found.value <= 2 * table.value + 1e-6
    assert found.gradient <= 2 * table.gradient + 1e-6
