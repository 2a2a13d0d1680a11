"""Data sets in memory, from any source that ito/data/records.py reads.

Every picture is decoded and resized once and kept as uint8: 64 × 64 pixels are 12 kB, so 80,000
pictures fit into a gigabyte, and an epoch reads no file. Larger sets are streamed: ito/stream.py.
"""

import hashlib
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ito.cli import one_line
from ito.data.fields import Record, Skipped
from ito.data.pictures import MAX_PIXELS, decode
from ito.data.records import cpu_count, find_format, open_shards

NOTHING = "it holds no record"


@dataclass
class Dataset:
    """K decoded pictures of n items; several pictures may show the same item.

    Per picture: `images` uint8 (K, 3, S, S); `image_item` int64 (K,), indices into the lists of
    items; `files`, the paths; `split`; `style`.
    Per item: `items`, the keys; `captions`; `translations`, {language: names}; `group`; `subgroup`.
    `skipped`: the records left out, with their place and the reason. `format`: one of
    `ito.data.records.FORMATS`. `split_by`: what the split was given by, or keeps together.
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
    **options: str | bool | None,
) -> Dataset:
    """Read everything that `ito.data.records.open_shards` finds at `path`, and decode its pictures.

    If no record names a split other than "train", 10 % of the items (at least one), by hash of item
    and `split_seed`, are "heldout"; see `choose_held_out` for what is kept together.
    If some records name a split, one that names none is "train". With `only`, the name of a split,
    records that name none are of that split; if the data names "train" alone, all are.
    Pictures become centred squares of `image_size` pixels on white. The order is that of the
    source, for any number of `workers`. `options` are those of `open_shards`.

    A record is skipped, and listed in `Dataset.skipped`, if its picture cannot be read or has more
    than `max_pixels`, or its caption is empty. Raises what `open_shards` raises, and ValueError if
    all records are skipped.
    """
    found = [record for shard in open_shards(path, **options) for record in shard()]
    records = [r for r in found if isinstance(r, Record)]
    skipped = [r for r in found if isinstance(r, Skipped)]
    images, kept, unreadable = decode_all(records, image_size, max_pixels, workers)
    skipped += unreadable
    if not kept:
        reasons = "; ".join(one_line(f"{where}: {reason}") for where, reason in skipped[:3])
        counts = ", ".join(f"{kind}: {n}" for kind, n in count_kinds(skipped).items())
        about = f"{len(skipped)} records skipped, {counts}: {reasons}" if skipped else NOTHING
        hint = "; is it in another folder? set --image-root" * (
            {"no picture"} == {*count_kinds(skipped)}
        )
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
        format=find_format(path, options.get("data_format", "auto")),
        split_by=split_by,
    )


def union(lists) -> list[str]:
    """Each text once, in the order of their first appearance."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def decode_all(
    records: list[Record], size: int, max_pixels: int, workers: int | None
) -> tuple[torch.Tensor, list[Record], list[Skipped]]:
    """Pictures uint8 (K, 3, size, size), their K records, and the skipped records, in order.

    If several records of an item name the same picture, it is decoded and counted once.
    """
    distinct = {}
    for r in records:
        distinct.setdefault((r.image, r.item, r.split), r)
    images = torch.empty(len(distinct), 3, size, size, dtype=torch.uint8)
    kept, bad = [], {}
    pool = ThreadPoolExecutor(workers or cpu_count())
    try:
        pictures = pool.map(lambda r: decode(r.image, size, max_pixels), distinct.values())
        for r, picture in zip(distinct.values(), pictures, strict=True):
            if isinstance(picture, str):
                bad[r.image] = picture
            else:
                images[len(kept)] = torch.from_numpy(picture).permute(2, 0, 1)
                kept.append(r)
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all other pictures
    skipped = [Skipped(r.where, bad[r.image]) for r in records if r.image in bad]
    return images[: len(kept)], kept, skipped


def choose_held_out(
    images: torch.Tensor, image_item: list[int], rows: list[list[Record]], seed: int
) -> tuple[set[str], str]:
    """The items to hold out, and what is kept together besides an item's pictures.

    Items that share a picture (to the pixel), a caption or a `group` are on the same side. Where
    that would hold out more than a quarter, as where the captions are a few classes, it is done by
    captions alone, by groups alone, or by pictures; and if all share one, not at all. At least two
    captions are held out, of more than one item.
    """
    items = [same[0].item for same in rows]
    shown = picture_keys(images, image_item, len(items))
    said = [{text_key(text) for r in same for text in r.captions} for same in rows]
    groups = [{("group", r.group) for r in same if r.group} for same in rows]
    linking = {name: k for name, k in (("caption", said), ("group", groups)) if shared(k)}
    for names in ([*linking], *([name] for name in linking), []):
        keys = [own.union(*(linking[name][n] for name in names)) for n, own in enumerate(shown)]
        together = connected(keys, items)
        held = held_out(together, seed)
        texts = set().union(*(said[n] for n, item in enumerate(items) if item in held))
        if names and len(texts) == 1 and len(held) > 1:
            held |= held_out([group for group in together if held.isdisjoint(group)], seed)
        if held and (4 * len(held) <= len(items) or not names):
            return held, " and ".join(names) or "item"
    return held_out([[item] for item in items], seed), "item"


def text_key(text: str) -> str:
    """Captions that differ in white space and case alone are equal."""
    return " ".join(text.split()).casefold()


def shared(keys: list[set]) -> bool:
    """Whether two items have a key in common."""
    return any(count > 1 for count in Counter(itertools.chain.from_iterable(keys)).values())


def picture_keys(images: torch.Tensor, image_item: list[int], count: int) -> list[set]:
    """The hashes of the pictures of `count` items."""
    keys: list[set] = [set() for _ in range(count)]
    for hashed, item in zip(picture_hashes(images), image_item, strict=True):
        keys[item].add(hashed)
    return keys


def connected(keys: list[set], items: list[str]) -> list[list[str]]:
    """The items in groups: two that have a key in common are in the same one."""
    parent = list(range(len(items)))  # union-find

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = n = parent[parent[n]]
        return n

    first: dict = {}
    for item, own in enumerate(keys):
        for key in own:
            parent[root(item)] = root(first.setdefault(key, item))
    groups: dict[int, list[str]] = {}
    for n, item in enumerate(items):
        groups.setdefault(root(n), []).append(item)
    return list(groups.values())


def picture_hashes(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(picture.numpy()).digest() for picture in images]


def held_out(groups: list[list[str]], seed: int) -> set[str]:
    """About 10 % of the items, but at least 1 of 2 or more; all items of a group or none.

    Groups are taken in the order of their lowest hash if they fit into the 10 %. If none fits, the
    smallest group is taken, unless it is the only one.
    """

    def lowest_hash(group: list[str]) -> bytes:
        return min(hashlib.sha256(f"{seed}:{item}".encode()).digest() for item in group)

    items = sum(map(len, groups))
    count = max(items // 10, min(1, items - 1))
    order = sorted(groups, key=lowest_hash)
    held: set[str] = set()
    for group in order:
        if len(held) + len(group) <= count:
            held.update(group)
    return held or set(min(order, key=len) if len(order) > 1 else ())


def report_repeated(dataset: Dataset) -> str:
    """How many held-out pictures are also training pictures, equal to the pixel, in words; "" if
    none is."""
    hashes = picture_hashes(dataset.images)
    trained = {x for x, split in zip(hashes, dataset.split, strict=True) if split == "train"}
    repeated = Counter(
        split
        for x, split in zip(hashes, dataset.split, strict=True)
        if split != "train" and x in trained
    )
    return "\n".join(
        f"warning    {count} of {dataset.split.count(split)} pictures of {split} are training "
        "pictures too: their scores do not measure generalisation"
        for split, count in repeated.items()
    )


def count_kinds(skipped: list[Skipped]) -> dict[str, int]:
    """The number of skipped records by reason, the most frequent first."""
    return dict(Counter(record.kind for record in skipped).most_common())


def report_skipped(skipped: list[Skipped], limit: int = 10) -> str:
    """Their number, then the first `limit` of them, one per line; "" if there are none."""
    if not skipped:
        return ""
    lines = [f"skipped {len(skipped)} records:"]
    lines += [f"  {one_line(f'{where}: {reason}')}" for where, reason in skipped[:limit]]
    return "\n".join(lines + ["  …"] * (len(skipped) > limit))
