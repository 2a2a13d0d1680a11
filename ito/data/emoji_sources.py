"""The sources of the full emoji set: npm packages, and how they are read.

A concept is an emoji of emojibase; its key is its code points without U+FE0F. A drawing is an SVG
text, or the bytes of a WebP picture. Icon sets that list their characters are matched by these, the
others by name.
"""

import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from ito.data.emoji import clean, code_points, distinct_names, family

# name@version and SHA-512, pinned because they are the data
# fmt: off
PACKAGES = [
    ("@iconify-json/noto@1.2.9",
     "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    ("@iconify-json/noto-v1@1.2.5",
     "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    ("@iconify-json/twemoji@1.2.5",
     "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    ("@iconify-json/emojione@1.2.3",
     "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    ("@iconify-json/emojione-v1@1.2.3",
     "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww=="),
    ("@iconify-json/emojione-monotone@1.2.1",
     "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA=="),
    ("@iconify-json/fluent-emoji@1.2.7",
     "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
    ("@iconify-json/fluent-emoji-flat@1.2.6",
     "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    ("@iconify-json/fluent-emoji-high-contrast@1.2.6",
     "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w=="),
    ("@iconify-json/fxemoji@1.2.2",
     "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
    ("@iconify-json/streamline-emojis@1.2.4",
     "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A=="),
    ("@iconify-json/openmoji@1.2.29",
     "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    ("@lobehub/fluent-emoji-3d@1.1.0",
     "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    ("openmoji@17.0.0",
     "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w=="),
    ("emojibase-data@17.0.0",
     "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="),
    ("emojilib@4.0.3",
     "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g=="),
]
# fmt: on


class Style(NamedTuple):
    package: str
    licence: str
    artist: str
    one_colour: bool = False
    bordered: bool = False


ICONS = "@iconify-json/"
STYLES = {
    "noto": Style(ICONS + "noto", "Apache-2.0", "Google"),
    "noto-v1": Style(ICONS + "noto-v1", "Apache-2.0", "Google"),
    "twemoji": Style(ICONS + "twemoji", "CC-BY-4.0", "X Corp and contributors (jdecked/twemoji)"),
    "emojione": Style(ICONS + "emojione", "CC-BY-4.0", "EmojiOne, EmojiTwo"),
    "emojione-v1": Style(ICONS + "emojione-v1", "CC-BY-SA-4.0", "EmojiOne"),
    "emojione-monotone": Style(
        ICONS + "emojione-monotone", "CC-BY-4.0", "EmojiOne, EmojiTwo", one_colour=True
    ),
    "fluent": Style(ICONS + "fluent-emoji", "MIT", "Microsoft"),
    "fluent-flat": Style(ICONS + "fluent-emoji-flat", "MIT", "Microsoft"),
    "fluent-high-contrast": Style(
        ICONS + "fluent-emoji-high-contrast", "MIT", "Microsoft", one_colour=True
    ),
    "fluent-3d": Style("@lobehub/fluent-emoji-3d", "MIT", "Microsoft"),
    "fxemoji": Style(ICONS + "fxemoji", "Apache-2.0", "Mozilla"),
    "streamline": Style(ICONS + "streamline-emojis", "CC-BY-4.0", "Streamline"),
    "openmoji": Style(ICONS + "openmoji", "CC-BY-SA-4.0", "OpenMoji", bordered=True),
    "openmoji-black": Style("openmoji", "CC-BY-SA-4.0", "OpenMoji", one_colour=True, bordered=True),
}

# Icons with a misleading name, and the name of what they show, or None to leave them out:
# a piano, a palm, a ribbon, a country
MISNAMED = {
    "emojione-v1": {"keyboard": None},
    "fxemoji": {
        "bow": None,
        "cat": "cat face",
        "catside": "cat",
        "construction": "building construction",
        "constructionsign": "construction",
        "couple": "couple with heart",
        "couplekiss": "kiss",
        "darksunglasses": "sunglasses",
        "dog": "dog face",
        "dogside": "dog",
        "down": None,
        "grin": "grinning face",
        "keyboard": None,
        "kiss": "kissing face",
        "kissing": "face blowing a kiss",
        "mouse": "mouse face",
        "mouseside": "mouse",
        "pig": "pig face",
        "pigside": "pig",
        "pout": "person pouting",
        "pouting": "enraged face",
        "sunglasses": "smiling face with sunglasses",
        "tiger": "tiger face",
        "tigerside": "tiger",
        "umbrella": "closed umbrella",
        "wave": "water wave",
    },
    "streamline": {"turkey": None},
}

# Words in which variants differ, in addition to `ito.data.emoji.VARIANT`: a held-out drawing must
# not be the mirror image of a training one. In VARIANT they would change the small set's splits.
DIRECTION = (
    r"\b((left|right|up|down)(wards)?|facing|front|oncoming|forward|reverse|next|first|last|"
    r"waxing|waning|increasing|decreasing|horizontal|vertical|inbox|outbox)\b"
)


def members(tarball: Path, pattern: str) -> dict[str, bytes]:
    """Files of an npm tarball whose path in the package matches the pattern."""
    with tarfile.open(tarball) as tar:
        return {
            name: tar.extractfile(member).read()
            for member in tar
            if member.isfile()
            and re.fullmatch(pattern, name := member.name.removeprefix("package/"))
        }


def read_json(tarball: Path, path: str):
    return json.loads(members(tarball, re.escape(path))[path])


# --- concepts ---


def read_concepts(files: dict[str, Path]) -> dict[str, dict]:
    """Names, keywords, group and family of every concept by its key, sorted."""
    tables = {
        path.removesuffix(".json"): json.loads(data)
        for path, data in members(
            files["emojibase-data"],
            r"[a-z-]+/data\.json|en/shortcodes/[a-z]+\.json|meta/(groups|unicode-names)\.json",
        ).items()
    }
    aliases = aliases_of(tables)
    labels = {
        path.removesuffix("/data"): {code_points(e["hexcode"]): clean(e["label"]) for e in table}
        for path, table in sorted(tables.items())
        if path.endswith("/data")
    }
    keywords = {
        code_points("-".join(f"{ord(c):x}" for c in char)): words
        for char, words in read_json(files["emojilib"], "dist/emoji-en-US.json").items()
    }
    groups = tables["meta/groups"]
    concepts = {}
    for entry in tables["en/data"]:
        key = code_points(entry["hexcode"])
        label = labels["en"][key]
        first = re.sub("^flag ", "flag for ", label) if entry["label"] != label else label
        captions = distinct_names(first, [labels["en-gb"][key], *aliases[key]])
        concepts[key] = {
            "label": entry["label"],
            "aliases": aliases[key],
            "captions": captions,
            "keywords": distinct_keywords(
                [*entry.get("tags", []), *keywords.get(key, [])], captions
            ),
            "translations": {
                language: [names[key]]
                for language, names in labels.items()
                if language != "en" and key in names
            },
            "group": groups["groups"].get(str(entry.get("group"))),
            "subgroup": groups["subgroups"].get(str(entry.get("subgroup"))),
            "family": full_family(first),
        }
    return dict(sorted(concepts.items()))


def full_family(name: str) -> str:
    """The name's family without directions; the same for `up arrow` and `left arrow`."""
    return family(re.sub(DIRECTION, "", name))


def aliases_of(tables: dict) -> dict[str, list[str]]:
    """Every concept's other English names: shortcodes of the platforms, then Unicode's name."""
    aliases = defaultdict(list)
    for path, table in sorted(tables.items()):
        if path.startswith("en/shortcodes/") or path == "meta/unicode-names":
            for code, names in table.items():
                names = [names] if isinstance(names, str) else names
                # Unicode's name of a sequence lists its characters, separated by commas
                aliases[code_points(code)] += [
                    clean(name.replace("-", " ").lower()) for name in names if "," not in name
                ]
    return aliases


def distinct_keywords(words: list[str], names: list[str]) -> list[str]:
    """The keywords that are words, not emoticons or codes, and are not names."""
    taken = {name.lower() for name in names}
    words = (clean(word).lower() for word in words)
    return list(dict.fromkeys(w for w in words if re.search(r"[a-z]{3}", w) and w not in taken))


# --- drawings ---


def read_drawings(files: dict[str, Path], concepts: dict) -> dict[str, dict[str, str | bytes]]:
    """{style: {key: drawing}} for every style whose package is in `files`."""
    sets = {
        name: (read_json(files[style.package], "icons.json"), read_chars(files[style.package]))
        for name, style in STYLES.items()
        if style.package in files and style.package.startswith(ICONS)
    }
    slugs = slug_tables(concepts, sets.values())
    drawings = {}
    for name, style in STYLES.items():
        if name in sets:
            icons, chars = sets[name]
            found = {key: chars[key] for key in concepts if key in chars}
            found = found or by_name(icons, slugs, MISNAMED.get(name, {}))
            drawings[name] = {key: to_svg(icons, icon) for key, icon in found.items()}
        elif style.package in files:
            files_in = members(files[style.package], r"black/svg/.*\.svg|assets/.*\.webp")
            by_code = {
                code_points(Path(path).stem): data.decode() if path.endswith(".svg") else data
                for path, data in files_in.items()
                if re.fullmatch("[0-9A-Fa-f-]+", Path(path).stem)
            }
            drawings[name] = {key: by_code[key] for key in concepts if key in by_code}
    return drawings


def read_chars(tarball: Path) -> dict[str, str]:
    """Icon names by key; empty for sets that list no characters."""
    chars = members(tarball, r"chars\.json").get("chars.json", b"{}")
    return {code_points(code): name for code, name in json.loads(chars).items()}


def slug(name: str) -> str:
    """A name's letters and digits: `flag-for-flag-curacao`, `flag: Curaçao` are `flagcuracao`."""
    name = re.sub(r"^flag-for-(flag-)?", "flag-", name)
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def slug_tables(concepts: dict, sets) -> list[dict[str, str]]:
    """Tables of keys by slug, the most reliable first: labels, icon names of sets with characters,
    other names. A slug of several concepts is in no table.
    """
    labels, icons, others = defaultdict(set), defaultdict(set), defaultdict(set)
    for key, concept in concepts.items():
        labels[slug(concept["label"])].add(key)
        for name in concept["aliases"]:
            others[slug(name)].add(key)
    for icon_set, chars in sets:
        key_of = {name: key for key, name in chars.items() if key in concepts}
        for name, key in key_of.items():
            icons[slug(name)].add(key)
        for name, alias in icon_set.get("aliases", {}).items():
            if alias["parent"] in key_of and "hFlip" not in alias:
                icons[slug(name)].add(key_of[alias["parent"]])
    return [
        {name: next(iter(keys)) for name, keys in table.items() if len(keys) == 1}
        for table in (labels, icons, others)
    ]


def by_name(
    icons: dict, slugs: list[dict[str, str]], misnamed: dict[str, str | None]
) -> dict[str, str]:
    """Icon names by key, for a set without characters; `misnamed` as a style's in `MISNAMED`.

    An alias counts only where the icon's own name says nothing: in older sets "cricket" is an
    alias of the game and "up button" of the upwards button, which are now other concepts.
    """

    def find(name: str) -> tuple[int, str] | None:
        unnumbered = re.sub(r"-\d$", "", name)  # Streamline numbers its variants
        candidates = (slug(name), slug(unnumbered))
        hits = (
            (rank, table[s]) for s in candidates for rank, table in enumerate(slugs) if s in table
        )
        return next(hits, None)

    aliases = defaultdict(list)
    for name, alias in icons.get("aliases", {}).items():
        aliases[name if "hFlip" in alias else alias["parent"]].append(name)
    found = {}
    for name in [*icons["icons"], *(n for n, names in aliases.items() if n in names)]:
        shows = misnamed.get(name, name)
        if shows and not icons["icons"].get(name, {}).get("hidden"):
            own = find(shows)
            hits = [own] if own else [hit for alias in aliases[name] if (hit := find(alias))]
            for rank, key in hits[:1]:
                found[key] = min(found.get(key, (rank, name)), (rank, name))
    return {key: found[key][1] for key in sorted(found)}


def to_svg(icons: dict, name: str) -> str:
    """The icon's body in an SVG of its square; aliases resolved, mirrored ones mirrored."""
    flip = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        flip ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    # the format's default is 16
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}">{body}</svg>'
