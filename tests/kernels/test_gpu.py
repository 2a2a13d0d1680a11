"""The Triton and CUDA kernels on a GPU: `pytest -m gpu`."""

import pytest
import torch
from support import kernel_checks, problems
from support.kernel_checks import moved, on_cpu, runs_here
from support.problems import CASES, Case, gradients, leaves, run, tensors

from ito_kernels import clip_loss, siglip_loss, similarity_logsumexp, similarity_softplus
from ito_kernels.similarity import gpu

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """The shared problem set on the GPU."""
    monkeypatch.setattr(kernel_checks, "make", moved)
    with torch.device("cuda"):
        yield


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    ok, reason = runs_here(request.param)
    if not ok:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, Case(3000, 5000, 768, positives="linear")], ids=str)
def test_problem_set(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [32 << 20, 20 << 20], ids=["all rows", "some rows"])
def test_kept_exponentials(memory, dtype, monkeypatch):
    ok, reason = runs_here("triton")
    if not ok:
        pytest.skip(reason)
    monkeypatch.setattr(gpu, "PANEL_BYTES", 4 << 20)
    monkeypatch.setenv("ITO_TILE_CACHE_BYTES", str(memory))
    check(Case(3000, 5000, 768, positives="linear"), dtype, "triton", exact_max=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_in_fp32(dtype, backend):
    """The score's error is that of sums on tensor cores, the gradient's 2^-17 beside it."""
    a, b = (torch.nn.functional.normalize(torch.randn(2000, 768, device="cuda")) for _ in range(2))
    a, b = (x.to(dtype).float().requires_grad_() for x in (a, a + 0.3 * b))

    def call(a, b, backend, **options):
        stats = similarity_logsumexp(a, b, 100.0, positives="linear", backend=backend, **options)
        loss = (stats.row_logsum - stats.row_pos).sum()
        return [loss, *torch.autograd.grad(loss, (a, b))]

    found = call(a, b, backend, half_values=True)
    exact = call(a.double(), b.double(), "chunked")
    for x, y in zip(found, exact, strict=True):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()


def check(case, dtype, backend, exact_max=True):
    draw = problems.weights

    def weights(case, truth):
        with torch.device("cpu"):
            drawn = draw(case, {k: v.cpu() for k, v in truth.items()})
        return {k: v.cuda() for k, v in drawn.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_checks, "weights", weights)
        kernel_checks.check_logsumexp(backend, case, dtype, exact_max=exact_max)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_agrees_with_the_emulator(case, dtype):
    """The same kernels: what differs is the order inside one matrix instruction, and exp2."""
    ok, reason = runs_here("cuda")
    if not ok:
        pytest.skip(reason)
    kernel_checks.supported("cuda", case, dtype)
    t = moved(case, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5 * (1 + case.scale)}
    ours, expected = run(case, t, "cuda"), run(case, on_cpu(case, t), "simt")
    for x, y in zip(tensors(ours), tensors(expected), strict=True):
        torch.testing.assert_close(x.cpu(), y, equal_nan=True, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 768])
def test_sigmoid(d, dtype, backend):
    """In two passes, and in one where the weights are known before."""
    case = Case(1000, 1500, d, ids="groups", biases=True)
    t = leaves(moved(case, dtype))
    truth_t = leaves({k: v.double() if v.is_floating_point() else v for k, v in t.items()})
    w = torch.rand(case.n)
    truth = similarity_softplus(**truth_t, row_weights=w, backend="reference")
    expected = gradients(truth, truth_t)
    once = similarity_softplus(**t, row_weights=w, backend=backend)
    twice = (similarity_softplus(**t, backend=backend) * w).sum()
    for loss in (once, twice):
        assert (loss.double() - truth).abs() <= 1e-4 * truth
        for name, x in gradients(loss, t).items():
            error = (x.double() - expected[name]).norm() / expected[name].norm()
            assert error <= (1e-4 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("mode", ["highest", "high", "medium"])
def test_fp32_modes(mode, backend):
    """ieee and 3×tf32 keep fp32's accuracy, tf32 about 11 bits of each product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        a, b = (torch.nn.functional.normalize(torch.randn(1000, 512), dim=1) for _ in range(2))
        ours = clip_loss(a, b, 50.0, backend=backend)
        truth = clip_loss(a.double(), b.double(), 50.0, backend="reference")
        bound = {"highest": 2e-5, "high": 5e-5, "medium": 2e-2}[mode]
        assert (ours.double() - truth).abs() <= bound
    finally:
        torch.set_float32_matmul_precision(before)


LOSSES = [clip_loss, lambda *args, **kw: siglip_loss(*args, -10.0, **kw)]


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("d", [64, 512])
def test_same_bits_every_time(loss_fn, d, backend):
    a, b = (torch.randn(3000, d, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    results = []
    for _ in range(5):
        loss = loss_fn(a, b, 0.1, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, (a, b))])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("d", [64, 512])
def test_cuda_graph(loss, d, backend):
    """Forward and backward are captured: on the caller's stream, and nothing waits."""
    a, b = (torch.randn(2048, d, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.1)

    def step():
        return torch.autograd.grad(loss(a, b, scale, backend=backend), (a, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        a.copy_(torch.randn_like(a))
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


def test_nothing_waits_for_the_device(backend):
    t = leaves(moved(Case(1000, 1500, 256, ids="groups"), torch.bfloat16))
    case = Case(1000, 1500, 256, ids="groups", positives="linear")
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = run(case, t, backend)
        gradients((stats.row_logsum - stats.row_pos).sum(), t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("d", [64, 256])
def test_no_compilation_per_batch_size(d):
    from ito_kernels.similarity.triton import backward, forward

    def compiled() -> int:
        modules = vars(forward) | vars(backward)
        kernels = [x for name, x in modules.items() if name.endswith("_kernel")]
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    def step(n: int, m: int) -> None:
        a, b = torch.randn(n, d).bfloat16(), torch.randn(m, d).bfloat16()
        ids = torch.arange(max(n, m))
        case = Case(n, m, d, ids="groups", positives="linear")
        t = {"a": a, "b": b, "scale": torch.tensor(1.0), "row_bias": None, "col_bias": None,
             "row_ids": ids[:n], "col_ids": ids[:m]}  # fmt: skip
        t = leaves(t)
        gradients(run(case, t, "triton").row_logsum.sum(), t)
        gradients(similarity_softplus(**t, row_weights=torch.ones(n), backend="triton"), t)
        similarity_softplus(**t, backend="triton")

    step(1024, 1024)
    before = compiled()
    assert before > 0
    for n, m in ((1, 1), (1023, 1000), (16, 4096), (777, 1)):
        step(n, m)
    assert compiled() == before


def test_memory_stays_linear(backend):
    """N = 65,536: the matrix alone would take 8.6 GB in bf16."""
    a, b = (torch.randn(65536, 768, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(clip_loss(a, b, 0.1, backend=backend), (a, b))
    assert torch.cuda.max_memory_allocated() - before < 1.2e9
