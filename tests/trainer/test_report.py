"""The report: one file, whose mistakes, map and curves are those of the model and the log."""

import math
import re
from pathlib import Path

import pytest
import torch
from support import untrained_run

import ito
from ito import report
from ito.config import Config
from ito.scoring import charts, projections, report_page
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.index import Index
from ito.scoring.scores import headlines
from ito.source import open_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return untrained_run.write_data(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def run(data):
    return untrained_run.write_run(data.parent / "run", data)


@pytest.fixture(scope="module")
def index(run):
    dataset = open_dataset(Config.load(run / "config.json"))
    return Index.open(run, ito.load(run), dataset)


def shown(index, split) -> EmbeddedSplit:
    encoder, dataset = index.encoder, index.dataset
    return EmbeddedSplit(dataset.rows(split), encoder.model, encoder.tokenizer, dataset)


def test_the_report_is_one_file_with_everything_in_it(run, data):
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert len(page) < 1.5e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)|url\(|@import|https?://', page)
    for target in re.findall(r'href="#(\w+)"', page):
        assert page.count(f'id="{target}"') == 1
    order = [
        'class="lead"',
        "worst mistakes",
        "Training loss",
        "<table>",
        "style: images and texts",
    ]
    assert [*map(page.index, order)] == sorted(map(page.index, order))
    for tag in re.findall("<img [^>]+>", page):  # nothing moves while the page loads
        assert re.search(r'width="\d+" height="\d+" alt="[^"]+"', tag)
    assert page.count("<figure>") == page.count("<figcaption>") == len(re.findall("<svg", page))
    assert page.count("R@5, R@10 are 100 % for any model") == 3  # of at most 4 wrong ones
    assert "&lt;1.0&gt;" in page  # of environment.json: text, not a tag


def test_the_worst_mistakes_are_those_ranked_last(run, index):
    view = shown(index, "heldout_style")
    cosines = view.images.double() @ view.texts.double().T
    ranks = []
    for p, row in enumerate(cosines):
        right = torch.tensor([text in view.right(p) for text in range(len(row))])
        ranks.append(1 + int((row[~right] > row[right].max()).sum()))
    told = [found["rank"] for found in report_page.mistakes(view)]
    assert told == sorted((rank for rank in ranks if rank > 1), reverse=True)
    view.texts = torch.cat([view.images, -view.images[:1]])[[0, 5, 1, 2, 3, 4]]
    assert report_page.mistakes(view) == []


def test_the_map_is_the_plane_of_most_variance():
    emb = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([1, 9, 1, 4, 1, 1]).double()
    plane, about = projections.pca(emb)
    plane = torch.tensor(plane, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.cov(emb.T)).flip(0)
    torch.testing.assert_close(torch.cov(plane.T), torch.diag(values[:2]), atol=1e-8, rtol=1e-8)
    assert f"{(values[:2].sum() / values.sum()).item():.0%}" in about


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_drawn_where_their_numbers_are(log):
    series = {"a": [(0, 0.004), (5, float("nan")), (10, 20.0)], "b": [(10, 1.0)]}
    (chart,) = charts.lines("t", "loss", "", series, log)
    (first, last), ((x, y),) = (places for _, places in chart["lines"])
    assert (first[0], last[0], x) == (46, 310, 310)
    scale = math.log if log else float
    ticks = [(at, scale(float(label))) for at, label in chart["y_ticks"]]
    (low, least), (high, most) = ticks[0], ticks[-1]
    for value, at in ((0.004, first[1]), (20.0, last[1]), (1.0, y)):
        assert least <= scale(value) <= most
        share = (scale(value) - least) / (most - least)
        assert at == pytest.approx(low + share * (high - low), abs=0.11)
    assert chart["y_name"] == ("loss, logarithmic" if log else "loss")
    assert charts.lines("t", "", "", {"a": [(0, float("nan"))]}) == []
    line = [(step, float(step)) for step in range(2001)]
    assert len(charts.thin(line)) <= charts.POINTS
    assert charts.thin(line)[-1] == line[-1]


def test_a_logarithmic_axis_needs_values_above_zero():
    (chart,) = charts.lines("t", "loss", "", {"a": [(0, 0.0), (9, 5.0)]}, log=True)
    assert chart["y_name"] == "loss"
    for low, high in ((1e-300, 1e300), (3, 3), (1, 1), (0.1, 0.10001), (10, 1000), (999, 1001)):
        ticks = charts.log_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert ticks == sorted(set(ticks))
        assert 2 <= len(ticks) <= 9


def test_the_first_sentence_is_the_score(run):
    scores = {"test/t2i/candidates": 10, "test/i2t/candidates": 20, "heldout/i2t/candidates": 1}
    scores |= {"heldout/t2i/candidates": 1}
    for key in ("heldout/i2t", "heldout/t2i", "test/i2t", "test/t2i"):
        scores |= {f"{key}/R@1": 0.5, f"{key}/chance": 0.05}
    scores |= {"test/i2t/R@1/low": 0.25, "test/i2t/R@1/high": 0.75}
    first, interval, *others = headlines(scores)
    about = "10 pictures kept out of training (split test); chance: 5.00 %."
    assert first == f"Finds a right caption among 20 for 50.0 % of {about}"
    assert interval.startswith("The 95 % interval 25.0 to 75.0")
    assert others[0].startswith("Finds a right picture among 10 for 50.0 % of the 20 captions")
    assert "1 picture kept out of training (split heldout)" in others[1]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_text_can_be_read_in_both_modes():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    css = (Path(report_page.__file__).parent / "pages.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    for mode in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w+)", mode))
        paper = colours.pop("paper")
        del colours["line"]  # rules between rows, and frames of pictures that are not right
        assert {"ink", "muted", "link", "good", "warn", "c0", "c9"} <= set(colours)
        assert min(contrast(paper, colour) for colour in colours.values()) >= 4.5
