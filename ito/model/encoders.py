"""The two towers of the dual encoder: a compact ViT over a CNN stem, and a text transformer.

Both return ``(tokens, pooled)`` in the joint width, not normalised. The fusion module uses the
tokens during training; the pooled vectors are the embeddings.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ito.model.pretrained import PretrainedImage, PretrainedText, masked_mean, require_size

PAD = 0
STEM = ((48, 4, 4), (64, 3, 1), (128, 3, 2), (128, 3, 1))  # channels, kernel, stride


def attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """``softmax(Q Kᵀ / √d) V`` for ``(B, H, L, d)``.

    ``key_mask`` is True for keys that may be attended to: ``(B, L)``, or ``(B, L, L)`` per query.
    """
    mask = key_mask
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # On the CPU the fused op is slower at these lengths (256 x 4 heads x 33 tokens x 32, forward +
    # backward: fp32 18 against 12 ms, bf16 108 against 15 ms on two cores). The softmax takes fp32
    # scores: in bf16 PyTorch computes rows shorter than 32 element by element (128 x 4 heads x 29
    # tokens, forward + backward: 7.3 against 1.3 ms).
    # The bias has a dimension at least: a 0-d tensor would not promote bf16 scores to fp32.
    bias = torch.zeros(1 if mask is None else mask.shape, device=query.device)
    if mask is not None:
        bias.masked_fill_(~mask, float("-inf"))
    scores = torch.add(bias, query @ key.transpose(-1, -2), alpha=query.shape[-1] ** -0.5)
    return scores.softmax(-1).to(value.dtype) @ value


class Packed(NamedTuple):
    """The T real tokens of a padded batch (B, L), for layers that see one token at a time.

    T is rounded up to a multiple of 32: for each new size oneDNN generates code, which takes longer
    than what is saved.

    places: (T,), the position of each token among the B·L; where `used` (T, 1) is False, any.
    tokens: (B·L,), which of the T is at each position; where `real` (B·L, 1) is False, any.
    """

    places: Tensor
    tokens: Tensor
    used: Tensor
    real: Tensor

    @classmethod
    def of(cls, mask: Tensor, wanted: bool) -> "Packed | None":
        """None if not wanted, on a GPU, which would wait for the lengths, and in a module that is
        compiled or exported, of which each T would be another version."""
        if not wanted or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        real = mask.flatten()
        places = real.nonzero().squeeze(1)
        tokens = real.cumsum(0).sub_(1).clamp_(min=0)
        rounded = F.pad(places, (0, -len(places) % 32))
        used = torch.arange(len(rounded)) < len(places)
        return cls(rounded, tokens, used[:, None], real[:, None])

    def pack(self, x: Tensor) -> Tensor:
        """``(B, L, W) -> (T, W)``."""
        return Rows.apply(x.flatten(0, 1), self.places, self.tokens, self.real)

    def pad(self, x: Tensor, batch: int) -> Tensor:
        """``(T, W) -> (B, L, W)``; the values at padding must not be used."""
        return Rows.apply(x, self.tokens, self.places, self.used).unflatten(0, (batch, -1))


# `index_select` with a gradient that is one too, by the inverse index; PyTorch's adds row by row,
# on one thread.
class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse, has_gradient):
        ctx.save_for_backward(inverse, has_gradient)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        inverse, has_gradient = ctx.saved_tensors
        return grad.index_select(0, inverse).mul_(has_gradient), None, None, None


class Block(nn.Module):
    """Pre-norm bidirectional transformer block with an MLP of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        # erf-GELU: the tanh form is 3 to 6 times slower on the CPU.
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        first_only: bool = False,
        packed: Packed | None = None,
    ) -> Tensor:
        """``(B, L, W) -> (B, L, W)``, or with `first_only` position 0 of it, ``(B, 1, W)``, or with
        `packed` ``(T, W) -> (T, W)``.

        `key_mask` as in `attention`; with `first_only` it is ``(B, L)``.
        """
        normed = self.norm_attention(x)
        if first_only:
            x, mixed = x[:, :1], self.attend_first(normed, key_mask)
        else:
            qkv = self.qkv(normed)
            if packed:
                qkv = packed.pad(qkv, len(key_mask))
            qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = attention(*qkv, key_mask).transpose(1, 2).flatten(2)
            if packed:
                mixed = packed.pack(mixed)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm_mlp(x))

    def attend_first(self, normed: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of position 0 only, ``(B, 1, W)``, without computing keys and values.

        ``q·(W_K x) = (W_Kᵀ q)·x`` and ``Σ p (W_V x) = W_V (Σ p x)``: one query and one result are
        multiplied by the weights instead of L tokens. The keys' bias adds the same number to every
        score of a softmax, so it cancels.
        """
        query, key, value = self.qkv.weight.unflatten(0, (3, self.heads, -1))
        query_bias, _, value_bias = self.qkv.bias.view(3, self.heads, -1)
        q = torch.einsum("bw,hdw->bhd", normed[:, 0], query) + query_bias
        # `attention` divides by √W, but the heads need √d
        q = torch.einsum("bhd,hdw->bhw", q, key) * self.heads**0.5
        mixed = attention(q[:, None], normed[:, None], normed[:, None], key_mask)[:, 0]
        mixed = torch.einsum("bhw,hdw->bhd", mixed, value) + value_bias
        return mixed.flatten(1)[:, None]


def initialise(module: nn.Module, residual: float = 1.0) -> None:
    """Normal weights with variance 1 / fan-in; `residual` scales the last layer of each branch.

    The usual standard deviation of 0.02 suits widths near 768. At 128 it is 4 times too small:
    steps of AdamW at 1e-3 are then 5 % of a weight, and the alignment loss after 500 steps was 1.17
    instead of 0.86. GPT-2's `residual`, 1/√(2·depth), suits fusion (R@1 of ITO, seeds 0 and 1: 37.2
    and 35.5 %, with `residual` 1 32.6 and 33.6). The shallow towers here use 1: with GPT-2's, three
    text blocks learned later (at 1e-3, seed 0: 30.8 %, with three times as much 34.8). CLIP's
    towers, twelve blocks deep, use it.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            std = child.in_features**-0.5
            if name.endswith(("out", "mlp.2")):
                std *= residual
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)


def convolutions(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for out_channels, kernel, stride in STEM:
        layers += [
            nn.Conv2d(channels, out_channels, kernel, stride, kernel % 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
        channels = out_channels
    # No ReLU after the last norm: the patches then start centred over the batch, and embeddings of
    # different pictures differ (alignment loss after 200 steps 3.14 instead of 3.57).
    last = nn.Conv2d(channels, width, 1, bias=False)
    return nn.Sequential(*layers, last, nn.BatchNorm2d(width))


class ImageEncoder(nn.Module):
    """CNN stem (stride 8) or patches, CLS token, transformer blocks, final norm, projection.

    Args:
        image_size: side of the square input in pixels, a multiple of 8, or of `patch_size`.
        width, depth, heads: of the transformer; embed_dim: the joint width E.
        patch_size: side of ViT's patches, each projected; None for the CNN stem, where CLS starts
            at the mean of the patches.

    ``forward(images (B, 3, S, S)) -> tokens (B, 1 + grid², E), pooled (B, E)``; token 0 is CLS.
    It is ``attend(convolve(images))``. In ``convolve`` pictures depend on each other through batch
    normalisation; in ``attend`` they do not.
    """

    def __init__(
        self,
        image_size: int,
        width: int,
        depth: int,
        heads: int,
        embed_dim: int,
        patch_size: int | None = None,
    ):
        super().__init__()
        stride = patch_size or 8
        if image_size % stride:
            raise ValueError(f"image_size must be a multiple of {stride}, got {image_size}")
        self.image_size = image_size
        self.grid = image_size // stride
        self.cls_of_patches = patch_size is None
        if patch_size:
            self.stem = nn.Conv2d(3, width, patch_size, patch_size)
        else:
            self.stem = convolutions(width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.5 * width**-0.5 * torch.randn(1 + self.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)
        initialise(self, residual=(2 * depth) ** -0.5 if patch_size else 1.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(self.convolve(images))

    def convolve(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S) -> (B, W, grid, grid)``."""
        require_size(images, self.image_size)
        return self.stem(images.contiguous(memory_format=torch.channels_last))

    def attend(self, features: Tensor) -> tuple[Tensor, Tensor]:
        patches = features.flatten(2).transpose(1, 2)
        cls = self.cls.to(patches.dtype).expand(patches.shape[0], 1, -1)
        if self.cls_of_patches:  # so that CLS is informative from the first step
            cls = cls + patches.mean(1, keepdim=True)
        # An fp32 embedding would silently promote a bf16 stream for the rest of the tower.
        x = torch.cat([cls, patches], 1) + self.positions.to(patches.dtype)
        for block in self.blocks:
            x = block(x)
        tokens = self.project(self.norm(x))
        return tokens, tokens[:, 0]


class TextEncoder(nn.Module):
    """Token and learned positional embedding, transformer blocks, final norm, projection.

    ``forward(ids (B, L) int64) -> tokens (B, L, E), pooled (B, E)``; L ≤ context_length, id 0 is
    padding, masked on the keys; ``pooled`` is the mean over the real tokens. With ``causal`` a
    token attends to itself and those before it, and ``pooled`` is the last real one, the end token.
    In training the blocks compute no padding, unless `packs` is False.
    """

    packs = True

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        embed_dim: int,
        causal: bool = False,
    ):
        super().__init__()
        self.context_length = context_length
        self.causal = causal
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PAD)
        self.positions = nn.Parameter(0.5 * width**-0.5 * torch.randn(context_length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)
        initialise(self, residual=(2 * depth) ** -0.5 if causal else 1.0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"ids must have at most {self.context_length} columns, got {length}")
        key_mask = ids != PAD
        x = self.embedding(ids) + self.positions[:length]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        seen = key_mask
        if self.causal:
            seen = key_mask[:, None, :] & key_mask.new_ones(length, length).tril()
        packed = Packed.of(key_mask, self.training and self.packs)
        x = packed.pack(x) if packed else x
        for block in self.blocks:
            x = block(x, seen, packed=packed)
        tokens = self.project(self.norm(x))
        tokens = packed.pad(tokens, len(ids)) if packed else tokens
        if self.causal:
            last = key_mask.sum(1).sub(1).clamp(min=0)
            return tokens, tokens[torch.arange(ids.shape[0], device=ids.device), last]
        return tokens, masked_mean(tokens, key_mask)


class DualEncoder(nn.Module):
    """Both towers and the learnable logit scale: everything that inference needs.

    `width` is that of the text tower and of the joint embedding, `image_width` that of the image
    tower (None: the same); likewise `heads`. With `patch_size` the towers are CLIP's: a plain ViT,
    without the normalisation before its blocks, and a causal text transformer. With `image_encoder`
    or `text_encoder` (see `ito.model.pretrained`) a tower comes from another package and has its
    own shape. `architecture` holds the arguments, which are saved with the weights.
    """

    def __init__(
        self,
        *,
        image_size: int,
        width: int,
        heads: int,
        image_depth: int,
        text_depth: int,
        vocab_size: int,
        context_length: int,
        image_width: int | None = None,
        image_heads: int | None = None,
        patch_size: int | None = None,
        image_encoder: dict | None = None,
        text_encoder: dict | None = None,
    ):
        super().__init__()
        self.architecture = {
            "image_size": image_size,
            "width": width,
            "heads": heads,
            "image_depth": image_depth,
            "text_depth": text_depth,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "image_width": image_width,
            "image_heads": image_heads,
            "patch_size": patch_size,
            "image_encoder": image_encoder,
            "text_encoder": text_encoder,
        }
        if image_encoder:
            self.image = PretrainedImage(image_encoder, image_size, width)
        else:
            shape = (image_width or width, image_depth, image_heads or heads)
            self.image = ImageEncoder(image_size, *shape, width, patch_size)
        if text_encoder:
            self.text = PretrainedText(text_encoder, context_length, width)
        else:
            shape, causal = (width, text_depth, heads), patch_size is not None
            self.text = TextEncoder(vocab_size, context_length, *shape, width, causal)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def lockable(self, locked: str) -> nn.ModuleList:
        """The modules that `locked` (none, image, text, both) excludes from training: a tower, or,
        of another package's tower, the body without its projection."""
        towers = {"none": (), "both": ("image", "text")}.get(locked, (locked,))
        parts = (getattr(self, tower) for tower in towers)
        return nn.ModuleList(getattr(part, "body", part) for part in parts)

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised float images ``(B, 3, S, S)`` -> unit rows ``(B, E)``, fp32."""
        return F.normalize(self.image(images)[1].float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, L)`` -> unit rows ``(B, E)``, fp32."""
        return F.normalize(self.text(ids)[1].float(), dim=-1)
