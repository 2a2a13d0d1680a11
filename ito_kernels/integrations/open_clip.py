"""`open_clip.ClipLoss` and `open_clip.SigLipLoss`.

-   from open_clip import ClipLoss, SigLipLoss
+   from ito_kernels.integrations.open_clip import ClipLoss, SigLipLoss
"""

from ..modules import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
