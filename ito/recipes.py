"""The values that presets give to options which are not given."""

from ito.data.augment import PAPER

EMOJI_SMALL, EMOJI_FULL = "emoji-small", "emoji-full"


def vit_b16(pairs: int, batch_size: int, lr: float) -> dict:
    """The ITO paper's recipe for so many pairs, in the sizes of ViT-B/16 and CLIP's text tower."""
    steps = 30 * pairs // batch_size  # 30 epochs
    return {
        "image_size": 224,
        "patch_size": 16,
        "image_width": 768,
        "image_heads": 12,
        "image_depth": 12,
        "width": 512,
        "heads": 8,
        "text_depth": 12,
        "vocab_size": 49408,
        "context_length": 77,
        "weight_decay": 0.1,
        "augmentation": PAPER,
        "batch_size": batch_size,
        "lr": lr,
        "steps": steps,
        "warmup": 10_000 / steps,
    }


PRESETS = {
    "emoji-small": {},
    "emoji-full": {"train_data": EMOJI_FULL},
    # For people's own pictures and captions: taken for all data that is not an emoji set.
    # Photographs are not recognised at the emoji's 32 px, nor are sentences of more than 14 words
    # read in their 16 tokens. Augmentation: `Objective.photo_augmentation`.
    "photos": {"image_size": 112, "context_length": 32, "vocab_size": 8000},
    "cc12m-vitb16": vit_b16(pairs=10_968_539, batch_size=2048, lr=1e-3),
    "yfcc15m-vitb16": vit_b16(pairs=14_082_031, batch_size=4096, lr=3e-3),
    # For a pretrained model. The factor per layer is that of MAE's fine-tuning (He et al. 2022,
    # table 9), the weight decay that of the recipes above. Augmentation: as of photos.
    "finetune": {"lr": 1e-5, "warmup": 0.05, "weight_decay": 0.1, "layer_decay": 0.75},
}
