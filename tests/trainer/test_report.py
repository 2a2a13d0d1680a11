"""The report: one file, whose mistakes, map and curves are those of the model and the log."""

import re

import pytest
import torch
from support import untrained_run

import ito
from ito import report
from ito.config import Config
from ito.scoring import charts, projections, report_page
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.index import Index
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
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import|https?://', page)
    for title in ("Held-out scores", "Curves", "Embedding map", "Worst mistakes", "Environment"):
        assert title in page
    assert page.count("R@5, R@10 are 100 % for any model") == 3  # of at most 4 wrong ones
    assert "&lt;1.0&gt;" in page  # of environment.json: text, not a tag


def test_the_worst_mistakes_are_those_ranked_last(run, index):
    view = shown(index, "heldout_style")
    cosines = view.images.double() @ view.texts.double().T
    ranks = []
    for p, row in enumerate(cosines):
        right = torch.tensor([text in view.right(p) for text in range(len(row))])
        ranks.append(1 + int((row[~right] > row[right].max()).sum()))
    told = [int(n) for n in re.findall(r"its best caption (\d) of 6", report_page.mistakes(view))]
    assert told == sorted((rank for rank in ranks if rank > 1), reverse=True)
    view.texts = torch.cat([view.images, -view.images[:1]])[[0, 5, 1, 2, 3, 4]]
    assert report_page.mistakes(view) == ""


def test_the_map_is_the_plane_of_most_variance():
    emb = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([1, 9, 1, 4, 1, 1]).double()
    plane, about = projections.pca(emb)
    plane = torch.tensor(plane, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.cov(emb.T)).flip(0)
    torch.testing.assert_close(torch.cov(plane.T), torch.diag(values[:2]), atol=1e-8, rtol=1e-8)
    assert f"{(values[:2].sum() / values.sum()).item():.0%}" in about


def test_lines_are_drawn_where_their_numbers_are():
    chart = charts.lines("t", {"a": [(0, 0.0), (5, float("nan")), (10, 2.0)], "<b>": [(10, -1.0)]})
    (first, last), _ = (
        [tuple(map(float, p.split(","))) for p in path.split()]
        for path in re.findall(r'polyline points="([^"]+)"', chart)
    )
    marks = {
        float(v): float(y) - 4 for y, v in re.findall(r'y="([\d.]+)" text.*?>([-\d.]+)<', chart)
    }
    assert (first[1], last[1]) == pytest.approx((marks[0.0], marks[2.0]), abs=0.11)
    assert (first[0], last[0]) == (46, 310)
    assert "&lt;b&gt;" in chart
    assert charts.lines("t", {"a": []}) == ""
    line = [(step, float(step)) for step in range(2001)]
    assert len(charts.thin(line)) <= charts.POINTS
    assert charts.thin(line)[-1] == line[-1]
