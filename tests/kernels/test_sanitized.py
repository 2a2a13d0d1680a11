"""The tests of the kernels on a module built with sanitizers, which also find what is planted.

.ci/sanitized builds the module and runs Python with it. `make ci` runs it with --part.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs GCC's sanitizers"),
]


def run(*arguments: str, root: Path = ROOT) -> tuple[int, str]:
    command = ["bash", str(root / ".ci" / "sanitized"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_nothing_is_found(kind):
    code, output = run(kind)
    assert code == 0, output[-5000:]
    assert " passed" in output


# kind, file, old, new, what is said
PLANTED = {
    "a race": (
        "thread",
        "csrc/cpu/backward.cpp",
        "std::memory_order_release",
        "std::memory_order_relaxed",
        "ThreadSanitizer: data race",
    ),
    "a read beyond the end": (
        "address",
        "csrc/cpu/call.cpp",
        "out(n + kSlack, -kInf)",
        "out(n, -kInf)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a sum beyond 32 bits": (
        "address",
        "csrc/cpu/keys.cpp",
        "key = 0; r != r_end; ++key",
        "key = INT32_MAX; r != r_end; ++key",
        "runtime error: signed integer overflow",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults(fault, tmp_path):
    kind, file, old, new, said = PLANTED[fault]
    for name in (".ci", "csrc", "ito_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    code, output = run("--quick", kind, root=tmp_path)
    assert code != 0
    assert said in output, output[-5000:]
