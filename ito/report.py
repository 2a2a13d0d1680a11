"""`report.html` of a run, one self-contained file: curves, scores, a gallery, the configuration."""

import base64
import html
import io
import json
from pathlib import Path

import torch
from PIL import Image

from ito.data import Dataset
from ito.evaluate import embed_images, embed_texts, table
from ito.export import Encoder

QUERIES, SHOWN = 12, 6
COLOURS = ("#2463a8", "#c4572b", "#3d8a4f", "#7a4fa3")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
pre { overflow-x: auto; background: #f6f6f4; padding: .8rem; font-size: 13px; line-height: 1.35; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.curves svg { width: 100%; height: auto; }
.query { display: flex; gap: .5rem; align-items: center; margin: .35rem 0; overflow-x: auto; }
.query > span { flex: 0 0 12rem; }
.query figure { margin: 0; flex: 0 0 auto; text-align: center; font-size: 11px; width: 5.2rem; }
.query img { width: 56px; height: 56px; border: 3px solid #ddd; border-radius: 4px; }
.query .right img { border-color: #3d8a4f; }
.query figcaption { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
"""


def write_report(run: Path, encoder: Encoder, dataset: Dataset) -> Path:
    """Write `run/report.html` from the logged metrics, the configuration and the exported model."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "eval"]
    splits = dataset.held_out_splits()
    config = (run / "config.json").read_text(encoding="utf-8")
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f"<p>Step {encoder.step}, {len(dataset.items)} items, {len(dataset.images)} pictures, "
        f"{len(dataset.skipped)} records skipped.</p>",
    ]
    if scores:
        columns = {"before": scores[0], "after": scores[-1]}
        parts.append(f"<h2>Held-out scores</h2><pre>{html.escape(table(columns))}</pre>")
    terms = [n for n in ("align", "fusion", "views", "local", "all") if steps and n in steps[0]]
    parts.append('<h2>Curves</h2><div class="curves">')
    for title, names in (
        ("loss terms", terms),
        ("logit scale", ("logit_scale",)),
        ("gradient norm", ("grad_norm",)),
        ("learning rate", ("lr",)),
    ):
        parts.append(plot(title, {n: [(r["step"], r[n]) for r in steps] for n in names}))
    for split in splits:
        parts.append(
            plot(
                f"{split}: R@1",
                {
                    words: [(r["step"], r[f"{split}/{key}/R@1"]) for r in scores]
                    for key, words in (("i2t", "image to text"), ("t2i", "text to image"))
                },
            )
        )
        gap = [(r["step"], r[f"{split}/modality/gap"]) for r in scores]
        parts.append(plot(f"{split}: modality gap", {"gap": gap}))
    parts.append("</div>")
    for split in splits:
        parts.append(gallery(split, encoder, dataset))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.name)}</title><style>{STYLE}</style>{''.join(parts)}</html>"
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def gallery(split: str, encoder: Encoder, dataset: Dataset) -> str:
    """Evenly spaced captions of a split with the pictures that come first; right ones framed."""
    rows = dataset.rows(split)
    item = dataset.image_item[rows]
    items = item.unique()
    asked = items[torch.linspace(0, len(items) - 1, min(QUERIES, len(items))).long()]
    images = embed_images(encoder.model, dataset.images[rows])
    texts = [dataset.captions[n][0] for n in asked.tolist()]
    order = (embed_texts(encoder.model, encoder.tokenizer(texts)) @ images.T).argsort(1, True)
    parts = [f"<h2>{html.escape(split)}: text to image</h2>"]
    for query, (text, best) in enumerate(zip(texts, order[:, :SHOWN].tolist(), strict=True)):
        parts.append(f'<div class="query"><span>{html.escape(text)}</span>')
        for place in best:
            name = html.escape(dataset.captions[int(item[place])][0])
            right = ' class="right"' if item[place] == asked[query] else ""
            picture = png(dataset.images[rows[place]])
            parts.append(
                f'<figure{right}><img src="{picture}" alt="{name}">'
                f"<figcaption>{name}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts)


def png(picture: torch.Tensor) -> str:
    """A uint8 (3, S, S) picture as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plot(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Lines over training steps as an SVG, with the ends of both axes labelled."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1
    top = max(max(y for _, y in points), 0) or 1
    width, height, left, bottom = 320, 170, 44, 22

    def place(x: float, y: float) -> str:
        inner_width, inner_height = width - left - 8, height - bottom - 26
        return f"{left + x / right * inner_width:.1f},{26 + (1 - y / top) * inner_height:.1f}"

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<text x="{left}" y="14" font-weight="600">{html.escape(title)}</text>',
        f'<path d="M{left},26V{height - bottom}H{width - 8}" fill="none" stroke="#999"/>',
        f'<text x="{left - 4}" y="32" text-anchor="end">{top:.3g}</text>',
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">0</text>',
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">step {right:g}</text>',
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(series) > 1:
            parts.append(
                f'<text x="{width - 8}" y="{14 + 12 * number}" text-anchor="end" '
                f'fill="{colour}">{html.escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])
