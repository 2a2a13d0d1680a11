"""Common parts of the emoji sets: names, families, splits, drawing, and publishing.

Splits are made by hash of the concept *family*: variants in gender, colour, size, direction or
clock time are in the same split, so that no training variant resembles a held-out one.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from ito.data.pictures import on_white
from ito.files import FileError, make_folder, require_file

SHARD_SIZE = 1000  # samples of a tar
SMALL, FULL = "Small emoji set", "Full emoji set"  # how the titles of the sets begin
GENDERED = r"\b(man|men|woman|women|boy|girl|male|female|mrs)\b"
# the words in which variants of a concept family differ
VARIANT = (
    GENDERED + r"|\b(person|people|child|adult|older|old|mx|and|facing right|large|medium|small|"
    r"light|dark|red|orange|yellow|green|blue|purple|brown|black|white|grey|pink)\b"
)
# variants that are named by another word
SAME_FAMILY = {"mermaid": "merperson", "merman": "merperson", "princess": "prince"}
SAME_FAMILY |= {"with crown": "prince", "santa claus": "claus", "": "person"}


def default_cache() -> Path:
    """Where prepared data lives: `$ITO_CACHE`, or `~/.cache/ito`."""
    return Path(os.environ.get("ITO_CACHE") or Path.home() / ".cache" / "ito")


def clean(name: str) -> str:
    return " ".join(re.sub("[:_]", " ", name).replace("’", "'").split())


def code_points(text: str) -> str:
    """`0023-FE0F-20E3`, in any of the packages' spellings, as the key `23-20e3`."""
    points = [int(point, 16) for point in text.split("-")]
    return "-".join(f"{point:x}" for point in points if point != 0xFE0F)


def family(name: str) -> str:
    """The name without gender, colour, size and direction; the same for `blue` and `red heart`."""
    if name.startswith("flag for "):
        return name
    if re.search(r"o'clock|thirty$", name):
        return "clock"
    rest = " ".join(re.findall(r"\w+", re.sub(VARIANT, "", name.lower())))
    return SAME_FAMILY.get(rest, rest)


def distinct_names(first: str, aliases: Iterable[str]) -> list[str]:
    """The first name, then the aliases that are descriptions and are not the same words again."""
    unique = {}
    for name in [first, *(alias for alias in aliases if is_description(alias, first))]:
        unique.setdefault(re.sub(r"\W", "", name.lower()), name)
    return list(unique.values())


def is_description(alias: str, name: str) -> bool:
    """Whether an alias is no code ("fr", "+1", "flag ac", "dog2", "cjk ideograph 5408"), and is
    not misleading.

    Unicode's own names say BLACK and WHITE for filled and outlined, whatever the colour drawn:
    "heavy black heart" is the red one.
    """
    code = r"flag \w\w|\W*\w{0,2}\W*|.*[a-z]\d.*|.*ideograph.*"
    colour = {"black", "white"} & set(alias.split()) - set(name.split())
    return not re.fullmatch(code, alias) and not colour


def drop_shared_names(concepts: dict) -> None:
    """Remove aliases that several concepts have; a first name keeps to its concept."""
    firsts = {concept["captions"][0].lower() for concept in concepts.values()}
    claims = Counter(name.lower() for c in concepts.values() for name in c["captions"])
    for concept in concepts.values():
        first, *aliases = concept["captions"]
        concept["captions"] = [first] + [
            name for name in aliases if claims[name.lower()] == 1 and name.lower() not in firsts
        ]


def share(text: str) -> float:
    """A number in [0, 1), from the text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def render(svg: str, size: int) -> bytes:
    """PNG bytes of a drawing; its border is cut equally on all sides, by at most 1/9 of a side.

    OpenMoji has a border of 11 px of 72 (the median side), Twemoji none: with the border, half the
    pixels of a small picture are empty. R@1 on held-out drawings after 1,000 steps, image to text
    and text to image: 26.8 and 28.3 % cut, 20.4 and 21.9 % uncut (means of two seeds, 409
    candidates). At most 1/9, so that a small square remains smaller than a large one.
    """
    drawn = size * 4 // 3  # at least 3/4 of it is kept
    image = Image.open(io.BytesIO(rasterize(svg, drawn))).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    left, top, right, bottom = box or (0, 0, drawn, drawn)
    cut = min(left, top, drawn - right, drawn - bottom, drawn // 9)
    box = (cut, cut, drawn - cut, drawn - cut)
    return to_png(image.resize((size, size), Image.Resampling.LANCZOS, box))


def rasterize(svg: str, size: int) -> bytes:
    from resvg_py import svg_to_bytes

    # no system fonts: the sets contain no text, and the result is the same on every machine
    return svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)


def to_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def open_on_white(png: bytes) -> Image.Image:
    return on_white(Image.open(io.BytesIO(png)), None)


def pixels(png: bytes) -> bytes:
    """A hash, equal for pictures with equal pixels on white."""
    return hashlib.sha256(open_on_white(png).tobytes()).digest()


def owner(keys: Iterable[str], concepts: dict) -> str:
    """Which of the concepts with the same drawing keeps it, so that a picture has one meaning.

    Examples are territories with their state's flag, and families and professions that an artist
    draws once. An ungendered name wins, then the shortest (Norway before Svalbard & Jan Mayen).
    """

    def rank(key: str):
        name = concepts[key]["captions"][0]
        return re.search(GENDERED, name.lower()) is not None, len(name), name

    return min(keys, key=rank)


def publish(out: Path, title: str, write: Callable[[Path], None]) -> Path:
    """Fill the folder `out` with `write` and return it; does nothing if it holds that set already.

    The folder is built next to `out` and renamed when it is complete. A set is recognised by its
    data card: `write` must create a README.md whose first line is `# title`.

    Raises FileExistsError if `out` holds something else.
    """
    if is_published(out, title):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not the {title.lower()}; name a new or an empty folder")
    make_folder(out.parent, out)
    try:
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would follow the rename
        write(building)
        building.rename(out)
    except OSError:
        if not is_published(out, title):  # if it is, another process was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def is_published(out: Path, title: str) -> bool:
    card = out / "README.md"
    return card.is_file() and card.read_bytes().split(b"\n")[0] == f"# {title}".encode()


def is_emoji_set(data: str) -> bool:
    """Whether all of `data`, A::B, is of published sets: their folders, lines or shards."""

    def is_set(folder: Path) -> bool:
        try:
            with require_file(folder / "README.md").open("rb") as card:
                return card.read(64).startswith((f"# {SMALL}".encode(), f"# {FULL}".encode()))
        except (OSError, FileError):
            return False

    paths = [Path(part).absolute() for part in data.split("::")]
    places = [(path, *path.parents[:2]) for path in paths]
    return all(any(map(is_set, near)) for near in places)


def write_pictures(out: Path, records: list[dict], pictures: Iterable[bytes]) -> None:
    """Write the PNGs to the paths that the records name, and the records to `captions.jsonl`."""
    with (out / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for record, png in zip(records, pictures, strict=True):
            path = out / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_shards(folder: Path, records: list[dict], pictures: Iterable[bytes]) -> None:
    """Write `SPLIT-00000.tar` and so on: records with `image`, `captions` and `split`, and PNGs.

    Records are sorted by the hash of the image's path, so that every shard is a random sample.
    """
    folder.mkdir()
    samples = sorted(
        zip(records, pictures, strict=True),
        key=lambda sample: hashlib.sha256(sample[0]["image"].encode()).digest(),
    )
    for split in dict.fromkeys(record["split"] for record in records):
        chosen = [sample for sample in samples if sample[0]["split"] == split]
        for number, start in enumerate(range(0, len(chosen), SHARD_SIZE)):
            with tarfile.open(folder / f"{split}-{number:05}.tar", "w") as tar:
                for place, (record, png) in enumerate(chosen[start : start + SHARD_SIZE], start):
                    fields = {name: value for name, value in record.items() if name != "image"}
                    text, name = json.dumps(fields, ensure_ascii=False), record["captions"][0]
                    files = {"png": png, "json": text.encode(), "txt": name.encode()}
                    for kind, data in files.items():
                        info = tarfile.TarInfo(f"{place:06}.{kind}")  # no time, no owner
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
