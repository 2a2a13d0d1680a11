"""`report.html` of a run, a self-contained file.

Scores, curves, a map of both modalities, search results, the worst mistakes, the configuration and
the machine. The page loads nothing over the network.
"""

import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image

from ito.data.dataset import Dataset
from ito.files import read_text, undamaged, write_text
from ito.model.exported import Encoder
from ito.run import BEST_BY, RunFolder
from ito.scoring import charts
from ito.scoring.charts import escaped
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.metrics import image_text_pairs, ranks
from ito.scoring.projections import PROJECTIONS
from ito.scoring.scores import DIRECTIONS, sections
from ito.summary import sentence

QUERIES, SHOWN, MISTAKES = 8, 6, 12
MAPPED = 300  # pairs in the map: more would hide each other
# names, and endings of names, that are logged at every step but are no terms of the loss
NOT_LOSSES = ("kind", "step", "logit_scale", "logit_bias", "grad_norm", "lr", "loss_scale")
NOT_LOSS_UNITS = ("seconds", "_per_second", "_norm", "_share", "_mib", "_ms")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { max-width: 46rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wide { overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
        gap: 1rem 1.5rem; }
.grid svg { width: 100%; max-width: 26rem; height: auto; }
img { display: block; width: 100%; max-width: 64px; aspect-ratio: 1; box-sizing: border-box;
      border: 3px solid #ddd; border-radius: 4px; }
.right img { border-color: #3d8a4f; }
figure { margin: 0; min-width: 0; font-size: 11px; line-height: 1.3; }
.name { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.query { display: grid; grid-template-columns: 11rem 1fr; gap: .3rem .8rem; align-items: center;
         margin: .6rem 0; }
.found { display: grid; grid-template-columns: repeat(6, minmax(0, 5rem)); gap: .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr));
        gap: .8rem; font-size: 13px; }
.cards > div { display: grid; grid-template-columns: 52px 1fr 52px; gap: .6rem; }
.cards ol { margin: 0; padding-left: 1.2rem; } .cards .right { color: #2c6b3b; font-weight: 600; }
.settings { columns: 17rem; font-size: 13px; } .settings div { break-inside: avoid; }
.settings code { float: right; max-width: 60%; overflow-wrap: anywhere; text-align: right; }
.settings div { overflow: hidden; border-bottom: 1px solid #eee; padding: .1rem 0; }
@media (max-width: 40rem) {
  .query { grid-template-columns: 1fr; } .query > span { font-weight: 600; }
  table { font-size: 12px; } th, td { padding: .15rem .3rem; }
}
"""


def write_report(run: Path, encoder: Encoder, dataset: Dataset, project: str = "pca") -> Path:
    """Write the run's report from the logged metrics, the configuration and the exported model.

    `project` is the projection of the map, "pca" or "umap" (package umap-learn).
    """
    files = RunFolder(run)
    records = files.log().read()
    with undamaged(files.metrics):
        scores = [r for r in records if r["kind"] == "eval"]
        streams = [r["skipped"] for r in records if r["kind"] == "stream"]
        curves = curve_charts(records, dataset.held_out_splits())
        tables = score_tables({"before": scores[0], "after": scores[-1]}) if scores else ""
        best = files.log().best()
    parts = [
        f"<h1>{escaped(run.name)}</h1>",
        f"<p>Model of step {encoder.step}"
        f"{f' (the best by {BEST_BY} is step {escaped(best)})' if best else ''}, "
        f"{len(dataset.items)} items, {len(dataset.images)} pictures, "
        f"{len(dataset.skipped)} records skipped"
        f"{f'; {escaped(streams[-1])} of the stream trained on' if streams else ''}.</p>",
    ]
    if files.data.exists():
        with undamaged(files.data):
            facts = json.loads(read_text(files.data))
            parts.append(f"<p>{escaped(sentence(facts))}.</p>")
    parts.append(f'{tables}<h2>Curves</h2><div class="grid">{curves}</div>')
    for split in dataset.held_out_splits():
        view = EmbeddedSplit(dataset.rows(split), encoder.model, encoder.tokenizer, dataset)
        parts += [
            f"<h2>{escaped(split)}</h2>",
            embedding_map(view, project),
            text_to_image(view),
            image_to_text(view),
            mistakes(view),
        ]
    for title, path in (("Configuration", files.config), ("Environment", files.environment)):
        if path.exists():
            with undamaged(path):
                parts.append(settings(title, json.loads(read_text(path))))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(run.name)}</title><style>{STYLE}</style>{''.join(parts)}</html>"
    )
    write_text(files.report, page)
    return files.report


def score_tables(columns: dict[str, dict[str, float]]) -> str:
    parts = ['<h2>Held-out scores</h2><div class="grid">']
    for section in sections(columns):
        head = "".join(f"<th>{title}</th>" for title in ["", *section.columns])
        rows = "".join(
            "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in [label, *cells, chance])
            for label, cells, chance in section.rows
        )
        notes = "".join(f"<p>Note: {escaped(note)}.</p>" for note in section.notes)
        parts.append(
            f'<div class="wide"><h3>{escaped(section.title)}</h3>{notes}'
            f"<table><tr>{head}</tr>{rows}</table></div>"
        )
    return "".join([*parts, "</div>"])


def curve_charts(records: list[dict], splits: list[str]) -> str:
    steps = [r for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "eval"]

    def line(source: list[dict], key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in source if key in r]

    terms = [
        name
        for name in dict.fromkeys(name for r in steps for name in r)
        if name not in NOT_LOSSES and not name.endswith(NOT_LOSS_UNITS)
    ]
    parts = [charts.lines("loss and its terms", {name: line(steps, name) for name in terms})]
    for title, name in (
        ("logit scale", "logit_scale"),
        ("gradient norm", "grad_norm"),
        ("learning rate", "lr"),
    ):
        parts.append(charts.lines(title, {name: line(steps, name)}))
    for split in splits:
        for way, words in DIRECTIONS.items():
            recall = {f"R@{k}": line(scores, f"{split}/{way}/R@{k}") for k in (1, 5, 10)}
            parts.append(charts.lines(f"{split}: {words}", recall))
        gap = {name: line(scores, f"{split}/modality/{name}") for name in ("gap", "relative")}
        parts.append(charts.lines(f"{split}: modality gap", gap))
    return "".join(parts)


def spaced(count: int, number: int) -> torch.Tensor:
    """`number` indices of `range(count)`, evenly spaced; all if there are fewer."""
    return torch.linspace(0, count - 1, min(count, number)).long()


def embedding_map(view: EmbeddedSplit, project: str) -> str:
    """Maps of both modalities, coloured by modality and by group; texts are drawn as x."""
    items = view.item.unique()
    items = items[spaced(len(items), MAPPED)].tolist()
    first = [view.picture_of(n) for n in items]
    texts = [view.own[n][0] for n in items]
    plane, about = PROJECTIONS[project](torch.cat([view.images[first], view.texts[texts]]))
    images, texts = plane[: len(items)], plane[len(items) :]
    names = [view.name(p) for p in first]
    modality = {"images": (images, names, "o"), "texts": (texts, names, "x")}
    maps = charts.points("by modality", modality)
    group = [view.dataset.group[n] or "none" for n in items]
    if len(set(group)) > 1:
        by_group = {
            label: pick(images, names, [g == label for g in group], "o")
            for label in sorted(set(group), key=lambda label: (label == "none", label))
        }
        maps += charts.points("images by group", by_group)
    return f'<h3>Embedding map</h3><p>{about}</p><div class="grid">{maps}</div>'


def pick(places, names, chosen: list[bool], mark: str):
    kept = [n for n, yes in enumerate(chosen) if yes]
    return [places[n] for n in kept], [names[n] for n in kept], mark


def text_to_image(view: EmbeddedSplit) -> str:
    """Evenly spaced captions with their first pictures; correct ones are framed green."""
    asked = spaced(len(view.captions), QUERIES)
    best = (view.texts[asked] @ view.images.T).argsort(1, True)[:, :SHOWN]
    parts = ["<h3>Text to image</h3><p>Framed green: a picture that has the caption.</p>"]
    for text, pictures in zip(asked.tolist(), best.tolist(), strict=True):
        found = "".join(
            f"<figure{' class=right' if text in view.right(p) else ''}>{img(view, p)}"
            f'<span class="name">{escaped(view.name(p))}</span></figure>'
            for p in pictures
        )
        caption = escaped(view.captions[text], 300)
        parts.append(
            f'<div class="query"><span>{caption}</span><div class="found">{found}</div></div>'
        )
    return "".join(parts)


def image_to_text(view: EmbeddedSplit) -> str:
    """Evenly spaced pictures with their first captions."""
    asked = spaced(len(view.images), QUERIES)
    best = (view.images[asked] @ view.texts.T).argsort(1, True)[:, :5]
    parts = ['<h3>Image to text</h3><div class="cards">']
    for p, texts in zip(asked.tolist(), best.tolist(), strict=True):
        captions = "".join(
            f"<li{' class=right' if text in view.right(p) else ''}>"
            f"{escaped(view.captions[text], 300)}</li>"
            for text in texts
        )
        parts.append(f"<div>{img(view, p)}<ol>{captions}</ol></div>")
    return "".join([*parts, "</div>"])


def mistakes(view: EmbeddedSplit) -> str:
    """The pictures whose own captions have the worst rank, with a picture of the wrong caption that
    is most similar."""
    rank, _ = ranks(view.images, view.texts, image_text_pairs(view.item, view.item_text))
    worst = [p for p in rank.argsort(descending=True).tolist() if rank[p] > 1][:MISTAKES]
    if not worst:
        return ""
    parts = [
        '<h3>Worst mistakes</h3><p>Right: what the picture was taken for.</p><div class="cards">'
    ]
    for p in worst:
        cosines = view.texts @ view.images[p]
        cosines[view.right(p)] = -torch.inf
        wrong = int(cosines.argmax())
        other = view.picture_of(int(view.item_text[view.item_text[:, 1] == wrong][0, 0]))
        own, taken = escaped(view.name(p)), escaped(view.captions[wrong], 300)
        parts.append(
            f"<div>{img(view, p)}<span><b>{own}</b>, its best caption {rank[p]} of "
            f"{len(view.captions)}; taken for <b>{taken}</b></span>{img(view, other)}</div>"
        )
    return "".join([*parts, "</div>"])


def img(view: EmbeddedSplit, picture: int) -> str:
    name = escaped(view.name(picture))
    return f'<img src="{png(view.pictures[picture])}" alt="{name}" loading="lazy">'


def png(picture: torch.Tensor) -> str:
    """A uint8 (3, S, S) picture as a data URL, in 256 colours: a third of the bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((64, 64), Image.Resampling.LANCZOS)
    image.quantize(256).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def settings(title: str, values: dict) -> str:
    flat = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    rows = "".join(
        f"<div>{escaped(name)} <code>{escaped(json.dumps(value))}</code></div>"
        for name, value in flat.items()
    )
    return f'<h2>{title}</h2><div class="settings">{rows}</div>'
