"""The losses as modules with the signatures that training code already uses; stateless."""

from __future__ import annotations

import inspect

import torch.distributed as dist
from torch import Tensor, nn

from .losses import (
    clip_loss,
    ito_loss,
    multi_positive_infonce,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)

# of `multi_positive_infonce`, but for the arguments that every call of the module has
_OPTIONS = [
    name
    for name, parameter in inspect.signature(multi_positive_infonce).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("query_ids", "key_ids")
]


def _default_group(world_size: int) -> dist.ProcessGroup | None:
    """What open_clip's losses gather over: the default group, where there is more than one rank."""
    if world_size == 1:
        return None
    if not dist.is_initialized():
        raise RuntimeError(
            f"world_size={world_size} needs torch.distributed.init_process_group() first"
        )
    if world_size != dist.get_world_size():
        raise ValueError(
            f"world_size must be that of the default group, {dist.get_world_size()},"
            f" got {world_size}"
        )
    return dist.group.WORLD


class ClipLoss(nn.Module):
    """`clip_loss` in place of open_clip's `ClipLoss`: same constructor, same call.

    With `world_size` > 1 the batch is that of all ranks of the default group. `local_loss`,
    `gather_with_grad`, `cache_labels` and `rank` are accepted and change nothing: there is no
    dense logits matrix to save, and gradients are always the exact global ones.
    `logit_bias` is accepted too: a constant added to every score does not change a softmax.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod: only torch.distributed is supported")
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        group = _default_group(self.world_size)
        loss = clip_loss(image_features, text_features, logit_scale, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`siglip_loss` in place of open_clip's `SigLipLoss`: same constructor, same call.

    With `world_size` > 1 the batch is that of all ranks of the default group. `cache_labels`,
    `rank` and `dist_impl` are accepted and change nothing.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        group = _default_group(self.world_size)
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class MultiPositiveInfoNCE(nn.Module):
    """`multi_positive_infonce` with its options fixed at construction.

    What belongs to one batch (a queue, hard negatives, pairs, weights) is given to the call.
    """

    def __init__(self, **options):
        super().__init__()
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(
                f"MultiPositiveInfoNCE has no option {', '.join(sorted(unknown))}: expected some of"
                f" {', '.join(_OPTIONS)}"
            )
        self.options = options

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        logit_scale: float | Tensor,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        **of_batch,
    ) -> Tensor | tuple:
        options = {**self.options, **of_batch}
        return multi_positive_infonce(
            queries, keys, logit_scale, query_ids=query_ids, key_ids=key_ids, **options
        )


class SupConLoss(nn.Module):
    """`supcon_loss` with its options fixed at construction."""

    def __init__(
        self,
        temperature: float = 0.07,
        base_temperature: float | None = None,
        empty: str = "zero",
        group=None,
        chunk_size: int | None = None,
        positives: str = "mean",
    ):
        super().__init__()
        self.temperature, self.base_temperature, self.empty = temperature, base_temperature, empty
        self.options = {"positives": positives, "group": group, "chunk_size": chunk_size}

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return supcon_loss(
            features, labels, self.temperature, self.base_temperature, self.empty, **self.options
        )


class NTXentLoss(nn.Module):
    """`nt_xent_loss` with its temperature fixed at construction."""

    def __init__(self, temperature: float = 0.5, group=None, chunk_size: int | None = None):
        super().__init__()
        self.temperature = temperature
        self.where = {"group": group, "chunk_size": chunk_size}

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent_loss(z1, z2, self.temperature, **self.where)


class ItoLoss(nn.Module):
    """`ito_loss` with its options fixed at construction."""

    def __init__(
        self,
        lambda_fusion: float = 2.0,
        denominator: str = "pair",
        group=None,
        chunk_size: int | None = None,
    ):
        super().__init__()
        self.lambda_fusion, self.denominator = lambda_fusion, denominator
        self.where = {"group": group, "chunk_size": chunk_size}

    def forward(
        self,
        image_views: Tensor,
        text: Tensor,
        fused_views: Tensor | None,
        logit_scale: float | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return ito_loss(
            image_views,
            text,
            fused_views,
            logit_scale,
            lambda_fusion=self.lambda_fusion,
            denominator=self.denominator,
            **self.where,
        )
