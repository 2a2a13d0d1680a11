"""Lists of pictures and captions: JSON lines, CSV and TSV, COCO's captions, parquet."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from ito.data.fields import (
    CAPTION_KEYS,
    DOWNLOAD,
    EXPECTED,
    IMAGE_KEYS,
    PICTURES,
    Options,
    Record,
    Skipped,
    check_record,
    from_fields,
    from_row,
    is_url,
)
from ito.files import irregular, require_file

GROWTH = 50  # of a table when it is unpacked, at most; gzip reaches 1000, captions 3 to 10
LOOKED_AT = 100  # rows of a TSV without a header, to find out its columns


def read_text(source: Path, pipe: bool = False) -> str:
    """The text of a regular file, with `pipe` also of a named pipe; it may be gzipped."""
    if not (pipe and irregular(source) == "a named pipe"):
        require_file(source)
    data = source.read_bytes()
    try:
        if data.startswith(b"\x1f\x8b"):
            most = GROWTH * len(data) + 2**24
            with gzip.open(io.BytesIO(data)) as packed:
                data = packed.read(most + 1)
            if len(data) > most:
                raise OSError(f"it expands to more than {GROWTH} times its size")
        return decode_text(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{source}: damaged gzip: {error}") from None
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        hint = f"; {EXPECTED}" if pipe else ""
        raise ValueError(f"{source}:{row}: not UTF-8: {error.reason}{hint}") from None


def decode_text(data: bytes) -> str:
    """UTF-16 by its byte order mark; else UTF-8, with or without one."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def read_jsonl(source: Path, options: Options, prefix: str = "") -> Iterator[Record | Skipped]:
    for row, line in enumerate(read_text(source).split("\n"), 1):
        where = f"{source}:{row}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Skipped(where, f"not JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield from_row(fields, where, options, [source.parent], prefix)
        else:
            yield Skipped(where, f"malformed: expected a JSON object, got {line.strip()[:60]}")


def read_coco(source: Path, options: Options) -> Iterator[Record | Skipped]:
    try:
        found = json.loads(read_text(source))
        images, notes = found["images"], found["annotations"]
        captions: dict = {str(image["id"]): [] for image in images}
        notes = [(str(note.get("image_id")), note.get("caption"), note.get("id")) for note in notes]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        about = "is not COCO's captions, an object with images and annotations, lists of objects"
        raise ValueError(f"{source} {about}: {error!r}") from None
    for image, caption, name in notes:
        if image in captions and isinstance(caption, str):
            captions[image].append(caption)
        else:
            kind = "annotation without a caption" if image in captions else "annotation of no image"
            yield Skipped(f"{source}:annotation {name}", kind)
    for image in images:
        number = str(image["id"])
        fields = image | {"captions": captions[number]}
        yield from_row(fields, f"{source}:image {number}", options, [source.parent])


def read_csv(
    source: Path, options: Options, separator: str, prefix: str = "", header: bool = True
) -> Iterator[Record | Skipped]:
    """Rows of a CSV; with `header=False` the first row may be one, or the columns of the path and
    the caption are found out from the cells."""
    lines = list(io.StringIO(read_text(source, pipe=True), newline=""))
    columns: list[str] = []

    def is_row(line: str) -> bool:
        cells = line.rstrip("\r\n").split(separator)
        return len(cells) == len(columns) and Path(cells[at_img]).suffix[1:].lower() in PICTURES

    rows = read_rows(lines, separator, is_row)
    _, cells = next(rows, (0, []))
    if isinstance(cells, csv.Error):
        raise ValueError(f"{source}:1: not CSV: {cells}; set --csv-separator, now {separator!r}")
    columns = [cell.strip() for cell in cells]
    img, caption = choose(columns, options)
    if not header and not (img or caption):
        rows = read_rows(lines, separator, is_row)
        columns = guess_columns(source, lines, options, separator)
        img, caption = "image", "caption"
    others = {",": " comma", ";": " semicolon", "\t": " tab", "|": " pipe"}
    other = next(
        (
            name
            for x, name in others.items()
            if x != separator and len(columns) == 1 and x in columns[0]
        ),
        "",
    )
    what = f"with the separator {separator!r}; set --csv-separator{other}, "
    require_columns(f"{source}:1", (img, caption), columns, options, what)
    at_img = columns.index(img)
    folders, first = [source.parent, Path()], True  # open_clip's paths are the working directory's
    for at, row in rows:
        where = f"{source}:{at + 1}"
        if isinstance(row, csv.Error):
            yield Skipped(where, f"not CSV: {row}")
        elif any(row[len(columns) :]):
            yield Skipped(where, f"malformed: {len(row)} cells, but {len(columns)} columns")
        elif row:
            fields = dict(zip(columns, row, strict=False))
            url = fields["image"] = fields.pop(img, None)
            if first and is_url(url or ""):
                raise ValueError(f"{where}: its pictures are URLs, as {url}: {DOWNLOAD}")
            first = False
            yield from_row(fields, where, options, folders, prefix, [caption])


def read_rows(
    lines: list[str], separator: str, is_row: Callable[[str], bool]
) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The index of each row's first line, and its cells, or why it is none. Of a row whose quote is
    not closed, or closed after other rows, only the first line is lost."""
    after, strict = 0, True
    while after < len(lines):
        start = after
        rest = map(lines.__getitem__, range(start, len(lines) if strict else start + 1))
        reader = csv.reader(rest, delimiter=separator, strict=strict)
        try:
            for row in reader:
                end = start + reader.line_num
                if end > after + 1 and any(map(is_row, lines[after + 1 : end])):
                    raise csv.Error(f"its quote is closed in line {end} only, with rows between")
                yield after, row
                after = end
            strict = True
        except csv.Error as error:
            strict = not strict or lines[after].count('"') % 2  # not of: "quoted" words first
            if strict:
                yield after, error
                after += 1


def choose(columns: list[str], options: Options) -> list[str | None]:
    """The columns of the pictures and the captions: those of the options' names; where an option
    has its default, also of another known name."""
    images, captions = (options.csv_img_key,), (options.csv_caption_key,)
    if images == (Options.csv_img_key,):
        images += IMAGE_KEYS
    if captions == (Options.csv_caption_key,):
        captions += CAPTION_KEYS
    return [next((n for n in names if n in columns), None) for names in (images, captions)]


def require_columns(where: str, found: Iterable, columns: list[str], options: Options, what: str):
    """Raises ValueError naming the columns that are missing, or that the pictures are URLs."""
    keys = (options.csv_img_key, options.csv_caption_key)
    missing = [repr(key) for name, key in zip(found, keys, strict=True) if not name]
    if repr(keys[0]) in missing and any(c.lower().endswith(("url", "link")) for c in columns):
        raise ValueError(f"{where}: its pictures are URLs: {DOWNLOAD}")
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; found {columns} {what}--csv-img-key, "
            "--csv-caption-key to the file's"
        )


def guess_columns(source: Path, lines: list[str], options: Options, separator: str) -> list[str]:
    """Names for the columns of a table without a header: most cells of the `image` end as pictures
    do, name a file, or are URLs; the `caption` is the longest of the others."""
    rows = list(csv.reader(lines[:LOOKED_AT], delimiter=separator, quoting=csv.QUOTE_NONE))
    width = max(map(len, rows), default=0)

    def is_place(cell: str) -> bool:
        suffix = os.path.splitext(cell)[1][1:].lower()
        return is_url(cell) or suffix in PICTURES or options.place(cell, source.parent).is_file()

    cells = [[row[n] for row in rows if n < len(row) and row[n]] for n in range(width)]
    places = [sum(map(is_place, column)) for column in cells]
    if width < 2 or 2 * max(places) < len(rows):
        raise ValueError(
            f"{source}:1: no column of pictures' paths among {width} columns of a table without a "
            f"header; found {rows[:1]}"
        )
    image = places.index(max(places))
    others = [n for n in range(width) if n != image]
    caption = max(others, key=lambda n: sum(map(len, cells[n])))
    names = {image: "image", caption: "caption"}
    return [names.get(n, f"column {n}") for n in range(width)]


class Cell(NamedTuple):
    """A picture's bytes in a parquet file."""

    file: Path
    group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}:{self.group}.{self.row}"

    def read_bytes(self) -> bytes:
        found = pictures_of(self.file, self.group, self.column)
        if isinstance(found, ValueError):
            raise found
        value = found[self.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise FileNotFoundError(f"no bytes in {self}")
        return value


def parquet():
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError("parquet needs pyarrow: pip install 'ito_trainer[parquet]'") from None
    return parquet


@lru_cache(maxsize=4)
def pictures_of(file: Path, group: int, column: str):
    """The pictures of a row group, or why they cannot be read: each row of it asks for them. It is
    read as a whole, so a few are kept for the next rows."""
    from pyarrow import chunked_array

    try:
        return chunked_array([batch.column(column) for batch in batches_of(file, group, [column])])
    except ValueError as error:
        return error


def batches_of(file: Path, group: int, columns: list[str]) -> list:
    """The columns of a row group, in batches.

    Raises ValueError if they need far more memory than the file has bytes: one value may stand for
    a billion rows.
    """
    found, most = [], GROWTH * file.stat().st_size + 2**24
    with parquet().ParquetFile(file) as source:
        for batch in source.iter_batches(64, row_groups=[group], columns=columns):
            found.append(batch)
            most -= batch.nbytes
            if most < 0:
                raise ValueError(f"{file} expands to more than {GROWTH} times its size")
    return found


def open_parquet(source: Path, name: str, options: Options) -> list[partial]:
    """A shard for each row group of a file. `name`: what its pictures' items begin with."""
    reader = parquet()
    try:
        with reader.ParquetFile(require_file(source)) as file:
            schema, groups, about = file.schema_arrow, file.num_row_groups, file.metadata
            require_plausible(about, source.stat().st_size)
    except Exception as error:  # pyarrow's own kinds
        raise ValueError(f"{source} is not parquet: {error}") from None
    found = choose(schema.names, options)
    require_columns(str(source), found, schema.names, options, "; set ")
    return [partial(read_row_group, source, name, n, *found, options) for n in range(groups)]


def require_plausible(about, size: int) -> None:
    """Raises ValueError if a parquet file's metadata names more than its `size` can hold."""
    groups = [about.row_group(n) for n in range(about.num_row_groups)]
    columns = [group.column(n) for group in groups for n in range(about.num_columns)]
    unpacked = sum(column.total_uncompressed_size for column in columns)
    if about.num_rows > size or unpacked > GROWTH * size + 2**24:
        what = f"{about.num_rows} rows of {unpacked} bytes"
        raise ValueError(f"it names {what}, more than {size} bytes can hold")


def read_row_group(
    source: Path, name: str, group: int, image: str, caption: str, options: Options
) -> Iterator[Record | Skipped]:
    with parquet().ParquetFile(source) as file:
        kind = str(file.schema_arrow.field(image).type)
        is_text = kind.removeprefix("dictionary<values=").startswith(("string", "large_string"))
        wanted = {caption, "item", "split", "group", "style", "subgroup", *[image] * is_text}
        before = sum(file.metadata.row_group(n).num_rows for n in range(group))
        present = [name for name in file.schema_arrow.names if name in wanted]
        present += [f"{image}.path"] * ("path: string" in kind)  # of the bytes, not these
    try:
        rows = [row for batch in batches_of(source, group, present) for row in batch.to_pylist()]
    except (ValueError, OSError) as error:  # pyarrow's own are of these kinds
        yield Skipped(f"{source}:{before + 1}", f"damaged row group: {error}")
        return
    for n, fields in enumerate(rows):
        where = f"{source}:{before + n + 1}"
        if is_text:
            fields["image"] = fields.pop(image)
            yield from_row(fields, where, options, [source.parent], caption_keys=[caption])
            continue
        try:
            cell = Cell(source, group, n, image)
            record = from_fields(fields, where, cell, f"{name}:{before + n + 1}", [caption])
            record.name = (fields.get(image) or {}).get("path") or record.name
            yield check_record(record)
        except ValueError as error:
            yield Skipped(where, f"malformed: {error}")
