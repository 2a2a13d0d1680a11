"""A run's dual encoder as open_clip loads it: `create_model_and_transforms("local-dir:FOLDER")`.

open_clip has CLIP's towers, so only runs with these can be written for it: those with
`--patch-size`, as the vitb16 presets set it, and those that began with `--pretrained open_clip:`,
which are written as that model was. Towers with a CNN stem, whose CLS token starts at the
mean of the patches and whose text embedding is the mean of its tokens, do not exist in open_clip
(v3.3.0) and are refused; export them to ONNX.
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ito.data.augment import MEAN, STD
from ito.files import write_atomically, write_text
from ito.model.encoders import DualEncoder
from ito.model.hf import write_tokenizer
from ito.model.tokenizer import BOS, EOT, PAD, Tokenizer

CONFIG = "open_clip_config.json"
RESIZE_MODE = {"crop": "shortest", "pad": "longest", "warp": "squash"}  # open_clip's names


def export_open_clip(
    model: DualEncoder, tokenizer: Tokenizer, out: Path, fit: str = "crop"
) -> None:
    """Write the weights, open_clip's configuration and a Hugging Face tokenizer to `out`.

    CLIP's own tokenizer, of most models of `--pretrained open_clip:`, needs no file.
    fit: how a picture becomes a square; see `ito.config.Config`.

    Raises ValueError if open_clip cannot express the towers.
    """
    about = model.architecture
    towers = (about["image_encoder"] or {}, about["text_encoder"] or {})
    projected = all(tower.get("projected") and tower["name"] == "open_clip" for tower in towers)
    if not projected and (about["patch_size"] is None or any(towers)):
        why = "come from another package" if any(towers) else "have a CNN stem and average tokens"
        raise ValueError(
            f"--open-clip: open_clip has no towers like this run's, which {why}; "
            + "train with --patch-size, or " * (not any(towers))
            + "export with --onnx"
        )
    if projected:
        weights = {f"visual.{n}": v for n, v in model.image.body.network.state_dict().items()}
        weights |= model.text.body.network.state_dict() | {"logit_scale": model.logit_scale}
        config = towers[0]["config"]
        pictures = {  # as they were made in the run
            "size": config["vision_cfg"].get("image_size", 224),
            "mean": towers[0]["mean"],
            "std": towers[0]["std"],
            "interpolation": "bicubic",
            "resize_mode": RESIZE_MODE[fit],
        }
        files = {CONFIG: {"model_cfg": config, "preprocess_cfg": pictures}}
        if "tokenizer_files" in towers[1]:
            write_tokenizer(tokenizer, towers[1]["tokenizer_files"], out)
    else:
        weights = state_dict(model)
        with write_atomically(out / "tokenizer.json") as temporary:
            tokenizer.save(temporary)
        special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOT}
        loader = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**6}
        files = {
            CONFIG: configuration(model, tokenizer, fit),
            "tokenizer_config.json": loader | special,
            "special_tokens_map.json": special,
        }
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with write_atomically(out / "open_clip_model.safetensors") as temporary:
        temporary.write_bytes(save(weights))
    for name, values in files.items():
        write_text(out / name, json.dumps(values, indent=2) + "\n")


def configuration(model: DualEncoder, tokenizer: Tokenizer, fit: str) -> dict:
    about = model.architecture
    width = about["image_width"] or about["width"]
    return {
        "model_cfg": {
            "embed_dim": about["width"],
            "vision_cfg": {
                "image_size": about["image_size"],
                "patch_size": about["patch_size"],
                "layers": about["image_depth"],
                "width": width,
                "head_width": width // (about["image_heads"] or about["heads"]),
                "no_ln_pre": True,
            },
            "text_cfg": {
                "context_length": about["context_length"],
                "vocab_size": about["vocab_size"],
                "width": about["width"],
                "heads": about["heads"],
                "layers": about["text_depth"],
                "pool_type": "eos",
                "eos_id": tokenizer.eot_id,
                "hf_tokenizer_name": "this folder",  # a local-dir reads its own files
            },
        },
        "preprocess_cfg": {
            "size": about["image_size"],
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "resize_mode": RESIZE_MODE[fit],
            "fill_color": 255,
        },
    }


def state_dict(model: DualEncoder) -> dict[str, Tensor]:
    """The weights under the names of open_clip's `CLIP`. Its patches have no bias, so that of the
    patches here is added to the positions."""
    image, text = model.image, model.text
    positions = image.positions.detach().clone()
    positions[1:] += image.stem.bias.detach()
    weights = {
        "logit_scale": model.logit_scale.detach(),
        "visual.conv1.weight": image.stem.weight.detach(),
        "visual.class_embedding": image.cls.detach(),
        "visual.positional_embedding": positions,
        "visual.ln_post.weight": image.norm.weight.detach(),
        "visual.ln_post.bias": image.norm.bias.detach(),
        "visual.proj": image.project.weight.detach().T,
        "token_embedding.weight": text.embedding.weight.detach(),
        "positional_embedding": text.positions.detach(),
        "ln_final.weight": text.norm.weight.detach(),
        "ln_final.bias": text.norm.bias.detach(),
        "text_projection": text.project.weight.detach().T,
    }
    parts = {
        "norm_attention": "ln_1",
        "qkv": "attn.in_proj",
        "out": "attn.out_proj",
        "norm_mlp": "ln_2",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }
    for prefix, tower in (("visual.", image), ("", text)):
        for n, block in enumerate(tower.blocks):
            for name, value in block.state_dict().items():
                part, kind = name.rsplit(".", 1)
                mark = "_" if part == "qkv" else "."  # in_proj_weight, out_proj.weight
                weights[f"{prefix}transformer.resblocks.{n}.{parts[part]}{mark}{kind}"] = value
    return weights
