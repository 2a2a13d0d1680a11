"""The steps of `gpu_first_run.sh`, each run by itself: python gpu_first_run.py STEP FOLDER.

A step writes FOLDER/STEP.json; `page` writes FOLDER/page.md from what is there. With --rehearse
they run on the CPU, the Triton kernels interpreted, with tiny sizes: only to see that they work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(1, str(HERE / "predict"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import ito_kernels  # noqa: E402

FP32 = 4  # bytes


class Sizes(NamedTuple):
    """How much is measured."""

    n: int
    dims: tuple[int, ...]
    repeats: int
    copied: int  # bytes
    shared: int  # bytes that every program reads, from L2
    programs: int  # that read them, per processor
    seconds: float  # of each table of loss_throughput.py


FULL = Sizes(65536, (512, 768), 5, 2 << 30, 16 << 20, 4, 4.0)
CONTENDERS = ("eager", "open_clip form", "linear_cross_entropy ×2", "memeff", "siglip-kernel",
              "inf-cl", "cut-cross-entropy", "ito triton", "ito cuda")  # fmt: skip
TINY = Sizes(128, (160,), 1, 1 << 16, 1 << 14, 1, 0.01)


class Run(NamedTuple):
    folder: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.rehearse else FULL

    def save(self, step: str, found: dict) -> None:
        """Whole or not at all: the step may be stopped at any time."""
        path = self.folder / f"{step}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, default=str) + "\n")
        part.replace(path)

    def load(self, step: str) -> dict:
        path = self.folder / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of a few calls, after one that compiles."""
        call()
        times = []
        for _ in range(self.sizes.repeats):
            if self.rehearse:
                begin = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - begin))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return median(times)

    def features(self, n: int, d: int, m: int | None = None) -> tuple:
        torch.manual_seed(0)
        x, y = (
            F.normalize(torch.randn(k, d, device=self.device), dim=1).bfloat16().requires_grad_()
            for k in (n, m or n)
        )
        return x, y, torch.full((), 20.0, device=self.device, requires_grad=True)


# The machine.


def environment(run: Run) -> None:
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "ito_kernels": ito_kernels.__version__,
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "backends": {name: tuple(x) for name, x in ito_kernels.backends().items()},
        "packages": {
            name: importlib.util.find_spec(name) is not None
            for name in ("triton", "pytest", "memeff", "siglip_kernel", "inf_cl",
                         "cut_cross_entropy", "liger_kernel", "open_clip")
        },
        "smi": output("nvidia-smi", "-q") or output("rocm-smi", "--showallinfo"),
    }  # fmt: skip
    if found["packages"]["triton"]:
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "processors": p.multi_processor_count, "memory": p.total_memory}
        found |= {"capability": f"{p.major}.{p.minor}", "l2": getattr(p, "L2_cache_size", None)}
    run.save("environment", found)
    subprocess.run([sys.executable, "-m", "ito_kernels"], check=True)  # its own check


def output(*command: str) -> str:
    """What a program prints; empty if there is none."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def small(run: Run) -> None:
    """Losses of ragged shapes against plain PyTorch in fp64. The kernels are compiled and launched
    in all their main forms: this is what compute-sanitizer watches."""
    found, wrong = [], []
    names = [x for x in ("triton", "cuda") if ito_kernels.backends()[x].available]
    for backend in names:
        for d in (48, 160):  # the fused gradient, and panels
            x, y, scale = run.features(150, d, 150)
            ids = torch.arange(150, device=run.device) // 3
            losses = {
                "clip": lambda a, b, s, k: ito_kernels.clip_loss(a, b, s, backend=k),
                "siglip": lambda a, b, s, k: ito_kernels.siglip_loss(a, b, s, -10.0, backend=k),
                "ids": lambda a, b, s, k, ids=ids: ito_kernels.multi_positive_infonce(
                    a, b, s, query_ids=ids, key_ids=ids, backend=k
                ),
                "nt_xent": lambda a, b, s, k: ito_kernels.nt_xent_loss(a, b, 1 / s, backend=k),
            }
            for name, loss in losses.items():
                leaves = (x, y, scale)
                got = torch.autograd.grad(loss(*leaves, backend), leaves)
                exact = [t.detach().double().requires_grad_() for t in leaves]
                want = torch.autograd.grad(loss(*exact, "reference"), exact)
                error = max(
                    float((g.double() - w).norm() / w.norm())
                    for g, w in zip(got, want, strict=True)
                )
                row = {"backend": backend, "d": d, "loss": name, "error": error}
                found.append(row)
                print(row, flush=True)
                if not error < 3e-2:
                    wrong.append(row)
    run.save("small", {"rows": found})
    if wrong or not names:
        sys.exit(f"wrong: {wrong}" if names else "neither triton nor cuda can run here")


def sanitizer(run: Run) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        run.save("sanitizer", {"skipped": "compute-sanitizer is not installed"})
        return
    found = {}
    # every tensor its own allocation, so that a read behind it is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__]
        command += ["small", str(run.folder / "sanitized")]
        done = subprocess.run(command, env=environment)
        found[kind] = done.returncode
        run.save("sanitizer", {"exit": found})
    if any(found.values()):
        sys.exit(f"compute-sanitizer: {found}")


def tests(run: Run) -> None:
    if importlib.util.find_spec("pytest") is None:
        run.save("tests", {"skipped": "pytest is not installed"})
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [*command, "tests/kernels/test_gpu.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        counts, failed = {}, []
        for line in process.stdout:
            print(line, end="", flush=True)
            if outcome := re.search(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)", line):
                counts[outcome[2]] = counts.get(outcome[2], 0) + 1
                if outcome[2] in ("FAILED", "ERROR"):
                    failed.append(outcome[1])
                run.save("tests", {"counts": counts, "failed": failed})  # kept if time runs out
    run.save("tests", {"counts": counts, "failed": failed, "exit": process.returncode})
    if process.returncode not in (0, 5):  # 5: there was no test, without a GPU
        sys.exit(process.returncode)


# Rates.


def bandwidth(run: Run) -> None:
    """Bytes per second: of memory, copying and reading, and of L2, where every program reads the
    same bytes, past L1."""
    size = run.sizes
    x = torch.zeros(size.copied // FP32, device=run.device)
    y = torch.empty_like(x)
    found = {
        "copy": 2 * size.copied / run.milliseconds(lambda: y.copy_(x)) * 1e3,
        "read": size.copied / run.milliseconds(x.sum) * 1e3,
    }
    run.save("bandwidth", found)

    from read_kernel import read

    from ito_kernels.similarity.triton.tiles import COMPILE

    programs = size.programs * processors(run)
    out = torch.zeros(programs, device=run.device)
    block = 4096
    blocks = size.shared // FP32 // block

    def from_l2() -> None:
        read[(programs,)](x, out, blocks, BLOCK=block, num_warps=8, **COMPILE)

    ms = run.milliseconds(from_l2)
    found |= {"l2": programs * blocks * block * FP32 / ms * 1e3, "l2_bytes": size.shared}
    run.save("bandwidth", found)


def processors(run: Run) -> int:
    return 4 if run.rehearse else torch.cuda.get_device_properties(0).multi_processor_count


def products(run: Run) -> None:
    """The vendor's products at the shapes of the gradients, added in fp32, and of the scores."""
    from ito_kernels.similarity import gpu
    from ito_kernels.similarity.triton import tiles

    rows = []
    for d in run.sizes.dims:
        n = run.sizes.n
        high, wide = tiles.panel(n, n, d, gpu.PANEL_BYTES // 2, processors(run), False)
        w = torch.randn(high, wide, device=run.device).bfloat16()
        x, y, _ = (t.detach() for t in run.features(high, d, wide))
        grad_x, grad_y = (torch.zeros(k, d, device=run.device) for k in (high, wide))
        calls = {
            "W·B": ((high, d, wide), partial(gpu.accumulate, grad_x, [w], [y])),
            "Wᵀ·A": ((wide, d, high), partial(gpu.accumulate, grad_y, [w.T], [x])),
            "scores": ((high, wide, d), partial(torch.mm, x, y.T)),
        }
        for name, ((m, k, depth), call) in calls.items():
            ms = run.milliseconds(call)
            tflops = 2 * m * k * depth / ms * 1e-9
            rows.append(
                {"product": name, "shape": [m, k, depth], "d": d, "ms": ms, "tflops": tflops}
            )
            run.save("products", {"rows": rows})


# The kernels.


def losses(run: Run, d: int) -> dict[str, tuple[Callable, tuple]]:
    """CLIP with all exponentials kept for the gradients, and with none."""
    leaves = run.features(run.sizes.n, d)
    triton = {"backend": "triton"}

    def clip(memory: int) -> torch.Tensor:
        with patch.dict(os.environ, ITO_TILE_CACHE_BYTES=str(memory)):
            return ito_kernels.clip_loss(*leaves, **triton)

    memory = 2 * (run.sizes.n + 256) ** 2 + 4 * (run.sizes.n + 256)
    return {
        "clip": (lambda: clip(0), leaves),
        "clip, kept": (lambda: clip(memory), leaves),
        "siglip": (lambda: ito_kernels.siglip_loss(*leaves, -10.0, **triton), leaves),
    }


def kernels(run: Run) -> None:
    """The time of a loss and its gradients, and of each kernel in it."""
    rows = []
    for d in run.sizes.dims:
        for name, (loss, leaves) in losses(run, d).items():

            def both(loss=loss, leaves=leaves) -> None:
                torch.autograd.grad(loss(), leaves)

            row = {"loss": name, "n": run.sizes.n, "d": d, "ms": run.milliseconds(both)}
            if not run.rehearse:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both()
                row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
            rows.append(row | {"kernels": profiled(run, both)})
            run.save("kernels", {"rows": rows})


def profiled(run: Run, call: Callable[[], None]) -> dict[str, float]:
    """Milliseconds by the name of the kernel."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CPU if run.rehearse else ProfilerActivity.CUDA
    with profile(activities=[kind]) as profiler:
        call()
        if not run.rehearse:
            torch.cuda.synchronize()
    out: dict[str, float] = {}
    for event in profiler.events():
        ms = (event.time_range.end - event.time_range.start) / 1e3
        if run.rehearse or event.device_type != torch.autograd.DeviceType.CPU:
            out[event.name] = out.get(event.name, 0.0) + ms
    return dict(sorted(out.items(), key=lambda x: -x[1])[:20])


def tiles(run: Run) -> None:
    """The forward pass and the whole loss with each tile that autotuning compares: the table's and
    two blocks on a processor first."""
    from ito_kernels.similarity.triton import tiles as table

    device = torch.device(run.device, 0) if not run.rehearse else torch.device("cpu")
    arch, number = table.device(device)
    rows = []
    for d in run.sizes.dims[::-1]:
        loss, leaves = losses(run, d)["clip"]

        def forward(loss=loss) -> None:
            with torch.no_grad():
                loss()

        def both(loss=loss, leaves=leaves) -> None:
            torch.autograd.grad(loss(), leaves)

        for kernel, call in (("forward", forward), ("panel", both)):
            ours = getattr(arch, kernel)["half"]
            tried = table.tuning_candidates(ours)[: 2 if run.rehearse else None]
            # two blocks on a processor need twice the programs
            places = [(tile, 1) for tile in tried]
            if kernel == "forward":
                places.insert(2, (tried[1], 2))
            for tile, times in places:
                row = {"kernel": kernel, "d": d, "tile": tile, "in_table": tile == ours,
                       "programs_per_processor": times}  # fmt: skip
                with in_place_of(table, arch, kernel, tile, number * times):
                    try:
                        row["ms"] = run.milliseconds(call)
                    except Exception as error:  # it may need more than the processor has
                        row["error"] = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
                run.save("tiles", {"arch": arch.name, "rows": rows})


@contextmanager
def in_place_of(table, arch, kernel: str, tile, number: int):
    """The table of tiles with another entry."""
    other = arch._replace(**{kernel: getattr(arch, kernel) | {"half": tile}})
    with patch.object(table, "device", lambda device: (other, number)):
        yield


def throughput(run: Run) -> None:
    """loss_throughput.py with the packages that are installed, without what compiles for long."""
    command = [sys.executable, str(HERE / "loss_throughput.py"), "--device", run.device]
    command += ["--contender", *(("eager", "ito triton") if run.rehearse else CONTENDERS)]
    command += ["--seconds", str(run.sizes.seconds), "--dtype", "bf16"]
    if run.rehearse:
        command += ["--dim", "64", "--batch", "64", "--quick"]
    else:
        command += ["--dim", "768", "--batch", "16384", "65536"]
    codes = {}
    for loss in ("clip", "siglip"):
        out = run.folder / f"throughput-{loss}.json"
        codes[loss] = subprocess.run([*command, "--loss", loss, "--out", str(out)]).returncode
        run.save("throughput", {"exit": codes})
    if any(codes.values()):
        sys.exit(f"loss_throughput.py: {codes}")


# The page.


def page(run: Run) -> None:
    import gpu_model as model

    environment = run.load("environment")
    name, chip = chip_of(environment.get("gpu", ""), model.CHIPS)
    rows = model.load()
    lines = ["# First run on a GPU", ""]
    if run.rehearse:
        lines += [
            "**A rehearsal on a CPU with tiny sizes: no time on this page means anything.**",
            "",
        ]
    lines += [
        f"{environment.get('gpu', 'no GPU')}; torch {environment.get('torch')}, triton"
        f" {environment.get('triton')}, commit {environment.get('commit') or 'unknown'}."
        + (f" Predicted: {name}, the ranges of docs/gpu-static.md." if chip else
           " This GPU is not in the model: nothing is predicted."),
        "",
    ]  # fmt: skip
    steps = [json.loads(x) for x in (run.folder / "steps.jsonl").read_text().splitlines()]
    result = {0: "done", 124: "stopped at its limit", 137: "stopped at its limit"}
    lines += [model.table(["step", "seconds", "result"], [
        [s["step"], f"{s['seconds']} of {s['limit']}", note(run, s["step"]) or
         result.get(s["exit"], f"failed, exit {s['exit']}: see {s['step']}.log")] for s in steps
    ]), ""]  # fmt: skip
    for part in (rates_part, losses_part, tiles_part, throughput_part):
        try:
            lines += [*part(run, chip, rows, model), ""]
        except (KeyError, IndexError, TypeError) as error:  # a step was stopped half-way
            lines += [f"{part.__name__}: incomplete ({type(error).__name__}: {error})", ""]
    (run.folder / "page.md").write_text("\n".join(lines).rstrip() + "\n")


def note(run: Run, step: str) -> str:
    found = run.load(step)
    if "skipped" in found:
        return f"not run: {found['skipped']}"
    if step == "tests" and found.get("counts"):
        counts = ", ".join(f"{v} {k.lower()}" for k, v in found["counts"].items())
        return counts + "".join(f"; {x}" for x in found["failed"][:5])
    return ""


def chip_of(gpu: str, chips: dict) -> tuple[str, object]:
    """The chip of the model that a GPU's name says."""
    for name, chip in chips.items():
        if re.search(rf"\b{name.split()[0]}\b", gpu.replace("_", " ")):
            return name, chip
    return "", None


def rates_part(run: Run, chip, rows: dict, model) -> list[str]:
    found, lines = run.load("bandwidth"), []
    if found:

        def assumed(x, scale: float = 1.0) -> str:
            return f"{x.slow * scale:.2f} to {x.fast * scale:.2f}" if chip else "–"

        share = model.ASSUMPTIONS["memory"].ends
        cells = [["memory, copy", f"{found['copy'] / 1e12:.2f}",
                  assumed(share, chip.memory if chip else 0)],
                 ["memory, read", f"{found['read'] / 1e12:.2f}", "–"]]  # fmt: skip
        if "l2" in found:
            cells.append(["L2, read", f"{found['l2'] / 1e12:.2f}", assumed(chip and chip.l2)])
        lines += [model.table(["TB/s", "measured", "assumed"], cells), ""]
    cells = []
    for r in run.load("products").get("rows", ()):
        m, n, k = r["shape"]
        expected = "–"
        if chip:
            ends = [2e-9 * m * n * k / model.vendor_ms(chip, m, n, k, x) for x in ("slow", "fast")]
            expected = " to ".join(f"{x:.0f}" for x in ends)
        cells.append([r["product"], f"{m} × {n} × {k}", f"{r['tflops']:.0f}", expected])
    if cells:
        lines += [model.table(["vendor's product", "shape", "TFLOP/s", "predicted"], cells)]
    return lines


def losses_part(run: Run, chip, rows: dict, model) -> list[str]:
    cells = []
    designs = {"clip": "CLIP", "clip, kept": "CLIP, exponentials kept", "siglip": "SigLIP"}
    for r in run.load("kernels").get("rows", ()):
        times = {"in all": r["ms"]}
        for kernel, ms in r["kernels"].items():
            if part := part_of(kernel):
                times[part] = times.get(part, 0.0) + ms
        predicted = {}
        if chip and designs[r["loss"]] in model.available(rows, chip):
            predicted = model.parts(model.DESIGNS[designs[r["loss"]]], chip, r["n"], r["d"], rows)
            predicted["in all"] = model.total(predicted)
        for part, ms in times.items():
            expected = predicted.get(part)
            ratio = f"{ms / expected.middle:.2f}" if expected else "–"
            cells.append([r["loss"], str(r["d"]), part, f"{ms:.1f}", str(expected or "–"), ratio])
    head = ["loss", "D", "part", "measured ms", "predicted ms", "measured / middle"]
    return [model.table(head, cells)] if cells else []


def part_of(kernel: str) -> str:
    """Which part of a loss a kernel is; empty for small ones."""
    for part, names in kernels_of_parts().items():
        if any(kernel.startswith(name) for name in names):
            return part
    # the names that cuBLAS, CUTLASS and hipBLASLt give their kernels
    return "products" if re.search("gemm|nvjet|cutlass|xmma|Cijk", kernel) else ""


@cache
def kernels_of_parts() -> dict[str, list[str]]:
    if importlib.util.find_spec("triton") is None:
        return {}
    from ito_kernels.similarity.triton import backward, forward

    return {
        part: [name for name in vars(module) if name.endswith("_kernel")]
        for part, module in (("forward", forward), ("W", backward))
    }


def tiles_part(run: Run, chip, rows: dict, model) -> list[str]:
    found = run.load("tiles")
    tried = [r for r in found.get("rows", ()) if "ms" in r]
    cells = [
        [r["kernel"], str(r["d"]), "Tile({}, {}, {}, {}, {})".format(*r["tile"]),
         str(r["programs_per_processor"]), "yes" if r["in_table"] else "",
         f"{r['ms']:.2f}" if "ms" in r else r["error"]] for r in found.get("rows", ())
    ]  # fmt: skip
    if not cells:
        return []
    head = [
        "kernel",
        "D",
        "tile",
        "programs per processor",
        "in the table",
        "ms (panel: whole loss)",
    ]
    lines = [model.table(head, cells), ""]
    for kernel in ("forward", "panel"):
        for d in sorted({r["d"] for r in tried}):
            of_kernel = [r for r in tried if (r["kernel"], r["d"]) == (kernel, d)]
            if not of_kernel:
                continue
            best = min(of_kernel, key=lambda r: r["ms"])
            if best["in_table"]:
                lines.append(f"- {kernel}, D = {d}: the table's tile is the fastest.")
                continue
            tile = "Tile({}, {}, {}, {}, {})".format(*best["tile"])
            lines.append(
                f"- {kernel}, D = {d}: {tile} is the fastest. To make it permanent, write it into"
                f" `ito_kernels/similarity/triton/tiles.py`: ARCHS[{found['arch']!r}],"
                f' `{kernel}={{"half": {tile}}}`'
                + (", and let `Plan.split` in plan.py make twice the programs."
                   if best["programs_per_processor"] > 1 else ".")
            )  # fmt: skip
    return lines


def throughput_part(run: Run, chip, rows: dict, model) -> list[str]:
    cells = []
    for loss in ("clip", "siglip"):
        for r in run.load(f"throughput-{loss}").get("rows", ()):
            cells.append([
                loss, f"{r['n']:,}", str(r["d"]), r["contender"], f"{r['both']['median']:.1f}",
                f"{r['extra_bytes'] / (1 << 20):,.0f}" if r["extra_bytes"] else "–",
            ])  # fmt: skip
    return [model.table(["loss", "N", "D", "who", "ms", "extra MiB"], cells)] if cells else []


STEPS = {
    f.__name__: f for f in (environment, small, bandwidth, products, tiles, kernels, tests,
                            throughput, sanitizer, page)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    STEPS[options.step](Run(options.folder, options.rehearse))


if __name__ == "__main__":
    main()
