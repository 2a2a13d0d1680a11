"""Time and memory of large batches: CLIP, fp32, forward and backward, on the CPU backend.

    python benchmarks/scale.py            up to N = 262,144 at D = 64 and N = 65,536 at D = 768:
                                          8 minutes on two cores
    python benchmarks/scale.py --quick    up to N = 4,096, in seconds
    python benchmarks/scale.py --dim 64 --batch 262144

Each size runs in a fresh process. A line shows how many of the matrix products are done and the
time left. Prints a row for each size, appends it to a file of JSON lines, and draws a picture of
all rows of that file.

Columns:
seconds    of the first step; the median where several fit into one second
GFLOP/s    of the matrix products that ran
products   their number, in products of N × D by D × N: 4, less the scores that are kept
extra MiB  peak memory beyond inputs and gradients
bound MiB  what it may be, see `bound`
error      of the loss, of the gradients of the features, and of the gradient of log scale, relative
           to fp64. The batch holds each of DISTINCT pairs N / DISTINCT times, in random order. So
           the loss is that of the distinct pairs plus log(N / DISTINCT), and every gradient follows
           from theirs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

import torch
from contenders import exact, ito, make_inputs
from inputs import Inputs
from loss_throughput import machine, positive
from measure import (
    CAN_MEASURE_PEAK,
    WARMUP_ROWS,
    peak_memory,
    relative_error,
    reset_peak,
    step,
)
from torch import Tensor
from tqdm import tqdm

from ito_kernels.similarity.budget import tile_cache_left
from ito_kernels.similarity.native import MISSING, _native

SIZES = {64: [1 << k for k in range(12, 19)], 768: [1 << k for k in range(12, 17)]}
QUICK_SIZES = {64: [1024, 2048, 4096], 768: [1024]}
DISTINCT = 1024
MIB = 1 << 20
REPEAT_SECONDS = 1.0  # small sizes are repeated for so long
REFRESH_SECONDS = 0.5  # of the line of progress
LAYOUT = "{:>9} {:>5} {:>9} {:>8} {:>9} {:>10} {:>10} {:>12} {:>9} {:>9}"
COLUMNS = ("N", "D", "seconds", "GFLOP/s", "products", "extra MiB", "bound MiB")


def main() -> None:
    args = parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine("cpu").items()))
    if not CAN_MEASURE_PEAK:
        print("extra memory is not measured: /proc/self/clear_refs cannot be written here")
    print(LAYOUT.format(*COLUMNS, "error: loss", "features", "scale"), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for d, sizes in args.sizes.items():
        for n in sizes:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                row = fresh.submit(measure_size, n, d, args.threads).result()
            print_row(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"\n{args.out}")
    from scale_plot import draw

    draw([json.loads(line) for line in args.out.open()], args.out.with_suffix(".png"))
    print(args.out.with_suffix(".png"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--batch", nargs="+", type=batch, metavar="N")
    parser.add_argument("--dim", nargs="+", type=positive, metavar="D", help="64 and 768")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="the file of JSON lines; it may exist")
    args = parser.parse_args()
    if MISSING:
        parser.error(MISSING)
    sizes = QUICK_SIZES if args.quick else SIZES
    args.sizes = {d: args.batch or sizes.get(d, sizes[64]) for d in args.dim or sizes}
    if args.out is None:
        stem = f"scale-{datetime.now():%Y%m%d-%H%M%S}{'-quick' * args.quick}.jsonl"
        args.out = Path(__file__).parent / "results" / stem
    return args


def batch(text: str) -> int:
    value = positive(text)
    if value % DISTINCT:
        raise argparse.ArgumentTypeError(f"must be a multiple of {DISTINCT}, got {value}")
    return value


def measure_size(n: int, d: int, threads: int) -> dict:
    """One row of the report. Runs in a process of its own, whose peak memory it measures."""
    torch.set_num_threads(threads)
    run = ito("cpu", "clip")
    step(run, "clip", make_inputs("clip", WARMUP_ROWS, d, torch.float32, "cpu"))
    x, truth = repeated_pairs(n, d)
    product = 2 * n * n * d
    kept = min(1.0, tile_cache_left() / (4 * n * n))  # of the scores
    before, flops = reset_peak("cpu"), _native.gemm_flops()
    with progress(f"N = {n:,}, D = {d}", (4 - kept) * product):
        first = step(run, "clip", x)
    flops = _native.gemm_flops() - flops
    returned = sum(grad.nbytes for grad in first.grads)
    extra = None if before is None else max(0, peak_memory("cpu") - before - returned)
    seconds = [(first.forward + first.backward) / 1e3]
    while sum(seconds) < REPEAT_SECONDS:
        again = step(run, "clip", x)
        seconds.append((again.forward + again.backward) / 1e3)
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        **machine("cpu"),
        **{"loss": "clip", "dtype": "fp32", "n": n, "d": d},
        "seconds": statistics.median(seconds),
        "products": flops / product,
        "extra_bytes": extra,
        "bound_bytes": bound(n, d, threads),
        "error": {
            "loss": relative_error((first.loss,), truth[:1]),
            "features": relative_error(first.grads[:2], truth[1:3]),
            "scale": relative_error(first.grads[2:], truth[3:]),
        },
    }


def repeated_pairs(n: int, d: int) -> tuple[Inputs, tuple[Tensor, ...]]:
    """A batch of n pairs, of which DISTINCT are distinct, and its loss and gradients in fp64."""
    distinct, times = make_inputs("clip", DISTINCT, d, torch.float32, "cpu"), n // DISTINCT
    loss, (da, db, d_scale) = exact("clip", distinct)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % DISTINCT
    a, b = (side.detach()[order].requires_grad_() for side in distinct[:2])
    x = distinct._replace(a=a, b=b, ids=torch.arange(n))
    return x, (loss + math.log(times), da[order] / times, db[order] / times, d_scale)


def bound(n: int, d: int, threads: int) -> int:
    """The extra bytes that a batch may take: linear in n, but for 5 bytes for each tile.

    copies: of the columns in fp32, packed for the scores, packed for the gradients, and the sum of
    their gradient. vectors: scales, biases, keys, statistics and weights of each row and column,
    and four running statistics of the columns for each thread. tiles: of about 256 × 256, whether
    each has positives, and its turn. kept: the scores. Last, the tiles in work, and what blocks are
    rounded up to.
    """
    copies = 3 * 4 * n * d
    vectors = (104 + 16 * threads) * n
    tiles = 5 * (n // 256) ** 2
    kept = min(tile_cache_left(), 7 * n * n)
    return copies + vectors + tiles + kept + (16 + 2 * threads) * MIB


@contextmanager
def progress(name: str, flops: float) -> Iterator[None]:
    """Shows which part of `flops` the CPU kernels have done, and the time left."""
    start, finished = _native.gemm_flops(), threading.Event()
    with tqdm(
        total=flops,
        smoothing=0,  # the mean speed since the start
        bar_format=name + ": {percentage:3.0f} % of the products, {elapsed} gone, {remaining} left",
    ) as line:

        def show() -> None:
            line.n = min(flops, _native.gemm_flops() - start)
            line.refresh()

        def watch() -> None:
            while not finished.wait(REFRESH_SECONDS):
                show()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            show()


def print_row(row: dict) -> None:
    n, d, seconds, products, extra = (
        row[key] for key in ("n", "d", "seconds", "products", "extra_bytes")
    )
    cells = (
        f"{n:,}",
        d,
        f"{seconds:.3f}",
        f"{products * 2 * n * n * d / seconds / 1e9:.0f}",
        f"{products:.2f}",
        "–" if extra is None else f"{extra / MIB:.1f}",
        f"{row['bound_bytes'] / MIB:.1f}",
        *(f"{row['error'][name]:.1e}" for name in ("loss", "features", "scale")),
    )
    print(LAYOUT.format(*cells), flush=True)


if __name__ == "__main__":
    main()
