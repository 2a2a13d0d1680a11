"""The Triton kernels' machine code, without a GPU: resources, instructions, a predicted time.

    python benchmarks/gpu_static.py [--arch sm_90] [--arithmetic half] [--out FILE] [--docs FILE]

Compiles every kernel × arithmetic of the tile table for sm_80, sm_90, sm_100 and gfx942, and fails
on a spill or where the matrix instructions are missing. The times are predictions from instruction
counts and published rates: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ito_kernels.similarity import triton_backward, triton_forward
from ito_kernels.similarity.triton_tiles import ARCHS, Arch, Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENT = {"half": ("bf16", 2), "ieee": ("fp32", 4), "tf32": ("fp32", 4), "tf32x3": ("fp32", 4)}
MATRIX = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCHMMA", "UTCMMA", "HMMA"),
    "gfx942": ("v_mfma",),
}


class Chip(NamedTuple):
    """Published rates of one part, dense. Per clock and processor where not said otherwise."""

    arch: str
    processors: int
    clock: float  # GHz, boost
    matrix: float  # bf16 FLOP
    lanes: int  # ordinary instructions
    special: int  # lanes of exp2, reciprocal
    shuffles: int  # lanes
    l2: float  # bytes; A100's white paper: 5,120 per clock for the chip. The others as assumed
    memory: float  # GB/s of the chip
    source: str


CHIPS = {
    "A100 SXM": Chip("sm_80", 108, 1.41, 2048, 128, 16, 32, 5120 / 108, 2039, "A100 white paper"),
    "H100 SXM": Chip("sm_90", 132, 1.83, 4096, 128, 16, 32, 5120 / 132, 3350,
                     "H100 white paper; L2 rate assumed equal to A100's per clock"),
    "MI300X": Chip("gfx942", 304, 2.1, 2048, 64, 16, 32, 64, 5300,
                   "CDNA 3 white paper; 64 bytes per clock and CU from L2"),
}  # fmt: skip
# What the vendor's matrix product reaches of the peak at these sizes: an assumption, not a count.
VENDOR_SHARE = 0.75


class Loop(NamedTuple):
    """Or another stretch of code, both ends included."""

    start: int
    end: int


def variants(arch: Arch, arithmetic: str) -> dict[str, tuple]:
    """{name: (kernel, tile, arguments)} of what is compiled: the plain CLIP loss, and the cases
    with the most state of each kernel (of fp32 only the latter)."""
    element, _ = ELEMENT[arithmetic]
    fp32, i32 = "*fp32", "*i32"
    score, by_ids = arch.forward[arithmetic], arch.ids[arithmetic]
    w, gradient = arch.panel[arithmetic], arch.gradient.get(arithmetic)
    common = {
        "scale": fp32, "n": "i32", "m": "i32", "d": "i32", "stride_a": "i32", "stride_b": "i32",
        "diagonal": "i32", "EVEN_D": True, "SCALE_PER_ROW": False, "SELF": False,
        "EXCLUDE_POSITIVES": False, "EXACT": element == "fp32", "TMA": arch.tma,
        "PRECISION": "ieee" if arithmetic == "half" else arithmetic, "INTERPRETED": False,
        "POSITIVES": "none", "HARDEST": False, "TRIANGLE": False, "SOFTPLUS": False, "SCALE": "one",
    }  # fmt: skip

    def features(tile: Tile, k: int) -> dict:
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": k, "BLOCK_D": k}
        if arch.tma:
            a, b = (f"tensordesc<{element}[{rows}, {k}]>" for rows in (tile.m, tile.n))
        else:
            a = b = f"*{element}"
        return common | blocks | {"a": a, "b": b}

    groups = dict.fromkeys(("row_tiles", "col_tiles", "row_groups", "col_groups"), "i32")
    ids = {"row_ids": i32, "col_ids": i32}
    everything = ids | {"row_bias": fp32, "col_bias": fp32, "SELF": True, "SCALE_PER_ROW": True}
    sides = {"row_slots": fp32, "col_slots": fp32, "ROWS": True, "COLS": True}
    forward = features(score, score.k) | groups | sides
    forward_ids = features(by_ids, by_ids.k) | groups | sides | ids
    up = ("u", "row_factors", "v", "col_factors")
    upstream = dict.fromkeys(up, fp32)
    positive = {"alpha": fp32, "beta": fp32, "POSITIVES": "linear"}
    lse = positive | {"row_pos": fp32, "col_pos": fp32, "POSITIVES": "lse"}
    sizes = dict.fromkeys(("panel_row", "panel_col", "stride_panel"), "i32") | {
        "panel": f"*{element}"
    }
    panel, panel_ids = (features(x, x.k) | sizes for x in (w, by_ids))
    sums = {"scale_sums": fp32, "row_sums": fp32, "col_sums": fp32}
    softplus = {"SOFTPLUS": True, "u": fp32}
    # in one pass: what a SigLIP loss with a learned scale and bias needs
    siglip = dict.fromkeys(("row_bias", "scale_sums", "row_sums", "softplus_sums"), fp32)
    hard = everything | {"POSITIVES": "lse", "HARDEST": True, "TRIANGLE": True}
    statistics, panels = triton_forward.logsumexp_kernel, triton_backward.weights_kernel
    out = {
        "forward clip": (statistics, score, forward | {"pair_scores": fp32}),
        "forward ids": (statistics, by_ids, forward_ids | {"POSITIVES": "linear"}),
        "forward all": (statistics, by_ids, forward_ids | hard),
        "softplus ids": (triton_forward.softplus_kernel, by_ids, forward_ids),
        "panel clip": (panels, w, panel | upstream | positive | {"scale_sums": fp32}),
        "panel all": (panels, by_ids, panel_ids | upstream | lse | everything | sums),
        "panel siglip": (panels, w, panel | softplus | siglip),
        "panel softplus": (panels, by_ids, panel_ids | ids | softplus | sums | siglip),
    }
    for d in (64, 128) if gradient else ():
        fused = features(gradient, d) | {"grad": f"*{element}", "stride_grad": "i32"}
        out[f"gradient {d} clip"] = (
            triton_backward.gradient_kernel, gradient,
            fused | upstream | positive | {"scale_sums": fp32},
        )  # fmt: skip
        out[f"gradient {d} siglip"] = (
            triton_backward.gradient_kernel,
            gradient,
            fused | softplus | siglip,
        )
    if element == "fp32":
        out = {
            k: v for k, v in out.items() if k in ("forward all", "panel all", "gradient 128 clip")
        }
    return out


def compile_one(arch_name: str, arithmetic: str, name: str) -> dict:
    """Compile one variant and read its machine code."""
    arch = ARCHS[arch_name]
    kernel, tile, arguments = variants(arch, arithmetic)[name]
    arguments["PARTS"] = arch.parts(tile, arguments["SOFTPLUS"])
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        value = arguments.get(argument)
        is_type = isinstance(value, str) and (value[0] == "*" or value in ("i32", "fp32"))
        if is_type or (isinstance(value, str) and value.startswith("tensordesc")):
            signature[argument] = value
            if value[0] == "*" or argument.startswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument], constants[argument] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = triton.compile(source, target=TARGETS[arch_name], options=options)
    row = {
        "arch": arch_name, "arithmetic": arithmetic, "kernel": name, "tile": list(tile),
        "shared": built.metadata.shared,
    }  # fmt: skip
    read = read_amd if arch_name.startswith("gfx") else read_nvidia
    row |= read(built)
    row["matrix_instructions"] = sum(row["total"].get(op, 0) for op in MATRIX[arch_name])
    del row["total"]
    return row


def run_tool(tool: str, *arguments: str) -> str:
    path = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read_nvidia(built) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", f.name)
        sass = run_tool("nvdisasm", "-c", f.name)
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line):
            code.append((instruction[1].rstrip(";"), re.findall(r"\.L_x_\d+", instruction[2])))
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
    spills = sum(op.startswith(("STL", "LDL")) for op, _ in code)
    return {"registers": registers, "stack": stack, "spills": spills} | count(code, labels)


def read_amd(built) -> dict:
    text = built.asm["amdgcn"]
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)(.*)", line):
            code.append((instruction[1], re.findall(r"\.LBB\w+", instruction[2])))
    number = {k: int(v) for k, v in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return {
        "registers": number["vgpr_count"],
        "stack": int(re.search(r"ScratchSize: (\d+)", text)[1]),
        "spills": number["vgpr_spill_count"],
    } | count(code, labels)


def family(op: str) -> str:
    """HMMA.16816.F32.BF16 → HMMA; the special-function unit and its kind stay together."""
    if op.startswith("MUFU"):
        return "special"
    if re.match(r"v_(exp|log|rcp|sqrt)_f32", op):
        return "special"
    if op.startswith("v_mfma"):
        return "v_mfma"
    return op.split(".")[0]


def count(code: list, labels: dict) -> dict:
    """Instructions of one thread: in the whole kernel, in one step of the loop over D, and in one
    tile outside of such steps, without what a forward branch skips there: the tiles with positives.
    With descriptors one loop goes over tiles and steps, and a branch skips what is done once a
    tile. Holds for the kernels without ids; with ids the branches nest."""
    loops = [
        Loop(labels[target], at)
        for at, (_, targets) in enumerate(code)
        for target in targets
        if target in labels and labels[target] <= at
    ]
    matrix = {at for at, (op, _) in enumerate(code) if family(op) in sum(MATRIX.values(), ())}

    def within(loop: Loop) -> Counter:
        return Counter(family(op) for op, _ in code[loop.start : loop.end + 1])

    total = Counter(family(op) for op, _ in code)
    inner = [x for x in loops if any(x.start <= at <= x.end for at in matrix)]
    out = {"total": dict(total), "instructions": len(code)}
    skips = []
    for at, (_, targets) in enumerate(code):
        for target in targets:
            skip = Loop(at + 1, labels.get(target, 0) - 1)
            if skip.end - skip.start >= 100 and not any(
                skip.start <= x <= skip.end for x in matrix
            ):
                skips.append(skip)

    def inside(part: Loop, whole: Loop) -> bool:
        return whole.start <= part.start and part.end <= whole.end and part != whole

    if inner:
        step = min(inner, key=lambda x: x.end - x.start)
        once_a_tile = [x for x in skips if inside(x, step)]
        if once_a_tile:
            tile = max(once_a_tile, key=lambda x: x.end - x.start)
            per_step, per_tile = within(step) - within(tile), within(tile)
        else:
            outer = [x for x in inner if inside(step, x)]
            tile = min(outer, key=lambda x: x.end - x.start) if outer else Loop(0, len(code) - 1)
            per_step, per_tile = within(step), within(tile) - within(step)
        rare = {at for x in skips if inside(x, tile) for at in range(x.start, x.end + 1)}
        out["per_step"] = dict(per_step)
        out["per_tile"] = dict(per_tile - Counter(family(code[at][0]) for at in rare))
    return out


def units(row: dict, chip: Chip, d: int, output_bytes: int) -> dict[str, float]:
    """Clocks of one tile on one processor, by unit."""
    m, n, k, warps, _ = row["tile"]
    step, tile = Counter(row["per_step"]), Counter(row["per_tile"])
    steps = -(-d // k)
    ops = Counter({op: c * steps for op, c in step.items()}) + tile
    width = 64 if row["arch"].startswith("gfx") else 32
    threads = warps * width
    ordinary = sum(c for op, c in ops.items() if op not in MATRIX[row["arch"]])
    epilogue = sum(tile.values())
    shuffles = sum(c for op, c in ops.items() if op in ("SHFL", "ds_bpermute_b32"))
    element = ELEMENT[row["arithmetic"]][1]
    return {
        "matrix": 2 * m * n * d / chip.matrix,
        "issue": ordinary * threads / chip.lanes,
        "special": ops["special"] * threads / chip.special,
        "shuffle": shuffles * threads / chip.shuffles,
        "L2": (m + n) * d * element / chip.l2,
        "memory": m * n * output_bytes / (chip.memory / chip.clock / chip.processors),
        "epilogue": max(epilogue * threads / chip.lanes, tile["special"] * threads / chip.special),
    }


def tile_clocks(row: dict, chip: Chip, d: int, output_bytes: int) -> tuple[float, float, str]:
    """Clocks of one tile on one processor, the least that they could be, and the limiting unit.

    Where one program has the processor, its reduction of a tile waits for the matrix instructions;
    only loads run meanwhile, with descriptors those of the next tile, as many steps as there are
    stages to hold them.
    """
    clocks = units(row, chip, d, output_bytes)
    alone = clocks.pop("epilogue")
    limit = max(clocks, key=clocks.get)
    least = clocks[limit]
    if occupancy(row) != "1":
        return least, least, limit
    _, _, k, _, stages = row["tile"]
    ahead = min(1, (stages - 1) / -(-d // k)) if ARCHS[row["arch"]].tma else 0
    loads = clocks.pop("L2")
    return max(max(clocks.values()), clocks["matrix"] + alone,
               loads + max(0, alone - ahead * loads)), least, limit  # fmt: skip


def predict(rows: list[dict]) -> list[dict]:
    """Forward + backward in bf16, N = M: the two-sided CLIP loss, and SigLIP in one pass."""
    parts = {
        "clip": (("forward", "forward clip", 0), ("panel", "panel clip", 2)),
        "siglip": (("panel", "panel siglip", 2),),
    }
    out = []
    find = {(r["arch"], r["kernel"]): r for r in rows if r["arithmetic"] == "half"}
    for loss, (name, chip), size, d in product(
        parts, CHIPS.items(), (32768, 65536), (512, 768)
    ):  # fmt: skip
        if any((chip.arch, kernel) not in find for _, kernel, _ in parts[loss]):
            continue
        unit = 2 * size * size * d
        peak = chip.matrix * chip.processors * chip.clock * 1e9
        products = 2 * unit / (peak * VENDOR_SHARE)
        row = {"loss": loss, "chip": name, "n": size, "d": d}
        total = overlapped = products
        for part, kernel, written in parts[loss]:
            code = find[(chip.arch, kernel)]
            clocks, least, limit = tile_clocks(code, chip, d, written)
            tiles = size / code["tile"][0] * size / code["tile"][1] / chip.processors
            seconds = tiles / chip.clock * 1e-9
            row |= {f"{part}_ms": 1e3 * clocks * seconds, f"{part}_limit": limit}
            total, overlapped = total + clocks * seconds, overlapped + least * seconds
        out.append(row | {
            "products_ms": 1e3 * products, "total_ms": 1e3 * total,
            "overlapped_ms": 1e3 * overlapped,
            "share_of_peak": (2 + len(parts[loss])) * unit / total / peak,
        })  # fmt: skip
    return out


def occupancy(row: dict) -> str:
    """Programs that fit one processor, by registers and shared memory."""
    limits = {"sm_80": (65536, 164), "sm_90": (65536, 228), "sm_100": (65536, 228)}
    if row["arch"] not in limits:
        waves = max(1, 512 // max(row["registers"], 1))
        return f"{min(8, waves)} waves/SIMD"
    registers, shared = limits[row["arch"]]
    threads = row["tile"][3] * 32
    granted = -(-row["registers"] // 8) * 8 * threads
    fits = min(registers // granted, shared * 1024 // (row["shared"] + 1024), 2048 // threads)
    return f"{fits}"


def markdown(rows: list[dict], predictions: list[dict], versions: str) -> str:
    lines = [
        "| target | arithmetic | kernel | tile | warps | regs | spills | shared KiB | programs/SM"
        " | matrix | special/tile | other/tile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        m, n, k, warps, _ = r["tile"]
        counts = "| – | –"
        if r["kernel"] in ("forward clip", "panel clip", "panel siglip"):
            tile = Counter(r["per_tile"])
            counts = f"| {tile['special']} | {sum(tile.values()) - tile['special']}"
        lines.append(
            f"| {r['arch']} | {r['arithmetic']} | {r['kernel']} | {m}×{n}×{k} | {warps}"
            f" | {r['registers']} | {r['spills']} | {r['shared'] / 1024:.0f} | {occupancy(r)}"
            f" | {r['matrix_instructions']} {counts} |"
        )
    table = "\n".join(lines)
    lines = [
        "| loss | chip | N | D | forward ms | limit | W panels ms | limit | vendor products ms"
        " | total ms | all overlapped ms | share of the bf16 peak over 4 (SigLIP: 3) GEMM units |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in predictions:
        forward = f"{p['forward_ms']:.1f} | {p['forward_limit']}" if "forward_ms" in p else "– | –"
        lines.append(
            f"| {p['loss']} | {p['chip']} | {p['n']:,} | {p['d']} | {forward}"
            f" | {p['panel_ms']:.1f} | {p['panel_limit']} | {p['products_ms']:.1f}"
            f" | {p['total_ms']:.1f} | {p['overlapped_ms']:.1f} | {p['share_of_peak']:.0%} |"
        )
    return f"{versions}\n\n### Machine code\n\n{table}\n\n### Prediction\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=TARGETS, action="append")
    parser.add_argument("--arithmetic", choices=ELEMENT, action="append")
    parser.add_argument("--kernel", help="only those whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument(
        "--docs", type=Path, help="a Markdown file whose generated part is replaced"
    )
    options = parser.parse_args()

    work = [
        (arch, arithmetic, name)
        for arch in options.arch or TARGETS
        for arithmetic in options.arithmetic or ARCHS[arch].forward
        for name in variants(ARCHS[arch], arithmetic)
        if (options.kernel or "") in name
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(compile_one, *item) for item in work]
        rows, wrong = [], []
        for item, future in zip(work, futures, strict=True):
            row = future.result()
            rows.append(row)
            m, n, k, warps, stages = row["tile"]
            print(
                f"{item[0]:7} {item[1]:7} {item[2]:18} {m}x{n}x{k} {warps} warps {stages} stages:"
                f" {row['registers']} registers, {row['spills']} spills,"
                f" {row['shared']} B shared, {row['matrix_instructions']} matrix instructions",
                flush=True,
            )
            if row["spills"]:
                wrong.append(f"{item}: {row['spills']} spills")
            if item[1] != "ieee" and not row["matrix_instructions"]:
                wrong.append(f"{item}: no matrix instruction")
    ptxas = run_tool("ptxas", "--version").splitlines()[-2].strip()
    versions = f"triton {triton.__version__}, {ptxas}"
    predictions = predict(rows)
    text = markdown(rows, predictions, versions)
    print("\n" + text.split("### Prediction")[1].strip() + "\n(predictions; nothing was run)")
    if options.out:
        result = {
            "versions": versions,
            "chips": {name: chip._asdict() for name, chip in CHIPS.items()},
            "vendor_share": VENDOR_SHARE,
            "kernels": rows,
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
