"""torch.compile changes neither value nor gradients of any loss, in one graph.

That of torch 2.11 gives wrong gradients of some without a word."""

import pytest
import torch
from support.losses_table import ROWS, Inputs
from torch.nn.functional import normalize

import ito_kernels as ik

FIRST = {loss: next(iter(rows.values())) for loss, rows in ROWS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("loss", FIRST)
def test_compiled_gives_the_same(loss):
    def value_and_gradients(call):
        torch.manual_seed(0)
        x, y = (normalize(torch.randn(24, 8), dim=1).requires_grad_() for _ in "xy")
        args, options = FIRST[loss].arguments(Inputs.of(x, y, normalize(torch.randn(24, 8), dim=1)))
        value = FIRST[loss].value(call(*args, **options))
        return [value, *torch.autograd.grad(value, (x, y), materialize_grads=True)]

    torch.compiler.reset()
    one_graph = loss != "symile_loss"  # a generator breaks the graph
    compiled = torch.compile(getattr(ik, loss), fullgraph=one_graph, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled), value_and_gradients(getattr(ik, loss)), rtol=1e-5, atol=1e-6
    )
