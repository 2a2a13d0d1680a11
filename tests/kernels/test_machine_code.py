"""The machine code of Triton kernels, compiled ahead of time: no GPU is needed."""

import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "predict"))

import gpu_model
import gpu_static_code as code
import gpu_static_triton as ahead

# A thread's instructions and exponentials once a tile, for 128 × 128 scores and 128 threads.
MOST = {
    "forward clip": (900, 130),
    "forward ids": (1100, 130),
    "forward ids self": (1170, 130),
    "panel clip": (1000, 130),
    "panel ids": (1330, 130),
}


@pytest.fixture(scope="module")
def forward():
    instructions, labels, _ = ahead.disassembled(ahead.built("sm_90", "half", "forward clip")[0])
    return instructions, labels


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


def test_the_predictions_are_of_these_kernels(forward):
    """docs/gpu-static.md says how to write the counts again after a change of the kernels."""
    written = json.loads(gpu_model.STATIC.read_text())
    if f"triton {version('triton')}," not in written["versions"]["triton"]:
        pytest.skip("the counts are of another version of Triton")
    row = gpu_model.load()["sm_90", "forward clip"]
    now = ahead.count(*forward)
    assert (row["per_step"], row["per_tile"]) == (now["per_step"], now["per_tile"])


def test_what_runs_once_a_tile_in_a_loop_over_steps():
    """The choice of the next tile and what follows the products, each behind a branch. On Hopper
    and later, waits stand behind the last EXIT and branch back: they are no loops of the kernel."""
    instructions = [
        ("MOV", []),
        ("BRA", [".chosen"]),  # 1
        *[("IMAD", [])] * 60,
        ("BRA.U", [".wait"]),  # 62
        ("HGMMA", []),
        ("BRA", [".another"]),
        ("BRA", [".end"]),  # 65
        *[("FFMA", [])] * 120,
        ("BRA", [".start"]),  # 186
        ("EXIT", []),
        ("NOP", []),  # 188
        ("BRA", [".back"]),
        ("NOP", []),  # 190
        ("BRA", [".further"]),
    ]
    labels = {".start": 0, ".chosen": 62, ".back": 63, ".further": 65, ".end": 186}
    labels |= {".wait": 188, ".another": 190}
    found = ahead.count(instructions, labels)
    assert found["per_tile"] == {"IMAD": 60, "FFMA": 120}
    assert found["per_step"] == {"MOV": 1, "BRA": 5, "HGMMA": 1}
