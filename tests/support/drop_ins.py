"""What the tests of `ito_kernels.integrations` against the packages share."""

import importlib

import pytest
import torch

PACKAGES = {
    "open_clip": "open_clip.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "lightly": "lightly.loss",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
}


def both(package):
    """The module of the drop-ins, and theirs."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    ours = importlib.import_module(f"ito_kernels.integrations.{package}")
    return ours, importlib.import_module(PACKAGES[package])


def agree(ours, theirs, leaves):
    """Two fp32 losses of the same leaves, to rounding, in value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def features(*shape):
    return torch.randn(*shape, requires_grad=True)
