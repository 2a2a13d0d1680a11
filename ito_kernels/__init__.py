"""Contrastive losses that never form the B × B logits."""

from .losses import (
    clip_loss,
    ito_loss,
    multi_positive_infonce,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)
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
from .similarity.primitive import explain

__all__ = [
    "ClipLoss",
    "ItoLoss",
    "MultiPositiveInfoNCE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "backends",
    "clip_loss",
    "explain",
    "ito_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_softplus",
    "supcon_loss",
    "use_backend",
]
