"""The losses: short compositions of the primitive."""

from .clip import clip_loss, siglip_loss
from .decoupled import decoupled_contrastive_loss, decoupled_softmax_loss
from .geometry import alignment_loss, uniformity_loss
from .infonce import multi_positive_infonce
from .ito import ito_loss
from .retrieval import mnrl_loss
from .soft import cwcl_loss, soft_target_infonce
from .supcon import nt_xent_loss, supcon_loss
from .symile import symile_loss

__all__ = [
    "alignment_loss",
    "clip_loss",
    "cwcl_loss",
    "decoupled_contrastive_loss",
    "decoupled_softmax_loss",
    "ito_loss",
    "mnrl_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "siglip_loss",
    "soft_target_infonce",
    "supcon_loss",
    "symile_loss",
    "uniformity_loss",
]
