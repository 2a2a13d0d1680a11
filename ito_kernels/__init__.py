"""Contrastive losses that never form the B × B logits."""

from .losses import (
    alignment_loss,
    clip_loss,
    cwcl_loss,
    decoupled_contrastive_loss,
    decoupled_softmax_loss,
    ito_loss,
    mnrl_loss,
    multi_positive_infonce,
    nt_xent_loss,
    siglip_loss,
    soft_target_infonce,
    supcon_loss,
    symile_loss,
    uniformity_loss,
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
from .similarity.op import explain

__all__ = [
    "ClipLoss",
    "ItoLoss",
    "MultiPositiveInfoNCE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "alignment_loss",
    "backends",
    "clip_loss",
    "cwcl_loss",
    "decoupled_contrastive_loss",
    "decoupled_softmax_loss",
    "explain",
    "ito_loss",
    "mnrl_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_softplus",
    "soft_target_infonce",
    "supcon_loss",
    "symile_loss",
    "uniformity_loss",
    "use_backend",
]
