"""The Triton kernels for `gpu_static.py`: each kernel and arithmetic of the tile table, in a few
variants, compiled for sm_80, sm_90, sm_100 and gfx942."""

import os
import re
import sys
import tempfile
from collections import Counter

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

import triton
from gpu_static_code import (
    MATRIX,
    barrier_between_row_tiles,
    family,
    functions,
    loops,
    run_tool,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ito_kernels.similarity.triton import backward as gradient_kernels
from ito_kernels.similarity.triton import forward as statistics_kernels
from ito_kernels.similarity.triton.tiles import ARCHS, COMPILE, Arch, Tile, two_blocks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENT = {"half": ("bf16", 2), "ieee": ("fp32", 4), "tf32": ("fp32", 4), "tf32x3": ("fp32", 4)}


def variants(arch: Arch, arithmetic: str) -> dict[str, tuple]:
    """The compiled variants {name: (kernel, tile, arguments)}: the plain CLIP loss, and for each
    kernel the options with the most state; in fp32 mostly the latter."""
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
    # the results of one pass that a SigLIP loss with a learned scale and bias needs
    siglip = dict.fromkeys(("row_bias", "scale_sums", "row_sums", "softplus_sums"), fp32)
    hard = everything | {"POSITIVES": "lse", "HARDEST": True, "TRIANGLE": True}
    statistics, panels = statistics_kernels.logsumexp_kernel, gradient_kernels.weights_kernel
    out = {
        "forward clip": (statistics, score, forward | {"pair_scores": fp32}),
        "forward ids": (statistics, by_ids, forward_ids | {"POSITIVES": "linear"}),
        "forward all": (statistics, by_ids, forward_ids | hard),
        "softplus ids": (statistics_kernels.softplus_kernel, by_ids, forward_ids),
        "panel clip": (panels, w, panel | upstream | positive | {"scale_sums": fp32}),
        "panel all": (panels, by_ids, panel_ids | upstream | lse | everything | sums),
        "panel siglip": (panels, w, panel | softplus | siglip),
        "panel softplus": (panels, by_ids, panel_ids | ids | softplus | sums | siglip),
    }
    if arch.name == "sm_90" and element != "fp32":  # the first run on a GPU compares both
        for name, tile in (("forward clip", score), ("panel clip", w)):
            other = two_blocks(tile)
            arguments = out[name][2] | features(other, other.k)
            out[f"{name}, two blocks"] = (out[name][0], other, arguments)
    for d in (64, 128) if gradient else ():
        fused = features(gradient, d) | {"grad": f"*{element}", "stride_grad": "i32"}
        out[f"gradient {d} clip"] = (
            gradient_kernels.gradient_kernel, gradient,
            fused | upstream | positive | {"scale_sums": fp32},
        )  # fmt: skip
        out[f"gradient {d} siglip"] = (
            gradient_kernels.gradient_kernel,
            gradient,
            fused | softplus | siglip,
        )
    if element == "fp32":
        out = {
            k: v for k, v in out.items() if k in ("forward all", "panel all", "gradient 128 clip")
        }
    return out


def built(arch_name: str, arithmetic: str, name: str):
    """One compiled variant, and its tile."""
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
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | COMPILE
    return triton.compile(source, target=TARGETS[arch_name], options=options), tile


def compile_one(arch_name: str, arithmetic: str, name: str) -> dict:
    """Compile one variant. Returns its row."""
    kernel, tile = built(arch_name, arithmetic, name)
    row = {
        "arch": arch_name, "arithmetic": arithmetic, "kernel": name, "tile": list(tile),
        "shared": kernel.metadata.shared,
    }  # fmt: skip
    read = read_amd if arch_name.startswith("gfx") else read_nvidia
    row |= read(kernel) | {"element": ELEMENT[arithmetic][1], "ahead": ARCHS[arch_name].tma}
    row["matrix_instructions"] = sum(row["total"].get(op, 0) for op in MATRIX[arch_name])
    # row tiles share the columns' slots
    row["barrier_missing"] = name.startswith("forward") and not row.pop("barrier")
    del row["total"]
    return row


def disassembled(kernel) -> tuple[list, dict, str]:
    """The code and the labels of `functions`, and what cuobjdump says of resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", f.name)
        sass = run_tool("nvdisasm", "-c", f.name)
    ((code, labels),) = functions(sass).values()
    return code, labels, usage


def read_nvidia(kernel) -> dict:
    code, labels, usage = disassembled(kernel)
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
    spills = sum(op.startswith(("STL", "LDL")) for op, _ in code)
    row = {"registers": registers, "stack": stack, "spills": spills}
    return row | {"barrier": barrier_between_row_tiles(code, labels)} | count(code, labels)


def read_amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]
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
        "barrier": True,  # not looked for
    } | count(code, labels)


def last_exit(code: list) -> int:
    return max((at for at, (op, _) in enumerate(code) if op == "EXIT"), default=len(code))


def count(code: list, labels: dict) -> dict:
    """Count the instructions of one thread: in the whole kernel, in one step of the loop over D,
    and in one tile outside of such steps.

    Code in a tile that a forward branch skips is not counted: it is for tiles with positives. With
    tensor descriptors one loop runs over tiles and steps, and branches skip the code that runs once
    per tile: what follows the products, and before them the choice of the next tile. The counts are
    valid for kernels without ids; with ids the branches nest.
    """
    # behind the last EXIT there are only waits, which branch back
    code = code[: last_exit(code) + 1]
    labels = {x: at for x, at in labels.items() if at < len(code)}
    matrix = {at for at, (op, _) in enumerate(code) if family(op) in sum(MATRIX.values(), ())}

    def within(part: range) -> Counter:
        return Counter(family(code[at][0]) for at in part)

    def inside(part: range, whole: range) -> bool:
        return whole.start <= part.start and part.stop <= whole.stop and part != whole

    inner = [x for x in loops(code, labels) if any(at in x for at in matrix)]
    total = Counter(family(op) for op, _ in code)
    out = {"total": dict(total), "instructions": len(code)}
    skips = [
        range(at + 1, labels.get(target, 0))
        for at, (_, targets) in enumerate(code)
        for target in targets
    ]
    choice = [x for x in skips if 40 < len(x) <= 100 and not any(at in x for at in matrix)]
    skips = [x for x in skips if len(x) > 100 and not any(at in x for at in matrix)]
    if inner:
        step = min(inner, key=len)
        once_a_tile = [x for x in skips if inside(x, step)]
        if once_a_tile:
            tile = max(once_a_tile, key=len)
            chosen = {at for x in choice if inside(x, step) and not inside(x, tile) for at in x}
            next_tile = Counter(family(code[at][0]) for at in chosen)
            per_step = within(step) - within(tile) - next_tile
            per_tile = within(tile) + next_tile
        else:
            outer = [x for x in inner if inside(step, x)]
            tile = min(outer, key=len) if outer else range(len(code))
            per_step, per_tile = within(step), within(tile) - within(step)
        rare = {at for x in skips if inside(x, tile) for at in x}
        out["per_step"] = dict(per_step)
        out["per_tile"] = dict(per_tile - Counter(family(code[at][0]) for at in rare))
    return out


def versions() -> str:
    ptxas = run_tool("ptxas", "--version").splitlines()[-2].strip()
    return f"triton {triton.__version__}, {ptxas}"
