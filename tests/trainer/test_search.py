"""Search and its page: what they show is what the model says."""

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
    first, *others = re.findall(r'src="/picture/(\d+)"', body.decode())
    cosines = index.embeddings.double() @ index.embeddings[7].double()
    cosines[7] = -1  # a picture is not its own answer
    assert (first, others) == ("7", [str(int(n)) for n in cosines.argsort(descending=True)[:24]])
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
    assert "pip install 'ito_trainer[search]'" in error
