"""No loss and no option holds anything N × M: measured from outside, in a fresh process, both
forward and backward."""

import pytest
from support.losses_table import ROWS
from support.memory import linux, printed
from support.problems import AVAILABLE

SCRIPT = """
import sys
import torch
import ito_kernels as ik
from support.losses_table import ROWS, Inputs
from support.memory import growth
from torch.nn.functional import normalize

backend, n, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
x, y, z = (normalize(torch.randn(n, 8)).requires_grad_() for _ in range(3))
halves = {"query_ids": torch.arange(n) % 2, "key_ids": torch.arange(n) % 2}  # n * n / 2 positives
infonce = ik.multi_positive_infonce
OF_TWO_CLASSES = {
    "margin": lambda a, b, **ids: infonce(a, b, 10.0, false_negative_margin=0.1, **ids),
    "decoupled softmax": lambda a, b, **ids: ik.decoupled_softmax_loss(a, b, 10.0, **ids),
    "cacr": lambda a, b, **ids: ik.cacr_loss(a, b, **ids),
}

def run(name, n):
    loss, _, option = name.partition(" ")
    if loss == "classes":
        return OF_TWO_CLASSES[option](x[:n], y[:n], **{k: i[:n] for k, i in halves.items()})
    return ROWS[loss][option].call(loss, Inputs.of(x[:n], y[:n], z[:n].detach()))

with ik.use_backend(backend):
    for name in names:
        run(name, 64).backward()  # what is loaded once does not count
        print(growth(lambda: run(name, n).backward()))
"""
LOSSES = [f"{loss} {option}" for loss, rows in ROWS.items() for option in rows]
OF_ALL_TRIPLES = "symile_loss negatives"  # O(N³) operations
LOSSES.remove(OF_ALL_TRIPLES)
LOSSES += ["classes margin", "classes decoupled softmax", "classes cacr"]
OF_THE_PRIMITIVE = ["clip_loss ", "siglip_loss ", "supcon_loss temperature, empty"]
KERNELS = [b for b in AVAILABLE if b in ("chunked", "cpu")]


def grown(backend: str, n: int, names: list[str], **environment: str) -> dict[str, float]:
    """MiB that each loss takes at its peak, one after the other in one fresh process."""
    found = printed(SCRIPT, backend, n, *names, **environment)
    return dict(zip(names, map(float, found), strict=True))


@linux
@pytest.mark.parametrize("backend", KERNELS)
def test_peak_memory(backend):
    """A fraction of one dense fp32 matrix, 144 MiB; without the tiles that the kernels keep. What
    needs more than the primitive is the same on both backends."""
    names = LOSSES if backend == KERNELS[-1] else OF_THE_PRIMITIVE
    found = grown(backend, 6144, names, ITO_TILE_CACHE_BYTES="0")
    assert max(found.values()) < 100, found


@linux
def test_peak_memory_of_all_triples():
    """A fraction of the 216 MiB of N³ fp32 scores."""
    found = grown(KERNELS[-1], 384, [OF_ALL_TRIPLES], ITO_TILE_CACHE_BYTES="0")
    assert found[OF_ALL_TRIPLES] < 100


@linux
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_peak_memory_of_16384_rows(backend, loss):
    """Where one dense fp32 matrix is 1,024 MiB; with the tiles, up to 64 MiB for each pass."""
    assert grown(backend, 16384, [loss])[loss] < 400
