"""The CUDA kernels' machine code, without a GPU: resources, instructions, bank conflicts, a time.

    python benchmarks/gpu_static_cuda.py [--arch sm_80] [--out FILE] [--docs FILE]

Compiles csrc/cuda with nvcc for every architecture that wheels are built for, and fails on a spill,
a missing matrix instruction or a bank conflict. Bank conflicts come from the addresses that the
kernels use on the emulator; times are predictions from instruction counts and published rates, as
in gpu_static.py: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from gpu_static import CHIPS, VENDOR_SHARE, family, run_tool

import ito_kernels
from ito_kernels.similarity import cuda

CSRC = Path(__file__).parent.parent / "csrc"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHOWN = ("sm_80", "sm_90")  # in the docs; the others are in the JSON
SOURCES = ("forward.cu", "panel.cu", "gradient.cu")
ARITHMETIC = {"Bf16": "bf16", "F16": "fp16", "Tf32x3": "tf32x3", "Tf32": "tf32"}
# of a processor: registers, KiB of shared memory, of which a block reserves one, threads
LIMITS = dict.fromkeys(("sm_86", "sm_89", "sm_120"), (65536, 100, 1536))
LIMITS |= {"sm_80": (65536, 164, 2048), "sm_90": (65536, 228, 2048), "sm_100": (65536, 228, 2048)}


def kernel_of(symbol: str) -> dict | None:
    """What a mangled name says; None for the merge, which has no tile."""
    found = re.search(r"(forward|panel|gradient)_kernelINS0_\d+(Bf16|F16|Tf32x3|Tf32)E", symbol)
    if not found:
        return None
    kind, arithmetic = found[1], ARITHMETIC[found[2]]
    element = 2 if arithmetic in ("bf16", "fp16") else 4
    softplus = ("SoftplusSums" if kind == "forward" else "Lb1E") in symbol
    row = {"kernel": kind, "arithmetic": arithmetic, "softplus": softplus}
    if kind == "gradient":
        width = int(re.search(r"Li(\d+)E", symbol)[1])
        return row | {
            "kernel": f"gradient {width}",
            "tile": [64, 64, width, 4, 2],
            "shared": (64 + 2 * 64) * width * element,
        }
    return row | {"tile": [128, 128, 64 // element, 8, 4], "shared": 4 * (128 + 128) * 64}


def functions(sass: str) -> dict[str, tuple[list, dict]]:
    """Instructions and labels of every function, as `gpu_static.count` takes them."""
    out = {}
    for part in re.split(r"\n\s*\.section\s+\.text\.", sass)[1:]:
        symbol = re.match(r"[\w$]+", part)[0]
        code, labels = [], {}
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line):
                code.append((found[1].rstrip(";"), re.findall(r"\.L_x_\d+", found[2])))
        out[symbol] = code, labels
    return out


def count(code: list, labels: dict, halves: int) -> dict:
    """Instructions of one thread in a step of the loop over D, which may be a loop over its two
    halves, and in a tile, the loop around it, outside of that step."""
    matrix = [at for at, (op, _) in enumerate(code) if family(op) == "HMMA"]
    loops = [
        range(labels[target], at + 1)
        for at, (_, targets) in enumerate(code)
        for target in targets
        if target in labels and labels[target] <= at
    ]
    loops = sorted((x for x in loops if any(at in x for at in matrix)), key=len)
    step, *around = [Counter(family(code[at][0]) for at in loop) for loop in loops]
    if halves == 2:
        step, *around = step + around[0], *around[1:]
    out = {"instructions": len(code), "per_step": dict(step)}
    return out | ({"per_tile": dict(around[0] - step)} if around else {})


def compiled(source: Path, arch: str, include: Path) -> tuple[str, dict]:
    """What the assembler says, and the functions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", f"-I{include}", "-cubin"]
        done = subprocess.run(
            [*command, "--resource-usage", source, "-o", f.name], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stderr, functions(run_tool("nvdisasm", "-c", f.name))


def compile_one(source: str, arch: str) -> list[dict]:
    usage, code = compiled(CSRC / "cuda" / source, arch, CSRC)
    # For counts the tile with nothing but negatives: the other path and its instructions are left
    # out. Code for options that are chosen at run time is still in them.
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "csrc"
        shutil.copytree(CSRC, plain)
        scores = plain / "cuda/scores.cuh"
        vote = "return gpu::any(found);"
        text = scores.read_text()
        assert vote in text
        scores.write_text(text.replace(vote, "return false;"))
        _, plain_code = compiled(plain / "cuda" / source, arch, plain)
    plain_of = {key(symbol): value for symbol, value in plain_code.items() if kernel_of(symbol)}
    rows = []
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes.*?Used (\d+) reg"
    for symbol, stores, loads, registers in re.findall(pattern, usage, re.DOTALL):
        row = kernel_of(symbol)
        if row is None:
            continue
        whole = Counter(op.split(".")[0] for op, _ in code[symbol][0])
        row |= {"arch": arch, "registers": int(registers), "spills": int(stores) + int(loads)}
        row |= {"matrix_instructions": whole["HMMA"]} | count(
            *plain_of[key(symbol)], halves=2 if row["arithmetic"] == "tf32x3" else 1
        )
        rows.append(row | {"blocks": blocks(row)})
    return rows


def key(symbol: str) -> str:
    """The symbol without the part that names the file it was compiled from."""
    return str(kernel_of(symbol))


def blocks(row: dict) -> int:
    """Blocks that fit one processor."""
    registers, shared, most = LIMITS[row["arch"]]
    threads = row["tile"][3] * 32
    granted = -(-row["registers"] // 8) * 8 * threads
    return min(registers // granted, shared * 1024 // (row["shared"] + 1024), most // threads)


def bank_use() -> list[dict]:
    """Passes over shared memory of every line that touches it, on the emulator."""
    native = cuda._native.simt
    out = []
    for dtype, d in ((torch.bfloat16, 512), (torch.bfloat16, 104), (torch.float32, 104)):
        a, b = (torch.randn(256, d, dtype=dtype, requires_grad=True) for _ in range(2))
        native.start_trace()
        ito_kernels.clip_loss(a, b, 1.0, backend="simt").backward()
        for where, (instructions, passes, least) in native.stop_trace().items():
            place, instruction = where.split()
            out.append({"dtype": str(dtype)[6:], "d": d, "place": place, "least": least}
                       | {"instruction": instruction, "count": instructions, "passes": passes}
                      )  # fmt: skip
    return out


def predict(rows: list[dict]) -> list[dict]:
    """Forward + backward of the two-sided CLIP loss in bf16 on an A100, N = M. Not on Hopper: it
    reaches its published rate with wgmma, which these kernels do not use."""
    chip = CHIPS["A100 SXM"]
    rows = {
        r["kernel"]: r
        for r in rows
        if r["arch"] == chip.arch and r["arithmetic"] == "bf16" and not r["softplus"]
    }
    if not rows:
        return []
    out = []
    for size in (32768, 65536):
        for d in (512, 768):
            result = {"chip": "A100 SXM", "n": size, "d": d}
            for kernel in ("forward", "panel"):
                m, n, k, warps, _ = rows[kernel]["tile"]
                step, tile = (Counter(rows[kernel][x]) for x in ("per_step", "per_tile"))
                threads = warps * 32
                clocks = {
                    "matrix": 2 * m * n * k / chip.matrix,
                    "issue": sum(step.values()) * threads / chip.lanes,
                    "L2": (m + n) * k * 2 / chip.l2,
                }
                epilogue = max(
                    sum(tile.values()) * threads / chip.lanes,
                    tile["special"] * threads / chip.special,
                    tile["SHFL"] * threads / chip.shuffles,
                )
                # one block per processor: its epilogue waits for its matrix instructions
                seconds = (-(-d // k) * max(clocks.values()) + epilogue) / chip.clock * 1e-9
                result[f"{kernel}_ms"] = 1e3 * seconds * size**2 / (m * n) / chip.processors
                result[f"{kernel}_limit"] = max(clocks, key=clocks.get)
            unit, peak = 2 * size**2 * d, chip.matrix * chip.processors * chip.clock * 1e9
            result["products_ms"] = 1e3 * 2 * unit / (peak * VENDOR_SHARE)
            result["total_ms"] = sum(result[f"{x}_ms"] for x in ("forward", "panel", "products"))
            out.append(result | {"share_of_peak": 4 * unit / peak / result["total_ms"] * 1e3})
    return out


def markdown(rows: list[dict], banks: list[dict], predictions: list[dict], version: str) -> str:
    lines = [
        "| target | kernel | arithmetic | tile | warps | regs | spills | shared KiB | blocks/SM"
        " | matrix/step | other/step | special/tile | other/tile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["arch"] not in SHOWN:
            continue
        m, n, k, warps, _ = r["tile"]
        step = Counter(r.get("per_step", {}))
        name = r["kernel"] + (" softplus" if r["softplus"] else "")
        per_tile = "| – | –"
        if "gradient" not in r["kernel"]:  # there a step is a tile
            tile = Counter(r["per_tile"])
            per_tile = f"| {tile['special']} | {sum(tile.values()) - tile['special']}"
        lines.append(
            f"| {r['arch']} | {name} | {r['arithmetic']} | {m}×{n}×{k} | {warps}"
            f" | {r['registers']} | {r['spills']} | {r['shared'] / 1024:.0f} | {r['blocks']}"
            f" | {step['HMMA']} | {sum(step.values()) - step['HMMA']} {per_tile} |"
        )
    out = [version, "", "### Machine code", "", *lines, "", "### Bank conflicts", ""]
    out += ["| dtype | D | place | instruction | executed | passes | fewest possible |"]
    out += ["|---|---|---|---|---|---|---|"]
    out += [
        f"| {b['dtype']} | {b['d']} | {b['place']} | {b['instruction']} | {b['count']:,}"
        f" | {b['passes']:,} | {b['least']:,} |"
        for b in banks
    ]
    out += ["", "### Prediction", ""]
    out += ["| chip | N | D | forward ms | limit | W panels ms | limit | vendor products ms"
            " | total ms | share of the bf16 peak, 4 GEMM units |"]  # fmt: skip
    out += ["|---|---|---|---|---|---|---|---|---|---|"]
    out += [
        f"| {p['chip']} | {p['n']:,} | {p['d']} | {p['forward_ms']:.1f} | {p['forward_limit']}"
        f" | {p['panel_ms']:.1f} | {p['panel_limit']} | {p['products_ms']:.1f}"
        f" | {p['total_ms']:.1f} | {p['share_of_peak']:.0%} |"
        for p in predictions
    ]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument(
        "--docs", type=Path, help="a Markdown file whose generated part is replaced"
    )
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        sys.exit("there is no nvcc on the PATH")
    if missing := cuda.SIMT.missing():
        sys.exit(f"the emulator is not there: {missing}")

    work = [(source, arch) for arch in options.arch or ARCHS for source in SOURCES]
    rows, wrong = [], []
    with ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(compile_one, *zip(*work, strict=True)):
            rows += found
            for r in found:
                name = f"{r['arch']} {r['kernel']} {r['arithmetic']} softplus={r['softplus']}"
                print(f"{name}: {r['registers']} registers, {r['spills']} bytes of spills"
                      f", {r['matrix_instructions']} matrix instructions", flush=True)  # fmt: skip
                if r["spills"]:
                    wrong.append(f"{name}: {r['spills']} bytes of spills")
                if not r["matrix_instructions"]:
                    wrong.append(f"{name}: no matrix instruction")
    banks = bank_use()
    wrong += [f"bank conflict: {b}" for b in banks if b["passes"] != b["least"]]
    predictions = predict(rows)
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"Cuda compilation tools.*", release)[0]
    text = markdown(rows, banks, predictions, version)
    print("\n" + text.split("### Bank")[1] + "\n(predictions; nothing was run)")
    if options.out:
        result = {
            "version": version,
            "vendor_share": VENDOR_SHARE,
            "kernels": rows,
            "banks": banks,
            "predictions": predictions,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        start, end = "<!-- generated -->", "<!-- end -->"
        before, rest = options.docs.read_text().split(start)
        after = rest.split(end)[1]
        options.docs.write_text(f"{before}{start}\n{text}\n{end}{after}")
    if wrong:
        sys.exit("\n".join(["failed:", *wrong]))


if __name__ == "__main__":
    main()
