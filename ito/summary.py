"""What a command says about its data: in numbers (`RUN/data.json`) and in words."""

from collections import Counter

from ito.cli import one_line
from ito.config import Config
from ito.data.dataset import Dataset
from ito.data.fields import Skipped, count_kinds
from ito.data.splits import picture_hashes, text_key
from ito.model.tokenizer import Tokenizer


def summarise(form: str, parts: list[Dataset], cut: int, streamed: bool = False) -> dict:
    """The numbers of `parts`, the data set, or that trained on and that scored.

    form: the format of what is trained on. cut: captions longer than the context. Of a stream what
    is trained on is not known before it is read: `train_items` is None.
    """
    captions = [texts for part in parts for texts in part.captions]
    keys = [[text_key(text) for text in texts] for texts in captions]
    often = Counter(key for own in keys for key in set(own))
    held = [
        {
            item
            for item, split in zip(part.image_item.tolist(), part.split, strict=True)
            if split != "train"
        }
        for part in parts
    ]
    return {
        "format": form,
        "pictures": sum(len(part.images) for part in parts),
        "items": sum(len(part.items) for part in parts),
        "captions": sum(map(len, captions)),
        "skipped": count_kinds([record for part in parts for record in part.skipped]),
        "cut_captions": cut,
        "equal_captions": sum(often[key] > 1 for own in keys for key in own),
        "train_items": None if streamed else len(parts[0].training_items()),
        "val_items": len(held[-1]),
        "split_by": parts[0].split_by if len(parts) == 1 and not streamed else "none",
    }


def sentence(facts: dict) -> str:
    """`facts` are those of `summarise`, and `cut_tokens` and `enlarged` if these are known."""
    skipped = sum(facts["skipped"].values())
    reasons = ", ".join(f"{kind}: {count}" for kind, count in facts["skipped"].items())
    trained = facts["train_items"]
    cut, enlarged = facts.get("cut_tokens", 0), facts.get("enlarged", 0)
    return (
        f"{facts['format']}: {facts['pictures']} pictures of {facts['items']} items with "
        f"{facts['captions']} captions, {facts['cut_captions']} of them cut and "
        f"{facts['equal_captions']} equal to one of another item; "
        f"{'a stream' if trained is None else trained} to train on, {facts['val_items']} held out, "
        f"split by {facts['split_by']}; {skipped} records skipped"
        + f" ({reasons})" * bool(skipped)
        + f"; {cut:.1%} of all tokens are cut" * bool(cut)
        + f"; {enlarged} pictures enlarged" * bool(enlarged)
    )


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


def report_equal_captions(facts: dict, meaning: str | None) -> str:
    """What equal captions of different items are to each other in training, in words; "" if there
    are none. How many there are in a stream is not known.

    meaning: `Config.equal_captions`; None for a user's own objective.
    """
    if not facts["equal_captions"] and facts["train_items"] is not None:
        return ""
    told = "what your objective makes of them: it is not told which are equal"
    if meaning:
        told = f"{EQUAL_CAPTIONS[meaning]} (--equal-captions {meaning})"
    if facts["train_items"] is None:
        return f"note       equal captions within a batch of the stream are {told}"
    number = facts["equal_captions"]
    return (
        f"note       {number} captions are equal to one of another item: "
        f"within a training batch such captions are {told}"
    )


def report_shared_captions(trained: Dataset, scored: Dataset) -> str:
    """How many held-out items have a caption that is also trained on, in words; "" if none has."""

    def texts(data: Dataset, rows) -> dict[int, set[str]]:
        items = data.image_item[rows].unique().tolist()
        return {item: set(map(text_key, data.captions[item])) for item in items}

    known = set().union(*texts(trained, trained.rows("train")).values())
    found = []
    for split in scored.held_out_splits():
        held = texts(scored, scored.rows(split)).values()
        if count := sum(not known.isdisjoint(own) for own in held):
            about = f"{count} of {len(held)} items of {split}"
            found.append(f"note       {about} have a caption that is trained on too")
    return "\n".join(found)


def report_repeated(scored: Dataset, trained: Dataset | None = None) -> str:
    """How many held-out pictures are also training pictures (of `trained`, by default of the same
    data set), equal to the pixel, in words; "" if none is."""
    trained = trained or scored
    known = set(picture_hashes(trained.images[trained.rows("train")]))
    hashes = picture_hashes(scored.images)
    repeated = Counter(
        split
        for x, split in zip(hashes, scored.split, strict=True)
        if split != "train" and x in known
    )
    return "\n".join(
        f"warning    {count} of {scored.split.count(split)} pictures of {split} are training "
        "pictures too: their scores do not measure generalisation"
        for split, count in repeated.items()
    )


def report_skipped(skipped: list[Skipped], limit: int = 10) -> str:
    """Their number, then the first `limit` of them, one per line; "" if there are none."""
    if not skipped:
        return ""
    lines = [f"skipped {len(skipped)} records:"]
    lines += [f"  {one_line(f'{where}: {reason}')}" for where, reason in skipped[:limit]]
    return "\n".join(lines + ["  …"] * (len(skipped) > limit))
