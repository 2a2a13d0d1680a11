"""Compares the scaling model with gloo on this machine, for W = 1, 2 and 4 processes.

Every process has one thread, on its own core if there are enough. The constants of the machine are
measured by plain torch calls: torch.mm gives the rate of matrix products, collectives of two sizes
the latency and rate of each kind, and an all-gather during torch.mm their overlap. A loss of 8 rows
and 8 features in a group of one process gives the overhead of a step and of each chunk. From these
constants alone the model predicts the steps of the losses, which run in turns with the plain calls.

A time is that of the slowest rank, and the minimum over all rounds, because the machine may be busy
with other work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from loss_throughput import machine
from scaling_model import LOSSES, Step, Walk, number, step_seconds
from torch import Tensor

import ito_kernels as ik
from ito_kernels.distributed.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
)

DIM, FP32 = 512, 4
ROWS, SHARES, KINDS = (128, 512), (1, 4), ("clip", "siglip")
SMALL, LARGE = 1 << 12, 1 << 21  # bytes per rank in a plain collective
HOST_CHUNKS = 8
SECONDS = 90  # duration of the rounds for each W


class Gloo(NamedTuple):
    """A `Machine` of the model: a collective takes latency + bytes / rate seconds."""

    flops: float  # per second
    hidden: float  # the fraction of the shorter of computation and transfer that overlaps
    host: float  # seconds per chunk and pass
    call: float  # seconds per step
    links: dict[str, tuple[float, float]]  # latency and rate of each kind of collective

    def compute(self, walk: Walk, rows: int, keys: int, dim: int, itemsize: int) -> float:
        return walk.units * 2 * rows * keys * dim / self.flops

    def _link(self, name: str, ranks: int, nbytes: int) -> float:
        latency, rate = self.links[name]
        return latency + nbytes / rate

    def all_gather(self, ranks: int, nbytes: int) -> float:
        return self._link("all_gather", ranks, nbytes)

    def reduce_scatter(self, ranks: int, nbytes: int) -> float:
        return self._link("reduce_scatter", ranks, nbytes)

    def all_to_all(self, ranks: int, nbytes: int) -> float:
        return self._link("all_to_all", ranks, nbytes)

    def all_reduce(self, ranks: int) -> float:
        return self._link("all_reduce", ranks, 0)

    def together(self, compute: float, transfer: float) -> float:
        """Python, computation and transfers share the core of the process."""
        return self.host + compute + transfer - self.hidden * min(compute, transfer)


def check(out: Path) -> None:
    """Run W = 1, 2, 4, print predictions and measurements, and write both as JSON."""
    report = {"date": datetime.now().isoformat(timespec="seconds"), **machine("cpu")}
    report |= {"threads": 1, "cores": len(os.sched_getaffinity(0)), "machines": {}, "rows": []}
    for ranks in (1, 2, 4):
        rounds, times = measured(ranks)
        gloo = calibrated(ranks, times)
        report["machines"][ranks] = gloo._asdict() | {"rounds": rounds}
        for step in steps(ranks):
            seconds = min(times[name(step)])
            guess = step_seconds(step, gloo)
            report["rows"].append(
                step._asdict()
                | {"predicted_ms": 1e3 * guess, "measured_ms": 1e3 * seconds}
                | {"median_ms": 1e3 * median(times[name(step)]), "ratio": guess / seconds}
            )
    print(markdown(report))
    out.write_text(json.dumps(report, indent=1) + "\n")


def markdown(report: dict) -> str:
    lines = [
        "| W | rounds | torch.mm GFLOP/s | all-gather | reduce-scatter | hidden | chunk | step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, gloo in report["machines"].items():
        links = [
            f"{1e6 * latency:,.0f} µs + {rate / 1e9:.2f} GB/s"
            for latency, rate in (gloo["links"][x] for x in ("all_gather", "reduce_scatter"))
        ]
        cells = [
            str(ranks), str(gloo["rounds"]), f"{gloo['flops'] / 1e9:.0f}", *links,
            f"{gloo['hidden']:.2f}", f"{1e6 * gloo['host']:,.0f} µs",
            f"{1e6 * gloo['call']:,.0f} µs",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| W | loss | rows | chunk | predicted ms | measured ms | predicted / measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['ranks']} | {r['loss']} | {r['rows']} | {r['chunk']}"
            f" | {number(r['predicted_ms'])} | {number(r['measured_ms'])} | {r['ratio']:.2f} |"
        )
    return "\n".join(lines)


def steps(ranks: int) -> list[Step]:
    return [
        Step(ranks, rows, DIM, FP32, loss, chunk=ranks * rows // share)
        for loss in KINDS
        for rows in ROWS
        for share in SHARES
    ]


def name(step: Step) -> str:
    return f"{step.loss} {step.rows} {step.chunk}"


# The constants of the machine.


def calibrated(ranks: int, times: dict[str, list[float]]) -> Gloo:
    seconds = {call_name: min(x) for call_name, x in times.items()}
    links = {}
    for kind in COLLECTIVES:
        small, large = (seconds[f"{kind} {size}"] for size in (SMALL, LARGE))
        others = max(ranks - 1, 1)  # with one rank it is a copy
        rate = others * (LARGE - SMALL) / max(large - small, 1e-9)
        links[kind] = (max(small - others * SMALL / rate, 0.0), rate)
    alone = seconds["mm"], seconds[f"all_gather {LARGE}"]
    hidden = (sum(alone) - seconds["mm beside all_gather"]) / min(alone)
    one_chunk, many_chunks = (seconds[f"host {chunks}"] for chunks in (1, HOST_CHUNKS))
    walks = len(LOSSES["clip"])
    host = max(many_chunks - one_chunk, 0.0) / (HOST_CHUNKS - 1) / walks
    return Gloo(
        flops=mm_flops(ranks) / seconds["mm"],
        hidden=min(max(hidden, 0.0), 1.0),
        host=host,
        call=max(one_chunk - walks * host, 0.0),
        links=links,
    )


def mm_flops(ranks: int) -> float:
    return 2 * ROWS[-1] * ranks * ROWS[-1] * DIM


COLLECTIVES = {
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
    "all_reduce": all_reduce,
}


def plain_calls(ranks: int, alone: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The calls that measure the constants of the machine."""
    left, right = torch.randn(ROWS[-1], DIM), torch.randn(DIM, ranks * ROWS[-1])
    scores = torch.zeros(ROWS[-1], ranks * ROWS[-1])

    def collective(kind: str, nbytes: int) -> Callable[[], dist.Work]:
        local, all_ranks = torch.zeros(nbytes // 4), torch.zeros(ranks * nbytes // 4)
        out, x = {
            "all_gather": (all_ranks, local),
            "reduce_scatter": (local, all_ranks),
            "all_to_all": (torch.zeros_like(all_ranks), all_ranks),
            "all_reduce": (torch.zeros_like(local), local),
        }[kind]
        return lambda: COLLECTIVES[kind](out, x, dist.group.WORLD)

    calls = {"mm": lambda: torch.mm(left, right, out=scores)}
    for kind in COLLECTIVES:
        for nbytes in (SMALL, LARGE):
            start = collective(kind, nbytes)
            calls[f"{kind} {nbytes}"] = lambda start=start: start().wait()
    gather = collective("all_gather", LARGE)

    def during_all_gather() -> None:
        work = gather()
        torch.mm(left, right, out=scores)
        work.wait()

    calls["mm beside all_gather"] = during_all_gather
    tiny = leaves(8, 8)
    for chunks in (1, HOST_CHUNKS):
        calls[f"host {chunks}"] = lambda chunk=8 // chunks: train("clip", tiny, chunk, alone)
    return calls


# Processes.


def leaves(rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (torch.nn.functional.normalize(torch.randn(rows, dim), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(10.0, requires_grad=True)


def train(loss: str, x: tuple[Tensor, ...], chunk: int, group: dist.ProcessGroup) -> None:
    options = {"group": group, "chunk_size": chunk}
    value = ik.clip_loss(*x, **options) if loss == "clip" else ik.siglip_loss(*x, -10.0, **options)
    torch.autograd.grad(value, x)


def measured(ranks: int) -> tuple[int, dict[str, list[float]]]:
    """The number of rounds, and for each call the seconds of the slowest rank in each round."""
    spawn = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=work, args=(rank, ranks, cores[rank % len(cores)], folder))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a process of {ranks} has failed")
        each = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    slowest = {
        call_name: [max(x) for x in zip(*(e[call_name] for e in each), strict=True)]
        for call_name in each[0]
    }
    return len(slowest["mm"]), slowest


def work(rank: int, ranks: int, core: int, folder: str) -> None:
    os.sched_setaffinity(0, {core})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    groups = [dist.new_group([r]) for r in range(ranks)]
    calls = plain_calls(ranks, groups[rank])
    inputs = {rows: leaves(rows, DIM) for rows in ROWS}
    for step in steps(ranks):
        calls[name(step)] = lambda s=step: train(s.loss, inputs[s.rows], s.chunk, dist.group.WORLD)
    order, shuffle, times = (
        list(calls),
        random.Random(0).shuffle,
        {call_name: [] for call_name in calls},
    )
    for call in calls.values():
        call()
    begin, more = time.perf_counter(), torch.ones(1)
    while more.item():
        shuffle(order)
        for call_name in order:
            dist.barrier()
            start = time.perf_counter()
            calls[call_name]()
            times[call_name].append(time.perf_counter() - start)
        more.fill_(time.perf_counter() - begin < SECONDS)
        dist.broadcast(more, 0)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(times))
    dist.barrier()
    os._exit(0)
