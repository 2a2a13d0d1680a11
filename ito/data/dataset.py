"""Data sets in memory, from any source that ito/data/records.py reads.

Every picture is decoded once and kept as uint8. Larger sets are streamed: ito/stream.py.
"""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ito.cli import one_line
from ito.data.fields import CAPTION_KEYS, Record, Skipped, count_kinds
from ito.data.pictures import MAX_PIXELS, Decoder
from ito.data.records import cpu_count, open_shards
from ito.data.splits import TEST, choose_splits, set_groups

HINTS = {  # what to do if all records are skipped for this reason
    "no picture": "; is it in another folder? set --image-root",
    "empty caption": f"; expected {', '.join(CAPTION_KEYS)}; set --csv-caption-key to the file's",
}


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
                "training needs at least 2 items of --train-data with a picture of the split "
                f'"train", found {len(found)} ({self.describe()})'
            )
        return found

    def held_out_splits(self) -> list[str]:
        """All splits except "train", in alphabetical order, but "heldout_concept" last.

        Raises ValueError if there are none.
        """
        found = sorted({*self.split} - {"train"}, key=lambda s: (s == "heldout_concept", s))
        if not found:
            raise ValueError(
                'evaluation needs at least 1 picture of a split other than "train", found none '
                f"({self.describe()}); if the data names no split, a tenth of the items, of 2 or "
                "more, is held out"
            )
        return found

    def validation_splits(self) -> list[str]:
        """The held-out splits that may be looked at while training: all but "test", which measures
        the result; or that alone, if there is no other."""
        found = self.held_out_splits()
        return [name for name in found if name != TEST] or found

    def describe(self) -> str:
        pictures = ", ".join(f"{count} {name}" for name, count in Counter(self.split).items())
        return f"{len(self.items)} items, {len(self.images)} pictures: {pictures}"


def load_dataset(
    path: str | Path,
    image_size: int,
    *,
    split_seed: int = 0,
    only: str | None = None,
    group_by: str | None = None,
    test_share: float = 0,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    fit: str = "crop",
    **options: str | bool | None,
) -> Dataset:
    """Read everything that `ito.data.records.open_shards` finds at `path`, and decode its pictures.

    Pictures become squares of `image_size` pixels on white, by `fit`, in the order of the source.
    Splits: see `ito.data.splits.choose_splits`. `options` are those of `open_shards`.

    A record is skipped, and listed in `Dataset.skipped`, if its picture cannot be read or has more
    than `max_pixels`, or its caption is empty. Raises what `open_shards` raises, and ValueError if
    all records are skipped.
    """
    shards = open_shards(path, **options)
    found = [record for shard in shards for record in shard()]
    records = [r for r in found if isinstance(r, Record)]
    skipped = [r for r in found if isinstance(r, Skipped)]
    set_groups(records, group_by)
    images, kept, unreadable, small = decode_all(records, image_size, max_pixels, fit, workers)
    skipped += unreadable
    if not kept:
        reasons = "; ".join(one_line(f"{where}: {reason}") for where, reason in skipped[:3])
        kinds = count_kinds(skipped)
        counts = ", ".join(f"{kind}: {n}" for kind, n in kinds.items())
        told = skipped and f"{len(skipped)} records skipped, {counts}: {reasons}"
        hint = HINTS.get(*kinds, "") if len(kinds) == 1 else ""
        raise ValueError(f"no usable picture in {path} ({told or 'it holds no record'}){hint}")

    index = {item: n for n, item in enumerate(dict.fromkeys(r.item for r in kept))}
    rows = [[] for _ in index]
    for r in (r for r in records if r.item in index):
        rows[index[r.item]].append(r)
    how = split_seed, only, test_share, group_by
    split, split_by = choose_splits(images, kept, rows, records, *how)
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
    One that several records of an item name is decoded and counted once."""
    named = {}
    for r in records:
        named.setdefault((r.image, r.item, r.split), r)
    images = torch.empty(len(named), 3, size, size, dtype=torch.uint8)
    rows, kept, bad, small = [*named.values()], [], {}, []
    decoder = Decoder(size, max_pixels, fit, small)
    pool = ThreadPoolExecutor(workers or cpu_count())
    try:  # 64 per task: threads that meet after each tiny picture take 1.5 times as long
        parts = [rows[at : at + 64] for at in range(0, len(rows), 64)]
        tasks = pool.map(lambda part: decoder[[r.image for r in part]], parts)
        for part, (found, reasons) in zip(parts, tasks, strict=True):
            bad |= {part[n].image: reason for n, reason in reasons.items()}
            images[len(kept) : len(kept) + len(found)] = found
            kept += [r for n, r in enumerate(part) if n not in reasons]
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all other pictures
    skipped = [Skipped(r.where, bad[r.image]) for r in records if r.image in bad]
    return images[: len(kept)], kept, skipped, small
