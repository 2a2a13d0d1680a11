"""The training objectives: ITO, and those that it is compared with, behind one interface.

All share towers, data order and budget, and, except for plain CLIP, augmentation. An objective owns
the modules that exist only during training. Its loss takes features only, so that the batch can be
split into micro-batches and over ranks. A user's own loss comes from a file: UserObjective.
"""

import importlib.util
import inspect
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from ito.data.augment import CROP, DRAWINGS, PAPER, Augmentation
from ito.model.encoders import DualEncoder, attention, initialise
from ito.model.fusion import Fusion
from ito.model.tokenizer import Tokenizer
from ito.ranks import LOST, all_gather_rows, all_reduce_sum
from ito_kernels import clip_loss, ito_loss, nt_xent_loss, panelwise, siglip_loss
from ito_kernels.distributed import global_row_numbers

MAX_LOGIT_SCALE = math.log(100)
Terms = dict[str, Tensor]


class Step(NamedTuple):
    """What a loss may use apart from its features.

    number: of the step, from 1. progress: the share of all steps done so far, in [0, 1). item:
    (n,), the numbers of this rank's items in the data set. generator: seeded by the run's seed and
    the step, the same on all ranks. caption_ids: (C, n), equal where the drawn captions are equal
    but for white space and case; None if equal captions are negatives, or if there are none.
    """

    number: int
    progress: float
    item: Tensor
    generator: torch.Generator
    caption_ids: Tensor | None = None


class Objective(nn.Module):
    """Created from an `ito.config.Config` and the model, whose logit scale it may set.

    `views` and `captions` are the default numbers per item. `options` are the options it takes that
    not every objective has. `augmentation` is the default, or, if `fixed`, the only one;
    `photo_augmentation` that of the presets photos and finetune: two views must differ, or there is
    nothing to learn from comparing them; one view is open_clip's crop.
    `equal_captions` is the default of what equal captions of a batch's items are to each other.
    """

    views = 1
    captions = 1
    equal_captions = "positive"
    options: tuple[str, ...] = ("equal_captions",)
    augmentation: Augmentation = DRAWINGS
    photo_augmentation: Augmentation = PAPER
    fixed = False

    def __init__(self, config, model: DualEncoder):
        super().__init__()
        self.config = config
        self.equal_ids = "ignore" if config.equal_captions == "ignore" else "positive"

    def texts(self, ids: Tensor, random: torch.Generator) -> Tensor:
        """From token ids (C, N, L) of the global batch to the ids that `encode` takes."""
        return ids

    def encode(self, model: DualEncoder, patches: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """From the output of `model.image.convolve`, (V, n, ...), and token ids (C, n, L) to
        features with the n items along dimension 1. Items must not depend on each other here."""
        return unit_rows(model.image.attend, patches), unit_rows(model.text, ids)

    def loss(
        self, *features: Tensor, logit_scale: Tensor, step: Step, group: ProcessGroup | None
    ) -> tuple[Tensor, Terms]:
        """The loss of the global batch, over all ranks of `group`, and its terms by name.

        logit_scale: the factor itself, not its logarithm.
        """
        raise NotImplementedError

    @torch.no_grad()
    def start_from(self, model: DualEncoder, logit_scale: float, logit_bias: float | None) -> None:
        """Take over the scale of the model that `--pretrained` names, as its logarithm, and its
        bias, if it has one."""
        model.logit_scale.fill_(logit_scale)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep parameters in their range; called after each optimizer step."""


def unit_rows(tower: nn.Module, inputs: Tensor) -> Tensor:
    """From inputs (V, n, ...) to unit rows (V, n, E), fp32."""
    rows = F.normalize(tower(inputs.flatten(0, 1))[1].float(), dim=-1)
    return rows.unflatten(0, inputs.shape[:2])


class Clip(Objective):
    """Symmetric InfoNCE of one mildly cropped view and one caption."""

    augmentation = photo_augmentation = CROP
    fixed = True

    def loss(self, image, text, *, logit_scale, step, group):
        align = self.align(image[0], text[0], logit_scale, step, group)
        return align, {"align": align}

    def align(self, image, text, logit_scale, step, group):
        ids = None if step.caption_ids is None else step.caption_ids[0]
        ids = {"query_ids": ids, "key_ids": ids, "equal_ids": self.equal_ids}
        return clip_loss(image, text, logit_scale, **ids, group=group)


class ClipAugmented(Clip):
    """CLIP with the augmentation of the other objectives."""

    augmentation, photo_augmentation = DRAWINGS, PAPER
    fixed = False


class Slip(ClipAugmented):
    """CLIP on the first view, plus NT-Xent on two more views through a projector, with weight 1.

    Mu et al. 2021. Their projector has batch normalisation; this one has layer normalisation, with
    which items do not depend on each other. NT-Xent tells items apart, whatever their captions.
    """

    views = 3
    TEMPERATURE = 0.1

    def __init__(self, config, model):
        super().__init__(config, model)
        width = config.width
        self.projector = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.LayerNorm(4 * width),
            nn.ReLU(inplace=True),
            nn.Linear(4 * width, 4 * width),
            nn.LayerNorm(4 * width),
            nn.ReLU(inplace=True),
            nn.Linear(4 * width, width),
        )
        initialise(self.projector)

    def encode(self, model, patches, ids):
        pooled = model.image.attend(patches.flatten(0, 1))[1].unflatten(0, patches.shape[:2])
        projected = self.projector(pooled[1:])
        image, views = (F.normalize(x.float(), dim=-1) for x in (pooled[:1], projected))
        return image, unit_rows(model.text, ids), views

    def loss(self, image, text, views, *, logit_scale, step, group):
        align = self.align(image[0], text[0], logit_scale, step, group)
        views = nt_xent_loss(views[0], views[1], self.TEMPERATURE, group=group)
        return align + views, {"align": align, "views": views}


class Sigmoid(Objective):
    """An objective with a sigmoid loss: scale and bias start at SigLIP's 10 and -10."""

    photo_augmentation = CROP

    def __init__(self, config, model):
        super().__init__(config, model)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        nn.init.constant_(model.logit_scale, math.log(10))

    @torch.no_grad()
    def start_from(self, model, logit_scale, logit_bias):
        """Takes both or neither: with the scale of a softmax, up to 100, and a bias of -10 nearly
        every pair would count as a positive one."""
        if logit_bias is not None:
            super().start_from(model, logit_scale, logit_bias)
            self.logit_bias.fill_(logit_bias)

    def all_pairs(self, image, text, scale, ids, group):
        """(1/B) Σ softplus(±S) over all images (n, E) and all captions (K, n, E) of the B items of
        all ranks: minus for an item's own captions, and plus for others.

        A caption of another item whose id is one of the item's own, ids (K, n), has minus too, or
        with `equal_ids` "ignore" no term. Where one id of each caption tells positives from
        negatives, it is `siglip_loss`; elsewhere the scores are computed a panel of rows at a time,
        with the captions of all ranks.
        """
        captions, n = text.shape[:2]
        if ids is None or (captions == 1 and self.equal_ids == "positive"):
            named, keys = {}, text.flatten(0, 1)
            if ids is not None or captions > 1:
                own = global_row_numbers(n, group, text.device) if ids is None else ids[0]
                named = {"image_ids": own, "text_ids": own.repeat(captions)}
            return siglip_loss(image, keys, scale, self.logit_bias, **named, group=group)
        texts = all_gather_rows(text.transpose(0, 1).contiguous(), group)  # (B, K, E)
        text_ids = all_gather_rows(ids.T.contiguous(), group)
        items = torch.arange(len(texts), device=ids.device).repeat_interleave(captions)
        places = global_row_numbers(n, group, text.device)

        def terms(dot, rows, own_ids, places, text_ids, items, scale, bias):
            own = places[:, None] == items
            sign, counted = signs_of_equal(own, own_ids, text_ids, self.equal_ids, dot.dtype)
            return (F.softplus(sign * (scale * dot + bias), threshold=40) * counted).sum(1)

        rows = panelwise(
            terms,
            image,
            texts.flatten(0, 1),
            row_args=(ids.T, places),
            key_args=(text_ids.flatten(), items, scale, self.logit_bias),
        )
        return all_reduce_sum(rows.sum(), group) / len(texts)


class SigLip(Sigmoid):
    """A sigmoid loss of every image with every text. Zhai et al. 2023."""

    def loss(self, image, text, *, logit_scale, step, group):
        align = self.all_pairs(image[0], text, logit_scale, step.caption_ids, group)
        return align, {"align": align, "logit_bias": self.logit_bias}


def signs_of_equal(
    own: Tensor, own_ids: Tensor, text_ids: Tensor, equal_ids: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of n images with M texts, (n, M): -1 for positives and 1 for negatives; and 1 for the pairs
    that count, 0 for those that are ignored.

    own: whether a text is the image's. own_ids: (n, K), the ids of the image's texts.
    """
    equal = torch.zeros_like(own)
    for ids in own_ids.T:
        equal |= ids[:, None] == text_ids
    positive = own | equal if equal_ids == "positive" else own
    return 1 - 2 * positive.to(dtype), (positive | ~equal).to(dtype)


class Flair(Sigmoid):
    """The mean of a text-conditioned and a global sigmoid term. Xiao et al. 2025.

    local: image i with its K captions and the first caption of every other item, (1/(K + B - 1)) Σ
    over all pairs; the image's feature pools its tokens by attention, with the caption as query.
    all: every image with the K captions of every item, (1/(B·K)) Σ over all pairs.
    A caption of another item that is equal to one of the K is a positive too, or left out.
    """

    captions = 2
    options = ("captions", "equal_captions")
    # pairs whose pooled features are in memory at a time; backward computes them again
    PAIRS = 16384

    def __init__(self, config, model):
        super().__init__(config, model)
        self.pooling = AttentionPooling(config.width, config.heads)

    def encode(self, model, patches, ids):
        tokens, pooled = model.image.attend(patches.flatten(0, 1))
        image = F.normalize(pooled.float(), dim=-1)
        return image[None], unit_rows(model.text, ids), tokens.float()[None]

    def loss(self, image, text, tokens, *, logit_scale, step, group):
        captions, n = text.shape[:2]
        ids = step.caption_ids
        all_ids = None if ids is None else all_gather_rows(ids[0], group)
        places = global_row_numbers(n, group, text.device)
        both = self.all_pairs(image[0], text, logit_scale, ids, group)
        all_text = all_gather_rows(text[0], group)
        block = max(1, self.PAIRS // (len(all_text) + captions))
        total = sum(
            checkpoint(
                self.pairs,
                tokens[0, part],
                text[:, part],
                all_text,
                places[part],
                logit_scale,
                None if ids is None else ids[:, part].T,
                all_ids,
                use_reentrant=False,
            )
            for part in (slice(at, at + block) for at in range(0, n, block))
        )
        total = all_reduce_sum(total, group)
        local = total / (captions + len(all_text) - 1)
        both = both / captions
        terms = {"local": local, "all": both, "logit_bias": self.logit_bias}
        return (local + both) / 2, terms

    def pairs(self, tokens, own, all_text, places, logit_scale, own_ids, all_ids) -> Tensor:
        """The sum over the pairs of n images, given as tokens (n, T, E), with their own captions
        (K, n, E) and the first captions of all items (B, E), where their own are rows `places`.

        own_ids, all_ids: the captions' ids, (n, K) and (B,), or None.
        """
        captions, n = own.shape[:2]
        queries = torch.cat([own.transpose(0, 1), all_text.expand(n, -1, -1)], 1)  # (n, K + B, E)
        local = F.normalize(self.pooling(queries, tokens), dim=-1)
        scores = logit_scale * (local * queries).sum(-1) + self.logit_bias
        sign = torch.ones_like(scores)
        sign[:, :captions] = -1  # softplus(-S) for positives
        counted = torch.ones_like(scores)
        if own_ids is not None:
            none = torch.zeros_like(scores[:, captions:], dtype=torch.bool)
            sign[:, captions:], counted[:, captions:] = signs_of_equal(
                none, own_ids, all_ids, self.equal_ids, scores.dtype
            )
        counted[torch.arange(n, device=places.device), captions + places] = 0  # is among `own`
        return (F.softplus(sign * scores) * counted).sum()


class AttentionPooling(nn.Module):
    """Queries (n, Q, E) attend to tokens (n, T, E): (n, Q, E).

    A zero token is added, so that a query may attend to none of the tokens.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.pair = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        initialise(self)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        pair = F.pad(self.pair(self.norm(tokens)), (0, 0, 0, 1))
        mixed = attention(split(self.query(queries)), *map(split, pair.chunk(2, -1)), None)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Ito(Objective):
    """InfoNCE of V views × C captions, plus λ times NT-Xent of each view fused with the text.

    Items with equal captions are positives in both, or left out; in the fusion by their first
    captions, and not if it sees other texts than these.
    """

    views = 2
    options = (
        "views",
        "captions",
        "equal_captions",
        "denominator",
        "lambda_fusion",
        "lambda_schedule",
        "fusion_depth",
        "fusion_readout",
        "fusion_scale",
        "fusion_stop_gradient",
        "fusion_text",
    )

    def __init__(self, config, model):
        super().__init__(config, model)
        self.fusion = self.logit_scale = None
        if config.lambda_fusion > 0:
            self.fusion = Fusion(
                model.image.grid,
                config.width,
                config.fusion_depth,
                config.heads,
                config.fusion_readout,
            )
            if config.fusion_scale == "own":
                self.logit_scale = nn.Parameter(model.logit_scale.detach().clone())

    def texts(self, ids, random):
        """With `fusion_text` "shuffled", adds another item's first caption for each view."""
        if self.fusion is None or self.config.fusion_text != "shuffled":
            return ids
        # cyclic shifts of the randomly ordered batch: another item, and not the same for two views
        shifts = 1 + torch.randperm(ids.shape[1] - 1, generator=random)
        shifts = shifts[torch.arange(self.config.views) % len(shifts)].tolist()
        return torch.cat([ids, torch.stack([ids[0].roll(shift, 0) for shift in shifts])])

    def encode(self, model, patches, ids):
        views, size = patches.shape[:2]
        image_tokens, image = model.image.attend(patches.flatten(0, 1))
        text_tokens, text = model.text(ids.flatten(0, 1))
        image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
        aligned = image.view(views, size, -1), text.view(len(ids), size, -1)
        if self.fusion is None:
            return aligned
        # The first caption is encoded once and fused with each view.
        fused_ids, tokens = ids[:1], text_tokens[:size]
        if self.config.fusion_text == "shuffled":
            fused_ids, tokens = ids[-views:], text_tokens[-views * size :]
        elif self.config.fusion_text == "dropped":
            fused_ids, tokens = ids[:1, :, :0], text_tokens[:size, :0]
        positions = model.text.positions[: fused_ids.shape[-1]]
        if self.config.fusion_stop_gradient in ("image", "both"):
            image_tokens = image_tokens.detach()
        if self.config.fusion_stop_gradient in ("text", "both"):
            tokens, positions = tokens.detach(), positions.detach()
        repeats = views // len(fused_ids)
        fused = self.fusion(
            image_tokens,
            tokens.repeat(repeats, 1, 1),
            (fused_ids != Tokenizer.pad_id).flatten(0, 1).repeat(repeats, 1),
            positions,
        )
        return *aligned, fused.view(views, size, -1)

    def loss(self, image, text, fused=None, *, logit_scale, step, group):
        text = text[: self.config.captions]
        weight = self.config.lambda_fusion * decay(self.config.lambda_schedule, step.progress)
        ids, fused_ids = step.caption_ids, None
        if ids is not None and fused is not None and self.config.fusion_text != "caption":
            fused_ids = global_row_numbers(ids.shape[1], group, ids.device)
        fusion_scale = None if self.logit_scale is None else self.logit_scale.exp()
        total, terms = ito_loss(
            image,
            text,
            fused,
            logit_scale,
            lambda_fusion=weight,
            denominator=self.config.denominator,
            fusion_scale=fusion_scale,
            caption_ids=ids,
            fused_ids=fused_ids,
            equal_ids=self.equal_ids,
            group=group,
        )
        if fusion_scale is not None:
            terms["fusion_scale"] = fusion_scale
        if self.config.lambda_schedule != "constant":
            terms["lambda"] = torch.tensor(weight)
        return total, terms

    @torch.no_grad()
    def start_from(self, model, logit_scale, logit_bias):
        super().start_from(model, logit_scale, logit_bias)
        if self.logit_scale is not None:
            self.logit_scale.fill_(logit_scale)

    @torch.no_grad()
    def clamp(self):
        if self.logit_scale is not None:
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def decay(schedule: str, progress: float) -> float:
    """The factor of λ: 1 at the first step, and unless constant 0 after the last."""
    if schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


class UserObjective(Objective):
    """The loss of a user's file, `--objective FILE.py:NAME`, on all views and captions.

    NAME is a function, or a `torch.nn.Module` class without arguments, whose parameters are trained
    and saved with the run. Its arguments are `(image, text, logit_scale, *, item, step, generator,
    group)`: `image` (V, n, E) and `text` (C, n, E), normalised; `item`, `generator` and the number
    `step` as in Step; `group`, the ranks' process group or None. It returns the loss, or the loss
    and a dict of its terms. It is not told which captions are equal.

    Raises ValueError naming --objective if the file has no such function or class, or if that
    raises an error.
    """

    options = ("views", "captions")
    equal_captions = "negative"

    def __init__(self, config, model):
        super().__init__(config, model)
        self.function = user_function(config.objective)

    def loss(self, image, text, *, logit_scale, step, group):
        option = f"--objective {self.config.objective}"
        about = {"item": step.item, "step": step.number, "generator": step.generator}
        try:
            found = self.function(image, text, logit_scale, **about, group=group)
        except Exception as error:
            if LOST in str(error):  # an error of a collective, not of the function
                raise
            raise user_error(self.config.objective, error) from error
        loss, terms = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        named = {"its loss": loss, **terms} if isinstance(terms, dict) else {"its terms": terms}
        for name, value in named.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{option}: {name} must be a tensor of one number, got {got}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"{option}: its loss must have a gradient: it must be computed from image, text or "
                "logit_scale, without detach()"
            )
        return loss.reshape(()), terms


def user_function(objective: str) -> Callable:
    """The function that FILE.py:NAME names, or a module if NAME is a class."""
    path, name = user_file(objective)
    option = f"--objective {objective}"
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            found = found()
    except Exception as error:  # a user's file may raise anything
        raise user_error(objective, error) from error
    if found is None:
        raise ValueError(f"{option}: {path.name} has no {name}")
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else type(found).__name__
        raise ValueError(
            f"{option}: {name} must be a function or a torch.nn.Module class, got {kind}"
        )
    called = found.forward if isinstance(found, nn.Module) else found
    given = {"item": 0, "step": 0, "generator": 0, "group": 0}
    try:
        inspect.signature(called).bind("image", "text", "logit_scale", **given)
    except TypeError as error:
        raise ValueError(
            f"{option}: {name} must take (image, text, logit_scale, *, item, step, generator, "
            f"group): {error}"
        ) from None
    return found


def user_error(objective: str, error: Exception) -> ValueError:
    """The error in one line: its line in the user's file, and its message."""
    path, _ = user_file(objective)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f" in line {lines[-1]}" if lines else ""
    return ValueError(f"--objective {objective}: {type(error).__name__}{where}: {error}")


def user_file(objective: str) -> tuple[Path, str] | None:
    """File and name of FILE.py:NAME; None for the name of a built-in objective."""
    parts = re.fullmatch(r"(.+\.py):(\w+)", objective)
    return (Path(parts[1]), parts[2]) if parts else None


OBJECTIVES = {
    "ito": Ito,
    "clip": Clip,
    "clip-aug": ClipAugmented,
    "slip": Slip,
    "siglip": SigLip,
    "flair": Flair,
}
# the options that not every objective takes
OPTIONS = tuple(dict.fromkeys(name for kind in OBJECTIVES.values() for name in kind.options))


def objective_class(name: str) -> type[Objective]:
    """The class of an objective. Reads no file. Raises ValueError listing the known names."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if user_file(name):
        return UserObjective
    raise ValueError(f"objective must be one of {tuple(OBJECTIVES)} or FILE.py:NAME, got {name!r}")
