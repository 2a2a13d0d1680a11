"""No loss and no option holds anything N × M: measured from outside, in a fresh process, both
forward and backward."""

import pytest
from support.memory import linux, printed
from support.problems import AVAILABLE

SCRIPT = """
import sys
import torch
import ito_kernels as ik
from support.memory import growth
from torch.nn.functional import normalize

backend, n, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
x, y, z = (normalize(torch.randn(n, 8)).requires_grad_() for _ in range(3))

def run(loss, n):
    a, b, c, ids = x[:n], y[:n], z[:n], torch.arange(n) // 4
    by_id = {"query_ids": ids, "key_ids": ids}
    by_class = {"query_ids": ids % 2, "key_ids": ids % 2}  # n * n / 2 positive pairs
    infonce = ik.multi_positive_infonce
    pairs = torch.randint(0, n, (4 * n, 2))
    soft = {"target_queries": c, "target_keys": b, "target_scale": 10.0}
    queue = {"queue": c.detach(), "queue_ids": ids + 3}
    return {
        "clip": lambda: ik.clip_loss(a, b, 10.0),
        "ids": lambda: infonce(a, b, 10.0, positives="in", **by_id),
        "siglip": lambda: ik.siglip_loss(a, b, 10.0, -10.0),
        "supcon": lambda: ik.supcon_loss(a, ids),
        "smoothing": lambda: infonce(a, b, 10.0, label_smoothing=0.1, **by_id, **queue),
        "weights and biases": lambda: infonce(
            a, b, 10.0, query_weights=torch.rand(n), key_bias=torch.randn(n), **by_id
        ),
        "pairs": lambda: infonce(a, b, 10.0, positive_pairs=pairs, return_stats=True)[0],
        "reweighted pairs": lambda: infonce(
            a, b, 10.0, positive_pairs=pairs, debias=0.1, hardness=0.5
        ),
        "queue": lambda: infonce(a, b, 10.0, **by_id, **queue),
        "hard negatives": lambda: infonce(a, b, 10.0, hard_negatives=c[:, None], **by_id),
        "margin": lambda: infonce(a, b, 10.0, false_negative_margin=0.1, **by_id),
        "smoothed margin": lambda: infonce(
            a, b, a.new_full((n,), 10.0), false_negative_margin=0.1, label_smoothing=0.1, **by_id,
            **queue,
        ),
        "debias and hardness": lambda: infonce(a, b, 10.0, debias=0.1, hardness=0.5, **by_id),
        "decoupled": lambda: ik.decoupled_contrastive_loss(a, b, 10.0, **by_id),
        "decoupled softmax": lambda: ik.decoupled_softmax_loss(a, b, 10.0, **by_id),
        "margin of classes": lambda: infonce(a, b, 10.0, false_negative_margin=0.1, **by_class),
        "decoupled softmax of classes": lambda: ik.decoupled_softmax_loss(a, b, 10.0, **by_class),
        "cacr of classes": lambda: ik.cacr_loss(a, b, **by_class),
        "mnrl": lambda: ik.mnrl_loss(a, b, c),
        "cwcl": lambda: ik.cwcl_loss(a, b, 10.0, reference=c, symmetric=True),
        "soft": lambda: ik.soft_target_infonce(a, b, 10.0, **soft),
        "uniformity": lambda: ik.uniformity_loss(a),
        "alignment": lambda: ik.alignment_loss(a, b),
        "symile": lambda: ik.symile_loss(a, b, c, 10.0),
        "one to k": lambda: ik.one_to_k_loss(a, b[:, None], 10.0),
        "mixup": lambda: ik.mixup_infonce(a, b, 10.0, partners=ids, mixing=0.3),
        "clusters": lambda: ik.cluster_weighted_infonce(
            a, b, 10.0, query_clusters=ids % 8, key_clusters=ids % 8, weights=torch.rand(8, 8)
        ),
        "cacr": lambda: ik.cacr_loss(a, b, **by_id),
        "matryoshka": lambda: ik.matryoshka_loss(ik.clip_loss, a, b, dims=(4, 8), logit_scale=10.0),
    }[loss]()

with ik.use_backend(backend):
    for name in names:
        run(name, 64).backward()  # what is loaded once does not count
        print(growth(lambda: run(name, n).backward()))
"""
LOSSES = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('        "')]
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
    names = LOSSES if backend == KERNELS[-1] else LOSSES[:4]
    found = grown(backend, 6144, names, ITO_TILE_CACHE_BYTES="0")
    assert max(found.values()) < 100, found


@linux
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_peak_memory_of_16384_rows(backend, loss):
    """Where one dense fp32 matrix is 1,024 MiB; with the tiles, up to 64 MiB for each pass."""
    assert grown(backend, 16384, [loss])[loss] < 400
