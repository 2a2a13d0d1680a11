"""The primitive: reductions of a similarity matrix that is never formed, and their gradients."""

from .primitive import similarity_logsumexp, similarity_softplus

__all__ = ["similarity_logsumexp", "similarity_softplus"]
