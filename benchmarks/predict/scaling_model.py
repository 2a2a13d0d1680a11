"""A model of the step time and memory of a loss on many GPUs, from counts and published rates.

A step is the loss and its gradients, without the encoders. All numbers for GPUs are predictions;
nothing here has run on a GPU. The times of the kernels are the middles of the ranges of
`gpu_model.py`. Those of the network follow published rates and the cost model of NCCL.
`scaling_check.py` compares the same formulas with gloo on this machine, with constants measured by
plain torch calls.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import NamedTuple, Protocol

import gpu_model

from ito_kernels.distributed.chunks import GATHER_CACHE_BYTES as CACHE
from ito_kernels.distributed.transport import default_chunk_size

RESULTS = Path(__file__).parent / "results"
ALL_RANKS = [1 << k for k in range(3, 13)]
RANKS = (8, 64, 512, 4096)  # rows of the table
BATCHES = (1 << 15, 1 << 17, 1 << 19, 1 << 20, 1 << 22)
LEAST_ROWS = 8  # per rank
LEAST_CHUNK = 2048
NEAR_BEST = 1.02  # the smallest chunk within this factor of the fastest is chosen
FP32_BYTES = 4  # gradients and statistics are summed in fp32
PANEL = 256 << 20  # bytes of a W panel of the GPU kernels: docs/gpu-static.md
MIB = 1 << 20


# The work of a step.


class Walk(NamedTuple):
    """One pass over all chunks of keys."""

    kernels: str  # "forward", "backward" or "both"
    units: int  # number of matrix products of local rows × all keys × D
    gradients: bool  # whether it computes gradients of the keys


TWO_WALKS = (Walk("forward", 1, False), Walk("backward", 3, True))
LOSSES = {
    "clip": TWO_WALKS,
    "self": TWO_WALKS,  # SupCon, NT-Xent and ITO's fusion term: no column statistics
    "siglip": (Walk("both", 3, True),),  # gradients are computed in the forward pass
}
STATISTICS = {"forward": 4, "backward": 5}  # numbers per column that CLIP's passes send


class Chunk(NamedTuple):
    """The number of keys in a chunk, and how many of them are received from other ranks."""

    keys: int
    received: int


class Step(NamedTuple):
    """One loss and its gradients: `rows` per rank, `dim` features of `itemsize` bytes each."""

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
        """The chunks of a pass. With "gather" a chunk is the same part of all ranks' keys, with
        "ring" a part of one rank's keys."""
        size = self.chunk or default_chunk_size(self.ranks)
        ring = self.transport == "ring"
        part = min(size if ring else -(-size // self.ranks), self.rows)
        parts = [min(part, self.rows - start) for start in range(0, self.rows, part)]
        if ring:
            return [Chunk(part, part if t else 0) for part in parts for t in range(self.ranks)]
        return [Chunk(self.ranks * part, (self.ranks - 1) * part) for part in parts]

    def cached_chunks(self) -> int:
        """The number of chunks, from the first on, that fit in the cache for the second pass."""
        filled = accumulate(chunk.keys * self.dim * self.itemsize for chunk in self.chunks())
        return sum(nbytes <= self.cache for nbytes in filled)

    def traffic(self) -> dict[str, int]:
        """The bytes that a rank receives, by kind. docs/distributed.md has them as a table."""
        chunks, others = self.chunks(), (self.ranks - 1) * self.rows
        again = chunks[self.cached_chunks() :] * (len(LOSSES[self.loss]) - 1)
        out = {
            "sizes": (self.ranks - 1) * 24,
            "ids": others * 8,
            "keys": sum(c.received for c in chunks + again) * self.dim * self.itemsize,
            "gradients": sum(c.received for c in chunks) * self.dim * FP32_BYTES,
        }
        if self.loss == "clip":
            out["statistics"] = others * FP32_BYTES * sum(STATISTICS.values())
        return out

    def flops(self) -> int:
        return sum(walk.units for walk in LOSSES[self.loss]) * 2 * self.rows * self.batch * self.dim

    def memory(self) -> int:
        """The bound on bytes in docs/distributed.md, without the encoders and the memory of the
        kernels."""
        chunk = self.chunks()[0].keys * self.dim
        cached = self.cached_chunks() * chunk * self.itemsize
        return (
            6 * self.rows * self.dim * FP32_BYTES
            + 4 * chunk * FP32_BYTES
            + 200 * self.batch
            + cached
        )


def panel(step: Step) -> int:
    """The bytes of the W panel of the GPU kernels in backward."""
    return min(PANEL, step.rows * step.chunks()[0].keys * step.itemsize)


def open_clip_memory(step: Step, local_loss: bool) -> int:
    """The bytes of open_clip's ClipLoss per rank.

    They are the features of all ranks with gradients, and for each score the logits of both
    directions, their log-softmax, and the gradient of one of them in backward. The logits are local
    rows × batch with local_loss, else batch × batch.
    """
    rows = step.rows if local_loss else step.batch
    features = 2 * 2 * step.batch * step.dim * step.itemsize
    return features + rows * step.batch * (2 * (step.itemsize + FP32_BYTES) + FP32_BYTES)


# The time of a step.


class Machine(Protocol):
    """The times of a machine in seconds. nbytes: the bytes that a rank receives."""

    call: float  # overhead of a step

    def compute(self, walk: Walk, rows: int, keys: int, dim: int, itemsize: int) -> float: ...
    def all_gather(self, ranks: int, nbytes: int) -> float: ...
    def reduce_scatter(self, ranks: int, nbytes: int) -> float: ...
    def all_to_all(self, ranks: int, nbytes: int) -> float: ...
    def all_reduce(self, ranks: int) -> float: ...
    def hop(self, ranks: int, nbytes: int) -> float: ...
    def together(self, compute: float, transfer: float) -> float: ...


def compute_seconds(step: Step, machine: Machine) -> float:
    """The time of the kernels of all chunks, without communication."""
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
        cached = step.cached_chunks() if number else 0
        seconds += pipeline(work, machine, cached, prefetches=step.transport == "ring")
    return seconds


class Work(NamedTuple):
    """The seconds that a chunk takes: the transfer of its keys, its kernels, and the reduce-scatter
    of its gradients."""

    arrival: float
    kernels: float
    scatter: float


def chunk_seconds(step: Step, walk: Walk, chunk: Chunk, machine: Machine) -> Work:
    gather, reduce = machine.all_gather, machine.reduce_scatter
    if step.transport == "ring":
        gather = reduce = machine.hop
    kernels = machine.compute(walk, step.rows, chunk.keys, step.dim, step.itemsize)
    if not chunk.received:
        return Work(0.0, kernels, 0.0)
    arrival, scatter = (chunk.received * step.dim * size for size in (step.itemsize, FP32_BYTES))
    return Work(
        gather(step.ranks, arrival), kernels, reduce(step.ranks, scatter) if walk.gradients else 0.0
    )


def pipeline(
    work: list[Work], machine: Machine, cached: int = 0, prefetches: bool = False
) -> float:
    """The seconds of one pass over the chunks.

    While the kernels of a chunk run, the gradients of the previous chunk and the keys of the next
    one are transferred. Nothing overlaps with the first transfer of keys and the last transfer of
    gradients.

    cached: the number of chunks at the start that are not transferred. The transfer of the next
        chunk starts after them, or during the last of them if the transport `prefetches`.
    """
    seconds, last = 0.0, len(work) - 1
    for k, (arrival, kernels, _) in enumerate(work):
        if k == cached and not (k and prefetches):
            seconds += arrival
        transfer = work[k - 1].scatter if k else 0.0
        if k < last and (k >= cached or (k == cached - 1 and prefetches)):
            transfer += work[k + 1].arrival
        seconds += machine.together(kernels, transfer)
    return seconds + work[last].scatter


def exchanges(step: Step, machine: Machine) -> float:
    """The seconds outside of the passes: the call, the exchange of sizes and ids, the column
    statistics, and the sums of the loss and of the number of anchors."""
    ranks, others = step.ranks, (step.ranks - 1) * step.rows
    seconds = machine.call + machine.all_gather(ranks, (ranks - 1) * 56)
    seconds += machine.all_gather(ranks, others * 8) + 2 * machine.all_reduce(ranks)
    if step.loss == "clip":
        seconds += machine.all_to_all(ranks, others * FP32_BYTES * STATISTICS["forward"])
        seconds += machine.all_gather(ranks, others * FP32_BYTES * STATISTICS["backward"])
    return seconds


def chunk_sizes(step: Step) -> list[int]:
    """Candidate chunk sizes: at least LEAST_CHUNK keys, a power of two per rank; and the batch."""
    shares = [1 << k for k in range(step.rows.bit_length())]
    sizes = [step.ranks * share for share in shares if share < step.rows]
    return [size for size in sizes if size >= LEAST_CHUNK] + [step.batch]


def best_chunk(step: Step, machine: Machine) -> int:
    """The smallest chunk size within NEAR_BEST of the fastest."""
    times = {c: step_seconds(step._replace(chunk=c), machine) for c in chunk_sizes(step)}
    return min(c for c, seconds in times.items() if seconds <= NEAR_BEST * min(times.values()))


def chunk_to_choose(ranks: int) -> int:
    """The recommended chunk size, for every batch size.

    Below 32,768 keys the host is slower than the GPU. With fewer than 512 keys per rank the latency
    of NCCL's ring exceeds the transfer time.
    """
    return max(1 << 15, 512 * ranks)


def hiding_chunk(step: Step, machine: Machine) -> int | None:
    """The smallest chunk size whose kernels take at least as long as its transfers in each pass."""

    def hides(size: int) -> bool:
        chunk = step._replace(chunk=size).chunks()[0]
        work = [chunk_seconds(step, walk, chunk, machine) for walk in LOSSES[step.loss]]
        return all(w.kernels >= w.arrival + w.scatter for w in work)

    return next((size for size in chunk_sizes(step) if hides(size)), None)


# Predictions for GPUs.


class Network(NamedTuple):
    """Published rates of one GPU in a node of 8, in bytes per second and direction."""

    nvlink: float
    nic: float
    low_latency: tuple[float, float, float]  # maximum of NCCL's LL protocol on 1, 2, more nodes
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
CHIPS = {"h100": "H100 SXM", "a100": "A100 SXM"}  # names in gpu_model.py
ROWS = 65536  # the batch for which the time per score is taken
# NCCL's cost model for rings (src/graph/tuning.cc, 2.28). Protocol: µs per call, µs per step inside
# a node, µs per step between nodes, and the fraction of the link rate. The fastest one is used.
PROTOCOLS = {
    "LL": (6.6, 0.6, 2.7, 0.5),
    "LL128": (14.0, 1.9, 4.0, 0.92),
    "Simple": (8.4, 3.4, 14.0, 1.0),
}
TREE = (6.8, 0.6, 5.0)  # the same µs for a small all-reduce (LL)
# Overhead of Python per chunk and pass (HOST), and per step (CALL), as scaling_check.py measures it
# on a CPU core. Assumed to be the same for the host of a GPU. HOST overlaps with the GPU's work on
# the previous chunk, CALL does not.
HOST, CALL = 0.25e-3, 1.7e-3


class Gpu:
    """A cluster of nodes with 8 GPUs and a network card per GPU."""

    def __init__(self, name: str):
        self.name, self.network = name, NETWORKS[name]
        self.host, self.call = HOST, CALL
        self.chip, self.rows = gpu_model.CHIPS[CHIPS[name]], gpu_model.load()
        self.memory = 1e12 * self.chip.memory * gpu_model.ASSUMPTIONS["memory"].ends.middle
        self.tiles = {
            kernel: self.rows[self.chip.arch, kernel]["tile"][:2]
            for kernel in ("forward clip", "panel clip", "panel siglip")
        }
        self.per_score = cache(self._per_score)

    def _per_score(self, kernels: str, dim: int) -> float:
        """The predicted seconds per element of S in bf16, the middle of the range."""
        design = gpu_model.DESIGNS["SigLIP" if kernels == "both" else "CLIP"]
        times = gpu_model.parts(design, self.chip, ROWS, dim, self.rows)
        names = ("forward",) if kernels == "forward" else ("W", "products")
        return sum(times[x].middle for x in names) * 1e-3 / ROWS**2

    def compute(self, walk: Walk, rows: int, keys: int, dim: int, itemsize: int) -> float:
        """The predicted time of whole waves of tiles, or of reading the features if that is longer;
        in backward plus the time of summing the gradients in fp32."""
        name = {"forward": "forward clip", "backward": "panel clip", "both": "panel siglip"}
        m, n = self.tiles[name[walk.kernels]]
        waves = math.ceil(math.ceil(rows / m) * math.ceil(keys / n) / self.chip.processors)
        scores = waves * self.chip.processors * m * n
        reads = (2 if walk.gradients else 1) * (rows + keys) * dim * itemsize / self.memory
        sums = (3 * rows + 2 * keys) * dim * FP32_BYTES / self.memory if walk.gradients else 0.0
        return max(scores * self.per_score(walk.kernels, dim), reads) + sums

    def all_gather(self, ranks: int, nbytes: int) -> float:
        """NCCL's ring: over NVLink inside a node, and over all 8 network cards at once between
        nodes."""
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
        """An assumption: the latency of an all-gather, and the GPU's own network card for data
        between nodes."""
        crossing = max(0, ranks - NODE) / max(1, ranks - 1)
        return self.all_gather(ranks, 0) + nbytes * crossing / self.network.nic

    def all_reduce(self, ranks: int) -> float:
        """An all-reduce of one number by NCCL's trees."""
        call, inside, outside = TREE
        nodes = -(-ranks // NODE)
        return (call + 2 * ((min(ranks, NODE) - 1) * inside + math.log2(nodes) * outside)) * 1e-6

    def hop(self, ranks: int, nbytes: int) -> float:
        """A send to the next rank. Between nodes it uses one network card."""
        call, inside, outside, _ = PROTOCOLS["Simple"]
        if ranks <= NODE:
            return (call + inside) * 1e-6 + nbytes / self.network.nvlink
        return (call + outside) * 1e-6 + nbytes / self.network.nic

    def together(self, compute: float, transfer: float) -> float:
        """An assumption: transfers do not slow the kernels down. The host prepares the next chunk
        at the same time."""
        return max(compute, transfer, self.host)


def rows_to_hide(gpu: Gpu, dim: int, ranks: int) -> float:
    """The rows per GPU from which the kernels of a large chunk hide its transfers.

    It is the ratio of both times per row, which does not depend on the batch size; the larger of
    the two passes.
    """
    out = 0.0
    for walk in TWO_WALKS:
        nbytes = dim * (2 + (FP32_BYTES if walk.gradients else 0))
        rate = 1e12 / (gpu.all_gather(ranks, 10**12) - gpu.all_gather(ranks, 0))
        out = max(out, nbytes / rate / gpu.per_score(walk.kernels, dim))
    return out


def most_gpus(batch: int, gpu: Gpu, dim: int, loss: str) -> int:
    """The largest number of GPUs on which the kernels take at least half of the step, 0 for none.
    On more GPUs, communication and the host take most of the time."""
    most = 0
    for ranks in ALL_RANKS:
        step = Step(ranks, batch // ranks, dim, loss=loss)
        if step.rows >= LEAST_ROWS:
            step = step._replace(chunk=best_chunk(step, gpu))
            if 2 * compute_seconds(step, gpu) >= step_seconds(step, gpu):
                most = ranks
    return most


# The table.


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


# The page.


def most_gpus_table() -> str:
    """Up to how many GPUs the kernels take at least half of a step."""
    lines = [
        "| global batch | " + " | ".join(f"{batch:,}" for batch in BATCHES) + " |",
        "|---" * (len(BATCHES) + 1) + "|",
    ]
    for gpu, dim, loss in (("h100", 512, "clip"), ("h100", 768, "clip"),
                           ("h100", 512, "siglip"), ("a100", 512, "clip")):  # fmt: skip
        most = [most_gpus(batch, Gpu(gpu), dim, loss) for batch in BATCHES]
        name = f"{gpu.upper()}, D = {dim}" + ", SigLIP" * (loss == "siglip")
        lines.append(f"| {name} | " + " | ".join(f"{x:,}" if x else "none" for x in most) + " |")
    return "\n".join(lines)


def figures() -> str:
    """The predictions that docs/scaling.md names in its text."""
    h100, a100 = Gpu("h100"), Gpu("a100")

    def hidden(gpu: Gpu, dim: int) -> str:
        return " and ".join(f"{rows_to_hide(gpu, dim, ranks):,.0f}" for ranks in (NODE, 2 * NODE))

    small, large = (step_seconds(Step(512, 8192, chunk=x), h100) for x in (8192, 131072))
    steps = [Step(ranks, (1 << 19) // ranks) for ranks in RANKS]
    ms = [1e3 * step_seconds(s._replace(chunk=best_chunk(s, h100)), h100) for s in steps]
    on = ", ".join(f"{x:.0f} on {ranks:,}" for x, ranks in zip(ms, RANKS, strict=True))
    ring = []
    for ranks in (512, 4096):
        rows = (row(Step(ranks, b // ranks), h100) for b in BATCHES if b // ranks >= LEAST_ROWS)
        ratios = [r["ring_ms"] / r["step_ms"] for r in rows]
        ring.append(f"{min(ratios):.1f} to {max(ratios):.0f} times as long on {ranks:,} GPUs")
    bullets = (
        "- **Rows per GPU** from which the kernels hide large chunks, inside a node and across"
        f" nodes: on H100s {hidden(h100, 512)} (D = 512; {hidden(h100, 768)} at D = 768), on A100s"
        f" {hidden(a100, 512)}.",
        f"- **A batch of 512K on H100s**, ms per step: {on} GPUs. More GPUs hardly make the loss"
        " faster, and then slower.",
        "- **Small chunks are slow**: with 16 rows from each of 512 GPUs (8,192 keys), a step with"
        f" a batch of 4M takes {small:.1f} s, with 131,072 keys {large:.2f} s.",
        "- **The ring** (`ITO_TRANSPORT=ring`) uses one network card per node where an all-gather"
        f" uses eight, and has W chunks for any chunk size. A step takes {' and '.join(ring)}.",
    )
    return "\n".join(fill(x, 100, subsequent_indent="  ") for x in bullets)


def page(rows: list[dict]) -> dict[str, str]:
    """What stands between the marks of docs/scaling.md. rows: of CLIP on H100, D = 512."""
    return {"figures": figures(), "most": most_gpus_table(), "steps": markdown(rows)}
