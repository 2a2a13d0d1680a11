"""Reads data sets of several formats as records of a picture and its captions.

A source is a list of shards, so that a data set that does not fit into memory can be read shard by
shard: the tars of a WebDataset, or a thousand rows of a table.
"""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ito.data.shards import Member, Sample, expand, read_samples
from ito.files import follow_links, irregular, require_file

PICTURES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
ROWS = 1000  # of a table, per shard
EXPECTED = "expected a folder with captions.jsonl or tars, a CSV, or a tar pattern"


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


class Skipped(NamedTuple):
    """A record that is left out: its place (file and row), and the reason."""

    where: str
    reason: str


Shard = Callable[[], Iterable[Record | Skipped]]


def open_shards(
    path: str | Path,
    *,
    csv_separator: str = "\t",
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
    untrusted_data: bool = False,
) -> list[Shard]:
    """The shards of a folder with `captions.jsonl`, of an open_clip CSV, or of WebDataset tars.

    - `captions.jsonl` has one object per line: `image` (relative to the folder), `captions` (a
      list) or `caption`, and optionally `item` (lines with the same one show the same thing;
      default: the image's path), `split`, `style`, `group`, `subgroup`, `translations`.
    - The CSV has open_clip's options. Its paths are relative to the CSV or, as in open_clip, to the
      working directory.
    - Tars are given as a folder, as one file, or as a pattern, `shard-{00000..00012}.tar`. The
      captions of a sample are in its `.json`, with the fields of a line of `captions.jsonl`, or in
      its `.txt`. By default its item is the path of the tar, from the folder that all tars share,
      and the sample's name.

    Paths of pictures may lead anywhere, unless `untrusted_data`. Then a picture, or a tar of a
    folder, is skipped if it lies outside the given folder, or that of the CSV, after links are
    followed. Links and names inside a tar never lead to files. Only regular files are read; but the
    CSV may be a named pipe.

    Raises FileNotFoundError if there is no such file, and ValueError naming file and row if a line
    of `captions.jsonl` is malformed. Malformed samples of a tar and rows of a CSV are skipped.
    """
    path = Path(path)
    if path.suffix == ".tar" or (path.is_dir() and not (path / "captions.jsonl").exists()):
        tars = expand(str(path)) if path.suffix == ".tar" else sorted(path.glob("*.tar"))
        if not tars:
            raise FileNotFoundError(f"{path} holds no captions.jsonl and no .tar")
        if missing := [str(tar) for tar in tars if not tar.is_file()]:
            raise FileNotFoundError(f"no data at {', '.join(missing[:3])} ({len(missing)} missing)")
        # Items are named by the path below this folder, so that they do not depend on where it is.
        folder = os.path.commonpath([tar.parent for tar in tars])
        root = follow_links(path) if untrusted_data and path.is_dir() else None
        return [partial(read_tar, tar, str(tar.relative_to(folder)), root) for tar in tars]
    folder = path if path.is_dir() else path.parent
    root = follow_links(folder) if untrusted_data else None
    if root and re.fullmatch("/dev|/dev/fd|/proc/.*", str(root)):  # <(a program) is /dev/fd/63
        raise ValueError(
            f"{path} lies in no folder of pictures, as --untrusted-data needs: "
            "write the CSV to a file next to the pictures"
        )
    if path.is_dir():
        source = path / "captions.jsonl"
        if root and leads_out(source, root):
            raise ValueError(f"{source} leads out of the folder, which --untrusted-data forbids")
        rows = read_jsonl(source)
    elif path.suffix == ".jsonl":
        raise ValueError(f"{path}: name the folder that holds captions.jsonl, not the file")
    elif path.suffix[1:].lower() in PICTURES:
        raise ValueError(f"{path} is one picture: {EXPECTED}")
    elif path.exists():
        rows = read_csv(path, csv_separator, csv_img_key, csv_caption_key)
    else:
        raise FileNotFoundError(f"no data at {path}: {EXPECTED}")
    checked = [check_record(r, root) if isinstance(r, Record) else r for r in rows]
    return [partial(iter, checked[at : at + ROWS]) for at in range(0, len(checked), ROWS)]


def check_record(record: Record, root: Path | None = None) -> Record | Skipped:
    """The record; or the reason to skip it, if its texts or the path of its picture are bad."""
    if not record.captions:
        return Skipped(record.where, "empty caption")
    about = [record.item, record.split, record.style, record.group, record.subgroup]
    every = [str(record.image), *record.captions, *filter(None, about)]
    for found in itertools.chain(every, *record.translations.values()):
        try:
            found.encode()
        except UnicodeEncodeError:  # JSON's "\ud83d" without its other half
            return Skipped(record.where, f"half a character in {found!r}")
    if root and leads_out(record.image, root):
        return Skipped(record.where, f"picture {record.image} leads out of {root}")
    return record


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path, after its links are followed, is outside the folder `root`."""
    return "\0" in str(path) or not Path(os.path.realpath(path)).is_relative_to(root)


# --- tars ---


def read_tar(tar: Path, name: str, root: Path | None) -> Iterator[Record | Skipped]:
    if root and leads_out(tar, root):
        yield Skipped(str(tar), f"leads out of {root}")
        return
    seen = set()
    try:
        for sample in read_samples(tar):
            where = f"{tar}:{sample.key}"
            if sample.key in seen:
                place = next(iter(sample.members.values())).offset
                yield Skipped(f"{where}@{place}", "the tar has a sample of this name already")
                continue
            seen.add(sample.key)
            try:
                yield from_sample(sample, where, f"{name}/{sample.key}")
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, wrong fields
                yield Skipped(where, str(error))
    except ValueError as error:
        yield Skipped(str(tar), str(error))


def from_sample(sample: Sample, where: str, name: str) -> Record | Skipped:
    pictures = [kind for kind in sample.members if kind in PICTURES]
    if not pictures:
        return Skipped(
            where, f"no picture among {', '.join(f'.{kind}' for kind in sample.members)}"
        )
    fields = json.loads(sample.contents.get("json", b"{}"))
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {str(fields)[:60]}")
    record = from_fields(fields, where, sample.members[pictures[0]], name)
    if not record.captions and "txt" in sample.contents:
        record.captions = text_list(sample.contents["txt"].decode())
    return check_record(record)


# --- captions.jsonl ---


def read_jsonl(source: Path) -> list[Record]:
    lines = enumerate(read_text(source).split("\n"), 1)
    return [parse(line, f"{source}:{row}", source.parent) for row, line in lines if line.strip()]


def parse(line: str, where: str, folder: Path) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {line.strip()[:60]}")
        image = text_field(fields, "image")
        if image is None:
            raise ValueError(f"names no image; its fields are {list(fields)}")
        if "captions" not in fields and "caption" not in fields:
            raise ValueError(f"has no captions or caption; its fields are {list(fields)}")
        return from_fields(fields, where, folder / image, image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def from_fields(fields: dict, where: str, image: Path | Member, name: str) -> Record:
    """The record of a JSON object. Its item is the image's name by default.

    Raises ValueError naming the malformed field.
    """
    translations = fields.get("translations") or {}
    if not isinstance(translations, dict):
        raise ValueError(f"translations must be an object, got {translations!r}")
    if "/" in (text_field(fields, "split") or ""):  # names of scores begin with it: "val/i2t/R@1"
        raise ValueError(f"split must be a name without /, got {fields['split']!r}")
    return Record(
        where,
        image,
        text_field(fields, "item") or name,
        text_list(fields.get("captions")) or text_list(fields.get("caption")),
        {language: text_list(names) for language, names in translations.items()},
        *(text_field(fields, name) for name in ("split", "style", "group", "subgroup")),
    )


def text_field(fields: dict, name: str) -> str | None:
    value = fields.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def text_list(value) -> list[str]:
    """A text, a list of texts, or null, as a list without empty texts."""
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"captions must be a text or a list of texts, got {value!r}")
    return [text.strip() for text in value if text.strip()]


# --- CSV ---


def read_csv(
    source: Path, separator: str, img_key: str, caption_key: str
) -> list[Record | Skipped]:
    lines = list(io.StringIO(read_text(source, pipe=True), newline=""))
    try:
        after, columns = read_row(lines, 0, separator) if lines else (0, [])
    except csv.Error as error:
        raise ValueError(f"{source}:1: not CSV: {error}") from None
    missing = [repr(key) for key in (img_key, caption_key) if key not in columns]
    if missing:
        raise ValueError(
            f"{source}:1: no column {', '.join(missing)}; found {columns} with the separator "
            f"{separator!r}; set --csv-separator, --csv-img-key, --csv-caption-key to the file's"
        )
    img, caption = columns.index(img_key), columns.index(caption_key)

    def is_row(line: str) -> bool:
        cells = line.rstrip("\r\n").split(separator)
        return len(cells) == len(columns) and Path(cells[img]).suffix[1:].lower() in PICTURES

    records = []
    while after < len(lines):
        at, where = after, f"{source}:{after + 1}"
        try:
            after, row = read_row(lines, at, separator)
            if any(is_row(line) for line in lines[at + 1 : after]):
                raise csv.Error(f"its quote is closed in line {after} only, with rows between")
        except csv.Error as error:  # skip this line only, not all lines up to the next quote
            records.append(Skipped(where, f"not CSV: {error}"))
            after = at + 1
            continue
        if not row:
            continue
        row += [""] * (len(columns) - len(row))
        name = row[img]
        next_to_csv = source.parent / name
        path = next_to_csv if next_to_csv.exists() else Path(name)
        records.append(
            Record(where, path, name, text_list(row[caption]), {}, None, None, None, None)
        )
    return records


def read_row(lines: list[str], at: int, separator: str) -> tuple[int, list[str]]:
    """The index after the row that begins at line `at`, and its cells. Raises csv.Error."""
    rest = map(lines.__getitem__, range(at, len(lines)))
    reader = csv.reader(rest, delimiter=separator, strict=True)
    row = next(reader)
    return at + reader.line_num, row


def read_text(source: Path, pipe: bool = False) -> str:
    """The text of a regular file, or with `pipe` also of a named pipe."""
    if not (pipe and irregular(source) == "a named pipe"):
        require_file(source)
    data = source.read_bytes()
    try:
        return data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        hint = f"; {EXPECTED}" if pipe else ""
        raise ValueError(f"{source}:{row}: not UTF-8: {error.reason}{hint}") from None


def cpu_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
