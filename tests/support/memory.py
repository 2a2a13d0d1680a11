"""The memory that a piece of code takes at its peak, measured in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


def printed(script: str, *arguments: object, **environment: str) -> list[str]:
    """The words that a script prints, which may use `growth`."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    out = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


def growth(call) -> float:
    """MiB by which the process grows while `call` runs. What is loaded once should be by now."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024
