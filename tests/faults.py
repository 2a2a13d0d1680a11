"""Faults planted into the code, one at a time: do the tests catch them?

    python tests/faults.py                    all of them, about an hour on one core
    python tests/faults.py --only 'csrc|ring' those whose name or file matches; --list names them
    python tests/faults.py --record           also writes the results into docs/faults.md

A fault is one edit, of a text that its file holds exactly once, and the tests that are to fail with
it, few for each. All is done in a copy of the tree; the native module is built again for a fault in
csrc/. A fault that survives is a property that no test holds.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
LIMIT = 200  # seconds; a test that waits for ever is one that fails
INTERPRETED = "TRITON "  # before tests that Triton's interpreter is to run


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def planned() -> list[Fault]:
    with (ROOT / "tests" / "faults.toml").open("rb") as file:
        found = tomllib.load(file)
    return [
        Fault(name, where, *rest) for where, here in found.items() for name, rest in here.items()
    ]


class Copy:
    """The tree in a folder of its own, where faults are planted and tests run."""

    def __init__(self, folder: Path):
        self.tree, self.build = folder / "tree", folder / "build"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
        modules = [str(path.relative_to(ROOT)) for path in ROOT.glob("ito_kernels/_native*.so")]
        for name in filter(None, [*names, *modules]):
            if (ROOT / name).exists():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self.planted: Fault | None = None
        script = "import ito, ito_kernels._native as n; print(ito.__file__, n.__file__, sep='\\n')"
        code, found = self.forked(lambda: exec(script) or 0)
        if code or any(not line.startswith(str(self.tree)) for line in found.split()):
            sys.exit(f"the copy's package does not win over an installed one: {found}")

    def forked(self, call: Callable[[], int], **environment: str) -> tuple[int | None, str]:
        """The status (None: it did not end) and the output of `call` in a process of its own, where
        the copy comes first on the path and what takes seconds to import is there already."""
        output = self.tree.parent / "output"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setsid()
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                os.chdir(self.tree)
                sys.path[0] = str(self.tree)
                path = filter(None, [sys.path[0], os.environ.get("PYTHONPATH")])
                os.environ |= {"PYTHONPATH": os.pathsep.join(path)} | environment
                code = call()
            except BaseException:
                traceback.print_exc()
            finally:  # whatever happens: the parent's work is not the child's
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        end = time.monotonic() + LIMIT
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.1)
        with suppress(ProcessLookupError):  # it, and what it has left behind
            os.killpg(child, signal.SIGKILL)
        if not done[0]:
            os.waitpid(child, 0)
        text = output.read_text(encoding="utf-8", errors="replace")
        return (os.waitstatus_to_exitcode(done[1]) if done[0] else None), text

    def plant(self, fault: Fault) -> None:
        """The fault in place of the one before; builds the module where either is in csrc/."""
        before, self.planted = self.planted, fault
        if before:
            self.write(before.file, (ROOT / before.file).read_text(encoding="utf-8"))
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        self.write(fault.file, text.replace(fault.old, fault.new))
        if any(x and x.file.startswith("csrc/") for x in (before, fault)):
            self.compile()

    def write(self, name: str, text: str) -> None:
        (self.tree / name).write_text(text, encoding="utf-8")

    def compile(self) -> None:
        import pybind11

        if not self.build.exists():
            configure = [
                *("cmake", "-S", str(self.tree), "-B", str(self.build), "-G", "Ninja"),
                *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DITO_CUDA=OFF"),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.tree / 'ito_kernels'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        command = ["cmake", "--build", str(self.build), "-j", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.planted}: the module does not compile:\n{done.stdout[-3000:]}")

    def test(self, tests: str) -> tuple[str, str]:
        """What became of them, and what pytest printed."""
        environment = {"TRITON_INTERPRET": "1"} if tests.startswith(INTERPRETED) else {}
        arguments = shlex.split(tests.removeprefix(INTERPRETED))
        arguments = [f"tests/{x}" if ".py" in x else x for x in arguments]
        command = ["-x", "-q", "-p", "no:cacheprovider", *arguments]
        code, output = self.forked(lambda: int(pytest.main(command)), **environment)
        if code is None:
            return "caught", "it does not end"
        if code not in (0, 1):  # no such test, an error in the test itself, a crash
            return "**not tested**", f"{output[-3000:]}\npytest ended with {code}"
        return ("caught" if code else "**survived**"), output


def check(faults: list[Fault]) -> None:
    """Every old text is found exactly once."""
    wrong = []
    for fault in faults:
        path = ROOT / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.exists() else 0
        if count != 1:
            wrong.append(f"{fault.file}: {fault.name}: {fault.old!r} is there {count} times")
    if wrong:
        sys.exit("\n".join(wrong))


def record(found: dict[str, str]) -> None:
    """The page's table; what was not run keeps its result."""
    introduction, _, table = PAGE.read_text(encoding="utf-8").partition(
        "| fault | file | result |\n"
    )
    lines = [line.strip("|").split(" | ") for line in table.splitlines()]
    known = {cells[0].strip(): cells[2].strip() for cells in lines if len(cells) == 3}
    rows = []
    for fault in planned():
        name = fault.name.replace("|", "\\|")
        outcome = found.get(fault.name, known.get(name, ""))
        rows.append(f"| {name} | `{fault.file}` | {outcome} |")
    head = "| fault | file | result |\n|---|---|---|\n"
    PAGE.write_text(introduction + head + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="of names and files")
    parser.add_argument("--list", action="store_true", help="name them and end")
    parser.add_argument("--record", action="store_true", help="write docs/faults.md")
    options = parser.parse_args()
    chosen = [x for x in planned() if re.search(options.only, f"{x.file}: {x.name}")]
    if options.list:
        print("\n".join(f"{x.file}: {x.name}" for x in chosen))
        return
    check(chosen)
    found, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for number, fault in enumerate(chosen, 1):
            start = time.monotonic()
            copy.plant(fault)
            outcome, output = copy.test(fault.tests)
            found[fault.name] = f"{outcome}, {time.monotonic() - start:.0f} s"
            if options.record:
                record(found)
            by = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            what = by[1] if by else output.strip().splitlines()[-1]
            told = f"{found[fault.name]} | {fault.file}: {fault.name} | {what}"
            print(f"{number:3} {told}", flush=True)
    if options.record:  # a process of its own: this one is to import nothing of the package
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        script = [sys.executable, str(ROOT / "tests" / "support" / "figures.py")]
        subprocess.run(script, env=os.environ | {"PYTHONPATH": path}, check=True)
    lost = sum("**" in outcome for outcome in found.values())
    print(f"{len(found)} faults, {lost} not caught, {time.monotonic() - began:.0f} s")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
