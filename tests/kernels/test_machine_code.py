"""The machine code of Triton kernels, compiled ahead of time: no GPU is needed."""

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

# A thread's instructions and exponentials once a tile, for 128 × 128 scores and 128 threads.
MOST = {
    "forward clip": (900, 130),
    "forward ids": (1170, 169),
    "panel clip": (1000, 130),
    "panel ids": (1300, 169),
}


@pytest.fixture(scope="module", params=MOST)
def built(request):
    """A plain loss on Hopper, where features come through tensor descriptors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as Triton 3.10 will have it
        return request.param, *ahead.built("sm_90", "half", request.param)


def test_instructions_of_a_tile(built):
    """One exponential per score, few instructions around it, and no spilled register."""
    name, kernel, tile = built
    row = ahead.read_nvidia(kernel)
    assert row["spills"] == row["stack"] == 0
    share = 128 * 32 * tile.warps / (tile.m * tile.n)
    instructions, exponentials = MOST[name]
    assert sum(row["per_tile"].values()) * share <= instructions
    assert 128 <= row["per_tile"]["special"] * share <= exponentials


def test_multiplications_and_additions_are_fused(built):
    """Each exponential takes its shift in one instruction."""
    _, kernel, _ = built
    instructions, _, _ = ahead.disassembled(kernel)
    ops = [code.family(op) for op, _ in instructions]
    assert ops.count("FFMA") > ops.count("special") / 2
