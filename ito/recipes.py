"""What objectives and presets set where an option is not given."""

from dataclasses import dataclass

from ito.data.augment import CROP, DRAWINGS, PAPER, Augmentation

EMOJI_SMALL, EMOJI_FULL = "emoji-small", "emoji-full"


@dataclass(frozen=True)
class Kind:
    """What an objective takes: views and captions by default, and the options that it alone has."""

    views: int = 1
    captions: int = 1
    options: tuple[str, ...] = ()
    augmentation: Augmentation = DRAWINGS


ITO = (
    "views",
    "captions",
    "denominator",
    "lambda_fusion",
    "lambda_schedule",
    "fusion_depth",
    "fusion_readout",
    "fusion_scale",
    "fusion_stop_gradient",
    "fusion_text",
)
KINDS = {
    "ito": Kind(views=2, options=ITO),
    "clip": Kind(augmentation=CROP),
    "clip-aug": Kind(),
    "slip": Kind(views=3),
    "siglip": Kind(),
    "flair": Kind(captions=2, options=("captions",)),
}

# the ITO paper's recipes, in the sizes of ViT-B/16 and CLIP's text tower
YFCC_VITB16 = {
    "image_size": 224,
    "load_size": 256,
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
    "batch_size": 4096,
    "lr": 3e-3,
    "steps": 30 * 14_829_396 // 4096,  # 30 epochs of the pairs that open_clip counts
    "warmup": 10_000 / (30 * 14_829_396 // 4096),
}
CC12M_VITB16 = YFCC_VITB16 | {
    "batch_size": 2048,
    "lr": 1e-3,
    "steps": 30 * 10_968_539 // 2048,
    "warmup": 10_000 / (30 * 10_968_539 // 2048),
}
PRESETS = {
    "emoji-small": {},
    "emoji-full": {"train_data": EMOJI_FULL},
    "cc12m-vitb16": CC12M_VITB16,
    "yfcc15m-vitb16": YFCC_VITB16,
}
