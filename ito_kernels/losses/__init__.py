"""The losses: short compositions of the primitive."""

from .cacr import cacr_loss
from .clip import clip_loss, siglip_loss
from .clusters import cluster_weighted_infonce
from .decoupled import decoupled_contrastive_loss, decoupled_softmax_loss
from .geometry import (
    alignment_loss,
    orthogonality_loss,
    spectral_contrastive_loss,
    uniformity_loss,
)
from .global_contrastive import global_contrastive_loss
from .infonce import multi_positive_infonce
from .ito import ito_loss
from .mixtures import mix_hard_negatives, mixup_infonce
from .retrieval import mnrl_loss, one_to_k_loss
from .rince import rince_loss
from .soft import cwcl_loss, soft_target_infonce
from .supcon import nt_xent_loss, supcon_loss
from .symile import symile_loss
from .wrappers import matryoshka_loss, multi_head_loss

__all__ = [
    "alignment_loss",
    "cacr_loss",
    "clip_loss",
    "cluster_weighted_infonce",
    "cwcl_loss",
    "decoupled_contrastive_loss",
    "decoupled_softmax_loss",
    "global_contrastive_loss",
    "ito_loss",
    "matryoshka_loss",
    "mix_hard_negatives",
    "mixup_infonce",
    "mnrl_loss",
    "multi_head_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "one_to_k_loss",
    "orthogonality_loss",
    "rince_loss",
    "siglip_loss",
    "soft_target_infonce",
    "spectral_contrastive_loss",
    "supcon_loss",
    "symile_loss",
    "uniformity_loss",
]
