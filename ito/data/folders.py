"""Folders of pictures: each with its captions in a file beside it, in a metadata file, or in the
name of its folder."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ito.data.fields import PICTURES, SPLITS, Options, Record, Skipped, check_record, from_fields
from ito.data.tables import read_csv, read_jsonl, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
Walk = list[tuple[Path, list[str]]]


def walk(folder: Path) -> Walk:
    """All folders below `folder`, with their files, in order. Links are followed, but into each
    folder once; hidden files are left out."""
    found, seen = [], set()
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found.append((Path(top), sorted(name for name in files if not name.startswith("."))))
    return found


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in PICTURES


def kinds_of(found: Walk) -> Iterator[str]:
    """The formats that a folder of pictures fits, the likeliest first; none without captions."""
    if any(name in METADATA for _, files in found for name in files):
        yield "imagefolder"

    def stems(kinds: Iterable[str]) -> list[set[str]]:
        parts = [map(os.path.splitext, files) for _, files in found]
        return [{stem for stem, end in part if end[1:].lower() in kinds} for part in parts]

    pictures = stems(PICTURES)
    if any(map(set.intersection, pictures, stems(("txt", "json")))):
        yield "folder"
    if any(pictures[1:]):
        yield "imagefolder"


def split_of(place: Path) -> str | None:
    """The split that the first folder of a relative path names, or as Hugging Face's parquet files
    the file itself, `train-00000-of-00001.parquet`."""
    first = place.parts[0].lower() if place.parts else ""
    first = first.partition("-")[0] if first.endswith((".parquet", ".tar")) else first
    return first if first in SPLITS else None


def read_sidecars(root: Path, found: Walk, options: Options) -> Iterator[Record | Skipped]:
    """Pictures, each with a `.txt` or `.json` of its name. With both, see `merged`."""
    for folder, files in found:
        names, here = {}, folder.relative_to(root)
        for name in files:
            stem, suffix = os.path.splitext(name)
            names[stem + suffix.lower()] = name
        for name in filter(is_picture, files):
            stem = os.path.splitext(name)[0]
            where, contents = str(folder / name), {}
            try:
                for kind in ("txt", "json"):
                    if f"{stem}.{kind}" in names:
                        beside = folder / names[f"{stem}.{kind}"]
                        if told := options.leads_out(beside):
                            raise ValueError(f"{beside} {told}")
                        contents[kind] = read_text(beside)
                record = from_contents(contents, where, folder / name, (here / name).as_posix())
                record.split = record.split or split_of(here)
                yield check_record(record, options)
            except (ValueError, RecursionError, OSError) as error:
                yield Skipped(where, f"malformed: {error}")


def from_contents(contents: dict[str, str], where: str, image, name: str) -> Record:
    """The record of a picture's `.txt` and `.json`. With both the `.txt` is the caption, and the
    `.json` metadata; but its captions count if the `.txt` is one of them.

    Raises ValueError if the `.json` is none, or a field of it is malformed.
    """
    fields = json.loads(contents["json"]) if "json" in contents else {}
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {str(fields)[:60]}")
    record = from_fields(fields, where, image, name)
    text = contents.get("txt", "").strip()
    if text and text not in record.captions:
        record.captions = [text]
    return record


def read_imagefolder(root: Path, found: Walk, options: Options) -> Iterator[Record | Skipped]:
    """Pictures with a metadata file as Hugging Face's datasets have it, or with their class's name
    as caption, as torchvision has them. The top folders may be splits."""
    metadata = [(folder, name) for folder, files in found for name in METADATA if name in files]
    for folder, name in metadata:
        source, here = folder / name, folder.relative_to(root)
        if options.leads_out(source):
            raise ValueError(f"{source} leads out of the folder, which --untrusted-data forbids")
        prefix = "" if here == Path() else f"{here.as_posix()}/"
        read = partial(read_csv, separator=",") if name.endswith(".csv") else read_jsonl
        yield from in_split(partial(read, source, options, prefix=prefix), split_of(here))
    if metadata:
        return
    # a class may be called "train": a split has folders of classes
    parts = [at.relative_to(root).parts for at, files in found if any(map(is_picture, files))]
    splits = {place[:1] for place in parts if len(place) > 1 and split_of(Path(place[0]))}
    names = {name for place in parts for name in place[place[:1] in splits :][:1]}
    if len(names) == 1 and options.data_format == "auto":
        raise ValueError(
            f"{root}: all pictures would have one caption, their folder's name {min(names)!r}: are "
            "the classes, or the captions, elsewhere? Else set --data-format imagefolder"
        )
    for folder, files in found:
        here = folder.relative_to(root)
        split = split_of(here) if here.parts[:1] in splits else None
        classes = here.parts[bool(split) :]
        for name in filter(is_picture, files):
            place = str(folder / name)
            if not classes:
                yield Skipped(place, "in no folder of a class")
                continue
            caption = {"caption": classes[0].replace("_", " "), "split": split}
            record = from_fields(caption, place, folder / name, (here / name).as_posix())
            yield check_record(record, options)


def in_split(shard: Callable, split: str | None) -> Iterator[Record | Skipped]:
    """The records of a shard; those that name no split are in this one."""
    for record in shard():
        if isinstance(record, Record):
            record.split = record.split or split
        yield record
