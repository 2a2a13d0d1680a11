"""Contrastive losses with memory linear in the batch size."""

from . import losses
from .losses import *  # noqa: F403
from .losses.global_contrastive import GlobalContrastiveLoss
from .modules import (
    ClipLoss,
    ItoLoss,
    MultiPositiveInfoNCE,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from .similarity import similarity_logsumexp, similarity_softplus
from .similarity.dispatch import backends, use_backend
from .similarity.panelwise import panelwise
from .similarity.primitive import explain

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "GlobalContrastiveLoss",
    "ItoLoss",
    "MultiPositiveInfoNCE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "backends",
    "explain",
    "panelwise",
    "similarity_logsumexp",
    "similarity_softplus",
    "use_backend",
]
__all__ += losses.__all__
