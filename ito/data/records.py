"""Reads data sets of several formats as records of a picture and its captions.

A source is a list of shards, so that a data set that does not fit into memory can be read shard by
shard: the tars of a WebDataset, the row groups of a parquet file, or a thousand rows of a table.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ito.data import folders
from ito.data.fields import EXPECTED, PICTURES, Options, Record, Skipped, check_record
from ito.data.shards import Sample, expand, read_samples
from ito.data.tables import open_parquet, read_coco, read_csv, read_jsonl
from ito.files import follow_links

ROWS = 1000  # of a table, per shard
FORMATS = ("folder", "imagefolder", "csv", "tsv", "jsonl", "coco", "parquet", "webdataset")

Shard = Callable[[], Iterable[Record | Skipped]]


class Shards(list[Shard]):
    """The shards of a data set, and its `format`, one of FORMATS."""

    format = ""


def find_format(path: str | Path, data_format: str = "auto") -> str:
    """The format of the data at `path`, one of FORMATS, by its name and, of a folder, its content.

    Raises ValueError if `data_format` does not fit, and FileNotFoundError if there is no data.
    """
    path = Path(path)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    known = {".jsonl": "jsonl", ".json": "coco", ".tsv": "tsv", ".parquet": "parquet"}
    fitting: Iterable[str] = ("csv", "tsv", "jsonl", "coco", "parquet")  # of a file
    if is_pattern(path) or suffix == ".tar":
        if suffix in (".csv", ".tsv", ".json", ".jsonl"):
            raise ValueError(f"{path} is a pattern: those are for .tar and .parquet files")
        fitting = ("parquet",) if suffix == ".parquet" else ("webdataset",)
    elif path.is_dir():
        fitting = formats_of_folder(path)
        first = next(fitting, None)
        fitting = dict.fromkeys((first, *(fitting if data_format != "auto" else ())))
        if not first:
            raise FileNotFoundError(
                f"{path} holds no captions.jsonl, no .tar, no .parquet and no picture with a "
                "caption: in a .txt or .json of its name, in metadata.jsonl or metadata.csv, or in "
                "the name of a folder"
            )
    elif not path.exists():
        raise FileNotFoundError(f"no data at {path}: {EXPECTED}")
    elif suffix[1:].lower() in PICTURES:
        raise ValueError(f"{path} is one picture: {EXPECTED}")
    elif data_format == "auto":
        return known.get(suffix.lower(), "csv")
    if data_format == "auto":
        return next(iter(fitting))
    if data_format not in fitting:
        raise ValueError(
            f"--data-format {data_format} does not fit {path}, which can be {' or '.join(fitting)}"
        )
    return data_format


def is_pattern(path: Path) -> bool:
    text = str(path)
    return not path.exists() and ("::" in text or any(sign in text for sign in "*?[{"))


def formats_of_folder(path: Path) -> Iterator[str]:
    if (path / "captions.jsonl").exists():
        yield "jsonl"
    kinds = (("tar", "webdataset"), ("parquet", "parquet"))
    yield from (form for suffix, form in kinds if any(path.glob(f"*.{suffix}")))
    yield from folders.kinds_of(folders.walk(path))
    yield from (form for suffix, form in kinds if any(path.glob(f"*/*.{suffix}")))


def files_below(path: Path, suffix: str) -> list[Path]:
    """Files of a folder, or if it has none, of the folders in it."""
    return sorted(path.glob(f"*.{suffix}")) or sorted(path.glob(f"*/*.{suffix}"))


def open_shards(path: str | Path, **options: str | bool | None) -> Shards:
    """The shards of the data at `path`, whose format is found by looking: see docs/data.md.

    The options are those of `ito.data.fields.Options`. By default the item of a picture is its
    path; in a tar the path of the tar, from the folder that all tars share, and the sample's name.

    Paths of pictures may lead anywhere, unless `untrusted_data`. Then a picture, or a tar of a
    folder, is skipped if it lies outside the given folder, or that of the file, and outside
    `image_root`, after links are followed. Links and names inside a tar never lead to files. Only
    regular files are read; but a CSV may be a named pipe.

    Raises FileNotFoundError if there is no such file, and ValueError naming the file if it is not
    of its format. Malformed rows, lines and samples are skipped.
    """
    path, options = Path(path), Options(**options)
    folder = path if path.is_dir() else path.parent
    if options.untrusted_data and not is_pattern(path):
        options = dataclasses.replace(options, root=follow_links(folder))
        # <(a program) is /dev/fd/63
        if re.fullmatch("/dev|/dev/fd|/proc/.*", str(options.root)):
            raise ValueError(
                f"{path} lies in no folder of pictures, as --untrusted-data needs: "
                "write the CSV to a file next to the pictures"
            )
    form = find_format(path, options.data_format)
    shards = Shards(open_format(path, form, options))
    shards.format = form
    return shards


def open_format(path: Path, form: str, options: Options) -> list[Shard]:
    if form in ("webdataset", "parquet"):
        return open_files(path, form, options)
    if form in ("folder", "imagefolder"):
        read = folders.read_sidecars if form == "folder" else folders.read_imagefolder
        rows = read(path, folders.walk(path), options)
    elif form == "jsonl":
        source = path / "captions.jsonl" if path.is_dir() else path
        if path.is_dir() and options.leads_out(source):
            raise ValueError(f"{source} leads out of the folder, which --untrusted-data forbids")
        rows = read_jsonl(source, options)
    elif form == "coco":
        rows = read_coco(path, options)
    else:
        separator = "\t" if form == "tsv" else options.csv_separator
        rows = read_csv(path, options, separator, header=form == "csv")
    rows = list(rows)
    return [partial(iter, rows[at : at + ROWS]) for at in range(0, len(rows), ROWS)]


def open_files(path: Path, form: str, options: Options) -> list[Shard]:
    """The shards of tars or parquet files: one file, a pattern, or a folder of them."""
    suffix = "tar" if form == "webdataset" else "parquet"
    named = expand(str(path))
    files = [f for at in named for f in (files_below(at, suffix) if at.is_dir() else [at])]
    if missing := [str(file) for file in files or named if not file.is_file()]:
        raise FileNotFoundError(f"no data at {', '.join(missing[:3])} ({len(missing)} missing)")
    # Items are named by the path below this folder, so that they do not depend on where it is.
    folder = os.path.commonpath([file.parent for file in files])
    if options.untrusted_data and not path.is_dir():  # a tar has no pictures outside it
        root = follow_links(folder) if form == "parquet" else None
        options = dataclasses.replace(options, root=root)
    shards = []
    for file in files:
        name = file.relative_to(folder)
        split = folders.split_of(name) if path.is_dir() else None
        if form == "webdataset":
            found = [partial(read_tar, file, str(name), options)]
        elif path.is_dir() and (told := options.leads_out(file)):
            found = [partial(iter, [Skipped(str(file), f"outside the folder: {told}")])]
        else:
            found = open_parquet(file, str(name), options)
        shards += [partial(folders.in_split, shard, split) for shard in found] if split else found
    return shards


# --- tars ---


def read_tar(tar: Path, name: str, options: Options) -> Iterator[Record | Skipped]:
    if told := options.leads_out(tar):
        yield Skipped(str(tar), f"outside the folder: {told}")
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
                yield Skipped(where, f"malformed: {error}")
    except ValueError as error:
        yield Skipped(str(tar), f"damaged tar: {error}")


def from_sample(sample: Sample, where: str, name: str) -> Record | Skipped:
    pictures = [kind for kind in sample.members if kind in PICTURES]
    if not pictures:
        kinds = ", ".join(f".{kind}" for kind in sample.members)
        return Skipped(where, f"no picture in the sample: among {kinds}")
    contents = {kind: data.decode() for kind, data in sample.contents.items()}
    image = sample.members[pictures[0]]
    return check_record(folders.from_contents(contents, where, image, name))


def cpu_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
