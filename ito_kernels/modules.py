"""The losses as stateless modules, with the signatures that existing training code uses."""

from __future__ import annotations

import inspect
from numbers import Integral
from typing import Any

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
from .options_repr import PrintsOptions

# the options of `multi_positive_infonce` and their defaults, without the arguments of every call of
# the module
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(multi_positive_infonce).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("query_ids", "key_ids")
}


def _check_world_size(world_size: object) -> None:
    if not isinstance(world_size, Integral) or world_size < 1:
        raise ValueError(f"world_size must be the number of ranks, at least 1, got {world_size!r}")


def _default_group(world_size: int) -> dist.ProcessGroup | None:
    """The group of open_clip's losses: the default group, or None for a single rank."""
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
    """Raise NotImplementedError for a subclass that overrides only the computation of the logits.

    In open_clip that changes the loss. Here `forward` does not call these methods.
    """
    for name in ("get_logits", "get_ground_truth", "_loss", "_chunked_loss"):
        if getattr(type(loss), name, None) is not getattr(base, name, None):
            raise NotImplementedError(
                f"{type(loss).__name__} redefines {name}, which {base.__name__}.forward of"
                " ito_kernels does not call because it forms no logits: define forward too"
            )


class ClipLoss(PrintsOptions, nn.Module):
    """`clip_loss` as a replacement for open_clip's `ClipLoss`, with its constructor, call and
    attributes.

    With `world_size` > 1 the batch is that of all ranks of the default group, and gradients are
    those of one process on that batch, after averaging over ranks. `forward` forms no logits.
    `local_loss`, `cache_labels` and `rank` affect only `get_logits` and `get_ground_truth`, which
    subclasses may call. `gather_with_grad` has no effect.

    `logit_bias` is one number for all scores. It does not change a softmax and gets a gradient of
    0, so that DistributedDataParallel finds no unused parameter.

    Raises ValueError for a `world_size` that differs from that of the default group and for a
    `logit_bias` with more than one element, RuntimeError for `world_size` > 1 without a default
    group, NotImplementedError for `use_horovod` and for a subclass that overrides only the logits.
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
        """The column of the positive of each row of `get_logits`, (num_logits,). For subclasses."""
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
        """The dense logits per image and per text, (N, N) each. For subclasses: `forward` does not
        form them.

        With `world_size` > 1 they are those of all ranks' images and texts, gathered with gradients
        as in open_clip with `gather_with_grad`. With `local_loss` the rows are this rank's only,
        and all ranks must have the same number of rows.
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
        """Check the assumptions of `get_ground_truth`."""
        if self.rank != shards.rank:
            raise ValueError(
                f"rank must be that in the default group, {shards.rank}, got {self.rank}"
            )
        if len({*shards.row.counts, *shards.col.counts}) > 1:
            raise ValueError(
                f"local_loss needs the same number of rows on every rank, got {shards.row.counts}"
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) images and texts, L2-normalised; row i of both is a positive pair.
        `logit_scale` is the multiplier, open_clip's `logit_scale.exp()`. Returns a 0-d tensor, or
        with `output_dict` {"contrastive_loss": loss}. Arguments and errors as in `clip_loss`."""
        _check_logits_are_not_redefined(self, ClipLoss)
        group = _default_group(self.world_size)
        loss = clip_loss(image_features, text_features, logit_scale, group=group)
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(
                    f"logit_bias must be one number, got shape {tuple(logit_bias.shape)}"
                )
            # an empty sum: 0 with a gradient of 0, even if the bias is infinite
            loss = loss + logit_bias.flatten()[:0].sum().to(loss)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(PrintsOptions, nn.Module):
    """`siglip_loss` as a replacement for open_clip's `SigLipLoss`, with its constructor, call and
    attributes.

    With `world_size` > 1 the batch is that of all ranks of the default group, and every rank gets
    the global loss. In open_clip a rank gets only the terms of its own images. A `logit_bias` of
    None means no bias. `cache_labels`, `rank`, `dist_impl` and `chunk_size` have no effect; the
    last two are checked. `forward` forms no logits; subclasses may call `get_logits` and
    `get_ground_truth`.

    Raises ValueError for an unknown `dist_impl` or a negative `chunk_size`; other errors as
    `ClipLoss`.
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
        """The labels (num_logits, num_logits): 1 on the diagonal unless `negative_only`, else -1.
        For subclasses."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """The dense logits of these images and texts, (N, N). For subclasses: `forward` does not
        form them."""
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
        """The loss of these images and texts from the dense logits. For subclasses."""
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n = len(image_features)
        labels = self.get_ground_truth(logits.device, logits.dtype, n, negative_only)
        return -torch.nn.functional.logsigmoid(labels * logits).sum() / n

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) images and texts, L2-normalised; row i of both is a positive pair.
        `logit_scale` is the multiplier, open_clip's `logit_scale.exp()`. Returns a 0-d tensor, or
        with `output_dict` {"contrastive_loss": loss}. Arguments and errors as in `siglip_loss`."""
        _check_logits_are_not_redefined(self, SigLipLoss)
        group = _default_group(self.world_size)
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class MultiPositiveInfoNCE(PrintsOptions, nn.Module):
    """`multi_positive_infonce` with options fixed at construction.

    options: the keyword arguments of `multi_positive_infonce`, with its defaults, except the ids.
    Tensors that belong to a batch (queue, hard negatives, pairs, weights) are passed to the call.
    Raises TypeError for an unknown option; a call raises as `multi_positive_infonce`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - _OPTIONS.keys()
        if unknown:
            raise TypeError(
                f"MultiPositiveInfoNCE has no option {', '.join(sorted(unknown))}: expected some of"
                f" {', '.join(_OPTIONS)}"
            )
        self.options = options

    def printed_options(self) -> dict[str, object]:
        return _OPTIONS | self.options

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        logit_scale: float | Tensor,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        **batch_options,
    ) -> Tensor | tuple:
        """`multi_positive_infonce` of (N, D) queries and (M, D) keys, L2-normalised, with the
        options of the construction and those that belong to the batch."""
        options = {**self.options, **batch_options}
        return multi_positive_infonce(
            queries, keys, logit_scale, query_ids=query_ids, key_ids=key_ids, **options
        )


class SupConLoss(PrintsOptions, nn.Module):
    """`supcon_loss` with its options fixed at construction. Arguments and errors as there."""

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
        self.group, self.chunk_size, self.positives = group, chunk_size, positives

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """`supcon_loss` of (N, D) features, L2-normalised, and their (N,) labels: several views of
        an item, (N, V, D), are `features.flatten(0, 1)` with `labels.repeat_interleave(V)`."""
        return supcon_loss(
            features,
            labels,
            self.temperature,
            self.base_temperature,
            self.empty,
            positives=self.positives,
            group=self.group,
            chunk_size=self.chunk_size,
        )


class NTXentLoss(PrintsOptions, nn.Module):
    """`nt_xent_loss` with its options fixed at construction. Arguments and errors as there."""

    def __init__(self, temperature: float = 0.5, group=None, chunk_size: int | None = None):
        super().__init__()
        self.temperature, self.group, self.chunk_size = temperature, group, chunk_size

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """`nt_xent_loss` of two views of the same items, (N, D) each, L2-normalised."""
        return nt_xent_loss(z1, z2, self.temperature, group=self.group, chunk_size=self.chunk_size)


class ItoLoss(PrintsOptions, nn.Module):
    """`ito_loss` with its options fixed at construction. Arguments and errors as there."""

    def __init__(
        self,
        lambda_fusion: float = 2.0,
        denominator: str = "pair",
        group=None,
        chunk_size: int | None = None,
        equal_ids: str = "positive",
    ):
        super().__init__()
        self.lambda_fusion, self.denominator = lambda_fusion, denominator
        self.group, self.chunk_size, self.equal_ids = group, chunk_size, equal_ids

    def forward(
        self,
        image_views: Tensor,
        text: Tensor,
        fused_views: Tensor | None,
        logit_scale: float | Tensor,
        *,
        fusion_scale: float | Tensor | None = None,
        caption_ids: Tensor | None = None,
        fused_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`ito_loss` of (V, N, D) views of the images, their texts, (N, D) or (C, N, D), and
        (F, N, D) fused views or None. Returns (loss, {"align": …, "fusion": …})."""
        return ito_loss(
            image_views,
            text,
            fused_views,
            logit_scale,
            lambda_fusion=self.lambda_fusion,
            denominator=self.denominator,
            fusion_scale=fusion_scale,
            caption_ids=caption_ids,
            fused_ids=fused_ids,
            equal_ids=self.equal_ids,
            group=self.group,
            chunk_size=self.chunk_size,
        )
