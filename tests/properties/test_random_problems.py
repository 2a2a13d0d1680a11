"""Random problems of the primitive on every backend, against the dense fp64 formula."""

import pytest
from hypothesis import strategies as st
from support.examples import examples
from support.kernel_checks import check_logsumexp, check_softplus
from support.problems import AVAILABLE, BF16, FP16, FP32, Case

from ito_kernels.similarity import panelwise
from ito_kernels.similarity.cpu import instruction_sets

KINDS = [b for b in AVAILABLE if b != "cpu"] + [f"cpu {isa}" for isa in instruction_sets()]


@examples(
    20,
    2000,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    d=st.integers(1, 40),
    # at 200, rounding of the scores alone exceeds ε where dense PyTorch happens to be exact
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    scale_per_row=st.booleans(),
    biases=st.booleans(),
    ids=st.sampled_from([None, "groups", "padded", "none", "all padded"]),
    positives=st.sampled_from(["linear", "lse"]),
    exclude_self=st.booleans(),
    exclude_positives=st.booleans(),
    diagonal=st.integers(-100, 100),
    sides=st.sampled_from([(True, True), (True, False), (False, True)]),
    hardest=st.booleans(),
    limit=st.booleans(),
    same=st.booleans(),
)
def test_random_problems(kind, dtype, n, m, sides, same, limit, **options):
    backend, _, isa = kind.partition(" ")
    rows, cols = sides
    m = n if same else m
    limit = limit and m >= 6  # it lies in a gap of the middle third
    case = Case(n, m, rows=rows, cols=cols, same=same, limit=limit, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panelwise, "PANEL_SCORES", 1000)
        patch.setattr(panelwise, "MIN_ROWS", 5)
        if isa:
            patch.setenv("ITO_CPU_ISA", isa)
        check_logsumexp(backend, case, dtype, 1 + case.scale)
        check_softplus(backend, case, dtype, 1 + case.scale)
