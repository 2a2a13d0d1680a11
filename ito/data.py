"""Pictures and captions into memory, from a folder with `captions.jsonl` or an open_clip CSV.

Every picture is decoded and resized once and kept as uint8: 64 × 64 is 12 kB, so 80,000 fit in a
gigabyte, and an epoch touches no file.
"""

import csv
import hashlib
import io
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


@dataclass
class Dataset:
    """K decoded pictures of n items; several pictures may show one item.

    `images` uint8 (K, 3, S, S); `image_item` int64 (K,), an index into the per-item lists;
    `files` (where each is), `split`, `style` per picture; `items` (keys), `captions`,
    `translations` ({language: names}), `group`, `subgroup` per item; `skipped` (file and row,
    reason) per record left out.
    """

    images: torch.Tensor
    image_item: torch.Tensor
    files: list[str]
    split: list[str]
    style: list[str | None]
    items: list[str]
    captions: list[list[str]]
    translations: list[dict[str, list[str]]]
    group: list[str | None]
    subgroup: list[str | None]
    skipped: list[tuple[str, str]]

    def rows(self, split: str) -> torch.Tensor:
        """Picture indices, int64, of one split."""
        return torch.tensor([i for i, name in enumerate(self.split) if name == split]).long()

    def training_items(self) -> list[int]:
        """Indices of the items with a picture to train on, in the order of the pictures.

        Raises ValueError if there are fewer than 2: in-batch negatives are other items.
        """
        found = list(dict.fromkeys(self.image_item[self.rows("train")].tolist()))
        if len(found) < 2:
            raise ValueError(
                f'training needs at least 2 items with a picture of the split "train", found '
                f"{len(found)} ({self.describe()})"
            )
        return found

    def held_out_splits(self) -> list[str]:
        """The splits not trained on; drawings of known concepts before unknown concepts.

        Raises ValueError if there are none.
        """
        found = sorted(
            set(self.split) - {"train"}, key=lambda name: (name == "heldout_concept", name)
        )
        if not found:
            raise ValueError(
                'evaluation needs at least 1 picture of a split other than "train", found none '
                f"({self.describe()}); without any split in the data a tenth of the items, of 2 or "
                "more, is held out"
            )
        return found

    def describe(self) -> str:
        counts = {name: self.split.count(name) for name in dict.fromkeys(self.split)}
        pictures = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{len(self.items)} items, {len(self.images)} pictures: {pictures}"


@dataclass
class Record:
    """One row of the source: a picture with its captions."""

    where: str
    path: Path
    item: str
    captions: list[str]
    translations: dict[str, list[str]]
    split: str | None
    style: str | None
    group: str | None
    subgroup: str | None


def load_dataset(
    path: str | Path,
    image_size: int,
    *,
    split_seed: int = 0,
    workers: int | None = None,
    csv_separator: str = "\t",
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
) -> Dataset:
    """Read a folder with `captions.jsonl`, or an open_clip CSV, and decode its pictures.

    `captions.jsonl` has one object per line: `image` (relative to the folder), `captions` (a list)
    or `caption`, and optionally `item` (rows with the same one show the same thing; default: the
    image's path), `split`, `style`, `group`, `subgroup`, `translations`. The CSV's options are
    open_clip's; its paths are relative to the working directory, as there, or to the CSV.

    If no row names a split, 10 % of the items (at least one), by hash of item and `split_seed`, are
    "heldout". If some do, a row that names none is "train". Pictures are centred squares of
    `image_size` pixels on white. The order is the file's, whatever the number of `workers`.

    An unreadable picture or an empty caption skips its row; `Dataset.skipped` names them. Raises
    FileNotFoundError if there is no such file, ValueError naming file and row where a row is
    malformed, and ValueError if no row is left.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        raise ValueError(f"{path}: name the folder that holds captions.jsonl, not the file")
    if path.is_dir():
        source, records = path / "captions.jsonl", read_jsonl(path / "captions.jsonl")
    elif path.exists():
        source = path
        records = read_csv(path, csv_separator, csv_img_key, csv_caption_key)
    else:
        raise FileNotFoundError(f"no data at {path}: want a folder with captions.jsonl, or a CSV")
    images, kept, skipped = decode_all([r for r in records if r.captions], image_size, workers)
    skipped = [(r.where, "empty caption") for r in records if not r.captions] + skipped
    if not kept:
        reasons = "; ".join(f"{where}: {reason}" for where, reason in skipped[:3])
        raise ValueError(f"no usable picture in {source} ({len(skipped)} rows skipped: {reasons})")

    index = {item: n for n, item in enumerate(dict.fromkeys(r.item for r in kept))}
    rows = [[] for _ in index]
    for r in records:
        if r.item in index:
            rows[index[r.item]].append(r)
    if any(r.split for r in records):
        split = [r.split or "train" for r in kept]
    else:
        held = held_out(list(index), split_seed)
        split = ["heldout" if r.item in held else "train" for r in kept]
    return Dataset(
        images=images,
        image_item=torch.tensor([index[r.item] for r in kept]),
        files=[str(r.path) for r in kept],
        split=split,
        style=[r.style for r in kept],
        items=list(index),
        captions=[union(r.captions for r in same) for same in rows],
        translations=[
            {
                language: union(r.translations.get(language, []) for r in same)
                for language in union(r.translations for r in same)
            }
            for same in rows
        ],
        group=[next((r.group for r in same if r.group), None) for same in rows],
        subgroup=[next((r.subgroup for r in same if r.subgroup), None) for same in rows],
        skipped=skipped,
    )


def union(lists) -> list[str]:
    """Each text once, in the order of their first appearance."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def read_jsonl(source: Path) -> list[Record]:
    if not source.exists():
        raise FileNotFoundError(f"{source.parent} holds no captions.jsonl")
    lines = enumerate(read_text(source).split("\n"), 1)
    return [parse(line, f"{source}:{row}", source.parent) for row, line in lines if line.strip()]


def parse(line: str, where: str, folder: Path) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: want a JSON object, got {line.strip()[:60]}")

    def text(name: str) -> str | None:
        value = fields.get(name)
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: {name} must be a text, got {value!r}")
        return value

    if text("image") is None:
        raise ValueError(f"{where}: names no image; its fields are {list(fields)}")
    if "captions" not in fields and "caption" not in fields:
        raise ValueError(f"{where}: has no captions or caption; its fields are {list(fields)}")
    translations = fields.get("translations") or {}
    if not isinstance(translations, dict):
        raise ValueError(f"{where}: translations must be an object, got {translations!r}")
    return Record(
        where,
        folder / text("image"),
        text("item") or text("image"),
        texts(fields.get("captions", fields.get("caption")), where),
        {language: texts(names, where) for language, names in translations.items()},
        *(text(name) for name in ("split", "style", "group", "subgroup")),
    )


def texts(value, where: str) -> list[str]:
    """One text, several, or null, without the empty ones."""
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: captions must be a text or a list of texts, got {value!r}")
    return [text.strip() for text in value if text.strip()]


def read_csv(source: Path, separator: str, img_key: str, caption_key: str) -> list[Record]:
    reader = csv.DictReader(io.StringIO(read_text(source), newline=""), delimiter=separator)
    columns = reader.fieldnames or []
    missing = [repr(key) for key in (img_key, caption_key) if key not in columns]
    if missing:
        raise ValueError(
            f"{source}:1: no column {', '.join(missing)}; found {columns} with the separator "
            f"{separator!r}; set --csv-separator, --csv-img-key, --csv-caption-key to the file's"
        )
    records = []
    try:
        for fields in reader:
            where = f"{source}:{reader.line_num}"
            name = fields[img_key] or ""
            beside = source.parent / name
            path = beside if beside.exists() else Path(name)
            captions = texts(fields[caption_key], where)
            records.append(Record(where, path, name, captions, {}, None, None, None, None))
    except csv.Error as error:  # a quote that is never closed
        raise ValueError(f"{source}:{reader.line_num}: not CSV: {error}") from None
    return records


def read_text(source: Path) -> str:
    data = source.read_bytes()
    try:
        return data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}:{row}: not UTF-8: {error}") from None


def decode_all(
    records: list[Record], size: int, workers: int | None
) -> tuple[torch.Tensor, list[Record], list[tuple[str, str]]]:
    """uint8 (K, 3, size, size), the record of each, and what was skipped; in order.

    A picture that several rows of an item name is decoded, and counted, once.
    """
    shown = {}
    for r in records:
        shown.setdefault((r.path, r.item, r.split), r)
    images = torch.empty(len(shown), 3, size, size, dtype=torch.uint8)
    kept, bad = [], {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        pictures = pool.map(lambda r: decode(r.path, size), shown.values())
        for r, picture in zip(shown.values(), pictures, strict=True):
            if isinstance(picture, str):
                bad[r.path] = picture
            else:
                images[len(kept)] = torch.from_numpy(picture).permute(2, 0, 1)
                kept.append(r)
    skipped = [(r.where, bad[r.path]) for r in records if r.path in bad]
    return images[: len(kept)], kept, skipped


def decode(path: Path, size: int) -> np.ndarray | str:
    """uint8 (size, size, 3) on white, the short side resized and the centre kept; or the reason."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at a fraction of the resolution
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image)
                image = white.convert("RGB")
            return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        return f"no picture {path}"
    except Exception as error:  # Pillow's plugins raise anything on a damaged file
        return f"unreadable picture {path}: {type(error).__name__}: {error}"


def held_out(items: list[str], seed: int) -> set[str]:
    """The 10 % of the items, at least one of two, with the lowest hash."""
    order = sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())
    return set(order[: max(len(items) // 10, min(1, len(items) - 1))])


def report_skipped(skipped: list[tuple[str, str]], limit: int = 10) -> str:
    """Their number, then the first `limit` of them, a line each; nothing if there are none."""
    if not skipped:
        return ""
    lines = [f"skipped {len(skipped)} records:"]
    lines += [f"  {where}: {reason}" for where, reason in skipped[:limit]]
    return "\n".join(lines + ["  …"] * (len(skipped) > limit))
