"""The benchmark: its contenders compute the same losses, its measurements see what they claim to.

A wrong contender would be compared as if it were right, so each is held against a dense formula
written out here.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import loss_throughput  # noqa: E402
import measure  # noqa: E402
from contenders import (  # noqa: E402
    CONTENDERS,
    LOSSES,
    ONE_TOWER,
    OTHER_LOSSES,
    exact,
    make_inputs,
    through_normalise,
)
from inputs import Inputs  # noqa: E402

N, D = 22, 7  # N is not a multiple of the 4 rows of an item: groups are unequal


def by_definition(loss: str, x: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss and gradients in fp64, entry by entry of the similarity matrix; the others by their
    eager form, whose match with this library's contenders is the check."""
    if loss in OTHER_LOSSES:
        return exact(loss, x)
    x = Inputs(*(leaf.detach().double().requires_grad_() for leaf in x[:4]), x.ids)
    scale = x.log_scale.exp()
    if loss in ONE_TOWER:
        a = b = torch.cat([x.a, x.b])
        ids = x.ids.tolist() * 2
        scores = (scale * a @ b.T).fill_diagonal_(-torch.inf)
    else:
        ids = x.ids.tolist()
        scores = scale * x.a @ x.b.T
    rows = range(len(ids))
    if loss == "siglip":
        scores = scores + x.bias
        value = sum(
            torch.log1p(torch.exp(-scores[i, j] if i == j else scores[i, j]))
            for i in rows
            for j in rows
        ) / len(ids)
    else:

        def anchor(line: torch.Tensor, i: int) -> torch.Tensor:
            same = [j for j in rows if ids[j] == ids[i] and not (loss in ONE_TOWER and j == i)]
            return torch.log(torch.exp(line).sum()) - sum(line[j] for j in same) / len(same)

        value = sum(anchor(scores[i], i) for i in rows) / len(ids)
        if loss not in ONE_TOWER:
            value = (value + sum(anchor(scores[:, j], j) for j in rows) / len(ids)) / 2
    return value.detach(), torch.autograd.grad(value, x.leaves(loss))


# what compiles is the eager form again, and would take a minute here
@pytest.mark.parametrize(
    ("loss", "contender"),
    [(loss, c) for c in CONTENDERS if not c.compiles for loss in c.losses],
    ids=lambda value: getattr(value, "name", value),
)
def test_contenders_compute_the_loss_they_are_listed_under(loss, contender):
    try:
        run = contender.prepare(loss, "cpu")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    x = make_inputs(loss, N, D, torch.float32, "cpu")
    value, grads = by_definition(loss, x)
    got = measure.step(run, loss, x)
    torch.testing.assert_close(got.loss.double(), value, rtol=1e-5, atol=0)
    for leaf, grad, expected in zip(x.leaves(loss), got.grads, grads, strict=True):
        if grad is None:
            assert leaf.ndim == 0, "only a fixed temperature may go without a gradient"
            continue
        if contender.normalises and leaf.ndim == 2:
            expected = through_normalise(leaf, expected)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)


def _dense_cross_entropy(e, c, targets):
    return torch.nn.functional.cross_entropy(e @ c.T, targets)


def _dense_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    logits = scale * q @ k.T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(q)), reduction="none")


def _dense_siglip(img_features, txt_features, log_temperature, bias):
    logits = log_temperature.exp() * img_features @ txt_features.T + bias
    signs = 2 * torch.eye(len(logits)) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits)


class _DenseMemeff:
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        assert not stable, "gradients of another size"
        self.temperature = temperature

    def __call__(self, image_features, text_features):
        logits = image_features @ text_features.T / self.temperature
        targets = torch.arange(len(logits))
        both = (torch.nn.functional.cross_entropy(x, targets) for x in (logits, logits.T))
        return sum(both) / 2


@pytest.mark.parametrize(
    ("name", "function", "stand_in"),
    [
        ("memeff", "MemoryEfficientCLIPLoss", _DenseMemeff),
        ("siglip-kernel", "fused_siglip_loss", _dense_siglip),
        ("inf-cl", "cal_flash_loss", _dense_flash_loss),
        ("cut-cross-entropy", "linear_cross_entropy", _dense_cross_entropy),
    ],
)
def test_libraries_for_gpus_are_asked_for_the_same_loss(name, function, stand_in, monkeypatch):
    """Dense functions in their place, with the signatures and meanings that they document."""
    contender = next(c for c in CONTENDERS if c.name == name)
    (loss,) = contender.losses
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        contender.prepare(loss, "cpu")
    module = name.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=f"{module} is not installed"):
        contender.prepare(loss, "cuda")
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: stand_in}))
    run = contender.prepare(loss, "cuda")
    x = make_inputs(loss, N, 24, torch.float32, "cpu")
    value, grads = by_definition(loss, x)
    got = measure.step(run, loss, x)
    torch.testing.assert_close(got.loss.double(), value, rtol=1e-5, atol=0)
    for grad, expected in zip(got.grads, grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_errors_are_measured_against_the_definition(loss, monkeypatch):
    monkeypatch.setattr("contenders.EXACT_ROWS", 5)  # blocks that do not divide the rows
    x = make_inputs(loss, N, D, torch.float32, "cpu")
    value, grads = by_definition(loss, x)
    exact_value, exact_grads = exact(loss, x)
    torch.testing.assert_close(exact_value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(exact_grads, grads, rtol=1e-10, atol=1e-14)


def test_relative_error_is_relative():
    exact_values = (torch.tensor([3.0, 0.0]), torch.tensor([4.0]))
    got = (torch.tensor([3.0, 0.5]), torch.tensor([4.0]))
    assert measure.relative_error(got, exact_values) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "products"), [("eager", 3), ("open_clip form", 6), ("ito chunked", 4)]
)
def test_counts_the_matrix_products_that_ran(name, products):
    contender = next(c for c in CONTENDERS if c.name == name)
    x = make_inputs("clip", 64, 32, torch.float32, "cpu")
    run = contender.build("clip")
    flops = measure.gemm_flops(lambda: measure.step(run, "clip", x), contender.native)
    assert flops == products * 2 * 64 * 64 * 32


def test_the_unit_is_the_whole_product_also_where_it_computes_a_part(monkeypatch):
    like = torch.empty(0)
    whole = measure.Gemm(96, 8, like)
    monkeypatch.setattr(measure, "MAX_SCORES", 96 * 24)
    part = measure.Gemm(96, 8, like)
    assert part.flops == whole.flops == 2 * 96 * 96 * 8
    assert (whole.parts, part.parts) == (1, 4)
    monkeypatch.setattr(measure, "_elapsed", lambda begin, end: 3.0)
    assert (whole(), part()) == ((3.0, 0.0), (12.0, 0.0))


def test_every_contender_runs_once_per_round():
    calls = []

    def fake(name: str, forward: float, backward: float):
        return lambda: (calls.append(name) or forward, backward, "more")

    times = measure.time_in_turns({"a": fake("a", 1.0, 2.0), "b": fake("b", 5.0, 0.5)}, 0)
    assert times["a"]["both"] == {"p20": 3.0, "median": 3.0, "p80": 3.0}
    assert times["b"]["forward"]["median"] == 5.0
    rounds = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert rounds == [{"a", "b"}] * measure.MIN_ROUNDS


@pytest.mark.skipif(
    not measure.CAN_MEASURE_PEAK, reason="this system does not tell a process's peak"
)
def test_memory_peak_sees_what_is_allocated_outside_torch():
    script = (
        "import measure\n"
        "for mib in (64, 8):\n"
        "    before = measure.reset_peak('cpu')\n"
        "    bytearray(mib << 20)\n"
        "    print(measure.peak_memory('cpu') - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert [int(x) / 2**20 for x in out.stdout.split()] == pytest.approx([64, 8], abs=1)


@pytest.mark.skipif(
    not measure.CAN_MEASURE_PEAK, reason="this system does not tell a process's peak"
)
def test_memory_of_a_contender_is_measured_in_a_fresh_process():
    n, d = 1024, 16
    probe = measure.MemoryProbe("cpu", d, compile_seconds=0)
    eager = next(c for c in CONTENDERS if c.name == "eager")
    matrices = probe(eager, "clip", n, torch.float32).extra_bytes / (4 * n * n)
    assert 2 < matrices < 9  # the logits, their log-softmax, gradients: N × N each
    compiled = next(c for c in CONTENDERS if c.compiles)
    assert "compiling" in probe(compiled, "clip", n, torch.float32).failure


def test_command_line(tmp_path):
    out = tmp_path / "numbers.json"
    command = [
        *(sys.executable, str(BENCHMARKS / "loss_throughput.py")),
        *("--quick", "--loss", "clip", "supcon", "--batch", "48", "--dim", "8"),
        *("--dtype", "bf16", "--contender", "open_clip form", "ito chunked"),
        *("--seconds", "0.1", "--threads", "1", "--out", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["threads"] == 1
    assert report["limits"]["copy_bytes_per_second"] > 1e8
    assert list(report["limits"]["peak_flops"]) == ["bf16"]
    rows = report["rows"]
    assert len(rows) == 2 + 1  # contenders of clip and of supcon
    for row in rows:
        assert row["units"] == pytest.approx(row["both"]["median"] / row["unit_ms"])
        assert row["forward"]["p20"] <= row["forward"]["median"] <= row["forward"]["p80"]
        assert row["share_of_peak"] is None or 0 < row["share_of_peak"] < 1
        assert row["gemms_needed"] == {"clip": 3, "supcon": 1.5}[row["loss"]]
        assert row["share_of_limit"] is None or 0 < row["share_of_limit"] < 1
        assert all(0 <= error < 0.05 for error in row["error"].values()), row
        assert f"{row['loss']} bf16, N = {row['n']}, D = 8" in done.stdout
    assert (tmp_path / "numbers-bf16.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--loss", "clop"), r"argument --loss: invalid choice: 'clop' (choose from"),
        (("--batch", "0"), "argument --batch: must be at least 1, got 0"),
        (("--contender", "nobody"), "argument --contender: invalid choice: 'nobody'"),
        (("--device", "cuda"), "--device cuda: PyTorch finds no CUDA device here"),
    ],
)
def test_bad_arguments_are_named(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss_throughput.py", *args])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        loss_throughput.parse_args()
    assert message in capsys.readouterr().err
