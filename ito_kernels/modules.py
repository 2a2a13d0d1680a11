"""The losses as modules with the signatures that training code already uses; stateless."""

from __future__ import annotations

import inspect
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import global_batch
from .distributed.sharding import Sharding
from .losses import (
    clip_loss,
    ito_loss,
    multi_positive_infonce,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)
from .losses.common import check_choice

# of `multi_positive_infonce`, but for the arguments that every call of the module has
_OPTIONS = [
    name
    for name, parameter in inspect.signature(multi_positive_infonce).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("query_ids", "key_ids")
]


def _check_world_size(world_size: object) -> None:
    if not isinstance(world_size, Integral) or world_size < 1:
        raise ValueError(f"world_size must be the number of ranks, at least 1, got {world_size!r}")


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


def _check_logits_are_not_redefined(loss: nn.Module, base: type) -> None:
    """In open_clip a subclass that redefines these changes what `forward` returns."""
    for name in ("get_logits", "get_ground_truth", "_loss"):
        if getattr(type(loss), name, None) is not getattr(base, name, None):
            raise NotImplementedError(
                f"{type(loss).__name__} redefines {name}, which {base.__name__}.forward of"
                " ito_kernels does not call, as it forms no logits: define forward too"
            )


class ClipLoss(nn.Module):
    """`clip_loss` in place of open_clip's `ClipLoss`: same constructor, call and attributes.

    With `world_size` > 1 the batch is that of all ranks of the default group, and gradients are
    those of one process on that batch, after averaging. `local_loss`, `cache_labels` and `rank`
    are for subclasses, which may call `get_logits` and `get_ground_truth`; `forward` does not, it
    forms no logits. `gather_with_grad` changes nothing.

    `logit_bias` is one number for all scores: it does not change a softmax, and gets a gradient of
    0, which DistributedDataParallel waits for.

    Raises ValueError for a `world_size` that is not that of the default group and for a
    `logit_bias` of more than one number, RuntimeError for ranks without a default group,
    NotImplementedError for `use_horovod` and where a subclass redefines the logits alone.
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
        _check_world_size(world_size)
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.use_horovod = use_horovod
        self.prev_num_logits, self.labels = 0, {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) the column of each row's positive in `get_logits`, for subclasses."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = self.rank * num_logits if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The dense matrices of logits per image and per text, for subclasses: (N, N) each, memory
        that `forward` does not take.

        With `world_size` > 1 of the images and texts of all ranks, gathered with their gradients as
        open_clip does with `gather_with_grad`; with `local_loss` the rows are this rank's alone,
        and ranks must hold as many.
        """
        group = _default_group(self.world_size)
        batch = global_batch(group, image_features, text_features)
        images, texts = batch.all_gather_rows(image_features), batch.all_gather_rows(text_features)
        if group is not None and self.local_loss:
            self._check_local_loss(batch.shards)
            per_image = logit_scale * image_features @ texts.T
            per_text = logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def _check_local_loss(self, shards: Sharding) -> None:
        """What `get_ground_truth` takes for granted."""
        if self.rank != shards.rank:
            raise ValueError(
                f"rank must be that in the default group, {shards.rank}, got {self.rank}"
            )
        if len({*shards.row.counts, *shards.col.counts}) > 1:
            raise ValueError(
                f"local_loss needs as many rows on every rank, got {shards.row.counts}"
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _check_logits_are_not_redefined(self, ClipLoss)
        group = _default_group(self.world_size)
        loss = clip_loss(image_features, text_features, logit_scale, group=group)
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(
                    f"logit_bias must be one number, got shape {tuple(logit_bias.shape)}"
                )
            # the sum over none of it: 0 with a gradient of 0, also where the bias is infinite
            loss = loss + logit_bias.flatten()[:0].sum().to(loss)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`siglip_loss` in place of open_clip's `SigLipLoss`: same constructor, call and attributes.

    With `world_size` > 1 the batch is that of all ranks of the default group; every rank gets its
    loss, of which open_clip's ranks get their images' part each. A `logit_bias` of None is 0.
    `cache_labels`, `rank`, `dist_impl` (how texts travel there) and `chunk_size` (images at a time
    there; 0 for all) are checked and change nothing. Subclasses may call `get_logits` and
    `get_ground_truth`; `forward` does not, it forms no logits.

    Raises ValueError for an unknown `dist_impl` or a negative `chunk_size`, else as `ClipLoss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        _check_world_size(world_size)
        dist_impl = dist_impl or "bidir"
        check_choice("dist_impl", dist_impl, ("bidir", "shift", "reduce", "gather"))
        if not isinstance(chunk_size, Integral) or chunk_size < 0:
            raise ValueError(f"chunk_size must be a number of images, or 0, got {chunk_size!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl, chunk_size
        self.prev_num_logits, self.labels = 0, {}

    def get_ground_truth(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """(num_logits, num_logits): 1 on the diagonal unless `negative_only`, -1 elsewhere; for
        subclasses."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """The dense matrix of the logits of these images with these texts, for subclasses: (N, N),
        memory that `forward` does not take."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of these images with these texts from the dense logits, for subclasses."""
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n = len(image_features)
        labels = self.get_ground_truth(logits.device, logits.dtype, n, negative_only)
        return -torch.nn.functional.logsigmoid(labels * logits).sum() / n

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _check_logits_are_not_redefined(self, SigLipLoss)
        group = _default_group(self.world_size)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip_loss(image_features, text_features, logit_scale, bias, group=group)
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
