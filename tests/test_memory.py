"""No N × M matrix: measured from outside, in a fresh process, forward and backward."""

import subprocess
import sys

import pytest
from problems import AVAILABLE

SCRIPT = """
import sys
import torch
import ito_kernels as ik
from torch.nn.functional import normalize

backend, loss = sys.argv[1:]
n = 8192
x, y = (normalize(torch.randn(n, 8)).requires_grad_() for _ in range(2))

def run(n):
    a, b, ids = x[:n], y[:n], torch.arange(n) // 4
    if loss == "clip":
        return ik.clip_loss(a, b, 10.0)
    if loss == "ids":
        return ik.multi_positive_infonce(a, b, 10.0, query_ids=ids, key_ids=ids, positives="in")
    if loss == "siglip":
        return ik.siglip_loss(a, b, 10.0, -10.0)
    if loss == "supcon":
        return ik.supcon_loss(a, ids)

def status(key):
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith(key)).split()[1])

with ik.use_backend(backend):
    run(64).backward()  # what is loaded once does not count
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # reset the peak
    before = status("VmRSS")
    run(n).backward()
print((status("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("loss", ["clip", "ids", "siglip", "supcon"])
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_peak_memory(backend, loss):
    """One dense 8,192² matrix in fp32 is 256 MiB; growth stays well below it."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, loss], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 100, f"grew by {out.stdout.strip()} MiB"
