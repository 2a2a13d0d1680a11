"""The CUDA kernels on the emulator, and the emulator itself.

The shared problem set runs on the backend `simt` in test_primitive.py; here is what the kernels'
structure adds: both shapes of backward, several panels and groups, arithmetic, bank conflicts, and
faults planted into their source, which the emulator must catch.
"""

import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import kernel_checks
from support.problems import (
    BF16,
    CASES,
    FP16,
    FP32,
    OPTIONS,
    Case,
    dense,
    gradients,
    leaves,
    make,
    run,
    run_softplus,
    spread,
    tensors,
)

from ito_kernels import similarity_logsumexp
from ito_kernels.similarity import cuda, dispatch, gpu
from ito_kernels.similarity.spec import Problem

ROOT = Path(__file__).parents[2]
simt = cuda.SIMT
if reason := simt.missing():
    pytest.skip(reason, allow_module_level=True)
native = cuda._native.simt


@pytest.fixture(params=["fused", "panels"])
def backward(request, monkeypatch):
    """Both shapes of backward for half precision; panels so small that there are several."""
    if request.param == "panels":
        monkeypatch.setattr(simt, "_fused", lambda problem: False, raising=False)
        monkeypatch.setattr(gpu, "PANEL_BYTES", 1)
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, with their structs, and the matrix products, as "product"."""
    calls = []
    run_kernel, accumulate = simt._run, gpu.accumulate

    def spy(kernel, struct, like):
        calls.append((kernel, struct))
        run_kernel(kernel, struct, like)

    monkeypatch.setattr(simt, "_run", spy, raising=False)
    monkeypatch.setattr(
        gpu, "accumulate", lambda *args: calls.append(("product", None)) or accumulate(*args)
    )
    return calls


def names(launched) -> list[str]:
    return [name for name, _ in launched]


# ---- the emulator


def compile_cpp(*arguments) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    command = ["c++", "-std=c++17", "-O0", "-w", "-DITO_SIMT", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """What no fault is planted in, compiled once."""
    folder = tmp_path_factory.mktemp("simt")
    out = {}
    for source in ("csrc/simt/emulator.cpp", "tests/cpp/test_simt_kernels.cpp"):
        name = Path(source).stem
        out[name] = folder / f"{name}.o"
        compile_cpp(f"-I{ROOT / 'csrc'}", "-c", ROOT / source, "-o", out[name])
    return out


def outcome(test: Path) -> tuple[int, str]:
    done = subprocess.run([test], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_emulator(objects, tmp_path):
    """Its instructions, and kernels with one fault each: tests/cpp/test_simt.cpp."""
    test = tmp_path / "test"
    source = ROOT / "tests/cpp/test_simt.cpp"
    compile_cpp(f"-I{ROOT / 'csrc'}", source, objects["emulator"], "-o", test)
    assert outcome(test) == (0, "all right\n")


# one of each kind that the emulator knows; tests/faults.toml has more
FAULTS = {
    "none": ("tile.cuh", "", "", "all right"),
    "missing barrier": ("tile.cuh", "gpu::barrier();", "", "shared chunk"),
    "waits for too few": ("tile.cuh", "wait<kStages - 2>", "wait<kStages - 1>", "not been waited"),
    "wrong swizzle": ("tile.cuh", "swizzled(row + i * 16", "swizzled(row + 2 + i * 16", "got"),
    "loads one row too many": ("tile.cuh", "row < side.length", "row <= side.length", "a tensor"),
    **{
        f"32-bit offsets, {file}": (
            file,
            "(first + row) * side.stride",
            "(first + row) * int(side.stride)",
            "outside",
        )
        for file in ("tile.cuh", "gradient.cu")
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, objects, tmp_path):
    """The kernels' own source with one edit: caught, whatever the order of warps."""
    file, old, new, said = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / "cuda" / file).read_text()
    assert old in text
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    test = tmp_path / "test"
    compile_cpp(f"-I{csrc}", csrc / "simt/kernels.cpp", *objects.values(), "-o", test)
    code, output = outcome(test)
    assert (code == 0) == (fault == "none")
    assert said in output


def test_bank_conflicts():
    """Every ldmatrix and every 16-byte copy takes the fewest passes that its width allows."""
    case = Case(200, 300, 104, positives="linear")
    for dtype in (BF16, FP32):
        native.start_trace()
        for exact_max in (True, False):
            t = leaves(make(case, dtype))
            gradients(run(case, t, "simt", exact_max).row_logsum.sum(), t)
        used = native.stop_trace()
        kinds = {where.split()[1] for where in used}
        assert kinds == {"ldmatrix", "cp.async"} | ({"ldmatrix.trans"} if dtype == BF16 else set())
        for where, (instructions, passes, least) in used.items():
            assert instructions > 0
            assert passes == least, where


def test_order_of_warps_changes_nothing():
    results = []
    for seed in range(3):
        native.set_seed(seed)
        t = leaves(make(OPTIONS[2], BF16))
        stats = run(OPTIONS[2], t, "simt", False)
        grads = gradients((stats.row_logsum - stats.row_pos).sum() + stats.col_logsum.sum(), t)
        results.append(tensors(stats, tuple(grads.values())))
    native.set_seed(0)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- one exponential for each score


@pytest.mark.parametrize(("case", "dtype"), spread(CASES, (BF16, FP32, FP16)))
def test_a_fixed_shift(case, dtype, backward):
    """The shared problem set, which test_primitive.py asks for with true maxima."""
    kernel_checks.check_logsumexp("simt", replace(case, hardest=False), dtype, exact_max=False)


def adversarial(kind: str, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows but for "one long row", rounded to bf16."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, d, generator=g)
    if kind == "trained":  # two cones, and pairs at a cosine of about 0.5
        common, gap = torch.randn(2, d, generator=g)
        content = torch.randn(n, d, generator=g)
        a, b = content + 0.8 * a + 0.6 * (common + gap), content + 0.8 * b + 0.6 * (common - gap)
    if kind == "converged":
        b = a + 0.2 * b
    if kind == "identical":
        a, b = a[:1].repeat(n, 1), a[:1].repeat(n, 1)
    if kind == "opposed":  # row 3 is opposite to everything, its own positive too
        b = b[:1] + 0.05 * b
        a[3] = -b[0]
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    if kind == "one long row":
        a[0] *= 10
    return a.bfloat16(), b.bfloat16()


LOSSES = {
    "clip": Case(140, 150, 48, positives="linear"),
    "ids": Case(140, 150, 48, ids="groups", positives="lse"),
    "self": Case(140, 140, 48, same=True, exclude_self=True, ids="groups", positives="linear"),
    "biased": Case(140, 150, 48, ids="padded", positives="lse", biases=True),
}
SCALES = (1.0, 100.0, 200.0)
UNDERFLOWED = {  # how many of the 290 sums of "clip"
    "random": (0, 0, 240),
    "trained": (0, 0, 129),
    "converged": (0, 0, 7),
    "identical": (0, 0, 0),
    "opposed": (0, 8, 171),
    "one long row": (0, 290, 290),
}


@pytest.mark.parametrize("kind", UNDERFLOWED)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LOSSES)
def test_accuracy_at_any_scale(name, scale, kind, launched, monkeypatch):
    """Also of what underflows, which is what lies 80 binary digits below T, and only that."""
    case = replace(LOSSES[name], scale=scale)
    t = make(case, FP32)
    a, b = adversarial(kind, max(case.n, case.m), case.d)
    a, b = a[: case.n], b[: case.m]
    for key, x in (("a", a), ("b", a if case.same else b)):
        t[key] = torch.where(t[key].isnan(), torch.nan, x)
    if kind == "one long row":  # an ulp of the largest score, as of unit rows at that scale
        largest = scale * (100 if case.same else 10)
        eps = {BF16: (1e-2, 2e-2), FP32: (1e-6 * (1 + largest), 1e-7 * max(100, largest))}
        monkeypatch.setattr(kernel_checks, "eps_of", lambda dtype, scale: eps[dtype])
    for dtype in (BF16, FP32):
        given = t | {x: t[x].to(dtype) for x in ("a", "b")}
        if case.same:
            given["b"] = given["a"]
        monkeypatch.setattr(kernel_checks, "make", lambda case, dtype, given=given: given)
        kernel_checks.check_logsumexp("simt", case, dtype, exact_max=False)

    truth = dense(case, given, torch.float64)
    norms = [given[x].double().norm(dim=1) for x in ("a", "b")]
    bound = (norms[0] * given["scale"].abs()).nan_to_num().max() * norms[1].nan_to_num().max()
    if case.biases:
        bound = bound + sum(
            given[f"{side}_bias"][given[f"{side}_ids"] >= 0].max() for side in ("row", "col")
        )
    shift = (bound - 60).clamp(min=0) / math.log(2)
    counted = 0
    merges = [struct for kernel, struct in launched if kernel == "merge"]
    for side, struct in zip(("row", "col"), merges[-2:], strict=case.same is False):
        lse = truth[f"{side}_lse"]
        if case.positives == "lse":
            of_positives = truth[f"{side}_lse_pos"]
            lse = torch.where(of_positives > -torch.inf, torch.minimum(lse, of_positives), lse)
        depth = shift - lse / math.log(2)
        lost = struct.underflowed.bool()
        assert lost[(depth > 80.01) & (lse > -torch.inf)].all()
        assert not lost[depth < 79.99].any()
        counted += lost.sum().item()
    if name == "clip":
        assert counted == UNDERFLOWED[kind][SCALES.index(scale)]


# ---- the shapes of the work


LARGE = [  # three tiles and panels each way
    replace(OPTIONS[15], n=270, m=390, d=40, positives="linear", hardest=True),
    Case(390, 270, 40, positives="lse", diagonal=-20, exclude_positives=True),
    Case(270, 390, 70, ids="padded", positives="lse", hardest=True),
    Case(270, 270, 40, same=True, exclude_self=True, ids="groups", positives="linear"),
    Case(390, 390, 40, same=True, positives="lse", hardest=True),
    Case(270, 270, 40, same=True, biases=True, scale_per_row=True, positives="linear"),
    Case(270, 390, 40, limit=True, ids="groups", positives="lse", hardest=True, scale_per_row=True),
    Case(270, 270, 40, limit=True, same=True, exclude_self=True, positives="linear"),
]


@pytest.mark.parametrize(("case", "dtype"), spread(LARGE, (BF16, FP32, FP16)))
def test_many_tiles(case, dtype, backward, monkeypatch):
    """One block that walks everything, and several groups each way."""
    processors = 6 if backward == "fused" else 1
    monkeypatch.setattr(simt, "_processors", lambda device: processors, raising=False)
    kernel_checks.check_logsumexp("simt", case, dtype, case.hardest)


@pytest.mark.parametrize(("case", "dtype"), spread(LARGE, (FP16, FP32, BF16)))
def test_many_tiles_of_softplus(case, dtype, backward):
    kernel_checks.check_softplus("simt", case, dtype)


@pytest.mark.parametrize(("case", "dtype"), spread(OPTIONS[:-1:2], (FP16, BF16)))
def test_panels_of_half_precision(case, dtype, monkeypatch):
    monkeypatch.setattr(simt, "_fused", lambda problem: False, raising=False)
    kernel_checks.check_logsumexp("simt", case, dtype, case.hardest)
    kernel_checks.check_softplus("simt", case, dtype)


def test_a_frozen_side_costs_no_product(backward, launched):
    case = Case(200, 300, 24, ids="groups", positives="linear")
    for wanted, sides in ((("a",), 1), (("b",), 1), (("a", "b"), 2)):
        t = leaves(make(case, BF16), wanted)
        total = run(case, t, "simt").row_logsum.sum()
        launched.clear()
        gradients(total, t)
        if backward == "fused":
            assert names(launched) == ["gradient"] * sides
        else:
            panels = names(launched).count("panel")
            assert panels == 6
            assert names(launched).count("product") == sides * panels
    t = leaves(make(case, BF16), ("scale",))
    total = run(case, t, "simt").row_logsum.sum()
    launched.clear()
    gradients(total, t)
    assert "product" not in names(launched)
    assert all(getattr(struct, "grad", None) is None for _, struct in launched)
    assert all(getattr(struct, "panel", None) is None for _, struct in launched)


def test_half_values_in_fp32():
    kernel_checks.check_half_values("simt")


def test_half_the_tiles_of_a_symmetric_problem(launched, monkeypatch):
    """In the forward pass of half precision, and in the panels, which fp32 has for any D."""
    monkeypatch.setattr(gpu, "PANEL_BYTES", 1)
    tiles, panels = {}, {}
    for same in (True, False):
        case = Case(640, 640, 8, same=same, exclude_self=True, ids="groups", positives="linear")
        for dtype in (BF16, FP32):
            t = leaves(make(case, dtype))
            if not same:
                t["b"] = t["a"].detach().clone().requires_grad_()
            launched.clear()
            total = run(case, t, "simt", False).row_logsum.sum()
            if dtype == BF16:
                split = launched[0][1].split
                blocks = split.row_groups * split.col_groups
                if split.triangle:
                    blocks = split.row_groups * (split.row_groups + 1) // 2
                tiles[same] = blocks * split.row_tiles * split.col_tiles
            else:
                gradients(total, t)
                panels[same] = names(launched).count("panel")
    assert tiles[True] <= 0.8 * tiles[False]
    assert panels == {True: 15, False: 25}


def test_every_tile_once_and_little_memory():
    for tiles in ((1, 1), (512, 512), (8192, 8192), (512, 2048), (8, 8192), (7, 5)):
        for triangle in {False, tiles[0] == tiles[1]}:
            s = gpu.split(*tiles, 1, 1, 132, triangle)
            assert s.row_tiles * s.row_groups >= tiles[0] > s.row_tiles * (s.row_groups - 1)
            assert s.col_tiles * s.col_groups >= tiles[1] > s.col_tiles * (s.col_groups - 1)
            if min(tiles) >= 512:
                assert max(s.row_groups, s.col_groups) <= 3 * 132**0.5
                blocks = s.row_groups * (s.row_groups + 1) // 2 if triangle else None
                blocks = blocks or s.row_groups * s.col_groups
                work = s.row_tiles * s.col_tiles * -(-blocks // 132)
                assert work <= 1.12 * tiles[0] * tiles[1] / 132 * (0.5 if triangle else 1)


# ---- memory


@pytest.mark.parametrize("exact_max", [True, False])
@pytest.mark.parametrize("case", kernel_checks.GUARDED, ids=str)
def test_nothing_outside_is_read_or_written(case, exact_max, backward, monkeypatch):
    kernel_checks.nothing_outside_is_read_or_written(simt, case, monkeypatch, exact_max)


def test_memory_outside_is_an_error():
    """The bounds that the tests above rely on are those of the tensors."""
    problem = Problem(torch.randn(100, 8), torch.randn(50, 8), torch.tensor(1.0))
    short = torch.zeros(1, native.SLOTS, 99)
    scores = cuda.Scores.of(problem, cuda.Operands.of(problem))
    forward = cuda.Forward(scores, simt._split(problem, False), short, None)
    with pytest.raises(RuntimeError, match=r"logsumexp_kernel: .*outside of a tensor"):
        simt._run("forward", forward, problem.a)


# ---- accuracy


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("d", [64, 4096])
def test_three_products_of_tf32_keep_fp32(d, precision):
    """At most 4 times the error of an fp32 matrix product, over long vectors too, though the
    emulated tensor core cuts off what it adds to. One product keeps 11 bits."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(128, d, generator=g), torch.randn(1, d, generator=g)
    truth = (a.double() @ b.double().T).flatten()
    peer = ((a @ b.T).flatten() - truth).abs()
    error = {}
    for mode in ("highest", "high", "medium"):
        precision(mode)
        ours = simt.logsumexp_forward(Problem(a, b, torch.tensor(1.0), cols=False)).row_max
        error[mode] = (ours - truth).abs()
    assert torch.equal(error["highest"], error["high"])
    assert error["highest"].max() <= 4 * peer.max()
    assert error["highest"].square().mean() <= 4**2 * peer.square().mean()
    assert error["medium"].max() > 50 * error["highest"].max()
    assert error["medium"].max() <= 2**-10 * d**0.5 * 3


def test_gradients_of_a_large_fp16_batch_do_not_underflow(backward):
    kernel_checks.gradients_of_a_large_fp16_batch_do_not_underflow("simt")


def test_positives_are_subtracted_before_rounding(backward):
    kernel_checks.positives_are_subtracted_before_rounding("simt")


@pytest.mark.parametrize("diagonal", [2**32 + 1, -(2**32) - 1])
def test_a_self_pair_far_outside(diagonal):
    """Beyond 32 bits: no pair is a self pair, though the low bits say so."""
    case = Case(5, 9, 7, positives="linear", diagonal=diagonal)
    kernel_checks.check_logsumexp("simt", case, BF16)
    kernel_checks.check_softplus("simt", case, BF16)


def test_softplus_of_everything_positive_or_left_out():
    case = Case(140, 140, 16, exclude_self=True)
    t = make(case, FP32) | {"row_ids": torch.zeros(140, dtype=torch.long)}
    t["col_ids"] = t["row_ids"]
    truth = dense(case, t, torch.float64)["softplus"]
    torch.testing.assert_close(run_softplus(case, t, "simt").double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_with_everything_beyond_the_limit(dtype, backward):
    """Of a row only its positives stay; without one nothing does, and its gradient is 0."""
    case = Case(150, 140, 24, ids="groups")
    t = leaves(make(case, dtype), ("a",))
    t["row_ids"][::2] = 10**6
    limit = torch.full((150,), 2.0)
    limit[:100] = -2.0
    stats = similarity_logsumexp(**t, row_limit=limit, cols=False, backend="simt")
    (grad,) = torch.autograd.grad(stats.row_logsum[100:].sum() + stats.row_logsum[1], t["a"])
    S = 10.0 * t["a"].double() @ t["b"].double().T
    stays = (t["row_ids"][:, None] == t["col_ids"]) | (torch.arange(150) >= 100)[:, None]
    truth = S.masked_fill(~stays, -torch.inf).logsumexp(1).detach()
    lse = (stats.row_max + stats.row_logsum).detach().double()
    assert truth[:100:2].isinf().all()
    torch.testing.assert_close(lse, truth, rtol=0, atol=2e-5)
    assert not grad.isnan().any()
    assert not grad[:100:2].any()
    assert grad[100:].abs().sum(1).all()


# ---- choice


def test_supports_and_describe():
    a = torch.randn(8, 200)
    plain = Problem(a, a, torch.tensor(1.0))
    assert simt.supports(plain)[0]
    ok, reason = simt.supports(Problem(a.double(), None, torch.tensor(1.0)))
    assert not ok
    assert "fp64" in reason
    assert "W panels" in simt.describe(plain)
    assert "fused" in simt.describe(Problem(a[:, :64].bfloat16(), None, torch.tensor(1.0)))
    assert "symmetric" in simt.describe(Problem(a, None, torch.tensor(1.0)))
    ok, reason = simt.supports(Problem(a.to("meta"), None, torch.tensor(1.0)))
    assert not ok
    assert reason == "needs cpu tensors, got meta"


def test_never_chosen_automatically():
    a = torch.randn(4, 8)
    assert os.environ.get("ITO_BACKEND", "") == ""
    for dtype in (FP32, BF16, FP16):
        x = a.to(dtype)
        assert dispatch.choose(Problem(x, x, torch.tensor(1.0))).name not in ("simt", "cuda")
