"""The CUDA kernels for `gpu_static.py`: csrc/cuda compiled by nvcc for all architectures of the
wheels, and the bank conflicts of the kernels on the emulator."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
from gpu_static_code import family, functions, loops, run_tool

import ito_kernels
from ito_kernels.similarity import cuda

CSRC = Path(__file__).parents[2] / "csrc"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = ("forward.cu", "panel.cu", "gradient.cu")
# What makes a tile plain: no positive, nothing masked, nothing underflowed, one scale. The sums for
# the gradient of the scale are taken.
PLAIN = (
    ("scores.cuh", "return gpu::any(found);", "gpu::any(found); return false;"),
    ("weights.cuh", "p.underflowed && p.underflowed.load(0)", "false"),
    ("weights.cuh", "if (p_.scale_of == ScaleOf::kAll) return;", "return;"),
    ("panel.cu", "panel_.row_sums || panel_.col_sums ? Sums::kAll", "false ? Sums::kAll"),
    ("panel.cu", "panel_.scale_sums                ? Sums::kScale", "true ? Sums::kScale"),
    ("panel.cu", "if (panel_.row_sums)", "if (false)"),
    ("panel.cu", "if (panel_.col_sums)", "if (false)"),
    ("gradient.cu", "p.row_sums ? Sums::kAll : p.scale_sums ?", "true ?"),
)
ARITHMETIC = {"Bf16": "bf16", "F16": "fp16", "Tf32x3": "tf32x3", "Tf32": "tf32"}


def kernel_of(symbol: str) -> dict | None:
    """The properties of a kernel by its mangled name. None for the merge kernel: it has no tile."""
    found = re.search(
        r"(forward|fallback|panel|gradient)_kernelINS0_\d+(Bf16|F16|Tf32x3|Tf32)E", symbol
    )
    if not found:
        return None
    kind, arithmetic = found[1], ARITHMETIC[found[2]]
    element = 2 if arithmetic in ("bf16", "fp16") else 4
    softplus = ("SoftplusSums" if kind == "forward" else "Lb1E") in symbol
    row = {"arithmetic": arithmetic, "element": element, "ahead": True}
    suffix = " softplus" if softplus else ""
    if kind == "gradient":
        width = int(re.search(r"Li(\d+)E", symbol)[1])
        return row | {
            "kernel": f"gradient {width}{suffix}",
            "tile": [64, 64, width, 4, 2],
            "shared": (64 + 2 * 64) * width * element,
        }
    shape = {"tile": [128, 128, 64 // element, 8, 4], "shared": 4 * (128 + 128) * 64}
    return row | {"kernel": kind + suffix} | shape


def count(code: list, labels: dict, halves: int) -> dict:
    """Count the instructions of one thread, in a step of the loop over D and in a tile outside of
    it. The tile is the loop around the steps. With halves=2, a step is a loop over two halves."""
    matrix = [at for at, (op, _) in enumerate(code) if family(op) == "HMMA"]
    around_matrix = (x for x in loops(code, labels) if any(at in x for at in matrix))
    nested = sorted(around_matrix, key=len)
    step, *around = [Counter(family(code[at][0]) for at in loop) for loop in nested]
    if halves == 2:
        step, *around = step + around[0], *around[1:]
    out = {"instructions": len(code), "per_step": dict(step)}
    return out | ({"per_tile": dict(around[0] - step)} if around else {})


def compiled(source: Path, arch: str, include: Path) -> tuple[str, dict]:
    """The resource usage that the assembler reports, and the functions of the machine code."""
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
    # Instructions are counted for a tile that contains only negatives: other branches are compiled
    # out. Code for options that are chosen at run time is still counted.
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "csrc"
        shutil.copytree(CSRC, plain)
        for file, old, new in PLAIN:
            text = (plain / "cuda" / file).read_text()
            assert old in text
            (plain / "cuda" / file).write_text(text.replace(old, new))
        _, plain_code = compiled(plain / "cuda" / source, arch, plain)
    plain_of = {key(symbol): value for symbol, value in plain_code.items() if kernel_of(symbol)}
    rows = []
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes.*?Used (\d+) reg"
    for symbol, stores, loads, registers in re.findall(pattern, usage, re.DOTALL):
        row = kernel_of(symbol)
        if row is None:
            continue
        all_ops = Counter(op.split(".")[0] for op, _ in code[symbol][0])
        row |= {"arch": arch, "registers": int(registers), "spills": int(stores) + int(loads)}
        row |= {"matrix_instructions": all_ops["HMMA"]} | count(
            *plain_of[key(symbol)], halves=2 if row["arithmetic"] == "tf32x3" else 1
        )
        rows.append(row)
    return rows


def key(symbol: str) -> str:
    """The symbol without the part that depends on the source file."""
    return str(kernel_of(symbol))


def bank_use() -> list[dict]:
    """The passes over shared memory of every source line that accesses it, on the emulator."""
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


def versions() -> str:
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"Cuda compilation tools.*", release)[0]
