"""The full emoji set: every concept in up to 14 drawing styles, named in 28 languages.

Written in two formats: `images/` with `captions.jsonl`, and WebDataset shards.
"""

import io
import re
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from PIL import Image
from tqdm import tqdm

from ito.data import emoji
from ito.data.emoji import FULL
from ito.data.emoji_small import find_packages
from ito.data.emoji_sources import MISNAMED, PACKAGES, STYLES, read_concepts, read_drawings
from ito.data.npm import fetch
from ito.data.records import cpu_count

# Raise the number when a rule below changes: a cached set is never rebuilt.
FOLDER = "emoji-full-2"
SIZE = 96  # pixels per side
HELDOUT_CONCEPT = 0.14  # share of the families
HELDOUT_STYLES = ("noto", "noto-v1")
HUES = "red|orange|yellow|green|blue|purple|brown|pink"
COLOURED_FLAGS = ("rainbow flag", "transgender flag")  # in addition to those of places
# black things that are drawn as outlines, like the white ones
HOLLOW = {"openmoji-black": ("black cat", "black small square")}
HUE, COLOUR = rf"\b({HUES})\b", rf"\b(light blue|{HUES}|black|white|grey)\b"
PUBLISHED = ("captions", "keywords", "translations", "group", "subgroup")

Drawings = dict[tuple[str, str], bytes]  # PNG bytes by (style, key)


def prepare_emoji_full(
    out: Path, cache: Path, *, size: int = SIZE, permissive_only: bool = False
) -> Path:
    """Write the full set to the folder `out` and return it; does nothing if it exists already.

    `size` is the pictures' side in pixels. `permissive_only` leaves out styles with share-alike
    licences. The npm packages are kept in `cache`.

    Raises ImportError without resvg-py, FileExistsError if `out` holds something else, and what
    `ito.data.npm.fetch` raises.
    """
    title = f"{FULL}, {size} px" + ", permissive licences" * permissive_only

    def write(folder: Path) -> None:
        share_alike = {style.package for style in STYLES.values() if "-SA-" in style.licence}
        omitted = share_alike if permissive_only else ()
        needed = [about for about in PACKAGES if about[0].rpartition("@")[0] not in omitted]
        write_set(folder, fetch(needed, cache / "npm"), title, size)

    return emoji.publish(Path(out), title, write)


def write_set(out: Path, files: dict[str, Path], title: str, size: int) -> None:
    find_packages("resvg_py")
    concepts = read_concepts(files)
    emoji.drop_shared_names(concepts)
    drawings = read_drawings(files, concepts)
    excluded = Counter()
    excluded["named like another concept"] = sum(
        list(icons.values()).count(None) for style, icons in MISNAMED.items() if style in drawings
    )
    drop_colourless(drawings, concepts, excluded)
    png = draw(drawings, size)
    for at in [at for at, data in png.items() if emoji.open_on_white(data).getcolors(1)]:
        excluded["blank"] += 1
        del png[at]
    drop_identical(png, concepts, excluded)
    drop_untrainable(png, concepts, excluded)

    records = []
    for style, key in png:
        record = {"image": f"images/{style}/{key}.png", "item": key, "style": style}
        record |= {name: concepts[key][name] for name in PUBLISHED}
        records.append(record | {"split": split_of(style, concepts[key]["family"])})
    emoji.write_pictures(out, records, png.values())
    emoji.write_shards(out / "shards", records, png.values())
    card = data_card(title, size, records, excluded, files)
    (out / "README.md").write_text(card, encoding="utf-8")


def split_of(style: str, family: str) -> str:
    if emoji.share(f"emoji-full:{family}") < HELDOUT_CONCEPT:
        return "heldout_concept"
    return "heldout_style" if style in HELDOUT_STYLES else "train"


def draw(drawings: dict[str, dict[str, str | bytes]], size: int) -> Drawings:
    """Every drawing as PNG, sorted by concept and style; uses all processors."""
    jobs = sorted((key, style) for style, found in drawings.items() for key in found)
    with ProcessPoolExecutor(cpu_count()) as pool:
        pictures = pool.map(
            draw_one,
            (drawings[style][key] for key, style in jobs),
            (STYLES[style].bordered for _, style in jobs),
            [size] * len(jobs),
            chunksize=64,
        )
        bar = tqdm(pictures, total=len(jobs), desc="drawing", unit="picture", dynamic_ncols=True)
        return {(style, key): png for (key, style), png in zip(jobs, bar, strict=True)}


def draw_one(drawing: str | bytes, bordered: bool, size: int) -> bytes:
    if isinstance(drawing, bytes):
        picture = Image.open(io.BytesIO(drawing)).convert("RGBA")
        return emoji.to_png(picture.resize((size, size), Image.Resampling.LANCZOS))
    return emoji.render(drawing, size) if bordered else emoji.rasterize(drawing, size)


def drop_colourless(drawings: dict, concepts: dict, excluded: Counter) -> None:
    """Drop one-colour drawings of concepts that differ only in colour: flags, skin tones, hearts.

    Concepts differ only in colour if their names without colours are equal and one of them has a
    hue: black and white flags stay, black and red hearts do not.
    """
    name = {key: concept["captions"][0] for key, concept in concepts.items()}
    stem = {key: re.sub(COLOUR, "", name[key]) for key in concepts}
    hued = {stem[key] for key in concepts if re.search(HUE, name[key])}
    count = Counter(stem.values())
    for style, found in drawings.items():
        for key in list(found) if STYLES[style].one_colour else ():
            subgroup = concepts[key]["subgroup"]
            if subgroup in ("country-flag", "subdivision-flag") or name[key] in COLOURED_FLAGS:
                excluded["flag in a one-colour style"] += 1
                del found[key]
            elif name[key] in HOLLOW.get(style, ()):
                excluded["of a black thing, but hollow"] += 1
                del found[key]
            elif subgroup == "skin-tone" or (
                stem[key] != name[key] and stem[key] in hued and count[stem[key]] > 1
            ):
                excluded["told apart by its colour, in a one-colour style"] += 1
                del found[key]


def drop_identical(png: Drawings, concepts: dict, excluded: Counter) -> None:
    """Keep a picture that shows several concepts, equal to the pixel, for one of them only."""
    groups = defaultdict(list)
    for at, data in png.items():
        groups[emoji.pixels(data)].append(at)
    for same in groups.values():
        keep = emoji.owner(sorted({key for _, key in same}), concepts)
        for style, key in same:
            if key != keep:
                excluded["identical to another concept's drawing"] += 1
                del png[style, key]


def drop_untrainable(png: Drawings, concepts: dict, excluded: Counter) -> None:
    """Drop drawings of the split heldout_style whose concept has no drawing in another style."""
    trained = {key for style, key in png if style not in HELDOUT_STYLES}
    for style, key in list(png):
        if key not in trained and split_of(style, concepts[key]["family"]) == "heldout_style":
            excluded["drawn by the held-out styles alone"] += 1
            del png[style, key]


def data_card(
    title: str, size: int, records: list[dict], excluded: Counter, files: dict[str, Path]
) -> str:
    splits = "\n".join(
        f"| {split} | {sum(r['split'] == split for r in records)} "
        f"| {len({r['item'] for r in records if r['split'] == split})} |"
        for split in ("train", "heldout_style", "heldout_concept")
    )
    drawn = Counter(record["style"] for record in records)
    styles = "\n".join(
        f"| {name} | {drawn[name]} | {style.licence} | {style.artist} |"
        for name, style in STYLES.items()
        if drawn[name]
    )
    gone = "\n".join(
        f"- {number} drawings: {reason}" for reason, number in sorted(excluded.items()) if number
    )
    used = [spec for spec, _ in PACKAGES if spec.rpartition("@")[0] in files]
    packages = "\n".join(f"- {spec}" for spec in used)
    items = {r["item"]: r for r in records}
    names = fmean(len(r["captions"]) for r in items.values())
    keywords = fmean(len(r["keywords"]) for r in items.values())
    languages = sorted({"en"} | {name for r in records for name in r["translations"]})
    return f"""# {title}

{len(records)} drawings of {len(items)} concepts, {size} × {size} px: every emoji as up to
{len(drawn)} styles draw it. {names:.1f} English names per concept (CLDR's
first), {keywords:.1f} keywords, and a name in each of {len(languages)} languages:
{", ".join(languages)}.

| style | drawings | licence | artist |
|---|---|---|---|
{styles}

The drawings keep their licences. CC-BY-4.0 and CC-BY-SA-4.0 ask to name the artist; whoever passes
on drawings or adaptations of the latter shares them alike. Names: Unicode CLDR (Unicode licence)
through emojibase (MIT); keywords also from emojilib (MIT).

## Splits

| split | drawings | concepts |
|---|---|---|
{splits}

`heldout_style`: {" and ".join(HELDOUT_STYLES)}, of concepts that other styles show in `train`.
`heldout_concept`: concepts that are not in `train` at all, in every style. They go by hash of the
concept family: variants in gender, colour, size, direction and clock time are on one side.
Zero-shot classes: {len({r["group"] for r in records} - {None})} groups,
{len({r["subgroup"] for r in records} - {None})} subgroups.

## Left out

Skin tones other than the base; of several variants in one style all but the first; and
{gone}

A name claimed by several concepts stays with the one whose first name it is, or goes. OpenMoji's
empty border is cut by up to {size // 9} px; drawings are otherwise as published.

## Files

`images/STYLE/CODEPOINTS.png` and `captions.jsonl`; the same as WebDataset shards in `shards/`, by
split, in an order that mixes styles: `.png`, `.json` (all fields), `.txt` (the first name).

## Sources

npm packages, drawn with resvg-py {version("resvg_py")}:

{packages}
"""
