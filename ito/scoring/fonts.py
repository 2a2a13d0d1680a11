"""Which installed font can show a text, and what to install if none can."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont, features

SIZE = 12
# The first that has all characters of a text is taken; then any other installed font.
PREFERRED = (
    *("DejaVuSans", "Arial", "NotoSans-Regular", "NotoSansCJK-Regular", "NotoSansCJKjp-Regular"),
    *("Arial Unicode", "PingFang", "Hiragino Sans GB", "msyh", "malgun", "YuGothR", "msgothic"),
    *("wqy-microhei", "wqy-zenhei", "DroidSansFallback", "unifont"),
)
PACKAGES = {"symbols": "fonts-symbola"}  # of Debian, by `script`
PACKAGES |= dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"), "fonts-noto-cjk")


def folders() -> list[Path]:
    """Where fonts are installed on this system."""
    if sys.platform == "win32":
        places = {"WINDIR": "Fonts", "LOCALAPPDATA": "Microsoft/Windows/Fonts"}
        return [Path(os.environ[at]) / name for at, name in places.items() if at in os.environ]
    if sys.platform == "darwin":
        found = ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"]
        return [Path(name).expanduser() for name in found]
    data = [os.environ.get("XDG_DATA_HOME") or "~/.local/share"]
    data += (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return [Path("~/.fonts").expanduser(), *(Path(name).expanduser() / "fonts" for name in data)]


class Font:
    """A font, and which characters it has."""

    def __init__(self, drawn: ImageFont.FreeTypeFont):
        self.drawn = drawn
        self.missing = self.glyph("\uffff")  # no character: what is drawn in place of one
        self.has = cache(lambda character: self.glyph(character) != self.missing)

    def glyph(self, character: str) -> tuple:
        mask = self.drawn.getmask(character)
        return mask.size, bytes(mask)


def installed() -> Iterator[Font]:
    """The installed fonts, the preferred ones first, and last Pillow's own, of Latin letters."""
    found = [path for folder in folders() for path in folder.rglob("*.[tToO][tT][fFcC]")]

    def order(path: Path) -> tuple:
        known = PREFERRED.index(path.stem) if path.stem in PREFERRED else len(PREFERRED)
        return known, "regular" not in path.stem.lower(), path.stem

    for path in sorted(found, key=order):
        try:
            yield Font(ImageFont.truetype(path, SIZE))
        except OSError:  # damaged, or of pictures in other sizes
            continue
    yield Font(ImageFont.load_default(SIZE))


class Fonts:
    """The fonts that texts need: the first that is installed, and each that has more of them.

    `lacking`: the characters that no font has.
    """

    def __init__(self, texts: Iterable[str]):
        self.lacking = set(filter(is_drawn, "".join(texts)))
        self.right_to_left = any(unicodedata.bidirectional(c) in ("R", "AL") for c in self.lacking)
        self.fonts: list[Font] = []
        for font in installed():
            more = set(filter(font.has, self.lacking))
            if more or not self.fonts:
                self.fonts.append(font)
            self.lacking -= more
            if not self.lacking:
                break

    def pieces(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in a font that has all of its characters, else in pieces, each in one that
        does."""
        wanted = [c for c in dict.fromkeys(text) if is_drawn(c)]
        for font in self.fonts:
            if all(map(font.has, wanted)):
                return [(text, font.drawn)]
        pieces: list[tuple[str, ImageFont.FreeTypeFont]] = [("", self.fonts[0].drawn)]
        for character in text:
            font = next((f.drawn for f in self.fonts if f.has(character)), pieces[-1][1])
            if font is pieces[-1][1] or not is_drawn(character):
                pieces[-1] = (pieces[-1][0] + character, pieces[-1][1])
            else:
                pieces.append((character, font))
        return pieces

    def notes(self) -> str:
        """What the drawn texts lack, in words; "" if they lack nothing."""
        lines = []
        if self.lacking:
            characters = sorted(self.lacking)
            scripts = sorted(set(map(script, characters)))
            packages = sorted({PACKAGES.get(name, "fonts-noto") for name in scripts})
            lines.append(
                f"note       no installed font has {len(characters)} characters of the sheet "
                f"({', '.join(scripts)}): {''.join(characters[:10])}; they are empty boxes there. "
                "Install a font that has them, for example Noto Sans (Debian: "
                f"{' '.join(packages)})"
            )
        if self.right_to_left and not features.check("raqm"):
            lines.append(
                "note       texts that are written from right to left are in the wrong order on "
                "the sheet: this Pillow has no Raqm, which needs the library FriBiDi"
            )
        return "\n".join(lines)


def script(character: str) -> str:
    """The alphabet of a character: the first word of its Unicode name, "CJK", "HIRAGANA" …"""
    if unicodedata.category(character)[0] == "S":  # emoji and other pictures
        return "symbols"
    return unicodedata.name(character, "other").split()[0]


def is_drawn(character: str) -> bool:
    """Whether a character has a glyph of its own: not white space, marks and what only formats."""
    return unicodedata.category(character)[0] not in "ZCM"
