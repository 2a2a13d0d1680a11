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
    family,
    functions,
    loops,
    run_tool,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ito_kernels.similarity.triton import backward as gradient_kernels
from ito_kernels.similarity.triton import forward as statistics_kernels
from ito_kernels.similarity.triton import maxima as maxima_kernels
from ito_kernels.similarity.triton.kept import BLOCK
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
    kernel the options that take registers, alone and together; in fp32 mostly the latter."""
    element, _ = ELEMENT[arithmetic]
    fp32, i32 = "*fp32", "*i32"
    score, by_ids = arch.forward[arithmetic], arch.ids[arithmetic]
    w, small = arch.panel[arithmetic], arch.maxima[arithmetic]
    gradient = arch.gradient.get(arithmetic)
    common = {
        "scale": fp32, "n": "i32", "m": "i32", "d": "i32", "stride_a": "i32", "stride_b": "i32",
        "diagonal": "i32", "EVEN_D": True, "SCALE": "one", "SELF": False,
        "EXCLUDE_POSITIVES": False, "TMA": arch.tma,
        "PRECISION": "ieee" if arithmetic == "half" else arithmetic, "INTERPRETED": False,
        "POSITIVES": "none", "TRIANGLE": False, "SOFTPLUS": False, "FIXED": True,
    }  # fmt: skip

    def features(tile: Tile, k: int) -> dict:
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": k, "BLOCK_D": k}
        if arch.tma:
            a, b = (f"tensordesc<{element}[{rows}, {k}]>" for rows in (tile.m, tile.n))
        else:
            a = b = f"*{element}"
        return common | blocks | {"a": a, "b": b, "KEPT": arch.kept_rows(tile, arithmetic)}

    groups = dict.fromkeys(("row_tiles", "col_tiles", "row_groups", "col_groups"), "i32")
    slots = {"row_slots": fp32, "col_slots": fp32, "shift": fp32, "ROWS": True, "COLS": True}
    sums = groups | slots
    ids = {"row_ids": i32, "col_ids": i32}
    itself = {"SELF": True}
    linear, lse = {"POSITIVES": "linear"}, {"POSITIVES": "lse"}
    options = itself | {"row_bias": fp32, "col_bias": fp32, "SCALE": "row", "row_limit": fp32}
    everything = ids | lse | options
    statistics = dict.fromkeys(("max_out", "logsum_out", "pos_out", "neg_max_out"), fp32)
    statistics |= {"underflowed": "*i8"}
    upstream = dict.fromkeys(("row_weights", "col_weights", "shift"), fp32)
    upstream |= {"underflowed": i32}
    exact = upstream | {"row_shifts": fp32, "col_shifts": fp32, "shift": None, "FIXED": False}
    learned = {"scale_sums": fp32}
    all_sums = learned | {"row_sums": fp32, "col_sums": fp32}
    softplus = {"SOFTPLUS": True, "row_weights": fp32}
    # the results of one pass that a SigLIP loss with a learned scale and bias needs
    siglip = softplus | dict.fromkeys(("row_bias", "scale_sums", "row_sums", "softplus_sums"), fp32)
    # how the positives and self pairs are found, and what is computed of them
    masks = {
        "self": itself,
        "ids": ids | linear,
        "ids in": ids | lse,
        "ids self": ids | linear | itself,
        "ids self in": ids | lse | itself,
        "decoupled": ids | linear | {"EXCLUDE_POSITIVES": True},
        "all": everything,
    }
    out = {}

    def add(name: str, kernel, tile: Tile, k: int, **rest) -> None:
        out[name] = kernel, tile, features(tile, k) | rest

    kernel = statistics_kernels.sums_kernel
    add("forward clip", kernel, score, score.k, **sums, pair_scores=fp32)
    width = score.n // arch.parts(score, "forward")
    cache = f"tensordesc<bf16[{score.m}, {width}]>" if arch.tma else "*bf16"
    kept = {"cache": cache, "stride_cache": "i32", "cached_rows": "i32", "pair_scores": fp32}
    add("forward clip kept", kernel, score, score.k, **sums | kept)
    for name, mask in masks.items():
        tile = by_ids if "row_ids" in mask else score
        add(f"forward {name}", kernel, tile, tile.k, **sums | mask)
    add("forward symmetric", kernel, by_ids, by_ids.k, **sums | everything | {"TRIANGLE": True})
    kernel = maxima_kernels.maxima_kernel
    add("maxima clip", kernel, small, small.k, **statistics | linear)
    add("maxima all", kernel, small, small.k, **statistics | everything)
    kernel = statistics_kernels.softplus_kernel
    add("softplus", kernel, score, score.k, **groups, row_slots=fp32, row_bias=fp32)
    add("softplus ids", kernel, by_ids, by_ids.k, **groups | options | ids, row_slots=fp32)
    kernel = gradient_kernels.weights_kernel
    sizes = dict.fromkeys(("panel_row", "panel_col", "stride_panel"), "i32")
    sizes |= {"panel": f"*{element}"}
    add("panel clip", kernel, w, w.k, **sizes | upstream | linear)
    add("panel in", kernel, w, w.k, **sizes | upstream | lse)
    add("panel exact", kernel, w, w.k, **sizes | exact | linear | learned)
    add("panel siglip", kernel, w, w.k, **sizes | siglip)
    add("panel siglip ids", kernel, by_ids, by_ids.k, **sizes | siglip | ids | all_sums)
    kernel = gradient_kernels.reweight_kernel
    tile = Tile(*BLOCK, 0, 4, 1)
    kept = {"cache": "*bf16", "pair_weights": fp32, "stride_cache": "i32"}
    add("reweight", kernel, tile, 0, **sizes | upstream | kept)
    kernel = gradient_kernels.weights_kernel
    for name, mask in masks.items():
        tile = by_ids if "row_ids" in mask else w
        add(f"panel {name}", kernel, tile, tile.k, **sizes | upstream | mask)
    rest = sizes | all_sums | everything
    add("panel all sums", kernel, by_ids, by_ids.k, **rest | upstream)
    add("panel all exact", kernel, by_ids, by_ids.k, **rest | exact)
    kernel = gradient_kernels.gradient_kernel
    fused = {"grad": f"*{element}", "stride_grad": "i32", "factor": fp32}
    if arch.name == "sm_90" and element != "fp32":  # the first run on a GPU compares both
        for name in ("forward clip", "panel clip"):
            other, arguments = two_blocks(out[name][1]), out[name][2]
            arguments = arguments | features(other, other.k)
            out[f"{name}, two blocks"] = (out[name][0], other, arguments)
    for d in (64, 128) if gradient else ():
        add(f"gradient {d} clip", kernel, gradient, d, **fused | upstream | linear | learned)
        add(f"gradient {d} exact", kernel, gradient, d, **fused | exact | linear | learned)
        add(f"gradient {d} siglip", kernel, gradient, d, **fused | siglip)
        add(f"gradient {d} siglip ids", kernel, gradient, d, **fused | siglip | ids)
        crowded = arch.crowded.get(arithmetic, gradient)
        for name, mask in masks.items():
            tile = crowded if name == "all" else gradient
            add(f"gradient {d} {name}", kernel, tile, d, **fused | upstream | learned | mask)
        rest = fused | everything | learned | {"row_sums": fp32}
        add(f"gradient {d} all exact", kernel, crowded, d, **rest | exact)
    if element == "fp32":  # it takes true maxima
        kept = ("maxima clip", "maxima all", "panel exact", "panel all exact", "panel siglip")
        kept += ("gradient 128 exact", "gradient 128 all exact")
        out = {k: v for k, v in out.items() if k in kept}
    return out


def built(arch_name: str, arithmetic: str, name: str):
    """One compiled variant, and its tile."""
    arch = ARCHS[arch_name]
    kernel, tile, arguments = variants(arch, arithmetic)[name]
    vectors = arguments["SCALE"] != "one" or any(x in arguments for x in ("row_limit", "row_bias"))
    masks = arguments["SELF"] + (arguments["POSITIVES"] == "lse")
    masks += arguments["SOFTPLUS"] and "row_ids" in arguments
    part = "forward" if "KEPT" in kernel.arg_names else "panel"
    exact = part == "panel" and not arguments["FIXED"]
    arguments["PARTS"] = arch.parts(tile, part, masks + vectors, exact)
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        value = arguments.get(argument)
        is_type = isinstance(value, str) and (value[0] == "*" or value == "i32")
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
    return row | count(code, labels)


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
    } | count(code, labels)


def last_exit(code: list) -> int:
    return max((at for at, (op, _) in enumerate(code) if op == "EXIT"), default=len(code))


def shortest(code: list, labels: dict, part: range) -> Counter:
    """The instructions of the shortest way through a part of the code, by forward branches alone:
    branches for tiles with positives or padding are not taken."""
    ways = {part.start: Counter()}
    for at in part:
        if at not in ways:
            continue
        op, targets = code[at]
        way = ways.pop(at)
        way[family(op)] += 1
        # BRA.U has its condition among its operands
        ends = [] if op in ("BRA", "EXIT", "s_branch") else [at + 1]
        if op.startswith(("BRA", "@BRA", "s_cbranch", "s_branch")):
            ends += [labels[x] for x in targets if at < labels.get(x, 0) <= part.stop]
        for end in ends:
            if end not in ways or way.total() < ways[end].total():
                ways[end] = way.copy()
    return ways.get(part.stop, Counter())


def count(code: list, labels: dict) -> dict:
    """Count the instructions of one thread: in the whole kernel, in one step of the loop over D,
    and in one tile outside of such steps.

    With tensor descriptors one loop runs over tiles and steps, and a branch skips the code that
    runs once per tile.
    """
    # behind the last EXIT there are only waits, which branch back
    code = code[: last_exit(code) + 1]
    labels = {x: at for x, at in labels.items() if at < len(code)}
    matrix = {at for at, (op, _) in enumerate(code) if family(op) in sum(MATRIX.values(), ())}

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
            rest = [at for at in step if at not in tile and at not in chosen]
            per_step = Counter(family(code[at][0]) for at in rest)
            per_tile = shortest(code, labels, tile) + Counter(family(code[at][0]) for at in chosen)
        else:
            outer = [x for x in inner if inside(step, x)]
            tile = min(outer, key=len) if outer else range(len(code))
            per_step = shortest(code, labels, range(step.start, step.stop - 1))
            per_tile = shortest(code, labels, range(tile.start, step.start))
            per_tile += shortest(code, labels, range(step.stop, tile.stop - 1))
        out["per_step"], out["per_tile"] = dict(per_step), dict(per_tile)
    return out


def versions() -> str:
    ptxas = run_tool("ptxas", "--version").splitlines()[-2].strip()
    return f"triton {triton.__version__}, {ptxas}"
