"""The losses: short compositions of the primitive."""

from .clip import clip_loss, siglip_loss
from .infonce import multi_positive_infonce
from .ito import ito_loss
from .supcon import nt_xent_loss, supcon_loss

__all__ = [
    "clip_loss",
    "ito_loss",
    "multi_positive_infonce",
    "nt_xent_loss",
    "siglip_loss",
    "supcon_loss",
]
