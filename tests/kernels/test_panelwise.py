"""`panelwise` against the dense matrix: values, every gradient, memory, errors."""

import pytest
import torch
from support.memory import linux, printed
from torch.nn.functional import normalize

import ito_kernels as ik

F64 = torch.float64


def data(n: int, m: int, dtype=F64) -> list[torch.Tensor]:
    """Queries, keys, a scale, a weight of each query and a bias of each key, with gradients."""
    rng = torch.Generator().manual_seed(n)

    def randn(*size):
        return torch.randn(size, generator=rng, dtype=F64)

    tensors = (
        normalize(randn(n, 6)),
        normalize(randn(m, 6)),
        torch.tensor(7.0),
        randn(n, 2),
        randn(m),
    )
    return [x.to(dtype).requires_grad_() for x in tensors]


def loss(scores, rows, weight, scale, bias, ids):
    """A softmax whose target is the column ids[row], and a second value beside it."""
    scores = scale * scores + bias
    own = scores.gather(1, ids[rows, None])[:, 0]
    return torch.stack([scores.logsumexp(1) - own, scores.tanh().sum(1)], 1) * weight


def by_panels(q, k, scale, weight, bias, ids, rows=None):
    size = None if rows is None else rows * len(k) * 8
    return ik.panelwise(
        loss, q, k, row_args=(weight,), key_args=(scale, bias, ids), panel_bytes=size
    )


def dense(q, k, scale, weight, bias, ids):
    return loss(q @ k.T, torch.arange(len(q)), weight, scale, bias, ids)


@pytest.mark.parametrize(("n", "m", "rows"), [(1, 1, 1), (1, 9, 4), (7, 5, 3), (130, 3, None)])
def test_values_and_gradients(n, m, rows):
    leaves, ids = data(n, m), torch.arange(n) % m
    found, truth = by_panels(*leaves, ids, rows), dense(*leaves, ids)
    assert found.shape == (n, 2)
    assert found.dtype == F64
    torch.testing.assert_close(found, truth)
    upstream = torch.linspace(-1, 2, 2 * n, dtype=F64).view(n, 2)
    ours, theirs = (torch.autograd.grad(x, leaves, upstream) for x in (found, truth))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_one_tensor_on_both_sides_and_frozen_arguments():
    q, _, scale, *_ = data(9, 9)

    def function(scores, rows, scale):
        return (scale * scores).logsumexp(1)

    found = ik.panelwise(function, q, q, key_args=(scale.detach(),), panel_bytes=4 * 9 * 8)
    truth = (scale.detach() * q @ q.T).logsumexp(1)
    torch.testing.assert_close(found, truth)
    ours, theirs = (torch.autograd.grad(x.sum(), q)[0] for x in (found, truth))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_in_fp32(dtype, autocast):
    q, k = (x.detach().to(dtype).requires_grad_() for x in data(6, 5)[:2])
    seen = []

    def function(scores, rows):
        seen.append(scores.dtype)
        return scores.square().sum(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = ik.panelwise(function, q, k)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert q.grad.dtype == dtype
    torch.testing.assert_close(found, (q.float() @ k.float().T).square().sum(1))


def test_a_gradient_by_hand():
    """Which is used instead of autograd's, and gets the value that forward gave."""
    q, k, scale, *_ = data(7, 5)

    def function(scores, rows, scale):
        return scores.mul_(scale).logsumexp(1)

    def gradient(grad, value, scores, rows, scale):
        weights = (scale * scores).sub_(value[:, None]).exp_().mul_(grad[:, None])
        return weights * scale, (weights * scores).sum()

    found = ik.panelwise(
        function, q, k, key_args=(scale,), gradient=gradient, panel_bytes=3 * 5 * 8
    )
    truth = (scale * q @ k.T).logsumexp(1)
    torch.testing.assert_close(found, truth)
    upstream = torch.linspace(-1, 2, 7, dtype=F64)
    for x, y in zip(
        *(torch.autograd.grad(x, (q, k, scale), upstream) for x in (found, truth)), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_second_order_and_forward_mode_raise():
    q, k, *_ = data(4, 4)
    value = ik.panelwise(lambda scores, rows: scores.square().sum(1), q, k).sum()
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: ik.panelwise(lambda s, rows: s.sum(1), x, k).sum())(q)


def test_inside_torch_compile():
    leaves, ids = data(7, 5), torch.arange(7) % 5

    def total(*tensors):
        return by_panels(*tensors, ids).square().sum()

    compiled = torch.compile(total, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, total))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


X, Y = torch.randn(5, 3), torch.randn(4, 3)


def each(scores, rows, *args):
    return scores.sum(1)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "function must be a function of a panel, got int", (1, X, Y, {})),
        (TypeError, "gradient must be .*, got int", (each, X, Y, {"gradient": 1})),
        (ValueError, "queries and keys must have the same width D", (each, X, Y[:, :2], {})),
        (TypeError, "keys must be a tensor", (each, X, [1.0], {})),
        (TypeError, "row_args must be a sequence of tensors, got Tensor", (each, X, Y, {"row_args": X})),  # noqa: E501
        (ValueError, r"row_args\[0\] must have 5 rows, .* got shape \(4, 3\)", (each, X, Y, {"row_args": (Y,)})),  # noqa: E501
        (ValueError, r"row_args\[0\] must have 5 rows, .* got shape \(\)", (each, X, Y, {"row_args": (X[0, 0],)})),  # noqa: E501
        (TypeError, r"key_args\[1\] must be a tensor, got float", (each, X, Y, {"key_args": (X, 1.0)})),  # noqa: E501
        (ValueError, r"key_args\[0\] must be on cpu", (each, X, Y, {"key_args": (X.to("meta"),)})),
        (TypeError, "panel_bytes must be a whole number, got 2.5", (each, X, Y, {"panel_bytes": 2.5})),  # noqa: E501
        (ValueError, "panel_bytes must be at least 1, got 0", (each, X, Y, {"panel_bytes": 0})),
        (TypeError, "function must return a tensor, got float", (lambda s, r: 1.0, X, Y, {})),
        (ValueError, r"each of the 5 rows of its panel, got shape \(4,\)", (lambda s, r: s.sum(0), X, Y, {})),  # noqa: E501
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    function, queries, keys, options = call
    with pytest.raises(error, match=message):
        ik.panelwise(function, queries, keys, **options)


def test_a_function_that_would_lose_a_gradient_raises():
    weight = torch.tensor(2.0, requires_grad=True)

    def call(queries):
        return ik.panelwise(lambda scores, rows: weight * scores.sum(1), queries, Y)

    for queries in (X, X.clone().requires_grad_()):
        with pytest.raises(ValueError, match="in row_args or key_args"):
            call(queries)
    with torch.no_grad():
        torch.testing.assert_close(call(X), 2 * (X @ Y.T).sum(1))


MEMORY = """
import torch
import ito_kernels as ik
from support.memory import growth

n, d = 6144, 32
q, k = (torch.randn(n, d).requires_grad_() for _ in range(2))
target, bias = torch.arange(n), torch.zeros(n, requires_grad=True)

def loss(scores, rows, target, bias):
    scores = 10 * scores + bias
    return scores.logsumexp(1) - scores.gather(1, target[:, None])[:, 0]

def run(n):
    args = {"row_args": (target[:n],), "key_args": (bias[:n],)}
    ik.panelwise(loss, q[:n], k[:n], **args).mean().backward()

run(64)  # what is loaded once does not count, and gradients have their memory
print(growth(lambda: run(n)))
"""


@linux
def test_memory_is_that_of_a_panel():
    """6144 x 6144 scores are 144 MiB in fp32, and their gradient as much again."""
    (grown,) = printed(MEMORY)
    assert float(grown) < 110


@pytest.mark.parametrize(("panel_bytes", "rows"), [(1, 1), (3 * 5 * 4, 3), (10**9, 7)])
def test_a_panel_has_the_rows_that_fit(panel_bytes, rows):
    found = []

    def function(scores, numbers):
        found.append(len(scores))
        return scores.sum(1)

    ik.panelwise(function, torch.ones(7, 2), torch.ones(5, 2), panel_bytes=panel_bytes)
    assert max(found) == rows
    assert sum(found) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arguments_of_16_bits_are_summed_in_fp32(dtype):
    """Of many panels, the small gradients that come last are not lost."""
    q, k = (normalize(torch.randn(512, 16), dim=1) for _ in range(2))

    def loss(scores, rows, scale):
        scores = scale * scores
        return scores.logsumexp(1) - scores.gather(1, rows[:, None])[:, 0]

    grads = []
    for kind in (dtype, torch.float64):
        scale = torch.tensor(9.0, dtype=kind, requires_grad=True)
        x, y = (q, k) if kind == dtype else (q.double(), k.double())
        value = ik.panelwise(loss, x, y, key_args=(scale,), panel_bytes=4 * 512)
        grads.append(torch.autograd.grad(value.mean(), scale)[0].double())
    assert abs(grads[0] - grads[1]) <= 0.02 * abs(grads[1])
