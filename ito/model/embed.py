"""Embeds many pictures or texts in batches, without augmentation or gradient."""

import torch

from ito.data.augment import eval_transform
from ito.model.encoders import DualEncoder

BATCH = 256


@torch.inference_mode()
def embed_images(model: DualEncoder, images: torch.Tensor) -> torch.Tensor:
    """uint8 (K, 3, S, S) -> unit rows (K, E) on the CPU, fp32."""
    device = model.logit_scale.device
    model.eval()
    parts = [
        model.encode_image(eval_transform(batch.to(device), model.image.image_size))
        for batch in images.split(BATCH)
    ]
    return torch.cat(parts).cpu()


@torch.inference_mode()
def embed_texts(model: DualEncoder, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (K, L) -> unit rows (K, E) on the CPU, fp32."""
    device = model.logit_scale.device
    model.eval()
    return torch.cat([model.encode_text(batch.to(device)) for batch in ids.split(BATCH)]).cpu()
