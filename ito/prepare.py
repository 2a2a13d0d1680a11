"""Prepare a data set of emoji drawings with captions, in a format that `ito.train` reads.

emoji: up to 14 styles, with names in 28 languages; downloaded by npm, drawn in about a minute.
emoji-small: two styles, from pip packages; the default data of `python -m ito.train`.
"""

import argparse
from pathlib import Path

from ito.cli import Parser, output_path, shown, user_errors
from ito.data import emoji_full, emoji_small
from ito.data.emoji import default_cache
from ito.files import naming


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ito.prepare", description=__doc__)
    parser.add_argument("name", choices=["emoji", "emoji-small"], help="data set to prepare")
    parser.add_argument("--out", type=Path, help="output folder (default: in the cache)")
    parser.add_argument(
        "--size", type=int, help=f"emoji only: side in pixels (default: {emoji_full.SIZE})"
    )
    parser.add_argument(
        "--permissive-only",
        action="store_true",
        help="emoji only: leave out styles with a share-alike licence",
    )
    with user_errors():
        options = parser.parse_args(arguments)
        print(shown(prepare(options)))


def prepare(options: argparse.Namespace) -> Path:
    cache = default_cache()
    if options.out:
        output_path("--out", options.out)
    chosen = options.size is not None or options.permissive_only
    small = options.name == "emoji-small"
    if chosen and small:
        raise ValueError("--size and --permissive-only are options of emoji, not emoji-small")
    if chosen and not options.out:
        raise ValueError("--size and --permissive-only make another set: name its folder, --out")
    size = emoji_full.SIZE if options.size is None else options.size
    if not 8 <= size <= 1024:
        raise ValueError(f"--size must be between 8 and 1024, got {size}")
    out = options.out or cache / (emoji_small if small else emoji_full).FOLDER
    with naming(out):
        if small:
            return emoji_small.prepare_emoji_small(out)
        permissive = options.permissive_only
        return emoji_full.prepare_emoji_full(out, cache, size=size, permissive_only=permissive)


if __name__ == "__main__":
    main()
