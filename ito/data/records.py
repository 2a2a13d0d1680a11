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
from ito.data.fields import EXPECTED, PICTURES, Options, Record, Skipped, check_record, text_list
from ito.data.shards import PIPE, TEXTS, URLS, Sample, expand, read_samples
from ito.data.tables import decode_text, open_parquet, read_coco, read_csv, read_jsonl, read_text
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
    pattern, path = str(path), Path(path)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    suffix = ".tar" if f"::{PIPE}" in f"::{pattern}" else suffix
    if pattern.startswith(URLS):
        raise ValueError(f"{pattern} is a URL: download it, or read a tar by 'pipe:curl -s URL'")
    known = {".jsonl": "jsonl", ".json": "coco", ".tsv": "tsv", ".parquet": "parquet"}
    fitting: Iterable[str] = ("csv", "tsv", "jsonl", "coco", "parquet")  # of a file
    if is_pattern(pattern) or suffix == ".tar":
        if suffix in (".csv", ".tsv", ".json", ".jsonl"):
            raise ValueError(f"{path} is a pattern: those are for .tar and .parquet files")
        fitting = ("parquet",) if suffix == ".parquet" else ("webdataset",)
    elif pattern and path.is_dir():
        fitting = formats_of_folder(path)
        first = next(fitting, None)
        fitting = dict.fromkeys((first, *(fitting if data_format != "auto" else ())))
        if not first:
            raise FileNotFoundError(
                f"{path} holds no captions.jsonl, .tar, .parquet, nor a picture with a caption: in "
                "a .txt or .json of its name, metadata.jsonl, metadata.csv, or a folder's name"
            )
    elif not pattern or not path.exists():
        raise FileNotFoundError(f"no data at {pattern or repr(pattern)}: {EXPECTED}")
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


def is_pattern(path: str) -> bool:
    signs = ("::", *"*?[{")
    return path.startswith(PIPE) or (not os.path.exists(path) and any(s in path for s in signs))


def formats_of_folder(path: Path) -> Iterator[str]:
    if (path / "captions.jsonl").exists():
        yield "jsonl"
    kinds = (("tar", "webdataset"), ("parquet", "parquet"))
    yield from (form for suffix, form in kinds if any(path.glob(f"*.{suffix}")))
    yield from folders.kinds_of(folders.walk(path))
    yield from (form for suffix, form in kinds if any(path.glob(f"*/*.{suffix}")))


def files_below(path: Path | str, suffix: str) -> list[Path | str]:
    """The files of a folder, or if it has none, of the folders in it; else `path` itself."""
    if isinstance(path, str) or not path.is_dir():
        return [path]
    return sorted(path.glob(f"*.{suffix}")) or sorted(path.glob(f"*/*.{suffix}"))


def open_shards(path: str | Path, **options: str | bool | None) -> Shards:
    """The shards of the data at `path`, whose format is found by looking: see docs/data.md.

    The options are those of `ito.data.fields.Options`. By default the item of a picture is its
    path; in a tar the path of the tar, from the folder that all tars share, and the sample's name.

    With `untrusted_data` a picture, or a tar of a folder, is skipped if it lies outside the given
    folder, or that of the file, and outside `image_root`, after links are followed. Only regular
    files are read; but a CSV may be a named pipe.

    Raises FileNotFoundError if there is no such file, and ValueError naming the file if it is not
    of its format. Malformed rows, lines and samples are skipped.
    """
    pattern, path, options = str(path), Path(path), Options(**options)
    if options.untrusted_data and not is_pattern(pattern):
        root = follow_links(path if path.is_dir() else path.parent)
        options = dataclasses.replace(options, root=root)
        if re.fullmatch("/dev|/dev/fd|/proc/.*", str(root)):  # <(a program) is /dev/fd/63
            raise ValueError(
                f"{path} lies in no folder of pictures, as --untrusted-data needs: "
                "write the CSV to a file next to the pictures"
            )
    form = find_format(pattern, options.data_format)
    several = form in ("webdataset", "parquet")
    shards = Shards((open_files if several else open_rows)(pattern, form, options))
    shards.format = form
    return shards


def open_rows(path: str, form: str, options: Options) -> list[Shard]:
    path = Path(path)
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


def open_files(pattern: str, form: str, options: Options) -> list[Shard]:
    """The shards of tars or parquet files: one file, a pattern, a folder of them, or commands."""
    suffix, in_folder = "tar" if form == "webdataset" else "parquet", os.path.isdir(pattern)
    named = expand(pattern)
    files = [file for at in named for file in files_below(at, suffix)]
    paths = [at for at in files or named if isinstance(at, Path)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"no data at {', '.join(missing[:3])} ({len(missing)} missing)")
    # Items are named by the path below this folder, so that they do not depend on where it is.
    folder = os.path.commonpath([path.parent for path in paths] or ["."])
    if options.untrusted_data and not in_folder:  # a tar has no pictures outside it
        root = follow_links(folder) if form == "parquet" else None
        options = dataclasses.replace(options, root=root)
    shards = []
    for file in files:
        name = file.relative_to(folder) if isinstance(file, Path) else Path(file)
        if in_folder and (told := options.leads_out(file)):
            found = [partial(iter, [Skipped(str(file), f"outside the folder: {told}")])]
        elif form == "parquet":
            found = open_parquet(file, str(name), options)
        else:
            found = [partial(read_tar, file, str(name), options)]
        split = folders.split_of(name) if in_folder else None
        shards += [partial(folders.in_split, shard, split) for shard in found] if split else found
    return shards


def read_tar(tar: Path | str, name: str, options: Options) -> Iterator[Record | Skipped]:
    seen, options = set(), labels_of(tar, options)
    try:
        for sample in read_samples(tar):
            where = f"{tar}:{sample.key}"
            if sample.key in seen:
                place = next(iter(sample.members.values())).offset
                yield Skipped(f"{where}@{place}", "the tar has a sample of this name already")
                continue
            seen.add(sample.key)
            try:
                yield from_sample(sample, where, f"{name}/{sample.key}", options)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, wrong fields
                yield Skipped(where, f"malformed: {error}")
    except ValueError as error:
        yield Skipped(str(tar), str(error))


def labels_of(tar: Path | str, options: Options) -> Options:
    """The options with what clip_benchmark's sets have beside the tars, or above their split."""

    def read(name: str) -> tuple[str, ...] | None:
        places = [place / name for place in tar.parents[:2]] if isinstance(tar, Path) else []
        found = next(filter(os.path.exists, places), None)
        if found and options.untrusted_data and found.is_symlink():
            raise ValueError(f"{found} is a link, which --untrusted-data forbids")
        return tuple(read_text(found).splitlines()) if found else None

    lines = (read("dataset_type.txt") or [""])[0].strip() == "retrieval"
    return dataclasses.replace(options, classes=read("classnames.txt"), lines=lines)


def from_sample(sample: Sample, where: str, name: str, options: Options) -> Record | Skipped:
    pictures = [kind for kind in sample.members if kind in PICTURES]
    if not pictures:
        return Skipped(where, f"no picture in the sample: among .{', .'.join(sample.members)}")
    texts = {kind: sample.members[kind].data for kind in TEXTS if kind in sample.members}
    label = texts.pop("cls", None)
    contents = {kind: decode_text(data) for kind, data in texts.items()}
    record = folders.from_contents(contents, where, sample.members[pictures[0]], name)
    record.name = sample.key  # where the tar lies says nothing about the picture
    if options.lines and "txt" in contents:
        record.captions = text_list(contents["txt"].splitlines())
    elif label is not None and not record.captions:
        if options.classes is None:
            return Skipped(where, "no classnames.txt: beside or above the tar, for its .cls")
        number, last = label.decode(errors="replace").strip(), len(options.classes) - 1
        if not number.isdecimal() or int(number) > last:
            raise ValueError(f".cls must be 0 to {last}, as classnames.txt, got {number!r}")
        record.captions = text_list(options.classes[int(number)])
    return check_record(record)


def cpu_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
