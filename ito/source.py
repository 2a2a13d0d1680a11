"""Opens the data set that a configuration or a command line names."""

import argparse
import dataclasses
from pathlib import Path

from ito.cli import reason
from ito.config import EMOJI_FULL, EMOJI_SMALL, Config, from_options
from ito.data import emoji_full, emoji_small
from ito.data.dataset import Dataset, load_dataset
from ito.data.emoji import default_cache
from ito.data.fields import Options
from ito.data.records import Shard, open_shards
from ito.ranks import Ranks
from ito.run import RunFolder
from ito.scoring.evaluation import ALL
from ito.stream import Stream


def open_dataset(config: Config, cache: Path | None = None) -> Dataset:
    """Load the data that is scored into memory: `config.val_data`, or else `config.train_data`.

    An emoji set is prepared in `cache` on first use.
    """
    if config.val_data:
        return load(config, config.val_data, cache, only="val", data_format="auto")
    return load(config, config.train_data, cache)


def load(config: Config, data: str, cache: Path | None, only: str | None = None, **other):
    names = ("split_seed", "max_pixels", "fit")
    options = reader_options(config) | {name: getattr(config, name) for name in names} | other
    return load_dataset(locate(data, cache), config.load_size, only=only, **options)


def open_data(
    config: Config, cache: Path | None, workers: int, ranks: Ranks
) -> tuple[Dataset, Dataset | Stream]:
    """The evaluation data and the training data: the same data set in memory; with --val-data two
    of them; with --stream, a data set in memory and this rank's stream."""
    eval_data = open_dataset(config, cache)
    if not config.stream and not config.val_data:
        return eval_data, eval_data
    if not config.stream:
        return eval_data, load(config, config.train_data, cache, only="train")
    if config.batch_size % ranks.size:
        raise ValueError(
            "--stream gives ranks equal parts: --batch-size must be a multiple of "
            f"{ranks.size} ranks, got {config.batch_size}"
        )
    if config.fusion_text == "shuffled" and config.batch_size < 2 * ranks.size:
        raise ValueError(
            f"--fusion-text shuffled takes captions of other items: with --stream, --batch-size "
            f"must be at least 2 for each of {ranks.size} ranks, got {config.batch_size}"
        )
    if workers < 0:
        raise ValueError(f"--workers must be at least 0, got {workers}")
    return eval_data, Stream(
        open_source(config, cache),
        config.load_size,
        config.batch_size // ranks.size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        workers=workers,
        max_pixels=config.max_pixels,
        fit=config.fit,
    )


def open_source(config: Config, cache: Path | None = None) -> list[Shard]:
    """The shards of `config.train_data`, for `ito.stream`."""
    return open_shards(locate(config.train_data, cache), **reader_options(config))


def reader_options(config: Config) -> dict[str, str | bool | None]:
    """The options of `open_shards` that the configuration sets."""
    names = (f.name for f in dataclasses.fields(Options) if f.name != "root")
    return {name: getattr(config, name) for name in names}


def locate(data: str, cache: Path | None) -> Path:
    """The path of `data`; an emoji set is prepared in the cache on first use."""
    cache = cache or default_cache()
    folders = {EMOJI_SMALL: cache / emoji_small.FOLDER, EMOJI_FULL: cache / emoji_full.FOLDER}
    folder = folders.get(data)
    if folder is None:
        return Path(data)
    try:
        if data == EMOJI_SMALL:
            return emoji_small.prepare_emoji_small(folder)
        return emoji_full.prepare_emoji_full(folder, cache)
    except OSError as error:
        raise OSError(f"--cache: cannot prepare {folder}: {reason(error)}") from error


def choose_data(options: argparse.Namespace) -> tuple[Config, list[str] | None]:
    """The run's configuration with the data that the options name, and the splits to score.

    None for the splits means the held-out ones.
    """
    config = from_options(options, RunFolder(options.run).read_config())
    if options.data is None:
        return config, options.split
    for name in ("train", "val"):
        if f"{name}_data" in options:
            about = f"--data {options.data} and --{name}-data name the same thing"
            raise ValueError(f"{about}: drop one")
    given = {"train_data": options.data, "stream": False, "val_data": None}
    for name in ("data_format", "image_root"):  # what the run's own data needed
        given[name] = vars(options).get(name, getattr(Config, name))
    return from_options(argparse.Namespace(**given), config), options.split or [ALL]
