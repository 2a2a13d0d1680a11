"""Files that are no pictures, or not the pictures that they say: nothing hangs, nothing floods."""

import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from support import untrained_run

import ito
from ito import evaluate, search
from ito.data import pictures
from ito.data.dataset import load_dataset
from ito.data.pictures import MAX_PIXELS, decode
from ito.data.records import open_shards
from ito.stream import Stream

both = pytest.mark.parametrize("how", ["in memory", "streamed"])


def read(how, path, count, max_pixels=MAX_PIXELS, **options):
    """The greys of the `count` pictures that can be read, and what is skipped, by its place."""
    if how == "in memory":
        data = load_dataset(path, 4, max_pixels=max_pixels, **options)
        images, skipped = data.images, dict(data.skipped)
    else:
        stream = Stream(open_shards(path, **options), 4, count, max_pixels=max_pixels)
        images, *_ = (batch.images for batch in itertools.islice(stream.batches(), 3))
        skipped = stream.skipped
    names = {where.rsplit(os.sep, 1)[-1]: reason for where, reason in skipped.items()}
    return sorted(images[:, 0, 0, 0].tolist()), names


def write(folder, *images):
    rows = [{"image": str(name), "caption": f"number {n}"} for n, name in enumerate(images)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def draw(path, grey=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey,) * 3).save(path)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def bomb(width, height):
    """A PNG that says it has so many pixels, all of it in a few bytes."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run.write(tmp_path_factory.mktemp("pictures"))


# --- what is no file ---


@pytest.fixture
def pipe(tmp_path):
    """A named pipe that nobody writes to; whoever waits for it is let go after a while."""
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    opened = os.open(path, os.O_RDWR)

    def end():
        path.unlink()
        os.close(opened)

    timer = threading.Timer(30, end)
    timer.start()
    yield path
    timer.cancel()
    if path.exists():
        end()


@both
def test_pipes_sockets_devices_and_folders_are_no_pictures(how, pipe, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for n in range(2):
        draw(tmp_path / f"{n}.png", n)
    kinds = {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}
    kinds |= {"folder": "a folder"}
    names = ["0.png", *(f"{kind}.png" for kind in kinds), "1.png"]
    write(tmp_path, *names)
    table = "".join(f"{name}\tnumber {n}\n" for n, name in enumerate(names))
    (tmp_path / "table.csv").write_text("filepath\ttitle\n" + table, encoding="utf-8")
    for source in (tmp_path, tmp_path / "table.csv"):
        greys, skipped = read(how, source, 2)
        assert greys == [0, 1]
        assert set(skipped.values()) == {
            f"not a file: picture {tmp_path}/{kind}.png is {found}, not a file"
            for kind, found in kinds.items()
        }
    with pytest.raises(ValueError, match=r"pipe.png is a named pipe, not a file"):
        ito.load(run).encode_image(["0.png", "pipe.png"])
    with pytest.raises(SystemExit):
        search.main([str(run), "pipe.png"])


def test_a_pipe_is_read_as_a_table_alone(tmp_path):
    """`--train-data <(a program)` is one; in a folder it would wait for a writer for ever."""
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "table")
    text = "filepath\ttitle\na.png\tan a\n"
    writer = threading.Thread(target=(tmp_path / "table").write_text, args=(text,), daemon=True)
    writer.start()
    assert load_dataset(tmp_path / "table", 4).captions == [["an a"]]
    writer.join()

    os.mkfifo(tmp_path / "captions.jsonl")
    opened = os.open(tmp_path / "captions.jsonl", os.O_RDWR)
    threading.Timer(2, os.close, [opened]).start()
    with pytest.raises(ValueError, match=r"captions.jsonl is a named pipe, not a file"):
        load_dataset(tmp_path, 4)
    with pytest.raises(ValueError, match=r"/dev/null is a device, not a file"):
        load_dataset("/dev/null", 4)


# --- what is larger than it seems, or than it says ---


@both
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_not_decoded(how, tmp_path, monkeypatch):
    """169 and 200 million of them in some 100 bytes; the first took 2.3 GB."""
    loaded = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load", lambda self: loaded.append(self.size) or load(self)
    )
    for n in range(2):
        draw(tmp_path / f"{n}.png", n)
    (tmp_path / "13000.png").write_bytes(bomb(13_000, 13_000))
    (tmp_path / "20000.png").write_bytes(bomb(20_000, 10_000))
    names = ["0.png", "13000.png", "20000.png", "1.png"]
    members = [(name, (tmp_path / name).read_bytes()) for name in names]
    members = [m for name, png in members for m in ((name, png), (f"{name[:-4]}.txt", b"a"))]
    tar = write_tar(tmp_path / "a.tar", members)
    for source, limit in ((write(tmp_path, *names), MAX_PIXELS), (tar, MAX_PIXELS), (tar, 64)):
        greys, skipped = read(how, source, 2, max_pixels=limit)
        assert greys == [0, 1]
        smaller, larger = sorted(skipped.values(), key=lambda reason: "Pillow" in reason)
        about = f"has 169000000 pixels (13000 × 13000), above --max-pixels {limit}"
        assert smaller.endswith(about)
        assert larger.endswith("has more than the 178956970 pixels that Pillow opens")
    assert set(loaded) == {(8, 8)}
    with pytest.raises(ValueError, match=r"0.png has 64 pixels .8 × 8., above --max-pixels 63"):
        load_dataset(tmp_path, 4, max_pixels=63)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_that_of_queries_and_of_pictures_in_python(run, tmp_path, capsys):
    (tmp_path / "bomb.png").write_bytes(bomb(9460, 9460))
    picture = draw(tmp_path / "small.png")
    encoder = ito.load(run)
    told = r"bomb.png has 89491600 pixels .9460 × 9460., above --max-pixels 89478485"
    with pytest.raises(ValueError, match=rf"images\[1\]: too many pixels: picture .*{told}"):
        encoder.encode_image([picture, tmp_path / "bomb.png"])
    opened = Image.open(tmp_path / "bomb.png")
    with opened, pytest.raises(ValueError, match=r"images\[0\]: the picture has 89491600 pixels"):
        encoder.encode_image(opened)
    encoder.max_pixels = 64
    assert encoder.encode_image(picture).shape == (1, 16)
    encoder.max_pixels = 63
    with pytest.raises(ValueError, match="above --max-pixels 63"):
        encoder.encode_image(picture)
    data = run.parent / "data"  # of 32 px
    with pytest.raises(SystemExit) as end:
        search.main([str(run), str(picture), "--max-pixels", "63"])
    assert end.value.code == 2
    assert "small.png has 64 pixels (8 × 8), above --max-pixels 63" in capsys.readouterr().err
    search.main([str(run), str(picture), "--max-pixels", "1024"])
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--data", str(data), "--max-pixels", "1023"])
    assert "no usable picture in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--max-pixels", "178956971"])
    assert "max_pixels must be at most 178956970, got 178956971" in capsys.readouterr().err


def test_a_tile_counts_where_it_is_larger_than_its_picture(tmp_path):
    """A TIFF of 10 × 10 pixels in one tile of 10,000 × 10,000."""
    deflate = zlib.compressobj()
    tile = b"".join(deflate.compress(bytes(10_000)) for _ in range(10_000)) + deflate.flush()
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 10_000, 323: 10_000, 324: 8}
    tags[325] = len(tile)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + end)
    assert "has 100000000 pixels (10 × 10), above" in decode(path, 8)
    with Image.open(path) as picture:
        assert picture.size == (10, 10)


def test_no_other_program_reads_a_picture(tmp_path):
    """What Pillow hands to Ghostscript, or finds in a file that holds pictures of any size."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ico")
    for name in ("a.eps", "a.ico"):
        (tmp_path / "a.png").write_bytes((tmp_path / name).read_bytes())
        assert decode(tmp_path / "a.png", 4).endswith("a.png is of no known format")


def textured(width, height):
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16", "1"])
def test_a_large_picture_looks_as_it_did_before_it_was_made_smaller(mode, tmp_path, monkeypatch):
    for width, height in ((901, 640), (500, 1333), (2000, 70)):
        picture = textured(width, height)
        if mode == "I;16":
            deep = np.asarray(picture.convert("L")).astype(np.uint16) << 8
            picture = Image.fromarray(deep)
        elif mode == "RGBA":
            picture.putalpha(picture.convert("L"))
        else:
            picture = picture.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        picture.save(tmp_path / "a.png", exif=exif)
        whole = decode(tmp_path / "a.png", 32)
        monkeypatch.setattr(pictures, "LARGE", 20_000)
        small = decode(tmp_path / "a.png", 32)
        monkeypatch.undo()
        off = np.abs(small.astype(int) - whole)
        assert off.mean() < (8 if mode == "1" else 2), (width, height)  # a bit a pixel is noise
    assert decode(tmp_path / "a.png", 4).shape == (4, 4, 3)


def test_a_jpeg_decoded_at_a_fraction_looks_as_the_whole(tmp_path):
    for width, height in ((1200, 901), (801, 1603)):
        textured(width, height).save(tmp_path / "a.jpg", quality=90)
        with pictures.open_picture(tmp_path / "a.jpg", 64) as picture:
            assert max(picture.size) < 500
            assert min(picture.size) >= 128
        with Image.open(tmp_path / "a.jpg") as picture:
            whole = ImageOps.fit(picture, (64, 64), Image.Resampling.BICUBIC)
        off = np.abs(decode(tmp_path / "a.jpg", 64).astype(int) - np.asarray(whole))
        assert off.mean() < 1
        assert off.max() < 12


# --- what leads out of the data ---


@pytest.fixture
def leading(tmp_path):
    """A folder with pictures inside and outside of it, and names that lead to both."""
    folder = tmp_path / "a" / "data"
    for n, path in enumerate(("in.png", "sub/in.png", "../out.png", "../data2/out.png")):
        draw(folder / path, n)
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    (folder / "linked").symlink_to(folder.parent / "data2")
    (folder / "inner.png").symlink_to("sub/in.png")
    (tmp_path / "other").symlink_to(folder)  # the folder itself may be a link
    return folder


@both
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_paths_that_lead_out_are_followed_where_the_data_is_trusted(how, kind, leading, tmp_path):
    inside = ["in.png", "sub/../in.png", leading / "sub" / "in.png", "inner.png"]
    outside = ["../out.png", leading.parent / "out.png", "link.png", "linked/out.png", "a\0.png"]
    names = [str(name) for name in (*inside, *outside)]
    source = write(leading, *names)
    if kind == "csv":
        rows = "".join(f"{name}\tnumber {n}\n" for n, name in enumerate(names) if "\0" not in name)
        source = leading / "table.csv"
        source.write_text("filepath\ttitle\n" + rows, encoding="utf-8")
        names.pop(), outside.pop()
    greys, skipped = read(how, source, 8)
    assert greys == [0, 0, 1, 1, 2, 2, 2, 3]
    assert len(skipped) == len(names) - 8
    for path in (source, tmp_path / "other" / source.relative_to(leading)):
        greys, skipped = read(how, path, 4, untrusted_data=True)
        assert greys == [0, 0, 1, 1]
        assert len(skipped) == len(outside)
        for name, reason in zip(outside, skipped.values(), strict=True):
            assert str(name) in reason
            assert reason.endswith(f"leads out of {leading}")


@both
def test_data_that_leads_out_itself_is_refused(how, leading, tmp_path):
    write(leading, "in.png")
    moved = (leading / "captions.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (leading / "captions.jsonl").symlink_to(moved)
    assert read(how, leading, 1)[0] == [0]
    with pytest.raises(ValueError, match=r"captions.jsonl leads out of the folder"):
        open_shards(leading, untrusted_data=True)
    (tmp_path / "tars").mkdir()
    for n, place in enumerate((tmp_path / "tars", tmp_path)):
        members = [("0.png", draw(tmp_path / "x.png", n).read_bytes()), ("0.txt", b"a")]
        write_tar(place / f"{n}.tar", members)
    (tmp_path / "tars" / "1.tar").symlink_to(tmp_path / "1.tar")
    assert read(how, tmp_path / "tars", 2)[0] == [0, 1]
    greys, skipped = read(how, tmp_path / "tars", 1, untrusted_data=True)
    assert greys == [0]
    assert skipped == {"1.tar": f"outside the folder: leads out of {tmp_path}/tars"}
    assert read(how, tmp_path / "tars" / "1.tar", 1, untrusted_data=True)[0] == [1]  # named


@both
def test_a_tar_s_links_and_names_lead_to_no_file(how, tmp_path):
    secret = draw(tmp_path / "secret.png", 7)
    (tmp_path / "tars").mkdir()
    members = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        for target in (str(secret), "../secret.png"):
            link = tarfile.TarInfo(f"link{len(members)}.png")
            link.type, link.linkname = kind, target
            members += [(link, b""), (link.name.replace("png", "txt"), b"a link")]
    content = draw(tmp_path / "own.png", 5).read_bytes()
    for name in ("../secret", str(secret.with_suffix(""))):
        members += [(f"{name}.png", content), (f"{name}.txt", b"a name")]
    write_tar(tmp_path / "tars" / "a.tar", members)
    greys, skipped = read(how, tmp_path / "tars", 2)
    assert greys == [5, 5]  # the tar's own bytes
    assert list(skipped.values()) == ["no picture in the sample: among .txt"] * 4


def test_the_holes_of_a_tar_are_not_read(tmp_path):
    """GNU tar's sparse files: a text of 256 MB, none of it in the tar; it might be terabytes."""
    info = tarfile.TarInfo("0.txt")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 2**28  # its size with the holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    picture = write_tar(tmp_path / "a.tar", [("0.png", draw(tmp_path / "x.png").read_bytes())])
    content = picture.read_bytes()
    at = 512 + -(-int(content[124:135], 8) // 512) * 512
    picture.write_bytes(content[:at] + bytes(header) + content[at:])
    with pytest.raises(ValueError, match=r"a.tar:0: empty caption"):
        load_dataset(picture, 4)


def test_the_commands_take_untrusted_data(run, leading, capsys):
    write(leading, "in.png", "../out.png")
    evaluate.main([str(run), "--data", str(leading), "--untrusted-data"])
    search.main([str(run), "a cat", "--data", str(leading), "--untrusted-data"])
    told = f"skipped 1 records:\n  {leading}/captions.jsonl:2: outside"
    assert capsys.readouterr().out.count(told) == 2


def test_a_thin_picture_takes_no_more_memory_than_another(tmp_path):
    """One row of 60 million grey pixels, 7 kB as a file, took 1 GB."""
    program = (
        "import resource, sys; from pathlib import Path; from ito.data.pictures import decode;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); found = decode(Path(sys.argv[1]), 64);"
        "assert found.shape == (64, 64, 3), found; print((peak() - before) // 1024)"
    )
    for name, size in (("wide.png", (60_000_000, 1)), ("tall.png", (1, 20_000_000))):
        Image.new("L", size, 9).save(tmp_path / name)
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert int(told) < 400, name  # MB: the pixels, and the pointer that Pillow keeps of a row


def test_of_a_large_picture_only_what_its_square_needs_is_made_smaller(monkeypatch):
    """What is kept is bit for bit the middle of the whole; scaled, it is the same to a rounding."""
    monkeypatch.setattr(pictures, "LARGE", 20_000)
    for width, height in ((901, 640), (500, 1333), (3001, 70), (61, 2000), (5000, 3), (1000, 999)):
        picture = textured(width, height)
        factor = max(1, min(width, height) // 64)
        columns, rows = width // factor, height // factor
        left, top = (width - factor * columns) // 2, (height - factor * rows) // 2
        whole = picture.crop((left, top, left + factor * columns, top + factor * rows))
        whole, kept = whole.reduce(factor), pictures.shrunk(picture, 32)
        beside, over = ((whole.size[i] - kept.size[i]) // 2 for i in (0, 1))
        middle = whole.crop((beside, over, beside + kept.size[0], over + kept.size[1]))
        assert np.array_equal(np.asarray(kept), np.asarray(middle)), (width, height)
        want = ImageOps.fit(whole, (32, 32), Image.Resampling.BICUBIC)
        off = pictures.square(picture, 32).astype(int) - np.asarray(want).astype(int)
        assert np.abs(off).max() <= 1, (width, height)
