"""The Triton kernels under Triton's interpreter, on the CPU: every option, dtype and code path.

A tile takes the interpreter milliseconds whatever its size, so this is a selection; the whole
problem set is `TRITON_INTERPRET=1 pytest tests/kernels/test_primitive.py -k triton`.
"""

import math
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from support import kernel_checks, problems
from support.problems import (
    BF16,
    FP16,
    FP32,
    LIMITS,
    OPTIONS,
    Case,
    assert_accurate,
    dense,
    gradients,
    leaves,
    make,
    run,
    run_softplus,
    spread,
    tensors,
)

from ito_kernels import clip_loss, similarity_softplus
from ito_kernels.similarity import budget, dispatch, gpu
from ito_kernels.similarity.op import logsumexp_of, present
from ito_kernels.similarity.spec import Needs, Problem, SideUpstream, Upstream
from ito_kernels.similarity.triton import launches, plan, small
from ito_kernels.similarity.triton import tiles as triton_tiles

backend, reference = dispatch.load("triton"), dispatch.load("reference")
SMALL = triton_tiles.Tile(32, 32, 32, 4, 1)
MEDIUM = triton_tiles.Tile(64, 64, 32, 4, 1)


def tiles(monkeypatch, *, tma: bool = False, tile=SMALL, processors: int = 5) -> None:
    """Small tiles on a few processors: several row and column groups, several tiles in each."""
    same = dict.fromkeys(("half", "ieee", "tf32", "tf32x3"), tile)
    arch = triton_tiles.Arch("test", tma, same, same, same, same, same)
    monkeypatch.setattr(triton_tiles, "device", lambda device: (arch, processors))


@pytest.fixture(params=["fused", "panels"])
def backward(request, monkeypatch):
    """Both shapes of backward; panels small enough that there are several each way. "kept": panels
    from exponentials that forward has kept, for tests that ask for them."""
    if request.param in ("panels", "kept"):
        monkeypatch.setattr(triton_tiles, "FUSED_D", 0)
        monkeypatch.setattr(gpu, "PANEL_BYTES", 1)
    if request.param == "kept":
        monkeypatch.setenv("ITO_TILE_CACHE_BYTES", str(1 << 20))
    return request.param


@pytest.mark.parametrize(("case", "dtype"), spread(OPTIONS[:-1] + LIMITS))
def test_options(case, dtype, backward):
    kernel_checks.check_logsumexp("triton", case, dtype, exact_max=case.hardest)


@pytest.mark.parametrize(("case", "dtype"), spread(OPTIONS[:-1] + LIMITS))
def test_true_maxima(case, dtype):
    kernel_checks.check_logsumexp("triton", replace(case, hardest=True), dtype)


@pytest.mark.parametrize(("case", "dtype"), spread(OPTIONS[:-1:2], (FP16, FP32, BF16)))
def test_softplus(case, dtype, backward):
    kernel_checks.check_softplus("triton", case, dtype)


RAGGED = [
    Case(1, 1, 1, positives="linear"),
    Case(1, 70, 3, positives="linear"),
    Case(70, 1, 3, positives="lse"),
    Case(70, 100, 40, positives="linear", hardest=True),  # D between one and two steps of 32
    Case(100, 70, 40, ids="padded", positives="lse", hardest=True),
    Case(100, 100, 40, same=True, exclude_self=True, ids="groups", positives="linear"),
    Case(100, 100, 40, same=True, positives="lse", hardest=True),
]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("case", "dtype"), spread(RAGGED, (BF16, FP32, FP16)))
def test_many_small_tiles(case, dtype, tma, backward, monkeypatch):
    tiles(monkeypatch, tma=tma)
    kernel_checks.check_logsumexp("triton", case, dtype, exact_max=case.hardest)


@pytest.mark.parametrize(("m", "n", "warps"), [(64, 32, 4), (32, 64, 4), (64, 64, 1)])
@pytest.mark.parametrize("same", [False, True])
def test_tiles_that_are_not_square_or_come_in_parts(m, n, warps, same, backward, monkeypatch):
    tile = triton_tiles.Tile(m, n, 32, warps, 1)
    assert triton_tiles.ARCHS["sm_80"].parts(tile, "panel") == (4 if warps == 1 else 1)
    # so few processors that a program gets several tiles of a panel
    tiles(monkeypatch, tile=tile, tma=True, processors=5 if backward == "fused" else 1)
    case = Case(150, 150, 16, same=same, ids="groups", positives="linear", exclude_self=same)
    kernel_checks.check_logsumexp("triton", case, FP32, exact_max=False)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_a_panel_of_several_bands(tma, monkeypatch):
    """Ten rows of tiles are a band of eight and one of two."""
    monkeypatch.setattr(triton_tiles, "FUSED_D", 0)
    tiles(monkeypatch, tile=triton_tiles.Tile(16, 32, 32, 1, 1), tma=tma, processors=2)
    case = Case(150, 90, 20, positives="linear")
    kernel_checks.check_logsumexp("triton", case, BF16, exact_max=False)


LIMITED = Case(100, 70, 40, scale_per_row=True, limit=True, exclude_self=True, ids="groups")
LIMITED = [
    replace(LIMITED, positives="lse"),
    replace(LIMITED, positives="linear", ids=None, exclude_self=False, diagonal=-20),
]


@pytest.mark.parametrize(
    ("case", "dtype", "warps"), [(LIMITED[0], FP32, 4), (LIMITED[1], BF16, 1)], ids=str
)
def test_limits_that_leave_nothing_or_everything(case, dtype, warps, backward, monkeypatch):
    # with one warp a tile is reduced in parts
    tiles(monkeypatch, tma=warps == 1, tile=MEDIUM._replace(warps=warps))
    limit = problems.row_limit(make(case, dtype))
    limit[::3], limit[1::5] = -2.0, torch.inf
    monkeypatch.setattr(problems, "row_limit", lambda t: limit)
    kernel_checks.check_logsumexp("triton", case, dtype, exact_max=False)


def test_limits_spare_positives_that_are_not_asked_for(backward, monkeypatch):
    """And softplus with a limit, which the public function does not offer."""
    tiles(monkeypatch, tile=MEDIUM)
    t = make(LIMITED[0], FP32)
    p = Problem(**t, row_limit=problems.row_limit(t))
    law = p._replace(**{k: v.double() for k, v in t.items() if v is not None and "ids" not in k})
    law = law._replace(row_limit=p.row_limit.double())
    u, v = torch.linspace(-1, 1, p.n), torch.linspace(1, -1, p.m)
    needs = Needs(True, True, True, False, False)
    stats = backend.logsumexp_forward(p)
    expected = reference.logsumexp_forward(law)
    softmax = Upstream(SideUpstream(u), SideUpstream(v))
    pairs = [
        (stats, expected),
        ((backend.softplus_forward(p),), (reference.softplus_forward(law),)),
        (
            backend.logsumexp_backward(p, stats, softmax, needs),
            reference.logsumexp_backward(law, expected, softmax, needs),
        ),
        (backend.softplus_backward(p, u, needs), reference.softplus_backward(law, u, needs)),
    ]
    for ours, truth in pairs:
        for x, y in zip(tensors(*ours), tensors(*truth), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact_max", [False, True])
@pytest.mark.parametrize("scale", [0.01, 200.0])
def test_far_rows_do_not_underflow(scale, exact_max):
    kernel_checks.check_far_rows_do_not_underflow("triton", scale, exact_max)


def features(kind: str, dtype: torch.dtype) -> dict:
    """96 unit rows a side but for "one long row"."""
    g = torch.Generator().manual_seed(0)
    n, d = 96, 48
    a, b = torch.randn(2, n, d, generator=g, dtype=torch.float64)
    if kind == "trained":  # a gap between two cones, and pairs at a cosine of about 0.5
        common, gap = torch.randn(2, d, generator=g, dtype=torch.float64)
        content = torch.randn(n, d, generator=g, dtype=torch.float64)
        a, b = content + 0.8 * a + 0.6 * (common + gap), content + 0.8 * b + 0.6 * (common - gap)
    if kind == "duplicates":
        b[1::2] = b[::2]
        a[1::2] = a[::2]
    if kind == "identical":
        a = b = a[:1].expand(n, d)
    if kind == "opposed":  # row 3 is opposite to everything, its own positive too
        b = b[:1] + 0.05 * b
        a[3] = -b[0]
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    if kind == "one long row":
        a = torch.cat([a[:1] * 10, a[1:]])
    t = dict.fromkeys(("row_bias", "col_bias", "row_ids", "col_ids"))
    return t | {"a": a.to(dtype), "b": b.to(dtype)}


KINDS = ("random", "trained", "duplicates", "identical", "opposed", "one long row")


@pytest.mark.parametrize(  # at full precision fp32 has no fused gradient: see `tiles`
    ("dtype", "backward"),
    [(FP32, "panels"), (BF16, "panels"), (BF16, "kept"), (BF16, "fused")],
    indirect=["backward"],
    ids=["float32", "bfloat16", "bfloat16 kept", "bfloat16 fused"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_underflow_are_computed_with_true_maxima(
    kind, dtype, backward, launched, monkeypatch
):
    """CLIP's loss and gradients at any scale, and how many rows and columns took the fallback. In
    fp32 all have true maxima from the start."""
    tiles(monkeypatch, tile=MEDIUM)
    counted = []
    for scale in (1.0, 30.0, 100.0, 200.0):
        t = features(kind, dtype) | {"scale": torch.tensor(scale)}
        case = Case(96, 96, 48, scale=scale, positives="linear")
        t = leaves(t, ("a", "b", "scale"))
        truth_t, same_t = leaves(t, ("a", "b", "scale")), leaves(t, ("a", "b", "scale"))
        launched.clear()
        stats = run(case, t, "triton", exact_max=False)
        lost = sum(int(x["underflowed"].sum()) for name, _, x in launched if name == "merge_kernel")
        losses = torch.cat([stats.row_logsum - stats.row_pos, stats.col_logsum - stats.col_pos])
        truth_of, same_of = dense(case, truth_t, torch.float64), dense(case, same_t, dtype)
        truth, same = (
            torch.cat([x["row_lse"] - x["row_linear"], x["col_lse"] - x["col_linear"]])
            for x in (truth_of, same_of)
        )
        norms = [t[x].double().norm(dim=1).max() for x in "ab"]
        shift = max(0.0, (scale * norms[0] * norms[1]).item() - 60)
        least = shift - 80 * math.log(2)
        expected = sum(int((truth_of[f"{x}_lse"] < least).sum()) for x in ("row", "col"))
        assert lost == (expected if shift > 0 and dtype == BF16 else 0)
        counted.append(lost)
        eps, grad_eps = kernel_checks.eps_of(dtype, scale)
        assert_accurate(losses, truth, same, 2, eps)
        launched.clear()
        ours = gradients(losses.mean(), t)
        assert (kept_panels(launched)[0] > 0) == (backward == "kept")
        fallback = [x["underflowed"] for *_, x in launched if "underflowed" in x]
        assert {x is None if dtype == FP32 else bool(x) == (lost > 0) for x in fallback} == {True}
        expected, peer = gradients(truth.mean(), truth_t), gradients(same.mean(), same_t)
        for name, value in ours.items():
            size = expected[name].abs().max().item()
            if name == "scale":  # a sum over rows, whose terms cancel
                size = (expected["a"] * t["a"].double()).sum(1).abs().sum().item() / scale
            assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)
    assert (counted[-1] > 0) == (kind != "identical" and dtype == BF16)


def test_positives_that_underflow(backward, monkeypatch):
    """The sum of a row is large enough, that of its positives alone is not."""
    tiles(monkeypatch, tile=MEDIUM)
    t = features("random", BF16) | {"scale": torch.tensor(100.0)}
    ids = torch.arange(96)
    t |= {"row_ids": ids, "col_ids": ids, "a": t["a"].clone()}
    t["a"][5] = torch.nn.functional.normalize((t["b"][6] - t["b"][5]).float(), dim=0)
    t = leaves(t, ("a", "b", "scale"))
    case = Case(96, 96, 48, scale=100.0, ids="groups", positives="lse")
    truth_t, same_t = leaves(t, ("a", "b", "scale")), leaves(t, ("a", "b", "scale"))
    stats = run(case, t, "triton", exact_max=False)
    truth, same = dense(case, truth_t, torch.float64), dense(case, same_t, BF16)
    assert truth["row_lse"][5] - truth["row_lse_pos"][5] > 100
    losses = [stats.row_logsum - stats.row_pos]
    losses += [x["row_lse"] - x["row_lse_pos"] for x in (truth, same)]
    eps, grad_eps = kernel_checks.eps_of(BF16, 100.0)
    assert_accurate(*losses, 2, eps)
    ours, expected, peer = map(gradients, [x.sum() for x in losses], (t, truth_t, same_t))
    for name, value in ours.items():
        size = expected[name].abs().max().item()
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_features_show(bad):
    for side in ("a", "b"):
        case = Case(40, 50, 8, positives="linear")
        t = make(case, FP32)
        t[side][3, 5] = bad
        stats = run(case, t, "triton")
        loss = (stats.row_logsum - stats.row_pos).sum() + (stats.col_logsum - stats.col_pos).sum()
        assert not loss.isfinite()
        assert not run_softplus(case, t, "triton").sum().isfinite()


def test_strides():
    kernel_checks.check_strides("triton")


@pytest.mark.parametrize("exact_max", [False, True])
def test_same_bits_every_time(exact_max):
    kernel_checks.check_same_bits_every_time("triton", exact_max)


# ---- memory


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", kernel_checks.GUARDED, ids=str)
def test_nothing_outside_is_read_or_written(case, tma, backward, monkeypatch):
    tiles(monkeypatch, tma=tma, tile=MEDIUM)
    exact_max = tma == (backward == "panels")  # both forward kernels with both kinds of features
    kernel_checks.nothing_outside_is_read_or_written(backend, case, monkeypatch, exact_max)


# ---- work


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran and their number of programs."""
    calls = []
    launch = launches.launch

    def spy(kernel, programs, *structs):
        arguments = {name: x for struct in structs for name, x in struct._asdict().items()}
        calls.append((kernel.__name__, programs, arguments))
        return launch(kernel, programs, *structs)

    monkeypatch.setattr(launches, "launch", spy)
    return calls


def working(launched, name: str) -> list[tuple]:
    """The launches of a kernel, of its two kinds the one that works unless something underflows.
    fp32 has one kind."""
    return [x for x in launched if x[0] == name and (x[2]["FIXED"] or x[2]["underflowed"] is None)]


@pytest.fixture
def products(monkeypatch):
    calls = []
    accumulate = gpu.accumulate
    monkeypatch.setattr(gpu, "accumulate", lambda *args: calls.append(args) or accumulate(*args))
    return calls


def test_a_frozen_side_costs_no_product(backward, launched, products):
    case = Case(65, 130, 24, ids="groups", positives="linear")
    for names, fused, panels in ((("a",), 1, 1), (("b",), 1, 1), (("a", "b"), 2, 2)):
        t = leaves(make(case, FP32), names)
        total = run(case, t, "triton").row_logsum.sum()
        launched.clear()
        products.clear()
        gradients(total, t)
        if backward == "fused":
            assert len(working(launched, "gradient_kernel")) == fused
        else:
            tiles_of_panels = len(working(launched, "weights_kernel"))
            assert len(products) == panels * tiles_of_panels > 0
    t = leaves(make(case, FP32), ("scale",))
    total = run(case, t, "triton").row_logsum.sum()
    launched.clear()
    products.clear()
    gradients(total, t)
    assert not products
    assert all(arguments.get("grad") is None for _, _, arguments in launched)


ALL = ("a", "b", "scale", "row_bias", "col_bias")


@pytest.mark.parametrize(
    ("case", "dtype", "names"),
    [
        *((*p.values, ALL) for p in spread(OPTIONS[:-1:3], (FP32, BF16))),
        (OPTIONS[15], FP32, ("a",)),
        (OPTIONS[15], FP32, ("b",)),
        (OPTIONS[15], FP32, ("scale", "row_bias", "col_bias")),
        (replace(RAGGED[3], n=150), BF16, ALL),
        (replace(RAGGED[5], ids=None, exclude_self=False), FP32, ALL),
    ],
    ids=str,
)
def test_sigmoid_in_one_pass(case, dtype, names, backward, launched, products, monkeypatch):
    """Weights known before: loss and gradients from one computation of the scores less."""
    tiles(monkeypatch, tile=MEDIUM)
    t = leaves(make(case, dtype), names)
    truth_t, same_t = leaves(t, names), leaves(t, names)
    w = torch.rand(case.n, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    loss = similarity_softplus(
        **t, exclude_self=case.exclude_self, diagonal=case.diagonal, row_weights=w, backend="triton"
    )
    ran = [name for name, *_ in launched]
    truth = dense(case, truth_t, torch.float64)["softplus"]
    same = dense(case, same_t, dtype)["softplus"]
    eps, grad_eps = kernel_checks.eps_of(dtype, case.scale)
    terms = truth.abs().sum().item()
    assert_accurate(loss, (truth * w).sum(), (same.double() * w).sum(), 2, eps * max(1, terms))
    ours = gradients(loss, t)
    expected = gradients((truth * w).sum(), truth_t)
    peer = gradients((same.double() * w).sum(), same_t)
    assert set(ours) == {x for x in names if t[x] is not None and not (case.same and x == "b")}
    for name, value in ours.items():
        size = expected[name].abs().max().item()
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)

    assert len(launched) == len(ran), "backward computed scores"
    if backward == "fused":
        sides = 1 + ("b" in ours or "col_bias" in ours or (case.same and not gpu.is_symmetric(
            Problem(**(t | {"b": None})))))  # fmt: skip
        assert ran == ["gradient_kernel"] * sides
    elif not (case.same and t["scale"].ndim == 0):
        assert set(ran) == {"weights_kernel"}
        assert len(products) == len(ran) * (("a" in ours) + ("b" in ours or case.same))


def test_half_the_tiles_of_a_symmetric_problem(launched, monkeypatch):
    monkeypatch.setattr(triton_tiles, "FUSED_D", 0)
    monkeypatch.setattr(gpu, "PANEL_BYTES", 1)
    tiles(monkeypatch, tile=MEDIUM)
    visits = {}
    for same in (True, False):
        case = Case(384, 384, 8, same=same, exclude_self=True, ids="groups", positives="linear")
        t = leaves(make(case, BF16))
        if not same:
            t["b"] = t["a"].detach().clone().requires_grad_()
        launched.clear()
        stats = run(case, t, "triton", exact_max=False)
        gradients(stats.row_logsum.sum(), t)
        name, programs, arguments = launched[0]
        assert name == "sums_kernel"
        forward = programs * arguments["row_tiles"] * arguments["col_tiles"]
        visits[same] = forward, sum(p for _, p, _ in working(launched, "weights_kernel"))
    # 6 tiles and 3 panels each way: groups and panels on the diagonal are computed in full
    assert visits[True][0] <= 0.75 * visits[False][0]
    assert visits[True][1] <= 0.67 * visits[False][1]


def test_every_pair_of_groups_once():
    """The triangle's programs, by the same arithmetic as the kernel's, in fp32."""
    import numpy as np

    for groups in (1, 2, 7, 64, 300):
        seen = set()
        for pid in range(groups * (groups + 1) // 2):
            col = int((np.sqrt(np.float32(8.0 * pid + 1.0)) - np.float32(1)) * np.float32(0.5))
            col -= col * (col + 1) // 2 > pid
            col += (col + 1) * (col + 2) // 2 <= pid
            seen.add((pid - col * (col + 1) // 2, col))
        assert seen == {(r, c) for c in range(groups) for r in range(c + 1)}


# ---- accuracy


def test_gradients_of_a_large_fp16_batch_do_not_underflow(backward):
    kernel_checks.gradients_of_a_large_fp16_batch_do_not_underflow("triton")


def test_positives_are_subtracted_before_rounding(backward):
    kernel_checks.positives_are_subtracted_before_rounding("triton")


# ---- choice


def test_supports_and_describe():
    a = torch.randn(8, 200)
    assert backend.supports(Problem(a, a, torch.tensor(1.0)))[0]
    ok, reason = backend.supports(Problem(a.double(), None, torch.tensor(1.0)))
    assert not ok
    assert "fp64" in reason
    assert "W panels" in backend.describe(Problem(a, a, torch.tensor(1.0)))
    assert "fused" in backend.describe(Problem(a[:, :64], a[:, :64], torch.tensor(1.0)))
    assert "symmetric" in backend.describe(Problem(a, None, torch.tensor(1.0)))


def test_autotuning(backward, launched, monkeypatch):
    """Off by default; once for sizes up to the next power of two; the choice runs and is named."""
    tiles(monkeypatch, tile=MEDIUM)
    monkeypatch.setattr(plan, "_TUNED", {})
    trials = []

    def milliseconds(run):
        run()
        tuned = ("sums_kernel", "gradient_kernel", "weights_kernel")
        *_, (_, _, arguments) = (x for x in launched if x[0] in tuned)
        trials.append(tuple(arguments[x] for x in ("BLOCK_M", "BLOCK_N", "num_warps")))
        if trials[-1] == (64, 64, 4):
            raise plan.OutOfResources(1, 0, "shared memory")
        return {(64, 32, 4): 1.0}.get(trials[-1], 2.0)

    monkeypatch.setattr(plan, "_milliseconds", milliseconds)

    def step(n: int) -> tuple[torch.Tensor, str]:
        case = Case(n, 100, 24, positives="linear")
        t = leaves(make(case, BF16), ("a", "b"))
        stats = run(case, t, "triton", exact_max=False)
        grads = gradients((stats.row_logsum - stats.row_pos).sum(), t)
        return grads["a"], backend.describe(Problem(t["a"], t["b"], torch.tensor(1.0)))

    expected, text = step(100)
    assert not trials
    assert "64 x 64 x 32, 4 warps, 1 stages (from the table)" in text
    monkeypatch.setenv("ITO_TRITON_AUTOTUNE", "1")
    got, text = step(100)
    assert len(trials) == 2 * 6  # forward and backward
    assert text.count("64 x 32 x 32, 4 warps, 1 stages (tuned)") == 2
    torch.testing.assert_close(got, expected)
    _, text = step(90)
    assert len(trials) == 12
    assert "tuned" in text
    _, text = step(40)
    assert len(trials) == 24


def test_fp32_follows_the_matmul_precision():
    before = torch.get_float32_matmul_precision()
    try:
        for mode, expected in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(mode)
            x = torch.ones(4, 8)
            problem = Problem(x, x, torch.tensor(1.0))
            assert plan.arithmetic_of(problem) == expected
            assert plan.arithmetic_of(problem._replace(a=x.bfloat16())) == "half"
            assert plan.arithmetic_of(problem._replace(half_values=True)) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_product_with_half_values(dtype):
    """Within 2^-16 of Σ|x||y|: bf16 alone would be off by 2^-9, and by 2^-9 for values of fp16."""
    x, y = torch.randn(40, 300), torch.randn(300, 24).to(dtype).float()
    x *= 10.0 ** torch.randint(-6, 3, (40, 1))
    out = torch.zeros(40, 24)
    for _ in range(2):
        gpu.accumulate(out, gpu.halves(x.clone()), gpu.halves(y.clone()))
    error = (out - 2 * x.double() @ y.double()).abs()
    assert (error <= 2.0**-15 * x.abs() @ y.abs()).all()


@pytest.mark.parametrize("exact_max", [False, True])
def test_half_values_in_fp32(exact_max):
    """D = 24 takes panels too."""
    a = torch.ones(4, 24)
    problem = Problem(a, a, torch.tensor(1.0), half_values=True)
    assert plan.Plan(problem).gradient is None
    kernel_checks.check_half_values("triton", exact_max)


def test_a_tuned_gradient_of_tf32_is_not_that_of_half_values(monkeypatch):
    x = torch.ones(4, 8)
    problem = Problem(x, x, torch.tensor(1.0), half_values=True)
    monkeypatch.setitem(plan._TUNED, plan.Plan(problem).key("gradient"), SMALL)
    assert plan.Plan(problem).gradient is None


def test_cpu_tensors_never_choose_the_interpreter():
    a = torch.randn(4, 8)
    assert dispatch.choose(Problem(a, a, torch.tensor(1.0))).name != "triton"
    assert dispatch.load("chunked").supports(Problem(a, a, torch.tensor(1.0)))[0]


# ---- small batches


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "cols", "frozen"),
    [
        (5, 5, 8, FP32, True, ()),
        (150, 150, 40, BF16, True, ()),
        (70, 300, 200, FP32, True, ()),
        (300, 70, 200, BF16, True, ("b",)),
        (130, 140, 136, FP32, False, ("a", "scale")),
        (1, 1, 16, FP32, True, ()),
        (40, 40, 16, FP32, True, ("a", "b", "scale")),
    ],
)
def test_a_small_batch_in_few_launches(n, m, d, dtype, cols, frozen, launched, monkeypatch):
    """Against the reference in fp64, and not worse than the way of large batches."""
    inputs = {"a": torch.randn(n, d).to(dtype), "b": torch.randn(m, d).to(dtype)}
    inputs["scale"] = torch.tensor(2.0 / d**0.5)

    def step(name, dtype=None):
        leaves = {k: x.to(dtype or x.dtype, copy=True) for k, x in inputs.items()}
        for k, x in leaves.items():
            x.requires_grad_(k not in frozen)
        weights = Upstream(SideUpstream(0.5 / n, -0.5 / n), SideUpstream(*(0.3, -0.2) * cols))
        problem = Problem(*leaves.values(), positives="linear", cols=cols, exact_max=False)
        total, stats = logsumexp_of(problem, weights, True, name)
        if total.requires_grad:
            (3 * total).backward()
        return [total.detach(), *present(*stats.row, *(stats.col or ()))], [
            x.grad for x in leaves.values()
        ]

    (values, grads), (exact, exact_grads) = step("triton"), step("reference", torch.float64)
    names = [name for name, *_ in launched]
    assert names[: 2 + cols] == ["maxima_kernel", "maxima_kernel", "combine_kernel"][1 - cols :]
    monkeypatch.setattr(small, "LARGEST", 0)
    launched.clear()
    values_of_large, grads_of_large = step("triton")
    large = ["sums_kernel", "merge_kernel"] if dtype == BF16 else ["maxima_kernel"]
    assert [name for name, *_ in launched][: len(large)] == large

    def close(ours, others, truth, rounding):
        for x, y, z in zip(ours, others, truth, strict=True):
            assert (x is None) == (z is None)
            if x is not None:
                error, other = ((v.double() - z).abs().max() for v in (x, y))
                assert error <= 2 * other + rounding * z.abs().max()

    close(values[:1], values_of_large[:1], exact[:1], 1e-6)
    close(grads, grads_of_large, exact_grads, {FP32: 1e-6, BF16: 4e-3}[dtype])


# ---- kept exponentials


@pytest.fixture
def keep(monkeypatch):
    """Panels of 128 × 128 and a function that sets how many rows of E are kept, of so many
    columns."""
    monkeypatch.setattr(triton_tiles, "FUSED_D", 0)
    monkeypatch.setattr(gpu, "PANEL_BYTES", 1)
    monkeypatch.setattr(small, "LARGEST", 0)

    def keep(n: int, kept: int, m: int) -> None:
        memory = 4 * gpu.aligned(n) + 2 * gpu.aligned(kept) * gpu.aligned(m) if kept else 0
        monkeypatch.setenv("ITO_TILE_CACHE_BYTES", str(memory))

    return keep


def kept_panels(launched) -> tuple[int, int]:
    """The panels of W that came from kept exponentials, and from scores computed again."""
    names = [name for name, *_ in launched]
    return names.count("reweight_kernel"), len(working(launched, "weights_kernel"))


KEPT = [
    Case(300, 280, 40, positives="linear"),
    Case(280, 300, 40, positives="linear", cols=False),
    Case(280, 300, 40, positives="linear", rows=False),
    Case(300, 280, 40, positives="linear", diagonal=30),
    Case(280, 300, 40, positives="linear", diagonal=-250),
    Case(300, 300, 40, same=True, positives="linear", diagonal=5),
    Case(1, 300, 40, positives="linear"),
]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("case", "dtype"), spread(KEPT, (BF16, FP16)))
def test_gradients_from_kept_exponentials(case, dtype, tma, keep, launched, monkeypatch):
    """All rows kept, and some."""
    tiles(monkeypatch, tma=tma, tile=MEDIUM)
    high, wide = -(-case.n // 128), -(-case.m // 128)
    for kept in sorted({min(256, case.n), case.n}):
        keep(case.n, kept, case.m)
        launched.clear()
        kernel_checks.check_logsumexp("triton", case, dtype, exact_max=False)
        expected = -(-kept // 128) * wide
        assert kept_panels(launched) == (expected, high * wide - expected)


def test_what_is_kept_in_one_call(keep, launched, monkeypatch):
    """A loss whose weights are known keeps exponentials only while it runs; the same bits every
    time; a budget of 0 keeps nothing, and frozen features need none."""
    tiles(monkeypatch, tile=MEDIUM)
    n, panels = 200, 4
    g = torch.Generator().manual_seed(1)
    x, y = torch.nn.functional.normalize(torch.randn(2, n, 40, generator=g), dim=2).to(BF16)

    def step(kept: int, expected: int) -> list[torch.Tensor]:
        keep(n, kept, n)
        inputs = [t.clone().requires_grad_() for t in (x, y, torch.tensor(3.0))]
        launched.clear()
        loss = clip_loss(*inputs, backend="triton")
        assert kept_panels(launched) == (expected, panels - expected)
        assert budget.tile_cache_left() == budget.tile_cache_left("cuda")  # nothing is held
        loss.backward()
        return [t.grad for t in inputs]

    of_all, again, of_none = step(n, panels), step(n, panels), step(0, 0)
    assert all(map(torch.equal, of_all, again))
    assert not torch.equal(of_all[0], of_none[0])  # E was rounded
    for ours, others in zip(of_all, of_none, strict=True):
        size = others.abs().max().item()
        torch.testing.assert_close(ours, others, rtol=0.02, atol=0.01 * size)
    keep(n, n, n)
    launched.clear()
    scale = torch.tensor(3.0, requires_grad=True)
    clip_loss(x, y, scale, backend="triton").backward()
    assert kept_panels(launched)[0] == 0
    torch.testing.assert_close(scale.grad, of_none[2], rtol=1e-2, atol=1e-6)


def test_what_awaits_its_gradients_counts(keep, launched, monkeypatch):
    """In fp16 gradients are formed in the backward pass: a second pass finds no memory left."""
    tiles(monkeypatch, tile=MEDIUM)
    keep(200, 200, 200)
    case = Case(200, 200, 40, positives="linear")
    t = leaves(make(case, FP16), ("a", "b"))
    first, second = (run(case, t, "triton", exact_max=False).row_logsum.sum() for _ in range(2))
    for total, expected in ((second, (0, 4)), (first, (4, 0))):
        launched.clear()
        gradients(total, t)
        assert kept_panels(launched) == expected
    del total, first, second
    assert budget.tile_cache_left() == budget.tile_cache_left("cuda")


def test_what_cannot_be_kept_is_computed_again(keep):
    a, b = torch.randn(2, 256, 160).to(BF16)
    ids, vector = torch.arange(256), torch.ones(256)
    plain = Problem(a, b, torch.tensor(1.0), positives="linear", exact_max=False)
    keep(256, 256, 256)

    def size(**options) -> int:
        return backend.cache_bytes(plain._replace(**options))

    assert size() == 4 * 256 + 2 * 256 * 256
    assert size(positives=None, cols=False, diagonal=7) == size()
    others = [
        {"a": a.float(), "b": b.float()}, {"b": None}, {"scale": vector}, {"row_bias": vector},
        {"col_bias": vector}, {"row_ids": ids, "col_ids": ids}, {"row_limit": vector},
        {"positives": "lse"}, {"exclude_self": True}, {"exclude_positives": True},
        {"hardest": True}, {"exact_max": True},
    ]  # fmt: skip
    assert [size(**x) for x in others] == [0] * len(others)
    keep(256, 0, 256)
    assert size() == 0
