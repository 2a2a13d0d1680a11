"""`python -m ito.prepare emoji-small --out DIR` writes a data set in the format users bring."""

import argparse
from pathlib import Path

from ito.emoji import FOLDER, default_cache, prepare_emoji_small


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ito.prepare", description=__doc__)
    parser.add_argument("name", choices=["emoji-small"], help="the set to prepare")
    parser.add_argument("--out", type=Path, help="folder to write (default: in the cache)")
    args = parser.parse_args()
    print(prepare_emoji_small(args.out or default_cache() / FOLDER))


if __name__ == "__main__":
    main()
