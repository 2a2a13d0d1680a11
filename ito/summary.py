"""What a command says about its data: in numbers (`RUN/data.json`) and in words."""

from collections import Counter

from ito.cli import one_line
from ito.config import Config
from ito.data.dataset import Dataset
from ito.data.fields import Skipped, count_kinds
from ito.data.splits import TEST, picture_hashes, text_key
from ito.model.tokenizer import LEAST_SHARE, Tokenizer

SHARED = {  # what `count_overlap` counts of a held-out split
    "pictures": "are training pictures too: their scores do not measure generalisation",
    "captions": "have a caption that is trained on too",
    "groups": "are of a group that is trained on too",
    "items": "have training pictures too",
}


def summarise(
    form: str, parts: list[Dataset], cut: int, overlap: dict[str, dict[str, int]] | None
) -> dict:
    """The numbers of `parts`, the data set, or that trained on and that scored.

    form: the format of what is trained on. cut: captions longer than the context. overlap: see
    `count_overlap`; None of a stream, of which what is trained on is not known before it is read:
    then `train_items` is None too.
    """
    captions = [texts for part in parts for texts in part.captions]
    scored = parts[-1]
    held = {name: set(scored.image_item[scored.rows(name)].tolist()) for name in held_out(scored)}
    streamed = overlap is None
    totals = {kind: sum(own[kind] for own in (overlap or {}).values()) for kind in SHARED}
    return {
        "format": form,
        "pictures": sum(len(part.images) for part in parts),
        "items": sum(len(part.items) for part in parts),
        "captions": sum(map(len, captions)),
        "skipped": count_kinds([record for part in parts for record in part.skipped]),
        "cut_captions": cut,
        "equal_captions": count_equal(captions),
        "train_items": None if streamed else len(parts[0].training_items()),
        "val_items": len(set().union(*held.values())),
        "test_items": len(held.get(TEST, ())),
        "split_by": parts[0].split_by if len(parts) == 1 and not streamed else "none",
        "overlap": None if streamed else totals,
    }


def count_equal(captions: list[list[str]]) -> int:
    """How many captions, counted at each item, another item has too, but for white space and
    case."""
    keys = [[text_key(text) for text in texts] for texts in captions]
    often = Counter(key for own in keys for key in set(own))
    return sum(often[key] > 1 for own in keys for key in own)


SPLIT_BY = {"split": "as the data names its splits", "none": "none of it split off"}


def held_out(data: Dataset) -> list[str]:
    return sorted(set(data.split) - {"train"})


def sentence(facts: dict) -> str:
    """`facts` are those of `summarise`, and `cut_tokens` and `enlarged` if these are known."""
    skipped = sum(facts["skipped"].values())
    reasons = ", ".join(f"{kind}: {count}" for kind, count in facts["skipped"].items())
    trained = facts["train_items"]
    streamed = trained is None  # then the numbers are those of --val-data
    split = SPLIT_BY.get(facts["split_by"], f"split by {facts['split_by']}")
    cut, enlarged = facts.get("cut_tokens", 0), facts.get("enlarged", 0)
    return (
        f"{facts['format']}: {'a stream to train on; to score: ' * streamed}"
        f"{facts['pictures']} pictures of {facts['items']} items with "
        f"{facts['captions']} captions, {facts['cut_captions']} of them cut and "
        f"{facts['equal_captions']} equal to one of another item; "
        f"{f'{trained} to train on, ' * (not streamed)}{facts['val_items']} held out, "
        f"{split}; {skipped} records skipped"
        + f" ({reasons})" * bool(skipped)
        + f"; {cut:.1%} of all tokens are cut" * (cut >= LEAST_SHARE)
        + f"; {enlarged} pictures enlarged" * bool(enlarged)
    )


def print_notes(*notes: str) -> None:
    """Print those that are not empty."""
    for note in filter(None, notes):
        print(note)


def report_sizes(config: Config, tokenizer: Tokenizer) -> str:
    """The sizes that a run uses, in words."""
    return (
        f"sizes      image size {config.image_size} px from {config.load_size} px, fit "
        f"{config.fit}; captions up to {tokenizer.context_length} tokens; vocabulary "
        f"{tokenizer.vocab_size}"
    )


def report_enlarged(data: Dataset) -> str:
    """How many pictures are smaller than what is kept of them, in words; "" if none is."""
    if not data.enlarged:
        return ""
    size = f"{data.images.shape[-1]} px"
    return f"enlarged   {data.enlarged} of {len(data.images)} pictures to {size}; they are smaller"


EQUAL_CAPTIONS = {
    "positive": "each other's positives",
    "ignore": "left out: neither positives nor negatives of each other",
    "negative": "each other's negatives",
}


def report_equal_captions(trained: Dataset | None, meaning: str | None) -> str:
    """What equal captions of different items are to each other in training, in words; "" if there
    are none.

    trained: None of a stream, of which it is not known how many there are. meaning:
    `Config.equal_captions`; None for a user's own objective.
    """
    told = "what your objective makes of them: it is not told which are equal"
    if meaning:
        told = f"{EQUAL_CAPTIONS[meaning]} (--equal-captions {meaning})"
    if trained is None:
        return f"note       equal captions within a batch of the stream are {told}"
    captions = [trained.captions[n] for n in trained.training_items()]
    number = count_equal(captions)
    if not number:
        return ""
    if len({text_key(text) for texts in captions for text in texts}) == 1:
        return "warning    all training captions are equal: there is nothing to tell apart"
    note = (
        f"note       {number} training captions are equal to one of another training item: "
        f"within a batch such captions are {told}"
    )
    if number < sum(map(len, captions)) or "caption" not in trained.split_by:
        return note
    return note + (
        "\nwarning    held-out captions are held out with all their pictures: if they are classes, "
        "these are not trained on. Name the splits, by folders train/ and val/ or a column split"
    )


def report_groups(data: Dataset, pattern: str | None) -> str:
    """What --group-by found, in words; "" if it is not given."""
    if pattern is None:
        return ""
    groups, without = len(set(data.group) - {None}), data.group.count(None)
    return f"groups     {groups} by --group-by; {without} of {len(data.items)} items are in none"


def count_overlap(trained: Dataset, scored: Dataset) -> dict[str, dict[str, int]]:
    """What each held-out split of `scored` shares with what is trained on: the numbers of its items
    with such a caption, of such a group, and with training pictures of their own; and of its
    pictures that are training pictures too, equal to the pixel."""
    rows = trained.rows("train")
    items = trained.image_item[rows].unique().tolist()
    names = {trained.items[n] for n in items}
    groups = {trained.group[n] for n in items} - {None}
    captions = {text_key(text) for n in items for text in trained.captions[n]}
    pictures = set(picture_hashes(trained.images[rows]))
    found = {}
    for split in held_out(scored):
        rows = scored.rows(split)
        items = scored.image_item[rows].unique().tolist()
        found[split] = {
            "captions": sum(
                any(text_key(text) in captions for text in scored.captions[n]) for n in items
            ),
            "groups": sum(scored.group[n] in groups for n in items),
            "items": sum(scored.items[n] in names for n in items),
            "pictures": sum(x in pictures for x in picture_hashes(scored.images[rows])),
        }
    return found


def report_overlap(overlap: dict[str, dict[str, int]], scored: Dataset) -> str:
    """What `count_overlap` found, in words; "" if nothing."""
    lines = []
    for split, counts in overlap.items():
        rows = scored.rows(split)
        items = len(scored.image_item[rows].unique())
        for kind, what in SHARED.items():
            if kind == "pictures" and counts[kind]:
                lines.append(f"warning    {counts[kind]} of {len(rows)} pictures of {split} {what}")
            elif counts[kind]:
                lines.append(f"note       {counts[kind]} of {items} items of {split} {what}")
    return "\n".join(lines)


def report_test(data: Dataset) -> str:
    """That the split "test" is scored once, in words; "" if there is none, or no other."""
    others = [split for split in held_out(data) if split not in data.validation_splits()]
    if not others:
        return ""
    about = f"only {', '.join(data.validation_splits())} is scored before"
    return f"note       {', '.join(others)} is scored once, after the last step: {about}"


def report_skipped(skipped: list[Skipped], limit: int = 10) -> str:
    """Their number, then `limit` of them, one per line, of each reason the first ones; "" if there
    are none."""
    if not skipped:
        return ""
    seen = Counter()
    turns = []  # the first of each reason, then the second of each
    for record in skipped:
        turns.append(seen[record.kind])
        seen[record.kind] += 1
    order = sorted(range(len(skipped)), key=turns.__getitem__)[:limit]
    lines = [f"skipped {len(skipped)} records:"]
    lines += [f"  {one_line('{}: {}'.format(*skipped[n]))}" for n in sorted(order)]
    return "\n".join(lines + ["  …"] * (len(skipped) > limit))
