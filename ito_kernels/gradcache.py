"""Gradient caching: the gradient of a large batch in the memory of a small one.

A contrastive loss needs the features of the whole batch at once, but not the activations of the
encoders. So micro-batches are encoded without keeping activations, the loss is differentiated with
respect to the features, and each micro-batch is encoded again to continue backward. This allows any
batch size for one more forward pass of the encoders. Source: Gao et al. 2021 (GradCache).
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
    """`loss(*encode(*batch)).backward()` for a batch that is passed in micro-batches.

    Args:
        encode: maps the tensors of a micro-batch to its features, one tensor or several; labels may
            be among them. It is called twice per micro-batch with the same random state of the CPU,
            of the tensors' devices and of the current CUDA device, so that dropout masks are equal.
            Batch normalisation sees each micro-batch twice, and only micro-batches.
        micro_batches: the batch, split along the items. Sizes may differ.
        loss: takes the features of the whole batch, concatenated along `dim`, and returns the loss,
            or a tuple whose first element is the loss. It is called once. Parameters that it uses
            itself, such as the scale, get their gradients from this call. With `group` the batch is
            that of all ranks.
        models: DistributedDataParallel or `fully_shard` modules, or modules that contain them.
            Their gradients are reduced once, in the last micro-batch. `fully_shard` gathers
            parameters in every pass, so all ranks then need the same number of micro-batches. A
            parameter that only `loss` uses must be reduced too: return it from `encode` through the
            model, as a `model(...)` that returns `logit_scale.exp()` does. It is then a 0-d feature
            that is equal for all micro-batches, and is not concatenated.
        scaler: for fp16 training. Gradients are scaled as by `scaler.scale(loss).backward()`; the
            caller calls `scaler.step` and `scaler.update`.
        dim: the dimension of the items in the features.

    Gradients are added to `.grad`, as by backward. Call it under the autocast context of training,
    which then applies to the encoders and the loss, but not to their backward passes.

    Returns the result of `loss`, detached.
    Raises ValueError if there are no micro-batches, TypeError if `encode` does not return tensors.
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
    # The autocast cache of older torch versions keeps weights cast under no_grad, which would then
    # get no gradient in the second pass.
    torch.clear_autocast_cache()
    result = loss(*features)
    value = result[0] if isinstance(result, tuple) else result
    with _all_without_autocast(features):
        (value if scaler is None else scaler.scale(value)).backward()

    # upstream[feature][micro-batch]. A 0-d feature is shared by all micro-batches: only the first
    # one gets its gradient.
    upstream = []
    for x, parts in zip(features, zip(*cached, strict=True), strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        if x.ndim == 0:
            upstream.append([grad, *[torch.zeros_like(grad)] * (len(parts) - 1)])
        else:
            upstream.append(grad.split([part.shape[dim] for part in parts], dim))
    del cached, columns, features
    last = len(micro_batches) - 1
    for i, (batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        with _without_reduction(models) if i < last else nullcontext():
            with state.replayed():
                outputs = _as_tuple(encode(*batch))
            pairs = [(x, grads[i]) for x, grads in zip(outputs, upstream, strict=True)]
            pairs = [(x, grad) for x, grad in pairs if x.requires_grad]
            if pairs:
                with _all_without_autocast(outputs):
                    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    return tuple(_detached(x) for x in result) if isinstance(result, tuple) else result.detach()


def _as_tuple(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    features = (features,) if isinstance(features, Tensor) else features
    if not isinstance(features, Sequence) or not all(isinstance(x, Tensor) for x in features):
        raise TypeError(f"encode must return a tensor or several, got {type(features).__name__}")
    return tuple(features)


def _all_without_autocast(tensors: Sequence[Tensor]) -> ExitStack:
    """Disable autocast on the devices of the tensors. Backward under autocast would use its dtype
    even for operations that ran in fp32 in forward."""
    stack = ExitStack()
    for device in {x.device for x in tensors}:
        stack.enter_context(without_autocast(device))
    return stack


def _without_reduction(models: Sequence[nn.Module]) -> ExitStack:
    stack = ExitStack()
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
        elif hasattr(module, "set_requires_gradient_sync"):  # FSDPModule, whose import is slow
            module.set_requires_gradient_sync(False, recurse=False)
            stack.callback(module.set_requires_gradient_sync, True, recurse=False)
    return stack


def _detached(x):
    if isinstance(x, dict):
        return {name: _detached(value) for name, value in x.items()}
    return x.detach() if isinstance(x, Tensor) else x


class _RandomState:
    """The current random state of the CPU, of the devices of some tensors, and of the current CUDA
    device, to which an encoder may move the tensors."""

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
