"""The predicted times of the GPU kernels: the formulas against numbers worked out by hand, the
ranges, and the pages that name them."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "predict"))

import gpu_model as model  # noqa: E402
from gpu_model import CHIPS, DESIGNS, ENDS, Range  # noqa: E402
from published import PUBLISHED  # noqa: E402

from ito_kernels.similarity.triton.kept import LEAST_D  # noqa: E402

ROWS = model.load()
H100 = CHIPS["H100 SXM"]
# One processor of a chip whose every rate is 1,000 a clock of 1 ns, without any loss.
UNIT = model.Chip(
    "sm_90", 1, 1.0, 1000, 1000, 1000, 1.0, 1.0,
    Range(1.0, 1.0), Range(1.0, 1.0), Range(1.0, 1.0), "",
)  # fmt: skip


@pytest.fixture
def lossless(monkeypatch):
    ones = {k: a._replace(ends=Range(1.0, 1.0)) for k, a in model.ASSUMPTIONS.items()}
    monkeypatch.setattr(model, "ASSUMPTIONS", ones)


def row(tile=(100, 10, 8, 4, 3), kernel="forward clip", shared=150 << 10, **counts) -> dict:
    """A kernel of one block on a processor, unless less shared memory is given."""
    return {
        "arch": "sm_90", "kernel": kernel, "tile": list(tile), "registers": 200, "shared": shared,
        "element": 2, "ahead": False, "per_step": {"HGMMA": 9}, "per_tile": counts,
    }  # fmt: skip


def clocks(r: dict, d: int = 64, moved: int = 0) -> float:
    return model.tile_clocks(r, UNIT, d, moved, "fast")


def test_what_follows_a_tile_comes_after_its_products(lossless):
    # 2·100·10·64 FLOP at 1,000 a clock: 128; reads (100 + 10)·64·2 bytes: 14.08
    products = 128.0
    assert clocks(row()) == pytest.approx(products)
    # 500 instructions of 128 threads at 1,000 lanes: 64
    assert clocks(row(FFMA=500)) == pytest.approx(products + 64)
    assert clocks(row(FFMA=300, special=200)) == pytest.approx(products + 64)
    assert clocks(row(SHFL=500)) == pytest.approx(products + 64)


def test_reads_from_l2_and_the_loop_can_be_longer_than_the_products(lossless):
    flat = row((10, 1, 8, 4, 3))  # 1.28 of products, 1.408 of reads
    assert clocks(flat) == pytest.approx(1.408)
    busy = row() | {"per_step": {"HGMMA": 9, "IADD3": 1000}}  # 8 steps of 128
    assert clocks(busy) == pytest.approx(1024)


def test_the_next_tile_is_read_beside_what_follows_this_one(lossless):
    """For as many steps as there are stages: 2 of 8."""
    flat = row((10, 1, 8, 4, 3), FFMA=500) | {"ahead": True}
    assert clocks(flat) == pytest.approx(max(1.28, 1.408 * 6 / 8) + 64)


def test_two_blocks_hide_each_other(lossless, monkeypatch):
    two = row(shared=100 << 10, FFMA=500)
    assert model.blocks(two) == 2
    assert clocks(two) == pytest.approx(128)
    half = model.ASSUMPTIONS["beside"]._replace(ends=Range(0.5, 0.5))
    monkeypatch.setitem(model.ASSUMPTIONS, "beside", half)
    assert clocks(two) == pytest.approx(128 + 32)


def test_stores_that_are_not_hidden(lossless, monkeypatch):
    assert clocks(row(), moved=2) == pytest.approx(128)  # 2,000 bytes at 1,000 a clock
    none = model.ASSUMPTIONS["hidden"]._replace(ends=Range(0.0, 0.0))
    monkeypatch.setitem(model.ASSUMPTIONS, "hidden", none)
    assert clocks(row(), moved=2) == pytest.approx(130)
    assert clocks(row(), moved=2000) == pytest.approx(2128)


def test_whole_waves():
    assert model.waves(264, 132) == 1
    assert model.waves(265, 132) == pytest.approx(396 / 265)
    # 4,096 × 768 in tiles of 128 × 256 are 96: of 132 processors 36 have no work
    even = 2 * 4096 * 768 * 1000 / (H100.best * model.share("vendor", "fast") * 1e9)
    assert model.vendor_ms(H100, 4096, 768, 1000, "fast") == pytest.approx(even * 132 / 96)


def test_a_forward_pass_is_the_busiest_program(lossless):
    """10 × 100 tiles of one processor."""
    ms = model.pass_ms(row(), UNIT, 1000, 64, 0, "fast")
    assert ms == pytest.approx(10 * 100 * 128e-6)


def test_every_range_is_fast_first_and_contains_its_middle():
    for a in model.ASSUMPTIONS.values():
        assert a.ends.fast >= a.ends.slow > 0
        assert a.source
    for name, chip in CHIPS.items():
        assert chip.sources, name
        for x in (chip.loop, chip.l2, chip.clock):
            assert x.fast >= x.slow > 0, name
        assert chip.loop.fast < chip.best < chip.peak
        for design in model.available(ROWS, chip).values():
            for part in model.parts(design, chip, 65536, 768, ROWS).values():
                assert 0 < part.fast < part.middle < part.slow


def test_no_time_is_below_the_peak():
    for chip in CHIPS.values():
        for design in model.available(ROWS, chip).values():
            for d in (128, 512, 768):
                least = design.products * 2 * 65536**2 * d / chip.peak * 1e-9
                assert model.total(model.parts(design, chip, 65536, d, ROWS)).fast > least


def test_the_triton_kernels_are_predicted_for_all_five_gpus():
    for chip in CHIPS.values():
        assert {"CLIP", "SigLIP"} <= model.available(ROWS, chip).keys()


def test_more_instructions_take_longer():
    clip = DESIGNS["CLIP"]
    slower = dict(ROWS)
    forward = ROWS["sm_90", "forward clip"]
    more = {op: 4 * count for op, count in forward["per_tile"].items()}
    slower["sm_90", "forward clip"] = forward | {"per_tile": more}
    before, after = (model.parts(clip, H100, 65536, 768, x) for x in (ROWS, slower))
    assert after["forward"].fast > 1.2 * before["forward"].fast
    assert after["W"] == before["W"]


@pytest.mark.parametrize("part", ["per_step", "per_tile"])
def test_a_kernel_whose_loop_was_not_found_has_no_time(part):
    rows = ROWS | {("sm_90", "panel clip"): ROWS["sm_90", "panel clip"] | {part: {}}}
    with pytest.raises(ValueError, match="panel clip on sm_90: no loop"):
        model.parts(DESIGNS["CLIP"], H100, 65536, 768, rows)


def test_kept_exponentials_trade_a_product_for_memory():
    """The design with three products: its forward pass stores 2 bytes per score, and a pass makes W
    of them at the rate of memory."""
    times = model.parts(DESIGNS["CLIP, exponentials kept"], H100, 65536, 768, ROWS)
    four = model.parts(DESIGNS["CLIP"], H100, 65536, 768, ROWS)
    stored = 4 * 65536**2 / 3.35e12 * 1e3
    for end in ENDS:
        assert getattr(times["W"], end) == pytest.approx(
            stored / getattr(model.ASSUMPTIONS["memory"].ends, end)
        )
    assert times["forward"].slow > four["forward"].slow
    assert model.total(times).slow < model.total(four).slow


def test_where_keeping_exponentials_pays():
    """From `kept.LEAST_D` on, at either end of all assumptions, on every chip; on an H100 not at
    half of it."""

    def gain(chip, d: int) -> list[float]:
        kept, again = (
            model.total(model.parts(DESIGNS[x], chip, 65536, d, ROWS))
            for x in ("CLIP, exponentials kept", "CLIP")
        )
        return [y / x for x, y in zip(kept, again, strict=True)]

    for chip in model.CHIPS.values():
        assert min(gain(chip, LEAST_D)) > 1.03
    assert max(gain(H100, LEAST_D // 2)) < 1


def test_published_figures():
    """Nothing in the model is fitted to them. No more than 1.4 times off, either way."""
    for f, ms in zip(PUBLISHED, model.all_published(), strict=True):
        assert ms.fast < ms.slow
        assert 1 / 1.4 < f.ms / ms.middle < 1.4, f
    liger = PUBLISHED[-1]  # three products of 8,192 × 131,072 × 2,048 at 694.9 TFLOP/s
    assert liger.ms == pytest.approx(3 * 2 * 8192 * 131072 * 2048 / 694.9e12 * 1e3, rel=1e-3)


def test_the_page_shows_what_the_model_says():
    page = model.PAGE.read_text()
    assert model.written(page, model.blocks_of_page(ROWS)) == page


def test_the_page_on_speed_shows_what_the_model_says():
    page = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    assert model.page_on_speed(ROWS) in page


def test_predictions_are_called_predictions():
    """In the text, beside each number of milliseconds on a GPU."""
    on_a_gpu = r"(H100|H200|A100|B200|MI300X|GPU).*\d ms|\d ms.*(H100|H200|A100|B200|MI300X|GPU)"
    pages = [ROOT / "docs" / f"{name}.md" for name in ("speed", "scaling", "gpu-static", "cuda")]
    for page in (ROOT / "README.md", *pages):
        lines = page.read_text().splitlines()
        text = "\n".join(x for x in lines if not x.startswith("|"))
        for paragraph in re.split(r"\n(?=\n|- )", text):
            if re.search(on_a_gpu, " ".join(paragraph.split())):
                assert re.search(r"[Pp]redict|model|on\s+a CPU", paragraph), (page, paragraph)
