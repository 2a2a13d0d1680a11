"""The C++ tests of the CPU engine: as it ships, under sanitizers, and for ARM under emulation."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"
FLAGS = pytest.mark.parametrize("flags", ["", SANITIZE], ids=["plain", "sanitized"])
ARM = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
)

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)
for_arm = pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)


def build(where: Path, *options: str, target: str = "all") -> list[Path]:
    """The test executables, one for each instruction set that the compiler's target has."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), "-DITO_TESTS=ON"]
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O2", *options],
        ["cmake", "--build", str(where), "--parallel", "2", "--target", target],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return sorted(where.glob("test_kernels_*"))


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:  # a signal: this processor lacks the instruction set under test
        assert -done.returncode == 4, done.stderr
        return ""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@FLAGS
def test_engine(tmp_path, flags):
    outputs = [run([str(test)]) for test in build(tmp_path, f"-DCMAKE_CXX_FLAGS={flags}")]
    assert sum("all right" in out for out in outputs) >= 1


@pytest.mark.slow
@for_arm
@FLAGS
def test_neon_under_emulation(tmp_path, flags, monkeypatch):
    monkeypatch.setenv("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # it cannot trace an emulated process
    tests = build(tmp_path, *ARM, f"-DCMAKE_CXX_FLAGS={flags}")
    assert [test.name for test in tests] == ["test_kernels_neon", "test_kernels_scalar"]
    for test in tests:
        assert "all right" in run(["qemu-aarch64", str(test), "--quick"])


@pytest.mark.slow
@for_arm
def test_neon_keeps_its_sums_in_registers(tmp_path):
    """In the machine code of the three products, the loop over K steps does not use the stack."""
    (test,) = build(tmp_path, *ARM, target="test_kernels_neon")
    code = run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(test)])
    steps = re.findall(r"^ *([0-9a-f]+):\t(\S+)\t?(.*)$", code, re.MULTILINE)
    loops, start, places = [], 0, {address: i for i, (address, *_) in enumerate(steps)}
    for end, (_, name, operands) in enumerate(steps):
        if name.startswith(("b.", "cbnz")):
            target = places.get(operands.split(", ")[-1].split()[0], end)
            if start <= target < end:  # no other branch between: an innermost loop
                loops.append(steps[target:end])
            start = end + 1
    products = [loop for loop in loops if sum(name == "fmla" for _, name, _ in loop) == 24]
    assert len(products) >= 4  # one is that of `peak`
    assert not [step for loop in products for step in loop if "[sp" in step[2]]
