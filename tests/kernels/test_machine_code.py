"""The machine code of the Triton forward kernel, compiled ahead of time: no GPU is needed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "predict"))

import gpu_static_code as code
import gpu_static_triton as ahead


@pytest.fixture(scope="module")
def forward():
    """The plain CLIP loss on Hopper, where features come through tensor descriptors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as Triton 3.10 will have it
        kernel, _ = ahead.built("sm_90", "half", "forward clip")
    instructions, labels, _ = ahead.disassembled(kernel)
    return instructions, labels


def test_a_barrier_between_row_tiles(forward):
    """The next row tile reads column statistics that other threads have written."""
    assert code.barrier_between_row_tiles(*forward)


def test_multiplications_and_additions_are_fused(forward):
    """Each exponential takes its shift in one instruction."""
    ops = [code.family(op) for op, _ in forward[0]]
    assert ops.count("FFMA") > ops.count("special") / 2
