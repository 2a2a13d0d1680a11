"""The model of a run that began with `--pretrained hf:NAME`, as transformers loads it:
`AutoModel.from_pretrained(FOLDER)`; and sentence-transformers: `SentenceTransformer(FOLDER)`."""

import json
from pathlib import Path

from safetensors.torch import save
from tokenizers import Tokenizer as BPE
from torch import Tensor

from ito.files import write_atomically, write_text
from ito.model.encoders import DualEncoder
from ito.model.pretrained import TOKENIZER_FILES
from ito.model.tokenizer import Tokenizer


def export_hf(
    model: DualEncoder,
    tokenizer: Tokenizer,
    logit_bias: Tensor | None,
    out: Path,
    fit: str = "crop",
) -> None:
    """Write weights, configuration, tokenizer and image processor to `out`.

    The pictures are made as they were in the run. logit_bias: that of the objective; without one, a
    SigLIP gets 0. fit: how a picture becomes a square; see `ito.config.Config`.

    Raises ValueError if the model is not transformers', or its pictures were padded.
    """
    about = model.architecture
    image, text = about["image_encoder"] or {}, about["text_encoder"] or {}
    if not all(tower.get("projected") and tower["name"] == "hf" for tower in (image, text)):
        raise ValueError("--hf: the run did not begin with --pretrained hf:NAME")
    if fit == "pad":
        raise ValueError("--hf: the image processor of CLIP in transformers cannot do --fit pad")
    config = {key: value for key, value in text["config"].items() if key != "torch_dtype"}
    names = {"clip": "CLIPModel", "siglip": "SiglipModel"}
    config |= {"architectures": [names[config["model_type"]]], "dtype": "float32"}
    weights = {**model.image.body.state_dict(), **model.text.body.state_dict()}
    if config["model_type"] == "clip":
        weights["logit_scale"] = model.logit_scale
    else:
        bias = model.logit_scale.new_zeros(1) if logit_bias is None else logit_bias.reshape(1)
        weights |= {"logit_scale": model.logit_scale.reshape(1), "logit_bias": bias}
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with write_atomically(out / "model.safetensors") as temporary:
        temporary.write_bytes(save(weights, metadata={"format": "pt"}))
    write_tokenizer(tokenizer, text["tokenizer_files"], out)
    files = {
        "config.json": config,
        "preprocessor_config.json": processor(image, about["image_size"], fit),
        "modules.json": [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate((("", "Transformer"), ("1_Normalize", "Normalize")))
        ],
        "sentence_bert_config.json": sentence_transformers(config, tokenizer.context_length),
    }
    for name, values in files.items():
        write_text(out / name, json.dumps(values, indent=2) + "\n")


def write_tokenizer(tokenizer: Tokenizer, files: dict[str, dict], out: Path) -> None:
    """tokenizer.json as it was, without the run's padding and truncation, and its other files."""
    bpe = BPE.from_str(tokenizer.bpe.to_str())
    bpe.no_padding()
    bpe.no_truncation()
    write_text(out / "tokenizer.json", bpe.to_str(pretty=True))
    for name in TOKENIZER_FILES:  # the description may be others', and name any path
        if name in files:
            write_text(out / name, json.dumps(files[name], indent=2, ensure_ascii=False) + "\n")


def sentence_transformers(config: dict, longest: int) -> dict:
    """How sentence-transformers (5.4 and newer) calls the model. SigLIP pools the last position of
    texts that are padded to its full length, and sees the padding."""
    is_clip = config["model_type"] == "clip"
    longest = longest if is_clip else config["text_config"]["max_position_embeddings"]
    texts = {"padding": "max_length", "truncation": True, "max_length": longest}
    texts |= {} if is_clip else {"return_attention_mask": False}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {
            kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
            for kind in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": texts},
    }


def processor(image: dict, size: int, fit: str) -> dict:
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if fit == "crop" else square,
        "resample": 3,  # bicubic
        "do_center_crop": fit == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
    }
