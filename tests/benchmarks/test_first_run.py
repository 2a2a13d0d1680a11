"""The first run on a GPU: a rehearsal on the CPU, its page from made-up measurements, and what
happens to a step that fails or hangs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ito_kernels.similarity.triton import tiles

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_first_run as first  # noqa: E402
import gpu_model as model  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_first_run.sh"
needs_pretended = pytest.mark.skipif(
    find_spec("dry_device") is None, reason="there is no pretended GPU in benchmarks/predict"
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(folder: Path, *options: str, **environment: str) -> list[dict]:
    """Run the script. Returns what it recorded of its steps."""
    paths = os.pathsep.join([str(ROOT), *(x for x in sys.path if x)])
    subprocess.run(
        ["bash", str(SCRIPT), *options, str(folder)], check=True, capture_output=True,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": paths} | environment,
    )  # fmt: skip
    return [json.loads(x) for x in (folder / "steps.jsonl").read_text().splitlines()]


@needs_triton
def test_a_rehearsal(tmp_path):
    """On the interpreter, with the quickest steps that launch kernels."""
    steps = run(tmp_path, "--rehearse", STEPS="products tiles")
    assert [(s["step"], s["exit"]) for s in steps] == [("products", 0), ("tiles", 0), ("page", 0)]
    page = (tmp_path / "page.md").read_text()
    assert "rehearsal" in page
    assert "| products | " in page
    tried = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    assert {r["kernel"] for r in tried} == {"forward", "panel"}
    assert all(r["ms"] > 0 for r in tried)
    assert [r["in_table"] for r in tried if r["kernel"] == "panel"] == [True, False]


@pytest.mark.slow
@needs_triton
def test_a_whole_rehearsal(tmp_path):
    steps = run(tmp_path, "--rehearse")
    assert [s["exit"] for s in steps] == [0] * len(steps)
    assert {s["step"] for s in steps} == set(first.STEPS)
    assert len(json.loads((tmp_path / "small.json").read_text())["rows"]) >= 8
    page = (tmp_path / "page.md").read_text()
    for word in ("L2, read", "Wᵀ·A", "| clip | 160 | in all |", "| ito triton |"):
        assert word in page, word


class Event:
    """A CUDA event of a GPU that takes a millisecond for everything."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


@needs_triton
@needs_pretended
def test_on_a_pretended_gpu(tmp_path, monkeypatch):
    """What the steps do on the host of a Hopper GPU; nothing is computed."""
    from dry_device import pretended

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(first, "profiled", lambda *_: {"cutlass_gemm": 2.0})
    monkeypatch.setattr(first, "FULL", first.FULL._replace(n=512, copied=1 << 16, shared=1 << 14))
    this = first.Run(tmp_path, rehearse=False)
    with pretended(90):
        for step in (first.bandwidth, first.products, first.tiles, first.kernels):
            step(this)
    rows = this.load("tiles")["rows"]
    assert all(r.get("ms") == 1.0 for r in rows), rows
    table = tiles.ARCHS["sm_90"].forward["half"]
    tried = [tuple(r["tile"]) for r in rows if r["kernel"] == "forward" and r["d"] == 768]
    assert tried[:3] == [table, tiles.two_blocks(table), tiles.two_blocks(table)]
    assert {r["loss"] for r in this.load("kernels")["rows"]} == {"clip", "clip, kept", "siglip"}


def test_a_step_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $2 in small) exit 3 ;; bandwidth) exec sleep 60 ;; esac\n")
    python.chmod(0o755)
    # 15 of the seconds are kept for the page
    steps = run(tmp_path / "out", PYTHON=str(python), LIMIT="18",
                STEPS="small bandwidth tests sanitizer")  # fmt: skip
    found = {s["step"]: s["exit"] for s in steps}
    assert found == {"small": 3, "bandwidth": 124, "tests": 124, "sanitizer": 124, "page": 0}
    assert sum(s["seconds"] for s in steps) <= 6


@pytest.fixture
def measured(tmp_path):
    """A run on an H100 whose times are made up."""
    this = first.Run(tmp_path, rehearse=False)
    steps = [
        {"step": "tests", "seconds": 140, "limit": 140, "exit": 124},
        {"step": "small", "seconds": 9, "limit": 60, "exit": 1},
        {"step": "sanitizer", "seconds": 1, "limit": 90, "exit": 0},
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    this.save("environment", {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "triton": "3.9.0"})
    this.save("sanitizer", {"skipped": "compute-sanitizer is not installed"})
    this.save("bandwidth", {"copy": 2.7e12, "read": 3e12, "l2": 7.5e12})
    product = {"product": "W·B", "shape": [11264, 768, 11264], "d": 768, "ms": 0.3, "tflops": 650.0}
    this.save("products", {"rows": [product]})
    kernels = {"logsumexp_kernel": 15.0, "sm90_xmma_gemm_bf16": 11.0, "nvjet_tst": 10.0, "copy": 1}
    row = {"loss": "clip", "n": 65536, "d": 768, "ms": 60.0, "kernels": kernels}
    this.save("kernels", {"rows": [row]})
    one, two = [256, 128, 64, 8, 4], [128, 128, 64, 4, 3]
    tiles = [
        {"kernel": "forward", "d": 768, "tile": tile, "ms": ms, "in_table": tile is one,
         "programs_per_processor": programs}
        for tile, ms, programs in ((one, 15.0, 1), (two, 14.0, 1), (two, 12.0, 2))
    ]  # fmt: skip
    this.save("tiles", {"arch": "sm_90", "rows": tiles})
    return this


def test_the_page_puts_measured_beside_predicted(measured):
    first.page(measured)
    page = (measured.folder / "page.md").read_text()
    rows = model.load()
    clip = model.parts(model.DESIGNS["CLIP"], model.CHIPS["H100 SXM"], 65536, 768, rows)
    whole = model.total(clip)
    assert f"| clip | 768 | in all | 60.0 | {whole} | {60 / whole.middle:.2f} |" in page
    products = clip["products"]
    assert f"| products | 21.0 | {products} | {21 / products.middle:.2f} |" in page
    assert "| memory, copy | 2.70 | 2.21 to 2.85 |" in page  # 3.35 × 0.66 and 0.85
    assert "| L2, read | 7.50 | 6.90 to 9.70 |" in page
    assert "| W·B | 11264 × 768 × 11264 | 650 | 584 to 723 |" in page  # 0.735, 0.91 of 794.5


def test_the_page_says_which_tile_to_write_where(measured):
    first.page(measured)
    page = (measured.folder / "page.md").read_text()
    assert "ARCHS['sm_90'], `forward={\"half\": Tile(128, 128, 64, 4, 3)}`" in page
    assert "twice the programs" in page


def test_the_page_says_what_did_not_run(measured):
    first.page(measured)
    page = (measured.folder / "page.md").read_text()
    assert "| tests | 140 of 140 | stopped at its limit |" in page
    assert "| small | 9 of 60 | failed, exit 1: see small.log |" in page
    assert "| sanitizer | 1 of 90 | not run: compute-sanitizer is not installed |" in page
    (measured.folder / "kernels.json").write_text('{"rows": [{"loss": "clip"}]}')
    first.page(measured)
    assert "losses_part: incomplete" in (measured.folder / "page.md").read_text()


def test_gpus_are_known_by_their_names():
    chips = {
        "NVIDIA A100-SXM4-80GB": "A100 SXM", "NVIDIA H200": "H200 SXM", "NVIDIA B200": "B200",
        "AMD Instinct MI300X VF": "MI300X", "NVIDIA L40S": "", "": "",
    }  # fmt: skip
    for gpu, name in chips.items():
        assert first.chip_of(gpu, model.CHIPS)[0] == name
