"""`report.html` of a run, a self-contained file: `report.html` beside this file is its template."""

import base64
import io
import json
from pathlib import Path

import torch
from markupsafe import Markup
from PIL import Image

from ito.data.dataset import Dataset
from ito.files import read_text, undamaged, write_text
from ito.model.exported import Encoder
from ito.run import BEST_BY, RunFolder
from ito.scoring import charts
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.metrics import image_text_pairs, ranks
from ito.scoring.pages import render
from ito.scoring.projections import PROJECTIONS
from ito.scoring.scores import DIRECTIONS, KS, headlines, sections
from ito.summary import sentence

QUERIES, SHOWN, CAPTIONS, MISTAKES = 8, 6, 5, 12
SPLITS = 3  # that answers and a map are shown of: each takes up to 0.8 MB
MAPPED = 300  # pairs in the map: more would hide each other
# names, and endings of names, that are logged at every step but are no terms of the loss
NOT_LOSSES = ("kind", "step", "logit_scale", "logit_bias", "grad_norm", "lr", "loss_scale")
NOT_LOSS_UNITS = ("seconds", "_per_second", "_norm", "_share", "_mib", "_ms")
LOGGED = {  # their titles, axes, and what they are
    "logit_scale": ("Logit scale", "factor", "What cosines are multiplied by in the loss."),
    "grad_norm": ("Gradient norm", "norm", "The gradient's length before clipping."),
    "lr": ("Learning rate", "rate", "After the warm-up it falls to 0 by the last step."),
}


def write_report(run: Path, encoder: Encoder, dataset: Dataset, project: str = "pca") -> Path:
    """Write the run's report from the logged metrics, the configuration and the exported model.

    `project` is the projection of the map, "pca" or "umap" (package umap-learn).
    """
    files = RunFolder(run)
    records = files.log().read()
    splits = dataset.held_out_splits()
    counts = f"{len(dataset.items)} items, {len(dataset.images)} pictures"
    about = [f"{counts}, {len(dataset.skipped)} records skipped."]
    with undamaged(files.metrics):
        scores = [r for r in records if r["kind"] == "eval"]
        streams = [r["skipped"] for r in records if r["kind"] == "stream"]
        about += [f"Records of the stream skipped: {number}." for number in streams[-1:]]
        curves = curve_charts(records, splits)
        tables = sections({"before": scores[0], "after": scores[-1]}) if scores else []
        told = headlines(scores[-1]) if scores else ["No scores are logged yet."]
        told += [f"These scores are of step {r['step']}." for r in scores[-1:]]
        best = files.log().best()
        if best not in (None, encoder.step):
            told += [f"The model is of step {encoder.step}; the best by {BEST_BY} is step {best}."]
    if files.data.exists():
        with undamaged(files.data):
            about = [f"{sentence(json.loads(read_text(files.data)))}.", *about[1:]]
    settings = []
    for name, path in (("Options", files.config), ("Machine and versions", files.environment)):
        if path.exists():
            with undamaged(path):
                settings.append((name, flat(json.loads(read_text(path)))))
    views = []
    for split in splits[:SPLITS]:
        view = EmbeddedSplit(dataset.rows(split), encoder.model, encoder.tokenizer, dataset)
        views.append(answers(view, split, project))
    left_out = f" Shown: {SPLITS} of {len(splits)} splits." if len(splits) > SPLITS else ""
    page = render(
        "report.html",
        name=run.name,
        told=[*told, f"Data: {' '.join(about)}"],
        views=views,
        left_out=left_out,
        curve_charts=curves,
        sections=tables,
        settings=settings,
    )
    write_text(files.report, page)
    return files.report


def curve_charts(records: list[dict], splits: list[str]) -> list[dict]:
    steps = [r for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "eval"]

    def line(source: list[dict], key: str, factor: float = 1) -> list[tuple[float, float]]:
        return [(r["step"], factor * r[key]) for r in source if key in r]

    terms = [
        name
        for name in dict.fromkeys(name for r in steps for name in r)
        if name not in NOT_LOSSES and not name.endswith(NOT_LOSS_UNITS)
    ]
    about = "Of each logged batch: the loss, and the terms that it is made of. Lower is better."
    series = {name: line(steps, name) for name in terms}
    parts = charts.lines("Training loss", "loss", about, series, log=True)
    for name, (head, axis, about) in LOGGED.items():
        series = {name: line(steps, name)}
        parts += charts.lines(head, axis, about, series, log=name == "grad_norm")
    for split in splits[:SPLITS]:
        for way, words in DIRECTIONS.items():
            recall = {f"R@{k}": line(scores, f"{split}/{way}/R@{k}", 100) for k in KS}
            recall["R@1 by chance"] = line(scores, f"{split}/{way}/chance", 100)
            about = f"Share of {words.split()[0]}s with a right answer among the first 1, 5 or 10."
            parts += charts.lines(f"{split}: {words}", "per cent", about, recall)
        gap = {name: line(scores, f"{split}/modality/{name}") for name in ("gap", "relative")}
        about = (
            "Distance between the mean image and the mean text; relative: divided by the distance "
            "between an image and a text. At 0 images and texts lie in the same place."
        )
        parts += charts.lines(f"{split}: modality gap", "distance", about, gap)
    return parts


def spaced(count: int, number: int) -> list[int]:
    """`number` indices of `range(count)`, evenly spaced; all if there are fewer."""
    return torch.linspace(0, count - 1, min(count, number)).long().tolist()


def answers(view: EmbeddedSplit, split: str, project: str) -> dict:
    """What the page shows of a split."""
    found, named = text_to_image(view), image_to_text(view)
    return {
        "title": split,
        "found": found,
        "found_first": sum(q["pictures"][0]["right"] for q in found),
        "named": named,
        "named_first": sum(q["captions"][0][1] for q in named),
        "mistakes": mistakes(view),
        "maps": maps(view, split, project),
    }


def maps(view: EmbeddedSplit, split: str, project: str) -> list[dict]:
    """Maps of both modalities, and of the images by group."""
    items = view.item.unique()
    items = items[spaced(len(items), MAPPED)].tolist()
    first = [view.picture_of(n) for n in items]
    texts = [view.own[n][0] for n in items]
    plane, about = PROJECTIONS[project](torch.cat([view.images[first], view.texts[texts]]))
    images, texts = plane[: len(items)], plane[len(items) :]
    names = [view.name(p) for p in first]
    modality = {"images": (images, names, "●"), "texts": (texts, names, "×")}
    about = f"Embeddings of {about} Points close together are similar to the model; names on hover."
    found = [charts.points(f"{split}: images and texts", about, modality)]
    group = charts.most_frequent([view.dataset.group[n] or "none" for n in items])
    if len(set(group)) > 1:
        by_group = {}
        for label in sorted(set(group), key=lambda label: (label in ("none", "other"), label)):
            own = [n for n, other in enumerate(group) if other == label]
            by_group[label] = [images[n] for n in own], [names[n] for n in own], "●"
        about = "The images of the same map, coloured by the group of their item."
        found.append(charts.points(f"{split}: images by group", about, by_group))
    return found


def text_to_image(view: EmbeddedSplit) -> list[dict]:
    """Evenly spaced captions with their first pictures."""
    asked = spaced(len(view.captions), QUERIES)
    best = (view.texts[asked] @ view.images.T).argsort(1, True)[:, :SHOWN]
    return [
        {
            "caption": view.captions[text][:300],
            "pictures": [picture(view, p) | {"right": text in view.right(p)} for p in pictures],
        }
        for text, pictures in zip(asked, best.tolist(), strict=True)
    ]


def image_to_text(view: EmbeddedSplit) -> list[dict]:
    """Evenly spaced pictures with their first captions."""
    asked = spaced(len(view.images), QUERIES)
    best = (view.images[asked] @ view.texts.T).argsort(1, True)[:, :CAPTIONS]
    return [
        picture(view, p)
        | {"captions": [(view.captions[text][:300], text in view.right(p)) for text in texts]}
        for p, texts in zip(asked, best.tolist(), strict=True)
    ]


def mistakes(view: EmbeddedSplit) -> list[dict]:
    """The pictures whose own captions have the worst rank, with a picture of the wrong caption that
    is most similar."""
    rank, _ = ranks(view.images, view.texts, image_text_pairs(view.item, view.item_text))
    worst = [p for p in rank.argsort(descending=True).tolist() if rank[p] > 1][:MISTAKES]
    found = []
    for p in worst:
        cosines = view.texts @ view.images[p]
        cosines[view.right(p)] = -torch.inf
        wrong = int(cosines.argmax())
        other = view.picture_of(int(view.item_text[view.item_text[:, 1] == wrong][0, 0]))
        taken = {"taken": view.captions[wrong][:300], "other": picture(view, other)}
        rank_of = {"rank": int(rank[p]), "captions": len(view.captions)}
        found.append({"own": picture(view, p)} | rank_of | taken)
    return found


def picture(view: EmbeddedSplit, number: int) -> dict:
    """Its name, and a data URL of at most 64 × 64 pixels in 256 colours: a third of the bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(view.pictures[number].permute(1, 2, 0).numpy())
    image.thumbnail((64, 64), Image.Resampling.LANCZOS)
    image.quantize(256).save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"name": view.name(number), "png": Markup(f"data:image/png;base64,{encoded}")}


def flat(values: dict) -> list[tuple[str, str]]:
    """Every value by its name, those of objects among them too, as JSON."""
    found = {}
    for name, value in values.items():
        found |= value if isinstance(value, dict) else {name: value}
    return [(name, json.dumps(value)) for name, value in found.items()]
