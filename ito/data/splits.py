"""Which items are held out of a data set that names no splits, and what stays together."""

import hashlib
import itertools
from collections import Counter

import torch

from ito.data.fields import Record


def choose_held_out(
    images: torch.Tensor, image_item: list[int], rows: list[list[Record]], seed: int
) -> tuple[set[str], str]:
    """The items to hold out, and what is kept together besides an item's pictures.

    Items that share a picture (to the pixel), a caption or a `group` are on the same side. Where
    that would hold out more than a quarter, as where the captions are a few classes, or less than a
    twentieth, it is done by captions alone, by groups alone, or by pictures; and if all share one,
    not at all. At least two captions are held out, of more than one item.
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
        if held and (len(items) / 20 <= len(held) <= len(items) / 4 or not names):
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
