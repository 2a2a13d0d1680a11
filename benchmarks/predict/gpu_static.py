"""The GPU kernels' machine code, without a GPU: resources, instructions, bank conflicts, times.

    python benchmarks/predict/gpu_static.py [--only cuda] [--arch sm_90] [--out FILE]
                                            [--page docs/gpu-static.md]

Compiles variants of the Triton kernels for sm_80, sm_90, sm_100 and gfx942 (gpu_static_triton.py:
the plain CLIP and SigLIP losses, and options alone and together) and the CUDA kernels for what
wheels are built for (gpu_static_cuda.py), and fails on a spill, where matrix instructions are
missing, or on a bank conflict. The times are predictions from instruction counts and published
rates (gpu_static_code.py), which no kernel reaches: lower bounds. Nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gpu_static_code as code
import gpu_static_cuda as cuda
import gpu_static_triton as triton


def work(options: argparse.Namespace) -> list[tuple]:
    """The compilations as tuples (function, *arguments)."""
    out = []
    if "triton" in options.only:
        out += [
            (triton.compile_one, arch, arithmetic, name)
            for arch in options.arch
            if arch in triton.TARGETS
            for arithmetic in triton.ARCHS[arch].forward
            for name in triton.variants(triton.ARCHS[arch], arithmetic)
        ]
    if "cuda" in options.only:
        out += [
            (cuda.compile_one, source, arch)
            for arch in options.arch
            if arch in cuda.ARCHS
            for source in cuda.SOURCES
        ]
    return out


def compiled(options: argparse.Namespace) -> tuple[dict[str, list[dict]], list[str]]:
    """Run all compilations. Returns the rows of the kernels by backend, and the failures."""
    rows, failures = {"triton": [], "cuda": []}, []
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [(item, pool.submit(*item)) for item in work(options)]
        for (function, *_), future in futures:
            source = "triton" if function is triton.compile_one else "cuda"
            results = future.result()
            for r in results if isinstance(results, list) else [results]:
                rows[source].append(r)
                name = f"{source} {r['arch']} {r['arithmetic']} {r['kernel']}"
                m, n, k, warps, stages = r["tile"]
                print(
                    f"{name}: {m}x{n}x{k} {warps} warps {stages} stages, {r['registers']} registers"
                    f", {r['spills']} spilled, {r['shared']} B shared"
                    f", {r['matrix_instructions']} matrix instructions",
                    flush=True,
                )
                if r["spills"]:
                    failures.append(f"{name}: spills")
                if r["arithmetic"] != "ieee" and not r["matrix_instructions"]:
                    failures.append(f"{name}: no matrix instruction")
    return rows, failures


def predictions(rows: dict[str, list[dict]]) -> list[dict]:
    """Predicted times in bf16. For the CUDA kernels only on the A100: Hopper reaches its published
    rate only with wgmma instructions, which they do not use."""
    half = [r for r in rows["triton"] if r["arithmetic"] == "half"]
    bf16 = [r for r in rows["cuda"] if r["arithmetic"] == "bf16"]
    parts = (("triton", half, triton.PARTS, code.CHIPS), ("cuda", bf16, cuda.PARTS, ("A100 SXM",)))
    out = [
        {"kernels": source} | p
        for source, results, losses, chips in parts
        for p in code.predict(results, losses, chips)
    ]
    return sorted(out, key=lambda p: (p["loss"], list(code.CHIPS).index(p["chip"]), p["n"], p["d"]))


def prediction_table(predictions: list[dict]) -> list[str]:
    """The predictions as a Markdown table."""
    lines = [
        "| loss | chip | N | D | kernels | forward ms | limit | W panels ms | limit"
        " | vendor products ms | predicted total ms, at least | all overlapped ms | GEMM units |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in predictions:
        forward = f"{p['forward_ms']:.1f} | {p['forward_limit']}" if "forward_ms" in p else "– | –"
        lines.append(
            f"| {p['loss']} | {p['chip']} | {p['n']:,} | {p['d']} | {p['kernels']} | {forward}"
            f" | {p['panel_ms']:.1f} | {p['panel_limit']} | {p['products_ms']:.1f}"
            f" | {p['total_ms']:.1f} | {p['overlapped_ms']:.1f} | {p['units']} |"
        )
    return lines


def write_page(page: Path, versions: dict[str, str], table: list[str]) -> None:
    """Replaces what stands between the marks of a Markdown file."""
    start, end = "<!-- generated -->", "<!-- end -->"
    before, rest = page.read_text().split(start)
    after = rest.split(end)[1]
    compilers = "; ".join(f"{name}: {version}" for name, version in versions.items())
    lines = [start, f"Compiled with {compilers}.", "", *table, end]
    page.write_text(before + "\n".join(lines) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    archs = dict.fromkeys([*triton.TARGETS, *cuda.ARCHS])
    parser.add_argument("--only", choices=("triton", "cuda"), action="append")
    parser.add_argument("--arch", choices=archs, action="append")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file with all that was read and predicted")
    parser.add_argument("--page", type=Path, help="Markdown file whose prediction table to replace")
    options = parser.parse_args()
    if options.page and (options.only or options.arch):
        parser.error("--page needs all kernels and architectures")
    options.only, options.arch = options.only or ["triton", "cuda"], options.arch or [*archs]
    if "cuda" in options.only:
        if not shutil.which("nvcc"):
            sys.exit("there is no nvcc on the PATH; --only triton needs none")
        if missing := cuda.cuda.SIMT.missing():
            sys.exit(f"the emulator is not available: {missing}")

    rows, failures = compiled(options)
    banks = cuda.bank_use() if "cuda" in options.only else []
    failures += [f"bank conflict: {b}" for b in banks if b["passes"] != b["least"]]
    result = {
        "chips": {name: chip._asdict() for name, chip in code.CHIPS.items()},
        "vendor_share": code.VENDOR_SHARE,
        "predictions": predictions(rows),
        "versions": {x: globals()[x].versions() for x in options.only},
        "kernels": rows,
        "banks": banks,
    }
    print(
        "\n".join(["", *prediction_table(result["predictions"]), "(predictions: nothing was run)"])
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        write_page(options.page, result["versions"], prediction_table(result["predictions"]))
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
