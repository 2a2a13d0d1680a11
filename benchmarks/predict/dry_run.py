"""Every loss with every option on a pretended GPU, and every kernel that they ask for, compiled.

    python benchmarks/predict/dry_run.py [--host] [--arch 90] [--dtype bf16] [--dim 64 768]
                                         [--only REGEX] [--jobs N] [--limit SECONDS] [--write]

The losses and options are those of tests/support/losses_table.py. Each call, forward and backward,
drives the host code of the Triton backend (dry_device.py). It fails on an error of the host, on a
tensor descriptor or a grid that CUDA would refuse, and where a call waits for the device that is
not known to. The kernels that the calls ask for are compiled and read: it fails on a compile error,
a spill of more than a register, too much shared memory or memory that is not PyTorch's.

The table dry_run.csv keeps what was read of each kernel, under a hash of its code and of what it is
compiled for, for each version of Triton; only what has changed is compiled. Nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, get_type_hints
from unittest.mock import patch

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
import triton
from dry_device import META, PROCESSORS, Variant, pretended
from gpu_static_code import run_tool
from support.losses_table import ROWS, Inputs
from torch import Tensor

import ito_kernels as ik
from ito_kernels.similarity.triton import small

DTYPES = {  # (features, torch.set_float32_matmul_precision)
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32x3": (torch.float32, "high"),
    "tf32": (torch.float32, "medium"),
}
DIMS = (64, 128, 512, 768, 1024, 1152)
ROWS_OF_A_CALL = 40
# Of one block. GPUs of compute capability 8.6, 8.9 and 12.0 take the kernels of 8.0: 99 KiB.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_MEMORY = 512  # columns
ONE_REGISTER = 8  # bytes of the stack, which is aligned
TABLE = Path(__file__).parent / "results" / "dry_run.csv"
PAGE = Path(__file__).parents[2] / "docs" / "gpu-variants.md"
# These wait for the device, and say so: to check row numbers, and for a generator on the CPU.
WAITS = {"options.py:check_row_numbers", "symile.py:shuffled"}


# ---- calls


def calls(dtype: torch.dtype, d: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, function that gives the loss) of every row of the table, with a learned scale, and of
    features and scales of other kinds."""
    n, large = ROWS_OF_A_CALL, 70_000  # the latter has several panels of W

    def features(*shape: int, learned: bool = True) -> Tensor:
        return torch.empty(*(shape or (n, d)), dtype=dtype, device="cuda", requires_grad=learned)

    def scale() -> Tensor:
        return torch.empty((), device="cuda", requires_grad=True)

    def call(loss: str, option: str) -> Tensor:
        row = ROWS[loss][option]
        x, y, z = features(), features(), features(learned=False)
        with META:  # what is made on the default device
            args, options = row.arguments(Inputs(x, y, z, torch.arange(n), n, scale()))
        args = [x.to("cuda") if isinstance(x, Tensor) else x for x in args]
        options = {k: x.to("cuda") if isinstance(x, Tensor) else x for k, x in options.items()}
        return row.value(getattr(ik, loss)(*args, **options))

    for loss, options in ROWS.items():
        for option in options:
            yield f"{loss} {option}".strip(), partial(call, loss, option)
    clip, siglip = ik.clip_loss, ik.siglip_loss
    yield "clip_loss, frozen keys", lambda: clip(features(), features(learned=False), scale())
    yield "clip_loss, fixed scale", lambda: clip(features(), features(), 20.0)
    yield "clip_loss, many rows", lambda: clip(features(large, d), features(large, d), scale())
    with_part = patch.dict(os.environ, ITO_TILE_CACHE_BYTES=str(4 << 30))
    yield (
        "clip_loss, a part of many rows kept",
        with_part(lambda: clip(features(large, d), features(large, d), scale())),
    )
    yield (
        "siglip_loss, many rows",
        lambda: siglip(features(large, d), features(large, d), 9.0, -9.0),
    )
    yield "clip_loss, one row", lambda: clip(features(1, d), features(1, d), scale())
    yield "clip_loss, expanded", lambda: clip(features(1, d).expand(n, d), features(), scale())
    yield "clip_loss, transposed", lambda: clip(features(d, n).T, features(), scale())
    yield "clip_loss, part of wider rows", lambda: clip(features(n, 2 * d)[:, :d], features(), 9.0)
    yield "siglip_loss, learned bias", lambda: siglip(features(), features(), scale(), scale())
    yield "siglip_loss, frozen keys", lambda: siglip(features(), features(learned=False), 9.0, -9.0)


@dataclass
class Report:
    """What the calls of one architecture and dtype did."""

    count: int = 0
    errors: list[str] = field(default_factory=list)
    variants: dict[str, tuple[Variant, str]] = field(default_factory=dict)  # with the first call


def host(arch: int, dtype_name: str, dims: list[int], only: str = "") -> Report:
    """Runs the calls whose name `only` finds on a pretended GPU."""
    report = Report()
    dtype, precision = DTYPES[dtype_name]
    torch.set_float32_matmul_precision(precision)
    with pretended(arch) as seen:
        for d in dims:
            for name, call in calls(dtype, d):
                if not re.search(only, name):
                    continue
                name = f"sm_{arch} {dtype_name} D={d} {name}"
                report.count += 1
                seen.waits.clear()
                seen.launches.clear()
                try:
                    torch.autograd.backward(call())
                    if "combine_kernel" in seen.launches:  # and as with more rows
                        with patch.object(small, "LARGEST", 0):
                            torch.autograd.backward(call())
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = (str(error).strip().splitlines() or [""])[0][:200]
                    at = f"{Path(where.filename).name}:{where.lineno}"
                    report.errors.append(f"{name}: {type(error).__name__}: {text} ({at})")
                if waits := seen.waits - WAITS:
                    report.errors.append(f"{name}: waits for the device in {', '.join(waits)}")
                for key in seen.variants.keys() - report.variants.keys():
                    report.variants[key] = seen.variants[key], name
    return report


# ---- compilation


class Compiled(NamedTuple):
    """A line of the table."""

    key: str
    triton: str
    arch: int
    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    fault: str


def compiled(variant: Variant) -> Compiled:
    """Compiles a variant and reads its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    options["enable_fp_fusion"] = variant.fusion
    names = variant.key, triton.__version__, variant.arch, variant.kernel
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        try:
            kernel = triton.compile(source, GPUTarget("cuda", variant.arch, 32), options)
        except Exception as error:
            while error.__cause__:  # in a function that the kernel calls
                error = error.__cause__
            text = (str(error).strip().splitlines() or [""])[-1][:200]
            return Compiled(*names, 0, 0, 0, f"{type(error).__name__}: {text}")
        path = Path(cache) / "cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(path))
    registers, spilled = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
    data = kernel.metadata
    faults = []
    # The kernels have no other use for a stack. One register on it is mostly what ptxas gives up to
    # fit one more block on a multiprocessor: with all 255 allowed it keeps none.
    if spilled > ONE_REGISTER:
        faults.append(f"spills {spilled} B")
    if data.shared > SHARED[variant.arch]:
        faults.append(f"shared memory: {data.shared} B of {SHARED[variant.arch]}")
    if (data.tmem_size or 0) > TENSOR_MEMORY:
        faults.append(f"tensor memory: {data.tmem_size} columns of {TENSOR_MEMORY}")
    if data.global_scratch_size or data.profile_scratch_size:
        faults.append("memory that is not PyTorch's")
    return Compiled(*names, registers, spilled, data.shared, ", ".join(faults))


def read_table() -> list[Compiled]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as f:
        kinds = get_type_hints(Compiled).values()
        return [Compiled(*(kind(x) for kind, x in zip(kinds, line, strict=True)))
                for line in list(csv.reader(f))[1:]]  # fmt: skip


def write_table(rows: list[Compiled]) -> None:
    with TABLE.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(Compiled._fields)
        writer.writerows(sorted(rows, key=lambda x: (x.triton, x.arch, x.kernel, x.key)))


# ---- reports


def summary(rows: list[Compiled]) -> list[str]:
    """A line for each version of Triton, architecture and kernel, as a Markdown table."""
    lines = [
        "| Triton | GPU | kernel | variants | one register on the stack | more spilled"
        " | most registers | most shared memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in sorted({(x.triton, x.arch, x.kernel) for x in rows}):
        of_group = [x for x in rows if (x.triton, x.arch, x.kernel) == group]
        version, arch, kernel = group
        lines.append(
            f"| {version} | sm_{arch} | `{kernel}` | {len(of_group)}"
            f" | {sum(0 < x.spilled <= ONE_REGISTER for x in of_group)}"
            f" | {sum(x.spilled > ONE_REGISTER for x in of_group)}"
            f" | {max(x.registers for x in of_group)}"
            f" | {max(x.shared for x in of_group) / 1024:.0f} of {SHARED[arch] >> 10} KiB |"
        )
    return lines


def write_page(lines: list[str]) -> None:
    """Replaces what stands between the marks of the page."""
    start, end = "<!-- variants -->", "<!-- end of variants -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="store_true", help="compile nothing")
    parser.add_argument("--arch", type=int, nargs="+", default=[*PROCESSORS], choices=PROCESSORS)
    parser.add_argument("--dtype", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--dim", type=int, nargs="+", default=[*DIMS])
    parser.add_argument("--only", default="", help="the calls whose name this regex finds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fresh", action="store_true", help="compile what the table has, too")
    parser.add_argument("--limit", type=float, help="seconds, after which no more is compiled")
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name} and {PAGE.name}")
    o = parser.parse_args()
    failures: list[str] = []
    count = 0
    wanted: dict[str, tuple[Variant, str]] = {}
    with ProcessPoolExecutor(o.jobs, mp_context=get_context("spawn")) as pool:
        items = product(o.arch, o.dtype, o.dim)
        for future in [pool.submit(host, arch, dtype, [d], o.only) for arch, dtype, d in items]:
            report = future.result()
            failures += report.errors
            count += report.count
            wanted = report.variants | wanted
        print(f"triton {triton.__version__}, torch {torch.__version__}: {count} calls ask for"
              f" {len(wanted)} kernels", flush=True)  # fmt: skip
        for line in failures:
            print(line)
        if not o.host:
            failures += compile_all(pool, wanted, o)
    if failures:
        sys.exit(f"{len(failures)} failures")


def compile_all(pool: ProcessPoolExecutor, wanted: dict, o: argparse.Namespace) -> list[str]:
    """Compiles the wanted variants that the table does not have. Prints and returns failures."""
    table = read_table()
    here = {} if o.fresh else {x.key: x for x in table if x.triton == triton.__version__}
    known = [here[key] for key in wanted if key in here]
    started = time.monotonic()
    futures = [pool.submit(compiled, wanted[key][0]) for key in wanted if key not in here]
    done, left = wait(futures, o.limit)
    pool.shutdown(cancel_futures=True)
    rows = known + [x.result() for x in futures if x in done]
    seconds = time.monotonic() - started
    print(f"{len(known)} known, {len(done)} compiled in {seconds:.0f} s", flush=True)
    failures = [f"{x.fault}: {wanted[x.key][0]} [{wanted[x.key][1]}]" for x in rows if x.fault]
    print("\n".join(["", *summary(rows), "(nothing was run on a GPU)", "", *failures]))
    if left:
        print(f"{len(left)} not compiled in {o.limit:.0f} s: without --limit all are")
    if o.write:
        everything = (o.arch, o.dtype, o.dim, o.only) == ([*PROCESSORS], [*DTYPES], [*DIMS], "")
        rows += [x for x in table if x.triton != triton.__version__
                 or (not everything and x.key not in wanted)]  # fmt: skip
        write_table(rows)
        write_page(summary(rows))
    return failures


if __name__ == "__main__":
    main()
