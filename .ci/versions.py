"""Tries old and new versions of what the package needs; prints the table of docs/install.md.

    python .ci/versions.py [REGEX]      only the rows that match

ROWS has the oldest of everything, the newest of everything, each minor version of Python, torch and
Triton at least once, NumPy 1 and 2, and a torch that is too old. Each row has an environment of its
own, 5 GB with PyTorch's builds for CUDA, which is deleted again. Pythons are looked for on the
PATH. 5 minutes a row on a quiet core. Exits with 1 if a row that the package allows fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIRED = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
# Python, torch, Triton, NumPy
ROWS = [
    ("3.10", "2.13.0", "3.6.0", "1.26.4"),  # the oldest of everything
    ("3.11", "2.11.0", "3.6.0", "2.2.6"),  # too old
    ("3.11", "2.12.1", "3.7.0", "2.4.6"),
    ("3.11", "2.13.0", "3.9.0", "2.4.6"),  # what the whole tests run on
    ("3.12", "2.14.1", "3.8.0", "1.26.4"),
    ("3.13", "2.15.0", "3.9.0", "2.5.5"),  # the newest of everything
]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
# where our code or a test is to blame: torch.compile itself uses what PyTorch deprecates
OLD = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
PYTEST += ["-o", "filterwarnings=" + "\n".join(f"error::{x}:(ito|support|test)" for x in OLD)]
KERNELS = ["tests/kernels/test_primitive.py", "tests/kernels/test_op.py"]
# name: arguments of Python
CHECKS = {
    "self-check": ["-W", "error", "-m", "ito_kernels"],
    "every call": ["-W", "error", "typed_calls.py"],
    "kernels": [*PYTEST, *KERNELS, "-k", "not simt and not cuda and not triton"],
    "losses": [*PYTEST, "tests/losses/test_formulas.py", "tests/losses/test_others.py"],
    "compile": [*PYTEST, "-m", "slow", "tests/losses/test_compile.py"],
    "Triton": [*PYTEST, "tests/kernels/test_triton.py", "-k", "options or strides or far_rows"],
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Its output, and that of the errors, as text."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(list(map(str, command)), **both, **options)


def wheel(python: str, work: Path) -> Path:
    """Of the last commit, for this Python."""
    folder = work / f"wheel-{python}"
    if not folder.exists():
        command = [f"python{python}", "-m", "pip", "wheel", "--no-deps", "-w", folder]
        made = run(*command, work / "clone")
        if made.returncode:
            sys.exit(made.stdout)
    (found,) = folder.glob("*.whl")
    return found


def try_row(python: str, torch: str, triton: str, numpy: str, work: Path) -> str:
    """What came of it, in words."""
    if not shutil.which(f"python{python}"):
        return f"not run: no Python {python}"
    environment = work / "environment"
    try:
        run(f"python{python}", "-m", "venv", environment, check=True)
        own = environment / "bin" / "python"
        install = [own, "-m", "pip", "install", "--no-cache-dir"]
        asked = [f"torch=={torch}", f"numpy=={numpy}", "pytest", "hypothesis"]
        # torch asks for one Triton; the others are what the kernels themselves need
        for more in (asked, ["--no-deps", f"triton=={triton}"], ["--no-deps", wheel(python, work)]):
            installed = run(*install, *more)
            if installed.returncode:
                return f"not run: {installed.stdout.splitlines()[-1]}"
        failed = []
        for name, arguments in CHECKS.items():
            interpreted = {"TRITON_INTERPRET": "1"} if name == "Triton" else {}
            done = run(own, *arguments, cwd=work, env=ENVIRONMENT | interpreted)
            print(f"-- {name}\n{done.stdout[-3000:]}", file=sys.stderr)
            failed += [name] if done.returncode else []
        return f"**failed**: {', '.join(failed)}" if failed else "passed"
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def main(pattern: str = "") -> None:
    good = True
    print("| Python | torch | Triton | NumPy | result |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run("git", "clone", ROOT, work / "clone", check=True)
        # outside the clone, so that the wheel is what runs
        shutil.copytree(work / "clone" / "tests", work / "tests")
        for name in ("pyproject.toml", ".ci/typed_calls.py"):
            shutil.copy(work / "clone" / name, work)
        for row in ROWS:
            if not re.search(pattern, " ".join(row)):
                continue
            result = try_row(*row, work)
            allowed = [*map(int, row[1].split("."))] >= [*map(int, REQUIRED.split("."))]
            print(f"| {' | '.join(row)} | {result} |", flush=True)
            good &= result == "passed" or not allowed
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
