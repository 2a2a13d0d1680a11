"""No N × M matrix: measured from outside, in a fresh process, forward and backward."""

import subprocess
import sys

import pytest
from support.problems import AVAILABLE

SCRIPT = """
import sys
import torch
import ito_kernels as ik
from torch.nn.functional import normalize

backend, loss, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
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
@pytest.mark.parametrize("n", [8192, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", ["clip", "ids", "siglip", "supcon"])
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b not in ("reference", "simt")])
def test_peak_memory(backend, loss, n):
    """Growth is a fraction of one dense fp32 matrix: 256 MiB at 8,192², 1,024 at 16,384²."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, loss, str(n)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    bound = n * n * 4 / 2**20 * 0.4
    assert int(out.stdout) < bound, f"grew by {out.stdout.strip()} MiB"
