"""Search says when nothing is near, takes several texts and an uploaded picture, and its contact
sheet writes in every alphabet that an installed font has."""

import asyncio
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from support.quick_run import TINY, write_set

import ito
from ito import search, train
from ito.config import Config
from ito.scoring import fonts
from ito.scoring.index import Index, Near, fit_odds
from ito.source import open_dataset

SERVER = "starlette and uvicorn: the extra `search` is not installed"
NONSENSE = ("quarterly tax return", "asdf qwer", "xqzv", "parliamentary debate", "photosynthesis")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("near") / "data", items=24)


@pytest.fixture(scope="module")
def run(data):
    """A run that has learned its captions."""
    options = [*TINY.split(), "--objective", "clip", "--lr", "3e-3", "--steps", "120"]
    options += ["--threads", "1", "--precision", "fp32"]
    return train.main(["--train-data", str(data), "--out", str(data.parent / "run"), *options])


@pytest.fixture(scope="module")
def index(run):
    return Index.open(run, ito.load(run), open_dataset(Config.load(run / "config.json")))


def doubts(printed: str) -> dict[str, str]:
    """What is said of each query that nothing is near."""
    found = re.findall(r"^note       (nothing near: .*) \((.*)\)$", printed, re.MULTILINE)
    return {query: told for told, query in found}


# --- what is near ---


def test_near_is_what_the_run_s_own_captions_reach(index):
    near, dataset, encoder = Near.measure(index), index.dataset, index.encoder
    rows = [n for n, split in enumerate(dataset.split) if split == "train"]
    items = dataset.image_item[rows].tolist()
    captions = [text for n in sorted(set(items)) for text in dataset.captions[n]]
    emb, texts = index.embeddings[rows].double(), encoder.encode_text(captions).double()
    reached = sorted(max(float(text @ picture) for picture in emb) for text in texts)
    place = 0.02 * (len(reached) - 1)
    assert near.text == pytest.approx(reached[int(place)], abs=1e-6)
    others = sorted(
        max(float(one @ emb[m]) for m in range(len(rows)) if items[m] != items[n])
        for n, one in enumerate(emb)
    )
    assert near.picture == pytest.approx(others[int(0.02 * (len(others) - 1))], abs=1e-6)


def test_search_says_when_nothing_is_near(run, data, capsys):
    captions = [json.loads(line)["captions"][0] for line in (data / "captions.jsonl").open()]
    known = list(dict.fromkeys(captions))[:10]
    picture = data / "000-0.png"
    search.main([str(run), *known, *NONSENSE, str(picture)])
    doubted = doubts(capsys.readouterr().out)
    assert sum(query in doubted for query in known) <= 1  # 2 % of all are below the limit
    assert sum(query in doubted for query in NONSENSE) >= 4
    assert len(doubted) == sum(query in doubted for query in (*known, *NONSENSE))
    assert "98% of the run's own captions reach 0." in doubted[NONSENSE[0]]


def test_a_picture_is_compared_with_what_pictures_reach(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    saved = json.loads((copy / "near.json").read_text())
    (copy / "near.json").write_text(json.dumps(saved | {"text": -1, "picture": 0.9999}))
    strange = tmp_path / "strange.png"
    Image.fromarray(np.tile(np.uint8([[0, 255], [255, 0]]), (32, 32))).save(strange)
    search.main([str(copy), "xqzv", str(strange)])
    (told,) = doubts(capsys.readouterr().out).values()
    assert "98% of the run's own pictures reach 1.000" in told


def test_other_data_is_measured_by_the_run_s_own(run, tmp_path, capsys):
    other = write_set(tmp_path / "other", items=8, captions=["a caption of its own"])
    search.main([str(run), "red cat", "--out", str(tmp_path / "own.png")])
    near = Near.open(run, ito.load(run), lambda: pytest.fail("it was measured before"))
    search.main([str(run), "xqzv", "--data", str(other), "--out", str(tmp_path / "s.png")])
    assert f"reach {near.text:.3f}" in capsys.readouterr().out
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("near.json"))
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"train_data": str(tmp_path / "gone")}))
    search.main([str(copy), "xqzv", "--data", str(other)])
    printed = capsys.readouterr().out
    assert "what is near is unknown without the run's own data: no data at" in printed
    command = f"pipe:touch {tmp_path}/made"  # of a run of others
    (copy / "config.json").write_text(json.dumps(about | {"train_data": command}))
    search.main([str(copy), "xqzv", "--data", str(other)])
    printed = capsys.readouterr().out
    assert "what is near is unknown without the run's own data" in printed
    assert "its config.json names a command" in printed
    assert not (tmp_path / "made").exists()
    assert "nothing near" not in printed


def test_the_odds_of_a_match_are_those_that_it_was_drawn_with():
    random = torch.Generator().manual_seed(0)
    cosines = torch.rand(2000, 24, generator=random).sort(1, descending=True)[0]
    truth = [12.0, -8.0, -4.0]
    log_odds = truth[0] * cosines + truth[1] * cosines.mean(1, True) + truth[2]
    right = torch.rand(2000, 24, generator=random) < log_odds.sigmoid()
    odds = fit_odds(cosines, right)
    assert odds == pytest.approx(truth, abs=1)  # 5 standard errors
    told = torch.tensor([Near(0, 0, odds, None).right("text", row) for row in cosines])
    for low in (0, 0.2, 0.4, 0.6, 0.8):
        among = (told >= low) & (told < low + 0.2)
        share = right[among].double().mean().item()
        assert told[among].mean().item() == pytest.approx(share, abs=0.02)
    assert Near(0, 0, odds, None).right("picture", cosines[0]) is None
    assert fit_odds(cosines, torch.zeros_like(right)) is None
    parted = fit_odds(cosines, cosines > 0.5)  # the likelihood has no greatest weight
    assert all(np.isfinite(parted))


def test_the_odds_are_measured_on_what_was_kept_out_of_training(index, monkeypatch):
    asked = []

    def fit(cosines, right):
        asked.append((cosines, right))
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr("ito.scoring.index.fit_odds", fit)
    assert Near.measure(index)[2:] == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    data, emb = index.dataset, index.embeddings.double()
    item, (texts, pictures) = data.image_item.tolist(), asked
    held = [n for n, split in enumerate(data.split) if split != "train"]
    captions = sorted({text for n in held for text in data.captions[item[n]]})
    assert len(texts[0]) == len(captions)
    best = index.encoder.encode_text(captions).double() @ emb.T
    assert texts[0].sum() == pytest.approx(best.topk(24)[0].sum().item(), abs=1e-3)
    found = best.topk(24)[1].tolist()
    right = sum(
        text in data.captions[item[n]]
        for text, row in zip(captions, found, strict=True)
        for n in row
    )
    assert int(texts[1].sum()) == right
    for n, cosines, same in zip(held, *pictures, strict=True):
        others = [m for m in (emb @ emb[n]).argsort(descending=True).tolist() if m != n][:24]
        assert cosines.tolist() == pytest.approx((emb[others] @ emb[n]).tolist(), abs=1e-5)
        assert int(same.sum()) == sum(item[m] == item[n] for m in others)


# --- the page ---


def ask(app, method="GET", query="", body=b"", **headers) -> tuple[int, str]:
    sent, given = [], {"host": "127.0.0.1:80", "content-length": str(len(body))} | headers

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "raw_path": b"/",
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items() if v],
    }
    asyncio.run(app(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], content.decode()


@pytest.fixture
def page(index):
    pytest.importorskip("starlette", reason=SERVER)
    pytest.importorskip("uvicorn", reason=SERVER)
    from ito.scoring.search_page import application

    return application(index, Near.measure(index))


def test_the_page_takes_several_texts(page):
    for query in ("q=red+cat&q=xqzv", "q=red+cat+%7C+xqzv", "q=red+cat%0Axqzv"):
        status, shown = ask(page, query=query)
        assert status == 200
        assert [part.split("</h2>")[0] for part in shown.split("<h2>")[1:]] == ["red cat", "xqzv"]
        assert "Nothing near: the best match has" in shown.split("<h2>")[2]
        assert 'value="red cat | xqzv"' in shown
    assert ask(page, query="q=" + "%7C".join(map(str, range(17))))[0] == 414


def test_the_page_tells_what_was_trained_on_and_how_likely_a_match_is_right(index):
    pytest.importorskip("starlette", reason=SERVER)
    pytest.importorskip("uvicorn", reason=SERVER)
    from ito.scoring.search_page import application

    near = Near(-1.0, -1.0, [10.0, 0.0, -5.0], None)
    _, shown = ask(application(index, near, seen=True), query="q=red+cat")
    tiles = [part.split("</li>")[0] for part in shown.split("<li>")[1:]]
    cosines, found = index.search(index.encoder.encode_text("red cat"), 24)
    for tile, cosine, n in zip(tiles, cosines[0].tolist(), found[0].tolist(), strict=True):
        share = 100 / (1 + np.exp(5 - 10 * cosine))
        told = float(re.search(r"<small>(\d+) %</small>", tile)[1])
        assert told == pytest.approx(share, abs=0.51)
        assert ("seen in training" in tile) == (index.dataset.split[n] == "train")
    _, shown = ask(application(index, near), query="like=3")
    assert "seen in training" not in shown
    assert "The number is the cosine" in shown
    _, shown = ask(application(index))
    examples = re.findall(r'<a href="/\?q=[^"]*">([^<]+)</a>', shown)
    rows = [n for n, split in enumerate(index.dataset.split) if split != "train"]
    held = {index.dataset.captions[n][0] for n in index.dataset.image_item[rows].tolist()}
    assert examples
    assert set(examples) <= held
    for field in ("q", "file"):
        assert f'<label for="{field}">' in shown
        assert f'id="{field}"' in shown


def form(content: bytes, name='; filename="ä.png"') -> dict:
    head = f'--x\r\nContent-Disposition: form-data; name="picture"{name}\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--x--\r\n"
    return {"method": "POST", "body": body, "content_type": "multipart/form-data; boundary=x"}


def test_the_page_takes_an_uploaded_picture(page, index, data):
    file = data / "003-0.png"
    own = {"origin": "http://127.0.0.1:80", "sec_fetch_site": "same-origin"}
    for headers in ({}, own):
        status, shown = ask(page, **form(file.read_bytes()), **headers)
        assert status == 200
        first = shown.split("/?like=")[1].split('"')[0]
        assert index.dataset.files[int(first)] == str(file)
    for content in (b"", b"a text", file.read_bytes()[:99], b"\r\n--"):
        assert ask(page, **form(content))[0] == 400
    assert ask(page, **form(file.read_bytes(), name=""))[0] == 400
    assert ask(page, **form(file.read_bytes()) | {"content_type": "text/plain"})[0] == 400


def test_the_page_refuses_what_other_pages_send_and_what_is_too_much(page, data):
    sent = form((data / "003-0.png").read_bytes())
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:81"},  # another server on this machine
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        assert ask(page, **sent, **headers)[0] == 403
    assert ask(page, **sent, **{"content-length": "20000001"})[0] == 413
    assert ask(page, **sent, **{"content-length": ""})[0] == 411
    assert ask(page, **sent, host="evil.example")[0] == 400
    assert ask(page, method="PUT")[0] == 405


def test_an_uploaded_picture_is_limited_as_the_data_is(page, index, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, "PNG")
    monkeypatch.setattr(index.encoder, "max_pixels", 1_000_000)
    status, told = ask(page, **form(buffer.getvalue()))
    assert (status, told.split(":")[0]) == (400, "too many pixels")


# --- the contact sheet ---


def write_font(path, characters: str) -> None:
    """A font in which these characters are squares."""
    builder = pytest.importorskip("fontTools.fontBuilder", reason="fontTools, of matplotlib")
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def outline(side: int):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, side), (side, side), (side, 0)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    names = {ord(c): f"g{n}" for n, c in enumerate(characters)}
    glyphs = {".notdef": outline(300)} | dict.fromkeys(names.values(), outline(900))
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap(names)
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A system on which no font is installed but those in this folder."""
    monkeypatch.setattr(fonts, "folders", lambda: [tmp_path / "fonts"])
    return tmp_path / "fonts"


def test_a_text_is_drawn_with_the_fonts_that_have_its_characters(alone):
    write_font(alone / "a.ttf", "赤い")
    (alone / "damaged.ttf").write_bytes(b"no font")
    found = fonts.Fonts(["red 赤い", "丸"])
    pieces = [(text, font.getname()[0]) for text, font in found.pieces("red 赤い cat")]
    latin = ImageFont.load_default(12).getname()[0]
    assert pieces == [("red ", latin), ("赤い ", "Squares"), ("cat", latin)] or pieces == [
        ("", "Squares"),
        ("red ", latin),
        ("赤い ", "Squares"),
        ("cat", latin),
    ]
    assert found.pieces("赤い")[0][1].getname()[0] == "Squares"
    assert found.lacking == {"丸"}
    assert "no installed font has 1 characters of the sheet (CJK): 丸;" in found.notes()
    assert "fonts-noto-cjk" in found.notes()
    assert "1 characters of the sheet (symbols): 😀;" in fonts.Fonts(["😀"]).notes()


def test_the_sheet_has_no_boxes_where_a_font_has_the_characters(run, alone, tmp_path, data, capsys):
    other = write_set(tmp_path / "cjk", items=8, captions=["赤い丸"])

    def sheet() -> tuple[Image.Image, str]:
        search.main([str(run), "红", "--data", str(other), "--out", str(tmp_path / "s.png")])
        with Image.open(tmp_path / "s.png") as opened:
            return opened.convert("L"), capsys.readouterr().out

    _, printed = sheet()
    assert "note       no installed font has 4 characters of the sheet (CJK, HIRAGANA): " in printed
    write_font(alone / "a.ttf", "赤い丸红")
    drawn, printed = sheet()
    assert "note       no installed font" not in printed
    caption = np.array(drawn.crop((16, 140, 16 + 36, 166)))  # three squares of 11 pixels
    assert (caption < 128).sum() == pytest.approx(3 * 11 * 11, rel=0.15)


def test_texts_from_right_to_left_need_raqm(monkeypatch):
    found = fonts.Fonts(["שלום"])
    for there in (True, False):
        monkeypatch.setattr(fonts.features, "check", lambda name, there=there: there)
        assert ("right to left are in the wrong order" in found.notes()) is not there
    assert fonts.Fonts(["red"]).notes() == ""


def test_the_characters_of_an_installed_font_are_found():
    """Those that its table of characters lists, for an alphabet or two."""
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools, of matplotlib")
    pytest.importorskip("matplotlib", reason="it has DejaVu Sans")
    from matplotlib import get_data_path

    path = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    listed = set(reader.TTFont(path).getBestCmap())
    font = fonts.Font(ImageFont.truetype(path, 12))
    for code in (*range(0x21, 0x7F), *range(0x3B1, 0x3CA), *range(0x5D0, 0x5EB), 0x4E00, 0x3042):
        assert font.has(chr(code)) == (code in listed), hex(code)


def test_embeddings_of_a_batch_are_those_of_its_rows(index):
    """`near` was measured on batches, and is compared with one query's score."""
    texts = [text for names in index.dataset.captions for text in names]
    together = index.encoder.encode_text(texts)
    alone = torch.cat([index.encoder.encode_text(text) for text in texts])
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=0)
