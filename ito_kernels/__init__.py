"""Contrastive losses with memory linear in the batch size."""

from .losses import (
    alignment_loss,
    cacr_loss,
    clip_loss,
    cluster_weighted_infonce,
    cwcl_loss,
    decoupled_contrastive_loss,
    decoupled_softmax_loss,
    ito_loss,
    matryoshka_loss,
    mix_hard_negatives,
    mixup_infonce,
    mnrl_loss,
    multi_head_loss,
    multi_positive_infonce,
    nt_xent_loss,
    one_to_k_loss,
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
from .similarity.panelwise import panelwise
from .similarity.primitive import explain

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "ItoLoss",
    "MultiPositiveInfoNCE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "alignment_loss",
    "backends",
    "cacr_loss",
    "clip_loss",
    "cluster_weighted_infonce",
    "cwcl_loss",
    "decoupled_contrastive_loss",
    "decoupled_softmax_loss",
    "explain",
    "ito_loss",
    "matryoshka_loss",
    "mix_hard_negatives",
    "mixup_infonce",
    "mnrl_loss",
    "multi_head_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "one_to_k_loss",
    "panelwise",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_softplus",
    "soft_target_infonce",
    "supcon_loss",
    "symile_loss",
    "uniformity_loss",
    "use_backend",
]
