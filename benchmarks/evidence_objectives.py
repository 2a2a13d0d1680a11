"""Forms of ITO's fusion that are no options of the trainer, as objectives of `evidence.py`.

Each differs from ITO in the one thing that its docstring names, and has its parameters.
"""

import torch
from torch import Tensor, nn

from ito.objectives import Ito


class Changed(nn.Module):
    """A fusion module whose inputs are changed first; the rows are the items, view by view."""

    def __init__(self, fusion: nn.Module):
        super().__init__()
        self.fusion = fusion

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return self.fusion(*self.change(image, text, mask, positions))


class CaptionInFirstView(Changed):
    def change(self, image, text, mask, positions):
        first = torch.arange(len(mask)) < len(mask) // 2
        return image, text, mask & first[:, None], positions


class WithModality(Changed):
    def __init__(self, fusion):
        super().__init__(fusion)
        self.modality = nn.Parameter(0.02 * torch.randn(2, fusion.norm.weight.shape[0]))

    def change(self, image, text, mask, positions):
        return image + self.modality[0], text + self.modality[1], mask, positions


class WithoutMean(Changed):
    def change(self, image, text, mask, positions):
        real = mask.unsqueeze(-1).to(text.dtype)
        return image, text - (text * real).sum(1, keepdim=True) / real.sum(1, True), mask, positions


class OneSided(Ito):
    """The first view is fused with the caption; the second goes through the module alone."""

    changed = CaptionInFirstView

    def __init__(self, config, model):
        super().__init__(config, model)
        self.fusion = self.changed(self.fusion)


class Modality(OneSided):
    """Image tokens and text tokens have a learned embedding of their modality each."""

    changed = WithModality


class MeanFree(OneSided):
    """The mean of a caption's tokens is subtracted from each of them before the fusion."""

    changed = WithoutMean


class Tower(Ito):
    """The first view is fused with the caption; the second is the image tower's own embedding."""

    def encode(self, model, patches, ids):
        image, text, fused = super().encode(model, patches, ids)
        return image, text, torch.stack([fused[0], image[1]])


class Own(Ito):
    """Each view is fused with a caption of its own, of two; only the first is aligned.

    Needs captions=2 and fusion_text="shuffled", which fuses view v with the v-th last text.
    """

    def texts(self, ids, random):
        return ids

    def loss(self, image, text, fused=None, **about):
        return super().loss(image, text[:1], fused, **about)


ADDED = {
    "one-sided": OneSided,
    "one-sided-tower": Tower,
    "modality": Modality,
    "mean-free": MeanFree,
    "own": Own,
}
