"""The configuration of a run: one dataclass, its command line, its JSON."""

import argparse
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from ito.data.augment import DRAWINGS, Augmentation
from ito.data.emoji import is_emoji_set
from ito.data.pictures import FITS, MAX_PIXELS
from ito.data.records import FORMATS
from ito.data.shards import PIPE, URLS
from ito.files import read_text, write_text
from ito.model.fusion import READOUTS
from ito.model.pretrained import IMAGE, OURS, TEXT, image_size, longest_text, split
from ito.model.pretrained_dual import OF_TOWERS, package_of, sizes
from ito.objectives import OBJECTIVES, OPTIONS, objective_class, user_file
from ito.recipes import EMOJI_FULL, EMOJI_SMALL, PRESETS


def option(
    group: str, default, help: str, choices: tuple[str, ...] | None = None, *, least=None, most=None
):
    """A field with its command-line option. A number must be from `least` to `most`."""
    bounds = (least, most)
    metadata = {"group": group, "help": help, "choices": choices, "bounds": bounds}
    return field(default=default, metadata=metadata)


of_data, of_stream, of_objective, of_model, of_training, of_intervals = (
    partial(option, group)
    for group in ("data", "streaming", "objective", "model", "optimisation", "intervals")
)
# Above all that is in use; they stop what a configuration of others could fill the memory with.
MOST_PIXELS, MOST_WIDTH, MOST_BLOCKS, MOST_TOKENS = 8192, 65_536, 1000, 4_000_000
TOWERS = ("none", "image", "text", "both")
SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
AUGMENTATIONS = {
    "scale": "range of the crop's area relative to the image's; above 1: shrunk, on white",
    "ratio": "range of the crop's aspect ratio, width / height",
    "jitter": "strength of color jitter: brightness, contrast, saturation, hue",
    "jitter_p": "probability of color jitter",
    "gray_p": "probability of grayscale",
    "blur_p": "probability of Gaussian blur",
    "blur_sigma": "range of the blur's sigma, in pixels of a 224 px image",
    "flip_p": "probability of a horizontal flip",
    "warp": "strength of a smooth warp, relative to half a side; 0: none",
    "stroke_p": "probability of dark outlines on edges",
}
# sizes that a pretrained tower decides itself
SIZES_OF_OURS = {
    "image": ("image_width", "image_heads", "image_depth", "patch_size"),
    "text": ("text_depth", "vocab_size"),
}


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run, except the machine. Intervals change none.

    Raises ValueError naming the option, its value and what is allowed.
    """

    train_data: str = of_data(
        EMOJI_SMALL,
        "training data: images with captions, as a folder, a CSV, WebDataset tars (A::B, * and "
        "{000..012} are expanded) or another format of docs/data.md; or emoji-small or "
        "emoji-full, which are prepared on first use",
    )
    data_format: str = of_data(
        "auto", "format of --train-data; auto recognises it", ("auto", *FORMATS)
    )
    image_root: str | None = of_data(
        None,
        "folder in which relative image paths are looked up first, before that of the file that "
        "names them",
    )
    csv_separator: str = of_data(
        "\t", "column separator of a CSV: a character, or tab, comma, semicolon, pipe"
    )
    csv_img_key: str = of_data(
        "filepath", "column or field with the images, of tables and JSON lines"
    )
    csv_caption_key: str = of_data(
        "title", "column or field with the captions, of tables and JSON lines"
    )
    fit: str = of_data(
        "crop",
        "how an image becomes a square: crop keeps its centre, pad adds white borders, warp "
        "changes its proportions",
        tuple(FITS),
    )
    max_pixels: int = of_data(
        MAX_PIXELS,
        "skip images with more pixels than this; a JPEG counts with the size it is decoded at",
        least=1,
        most=2 * MAX_PIXELS,  # Pillow opens no larger picture
    )
    untrusted_data: bool = of_data(
        False, "skip images whose path, with links resolved, is outside the data folder"
    )
    split_seed: int = of_data(0, "seed of the splits, for data without splits")
    group_by: str | None = of_data(
        None,
        "regular expression for images' paths: the match, or its first (group), is the image's "
        "group, instead of the column group; a group is not divided between splits",
    )
    test_share: float = of_data(
        0.0,
        'share of the items that is also held out, as split "test", for data without splits; it '
        "is scored once, after the last step",
        least=0,
        most=0.5,
    )

    stream: bool = of_stream(False, "read --train-data from disk while training; needs --val-data")
    val_data: str | None = of_data(
        None,
        "evaluation data, in any format, loaded into memory; all of --train-data is then trained "
        "on",
    )
    tokenizer_captions: int = of_stream(
        100_000,
        "number of captions, from the start of the stream, that the BPE is trained on",
        least=1,
        most=10**12,
    )

    objective: str = of_objective(
        "ito",
        f"training objective: {', '.join(OBJECTIVES)}, or FILE.py:NAME for your own function or "
        "torch.nn.Module class, called as (image, text, logit_scale, *, item, step, generator, "
        "group)",
    )
    views: int = of_objective(
        None,
        "augmented views per item and step (default: ito 2, slip 3, others 1; only ito and your "
        "own objective accept other values)",
        least=1,
        most=64,
    )
    captions: int = of_objective(
        None, "captions per item and step (default: flair 2, others 1)", least=1, most=64
    )
    equal_captions: str = of_objective(
        None,
        "items in a batch with equal captions, but for white space and case: positives of each "
        "other, neither positives nor negatives, or negatives (default: positive; your own "
        "objective does not accept it)",
        ("positive", "ignore", "negative"),
    )
    lambda_fusion: float = of_objective(
        2.0, "ito: weight of the fusion loss; 0 disables it", least=0
    )
    lambda_schedule: str = of_objective(
        "constant",
        "ito: schedule of that weight; linear and cosine decay to 0",
        ("constant", "linear", "cosine"),
    )
    denominator: str = of_objective(
        "pair",
        "ito: one softmax per view-caption pair, or one over all of them",
        ("pair", "pooled"),
    )
    fusion_depth: int = of_objective(
        2, "ito: transformer blocks of the fusion module", least=1, most=MOST_BLOCKS
    )
    fusion_readout: str = of_objective(
        "cls", "ito: pooling of the fusion module's output", READOUTS
    )
    fusion_scale: str = of_objective(
        "shared", "ito: logit scale of the fusion loss", ("shared", "own")
    )
    fusion_stop_gradient: str = of_objective(
        "none", "ito: towers that get no gradient from the fusion loss", TOWERS
    )
    fusion_text: str = of_objective(
        "caption",
        "ito: text that images are fused with: their caption, another item's (a different one for "
        "each view), or none",
        ("caption", "shuffled", "dropped"),
    )

    image_encoder: str = of_model(
        OURS,
        "ours, or a pretrained one: efficientnet-lite0, timm:NAME or open_clip:NAME (see "
        "ito/model/pretrained.py)",
    )
    text_encoder: str = of_model(
        OURS, "ours, or a pretrained one: minilm, hf:NAME or open_clip:NAME"
    )
    load_size: int = of_model(
        None,
        "side in pixels of the images in memory (default: 8/7 of --image-size, or, if that is "
        "more, twice --image-size up to 64; with a pretrained image encoder, --image-size)",
        least=1,
        most=MOST_PIXELS,
    )
    image_size: int = of_model(
        None,
        "side in pixels of the image tower's input (default: 32, preset photos 112; a pretrained "
        "encoder's own size)",
        least=8,
        most=MOST_PIXELS,
    )
    vocab_size: int = of_model(
        1500,
        "largest vocabulary of the BPE, which is trained on the training captions; preset photos: "
        "8000",
        least=1,
        most=MOST_TOKENS,
    )
    context_length: int = of_model(
        16,
        "maximum caption length in tokens, with start and end token; preset photos: 32",
        least=1,
        most=MOST_WIDTH,
    )
    width: int = of_model(
        128, "width of both towers and of the embedding", least=1, most=MOST_WIDTH
    )
    heads: int = of_model(4, "attention heads", least=1, most=MOST_WIDTH)
    image_width: int | None = of_model(
        None, "width of the image tower (default: --width)", least=1, most=MOST_WIDTH
    )
    image_heads: int | None = of_model(
        None, "attention heads of the image tower (default: --heads)", least=1, most=MOST_WIDTH
    )
    patch_size: int | None = of_model(
        None,
        "ViT patch size; replaces the convolutional stem (default: none)",
        least=1,
        most=MOST_PIXELS,
    )
    image_depth: int = of_model(
        1, "transformer blocks of the image tower", least=1, most=MOST_BLOCKS
    )
    text_depth: int = of_model(3, "transformer blocks of the text tower", least=1, most=MOST_BLOCKS)
    pretrained: str | None = of_model(
        None,
        "model to start from, with its tokenizer and logit scale: open_clip:MODEL/WEIGHTS, "
        "hf:NAME (a CLIP or SigLIP), or a run folder (see docs/finetuning.md; default: random "
        "weights)",
    )
    locked: str = of_model("none", "towers that are not trained (LiT)", TOWERS)

    steps: int = of_training(2000, "optimizer steps", least=1, most=10**12)
    batch_size: int = of_training(
        64, "distinct items per step, over all ranks", least=2, most=10**9
    )
    accum_freq: int = of_training(
        1,
        "micro-batches per rank and step: less memory, the same gradient up to rounding",
        least=1,
        most=10**9,
    )
    grad_checkpointing: bool = of_training(
        False,
        "keep of each transformer block only its input, and compute it again in backward: less "
        "memory, the same numbers",
    )
    fsdp: bool = of_training(
        False,
        "shard the weights of the blocks over the ranks of torchrun (PyTorch's FSDP2), and the "
        "checkpoints",
    )
    lr: float = of_training(7e-4, "peak learning rate of AdamW", least=1e-9)
    layer_decay: float = of_training(
        1.0,
        "factor on the learning rate from each layer of the towers to the one below; 1: off",
        least=1e-9,
        most=1,
    )
    weight_decay: float = of_training(1.0, "weight decay, on matrices only", least=0)
    warmup: float = of_training(
        0.05, "warm-up, as a fraction of the steps; then cosine decay to 0", least=0, most=1
    )
    grad_clip: float = of_training(1.0, "maximum gradient norm", least=1e-9)
    seed: int = of_training(
        0, "seed of weights, data order and augmentation", least=0, most=2**63 - 1
    )

    log_every: int = of_intervals(10, "steps between log entries", least=1, most=10**12)
    eval_every: int = of_intervals(500, "steps between evaluations", least=1, most=10**12)
    checkpoint_every: int = of_intervals(250, "steps between checkpoints", least=1, most=10**12)

    augmentation: Augmentation | None = None  # None: the objective's default

    def __post_init__(self):
        self.require_types()
        kind = objective_class(self.objective)
        for name in ("views", "captions", "equal_captions", "augmentation"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(kind, name))
        self.set_encoder_sizes()
        refuse_unfit(self.objective, [n for n in (*OPTIONS, "augmentation") if self.differs(n)])
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            choices = item.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{item.name} must be one of {choices}, got {value!r}")
            least, most = item.metadata.get("bounds", (None, None))
            # `not value >= least` also refuses NaN
            if least is not None and not value >= least:
                raise ValueError(f"{item.name} must be at least {least}, got {value}")
            if most is not None and not value <= most:
                raise ValueError(f"{item.name} must be at most {most}, got {value}")
            if value == math.inf:
                raise ValueError(f"{item.name} must be finite, got {value}")
        if self.test_share and self.val_data:
            raise ValueError(
                "--test-share is for data without splits, and --val-data is one: drop one"
            )
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                about = f"--group-by must be a regular expression, got {self.group_by!r}"
                raise ValueError(f"{about}: {error}") from None
        if self.stream and self.val_data is None:
            raise ValueError(
                "--stream needs --val-data: of a stream nothing is held out to be scored"
            )
        named = SEPARATORS.get(self.csv_separator, self.csv_separator)
        object.__setattr__(self, "csv_separator", named)
        if len(self.csv_separator) != 1:
            raise ValueError(
                f"--csv-separator must be one character, got {self.csv_separator!r}; or one of "
                f"{', '.join(SEPARATORS)}; a tab is the default"
            )
        if self.load_size > 2 * self.image_size:
            raise ValueError(
                f"load_size must be at most twice image_size = {self.image_size}, because sampling "
                f"would alias; got {self.load_size}"
            )
        if self.objective == "ito" and self.lambda_fusion > 0 and self.views < 2:
            raise ValueError(
                f"the fusion term compares views: views must be at least 2, got {self.views}; "
                "or set lambda_fusion to 0"
            )

    def require_types(self) -> None:
        """Raises ValueError naming an option of another type; a whole number is a float too."""
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), kind_of(item)
            if not item.metadata or (value is None and item.default is None):
                continue
            if type(value) is not kind and (kind, type(value)) != (float, int):
                wanted = {str: "a text", bool: "true or false"}.get(
                    kind, f"of type {kind.__name__}"
                )
                raise ValueError(f"{item.name} must be {wanted}, got {value!r}")

    def set_encoder_sizes(self) -> None:
        """Set the sizes that depend on the encoders.

        Raises ValueError for options that do not fit them.
        """
        chosen = {"image": self.image_encoder, "text": self.text_encoder}
        for tower, encoder in chosen.items():
            if encoder == OURS:
                continue
            split(f"{tower}_encoder", encoder, IMAGE if tower == "image" else TEXT)
            if given := [name for name in SIZES_OF_OURS[tower] if self.differs(name)]:
                raise ValueError(f"--{tower}-encoder {encoder} does not take {', '.join(given)}")
        if self.image_size is None:
            ours = self.image_encoder == OURS
            object.__setattr__(self, "image_size", 32 if ours else image_size(self.image_encoder))
        if self.load_size is None:
            size = self.image_size
            if self.image_encoder == OURS:  # room for a crop, which is sampled down to half
                size = max(min(2 * size, 64), 8 * size // 7)
            object.__setattr__(self, "load_size", size)
        locked = ("image", "text") if self.locked == "both" else (self.locked,)
        for tower in locked:
            if chosen.get(tower) == OURS and self.pretrained is None:
                raise ValueError(
                    f"--lock-{tower} keeps the weights of --pretrained: name a run, "
                    f"or a pretrained --{tower}-encoder"
                )
        if self.locked == "both" and OURS in chosen.values():
            raise ValueError(
                "--lock-image and --lock-text together train only the projections of pretrained "
                f"encoders, got image_encoder={self.image_encoder}, "
                f"text_encoder={self.text_encoder}"
            )

    def differs(self, name: str) -> bool:
        """Whether an option differs from its default with this objective."""
        default = getattr(objective_class(self.objective), name, getattr(Config, name))
        return getattr(self, name) != default

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Config":
        try:
            values = json.loads(read_text(path))
            drawn = with_tuples(values.pop("augmentation"))
            # to runs from before this option, equal captions were negatives
            values = {"equal_captions": "negative"} | values
            return cls(**values, augmentation=Augmentation(**drawn))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from None

    def flat(self) -> dict:
        """Every value by its option's name, those of the augmentation included."""
        values = vars(self) | vars(self.augmentation)
        del values["augmentation"]
        return values


def kind_of(item: dataclasses.Field) -> type:
    """The type of an option's values: `int` of `int | None`."""
    return (get_args(item.type) or (item.type,))[0]


def with_tuples(values: dict) -> dict:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def refuse_unfit(objective: str, given: list[str]) -> None:
    """Raises ValueError naming options that do not fit the objective."""
    kind = objective_class(objective)
    augmentation = [name for name in given if name not in OPTIONS]
    unfit = [name for name in given if name in OPTIONS and name not in kind.options]
    if unfit:
        raise ValueError(f"the objective {objective} does not take {', '.join(unfit)}")
    if kind.fixed and augmentation:
        raise ValueError(
            f"the objective {objective} has a fixed mild crop and does not take "
            f"{', '.join(augmentation)}; clip-aug does"
        )


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


class Lock(argparse.Action):
    """`--lock-image`, `--lock-text`, or both, in one value."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest, self.const)
        setattr(namespace, self.dest, self.const if before == self.const else "both")


def add_options(
    parser: argparse.ArgumentParser, only: str | None = None, hidden: tuple[str, ...] = ()
) -> None:
    """Add `--cache`, and one option per field of `Config`, in the groups that the fields name.

    only: add this group only, for a command whose defaults are a run's configuration.
    hidden: options that help does not show, for a command that refuses them with a reason.
    """
    groups = {"data": parser.add_argument_group("data")}
    where = "folder of prepared data (default: ~/.cache/ito)"
    groups["data"].add_argument("--cache", type=Path, help=where)

    def add(name: str, default, group: str, help: str, choices=None, kind=float) -> None:
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        several = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if several else default
        shown = "the run's" if only else "a tab" if shown == "\t" else shown
        help = help if default is None or default is False else f"{help} (default: {shown})"
        help = argparse.SUPPRESS if name in hidden else help
        about = {"default": argparse.SUPPRESS, "help": help}
        if kind is bool:
            groups[group].add_argument(flag(name), action="store_true", **about)
            return
        about |= {"metavar": None if choices else "TEXT" if kind is str else "N"}
        nargs = len(default) if several else None
        groups[group].add_argument(flag(name), type=kind, nargs=nargs, choices=choices, **about)

    for item in dataclasses.fields(Config):
        own = item.metadata
        if own and item.name != "locked" and only in (None, own["group"]):
            add(item.name, item.default, own["group"], own["help"], own["choices"], kind_of(item))
    if only is None:
        for tower in ("image", "text"):
            groups["model"].add_argument(
                f"--lock-{tower}",
                dest="locked",
                action=Lock,
                nargs=0,
                const=tower,
                default=argparse.SUPPRESS,
                help=f"do not train the {tower} tower: keep the weights of --pretrained or of its "
                "encoder (LiT)",
            )
        for name, default in vars(Config().augmentation).items():
            add(name, default, "augmentation", AUGMENTATIONS[name])


def from_options(options: argparse.Namespace, base: Config | None = None) -> Config:
    """The configuration of parsed options.

    Options that were not given are taken from `base`, if there is one; else from the preset (see
    `choose_preset`), the objective or the defaults.
    """
    given = with_absolute_paths(with_tuples(vars(options)))
    plain = {f.name: given[f.name] for f in dataclasses.fields(Config) if f.name in given}
    drawn = {name: given[name] for name in vars(DRAWINGS) if name in given}
    if base:
        augmentation = dataclasses.replace(base.augmentation, **drawn)
        return dataclasses.replace(base, **plain, augmentation=augmentation)
    objective = plain.get("objective", Config.objective)
    refuse_unfit(objective, [name for name in given if name in (*OPTIONS, *drawn)])
    name, _ = choose_preset(options)
    preset = preset_values(name, plain)
    kind = objective_class(objective)
    photos = name in ("photos", "finetune")
    augmentation = kind.photo_augmentation if photos else kind.augmentation
    if not kind.fixed:
        augmentation = preset.get("augmentation", augmentation)
    augmentation = dataclasses.replace(augmentation, **drawn)
    return Config(**preset | plain | {"augmentation": augmentation})


def with_absolute_paths(given: dict) -> dict:
    """The options with absolute paths: they may be read again in another working directory."""
    given = dict(given)
    runs = () if package_of(given.get("pretrained") or "") else ("pretrained",)
    for name in ("train_data", "val_data", "image_root", *runs):
        if given.get(name, EMOJI_SMALL) not in (None, EMOJI_SMALL, EMOJI_FULL):
            parts = given[name].split("::")
            if not all(parts):
                raise ValueError(f"{flag(name)} must be a path, got {given[name]!r}")
            parts = [p if p.startswith((PIPE, *URLS)) else str(Path(p).absolute()) for p in parts]
            given[name] = "::".join(parts)
    if not Path(given.get("image_root") or ".").is_dir():
        raise ValueError(f"--image-root {given['image_root']} is not a folder")
    if parts := user_file(given.get("objective", Config.objective)):
        given["objective"] = f"{parts[0].absolute()}:{parts[1]}"
    for name in ("image_encoder", "text_encoder", "pretrained"):
        kind, _, folder = given.get(name, OURS).partition(":")
        prefix = "local-dir:" if folder.startswith("local-dir:") else ""
        if folder and Path(folder.removeprefix(prefix)).is_dir():
            given[name] = f"{kind}:{prefix}{Path(folder.removeprefix(prefix)).absolute()}"
    return given


def of_emoji(data: str) -> bool:
    """Whether `--train-data` names an emoji set, or a folder that `ito.prepare` wrote."""
    return data in (EMOJI_SMALL, EMOJI_FULL) or is_emoji_set(data)


def choose_preset(options: argparse.Namespace) -> tuple[str, str]:
    """The preset that gives values to options that are not given, and why it is this one."""
    given = vars(options)
    if preset := given.get("preset"):
        return preset, "--preset"
    if package_of(given.get("pretrained") or ""):
        return "finetune", f"--pretrained {given['pretrained']}"
    data = given.get("train_data", Config.train_data)
    if of_emoji(data):
        return EMOJI_SMALL, "the data is an emoji set"
    return "photos", "the data is not an emoji set"


def preset_values(name: str, given: dict) -> dict:
    """The values of a preset, except those that pretrained towers or --pretrained decide; and what
    the latter decides.

    Raises ValueError for given options that --pretrained contradicts.
    """
    encoder = {tower: given.get(f"{tower}_encoder", OURS) for tower in SIZES_OF_OURS}
    decided = [n for tower, names in SIZES_OF_OURS.items() if encoder[tower] != OURS for n in names]
    if encoder["image"] != OURS:
        decided.append("image_size")
    preset = {key: value for key, value in PRESETS[name].items() if key not in decided}
    if encoder["text"] != OURS and "context_length" in preset.keys() - given:
        preset["context_length"] = min(preset["context_length"], longest_text(encoder["text"]))
    if pretrained := given.get("pretrained") and sizes(given["pretrained"], given):
        preset = {key: value for key, value in preset.items() if key not in OF_TOWERS} | pretrained
    return preset
