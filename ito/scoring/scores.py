"""Formats scores: the table that commands print, and the files of clip_benchmark."""

from dataclasses import dataclass, field
from pathlib import Path

KS = (1, 5, 10)
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
    for split in dict.fromkeys(name.split("/")[0] for name in last if "/" in name):
        pictures, captions = (last[f"{split}/{way}/candidates"] for way in ("t2i", "i2t"))
        title = f"{split}: {count(pictures, 'picture')}, {count(captions, 'caption')}"
        section = Section(title, certain(split, last), [*columns, "chance"])
        for label, key, chance, form in lines(split, last):
            if key in last:
                cells = [f"{s[key]:{form}}" if key in s else "" for s in columns.values()]
                finer = ".2%" if form == ".1%" else form  # chance is often below 1 %
                odds = f"{last[chance]:{finer}}" if chance in last else ""
                section.rows.append((label, cells, odds))
        found.append(section)
    return found


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


def certain(split: str, scores: dict[str, float]) -> list[str]:
    """Notes on retrieval scores that are 100 % for any model, because there are few candidates."""
    notes = []
    for way, words in DIRECTIONS.items():
        candidates = scores[f"{split}/{way}/candidates"]
        sure = [f"R@{k}" for k in KS if k >= candidates]
        if sure:
            notes.append(
                f"{words}: {', '.join(sure)} {'is' if len(sure) == 1 else 'are'} 100 % for any "
                f"model, with {count(candidates, 'candidate')}"
            )
    return notes


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def table(columns: dict[str, dict[str, float]]) -> str:
    """The scores as text, with a column per evaluation (`{"before": ..., "after": ...}`)."""
    text = []
    for section in sections(columns):
        text.append(section.title)
        text += [f"  note: {note}" for note in section.notes]
        text.append(f"  {'':36}" + "".join(f"{title:>10}" for title in section.columns))
        for label, cells, chance in section.rows:
            text.append(f"  {label:36}" + "".join(f"{cell:>10}" for cell in [*cells, chance]))
    return "\n".join(line.rstrip() for line in text)


def clip_benchmark(scores: dict[str, float], data: str, run: Path) -> list[dict]:
    """`scores` as records of clip_benchmark, one per split and task.

    `dataset` is `data/split`, followed by the kind of classes if a task has several; `model` is
    "ito", `pretrained` the run. `clip_benchmark build *.json` combines them with others in a table.
    Zero-shot scores use the names without a prompt; clip_benchmark's use the mean of many prompts.
    """
    found = []

    def add(dataset: str, task: str, metrics: dict[str, str]) -> None:
        values = {name: scores[key] for name, key in metrics.items() if key in scores}
        if values:
            record = {"dataset": dataset, "model": "ito", "pretrained": str(run), "task": task}
            found.append(record | {"metrics": values, "language": "en"})

    for split in dict.fromkeys(name.split("/")[0] for name in scores if "/" in name):
        name = f"{data}/{split}"
        recall = {f"image_retrieval_recall@{k}": f"{split}/t2i/R@{k}" for k in KS}
        recall |= {f"text_retrieval_recall@{k}": f"{split}/i2t/R@{k}" for k in KS}
        add(name, "zeroshot_retrieval", recall)
        for kind in ("names", "groups", "subgroups"):
            key = f"{split}/zero_shot/{kind}"
            metrics = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
            metrics = {theirs: f"{key}/{ours}" for theirs, ours in metrics.items()}
            add(f"{name}/{kind}", "zeroshot_classification", metrics)
        for kind in ("subgroups", "concepts"):
            key = f"{split}/linear_probe/{kind}"
            metrics = {"lp_acc1": "top1", "lp_acc5": "top5"}
            metrics |= {"lp_mean_per_class_recall": "mean_per_class"}
            metrics = {theirs: f"{key}/{ours}" for theirs, ours in metrics.items()}
            add(f"{name}/{kind}", "linear_probe", metrics)
    return found
