"""`python -m ito.prepare emoji-small --out DIR` writes a data set in the format users bring."""

import argparse
from pathlib import Path

from ito.cli import user_errors
from ito.emoji import FOLDER, default_cache, prepare_emoji_small


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ito.prepare", description=__doc__)
    parser.add_argument("name", choices=["emoji-small"], help="the set to prepare")
    parser.add_argument("--out", type=Path, help="folder to write (default: in the cache)")
    with user_errors():
        options = parser.parse_args(arguments)
        print(prepare_emoji_small(options.out or default_cache() / FOLDER))


if __name__ == "__main__":
    main()
