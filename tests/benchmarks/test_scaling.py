"""The scaling model: its bytes are those of the code, its overlap that of a simulation, its memory
the documented bound, and the page in the docs what it says now."""

import json
import os
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.costs_on_ranks import Traffic

import ito_kernels as ik

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "predict"))

import gpu_model  # noqa: E402
import scaling_model as model  # noqa: E402
from scaling_model import Step, Work  # noqa: E402

TRANSPORTS = ("gather", "ring")
H100 = model.Gpu("h100")
STEPS = [
    Step(W, rows, loss=loss, chunk=chunk, transport=transport)
    for W, rows, loss, chunk, transport in product(
        (8, 64, 1024), (16, 1024), model.LOSSES, (None, 1 << 16), TRANSPORTS
    )
]


def received():
    """What a rank receives in losses of 6 rows, 8 features, chunks of 4 keys, by what varies."""
    x, y = (torch.randn(6, 8).requires_grad_() for _ in range(2))
    options = {"group": dist.group.WORLD, "chunk_size": 4}
    losses = {
        "clip": partial(ik.clip_loss, x, y, 1.0, **options),
        "siglip": partial(ik.siglip_loss, x, y, 1.0, 0.0, **options),
        "self": partial(ik.supcon_loss, x, torch.arange(6) // 2, **options),
    }
    found = {}
    for transport, (name, loss), cache in product(TRANSPORTS, losses.items(), (0, 300, 1 << 20)):
        os.environ |= {"ITO_TRANSPORT": transport, "ITO_GATHER_CACHE_BYTES": str(cache)}
        with Traffic() as counted:
            loss().backward()
        found[transport, name, cache] = counted.received
    return found


def test_traffic_is_what_the_code_receives():
    for found in processes.run(received, 2, seconds=30):
        for (transport, loss, cache), nbytes in found.items():
            nbytes.pop("sum")
            step = Step(2, 6, 8, 4, loss, 4, transport, cache)
            assert step.traffic() == nbytes, step


def test_a_ring_receives_as_much():
    for step in STEPS:
        assert (
            step._replace(cache=0).traffic() == step._replace(cache=0, transport="ring").traffic()
        )


class Ideal:
    """Any transfer hides behind any kernels; nothing else takes time."""

    def together(self, compute, transfer):
        return max(compute, transfer)


def simulated(work, kept, prefetches):
    """One walk on two queues, each serial: the kernels', and the network's in the order of issue.
    A gather is issued when the chunk before it begins, gradients when their chunk has ended and
    those before them have arrived."""
    kernels = network = scattered = 0.0
    arrived = [0.0] * len(work)

    def gather(k, issued):
        nonlocal network
        network = arrived[k] = max(network, issued) + work[k].arrival

    if kept == 0:
        gather(0, 0.0)
    for k in range(len(work)):
        if k == kept > 0 and not prefetches:
            gather(k, kernels)
        begin = max(kernels, arrived[k])
        if k:
            network = scattered = max(network, kernels) + work[k - 1].scatter
        if k + 1 < len(work) and (k >= kept or (k + 1 == kept and prefetches)):
            gather(k + 1, begin)
        kernels = max(begin + work[k].kernels, scattered)
    return max(network, kernels) + work[-1].scatter


@pytest.mark.parametrize("prefetches", [False, True])
def test_the_pipeline_is_a_simulation_of_two_queues(prefetches):
    g = torch.Generator().manual_seed(0)
    for number, kept in product((1, 2, 3, 7), (0, 1, 2, 7)):
        work = [Work(*x) for x in torch.rand(number, 3, generator=g).tolist()]
        assert model.pipeline(work, Ideal(), kept, prefetches) == pytest.approx(
            simulated(work, kept, prefetches)
        )


def test_overlap_hides_no_more_than_there_is():
    for step in STEPS:
        parts = step.chunks()
        work = [
            (walk, model.chunk_seconds(step, walk, chunk, H100))
            for walk in model.LOSSES[step.loss]
            for chunk in parts
        ]
        kernels = sum(w.kernels for _, w in work)
        again = len(work) - len(parts)  # what may be kept
        network = sum(w.scatter for _, w in work) + sum(w.arrival for _, w in work[again:])
        seconds = model.step_seconds(step, H100)
        everything = sum(sum(w) for _, w in work) + len(work) * H100.host
        assert max(kernels, network) <= seconds
        assert seconds <= everything + model.exchanges(step, H100)
        assert kernels == pytest.approx(model.compute_seconds(step, H100))


def test_more_work_takes_longer_and_a_faster_network_does_not():
    fast = model.Gpu("h100")
    fast.network = fast.network._replace(nic=2 * fast.network.nic, nvlink=2 * fast.network.nvlink)
    for step in STEPS:
        seconds = model.step_seconds(step, H100)
        assert model.step_seconds(step, fast) <= seconds
        whole = step._replace(chunk=step.batch, cache=0)
        more = (whole._replace(rows=2 * whole.rows), whole._replace(ranks=2 * whole.ranks))
        for other in more:
            other = other._replace(chunk=other.batch)
            assert model.step_seconds(other, H100) > model.step_seconds(whole, H100)


def test_compute_is_the_middle_of_the_predicted_range():
    """One GPU with all rows and keys at once has the time of docs/gpu-static.md."""
    step = Step(1, 65536, 768, chunk=65536)
    times = gpu_model.parts(
        gpu_model.DESIGNS["CLIP"], gpu_model.CHIPS["H100 SXM"], 65536, 768, gpu_model.load()
    )
    middle = gpu_model.total(times).middle
    assert 1 < 1e3 * model.compute_seconds(step, H100) / middle < 1.01  # sums of the gradients


def test_memory_is_the_documented_bound():
    text = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    pattern = r"(\d+) matrices like the local keys, (\d+) like a chunk of keys .*? (\d+) bytes"
    local, chunk, rows = map(int, re.search(pattern, text).groups())
    step = Step(8, 512, 256, chunk=1024, cache=0)
    assert step.memory() == 4 * 256 * (local * 512 + chunk * 1024) + rows * 8 * 512


def test_the_page_shows_what_the_model_says():
    report = json.loads(
        (ROOT / "benchmarks" / "predict" / "results" / "scaling-h100-clip-512.json").read_text()
    )
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert gpu_model.written(page, model.page(report["rows"])) == page
    for row in report["rows"][::7]:
        now = model.row(Step(row["ranks"], row["rows"]), H100)
        assert now.pop("traffic") == row.pop("traffic")
        assert now == pytest.approx(row)


def test_the_chunk_to_choose_is_close_to_the_best():
    for gpu, ranks_, loss in product(("h100", "a100"), (8, 64, 512, 4096), ("clip", "siglip")):
        gpu = model.Gpu(gpu)
        for size in (1 << 17, 1 << 20, 1 << 22):
            step = Step(ranks_, size // ranks_, loss=loss)
            best = min(
                model.step_seconds(step._replace(chunk=chunk), gpu)
                for chunk in model.chunk_sizes(step)
            )
            chosen = step._replace(chunk=model.chunk_to_choose(ranks_))
            assert model.step_seconds(chosen, gpu) <= 1.13 * best, step
