"""Search, its page, and the report: what they show is what the model says."""

import asyncio
import io
import os
import re
import signal
import socket
import sys
import threading
import time

import pytest
import torch
from PIL import Image
from support import untrained_run

import ito
from ito import evaluate, report, search
from ito.config import Config
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.scoring import charts, projections, report_page
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.index import Index
from ito.source import open_dataset

SERVER = "starlette and uvicorn: the extra `search` is not installed"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return untrained_run.write_data(tmp_path_factory.mktemp("search") / "data")


@pytest.fixture(scope="module")
def run(data):
    return untrained_run.write_run(data.parent / "run", data)


@pytest.fixture(scope="module")
def index(run):
    dataset = open_dataset(Config.load(run / "config.json"))
    return Index.open(run, ito.load(run), dataset)


# --- search ---


def test_the_best_matches_are_printed_best_first(run, data, index, capsys):
    picture = data / "red-cat-0.png"
    search.main([str(run), "a blue dog", str(picture), "-k", "3"])
    blocks = capsys.readouterr().out.splitlines()
    assert (blocks[0], blocks[4], blocks[8]) == ("a blue dog", str(picture), f"{run}/search.png")
    model, dataset = index.encoder.model, index.dataset
    texts = embed_texts(model, index.encoder.tokenizer(["a blue dog"]))
    cosines = (texts.double() @ embed_images(model, dataset.images).double().T)[0].tolist()
    best = sorted(range(40), key=lambda n: -cosines[n])[:3]
    for line, n in zip(blocks[1:4], best, strict=True):
        score, rest = line.split(maxsplit=1)
        assert float(score) == pytest.approx(cosines[n], abs=6e-4)
        assert rest.split("  ")[0] == dataset.captions[int(dataset.image_item[n])][0]
        assert line.endswith(dataset.files[n])
    assert "1.000  red cat " in blocks[5]  # a picture is like itself
    assert blocks[5].endswith(str(picture))


def test_the_contact_sheet_shows_the_pictures_found(run, index, tmp_path):
    queries = ["a blue dog", "x" * 400, "two\nlines"]
    search.main([str(run), "-k", "4", *queries, "--out", str(tmp_path / "s.png")])
    with Image.open(tmp_path / "s.png") as opened:
        sheet = opened.convert("RGB")
    _, found = index.search(index.encoder.encode_text("a blue dog"), 4)
    for column, n in enumerate(found[0].tolist()):
        shown = sheet.crop((16 + column * 120, 28, 16 + column * 120 + 96, 28 + 96))
        pixels = Image.fromarray(index.dataset.images[n].permute(1, 2, 0).numpy())
        assert shown.tobytes() == pixels.resize((96, 96), Image.Resampling.LANCZOS).tobytes()


def test_a_text_of_any_length_ends_and_is_not_printed(run, tmp_path, capsys):
    """Queries of 10 MB, one that ends like a picture's name, and captions of 20 kB."""
    data = untrained_run.write_data(tmp_path / "data", captions=["red " * 5000])
    queries = ["a" * 10_000_000, "cat " * 2_500_000, "b" * 100_000 + ".png"]
    began = time.process_time()
    search.main([str(run), *queries, "--data", str(data), "--out", str(tmp_path / "s.png")])
    evaluate.main([str(run), "--data", str(data)])
    report.main([str(run), "--train-data", str(data)])
    assert time.process_time() - began < 20
    printed = capsys.readouterr()
    assert len(printed.out + printed.err) < 30_000
    assert "cut        20 of 20 captions, to their first 8 tokens; the longest" in printed.out
    page = (run / "report.html").read_text()
    assert len(page) < 1.5e6
    with pytest.raises(SystemExit):
        search.main([str(run), "c" * 300 + ".png"])
    assert len(capsys.readouterr().err) < 2100


def test_embeddings_are_kept_until_weights_or_pictures_change(run, index, tmp_path, monkeypatch):
    dataset, encoder = index.dataset, ito.load(run)
    asked = []
    encode = encoder.encode_image
    monkeypatch.setattr(encoder, "encode_image", lambda x: asked.append(len(x)) or encode(x))
    assert torch.equal(Index.open(run, encoder, dataset).embeddings, index.embeddings)
    assert asked == []
    dataset.images[0] += 1
    Index.open(run, encoder, dataset)
    dataset.images[0] -= 1
    assert asked == [40]
    encoder.model.logit_scale.data += 1
    Index.open(run, encoder, dataset)
    assert asked == [40, 40]


# --- the page ---


def get(app, path: str, query: str = "", host: str = "127.0.0.1") -> tuple[int, bytes]:
    """One request, without a network."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", host.encode())],
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body


def test_the_page_searches_and_serves_the_pictures(index):
    pytest.importorskip("starlette", reason=SERVER)
    pytest.importorskip("uvicorn", reason=SERVER)
    from ito.scoring import search_page as page

    app = page.application(index)
    status, body = get(app, "/", "q=a+blue+dog")
    assert status == 200
    _, found = index.search(index.encoder.encode_text("a blue dog"), page.SHOWN)
    assert re.findall(r'src="/picture/(\d+)"', body.decode()) == [str(n) for n in found[0].tolist()]
    status, body = get(app, "/", "like=7")
    assert re.findall(r'src="/picture/(\d+)"', body.decode())[:2] == ["7", "7"]
    status, body = get(app, "/picture/7")
    with Image.open(io.BytesIO(body)) as shown:
        assert shown.tobytes() == index.dataset.images[7].permute(1, 2, 0).numpy().tobytes()
    assert b"<script" not in get(app, "/", "q=%22%3E%3Cscript%3E")[1]
    assert [get(app, "/", f"like={n}")[0] for n in ("40", "-1", "x", "9" * 5000)] == [400] * 4
    assert [get(app, f"/picture/{n}")[0] for n in ("40", "x", "9" * 5000)] == [404] * 3
    assert get(app, "/", f"q={'a' * 1000}")[0] == 200
    assert get(app, "/", f"q={'a' * 1001}") == (414, b"q must be at most 1000 characters, got 1001")
    assert get(app, "/", host="evil.example")[0] == 400  # a name that was made to point here


def test_a_port_that_is_taken_is_named(run, capsys):
    pytest.importorskip("uvicorn", reason=SERVER)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            search.main([str(run), "--serve", str(port)])
    assert f"error: --serve {port}: Address already in use\n" == capsys.readouterr().err


def serve(run, monkeypatch, send) -> tuple[int, bytes]:
    """`--serve` until `send()` stops it: its status, and what it answers at the address it prints.

    The connection is made in the moment in which the address is printed.
    """
    pytest.importorskip("uvicorn", reason=SERVER)
    from ito.scoring import search_page as page

    answers = []

    def visit(client):
        with client:
            client.sendall(b"GET /picture/3 HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answers.append(b"".join(iter(lambda: client.recv(65536), b"")))
        send()

    def told(text, **_):
        host, port = re.match(r"http://([\d.]+):(\d+) ", text).groups()
        client = socket.create_connection((host, int(port)), timeout=30)
        threading.Thread(target=visit, args=[client]).start()

    monkeypatch.setattr(page, "print", told, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            search.main([str(run), "--serve", "0"])
    finally:
        signal.signal(signal.SIGTERM, before)
    return end.value.code, answers[0]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_page_answers_once_its_address_is_printed_and_signals_end_it(
    number, status, run, monkeypatch
):
    code, answer = serve(run, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert code == status


def test_the_page_names_its_extra(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "ito.scoring.search_page", raising=False)
    with pytest.raises(SystemExit):
        search.main([str(run), "--serve"])
    error = capsys.readouterr().err
    assert "--serve needs starlette and uvicorn" in error
    assert "pip install 'ito_kernels[search]'" in error


# --- the report ---


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


# --- ONNX ---


@pytest.mark.parametrize("patch", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_the_onnx_pair_gives_the_model_s_embeddings(run, tmp_path, patch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package}: the extra `onnx` is not installed")
    import onnx
    import onnxruntime

    from ito.model.onnx import export_onnx

    encoder = ito.load(run)
    if patch:  # CLIP's towers: patches, causal text
        encoder.model = DualEncoder(**encoder.model.architecture | {"patch_size": patch}).eval()
    paths = export_onnx(encoder.model, tmp_path)
    image, text = (onnxruntime.InferenceSession(str(path)) for path in paths)
    for batch in (1, 3, 7):
        pixels = torch.randn(batch, 3, 16, 16)
        ids = encoder.tokenizer([f"a {'big ' * n}cat" for n in range(batch)])
        for session, name, given, want in (
            (image, "pixels", pixels, encoder.model.encode_image(pixels)),
            (text, "ids", ids, encoder.model.encode_text(ids)),
        ):
            got = torch.from_numpy(session.run(None, {name: given.numpy()})[0])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    numbers = sum(
        len(onnx.numpy_helper.to_array(weight).flatten())
        for path in paths
        for weight in onnx.load(path).graph.initializer
    )
    model = sum(value.numel() for value in encoder.model.state_dict().values())
    assert numbers < model + 200  # both towers, shapes and constants: no fusion module


def test_onnx_names_its_extra(run, tmp_path, monkeypatch):
    from ito.model import onnx

    monkeypatch.setattr(onnx, "PACKAGES", ("torch", "not_a_package"))
    with pytest.raises(ImportError, match=r"needs not_a_package, .* 'ito_kernels\[onnx\]'"):
        onnx.export_onnx(ito.load(run).model, tmp_path)
