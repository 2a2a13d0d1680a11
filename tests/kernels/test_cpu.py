"""The native CPU kernels: every instruction set of this machine, threads, cache, memory."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_checks import check_logsumexp, check_softplus
from support.memory import linux, printed
from support.problems import CASES, Case, leaves, make, tensors, turned
from torch.nn.functional import cross_entropy, normalize

import ito_kernels as ik
from ito_kernels.similarity import budget, dispatch
from ito_kernels.similarity.cpu import instruction_sets
from ito_kernels.similarity.pairs import count_positives
from ito_kernels.similarity.spec import Grads, Needs, Problem, SideUpstream, Stats, Upstream

cpu, reference = dispatch.load("cpu"), dispatch.load("reference")
ISAS = instruction_sets()
EMULATED = "amx_emulated"
HALF_OR_SINGLE = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not ISAS, reason="installed without a C++ compiler")


@pytest.fixture
def threads():
    """Sets the number of threads; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("isa", "case", "dtype"), turned(CASES, ISAS))
def test_every_instruction_set(isa, case, dtype, monkeypatch):
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    check_logsumexp("cpu", case, dtype)
    check_softplus("cpu", case, dtype)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n=st.integers(1, 700),
    m=st.integers(1, 700),
    d=st.integers(1, 150),
    isa=st.sampled_from(ISAS or ["none"]),
    dtype=st.sampled_from(HALF_OR_SINGLE),
    ids=st.sampled_from([None, "groups", "padded"]),
    positives=st.sampled_from(["linear", "lse"]),
    flags=st.fixed_dictionaries(
        {
            "exclude_self": st.booleans(),
            "exclude_positives": st.booleans(),
            "scale_per_row": st.booleans(),
            "biases": st.booleans(),
            "same": st.booleans(),
            "diagonal": st.sampled_from([0, 0, 5, -40]),
        }
    ),
)
def test_any_shape(n, m, d, isa, dtype, ids, positives, flags):
    m = n if flags["same"] else m
    case = Case(n, m, d, ids=ids, positives=positives, **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITO_CPU_ISA", isa)
        check_logsumexp("cpu", case, dtype)
        check_softplus("cpu", case, dtype)


def clip(n: int, d: int, dtype=torch.float32) -> Problem:
    a, b = (normalize(torch.randn(n, d), dim=1).to(dtype) for _ in range(2))
    return Problem(a, b, torch.tensor(20.0), positives="linear")


def everything(problem: Problem, cache_bytes: int = 0) -> list[torch.Tensor]:
    cache = torch.empty(cache_bytes, dtype=torch.uint8) if cache_bytes else None
    stats = cpu.logsumexp_forward(problem, cache)
    u, v = torch.rand(problem.n), torch.rand(problem.m)
    upstream = Upstream(
        SideUpstream(u, -u) if problem.rows else SideUpstream(),
        SideUpstream(v, -v) if problem.cols else SideUpstream(),
    )
    needs = Needs(True, problem.b is not None, True)
    grads = cpu.logsumexp_backward(problem, stats, upstream, needs, cache)
    return tensors(stats, grads)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True])
def test_bits(count, same, threads):
    """The same number of threads gives the same bits, with any cache."""
    threads(count)
    problem = clip(700, 40)
    if same:
        problem = problem._replace(b=None, cols=False, exclude_self=True)
    torch.manual_seed(1)
    first = everything(problem)
    for size in (0, 600_000, 1 << 22):
        for _ in range(3):
            torch.manual_seed(1)
            again = everything(problem, size)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("same", [False, True])
def test_gradients_of_several_threads(same, threads):
    """Whose parts are added up: of the scale, of both biases and of the keys."""
    threads(3)
    check_logsumexp(
        "cpu",
        Case(700, 700, 40, same=same, biases=True, ids="groups", positives="lse"),
        torch.float32,
    )


def test_threads_may_change_between_forward_and_backward(threads):
    """A cache that was written with other tiles is not read."""
    problem = clip(700, 40)
    u = torch.rand(700)
    cache = torch.empty(1 << 22, dtype=torch.uint8)
    threads(3)
    stats = cpu.logsumexp_forward(problem, cache)
    threads(1)
    upstream = Upstream(SideUpstream(u, -u), SideUpstream(u, -u))
    ours = cpu.logsumexp_backward(problem, stats, upstream, Needs(a=True), cache)
    truth = reference.logsumexp_backward(problem, stats, upstream, Needs(a=True))
    assert (ours.a - truth.a).abs().max() < 1e-5 * truth.a.abs().max()


def test_products_are_counted_while_a_call_runs(threads):
    """So that a long call can be watched."""
    from ito_kernels import _native

    threads(1)  # 3 products of 2.1 GFLOP each: many cores would be done at once
    x, y = (normalize(torch.randn(4096, 64), dim=1).requires_grad_() for _ in range(2))
    call = threading.Thread(target=lambda: ik.clip_loss(x, y, 10.0, backend="cpu"))
    seen = {_native.gemm_flops()}
    call.start()
    while call.is_alive():
        seen.add(_native.gemm_flops())
        time.sleep(1e-4)
    assert max(seen) - min(seen) <= 3 * 2 * 4096**2 * 64
    assert len(seen) > 3, seen


def test_the_cache_saves_products(monkeypatch, threads):
    """GEMM units of N·M·D that run: 4, of which the cache saves one; a self-similarity half."""
    from ito_kernels import _native

    threads(2)  # what a cache of a given size holds depends on their number

    def units(loss, n) -> float:
        before = _native.gemm_flops()
        loss.backward()
        return (_native.gemm_flops() - before) / (2 * n * n * 16)

    n = 1024
    x, y = (normalize(torch.randn(n, 16), dim=1).requires_grad_() for _ in range(2))

    def measured(loss) -> float:
        before = _native.gemm_flops()
        value = loss()
        forward = (_native.gemm_flops() - before) / (2 * n * n * 16)
        return round(forward + units(value, n), 1)

    assert measured(lambda: ik.clip_loss(x, y, 10.0)) == 3
    assert measured(lambda: ik.clip_loss(x, y.detach(), 10.0)) == 2
    labels = torch.arange(n) // 4
    assert measured(lambda: ik.supcon_loss(x, labels)) <= 0.6 * 3
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", "0")
    assert measured(lambda: ik.clip_loss(x, y, 10.0)) == 4
    assert measured(lambda: ik.supcon_loss(x, labels)) <= 0.6 * 4
    with torch.no_grad():
        before = _native.gemm_flops()
        ik.clip_loss(x, y, 10.0)
        assert _native.gemm_flops() - before == 2 * n * n * 16
    # one pass: 3 products without any cache
    assert measured(lambda: ik.siglip_loss(x, y, 10.0, -10.0)) == 3
    assert measured(lambda: ik.siglip_loss(x, y.detach(), 10.0, -10.0)) == 2
    assert measured(lambda: ik.siglip_loss(x, y, 10.0, -10.0, reduction="none").sum()) == 4
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", str(2 * 256 * 1280 * 4))  # a panel for each thread
    rows_only = {"symmetric": False}
    assert measured(lambda: ik.multi_positive_infonce(x, y, 10.0, **rows_only)) == 3
    assert measured(lambda: ik.multi_positive_infonce(x, y.detach(), 10.0, **rows_only)) == 2


def test_passes_share_the_cache(monkeypatch):
    """Passes that await their backward pass keep no more than the budget, with the same bits."""

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = ik.clip_loss(x, y, 10.0, hardness=0.5)
        kept = sum(cache.nbytes for cache in budget._kept.values())
        assert 0 < kept <= 5_000_000
        return torch.autograd.grad(loss, (x, y))

    x, y = (normalize(torch.randn(1024, 16), dim=1).requires_grad_() for _ in range(2))
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", "5000000")  # S has 4,194,304
    shared = gradients()
    assert not budget._kept
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", "1000000")
    for a, b in zip(shared, gradients(), strict=True):
        assert torch.equal(a, b)


def test_an_empty_variable_is_not_set(monkeypatch):
    for name in ("ITO_TILE_CACHE_BYTES", "ITO_CPU_ISA"):
        monkeypatch.setenv(name, "")
    x = torch.randn(4, 3)
    assert ik.clip_loss(x, x.clone(), 10.0).isfinite()
    assert budget.byte_budget("ITO_TILE_CACHE_BYTES", 7) == 7


@pytest.mark.parametrize("value", ["-1", "64MiB"])
def test_the_size_of_the_cache_is_a_number(value, monkeypatch):
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", value)
    for trains in (True, False):
        x = torch.randn(4, 3, requires_grad=trains)
        with pytest.raises(ValueError, match=f"ITO_TILE_CACHE_BYTES must .* bytes, got '{value}'"):
            ik.clip_loss(x, x.clone(), 10.0)


@pytest.mark.parametrize("isa", ISAS)
def test_far_rows_and_columns(isa, monkeypatch):
    """Rows and columns hundreds below their tile's maximum keep their digits, gradients too."""
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    problem = clip(300, 48)._replace(
        row_bias=torch.linspace(-500, 300, 300), col_bias=torch.linspace(400, -300, 300)
    )
    exact = problem._replace(
        **{k: getattr(problem, k).double() for k in ("a", "b", "scale", "row_bias", "col_bias")}
    )
    stats, truth = cpu.logsumexp_forward(problem), reference.logsumexp_forward(exact)
    for side, true_side in zip(stats, truth, strict=True):
        ours = side.max.double() + side.logsum
        theirs = true_side.max + true_side.logsum
        assert (ours - theirs).abs().max() < 5e-4  # half an ulp of 700 is 3e-5
    u = torch.rand(300)
    upstream = Upstream(SideUpstream(u), SideUpstream(u))
    ours = cpu.logsumexp_backward(problem, stats, upstream, Needs(True, True))
    upstream = Upstream(SideUpstream(u.double()), SideUpstream(u.double()))
    expected = reference.logsumexp_backward(exact, truth, upstream, Needs(True, True))
    for x, y in zip(ours[:2], expected[:2], strict=True):
        assert (x - y).abs().max() < 1e-3 * y.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_tiles_of_padding_alone(isa, threads, monkeypatch):
    """Rows and columns whose scores are all below -88, where exp(-S) overflows, also meet tiles in
    which no pair is allowed: these add nothing to their sums."""
    threads(1)
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    ids = torch.arange(600).masked_fill(torch.arange(600) >= 200, -1)
    problem = clip(600, 8)._replace(
        row_bias=torch.full((600,), -120.0), row_ids=ids, col_ids=ids, positives="linear"
    )
    stats, truth = cpu.logsumexp_forward(problem), reference.logsumexp_forward(problem)
    for side, true_side in zip(stats, truth, strict=True):
        torch.testing.assert_close(side.logsum, true_side.logsum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positives", ["linear", "lse"])
@pytest.mark.parametrize("cache", [0, 300_000, 1 << 24])
@pytest.mark.parametrize("shape", ["rows", "both sides", "self"])
def test_forward_and_backward_in_one_call(shape, positives, cache, threads, monkeypatch):
    """The bits of two calls, and the weighted sum."""
    # of one thread, row blocks end inside a vector: what lies beyond takes part in choosing a shift
    threads(2)
    problem = clip(600, 40)._replace(positives=positives, cols=shape == "both sides")
    if shape == "self":
        problem = problem._replace(b=None, exclude_self=True, row_ids=torch.arange(600) // 3)
        problem = problem._replace(col_ids=problem.row_ids)
    u, v, alpha, beta = torch.rand(4, 600)
    upstream = Upstream(
        SideUpstream(u, alpha), SideUpstream(v, beta) if problem.cols else SideUpstream()
    )
    needs = Needs(True, problem.b is not None, True)
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", str(cache))
    total, stats, grads = cpu.logsumexp_both(problem, True, upstream, needs)
    expected = cpu.logsumexp_forward(problem)
    for x, y in zip(tensors(stats), tensors(expected), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(grads, cpu.logsumexp_backward(problem, expected, upstream, needs), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
    value = (u.double() * stats.row_logsum).sum() + (alpha.double() * stats.row_pos).sum()
    if problem.cols:
        value += (v.double() * stats.col_logsum).sum() + (beta.double() * stats.col_pos).sum()
    torch.testing.assert_close(total.double(), value, rtol=1e-6, atol=0)
    # without gradients: the same bits
    alone, none, grads = cpu.logsumexp_both(problem, False, upstream, Needs())
    assert torch.equal(alone, total)
    assert none == Stats()
    assert grads == Grads()


@pytest.mark.parametrize("backend", [cpu, dispatch.load("chunked")], ids=["cpu", "chunked"])
def test_a_weight_may_be_a_number(backend):
    """It is that of every row, and of every column, of which there may be more."""
    problem, needs = clip(30, 8)._replace(positives="linear", cols=True), Needs(True, True, True)
    problem = problem._replace(a=problem.a[:20])

    def run(*weights):
        total, _, grads = backend.logsumexp_both(problem, False, Upstream(*weights), needs)
        return total, *grads[:3]

    u, v = torch.full((20,), 0.3), torch.full((30,), 0.7)
    numbers = run(SideUpstream(0.3, -0.3), SideUpstream(0.7))
    for x, y in zip(numbers, run(SideUpstream(u, -u), SideUpstream(v)), strict=True):
        assert torch.equal(x, y)
    zero, *grads = run(SideUpstream(0.0, 0.0), SideUpstream(0.0))
    assert not any(x.any() for x in (zero, *grads))


def test_softplus_forward_and_backward_in_one_pass():
    problem = clip(600, 40)._replace(positives=None, row_bias=torch.full((600,), -10.0))
    u, needs = torch.rand(600), Needs(True, True, True, True)
    loss, grads = cpu.softplus_both(problem, u, needs)
    assert torch.equal(loss, cpu.softplus_forward(problem))
    for x, y in zip(grads[:4], cpu.softplus_backward(problem, u, needs)[:4], strict=True):
        assert torch.equal(x, y)


def test_the_weighted_sum_of_softplus_is_one_call():
    """With the weight as a number too, and without gradients."""
    problem = clip(40, 20)._replace(positives=None, row_bias=torch.full((40,), -2.0))
    rows, u, needs = cpu.softplus_forward(problem), torch.full((40,), 0.25), Needs(True, True, True)
    for weights in (0.25, u):
        total, grads = cpu.softplus_total(problem, weights, needs)
        torch.testing.assert_close(total, (0.25 * rows.double()).sum().float())
        expected = cpu.softplus_backward(problem, u, needs)
        assert all(torch.equal(x, y) for x, y in zip(grads[:3], expected[:3], strict=True))
        assert torch.equal(cpu.softplus_total(problem, weights, Needs())[0], total)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_do_not_exist_are_not_read(isa, monkeypatch):
    """A panel has more rows than a small batch. Memory is kept from call to call: there lie NaN."""
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    d = 600
    for n in (1, 8, 17):
        unknown = [torch.full((31, d), torch.nan).requires_grad_() for _ in range(2)]
        assert ik.clip_loss(*unknown, 10.0).isnan()
        x, y = (normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
        loss, scores = ik.clip_loss(x, y, 10.0), 10 * x.double() @ y.double().T
        labels = torch.arange(n)
        truth = (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        found, wanted = (torch.autograd.grad(value, (x, y)) for value in (loss, truth))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positives_are_counted(dtype):
    rng = torch.Generator().manual_seed(0)
    ids, others = (torch.randint(-2, 5, (2 * n,), generator=rng)[::2].to(dtype) for n in (37, 50))
    equal = (ids[:, None] == others) & (ids >= 0)[:, None]
    assert torch.equal(count_positives(ids, others), equal.sum(1))


def test_bf16_subtracts_the_positive_before_rounding():
    """A hard negative near a good positive, scale 50 to 100: the error stays below 0.03."""
    d = 64
    for scale in (50.0, 100.0):
        a = normalize(torch.randn(64, d), dim=1)
        b = normalize(a + 0.05 * torch.randn(64, d), dim=1)
        b[1] = normalize(b[0] + 0.02 * torch.randn(d), dim=0)  # the hard negative
        t = {"a": a.bfloat16(), "b": b.bfloat16()}
        x, y = (v.clone().requires_grad_() for v in t.values())
        (64 * ik.clip_loss(x, y, scale)).backward()
        exact = [v.double().requires_grad_() for v in t.values()]
        S = scale * exact[0] @ exact[1].T
        target = torch.arange(64)
        loss = torch.nn.functional.cross_entropy(S, target)
        loss = (loss + torch.nn.functional.cross_entropy(S.T, target)) * 32
        loss.backward()
        for ours, truth in ((x, exact[0]), (y, exact[1])):
            assert (ours.grad - truth.grad).abs().max() < 0.03 * truth.grad.abs().max()


def test_forced_instruction_set(monkeypatch):
    monkeypatch.setenv("ITO_CPU_ISA", "avx1024")
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"ITO_CPU_ISA must be one of .*scalar.*, got avx1024"):
        ik.clip_loss(x, x.clone(), 1.0)
    for isa in ISAS:
        monkeypatch.setenv("ITO_CPU_ISA", isa)
        text = ik.explain(x.bfloat16(), x.bfloat16().clone())
        assert f"tiles: {isa}, " in text or "fp32 products" in text
        assert re.search(r"tiles of \d+ x \d+, 1 of \d+ threads", text)


def test_default_on_cpu_tensors():
    x = torch.randn(4, 3)
    assert "backend cpu" in ik.explain(x, x)
    assert "backend chunked" in ik.explain(x.double(), x.double())


OPENMP = """
import os, re, torch
import ito_kernels as ik
torch.set_num_threads(3)
x, y = (torch.randn(900, 64, requires_grad=True) for _ in range(2))
torch.ones(1 << 20).exp()  # on all three threads; a small product takes two on ARM
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
for _ in range(3):
    ik.clip_loss(x, y, 1.0).backward()
print(count() - before)
with open("/proc/self/maps") as f:
    print(len({path for path in re.findall(r"(/\\S*lib(?:gomp|omp|iomp)\\S*)", f.read())}))
print(ik.explain(x, y))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_those_of_pytorch():
    """No thread is started beside PyTorch's team, and one OpenMP runtime is in the process."""
    out = subprocess.run([sys.executable, "-c", OPENMP], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    started, runtimes, *explained = out.stdout.splitlines()
    assert int(started) == 0
    assert int(runtimes) == 1
    assert "3 of 3 threads (PyTorch's OpenMP team)" in "".join(explained)


@pytest.mark.skipif(not shutil.which("lscpu"), reason="needs lscpu")
def test_cache_sizes_are_those_of_one_cache():
    """A server processor has several L3 caches, which glibc's sysconf adds up."""
    out = subprocess.run(
        ["lscpu", "--bytes", "--caches=NAME,ONE-SIZE"], capture_output=True, text=True
    )
    sizes = dict(line.split() for line in out.stdout.splitlines()[1:])
    if not {"L1d", "L2", "L3"} <= sizes.keys():
        pytest.skip("lscpu does not tell the caches here")
    from ito_kernels import _native

    info = _native.cpu_info()
    found = (info["l1d_bytes"], info["l2_bytes"], info["l3_bytes"])
    assert found == tuple(int(sizes[name]) for name in ("L1d", "L2", "L3"))


FEW_THREADS = """
import torch
import ito_kernels as ik
x, y = (torch.randn(900, 64, requires_grad=True) for _ in range(2))
for count in (1, 3):
    torch.set_num_threads(count)
    ik.clip_loss(x, y, 0.1).backward()
    print(x.grad.norm().item())
    x.grad = y.grad = None
"""


def test_openmp_may_give_fewer_threads_than_are_asked_for():
    """As at its limit, and inside of another parallel region: all of the work is done."""
    one, three = map(float, printed(FEW_THREADS, OMP_THREAD_LIMIT="1"))
    assert three == pytest.approx(one, rel=1e-4)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_own_threads_carry_exceptions(tmp_path):
    """Without PyTorch in the process the engine starts threads of its own."""
    root = Path(__file__).parents[2]
    sources = [str(root / "tests/cpp/test_threads.cpp"), str(root / "csrc/cpu/threads.cpp")]
    program = str(tmp_path / "threads")
    flags = ["-std=c++17", f"-I{root / 'csrc'}", "-pthread", "-o", program]
    subprocess.run(["c++", *flags, *sources, "-ldl"], check=True)
    out = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stdout.strip()) == (0, "std::thread")


MEMORY = """
import sys, torch
import ito_kernels as ik
from support.memory import growth
from torch.nn.functional import normalize
n, d = int(sys.argv[1]), 512
ids = torch.arange(n) // 4
for loss in (
    lambda x, y, ids: ik.clip_loss(x, y, 10.0),
    lambda x, y, ids: ik.multi_positive_infonce(x, y, 10.0, query_ids=ids, key_ids=ids),
    lambda x, y, ids: ik.siglip_loss(x, y, 10.0, -10.0),
    lambda x, y, ids: ik.supcon_loss(x, ids),
):
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (normalize(torch.randn(n, d), dim=1).to(dtype).requires_grad_() for _ in range(2))
        loss(x[:64], y[:64], ids[:64]).backward()
        x.grad = y.grad = None
        print(growth(lambda: loss(x, y, ids).backward()), 4 * n * d * x.element_size() / 2**20)
"""


@linux
@pytest.mark.parametrize(
    "n",
    [2048, pytest.param(8192, marks=pytest.mark.slow), pytest.param(32768, marks=pytest.mark.slow)],
)
def test_peak_memory(n):
    """Beyond inputs and gradients, of which there may be two each, 96 MiB."""
    found = [*map(float, printed(MEMORY, n))]
    assert len(found) == 16
    for grown, arrays in zip(found[::2], found[1::2], strict=True):
        assert grown <= arrays + 96, found


def test_gradients_flow_through_the_cache_under_compile():
    t = leaves(make(Case(130, 130, 24), torch.float32))

    def loss(a, b):
        s = ik.similarity_logsumexp(a, b, 10.0, positives="linear", backend="cpu")
        return (s.row_logsum - s.row_pos).mean() + (s.col_logsum - s.col_pos).mean()

    expected = torch.autograd.grad(loss(t["a"], t["b"]), (t["a"], t["b"]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(t["a"], t["b"]), (t["a"], t["b"]))
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


def test_nothing_is_forced_by_default():
    assert "ITO_CPU_ISA" not in os.environ
    assert [isa for isa in ISAS if isa != EMULATED][-1] == "scalar"
    assert ISAS[0] != EMULATED


def test_little_python_before_the_kernels():
    """Most of a small call's time is Python: from the caller on at most six frames."""
    frames = []

    def profile(frame, event, function):
        if event == "c_call" and getattr(function, "__name__", "") == "cpu_both":
            while frame is not None:
                frames.append(frame.f_code.co_name)
                frame = frame.f_back

    x, y = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    sys.setprofile(profile)
    try:
        ik.clip_loss(x, y, 1.0)
    finally:
        sys.setprofile(None)
    assert len(frames[: frames.index("test_little_python_before_the_kernels")]) <= 6, frames


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums_of_equal_values(isa, monkeypatch):
    """Scores of one-hot features at a small scale are nearly equal. One after the other, a tile's
    rows would lose 3.4e-6 in a column's sum. Scalar code has one lane for a row's 256 columns."""
    monkeypatch.setenv("ITO_CPU_ISA", isa)
    n = 700
    a = torch.eye(8)[torch.arange(n) % 8]
    scores = 1e-3 * a.double() @ a.double().T
    problem = Problem(a, a.clone(), torch.tensor(1e-3))
    stats = dispatch.load("cpu").logsumexp_forward(problem)
    for side, dim in ((stats.row, 1), (stats.col, 0)):
        got = side.max.double() + side.logsum.double()
        assert (got - scores.logsumexp(dim)).abs().max() < (2e-6 if isa == "scalar" else 1.2e-6)
