"""Step time and memory of a loss on the batch of many GPUs, from counts and published rates.

A step is the loss and its gradients, without the encoders. The numbers for GPUs are predictions:
the kernels' times are those that `gpu_static.py` predicts from machine code, the network's are
published rates and NCCL's own cost model; nothing here has run on a GPU. `scaling_check.py` holds
the same formulas against gloo on this machine, with constants measured by plain torch calls.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from ito_kernels.distributed.chunks import GATHER_CACHE_BYTES as CACHE
from ito_kernels.distributed.transport import default_chunk_size

RESULTS = Path(__file__).parent / "results"
ALL_RANKS = [1 << k for k in range(3, 13)]
RANKS = (8, 64, 512, 4096)  # of the table
BATCHES = (1 << 15, 1 << 17, 1 << 19, 1 << 20, 1 << 22)
LEAST_ROWS = 8  # of a rank
LEAST_CHUNK = 2048
ENOUGH = 1.02  # a chunk is chosen that is this close to the fastest
WIDE = 4  # bytes of what is summed
PANEL = 256 << 20  # bytes of the GPU kernels' W panel: docs/gpu-static.md
MIB = 1 << 20


# ---- what a step does


class Walk(NamedTuple):
    """Over all chunks of keys once: which kernels, and whether keys get gradients."""

    kernels: str  # "forward", "backward" or "both"
    units: int  # matrix products of local rows × all keys × D
    gradients: bool


TWO_WALKS = (Walk("forward", 1, False), Walk("backward", 3, True))
LOSSES = {
    "clip": TWO_WALKS,
    "self": TWO_WALKS,  # SupCon, NT-Xent and ITO's fusion term: rows only, no columns' statistics
    "siglip": (Walk("both", 3, True),),  # gradients are formed in the forward pass
}
STATISTICS = {"forward": 4, "backward": 5}  # numbers for each column, sent by CLIP's walks


class Chunk(NamedTuple):
    """Keys that are used together, and how many of them come from other ranks."""

    keys: int
    travelled: int


class Step(NamedTuple):
    """One loss and its gradients: `rows` of each of `ranks`, `dim` features of `itemsize` bytes."""

    ranks: int
    rows: int
    dim: int = 512
    itemsize: int = 2
    loss: str = "clip"
    chunk: int | None = None  # chunk_size
    transport: str = "gather"  # or "ring"
    cache: int = CACHE  # ITO_GATHER_CACHE_BYTES

    @property
    def batch(self) -> int:
        return self.ranks * self.rows

    def chunks(self) -> list[Chunk]:
        """An all-gather's are the same part of all ranks' keys, a ring's a part of one rank's."""
        size = self.chunk or default_chunk_size(self.ranks)
        ring = self.transport == "ring"
        part = min(size if ring else -(-size // self.ranks), self.rows)
        parts = [min(part, self.rows - start) for start in range(0, self.rows, part)]
        if ring:
            return [Chunk(part, part if t else 0) for part in parts for t in range(self.ranks)]
        return [Chunk(self.ranks * part, (self.ranks - 1) * part) for part in parts]

    def kept(self) -> int:
        """Chunks that the second walk need not gather again: the first ones, while they fit."""
        filled = accumulate(chunk.keys * self.dim * self.itemsize for chunk in self.chunks())
        return sum(nbytes <= self.cache for nbytes in filled)

    def traffic(self) -> dict[str, int]:
        """Bytes that a rank receives, by kind: the table of docs/distributed.md."""
        chunks, others = self.chunks(), (self.ranks - 1) * self.rows
        again = chunks[self.kept() :] * (len(LOSSES[self.loss]) - 1)
        out = {
            "sizes": (self.ranks - 1) * 24,
            "ids": others * 8,
            "keys": sum(c.travelled for c in chunks + again) * self.dim * self.itemsize,
            "gradients": sum(c.travelled for c in chunks) * self.dim * WIDE,
        }
        if self.loss == "clip":
            out["statistics"] = others * WIDE * sum(STATISTICS.values())
        return out

    def flops(self) -> int:
        return sum(walk.units for walk in LOSSES[self.loss]) * 2 * self.rows * self.batch * self.dim

    def memory(self) -> int:
        """Bytes at most, beside the encoders and the kernels' own: docs/distributed.md."""
        chunk = self.chunks()[0].keys * self.dim
        kept = self.kept() * chunk * self.itemsize
        return 6 * self.rows * self.dim * WIDE + 4 * chunk * WIDE + 200 * self.batch + kept


def panel(step: Step) -> int:
    """Bytes of W that the GPU kernels hold in backward."""
    return min(PANEL, step.rows * step.chunks()[0].keys * step.itemsize)


def open_clip_memory(step: Step, local_loss: bool) -> int:
    """Bytes of open_clip's ClipLoss on each rank: all ranks' features of both towers, with
    gradients, and for each score the logits of both directions and their log-softmax, and in
    backward the gradient of one.

    With local_loss logits are local rows × batch, without batch × batch.
    """
    rows = step.rows if local_loss else step.batch
    features = 2 * 2 * step.batch * step.dim * step.itemsize
    return features + rows * step.batch * (2 * (step.itemsize + WIDE) + WIDE)


# ---- what it takes


class Machine(Protocol):
    """Seconds. Bytes are what a rank receives."""

    call: float  # of each step, whatever its size

    def compute(self, walk: Walk, rows: int, keys: int, dim: int, itemsize: int) -> float: ...
    def all_gather(self, ranks: int, nbytes: int) -> float: ...
    def reduce_scatter(self, ranks: int, nbytes: int) -> float: ...
    def all_to_all(self, ranks: int, nbytes: int) -> float: ...
    def all_reduce(self, ranks: int) -> float: ...
    def hop(self, ranks: int, nbytes: int) -> float: ...
    def together(self, compute: float, transfer: float) -> float: ...


def compute_seconds(step: Step, machine: Machine) -> float:
    """The kernels alone, chunk after chunk."""
    return sum(
        number * machine.compute(walk, step.rows, keys, step.dim, step.itemsize)
        for keys, number in Counter(chunk.keys for chunk in step.chunks()).items()
        for walk in LOSSES[step.loss]
    )


def step_seconds(step: Step, machine: Machine) -> float:
    seconds = exchanges(step, machine)
    for number, walk in enumerate(LOSSES[step.loss]):
        chunks = step.chunks()
        each = {chunk: chunk_seconds(step, walk, chunk, machine) for chunk in set(chunks)}
        work = [each[chunk] for chunk in chunks]
        kept = step.kept() if number else 0
        seconds += pipeline(work, machine, kept, prefetches=step.transport == "ring")
    return seconds


class Work(NamedTuple):
    """Seconds of a chunk: of its arrival, its kernels, and its gradients' reduce-scatter."""

    arrival: float
    kernels: float
    scatter: float


def chunk_seconds(step: Step, walk: Walk, chunk: Chunk, machine: Machine) -> Work:
    bring, take = machine.all_gather, machine.reduce_scatter
    if step.transport == "ring":
        bring = take = machine.hop
    kernels = machine.compute(walk, step.rows, chunk.keys, step.dim, step.itemsize)
    if not chunk.travelled:
        return Work(0.0, kernels, 0.0)
    arrival, scatter = (chunk.travelled * step.dim * size for size in (step.itemsize, WIDE))
    return Work(
        bring(step.ranks, arrival), kernels, take(step.ranks, scatter) if walk.gradients else 0.0
    )


def pipeline(work: list[Work], machine: Machine, kept: int = 0, prefetches: bool = False) -> float:
    """Seconds of one walk. While a chunk's kernels run, the gradients of the chunk before travel
    and the chunk after arrives; nothing hides the first arrival and the last gradients.

    The first `kept` chunks are there already, and the one after starts to arrive when they are
    done; or, where the transport `prefetches`, during the last of them.
    """
    seconds, last = 0.0, len(work) - 1
    for k, (arrival, kernels, _) in enumerate(work):
        if k == kept and not (k and prefetches):
            seconds += arrival
        transfer = work[k - 1].scatter if k else 0.0
        if k < last and (k >= kept or (k == kept - 1 and prefetches)):
            transfer += work[k + 1].arrival
        seconds += machine.together(kernels, transfer)
    return seconds + work[last].scatter


def exchanges(step: Step, machine: Machine) -> float:
    """What is not in the walks: the call, sizes, ids, the columns' statistics, and the sums of the
    loss and of its anchors."""
    ranks, others = step.ranks, (step.ranks - 1) * step.rows
    seconds = machine.call + machine.all_gather(ranks, (ranks - 1) * 56)
    seconds += machine.all_gather(ranks, others * 8) + 2 * machine.all_reduce(ranks)
    if step.loss == "clip":
        seconds += machine.all_to_all(ranks, others * WIDE * STATISTICS["forward"])
        seconds += machine.all_gather(ranks, others * WIDE * STATISTICS["backward"])
    return seconds


def chunk_sizes(step: Step) -> list[int]:
    """From LEAST_CHUNK keys on, those whose share of a rank is a power of two; and the batch."""
    shares = [1 << k for k in range(step.rows.bit_length())]
    sizes = [step.ranks * share for share in shares if share < step.rows]
    return [size for size in sizes if size >= LEAST_CHUNK] + [step.batch]


def best_chunk(step: Step, machine: Machine) -> int:
    """The smallest chunk size within 2 % of the fastest."""
    times = {c: step_seconds(step._replace(chunk=c), machine) for c in chunk_sizes(step)}
    return min(c for c, seconds in times.items() if seconds <= ENOUGH * min(times.values()))


def chunk_to_choose(ranks: int) -> int:
    """A chunk size for every batch: below 32,768 keys the host is slower than the GPU, and with
    less than 512 of each rank the ring's latency is longer than the transfer."""
    return max(1 << 15, 512 * ranks)


def hiding_chunk(step: Step, machine: Machine) -> int | None:
    """The smallest chunk size whose kernels take as long as its transfers, in every walk."""

    def hides(size: int) -> bool:
        chunk = step._replace(chunk=size).chunks()[0]
        work = [chunk_seconds(step, walk, chunk, machine) for walk in LOSSES[step.loss]]
        return all(w.kernels >= w.arrival + w.scatter for w in work)

    return next((size for size in chunk_sizes(step) if hides(size)), None)


# ---- GPUs: predictions


class Network(NamedTuple):
    """Published rates in bytes per second, each way, of one GPU of a node of 8."""

    nvlink: float
    nic: float
    low_latency: tuple[float, float, float]  # what NCCL's LL reaches on 1, 2, more nodes
    source: str


NODE = 8
NETWORKS = {
    "h100": Network(450e9, 50e9, (141e9, 45e9, 35e9),
                    "H100 SXM data sheet: NVLink 900 GB/s both ways; DGX H100: a 400 Gb/s"
                    " ConnectX-7 for each GPU"),
    "a100": Network(300e9, 25e9, (87.7e9, 22.5e9, 19e9),
                    "A100 SXM data sheet: NVLink 600 GB/s both ways; DGX A100: a 200 Gb/s"
                    " ConnectX-6 for each GPU"),
}  # fmt: skip
CHIPS = {"h100": "H100 SXM", "a100": "A100 SXM"}  # in gpu_static.json
# NCCL's cost model (src/graph/tuning.cc, 2.28), its rings: protocol -> µs of a call, of a step
# inside a node, of a step between nodes, and the share of the links' rate. The fastest is taken.
PROTOCOLS = {
    "LL": (6.6, 0.6, 2.7, 0.5),
    "LL128": (14.0, 1.9, 4.0, 0.92),
    "Simple": (8.4, 3.4, 14.0, 1.0),
}
TREE = (6.8, 0.6, 5.0)  # the same of a small all-reduce (LL)
# Python's own for each chunk and walk, and for each step: what scaling_check.py finds on a CPU
# core, assumed of a GPU's host. A chunk is issued while the GPU works on another; CALL is added.
HOST, CALL = 0.25e-3, 1.7e-3


class Gpu:
    """Nodes of 8 GPUs, a network card for each."""

    def __init__(self, name: str, static: dict):
        self.name, self.network = name, NETWORKS[name]
        self.host, self.call = HOST, CALL
        self.chip = static["chips"][CHIPS[name]]
        self.predictions = [
            p for p in static["predictions"] if (p["chip"], p["kernels"]) == (CHIPS[name], "triton")
        ]
        self.tiles = {
            kernel: next(
                row["tile"][:2]
                for row in static["kernels"]["triton"]
                if (row["arch"], row["arithmetic"], row["kernel"])
                == (self.chip["arch"], "half", kernel)
            )
            for kernel in ("forward clip", "panel clip", "panel siglip")
        }

    def per_score(self, kernels: str, dim: int) -> float:
        """Predicted seconds for each entry of S, in bf16: a line through those at D = 512 and
        768, of which the part that grows with D is matrix products and loads."""
        loss = "siglip" if kernels == "both" else "clip"
        names = ("forward_ms",) if kernels == "forward" else ("panel_ms", "products_ms")
        at = {
            p["d"]: sum(p[x] for x in names) * 1e-3 / p["n"] ** 2
            for p in self.predictions
            if p["loss"] == loss and p["n"] == 65536
        }
        return at[512] + (dim - 512) / 256 * (at[768] - at[512])

    def compute(self, walk: Walk, rows: int, keys: int, dim: int, itemsize: int) -> float:
        """The predicted time of whole waves of tiles, or of reading the features if that takes
        longer; in backward also adding up and passing on the gradients in fp32."""
        name = {"forward": "forward clip", "backward": "panel clip", "both": "panel siglip"}
        m, n = self.tiles[name[walk.kernels]]
        waves = math.ceil(math.ceil(rows / m) * math.ceil(keys / n) / self.chip["processors"])
        scores = waves * self.chip["processors"] * m * n
        memory = self.chip["memory"] * 1e9
        reads = (2 if walk.gradients else 1) * (rows + keys) * dim * itemsize / memory
        sums = (3 * rows + 2 * keys) * dim * WIDE / memory if walk.gradients else 0.0
        return max(scores * self.per_score(walk.kernels, dim), reads) + sums

    def all_gather(self, ranks: int, nbytes: int) -> float:
        """NCCL's ring: through each GPU of a node over NVLink, and from node to node over all 8
        cards at once."""
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // NODE)
        rate = self.network.nvlink
        if nodes > 1:
            rate = min(rate, NODE * self.network.nic)
        between, times = nodes - 1, []
        for name, (call, inside, outside, share) in PROTOCOLS.items():
            most = share * rate
            if name == "LL":
                most = min(most, self.network.low_latency[min(nodes, 3) - 1])
                inside *= 1.8 if nodes > 1 else 1.0
            latency = call + (ranks - 1 - between) * inside + between * outside
            times.append(latency * 1e-6 + nbytes / most)
        return min(times)

    reduce_scatter = all_gather  # the same ring, with sums

    def all_to_all(self, ranks: int, nbytes: int) -> float:
        """Assumed: an all-gather's latency, and the GPU's own card for what crosses nodes."""
        crossing = max(0, ranks - NODE) / max(1, ranks - 1)
        return self.all_gather(ranks, 0) + nbytes * crossing / self.network.nic

    def all_reduce(self, ranks: int) -> float:
        """Of a single number: NCCL's trees."""
        call, inside, outside = TREE
        nodes = -(-ranks // NODE)
        return (call + 2 * ((min(ranks, NODE) - 1) * inside + math.log2(nodes) * outside)) * 1e-6

    def hop(self, ranks: int, nbytes: int) -> float:
        """A send to the next rank: where it crosses nodes it has one card."""
        call, inside, outside, _ = PROTOCOLS["Simple"]
        if ranks <= NODE:
            return (call + inside) * 1e-6 + nbytes / self.network.nvlink
        return (call + outside) * 1e-6 + nbytes / self.network.nic

    def together(self, compute: float, transfer: float) -> float:
        """Assumed: transfers cost the kernels nothing. The host prepares one chunk meanwhile."""
        return max(compute, transfer, self.host)


def rows_to_hide(gpu: Gpu, dim: int, ranks: int) -> float:
    """Rows of each GPU from which the kernels of a large chunk hide its transfer: the ratio of
    both, which does not depend on the batch. The larger of the two walks."""
    out = 0.0
    for walk in TWO_WALKS:
        nbytes = dim * (2 + (WIDE if walk.gradients else 0))
        rate = 1e12 / (gpu.all_gather(ranks, 10**12) - gpu.all_gather(ranks, 0))
        out = max(out, nbytes / rate / gpu.per_score(walk.kernels, dim))
    return out


def most_gpus(batch: int, gpu: Gpu, dim: int, loss: str) -> int:
    """Up to how many GPUs the kernels take half of the step or more, 0 if on none: beyond,
    communication and the host have taken over."""
    most = 0
    for ranks in ALL_RANKS:
        step = Step(ranks, batch // ranks, dim, loss=loss)
        if step.rows >= LEAST_ROWS:
            step = step._replace(chunk=best_chunk(step, gpu))
            if 2 * compute_seconds(step, gpu) >= step_seconds(step, gpu):
                most = ranks
    return most


# ---- table, files


def row(step: Step, gpu: Gpu) -> dict:
    chunk, hiding = best_chunk(step, gpu), hiding_chunk(step, gpu)
    best = step._replace(chunk=chunk)
    once, rule = (step._replace(chunk=x) for x in (step.batch, chunk_to_choose(step.ranks)))
    return {
        "gpu": gpu.name, "loss": step.loss, "d": step.dim, "ranks": step.ranks,
        "batch": step.batch, "rows": step.rows, "traffic": step.traffic(), "flops": step.flops(),
        "chunk": chunk, "hiding_chunk": hiding,
        "compute_ms": 1e3 * compute_seconds(best, gpu), "step_ms": 1e3 * step_seconds(best, gpu),
        "default_ms": 1e3 * step_seconds(step, gpu), "once_ms": 1e3 * step_seconds(once, gpu),
        "rule_ms": 1e3 * step_seconds(rule, gpu),
        "ring_ms": 1e3 * step_seconds(step._replace(transport="ring"), gpu),
        "memory": best.memory() + panel(best),
        "open_clip_memory": open_clip_memory(step, True),
        "dense_memory": open_clip_memory(step, False),
    }  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = [
        "| GPUs | batch | rows | compute ms | step ms | chunk | hides from | rule ms"
        " | default ms | ring ms | memory | open_clip, local_loss | open_clip |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        times = [number(r[f"{x}_ms"]) for x in ("rule", "default", "ring")]
        sizes = [size(r[x]) for x in ("memory", "open_clip_memory", "dense_memory")]
        cells = [
            f"{r['ranks']:,}", f"{r['batch']:,}", f"{r['rows']:,}", number(r["compute_ms"]),
            f"**{number(r['step_ms'])}**", f"{r['chunk']:,}",
            f"{r['hiding_chunk']:,}" if r["hiding_chunk"] else "–", *times, *sizes,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def size(nbytes: float) -> str:
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power or power == 20:
            x = nbytes / (1 << power)
            return f"{x:,.0f} {unit}" if x >= 10 else f"{x:.1f} {unit}"
    raise AssertionError


def load_gpu(name: str) -> Gpu:
    return Gpu(name, json.loads((RESULTS / "gpu_static.json").read_text()))
