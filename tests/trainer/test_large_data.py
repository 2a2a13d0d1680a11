"""Tables and shards of ten thousand rows: a bad one costs itself alone, and reading is quick."""

import io
import json
import tarfile
import time

import pytest
from PIL import Image
from support.quick_run import TINY

from ito import train
from ito.data.dataset import load_dataset

ROWS, PICTURES = 10_000, 20


def picture(n):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (12 * n,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def csv(folder, broken):
    rows = [f"{n % PICTURES}.png\tcaption {n}\n" for n in range(ROWS)]
    rows += [
        f'{n}.png\t"an open quote\n' if kind == "row" else "none.png\ta\n" for n, kind in broken
    ]
    (folder / "a.csv").write_text("filepath\ttitle\n" + "".join(order(rows)))
    return folder / "a.csv"


def jsonl(folder, broken):
    rows = [
        json.dumps({"image": f"{n % PICTURES}.png", "caption": f"caption {n}"}) for n in range(ROWS)
    ]
    rows += [
        '{"image": ' if kind == "row" else '{"image": "none.png", "caption": "a"}'
        for _, kind in broken
    ]
    (folder / "a.jsonl").write_text("\n".join(order(rows)) + "\n")
    return folder / "a.jsonl"


def tar(folder, broken):
    members = []
    for n in range(ROWS // 10):  # a picture each
        members += [(f"{n}.png", picture(n % PICTURES)), (f"{n}.txt", f"caption {n}".encode())]
    for n, kind in broken:
        bad = b"no picture" if kind == "picture" else picture(n)
        members += [(f"bad{n}.png", bad), (f"bad{n}.json", b"{" if kind == "row" else b'"a"')]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "a.tar"


def order(rows):
    """The last two rows among the others."""
    return [*rows[:100], rows[-1], *rows[100:5000], rows[-2], *rows[5000:-2]]


@pytest.mark.parametrize("write", [csv, jsonl, tar])
def test_a_bad_sample_in_ten_thousand_ends_nothing(tmp_path, write):
    for n in range(PICTURES):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    data = load_dataset(write(tmp_path, [(1, "row"), (2, "picture")]), 8)
    assert len(data.skipped) == 2
    assert sum(map(len, data.captions)) == (ROWS // 10 if write is tar else ROWS)
    assert len(data.images) == (ROWS // 10 if write is tar else PICTURES)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_training_on_many_captions_starts_soon(tmp_path, monkeypatch, kind):
    """100,000 captions take 10 s on two quiet cores; here 20,000 are to, in processor time."""
    for n in range(PICTURES):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    rows = [(f"{n % PICTURES}.png", f"a caption of {n} words or so") for n in range(2 * ROWS)]
    source = tmp_path / f"a.{kind}"
    if kind == "csv":
        source.write_text("filepath\ttitle\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    else:
        lines = (json.dumps({"image": a, "caption": b}) + "\n" for a, b in rows)
        source.write_text("".join(lines))
    begun = []
    monkeypatch.setattr(train.Run, "train", lambda run: begun.append(time.process_time()) or 0)
    before = time.process_time()
    options = [*TINY.split(), "--objective", "clip", "--image-size", "8", "--load-size", "8"]
    with pytest.raises(SystemExit):  # as if it was stopped
        train.main([*options, "--train-data", str(source), "--out", str(tmp_path / "run")])
    assert begun[0] - before < 10
