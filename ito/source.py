"""The data set that a configuration names."""

from pathlib import Path

from ito import emoji_full, emoji_small
from ito.cli import reason
from ito.config import EMOJI_FULL, EMOJI_SMALL, Config
from ito.data import Dataset, load_dataset
from ito.emoji import default_cache
from ito.emoji_full import prepare_emoji_full
from ito.emoji_small import prepare_emoji_small
from ito.records import Shard, open_shards


def open_dataset(config: Config, cache: Path | None = None) -> Dataset:
    """Load `config.train_data` into memory, or `config.val_data` where that is streamed.

    An emoji set is prepared in `cache` on first use.
    """
    return load_dataset(
        locate(config.val_data or config.train_data, cache),
        config.load_size,
        split_seed=None if config.stream else config.split_seed,
        max_pixels=config.max_pixels,
        **reading(config),
    )


def open_source(config: Config, cache: Path | None = None) -> list[Shard]:
    """The shards of `config.train_data`, for `ito.stream`."""
    return open_shards(locate(config.train_data, cache), **reading(config))


def reading(config: Config) -> dict[str, str | bool]:
    """The options of `open_shards`."""
    names = ("csv_separator", "csv_img_key", "csv_caption_key", "untrusted_data")
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
            return prepare_emoji_small(folder)
        return prepare_emoji_full(folder, cache)
    except OSError as error:
        raise OSError(f"--cache: cannot prepare {folder}: {reason(error)}") from error
