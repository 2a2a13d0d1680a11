"""Gradient caching: the gradient of a large batch in the memory of a small one.

A contrastive loss needs the features of the whole batch at once, but not the activations of the
encoders. So: encode micro-batches without activations, differentiate the loss by the features,
then encode each micro-batch again and continue backward from there. One more forward pass of the
encoders buys a batch of any size. Source: Gao et al. 2021 (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from .similarity.spec import without_autocast


def gradcache_backward(
    encode: Callable[..., Tensor | Sequence[Tensor]],
    micro_batches: Sequence[Sequence[Tensor]],
    loss: Callable[..., Tensor | tuple],
    *,
    models: nn.Module | Sequence[nn.Module] = (),
    scaler: GradScaler | None = None,
    dim: int = 0,
) -> Tensor | tuple:
    """`loss(*encode(*batch)).backward()` for a batch that is given in micro-batches.

    Args:
        encode: from the tensors of a micro-batch to its features, one tensor or several (labels
            may be among them). Called twice for each, with the same random state of the CPU, of the
            tensors' devices and of the current CUDA device, so that dropout agrees. Batch
            normalisation sees micro-batches, and each twice.
        micro_batches: the batch, cut along the items; sizes may differ.
        loss: takes the features of the whole batch, concatenated along `dim`, and returns the loss,
            or a tuple that begins with it. Parameters that it uses itself, such as the scale, get
            their gradients from its one call; with `group` it is that of all ranks.
        models: those that are, or hold, DistributedDataParallel or `fully_shard` modules: their one
            reduction is left to the last micro-batch. `fully_shard` gathers parameters in every
            pass: all ranks then need as many micro-batches. A parameter that only `loss` uses must
            still be reduced: let `encode` return it through the model, as `model(...)` returning
            `logit_scale.exp()` does. Then it is a 0-d feature, equal for all micro-batches, and not
            concatenated.
        scaler: of fp16 training: gradients are scaled as `scaler.scale(loss).backward()` does;
            `scaler.step` and `scaler.update` are the caller's.
        dim: of the items in the features.

    Gradients are added to `.grad` as backward does. Call it under the autocast that training uses:
    it holds for the encoders and the loss, not for their backward.

    Returns what `loss` returned, detached.
    Raises ValueError if there are no micro-batches, TypeError if `encode` returns no tensors.
    """
    if not micro_batches:
        raise ValueError("micro_batches must hold at least one")
    models = [models] if isinstance(models, nn.Module) else list(models)

    states, cached = [], []
    with torch.no_grad():
        for batch in micro_batches:
            states.append(_RandomState(batch))
            cached.append(_as_tuple(encode(*batch)))

    columns = [
        parts[0] if parts[0].ndim == 0 else torch.cat(parts, dim)
        for parts in zip(*cached, strict=True)
    ]
    features = [x.detach().requires_grad_(x.is_floating_point()) for x in columns]
    # autocast of older torch keeps weights that were cast without gradients, and gives none later
    torch.clear_autocast_cache()
    found = loss(*features)
    value = found[0] if isinstance(found, tuple) else found
    with _all_without_autocast(features):
        (value if scaler is None else scaler.scale(value)).backward()

    # (features, micro-batches): a 0-d feature is one of the whole batch, and its gradient too
    pieces = []
    for x, parts in zip(features, zip(*cached, strict=True), strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        if x.ndim == 0:
            pieces.append([grad, *[torch.zeros_like(grad)] * (len(parts) - 1)])
        else:
            pieces.append(grad.split([part.shape[dim] for part in parts], dim))
    del cached, columns, features
    last = len(micro_batches) - 1
    for i, (batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        with _without_reduction(models) if i < last else nullcontext():
            with state.replayed():
                again = _as_tuple(encode(*batch))
            given = [(x, piece[i]) for x, piece in zip(again, pieces, strict=True)]
            given = [(x, grad) for x, grad in given if x.requires_grad]
            if given:
                with _all_without_autocast(again):
                    torch.autograd.backward(*map(list, zip(*given, strict=True)))
    return tuple(_detached(x) for x in found) if isinstance(found, tuple) else found.detach()


def _as_tuple(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    features = (features,) if isinstance(features, Tensor) else features
    if not isinstance(features, Sequence) or not all(isinstance(x, Tensor) for x in features):
        raise TypeError(f"encode must return a tensor or several, got {type(features).__name__}")
    return tuple(features)


def _all_without_autocast(tensors: Sequence[Tensor]) -> ExitStack:
    """Under autocast backward would compute in its dtype also where forward was kept in fp32."""
    stack = ExitStack()
    for device in {x.device for x in tensors}:
        stack.enter_context(without_autocast(device))
    return stack


def _without_reduction(models: Sequence[nn.Module]) -> ExitStack:
    stack = ExitStack()
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
        elif hasattr(module, "set_requires_gradient_sync"):  # fully_shard's, whose import is heavy
            module.set_requires_gradient_sync(False, recurse=False)
            stack.callback(module.set_requires_gradient_sync, True, recurse=False)
    return stack


def _detached(x):
    if isinstance(x, dict):
        return {name: _detached(value) for name, value in x.items()}
    return x.detach() if isinstance(x, Tensor) else x


class _RandomState:
    """The random state, as it is now, of the CPU, of the devices of some tensors, and of the
    current CUDA device, to which an encoder may move them."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.cpu = torch.get_rng_state()
        if torch.cuda.is_initialized():
            tensors = [*tensors, torch.empty(0, device="cuda")]
        self.devices, self.states = get_device_states(*tensors)

    def replayed(self):
        stack = ExitStack()
        stack.enter_context(torch.random.fork_rng(self.devices))
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)
        return stack
