"""A record: the place of a picture and its captions, made from the fields of a row or an object."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ito.data.shards import URLS, Member

PICTURES = (
    *("apng", "avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
    *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    *("heic", "heif", "jxl", "svg"),  # not read, but reported
)
IMAGE_KEYS = ("image", "file_name", "filepath")
SPLITS = ("train", "val", "valid", "validation", "dev", "test")  # in any case, of folders too
CAPTION_KEYS = ("captions", "caption", "text", "title")
EXPECTED = (
    "expected a folder with captions.jsonl, tars, or pictures and their captions, a CSV, TSV, "
    ".jsonl, COCO .json or .parquet, or a tar pattern"
)
DOWNLOAD = "download the pictures first, for example with img2dataset"
HALF = re.compile("[\ud800-\udfff]")


@dataclass
class Record:
    """The place of a picture, and its captions."""

    where: str
    image: Path | Member
    item: str
    captions: list[str]
    translations: dict[str, list[str]]
    split: str | None
    style: str | None
    group: str | None
    subgroup: str | None
    name: str = ""  # the path that names the picture, below the data's folder or in its tar


class Skipped(NamedTuple):
    """A record that is left out: its place (file and row), and the reason, `kind: details`."""

    where: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without names, to count by."""
        return self.reason.partition(":")[0]


def count_kinds(skipped: list[Skipped]) -> dict[str, int]:
    """The number of skipped records by reason, the most frequent first."""
    return dict(Counter(record.kind for record in skipped).most_common())


@dataclass(frozen=True)
class Options:
    """How data is read. `root`: the folder of the pictures, with --untrusted-data. Of tars,
    `classes`: what a `.cls` counts; `lines`: those of a `.txt` are captions."""

    data_format: str = "auto"
    image_root: str | None = None
    csv_separator: str = "\t"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    untrusted_data: bool = False
    root: Path | None = None
    classes: tuple[str, ...] | None = None
    lines: bool = False

    def place(self, name: str, *folders: Path) -> Path:
        """The picture's path: below --image-root or the first of `folders`, where it is there."""
        places = (os.path.join(folder, name) for folder in (self.image_root, *folders) if folder)
        found = next(filter(os.path.exists, places), None)
        return Path(found or os.path.join(folders[0], name))

    def leads_out(self, path: Path) -> str:
        """`leads out of …` if a path, with its links followed, is outside the data; else ""."""
        if not self.root:
            return ""
        roots = [self.root, *([os.path.realpath(self.image_root)] if self.image_root else [])]
        real = Path(os.path.realpath(path)) if "\0" not in str(path) else Path()
        inside = any(real.is_relative_to(root) for root in roots)
        return "" if inside else f"leads out of {self.root}"


def from_row(
    fields: dict,
    where: str,
    options: Options,
    folders: Iterable[Path],
    prefix: str = "",
    caption_keys: Iterable[str] = CAPTION_KEYS,
) -> Record | Skipped:
    """The record of an object that names its picture by a path below one of `folders`. Its item's
    name, by default that path, begins with `prefix`."""
    try:
        keys = (options.csv_img_key, *IMAGE_KEYS)
        name = next((text_field(fields, key, True) for key in keys if fields.get(key)), None)
        if name is None:
            raise ValueError(f"names no image; its fields are {list(fields)}")
        if is_url(name):
            return Skipped(where, f"a URL: {name}: {DOWNLOAD}")
        place = options.place(name, *folders)
        keys = (*{options.csv_caption_key}.difference(CAPTION_KEYS), *caption_keys)
        return check_record(from_fields(fields, where, place, prefix + name, keys), options)
    except ValueError as error:
        return Skipped(where, f"malformed: {error}")


def is_url(name: str) -> bool:
    return name.lstrip().lower().startswith(URLS)


def from_fields(
    fields: dict, where: str, image: Path | Member, name: str, keys: Iterable[str] = CAPTION_KEYS
) -> Record:
    """The record of an object's fields; others are ignored. Its item is `name` by default.

    Raises ValueError naming the malformed field.
    """
    translations = fields.get("translations") or {}
    if not isinstance(translations, dict):
        raise ValueError(f"translations must be an object, got {translations!r}")
    split = (text_field(fields, "split", True) or "").strip() or None
    split = split.lower() if split and split.lower() in SPLITS else split
    # names of scores begin with it, as "val/i2t/R@1", and are printed
    if split and ("/" in split or not split.isprintable()):
        raise ValueError(f"split must be a printable name without /, got {split!r}")
    item = text_field(fields, "item", True)
    return Record(
        where,
        image,
        name if item is None else item,
        first_captions(fields, keys),
        {language: text_list(names) for language, names in translations.items()},
        split,
        text_field(fields, "style"),
        text_field(fields, "group", True),
        text_field(fields, "subgroup"),
        name,
    )


def text_field(fields: dict, name: str, strict: bool = False) -> str | None:
    """A text, or a number as a text; None for an empty one. Anything else is None too, or with
    `strict` raises ValueError naming the field."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int | float) and not isinstance(value, bool) and name != "image":
        return str(value)
    if strict:
        raise ValueError(f"{name} must be a text, got {value!r}")
    return None


def first_captions(fields: dict, keys: Iterable[str]) -> list[str]:
    """The captions of the first key that has any. Raises ValueError if none has, but one is
    malformed."""
    malformed = None
    for key in keys:
        try:
            if texts := text_list(fields.get(key)):
                return texts
        except ValueError as error:
            malformed = malformed or error
    if malformed:
        raise malformed
    return []


def text_list(value) -> list[str]:
    """A text, a list of texts, or null, as a list without empty texts; instead of a text, an object
    with `caption` as COCO has it."""
    entries = value or [] if isinstance(value, list | None) else [value]
    texts = [entry.get("caption") if isinstance(entry, dict) else entry for entry in entries]
    texts = [text for entry in texts for text in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captions must be a text or a list of texts, got {value!r}")
    return [text.strip() for text in texts if text.strip()]


def check_record(record: Record, options: Options | None = None) -> Record | Skipped:
    """The record; or the reason to skip it, if its texts or the path of its picture are bad."""
    if not record.captions:
        return Skipped(record.where, "empty caption")
    about = (record.item, record.split, record.style, record.group, record.subgroup)
    every = [str(record.image), *record.captions, *filter(None, about)]
    found = filter(HALF.search, itertools.chain(every, *record.translations.values()))
    if (half := next(found, None)) is not None:  # JSON's "\ud83d" without its other half
        return Skipped(record.where, f"half a character: in {half!r}")
    if options and (told := options.leads_out(record.image)):
        return Skipped(record.where, f"outside the folder: picture {record.image} {told}")
    return record
