"""ITO's fusion module: image and text tokens in one transformer, during training only.

Source: "Images and Texts as One" (arXiv 2603.02767), section on training-time fusion.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ito.model.encoders import Block, Packed, initialise
from ito.model.pretrained import masked_mean

READOUTS = ("cls", "mean", "token")


def sincos_2d(grid: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, ``(1 + grid², width)``; row 0 (CLS) is zero.

    Half of the width encodes the row, half the column; each half is ``[sin(pω), cos(pω)]`` with
    ``ω_k = 10000^(−k / (width/4))``. Source: MoCo v3 (arXiv 2104.02057).
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows = line[:, None, :].expand(grid, grid, -1)
    columns = line[None, :, :].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], 2).reshape(grid * grid, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()


class Fusion(nn.Module):
    """Pre-norm bidirectional blocks over [image tokens ; text tokens], final norm, read-out.

    Args:
        grid: side of the image's patch grid; width: the joint width E; depth, heads of the blocks.
        readout: ``cls`` (position 0, the image's CLS), ``mean`` (over all real tokens) or ``token``
            (an additional learned token, at position 0).

    In training all blocks but the last compute no padding, unless `packs` is False.
    """

    packs = True

    def __init__(self, grid: int, width: int, depth: int = 2, heads: int = 4, readout: str = "cls"):
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {readout!r}")
        self.readout = readout
        self.register_buffer("image_positions", sincos_2d(grid, width), persistent=False)
        self.token = nn.Parameter(0.02 * torch.randn(width)) if readout == "token" else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        initialise(self.blocks, residual=(2 * depth) ** -0.5)

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, text_positions: Tensor
    ) -> Tensor:
        """Fuse each image with its text.

        Args:
            image_tokens: ``(B, 1 + grid², E)``, CLS first; text_tokens: ``(B, L, E)``.
            text_mask: ``(B, L)``, True at real tokens; padding never reaches the result.
            text_positions: ``(L, E)``, the text tower's own positional embedding.

        Returns:
            Unit rows ``(B, E)``, fp32.
        """
        if text_positions.shape != text_tokens.shape[1:]:
            wanted, got = tuple(text_tokens.shape[1:]), tuple(text_positions.shape)
            raise ValueError(f"text_positions must be {wanted} like text_tokens, got {got}")
        batch = image_tokens.shape[0]
        image = image_tokens + self.image_positions.to(image_tokens.dtype)
        text = text_tokens + text_positions.to(text_tokens.dtype)
        parts = [image, text]
        if self.token is not None:
            parts.insert(0, self.token.to(image.dtype).expand(batch, 1, -1))
        x = torch.cat(parts, 1)
        always = text_mask.new_ones(batch, x.shape[1] - text_mask.shape[1])
        key_mask = torch.cat([always, text_mask], 1)
        # Unless the read-out is "mean", only position 0 is used: the last block computes no other.
        packed = Packed.of(key_mask, self.training and self.packs)
        x = packed.pack(x) if packed else x
        for block in self.blocks[:-1]:
            x = block(x, key_mask, packed=packed)
        x = packed.pad(x, batch) if packed else x
        x = self.norm(self.blocks[-1](x, key_mask, first_only=self.readout != "mean"))
        fused = masked_mean(x, key_mask) if self.readout == "mean" else x[:, 0]
        return F.normalize(fused.float(), dim=-1)
