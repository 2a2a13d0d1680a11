"""The benchmarked losses and the implementations that are compared (contenders).

Each contender is written as its users would write it. All get the same tensors. For half precision
features they run under autocast, as in training. All compute the same gradients: of the features,
of the logarithm of the scale and, for SigLIP, of the bias.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from inputs import Inputs
from other_losses import OTHER_LOSSES
from torch import Tensor

import ito_kernels

LOSSES = ("clip", "multi_positive", "siglip", "nt_xent", "supcon")
ALL_LOSSES = (*LOSSES, *OTHER_LOSSES)
# losses of all 2N rows against each other
ONE_TOWER = ("nt_xent", "supcon", *(name for name, x in OTHER_LOSSES.items() if x.one_tower))
GROUPED = ("multi_positive", "supcon", *(name for name, x in OTHER_LOSSES.items() if x.grouped))
POSITIVES_PER_ID = 4
PLAIN_PYTORCH = ("reference", "chunked")  # backends whose matrix products are PyTorch's
EXACT_ROWS = 512


def make_inputs(
    loss: str, n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Inputs:
    """Features like those of a model in training: the cosine of positives is about 0.5, that of
    negatives about 0.

    The scale is the usual initial value of each loss: 1 / 0.07, and for SigLIP 10 with a bias of
    -10. The rows of an item are spread over the batch.
    """
    rng = torch.Generator().manual_seed(0)
    ids = torch.arange(n)
    if loss in GROUPED:
        ids = torch.randperm(n, generator=rng) // POSITIVES_PER_ID

    def unit() -> Tensor:
        return F.normalize(torch.randn(n, d, generator=rng), dim=1)

    items = unit()[ids]
    a, b = (F.normalize(items + unit(), dim=1).to(device, dtype).requires_grad_() for _ in "ab")

    def scalar(x: float) -> Tensor:
        return torch.tensor(x, device=device, requires_grad=True)

    log_scale = scalar(math.log(10 if loss == "siglip" else 1 / 0.07))
    return Inputs(a, b, log_scale, scalar(-10.0), ids.to(device))


# Plain PyTorch.


def clip_eager(x: Inputs) -> Tensor:
    logits = x.log_scale.exp() * x.a @ x.b.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_two_matmuls(x: Inputs) -> Tensor:
    """open_clip's form: one matrix product for the logits of each direction."""
    scale = x.log_scale.exp()
    logits_per_image = scale * x.a @ x.b.T
    logits_per_text = scale * x.b @ x.a.T
    labels = torch.arange(len(x.a), device=x.a.device)
    per_image = F.cross_entropy(logits_per_image, labels)
    return (per_image + F.cross_entropy(logits_per_text, labels)) / 2


def build_linear_cross_entropy(loss: str) -> Callable:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return clip_linear_cross_entropy


def clip_linear_cross_entropy(x: Inputs) -> Tensor:
    scale = x.log_scale.exp()
    labels = torch.arange(len(x.a), device=x.a.device)
    # with its default options object it works in chunks; without one it forms the logits
    loss = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    return (loss(scale * x.a, x.b, labels) + loss(scale * x.b, x.a, labels)) / 2


def multi_positive_eager(x: Inputs) -> Tensor:
    logits = x.log_scale.exp() * x.a @ x.b.T
    positives = (x.ids[:, None] == x.ids[None, :]).to(logits.dtype)
    rows = F.cross_entropy(logits, positives / positives.sum(1, keepdim=True))
    cols = F.cross_entropy(logits.T, positives.T / positives.T.sum(1, keepdim=True))
    return (rows + cols) / 2


def siglip_eager(x: Inputs) -> Tensor:
    logits = x.log_scale.exp() * x.a @ x.b.T + x.bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def nt_xent_eager(x: Inputs) -> Tensor:
    z = torch.cat([x.a, x.b])
    logits = x.log_scale.exp() * z @ z.T
    self_pairs = torch.eye(len(z), dtype=torch.bool, device=z.device)
    other_view = torch.arange(len(z), device=z.device).roll(len(x.a))
    return F.cross_entropy(logits.masked_fill(self_pairs, -torch.inf), other_view)


def supcon_eager(x: Inputs) -> Tensor:
    features, labels = torch.cat([x.a, x.b]), x.ids.repeat(2)
    logits = x.log_scale.exp() * features @ features.T
    logits = logits - logits.detach().amax(1, keepdim=True)
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    positives = (labels[:, None] == labels[None, :]) & others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((log_prob * positives).sum(1) / positives.sum(1)).mean()


EAGER = {
    "clip": clip_eager,
    "multi_positive": multi_positive_eager,
    "siglip": siglip_eager,
    "nt_xent": nt_xent_eager,
    "supcon": supcon_eager,
    **{name: loss.eager for name, loss in OTHER_LOSSES.items()},
}


def compiled(loss: str) -> Callable[[Inputs], Tensor]:
    # static shapes are faster; fullgraph raises instead of falling back to eager
    return torch.compile(EAGER[loss], dynamic=False, fullgraph=True)


# Other libraries. Their temperature is a fixed number, and they normalise the features.


def metric_learning(loss: str) -> Callable[[Inputs], Tensor]:
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    kind = {"nt_xent": NTXentLoss, "supcon": SupConLoss}[loss]
    module = kind(temperature=0.07)
    return lambda x: module(torch.cat([x.a, x.b]), x.ids.repeat(2))


def sentence_transformers(loss: str) -> Callable[[Inputs], Tensor]:
    from sentence_transformers.losses import MultipleNegativesSymmetricRankingLoss

    # the loss does not use the model
    module = MultipleNegativesSymmetricRankingLoss(torch.nn.Identity(), scale=1 / 0.07)
    return lambda x: module.compute_loss_from_embeddings([x.a, x.b], None)


# Libraries for GPUs.


def memeff(loss: str) -> Callable[[Inputs], Tensor]:
    from memeff import MemoryEfficientCLIPLoss

    # with the default stable=True its gradients have another magnitude than those of the loss
    module = MemoryEfficientCLIPLoss(temperature=0.07, normalized_inputs=True, stable=False)
    return lambda x: module(x.a, x.b)


def siglip_kernel(loss: str) -> Callable[[Inputs], Tensor]:
    from siglip_kernel import fused_siglip_loss

    return lambda x: fused_siglip_loss(x.a, x.b, x.log_scale, x.bias)


def inf_cl(loss: str) -> Callable[[Inputs], Tensor]:
    from inf_cl import cal_flash_loss

    def run(x: Inputs) -> Tensor:
        # it returns one loss per row for one direction, and splits the width into parts of head_dim
        call = partial(
            cal_flash_loss, scale=x.log_scale.exp(), head_dim=math.gcd(256, x.a.shape[1])
        )
        return (call(x.a, x.b) + call(x.b, x.a)).mean() / 2

    return run


def cut_cross_entropy(loss: str) -> Callable[[Inputs], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def run(x: Inputs) -> Tensor:
        scale = x.log_scale.exp()
        labels = torch.arange(len(x.a), device=x.a.device)
        rows = linear_cross_entropy(scale * x.a, x.b, labels)
        return (rows + linear_cross_entropy(scale * x.b, x.a, labels)) / 2

    return run


# This library.


def ito(backend: str, loss: str) -> Callable[[Inputs], Tensor]:
    available, detail = ito_kernels.backends()[backend]
    if not available:
        raise RuntimeError(detail)
    if backend == "simt":
        raise RuntimeError("an emulator: its times are meaningless")

    def run(x: Inputs) -> Tensor:
        scale = x.log_scale.exp()
        match loss:
            case "clip":
                return ito_kernels.clip_loss(x.a, x.b, scale, backend=backend)
            case "multi_positive":
                return ito_kernels.multi_positive_infonce(
                    x.a, x.b, scale, query_ids=x.ids, key_ids=x.ids, backend=backend
                )
            case "siglip":
                return ito_kernels.siglip_loss(x.a, x.b, scale, x.bias, backend=backend)
            case "nt_xent":
                return ito_kernels.nt_xent_loss(x.a, x.b, 1 / scale, backend=backend)
            case "supcon":
                features, labels = torch.cat([x.a, x.b]), x.ids.repeat(2)
                return ito_kernels.supcon_loss(features, labels, 1 / scale, backend=backend)
            case _:
                return OTHER_LOSSES[loss].ours(x, scale, backend=backend)

    return run


def without_tile_cache(loss: str) -> Callable[[Inputs], Tensor]:
    """The CPU backend without the cache of similarity tiles for backward."""
    loss_fn = ito("cpu", loss)

    def run(x: Inputs) -> Tensor:
        with patch.dict(os.environ, ITO_TILE_CACHE_BYTES="0"):
            return loss_fn(x)

    return run


class Contender(NamedTuple):
    """An implementation of one or more losses.

    build: returns a function from Inputs to the loss, given the name of the loss. Raises
        ImportError or RuntimeError with the reason if it cannot run.
    compiles: whether its first call compiles.
    native: whether it runs matrix products that are not PyTorch's.
    normalises: whether it normalises the features itself.
    not_quick: why --quick leaves it out, empty if it does not.
    """

    name: str
    losses: tuple[str, ...]
    build: Callable[[str], Callable[[Inputs], Tensor]]
    compiles: bool = False
    native: bool = False
    needs_cuda: bool = False
    normalises: bool = False
    not_quick: str = ""

    def prepare(self, loss: str, device: str) -> Callable[[Inputs], Tensor]:
        """Call `build`. Raises RuntimeError with the reason if the contender cannot run."""
        if self.needs_cuda and device != "cuda":
            raise RuntimeError("needs a CUDA device")
        try:
            return self.build(loss)
        except ModuleNotFoundError as error:
            raise RuntimeError(f"{error.name} is not installed") from error


CONTENDERS = (
    Contender("eager", ALL_LOSSES, EAGER.__getitem__),
    Contender("open_clip form", ("clip",), lambda loss: clip_two_matmuls),
    Contender("linear_cross_entropy ×2", ("clip",), build_linear_cross_entropy),
    Contender("torch.compile", ALL_LOSSES, compiled, compiles=True),
    Contender(
        "pytorch-metric-learning",
        ONE_TOWER,
        metric_learning,
        normalises=True,
        not_quick="slow to import",
    ),
    Contender(
        "sentence-transformers",
        ("clip",),
        sentence_transformers,
        normalises=True,
        not_quick="slow to import",
    ),
    *(
        Contender(build.__name__.replace("_", "-"), losses, build, native=True, needs_cuda=True)
        for build, losses in (
            (memeff, ("clip",)),
            (siglip_kernel, ("siglip",)),
            (inf_cl, ("clip",)),
            (cut_cross_entropy, ("clip",)),
        )
    ),
    *(
        Contender(f"ito {name}", ALL_LOSSES, partial(ito, name), native=name not in PLAIN_PYTORCH)
        for name in ito_kernels.backends()
    ),
    *(
        [
            Contender(
                "ito cpu, no tile cache",
                LOSSES,
                without_tile_cache,
                native=True,
                not_quick="a variant of ito cpu",
            )
        ]
        if ito_kernels.backends()["cpu"].available
        else []
    ),
)


# Exact values.


def exact(loss: str, x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss by its definition and the gradients of `x.leaves(loss)`, in fp64.

    They are computed in blocks of rows, except those of OTHER_LOSSES, which form dense matrices.
    """
    x = Inputs(*(leaf.detach().double().requires_grad_() for leaf in x[:4]), x.ids)
    if loss in OTHER_LOSSES:
        value = EAGER[loss](x)
        return value.detach(), torch.autograd.grad(value, x.leaves(loss))
    one_tower, directions = loss in ONE_TOWER, 1 if loss in ONE_TOWER or loss == "siglip" else 2
    ids = x.ids.repeat(2) if one_tower else x.ids
    total = 0.0
    for direction in range(directions):
        for block in torch.arange(len(ids), device=ids.device).split(EXACT_ROWS):
            a, b = (torch.cat([x.a, x.b]),) * 2 if one_tower else (x.a, x.b)
            queries, keys = (a, b) if direction == 0 else (b, a)
            scores = x.log_scale.exp() * queries[block] @ keys.T
            positive = ids[block, None] == ids
            if loss == "siglip":
                signed = torch.where(positive, -1, 1) * (scores + x.bias)
                value = torch.logaddexp(signed, torch.zeros_like(signed)).sum() / len(ids)
            else:
                if one_tower:
                    self_pairs = block[:, None] == torch.arange(len(ids), device=ids.device)
                    scores, positive = (
                        scores.masked_fill(self_pairs, -torch.inf),
                        positive & ~self_pairs,
                    )
                mean_positive = scores.masked_fill(~positive, 0).sum(1) / positive.sum(1)
                value = (scores.logsumexp(1) - mean_positive).sum() / (len(ids) * directions)
            value.backward()
            total = total + value.detach()
    return total, tuple(leaf.grad for leaf in x.leaves(loss))


def through_normalise(x: Tensor, grad: Tensor) -> Tensor:
    """Backpropagate `grad`, the gradient of normalised rows, through the normalisation of x, whose
    rows already have unit length."""
    x = x.detach().double()
    return grad - (grad * x).sum(1, keepdim=True) * x
