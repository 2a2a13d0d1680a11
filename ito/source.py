"""The data set that a configuration names."""

from pathlib import Path

from ito.cli import reason
from ito.config import EMOJI_SMALL, Config
from ito.data import Dataset, load_dataset
from ito.emoji import FOLDER, default_cache, prepare_emoji_small


def open_dataset(config: Config, cache: Path | None = None) -> Dataset:
    """Load `config.train_data`; the small emoji set is prepared in `cache` on first use."""
    path = Path(config.train_data)
    if config.train_data == EMOJI_SMALL:
        folder = (cache or default_cache()) / FOLDER
        try:
            path = prepare_emoji_small(folder)
        except OSError as error:
            raise OSError(f"--cache: cannot prepare {folder}: {reason(error)}") from error
    return load_dataset(
        path,
        config.load_size,
        split_seed=config.split_seed,
        csv_separator=config.csv_separator,
        csv_img_key=config.csv_img_key,
        csv_caption_key=config.csv_caption_key,
    )
