"""What the GPU backends ask of torch, Triton, the GPU and the features, without a GPU."""

import re
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ito_kernels
from ito_kernels import clip_loss
from ito_kernels.similarity import cuda, dispatch, gpu, triton
from ito_kernels.similarity.cuda_structs import arithmetic
from ito_kernels.similarity.spec import Problem

TRITON = dispatch.load("triton")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def on_gpu(dtype=torch.bfloat16):
    """A problem whose tensors say that they are on a GPU."""
    a = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, is_cuda=True)
    return SimpleNamespace(a=a, n=8, m=8)


@pytest.fixture
def machine(monkeypatch):
    """An H100 with the versions that are needed."""
    card = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card.name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "_INSTALLED", True)
    installed = SimpleNamespace(__version__="3.6.0")
    monkeypatch.setitem(sys.modules, "triton", installed)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    native = SimpleNamespace(TILE=128, unavailable=lambda: "")
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(cuda=native))
    monkeypatch.setattr(dispatch, "_warn_once", dispatch._warn_once.__wrapped__)
    return SimpleNamespace(card=card, triton=installed)


def reasons(name: str) -> set[str]:
    """What a backend says of this machine, and of a problem on its GPU."""
    ok, reason = ito_kernels.backends()[name]
    supported, detail = dispatch.load(name).supports(on_gpu())
    assert ok is supported is False
    return {reason, detail}


def test_a_machine_that_has_what_is_needed(machine):
    for name in ("triton", "cuda"):
        assert ito_kernels.backends()[name] == (True, "H100")
        assert dispatch.load(name).supports(on_gpu())[0]
    assert dispatch.choose(on_gpu()) is TRITON


@pytest.mark.parametrize("side", ["n", "m"])
def test_rows_are_counted_with_32_bits(side, machine):
    problem = on_gpu()
    for name in ("triton", "cuda"):
        setattr(problem, side, 2**30)
        assert dispatch.load(name).supports(problem)[0]
        setattr(problem, side, 2**30 + 1)
        assert "more than 2^30 rows" in dispatch.load(name).supports(problem)[1]


@pytest.mark.parametrize("version", ["2.12.1+cu128", "2.9.0", "1.13.1"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_old_torch(name, version, machine, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert reasons(name) == {f"needs torch 2.13, got {version}"}


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_old_gpu(name, machine):
    machine.card.__dict__.update(name="T4", major=7, minor=5)
    assert reasons(name) == {"needs compute capability 8.0, T4 has 7.5"}


@pytest.mark.parametrize("version", ["3.5.1", "3.5.0+git5389ed79", "2.1.0"])
def test_an_old_triton(version, machine):
    machine.triton.__version__ = version
    assert reasons("triton") == {f"needs Triton 3.6, got {version}"}


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0+gitabc"])
def test_later_versions_are_taken(version, machine, monkeypatch):
    machine.triton.__version__ = version
    monkeypatch.setattr(torch, "__version__", "2.100.0.dev20270101")
    assert TRITON.supports(on_gpu())[0]


def test_a_triton_that_cannot_be_imported(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    ok, reason = TRITON.status()
    assert not ok
    assert reason.startswith("the triton package cannot be imported: ")


def test_no_triton_and_no_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons("triton") == {"there is no CUDA device, and TRITON_INTERPRET=1 is not set"}
    monkeypatch.setattr(triton, "_INSTALLED", False)
    assert reasons("triton") == {"the triton package is not installed"}


def test_another_gpu_than_the_current_one(machine, monkeypatch):
    """The problem's own GPU counts."""
    cards = {0: SimpleNamespace(name="T4", major=7, minor=5), 1: machine.card}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: cards[torch.device(device).index or 0]
    )
    problem = on_gpu()
    for index, ok in ((0, False), (1, True)):
        problem.a.device = torch.device("cuda", index)
        assert TRITON.supports(problem)[0] is ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_running_without_the_kernels_is_said(dtype, machine, monkeypatch):
    """fp64 has no kernels anyway."""
    machine.triton.__version__ = "3.5.0"
    monkeypatch.setattr(dispatch.load("chunked"), "supports", lambda problem: (True, ""))
    says = pytest.warns(UserWarning, match="without its Triton kernels.*needs Triton 3.6, got 3.5")
    with says if dtype == torch.bfloat16 else nullcontext():
        assert dispatch.choose(on_gpu(dtype)).name == "chunked"


def test_the_oldest_torch_is_that_of_the_package():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (major, minor), *_ = re.findall(r'"torch>=(\d+)\.(\d+)"', text)
    assert (int(major), int(minor)) == gpu.MIN_TORCH


# ---- fp32


@pytest.fixture
def precision():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    yield matmul
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("setting", "cuda_mode"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_fp32_follows_the_newer_setting_too(setting, cuda_mode, precision):
    """`torch.get_float32_matmul_precision` raises once the newer setting was changed."""
    torch.set_float32_matmul_precision("highest")
    precision.fp32_precision = "ieee" if setting == "tf32" else "tf32"
    precision.fp32_precision = setting
    assert gpu.matmul_precision() == {"tf32": "medium", "ieee": "highest"}[setting]
    assert arithmetic(torch.float32) == cuda_mode


# ---- features


def strided(rows: int, d: int, stride: tuple[int, int], offset: int = 0, dtype=torch.bfloat16):
    storage = torch.randn(offset + 1 + (rows - 1) * stride[0] + (d - 1) * stride[1]).to(dtype)
    return storage.as_strided((rows, d), stride, offset)


FEATURES = {
    "expanded": torch.randn(1, 64).bfloat16().expand(40, 64),
    "one row, expanded": torch.randn(64).expand(1, 64).as_strided((1, 64), (0, 1)),
    "overlapping": strided(40, 64, (8, 1)),
    "overlapping by 8": strided(40, 64, (56, 1)),
    "apart": strided(40, 64, (80, 1)),
    "apart by half of 16": strided(40, 64, (72, 1)),
    "odd stride": strided(40, 64, (65, 1)),
    "odd offset": strided(40, 64, (64, 1), offset=3),
    "transposed": strided(40, 64, (1, 40)),
    "every second": strided(40, 64, (128, 2)),
    "odd D": strided(40, 33, (33, 1), dtype=torch.float32),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_obey_the_rules_of_tensor_descriptors(name):
    """And have strides that Triton knows to be multiples of 16."""
    x = FEATURES[name]
    other = torch.randn(24, x.shape[1]).to(x.dtype)
    for a, b in ((x, other), (other, x), (x, None)):
        op = gpu.Operands.of(Problem(a, b, torch.tensor(1.0)))
        for ours, given in ((op.a, a), (op.b, a if b is None else b)):
            assert torch.equal(ours, given)
            row, column = ours.stride()
            assert column == 1
            assert row >= ours.shape[1]
            assert row % 16 == 0
            assert ours.data_ptr() % 16 == 0
    copied = gpu.Operands.of(Problem(x, None, torch.tensor(1.0))).a.data_ptr() != x.data_ptr()
    assert copied == (name != "apart")


def test_expanded_features_have_the_gradient_of_one_row():
    """On the emulator: the sum over the rows that are the same."""
    row, other = torch.randn(1, 16), torch.randn(30, 16)
    grads = []
    for dtype, backend in ((torch.float32, "simt"), (torch.float64, "reference")):
        if not dispatch.load(backend).status()[0]:
            pytest.skip("installed without a C++ compiler")
        x = row.to(dtype, copy=True).requires_grad_()
        clip_loss(x.expand(30, 16), other.to(dtype), 3.0, backend=backend).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-6)


# ---- launches


@needs_triton
def test_every_launch_fuses_multiplications_and_additions():
    """Not left to the default, which Triton 3.10 changes."""
    from ito_kernels.similarity.triton import launches

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid, arguments))

    merge = launches.Merge(torch.zeros(1), *[None] * 6, *[0] * 5, False, "none", False, 256)
    launches.launch(Kernel(), 7, merge)
    ((grid, arguments),) = launched
    assert grid == (7,)
    assert arguments["enable_fp_fusion"] is True


@needs_triton
@pytest.mark.parametrize("rows", [1, 70, 300, 10_000, 1 << 20])
@pytest.mark.parametrize("cols", [1, 1000, 1 << 27])
def test_the_memory_of_a_panel(rows, cols):
    """It covers whole tiles, of 256 × 128 at most."""
    from ito_kernels.similarity.triton import tiles

    n, m = tiles.panel(rows, cols, 512, gpu.PANEL_BYTES // 2, 132, square=False)
    assert 1 <= n <= rows
    assert 1 <= m <= cols
    assert -(-n // 256) * 256 * -(-m // 128) * 128 * 2 <= gpu.PANEL_BYTES


@needs_triton
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("d", [24, 768])
@pytest.mark.parametrize("rows", [1, 300, 10_000, 1 << 20])
def test_panels_begin_at_whole_vectors(rows, d, square):
    """`weights_kernel` tells the compiler that a panel begins at a multiple of 16 rows and columns:
    ids that do not would be read at addresses that a GPU refuses."""
    from ito_kernels.similarity.triton import tiles

    for cols in (rows,) if square else (7, 1000, 1 << 27):
        for processors in (1, 108, 132):
            for size, whole in zip(
                tiles.panel(rows, cols, d, gpu.PANEL_BYTES // 2, processors, square),
                (rows, cols),
                strict=True,
            ):
                assert size == whole or size % 16 == 0


@needs_triton
def test_quotients_of_tile_numbers():
    """`weights_kernel` divides by multiplying with the reciprocal, in fp32, below 2^22."""
    x = torch.arange(1 << 22)
    for y in (1, 3, 5, 7, 8, 24, 56, 120, 1000, 1016, 4104, 65528, (1 << 21) - 8, 1 << 22):
        reciprocal = 1 / torch.tensor(y, dtype=torch.float32)
        assert torch.equal(((x.float() + 0.5) * reciprocal).int(), (x // y).int())
