"""Speed of the primitive on every backend, for comparing two revisions with pytest-benchmark.

Run `pytest benchmarks/regression.py --benchmark-autosave` on the first revision and
`pytest benchmarks/regression.py --benchmark-compare` on the second.
"""

import pytest
import torch
from torch.nn.functional import normalize

import ito_kernels as ik

BACKENDS = [name for name, status in ik.backends().items() if status.available]
N, D = 1024, 256


@pytest.mark.parametrize("loss", ["clip", "siglip", "nt_xent"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(benchmark, backend, loss):
    torch.manual_seed(0)
    x, y = (normalize(torch.randn(N, D)).requires_grad_() for _ in range(2))
    call = {
        "clip": lambda: ik.clip_loss(x, y, 14.3, backend=backend),
        "siglip": lambda: ik.siglip_loss(x, y, 10.0, -10.0, backend=backend),
        "nt_xent": lambda: ik.nt_xent_loss(x, y, backend=backend),
    }[loss]
    benchmark.pedantic(lambda: call().backward(), rounds=7, warmup_rounds=2)
