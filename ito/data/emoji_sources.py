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


class Style(NamedTuple):
    package: str
    licence: str
    artist: str
    one_colour: bool = False
    bordered: bool = False


SOURCES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PACKAGES = list(SOURCES["packages"].items())  # name@version, SHA-512: pinned, they are the data
STYLES = {name: Style(**about) for name, about in SOURCES["styles"].items()}
# Icons with a misleading name, and the name of what they show, or None to leave them out:
# a piano, a palm, a ribbon, a country
MISNAMED = SOURCES["misnamed"]

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


def read_concepts(files: dict[str, Path]) -> dict[str, dict]:
    """Names, keywords, group and family of every concept by its key, sorted."""
    wanted = r"[a-z-]+/data\.json|en/shortcodes/[a-z]+\.json|meta/(groups|unicode-names)\.json"
    found = members(files["emojibase-data"], wanted)
    tables = {path.removesuffix(".json"): json.loads(data) for path, data in found.items()}
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
    groups, english = tables["meta/groups"], labels.pop("en")
    concepts = {}
    for entry in tables["en/data"]:
        key = code_points(entry["hexcode"])
        label = english[key]
        first = re.sub("^flag ", "flag for ", label) if entry["label"] != label else label
        captions = distinct_names(first, [labels["en-gb"][key], *aliases[key]])
        words = [*entry.get("tags", []), *keywords.get(key, [])]
        concepts[key] = {
            "label": entry["label"],
            "aliases": aliases[key],
            "captions": captions,
            "keywords": distinct_keywords(words, captions),
            "translations": {to: [names[key]] for to, names in labels.items() if key in names},
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


def read_drawings(files: dict[str, Path], concepts: dict) -> dict[str, dict[str, str | bytes]]:
    """{style: {key: drawing}} for every style whose package is in `files`."""
    sets = {
        name: (read_json(files[style.package], "icons.json"), read_chars(files[style.package]))
        for name, style in STYLES.items()
        if style.package in files and style.package.startswith("@iconify-json/")
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
