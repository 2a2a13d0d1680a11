"""Another package's complete dual encoder, as `--pretrained open_clip:NAME` and hf:NAME take it.

All of the model is kept: both towers with their projections, the logit scale and bias, the
tokenizer, the sizes and the normalisation of pictures. NAME is a model of the package's hub (of
open_clip, MODEL/WEIGHTS), or a folder: open_clip:local-dir:FOLDER, hf:FOLDER.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ito.files import read_text, undamaged
from ito.model.pretrained import (
    LOCAL,
    PROJECTED,
    OpenClip,
    OpenClipText,
    naming,
    of_length,
    package,
    picture_settings,
)
from ito.model.tokenizer import Tokenizer

SIZES = ("width", "image_size", "context_length")
ENCODERS = ("image_encoder", "text_encoder")
SHAPES = ("patch_size", "image_width", "image_heads", "image_depth", "text_depth", "vocab_size")
OF_TOWERS = (*ENCODERS, *SHAPES)  # options that a complete model leaves nothing to decide for
OF_OWN_RUN = (*SIZES, *SHAPES, "heads", "load_size", "fit")


@dataclass
class Loaded:
    """Weights that a run starts from, and the tokenizer that belongs to them.

    architecture: arguments of `DualEncoder` that the run's model must have. towers: the state dicts
    of "image" and "text". logit_bias: None if there is none. note: what the run does otherwise than
    the model's makers; "" for nothing.
    """

    architecture: dict
    towers: dict[str, dict[str, Tensor]]
    logit_scale: float
    logit_bias: float | None
    tokenizer: Tokenizer
    note: str = ""


def package_of(pretrained: str) -> tuple[str, str] | None:
    """The package and the NAME of `open_clip:NAME` or `hf:NAME`; None for a run folder.

    Raises ValueError without a NAME.
    """
    kind, colon, name = pretrained.partition(":")
    if not colon or kind not in PROJECTED:
        return None
    if not name:
        raise ValueError(
            f"pretrained must be open_clip:NAME, hf:NAME or a run folder, got {pretrained!r}"
        )
    return kind, name


def describe(pretrained: str) -> dict:
    """The descriptions of both towers, without weights, and the SIZES that follow from them.

    Raises ValueError if the package has no such model, or it is of a kind that is not known here.
    """
    kind, name = package_of(pretrained)
    towers = dict(zip(ENCODERS, PROJECTED[kind], strict=True))
    with naming("pretrained", pretrained):
        if kind == "open_clip":
            require_clip(pretrained, OpenClip.configuration(name)[0])
        about = {key: tower.describe(name) for key, tower in towers.items()}
    config = about["image_encoder"]["config"]
    if kind == "open_clip":
        image, length = config["vision_cfg"], config["text_cfg"].get("context_length", 77)
        sizes = (config["embed_dim"], image.get("image_size", 224), length)
    else:
        pictures, texts = config["vision_config"], config["text_config"]
        is_clip = config["model_type"] == "clip"
        width = config["projection_dim"] if is_clip else pictures["hidden_size"]
        sizes = (width, pictures["image_size"], texts["max_position_embeddings"])
    towers = {key: {"name": kind, "projected": True} | value for key, value in about.items()}
    return towers | dict(zip(SIZES, sizes, strict=True))


def require_clip(pretrained: str, config: dict) -> None:
    """Raises ValueError if the towers are not a ViT and CLIP's text tower, before a download."""
    image, text = config["vision_cfg"], config["text_cfg"]
    found = [name for name in ("timm_model_name", "attentional_pool") if image.get(name)]
    found += ["a ResNet"] if isinstance(image.get("layers"), list) else []
    found += [name for name in sorted(OpenClipText.REFUSED) if text.get(name)]
    if found:
        raise ValueError(
            f"--pretrained {pretrained} has {', '.join(found)}; expected a CLIP with a ViT and "
            "CLIP's own text tower"
        )


def sizes(pretrained: str, given: dict) -> dict[str, int]:
    """The values of options that the model decides; {} for a run with single towers of another
    package, whose options must be given again.

    given: the options of the command line. Raises ValueError naming those that contradict a
    complete model; `Trainer.start_from` compares those of an own run.
    """
    about = describe(pretrained) if package_of(pretrained) else exported(pretrained)
    if not (about.get("image_encoder") or {}).get("projected"):
        if about.get("image_encoder") or about.get("text_encoder"):
            return {}
        return {name: about[name] for name in OF_OWN_RUN if about.get(name) is not None}
    if unfit := [name for name in OF_TOWERS if name in given]:
        raise ValueError(f"--pretrained {pretrained} does not take {', '.join(unfit)}")
    for name in ("width", "image_size"):
        if given.get(name, about[name]) != about[name]:
            raise ValueError(
                f"{name} must be {about[name]} with --pretrained {pretrained}, got {given[name]}"
            )
    longest = about["context_length"]
    if given.get("context_length", longest) > longest:
        raise ValueError(
            f"context_length must be at most {longest} with --pretrained {pretrained}, got "
            f"{given['context_length']}"
        )
    fit = pictures(pretrained)[0] if package_of(pretrained) else about["fit"]
    decided = {name: about[name] for name in SIZES}
    return decided | {"load_size": about["image_size"], "fit": fit}


def exported(run: str) -> dict:
    """The architecture, `load_size` and `fit` of a run's exported model; {} if there is none."""
    for path in (Path(run) / "model" / "config.json", Path(run) / "config.json"):
        if path.is_file():
            with undamaged(path):
                about = json.loads(read_text(path))
                pictures = {"load_size": about.get("load_size"), "fit": about.get("fit", "crop")}
                found = about.get("architecture", {}) | pictures
                if not all(isinstance(found.get(name) or {}, dict) for name in ENCODERS):
                    raise TypeError("towers must be objects")
                return found
    return {}


def load_dual(pretrained: str, context_length: int) -> Loaded:
    """The model of `open_clip:NAME` or `hf:NAME`, for texts of `context_length` tokens."""
    kind, name = package_of(pretrained)
    about = describe(pretrained) | {"context_length": context_length}
    with naming("pretrained", pretrained):
        if kind == "open_clip":
            model = OpenClip().pretrained(name)
            modules = {"image": {"network": model.visual}, "text": {"network": model.text}}
        else:
            model = package("transformers", "hf").AutoModel.from_pretrained(name, **LOCAL).float()
            own = dict(model.named_children())
            names = {"image": ("vision_", "visual_"), "text": "text_"}
            modules = {
                tower: {part: own[part] for part in own if part.startswith(start)}
                for tower, start in names.items()
            }

        tokenizer = of_length(PROJECTED[kind][1].tokenizer(name), context_length)
    bias = getattr(model, "logit_bias", None)
    return Loaded(
        architecture=about,
        towers={
            tower: nn.ModuleDict({"body": nn.ModuleDict(parts)}).state_dict()
            for tower, parts in modules.items()
        },
        logit_scale=model.logit_scale.item(),
        logit_bias=None if bias is None else bias.item(),
        tokenizer=tokenizer,
        note=pictures(pretrained)[1],
    )


def pictures(pretrained: str) -> tuple[str, str]:
    """The model's `--fit`, and how its own pictures differ from what is then made here, or ""."""
    kind, name = package_of(pretrained)
    if kind == "open_clip":
        about = OpenClip.configuration(name)[1]
        fit = {"squash": "warp", "longest": "pad"}.get(about.get("resize_mode"), "crop")
        bicubic = about.get("interpolation", "bicubic") == "bicubic"
    else:
        about = picture_settings(name)
        size = about.get("size")
        whole = isinstance(size, dict) and "height" in size and not about.get("do_center_crop")
        fit, bicubic = "warp" if whole else "crop", about.get("resample", 3) == 3
    other = "pictures are resized with bicubic interpolation, which the model's own were not"
    return fit, "" if bicubic else other
