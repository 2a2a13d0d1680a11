"""The C++ tests of the CPU engine: as it ships, under sanitizers, and for ARM under emulation."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


def build(where: Path, *options: str) -> list[Path]:
    """The test executables, one for each instruction set that the compiler's target has."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), "-DITO_TESTS=ON"]
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O2", *options],
        ["cmake", "--build", str(where), "--parallel", "2"],
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
@pytest.mark.parametrize("flags", ["", SANITIZE], ids=["plain", "sanitized"])
def test_engine(tmp_path, flags):
    outputs = [run([str(test)]) for test in build(tmp_path, f"-DCMAKE_CXX_FLAGS={flags}")]
    assert sum("all right" in out for out in outputs) >= 1


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_emulation(tmp_path):
    tests = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert [test.name for test in tests] == ["test_kernels_neon", "test_kernels_scalar"]
    for test in tests:
        assert "all right" in run(["qemu-aarch64", str(test), "--quick"])
