"""Which items are held out of a data set that names no splits, and what stays together."""

import hashlib
import itertools
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ito.data.fields import Record

HELD_OUT = 0.1  # of the items, if the data names no splits
SEARCHED = 30.0  # seconds for --group-by, and one more for ten thousand records
TEST = "test"  # the split that is scored once, after the last step


def set_groups(records: list[Record], pattern: str | None) -> None:
    """Sets the group of each record to what `pattern` finds in its picture's path: its first group
    in parentheses, if it has one. Where it finds nothing there is none, nor is any from a column.
    With None, groups stay as they are. Raises ValueError if it takes very long.
    """
    if pattern is None:
        return
    search = re.compile(pattern).search
    with at_most(SEARCHED + len(records) / 10_000, f"--group-by '{pattern}'"):
        for r in records:
            found = search(r.name)
            r.group = found[1 if found.re.groups else 0] or None if found else None


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raises ValueError naming `what` if the body takes longer: some regular expressions take
    longer than anyone lives. Only in the main thread, where signals are received."""

    def stop(*_):
        raise ValueError(f"{what} takes longer than {seconds:.2g} s: simplify it")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def choose_splits(
    images: torch.Tensor,
    kept: list[Record],
    rows: list[list[Record]],
    records: list[Record],
    seed: int,
    only: str | None,
    test_share: float,
    group_by: str | None,
) -> tuple[list[str], str]:
    """The split of each of the `kept` records, to which `images` belong, and what it was given by
    or keeps together.

    If no record names a split other than "train", items are held out by hash of item and `seed`:
    see `choose_held_out`. Else a record without one is "train". With `only`, these are all of that
    split. rows: all records of each item. records: these, and those whose picture cannot be read.
    group_by: the pattern that the groups are by, if they are not a column's.

    Raises ValueError for a `test_share` of data that names splits, and for a pattern that finds
    nothing.
    """
    if group_by is not None and only is None and not any(r.group for same in rows for r in same):
        about = f"in the paths of {len(kept)} pictures, such as {kept[0].name!r}"
        raise ValueError(f"--group-by '{group_by}' finds nothing {about}")
    named = {r.split for r in records if r.split}
    if named - {"train"}:
        if test_share:
            about = f"the data names its splits, {', '.join(sorted(named))}"
            raise ValueError(f"--test-share {test_share}: {about}")
        return [r.split or only or "train" for r in kept], "split"
    if only:
        return [only] * len(kept), "none"
    grouped = group_by is not None
    held, split_by = choose_held_out(images, kept, rows, seed, test_share, grouped)
    by_item = {item: split for split, items in held.items() for item in items}
    return [by_item.get(r.item, "train") for r in kept], split_by


def choose_held_out(
    images: torch.Tensor,
    kept: list[Record],
    rows: list[list[Record]],
    seed: int,
    test_share: float,
    grouped: bool,
) -> tuple[dict[str, set[str]], str]:
    """The items of each split to hold out, and what is kept together besides an item's pictures.

    A tenth of the items is "heldout", and `test_share` of them, from what is left, "test". Items
    that share a picture (to the pixel), a caption or a `group` are in the same split. Where that
    would hold out more than 2.5 times the share, as where the captions are a few classes, or less
    than half of it, it is done by captions alone, by groups alone, or by pictures; and if all share
    one, not at all. With `grouped`, groups are kept together in any case, unless there are too few;
    if need be, pictures are not. At least two captions are in a split of more than one item.
    """
    by_item: dict[str, set] = {same[0].item: set() for same in rows}
    for hashed, record in zip(picture_hashes(images), kept, strict=True):
        by_item[record.item].add(hashed)
    items, shown = list(by_item), list(by_item.values())
    said = [{text_key(text) for r in same for text in r.captions} for same in rows]
    groups = [{("group", r.group) for r in same if r.group} for same in rows]
    linking = {name: k for name, k in (("caption", said), ("group", groups)) if shared(k)}
    captions = dict(zip(items, said, strict=True))
    shares = {"heldout": HELD_OUT} | ({TEST: test_share} if test_share else {})
    last = ["group"] if grouped and "group" in linking else []
    tries = [[*linking], *([name] for name in linking if not last), last]
    unseen: list[set] = [set() for _ in items]
    for names, pictures in (*((t, shown) for t in tries), (last, unseen), ([], shown)):
        keys = [own.union(*(linking[name][n] for name in names)) for n, own in enumerate(pictures)]
        held = hold_out(connected(keys, items), shares, seed, captions if names else None)
        sizes = [(len(held[split]), share * len(items)) for split, share in shares.items()]
        fits = all(want / 2 - 1e-9 <= size <= 2.5 * want + 1e-9 for size, want in sizes)
        if all(held.values()) and (fits or names in (last, [])):
            return held, " and ".join(names) or "item"
    return hold_out([[item] for item in items], shares, seed), "item"


def hold_out(
    groups: list[list[str]],
    shares: dict[str, float],
    seed: int,
    captions: dict[str, set[str]] | None = None,
) -> dict[str, set[str]]:
    """The items of each split, of about its share. With the items' `captions`, at least two
    captions of a split with more than one item."""
    total, held = sum(map(len, groups)), {}
    for split, share in shares.items():
        held[split] = part = held_out(groups, seed, share, total)
        groups = [group for group in groups if part.isdisjoint(group)]
        if captions and len(part) > 1 and len(set().union(*map(captions.get, part))) == 1:
            part |= held_out(groups, seed, share)
            groups = [group for group in groups if part.isdisjoint(group)]
    return held


def text_key(text: str) -> str:
    """Captions that differ in white space and case alone are equal."""
    return " ".join(text.split()).casefold()


def shared(keys: list[set]) -> bool:
    """Whether two items have a key in common."""
    return any(count > 1 for count in Counter(itertools.chain.from_iterable(keys)).values())


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


def held_out(
    groups: list[list[str]], seed: int, share: float = HELD_OUT, total: int | None = None
) -> set[str]:
    """About `share` of `total` items, by default of those in the groups, but at least 1 of 2 or
    more; all items of a group or none.

    Groups are taken in the order of their lowest hash if they fit into that number. If none fits,
    the smallest group is taken, unless it is the only one.
    """

    def lowest_hash(group: list[str]) -> bytes:
        return min(hashlib.sha256(f"{seed}:{item}".encode()).digest() for item in group)

    items = sum(map(len, groups))
    count = min(max(int(share * (total or items) + 1e-9), 1), items - 1)
    order = sorted(groups, key=lowest_hash)
    held: set[str] = set()
    for group in order:
        if len(held) + len(group) <= count:
            held.update(group)
    return held or set(min(order, key=len) if len(order) > 1 else ())
