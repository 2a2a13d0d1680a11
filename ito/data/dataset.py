"""Data sets in memory, from any source that ito/data/records.py reads.

Every picture is decoded and resized once and kept as uint8: 64 × 64 pixels are 12 kB, so 80,000
pictures fit into a gigabyte, and an epoch reads no file. Larger sets are streamed: ito/stream.py.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ito.cli import one_line
from ito.data.fields import Record, Skipped, count_kinds
from ito.data.pictures import MAX_PIXELS, decode
from ito.data.records import cpu_count, open_shards
from ito.data.splits import choose_held_out

NOTHING = "it holds no record"


@dataclass
class Dataset:
    """K decoded pictures of n items; several pictures may show the same item.

    Per picture: `images` uint8 (K, 3, S, S); `image_item` int64 (K,), indices into the lists of
    items; `files`, the paths; `split`; `style`.
    Per item: `items`, the keys; `captions`; `translations`, {language: names}; `group`; `subgroup`.
    `skipped`: the records left out, with their place and the reason. `format`: one of
    `ito.data.records.FORMATS`. `split_by`: what the split was given by, or keeps together.
    `enlarged`: the number of pictures that were smaller.
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
    skipped: list[Skipped]
    format: str
    split_by: str
    enlarged: int

    def rows(self, split: str) -> torch.Tensor:
        """The indices of a split's pictures, int64."""
        return torch.tensor([i for i, name in enumerate(self.split) if name == split]).long()

    def training_items(self) -> list[int]:
        """Indices of the items with a training picture, in the order of the pictures.

        Raises ValueError if there are fewer than 2, because in-batch negatives are other items.
        """
        found = list(dict.fromkeys(self.image_item[self.rows("train")].tolist()))
        if len(found) < 2:
            raise ValueError(
                f'training needs at least 2 items with a picture of the split "train", found '
                f"{len(found)} ({self.describe()})"
            )
        return found

    def held_out_splits(self) -> list[str]:
        """All splits except "train", in alphabetical order, but "heldout_concept" last.

        Raises ValueError if there are none.
        """
        found = sorted(
            set(self.split) - {"train"}, key=lambda name: (name == "heldout_concept", name)
        )
        if not found:
            raise ValueError(
                'evaluation needs at least 1 picture of a split other than "train", found none '
                f"({self.describe()}); if the data names no split, a tenth of the items, of 2 or "
                "more, is held out"
            )
        return found

    def describe(self) -> str:
        counts = {name: self.split.count(name) for name in dict.fromkeys(self.split)}
        pictures = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{len(self.items)} items, {len(self.images)} pictures: {pictures}"


def load_dataset(
    path: str | Path,
    image_size: int,
    *,
    split_seed: int = 0,
    only: str | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    fit: str = "crop",
    **options: str | bool | None,
) -> Dataset:
    """Read everything that `ito.data.records.open_shards` finds at `path`, and decode its pictures.

    If no record names a split other than "train", 10 % of the items (at least one), by hash of item
    and `split_seed`, are "heldout"; see ito/data/splits.py for what is kept together.
    If some records name a split, one that names none is "train". With `only`, the name of a split,
    records that name none are of that split; if the data names "train" alone, all are.
    Pictures become squares of `image_size` pixels on white, by `fit`; see `ito.config.Config`. The
    order is that of the source, for any number of `workers`. `options` are those of `open_shards`.

    A record is skipped, and listed in `Dataset.skipped`, if its picture cannot be read or has more
    than `max_pixels`, or its caption is empty. Raises what `open_shards` raises, and ValueError if
    all records are skipped.
    """
    shards = open_shards(path, **options)
    found = [record for shard in shards for record in shard()]
    records = [r for r in found if isinstance(r, Record)]
    skipped = [r for r in found if isinstance(r, Skipped)]
    images, kept, unreadable, small = decode_all(records, image_size, max_pixels, fit, workers)
    skipped += unreadable
    if not kept:
        reasons = "; ".join(one_line(f"{where}: {reason}") for where, reason in skipped[:3])
        kinds = count_kinds(skipped)
        counts = ", ".join(f"{kind}: {n}" for kind, n in kinds.items())
        about = f"{len(skipped)} records skipped, {counts}: {reasons}" if skipped else NOTHING
        hint = "; is it in another folder? set --image-root" * ([*kinds] == ["no picture"])
        raise ValueError(f"no usable picture in {path} ({about}){hint}")

    index = {item: n for n, item in enumerate(dict.fromkeys(r.item for r in kept))}
    rows = [[] for _ in index]
    for r in records:
        if r.item in index:
            rows[index[r.item]].append(r)
    split_by = "split"
    if any(r.split not in (None, "train") for r in records):
        split = [r.split or only or "train" for r in kept]
    elif only:
        split, split_by = [only] * len(kept), "none"
    else:
        held, split_by = choose_held_out(images, [index[r.item] for r in kept], rows, split_seed)
        split = ["heldout" if r.item in held else "train" for r in kept]
    return Dataset(
        images=images,
        image_item=torch.tensor([index[r.item] for r in kept]),
        files=[str(r.image) for r in kept],
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
        format=shards.format,
        split_by=split_by,
        enlarged=len(small),
    )


def union(lists) -> list[str]:
    """Each text once, in the order of their first appearance."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def decode_all(
    records: list[Record], size: int, max_pixels: int, fit: str, workers: int | None
) -> tuple[torch.Tensor, list[Record], list[Skipped], list]:
    """Pictures uint8 (K, 3, size, size), their K records, skipped records; enlarged pictures.

    If several records of an item name the same picture, it is decoded and counted once.
    """
    named = {}
    for r in records:
        named.setdefault((r.image, r.item, r.split), r)
    images = torch.empty(len(named), 3, size, size, dtype=torch.uint8)
    kept, bad, small = [], {}, []
    pool = ThreadPoolExecutor(workers or cpu_count())
    try:
        pictures = pool.map(lambda r: decode(r.image, size, max_pixels, fit, small), named.values())
        for r, picture in zip(named.values(), pictures, strict=True):
            if isinstance(picture, str):
                bad[r.image] = picture
            else:
                images[len(kept)] = torch.from_numpy(picture).permute(2, 0, 1)
                kept.append(r)
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all other pictures
    skipped = [Skipped(r.where, bad[r.image]) for r in records if r.image in bad]
    return images[: len(kept)], kept, skipped, small
