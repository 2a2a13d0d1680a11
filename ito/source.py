"""Opens the data set that a configuration names."""

import dataclasses
from pathlib import Path

from ito.cli import reason
from ito.config import EMOJI_FULL, EMOJI_SMALL, Config
from ito.data import emoji_full, emoji_small
from ito.data.dataset import Dataset, load_dataset
from ito.data.emoji import default_cache
from ito.data.fields import Options
from ito.data.records import open_shards
from ito.ranks import Ranks
from ito.stream import Stream, require_stream


def open_dataset(config: Config, cache: Path | None = None) -> Dataset:
    """Load the data that is scored into memory: `config.val_data`, or else `config.train_data`.

    An emoji set is prepared in `cache` on first use.
    """
    if config.val_data:
        return load(config, config.val_data, cache, only="val", data_format="auto")
    return load(config, config.train_data, cache)


def load(config: Config, data: str, cache: Path | None, only: str | None = None, **other):
    names = ("split_seed", "group_by", "test_share", "max_pixels", "fit")
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
    require_stream(config, workers, ranks)
    return eval_data, Stream(
        open_shards(locate(config.train_data, cache), **reader_options(config)),
        config.load_size,
        config.batch_size // ranks.size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        workers=workers,
        max_pixels=config.max_pixels,
        fit=config.fit,
    )


def reader_options(config: Config) -> dict[str, str | bool | None]:
    """The options of `open_shards` that the configuration sets."""
    names = (f.name for f in dataclasses.fields(Options))
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def locate(data: str, cache: Path | None) -> Path | str:
    """The path or pattern of `data`; an emoji set is prepared in the cache on first use."""
    cache = cache or default_cache()
    folders = {EMOJI_SMALL: cache / emoji_small.FOLDER, EMOJI_FULL: cache / emoji_full.FOLDER}
    folder = folders.get(data)
    if folder is None:
        return data
    try:
        if data == EMOJI_SMALL:
            return emoji_small.prepare_emoji_small(folder)
        return emoji_full.prepare_emoji_full(folder, cache)
    except OSError as error:
        raise OSError(f"--cache: cannot prepare {folder}: {reason(error)}") from error
