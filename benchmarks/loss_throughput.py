"""Speed, memory and error of the contrastive losses, for each backend and package installed here.

    python benchmarks/loss_throughput.py            N = 4096 and 8192, fp32 and bf16
    python benchmarks/loss_throughput.py --device cuda    N = 8192 and 32768
    python benchmarks/loss_throughput.py --quick    N = 512, fp32, within a minute
    python benchmarks/loss_throughput.py --loss clip --batch 64 128 --dtype fp32

Prints a table for each loss, dtype and N. Writes all numbers as JSON, and a picture for each dtype.
`contenders.py` defines what is compared, `measure.py` how it is measured.

Columns:
forward, backward, both  median ms; p20 – p80: the 20th to 80th percentile of both
units      both, divided by the time of one torch.mm of N × D by D × N in the same dtype (2N rows
           for NT-Xent and SupCon), measured in turns with the contenders
× eager    speed relative to the eager form
GEMMs      the number of matrix products of that size that ran
of mm      GEMMs / units: the fraction of the time that torch.mm would need for them
of peak    their fraction of the processor's multiply-add peak, if the native module measures it
of limit   the same for the products that the best known algorithm needs: 3 for two feature
           matrices (the scores once, two gradients), 1.5 for NT-Xent and SupCon, whose scores are
           symmetric; products that are computed again do not count
extra MiB  peak memory beyond inputs and gradients
error      relative to fp64: of the loss, of the gradients of the features, and of the gradient of
           log scale (and bias); – without a gradient
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path

import torch
from contenders import (
    ALL_LOSSES,
    CONTENDERS,
    LOSSES,
    ONE_TOWER,
    OTHER_LOSSES,
    Contender,
    exact,
    make_inputs,
    through_normalise,
)
from inputs import Inputs
from measure import (
    CAN_MEASURE_PEAK,
    Gemm,
    MemoryProbe,
    Step,
    copy_bandwidth,
    gemm_flops,
    instruction_set,
    peak_flops,
    relative_error,
    step,
    time_in_turns,
)
from torch import Tensor

import ito_kernels

MIB = 1 << 20
NEEDED_GEMMS = {loss: 1.5 if loss in ONE_TOWER else 3.0 for loss in LOSSES}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUICK_COMPILE_SECONDS = 20  # after the start; with a cold cache torch.compile takes longer
MEMORY_CURVE_MAX_N = 16384  # the memory curve goes up to this N, even if the tables do not
EXACT_MAX_ROWS = 16384  # above, the fp64 loss would take longer than all contenders
DENSE_EXACT_MAX_ROWS = 4096  # 128 MiB for each fp64 matrix


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = {"date": datetime.now().isoformat(timespec="seconds"), **machine(args.device)}
    print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    if args.device == "cpu" and not CAN_MEASURE_PEAK:
        print("extra memory is not measured: /proc/self/clear_refs cannot be written here")
    report |= {"limits": limits(args), "rows": [], "memory": [], "skipped": []}
    probe = MemoryProbe(args.device, args.dim, QUICK_COMPILE_SECONDS if args.quick else math.inf)
    for dtype, loss, n in product(args.dtype, args.loss, args.batch):
        compare(loss, dtype, n, args, probe, report)
    if not args.quick:
        memory_over_n(args, probe, report)
    save(report, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, within a minute")
    parser.add_argument("--loss", nargs="+", choices=ALL_LOSSES, default=LOSSES, metavar="LOSS")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--contender", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N")
    parser.add_argument("--dim", type=positive, default=512, metavar="D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; PyTorch's number by default")
    parser.add_argument("--seconds", type=float, help="timing per table, at least 3 rounds")
    parser.add_argument("--out", type=Path, help="the JSON file; pictures go to its folder")
    args = parser.parse_args()
    if not args.batch:
        sizes = [8192, 32768] if args.device == "cuda" else [4096, 8192]
        args.batch = [512] if args.quick else sizes
    args.dtype = args.dtype or (["fp32"] if args.quick else ["fp32", "bf16"])
    if args.seconds is None:
        args.seconds = 1 if args.quick else 30
    if args.out is None:
        stem = f"{args.device}-{datetime.now():%Y%m%d-%H%M%S}{'-quick' * args.quick}.json"
        args.out = Path(__file__).parent / "results" / stem
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def machine(device: str) -> dict[str, str | int]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    facts = {"device": device, "cpu": cpu or platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts | {"torch": torch.__version__, "ito_kernels": ito_kernels.__version__}


def limits(args: argparse.Namespace) -> dict:
    """What the processor can do at most: multiply-adds per dtype, and copying. Printed too."""
    if args.device != "cpu":
        return {}
    found: dict = {"copy_bytes_per_second": copy_bandwidth(), "peak_flops": {}}
    print(f"copying reads and writes {found['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    kinds = {name: (DTYPES[name], None) for name in args.dtype}
    if "fp32" in kinds and instruction_set() == "amx_bf16":
        kinds["fp32 without AMX"] = (torch.float32, "avx512")
    for name, (dtype, isa) in kinds.items():
        one, every = (peak_flops(dtype, threads, isa) for threads in (1, None))
        found["peak_flops"][name] = {"one_thread": one, "all_threads": every}
        if one and every:
            print(
                f"{name} multiply-adds: {one / 1e9:.0f} GFLOP/s on one thread, "
                f"{every / 1e9:.0f} on {torch.get_num_threads()}"
            )
    return found


def compare(
    loss: str, dtype: str, n: int, args: argparse.Namespace, probe: MemoryProbe, report: dict
) -> None:
    """One table: every contender of a loss at one size."""
    torch._dynamo.reset()  # earlier tables would count towards the recompilation limit
    x = make_inputs(loss, n, args.dim, DTYPES[dtype], args.device)
    unit = Gemm(2 * n if loss in ONE_TOWER else n, args.dim, like=x.a)
    exact_max_rows = DENSE_EXACT_MAX_ROWS if loss in OTHER_LOSSES else EXACT_MAX_ROWS
    truth = exact(loss, x) if unit.rows <= exact_max_rows else None
    peak = peak_flops(DTYPES[dtype]) if args.device == "cpu" else None
    problem = {"loss": loss, "dtype": dtype, "n": n, "d": args.dim}

    rows, runs = {}, {"torch.mm": unit}
    for contender in CONTENDERS:
        if loss not in contender.losses or contender.name not in args.contender:
            continue
        entry = problem | {"contender": contender.name}
        if args.quick and contender.not_quick:
            skip(entry | {"reason": f"left out by --quick: {contender.not_quick}"}, report)
            continue
        try:
            run = partial(step, contender.prepare(loss, args.device), loss, x)
        except (ImportError, RuntimeError) as error:
            skip(entry | {"reason": str(error)}, report)
            continue
        probed = probe(contender, loss, n, DTYPES[dtype])
        if probed.failure:
            skip(entry | {"reason": probed.failure}, report)
            continue
        first = run()
        flops = gemm_flops(run, contender.native)
        rows[contender.name] = entry | {
            "gemms": None if flops is None else flops / unit.flops,
            "extra_bytes": probed.extra_bytes,
            "error": truth and errors(contender, x, first, *truth),
        }
        runs[contender.name] = run
    if not rows:
        return

    times = time_in_turns(runs, args.seconds)
    unit_ms, eager_ms = (
        times[name]["both"]["median"] if name in times else None for name in ("torch.mm", "eager")
    )
    for name, row in rows.items():
        row |= times[name]
        ms = row["both"]["median"]
        at_peak_ms = peak and unit.flops / peak * 1e3  # one product
        needed = NEEDED_GEMMS.get(loss)
        row |= {
            "unit_ms": unit_ms,
            "units": ms / unit_ms,
            "vs_eager": eager_ms and eager_ms / ms,
            "share_of_peak": row["gemms"] and at_peak_ms and row["gemms"] * at_peak_ms / ms,
            "gemms_needed": needed,
            "share_of_limit": needed and at_peak_ms and needed * at_peak_ms / ms,
        }
    report["rows"] += rows.values()
    print_table(list(rows.values()), unit.flops / unit_ms / 1e6, peak)


def errors(
    contender: Contender, x: Inputs, got: Step, loss: Tensor, grads: tuple[Tensor, ...]
) -> dict[str, float | None]:
    """Relative errors of the loss and its gradients; None for the scale of a contender that has no
    gradient for it."""
    features, others = grads[:2], grads[2:]
    if contender.normalises:
        features = tuple(through_normalise(*pair) for pair in zip(x[:2], features, strict=True))
    learns_scale = all(grad is not None for grad in got.grads)
    return {
        "loss": relative_error((got.loss,), (loss,)),
        "features": relative_error(got.grads[:2], features),
        "scale": relative_error(got.grads[2:], others) if learns_scale else None,
    }


def skip(entry: dict, report: dict) -> None:
    """Record a contender that did not run and the reason. Prints each reason once per contender."""
    printed = any(
        (entry["contender"], entry["reason"]) == (old["contender"], old["reason"])
        for old in report["skipped"]
    )
    report["skipped"].append(entry)
    if not printed:
        print(f"without {entry['contender']} in {entry['loss']}: {entry['reason']}", flush=True)


COLUMNS = (
    ("contender", "{:<24}"),
    ("forward", "{:>9}"),
    ("backward", "{:>9}"),
    ("both ms", "{:>9}"),
    ("p20 – p80", "{:>17}"),
    ("units", "{:>6}"),
    ("× eager", "{:>8}"),
    ("GEMMs", "{:>6}"),
    ("of mm", "{:>6}"),
    ("of peak", "{:>8}"),
    ("of limit", "{:>8}"),
    ("extra MiB", "{:>10}"),
    ("error: loss", "{:>12}"),
    ("features", "{:>9}"),
    ("scale", "{:>9}"),
)


def print_table(rows: list[dict], unit_gflops: float, peak: float | None) -> None:
    first = rows[0]
    print(
        f"\n{first['loss']} {first['dtype']}, N = {first['n']}, D = {first['d']}:"
        f" one torch.mm {first['unit_ms']:.2f} ms, {unit_gflops:.0f} GFLOP/s;"
        + (f" peak {peak / 1e9:.0f} GFLOP/s" if peak else " peak not measured")
    )
    layout = " ".join(column for _, column in COLUMNS)
    print(layout.format(*(name for name, _ in COLUMNS)))
    for row in rows:
        both, error = row["both"], row["error"] or {}
        cells = (
            row["contender"],
            _cell(row["forward"]["median"], ".2f"),
            _cell(row["backward"]["median"], ".2f"),
            _cell(both["median"], ".2f"),
            f"{both['p20']:.2f} – {both['p80']:.2f}",
            _cell(row["units"], ".2f"),
            _cell(row["vs_eager"], ".2f"),
            _cell(row["gemms"], ".2f"),
            _cell(row["gemms"] and row["gemms"] / row["units"], ".0%"),
            _cell(row["share_of_peak"], ".0%"),
            _cell(row["share_of_limit"], ".0%"),
            _cell(row["extra_bytes"] and row["extra_bytes"] / MIB, ".1f"),
            *(_cell(error.get(name), ".1e") for name in ("loss", "features", "scale")),
        )
        print(layout.format(*cells), flush=True)


def _cell(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def memory_over_n(args: argparse.Namespace, probe: MemoryProbe, report: dict) -> None:
    """Measure the extra memory of the first loss at more sizes, for the picture."""
    loss, largest = args.loss[0], max(args.batch)
    measured = {(r["contender"], r["dtype"], r["n"]) for r in report["rows"] if r["loss"] == loss}
    sizes = {max(1, largest // k) for k in (8, 4, 2)} | {
        max(largest, min(2 * largest, MEMORY_CURVE_MAX_N))
    }
    for dtype, n, contender in product(args.dtype, sorted(sizes), CONTENDERS):
        ran = any((contender.name, dtype, other) in measured for other in args.batch)
        if not ran or (contender.name, dtype, n) in measured:
            continue
        probed = probe(contender, loss, n, DTYPES[dtype])
        entry = {"loss": loss, "dtype": dtype, "n": n, "d": args.dim, "contender": contender.name}
        if probed.failure:
            skip(entry | {"reason": probed.failure}, report)
        else:
            report["memory"].append(entry | {"extra_bytes": probed.extra_bytes})


def save(report: dict, args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{args.out}")
    try:
        from plot import draw
    except ImportError as error:
        print(f"no picture: {error}")
        return
    for dtype in args.dtype:
        picture = args.out.with_name(f"{args.out.stem}-{dtype}.png")
        draw(report, dtype, picture)
        print(picture)


if __name__ == "__main__":
    main()
