"""The GPU kernels' machine code, without a GPU: resources, instructions, bank conflicts.

    python benchmarks/predict/gpu_static.py [--only cuda] [--arch sm_90] [--out FILE]

Compiles variants of the Triton kernels for sm_80, sm_90, sm_100 and gfx942 (gpu_static_triton.py:
the plain CLIP and SigLIP losses, and options alone and together) and the CUDA kernels for what
wheels are built for (gpu_static_cuda.py), and fails on a spill, where matrix instructions are
missing, or on a bank conflict. `gpu_model.py` predicts times from the counts in
results/gpu_static.json: after a change of the kernels, write them there (--out) and run it. Nothing
here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
                without = r["arithmetic"] == "ieee" or r["kernel"] == "reweight"
                if not (without or r["matrix_instructions"]):
                    failures.append(f"{name}: no matrix instruction")
    return rows, failures


def merged(old: dict, new: dict) -> dict:
    """Rows of kernels that were compiled now replace those in `old`; the others stay."""

    def key(row: dict) -> tuple:
        return row["arch"], row["arithmetic"], row["kernel"]

    kernels = {}
    for source in old["kernels"] | new["kernels"]:
        rows = {key(r): r for x in (old, new) for r in x["kernels"].get(source, ())}
        kernels[source] = list(rows.values())
    return {
        "versions": old["versions"] | new["versions"],
        "kernels": kernels,
        "banks": new["banks"] or old["banks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    archs = dict.fromkeys([*triton.TARGETS, *cuda.ARCHS])
    parser.add_argument("--only", choices=("triton", "cuda"), action="append")
    parser.add_argument("--arch", choices=archs, action="append")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file whose rows to replace, or to make")
    options = parser.parse_args()
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
        "versions": {x: globals()[x].versions() for x in options.only},
        "kernels": {x: rows[x] for x in options.only},
        "banks": banks,
    }
    if options.out:
        if options.out.exists():
            result = merged(json.loads(options.out.read_text()), result)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
