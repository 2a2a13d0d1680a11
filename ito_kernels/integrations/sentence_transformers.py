"""The ranking losses of sentence-transformers, plain and cached.

-   from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
+   from ito_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

They are subclasses that replace only the loss of the embeddings. Arguments, encoding and gradient
caching are inherited. All options are supported, except that similarities other than the cosine and
the inner product raise NotImplementedError.

A text is never a candidate of itself. In the package's GISTEmbedLoss it is one if its cosine with
itself, 1, does not exceed the limit: if the guide's cosine of anchor and positive is 1 or, with a
negative margin, nearly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.util import batch_to_device, cos_sim, dot_score
from torch import Tensor

from ..distributed import same_on_every_rank
from ..losses.batch import check_arguments
from ..losses.precision import without_autocast
from ..losses.retrieval import MNRL, Ranking, RankingOptions, check_ranking_options, mnrl_loss
from ..options_repr import PrintsOptions
from .gathering import gathering_group

_SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


class _PrintsConfig(PrintsOptions):
    def printed_options(self) -> dict[str, object]:
        """The settings, without the models, which torch prints."""
        settings = self.get_config_dict()
        return {k: x for k, x in settings.items() if not isinstance(x, torch.nn.Module)}


class MultipleNegativesRankingLoss(_PrintsConfig, peer.MultipleNegativesRankingLoss):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        return _ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(_PrintsConfig, peer.CachedMultipleNegativesRankingLoss):
    """The loss is computed for the whole batch at once, because no score matrix is formed. Only the
    encoder runs in mini-batches."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = _ranking_loss(self, [torch.cat(column) for column in reps])
        return _backward(loss) if with_backward else loss


# The package marks the next two as deprecated: they are the two above with the options _SYMMETRIC.


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    def __init__(
        self,
        model: torch.nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
    ):
        super().__init__(model, scale, similarity_fct, gather_across_devices, **_SYMMETRIC)


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    def __init__(
        self,
        model: torch.nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ):
        super().__init__(
            *(model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens),
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
            **_SYMMETRIC,
        )


class GISTEmbedLoss(_PrintsConfig, peer.GISTEmbedLoss):
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(columns)}")
        guide_columns = [dict(column) for column in columns]  # encoders write into their input
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guide_columns = [self._retokenized(column) for column in guide_columns]
            guide = embed_columns(self.guide, guide_columns)
        return _guided_loss(self, embeddings, guide)

    def _retokenized(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """The texts of a column with the tokens of the guide."""
        ids = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all texts in one row, with the places where they begin
            ids = [x.tolist() for x in ids[0].tensor_split(column["cu_seq_lens_q"][1:-1].cpu())]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_PrintsConfig, peer.CachedGISTEmbedLoss):
    """As in `CachedMultipleNegativesRankingLoss`, only the encoders run in mini-batches."""

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
    ) -> Tensor:
        embeddings, guide = ([torch.cat(x) for x in columns] for columns in (reps, reps_guided))
        loss = _guided_loss(self, embeddings, guide)
        return _backward(loss) if with_backward else loss


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _columns(embeddings: list[Tensor]) -> tuple[Tensor, ...]:
    """Queries, positives and, if there are any, negatives (N, K, D)."""
    queries, positives, *negatives = embeddings
    return (queries, positives, *([torch.stack(negatives, 1)] if negatives else ()))


def _ranking_loss(settings, embeddings: list[Tensor]) -> Tensor:
    """The loss of `MultipleNegativesRankingLoss`. settings: a loss with its attributes."""
    group = gathering_group(settings.gather_across_devices)
    mode, strength = settings.hardness_mode, settings.hardness_strength
    if mode is None or (mode == "hard_negatives" and len(embeddings) == 2):
        mode, strength = None, 0.0  # the package ignores the strength here
    options = {
        "directions": tuple(dict.fromkeys(settings.directions)),
        "partition_mode": settings.partition_mode,
        "hardness_mode": mode,
        "hardness_strength": strength,
        "normalize": _similarity(settings.similarity_fct, embeddings[0]) is cos_sim,
    }
    if group is None:
        return mnrl_loss(*_columns(embeddings), scale=settings.scale, **options)
    options = RankingOptions(**options)
    return _mean_of_this_rank(*_columns(embeddings), scale=settings.scale, o=options, group=group)


def _guided_loss(settings, embeddings: list[Tensor], guide: list[Tensor]) -> Tensor:
    """The loss of `GISTEmbedLoss`, which compares positives with positives, not with negatives, and
    never gathers the anchors. settings: a loss with its attributes."""
    options = RankingOptions(
        guide=_columns(guide), margin=settings.margin, margin_strategy=settings.margin_strategy
    )
    directions = {
        "query_to_doc": True,
        "query_to_local_query": settings.contrast_anchors,
        "positive_to_positive": settings.contrast_positives,
    }
    return _mean_of_this_rank(
        *_columns(embeddings),
        scale=1 / settings.temperature,
        o=options,
        directions=tuple(name for name, wanted in directions.items() if wanted),
        group=gathering_group(settings.gather_across_devices),
    )


@same_on_every_rank
def _mean_of_this_rank(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor,
    o: RankingOptions,
    directions: tuple[str, ...] | None = None,
    group=None,
) -> Tensor:
    """The mean over this rank's queries, which is the package's value, with the candidates of all
    ranks. directions: those of `Ranking`, instead of the options'."""
    args = check_arguments(queries, positives, scale, group, names=MNRL)
    o, negatives = check_ranking_options(o, args, negatives)
    if directions is not None:
        o = o._replace(directions=directions)
    return Ranking(args, negatives, o).losses().mean()


def _similarity(function: Callable, like: Tensor) -> Callable:
    """Return cos_sim or dot_score, whichever gives the same results as `function`.

    Wrappers are recognised by their results for four rows. The rows have the width of the
    embeddings, because a wrapper may truncate them.
    """
    if function in (cos_sim, dot_score):
        return function
    numbers = torch.arange(1.0, 8 * like.shape[1] + 1, device=like.device).sin()
    lengths = torch.arange(1.0, 5, device=like.device)[:, None]
    a, b = lengths * numbers.view(2, 4, -1)
    with torch.no_grad(), without_autocast(like.device):
        result = function(a, b)
        for candidate in (cos_sim, dot_score):
            scores = candidate(a, b)
            if (
                isinstance(result, Tensor)
                and result.shape == scores.shape
                and (result - scores).abs().max() <= 1e-5 * scores.abs().max()
            ):
                return candidate
    raise NotImplementedError(
        "similarity_fct must be cos_sim or dot_score of sentence_transformers.util, or return the"
        f" same values, got {function!r}"
    )
