"""Formats scores: the table that commands print, and the files of clip_benchmark."""

from dataclasses import dataclass, field
from pathlib import Path

from ito.cli import one_line
from ito.data.splits import TEST

KS = (1, 5, 10)
# Of fewer queries the intervals are too narrow: of 6 queries, 28 % of them miss a true R@1 of 20 %;
# of 20 queries 8 %.
FEW = 20
ACCURACIES = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


@dataclass
class Section:
    """The scores of one split; `rows` are (label, one cell per column, chance level or "")."""

    title: str
    notes: list[str]
    columns: list[str]
    rows: list[tuple[str, list[str], str]] = field(default_factory=list)


def sections(columns: dict[str, dict[str, float]]) -> list[Section]:
    """A section per split of the last of `columns`, `{"before": scores, "after": scores}`.

    Only scores of the last column are shown; one that another column lacks is blank there.
    """
    last = columns[list(columns)[-1]]
    found = []
    for split in splits_of(last):
        section = Section(title(split, last), notes(split, last), [*columns, "chance"])
        counted = f"{split}/distinct_captions"
        if counted in last:
            section.notes += [
                f"{name} is an older version's, of each item's first caption alone: its R@K and "
                "ranks are not comparable"
                for name, scores in columns.items()
                if f"{split}/i2t/R@1" in scores and counted not in scores
            ]
        for label, key, chance, form in lines(split, last):
            if key in last:
                cells = [cell(s, key, form) for s in columns.values()]
                finer = ".2%" if form == ".1%" else form  # chance is often below 1 %
                odds = f"{last[chance]:{finer}}" if chance in last else ""
                section.rows.append((label, cells, odds))
        found.append(section)
    return found


KEPT_OUT = {  # what the splits of the emoji sets are
    "heldout_style": "new drawings of concepts that were trained on",
    "heldout_concept": "concepts that were not trained on",
}


def headlines(scores: dict[str, float]) -> list[str]:
    """What R@1 means, in a sentence per split and direction; those of the split "test" first. The
    interval of the first is a sentence of its own, the second."""
    found = []
    for split in sorted(splits_of(scores), key=lambda name: name != TEST):
        pictures, texts = (scores[f"{split}/{way}/candidates"] for way in ("t2i", "i2t"))
        shown = f"{count(pictures, 'picture')} kept out of training"
        shown += f" ({KEPT_OUT.get(split, f'split {split}')})"
        for way, what, candidates, queries in (
            ("i2t", "caption", texts, shown),
            ("t2i", "picture", pictures, f"the {count(texts, 'caption')} of these pictures"),
        ):
            key = f"{split}/{way}/R@1"
            low, high = (100 * scores.get(f"{key}/{end}", 0) for end in ("low", "high"))
            interval = f"95 % interval {low:.1f} to {high:.1f}" * (low < high)
            found.append(
                f"Finds a right {what} among {candidates} for {100 * scores[key]:.1f} %"
                + f" ({interval})" * bool(found and interval)
                + f" of {queries}; chance: {100 * scores[f'{split}/{way}/chance']:.2f} %."
            )
            if len(found) == 1 and interval:
                found.append(f"The {interval} of this share is over the items (bootstrap).")
    return found


def splits_of(scores: dict[str, float]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in scores if "/" in name))


def lines(split: str, last: dict[str, float]):
    """(label, key, key of the chance level or None, format) in the order of the table."""
    for way, words in DIRECTIONS.items():
        key = f"{split}/{way}"
        yield f"{words} R@1", f"{key}/R@1", f"{key}/chance", ".1%"
        yield f"{words} R@5", f"{key}/R@5", None, ".1%"
        yield f"{words} R@10", f"{key}/R@10", None, ".1%"
        yield f"{words} mean rank", f"{key}/mean_rank", f"{key}/mean_rank_chance", ".1f"
        yield f"{words} median rank", f"{key}/median_rank", None, ".1f"
    for kind in ("names", "groups", "subgroups"):
        key = f"{split}/zero_shot/{kind}"
        label = f"zero-shot, {last.get(f'{key}/classes')} {kind}"
        yield label, f"{key}/top1", f"{key}/chance", ".1%"
        yield "  with prompts", f"{key}/ensemble", None, ".1%"
    for probe, words in (("linear_probe", "linear probe"), ("knn", "k-NN")):
        for kind in ("subgroups", "concepts"):
            key = f"{split}/{probe}/{kind}"
            label = f"{words}, {last.get(f'{key}/classes')} {kind}"
            yield label, f"{key}/top1", f"{key}/chance", ".1%"
    key = f"{split}/modality"
    yield "modality gap", f"{key}/gap", None, ".3f"
    yield "modality gap, relative", f"{key}/relative", None, ".3f"
    yield "modality classifier", f"{key}/classifier", f"{key}/classifier_chance", ".1%"
    yield "uniformity, images", f"{split}/geometry/uniformity_images", None, ".3f"
    yield "uniformity, texts", f"{split}/geometry/uniformity_texts", None, ".3f"
    yield "alignment", f"{split}/geometry/alignment", None, ".3f"
    languages = last.get(f"{split}/languages/count")
    for way in DIRECTIONS:
        key = f"{split}/languages/{way}"
        label = f"rank variance, {languages} languages, {way}"
        yield label, f"{key}/mean_rank_variance", f"{key}/chance", ".0f"


def title(split: str, scores: dict[str, float]) -> str:
    pictures, texts = (scores[f"{split}/{way}/candidates"] for way in ("t2i", "i2t"))
    captions = scores.get(f"{split}/captions", texts)  # which logs of older versions lack
    equal = f", {texts} of them distinct" if captions != texts else ""
    return f"{split}: {count(pictures, 'picture')}, {count(captions, 'caption')}{equal}"


def cell(scores: dict[str, float], key: str, form: str) -> str:
    """The score, with its interval if that has a width; "" if there is no such score."""
    if key not in scores:
        return ""
    low, high = (100 * scores.get(f"{key}/{end}", 0) for end in ("low", "high"))
    return f"{scores[key]:{form}}" + f" ({low:.1f}–{high:.1f})" * (low < high)


def notes(split: str, scores: dict[str, float]) -> list[str]:
    """What the numbers mean, and which retrieval scores are 100 % for any model."""
    found = []
    if items := scores.get(f"{split}/items"):
        found.append(f"in brackets: the 95 % interval over {count(items, 'item')} (bootstrap)")
        found += [
            f"{words} has {count(number, 'query', 'queries')}: too few to trust its interval"
            for way, words in DIRECTIONS.items()
            if (number := scores.get(f"{split}/{way}/queries", FEW)) < FEW
        ]
    if scores.get(f"{split}/captions", 0) > scores.get(f"{split}/distinct_captions", 0):
        found.append(
            "captions that are equal, but for white space and case, are one text, right for every "
            "picture that has it"
        )
    if f"{split}/zero_shot/names/top1" in scores:
        found.append("names are the distinct first captions of all items, of every split")
    return found + certain(split, scores)


def certain(split: str, scores: dict[str, float]) -> list[str]:
    found = []
    for way, words in DIRECTIONS.items():
        candidates = scores[f"{split}/{way}/candidates"]
        lowest = scores.get(f"{split}/{way}/max_rank", candidates)
        sure = [f"R@{k}" for k in KS if k >= lowest]
        if sure:
            found.append(
                f"{words}: {', '.join(sure)} {'is' if len(sure) == 1 else 'are'} 100 % for any "
                f"model, with at most {lowest - 1} wrong of {count(candidates, 'candidate')}"
            )
    return found


def count(number: int, noun: str, several: str | None = None) -> str:
    return f"{number} {noun if number == 1 else several or noun + 's'}"


def table(columns: dict[str, dict[str, float]]) -> str:
    """The scores as text, with a column per evaluation (`{"before": ..., "after": ...}`)."""
    text = []
    for section in sections(columns):
        text.append(section.title)
        text += [f"  note: {note}" for note in section.notes]
        grid = [["", *section.columns]]
        grid += [[label, *cells, chance] for label, cells, chance in section.rows]
        widths = [max(10, 2 + max(map(len, column))) for column in zip(*grid, strict=True)][1:]
        for label, *cells in grid:
            padded = (f"{x:>{width}}" for x, width in zip(cells, widths, strict=True))
            text.append(f"  {label:36}" + "".join(padded))
    return "\n".join(one_line(line.rstrip(), 2000) for line in text)


def clip_benchmark(scores: dict[str, float], data: str, run: Path) -> list[dict]:
    """`scores` as records of clip_benchmark, one per split and task.

    `dataset` is `data/split`, followed by the kind of classes if a task has several; `model` is
    "ito", `pretrained` the run. `clip_benchmark build *.json` combines them with others in a table.
    Recall is by its rule: only an item's own captions are right (`clip_benchmark_recall`).
    Zero-shot scores use the names without a prompt; clip_benchmark's use the mean of many prompts.
    """
    found = []

    def add(dataset: str, task: str, metrics: dict[str, str]) -> None:
        values = {name: scores[key] for name, key in metrics.items() if key in scores}
        if values:
            record = {"dataset": dataset, "model": "ito", "pretrained": str(run), "task": task}
            found.append(record | {"metrics": values, "language": "en"})

    for split in splits_of(scores):
        name = f"{data}/{split}"
        recall = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in KS]
        metrics = {key: f"{split}/clip_benchmark/{key}" for key in recall}
        add(name, "zeroshot_retrieval", metrics)
        for task, prefix, ours, kinds in (
            ("zeroshot_classification", "", "zero_shot", ("names", "groups", "subgroups")),
            ("linear_probe", "lp_", "linear_probe", ("subgroups", "concepts")),
        ):
            for kind in kinds:
                key = f"{split}/{ours}/{kind}"
                metrics = {f"{prefix}{acc}": f"{key}/{top}" for acc, top in ACCURACIES.items()}
                add(f"{name}/{kind}", task, metrics)
    return found
