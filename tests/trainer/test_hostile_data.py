"""A data set of a stranger: what is damaged, lies about its size, hangs, or leads elsewhere is
skipped and counted, or refused in one line."""

import gzip
import io
import json
import os
import re
import resource
import struct
import tarfile
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from support.tars import tar

from ito import cli
from ito.data.dataset import load_dataset
from ito.data.pictures import SCANS, decode
from ito.data.shards import expand, read_samples
from ito.model.exported import Contents
from ito.model.tokenizer import Tokenizer

SECRET = "root:x:0:0:secret"


def picture(n: int = 3, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * n,) * 3).save(buffer, kind)
    return buffer.getvalue()


def table(folder, rows):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text)
    return folder


# --- tars ---


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """512 bytes; a size below 0 or above 8 GB is written as GNU tar does."""
    if isinstance(size, int):
        fits = 0 <= size < 8**11
        size = b"%011o\0" % size if fits else size.to_bytes(12, "big", signed=True)
        size = size if fits or size[0] == 255 else b"\x80" + size[1:]
    found = bytearray(512)
    found[: len(name)] = name
    found[100:108], found[108:116], found[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    found[124:136], found[136:148], found[148:156] = size, b"00000000000\0", b" " * 8
    found[156:157], found[157 : 157 + len(link)] = kind, link
    found[257:265] = b"ustar\x0000"
    found[148:156] = b"%06o\0 " % sum(found)
    return bytes(found)


def attributes(record: bytes) -> bytes:
    return header(b"x", len(record), b"x") + record + bytes(-len(record) % 512)


TEXT = header(b"a.txt", 5) + b"hello" + bytes(507)
DAMAGED = {
    "a negative size": header(b"a.txt", -256) + bytes(1536),
    "a size that leads back to itself": header(b"b", 0) * 3 + header(b"a", -512) + bytes(1024),
    "a size that leads back": header(b"b", 0) * 3 + header(b"a", -1536) + bytes(1024),
    "a negative size in an attribute": attributes(b"14 size=-1024\n") + TEXT + bytes(1024),
    "a text of 4 EB": header(b"a.txt", 2**62) + b"hello" + bytes(1019),
    "a picture of 64 GB": header(b"a.png", 2**36) + bytes(1024),
    "attributes of 4 EB": header(b"x", 2**62, b"x") + bytes(1024),
    "a name of 64 GB": header(b"x", 2**36, b"L") + bytes(1024),
    "digits, of which tarfile's time is quadratic": attributes(b"9" * 100_000 + b" a=b\n"),
    "a length beyond a word": attributes(b"9" * 20 + b" a=b\n") + TEXT + bytes(1024),
    "attributes of attributes": attributes(b"6 a=b\n") * 20_000 + TEXT + bytes(1024),
    "no number": header(b"a.txt", b"xyzxyzxyzxyz") + bytes(1024),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_tar_that_lies_is_counted(name, tmp_path):
    path, good = tmp_path / "b.tar", [("0.png", picture()), ("0.txt", "a text")]
    path.write_bytes(DAMAGED[name])
    began = time.process_time()
    with pytest.raises(ValueError, match="damaged tar"):
        list(read_samples(path))
    tar(tmp_path / "a.tar", good)
    data = load_dataset(tmp_path, 4)
    assert data.captions == [["a text"]]
    assert [data.skipped[-1].where, data.skipped[-1].kind] == [str(path), "damaged tar"]
    # behind a good sample, of which nothing is lost
    whole = (tmp_path / "a.tar").read_bytes()[: 512 * 4]
    path.write_bytes(whole + header(b"z", 0) + DAMAGED[name])
    (tmp_path / "a.tar").unlink()
    assert load_dataset(tmp_path, 4).captions == [["a text"]]
    assert time.process_time() - began < 2


def test_members_that_are_no_files_or_lead_out_are_names_only(tmp_path, monkeypatch):
    """Absolute names, `..`, links, devices, pipes: nothing is written, and nothing else is read."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    path = tmp_path / "shards" / "a.tar"
    path.parent.mkdir()
    kinds = {
        "link": (tarfile.SYMTYPE, str(secret)),
        "hard": (tarfile.LNKTYPE, "../secret.txt"),
        "pipe": (tarfile.FIFOTYPE, ""),
        "zero": (tarfile.CHRTYPE, ""),
        "disk": (tarfile.BLKTYPE, ""),
    }
    with tarfile.open(path, "w") as archive:
        for name in (f"{tmp_path}/absolute", "../../up", "..", "ok", "a/../../b"):
            for kind, content in (("png", picture()), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for name, (kind, link) in kinds.items():
            for suffix in ("png", "txt"):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.type, info.linkname, info.devmajor, info.devminor = kind, link, 1, 5
                archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    for untrusted in (False, True):
        data = load_dataset(path.parent, 4, untrusted_data=untrusted)
        captions = {caption for texts in data.captions for caption in texts}
        assert "ok" in captions
        assert not any(SECRET in caption for caption in captions)
    assert sorted(tmp_path.rglob("*")) == before


def test_patterns_of_very_many_files_are_refused():
    for pattern in ("a{0..99999999999}.tar", "{a,b}" * 60, f"a{{0..{'9' * 4000}}}"):
        with pytest.raises(ValueError, match="stands for more than 1000000 files"):
            expand(pattern)
    assert len(expand("a{0000..1999}.tar::b{0000..1999}.tar")) == 4000
    assert expand("a{5..1}.tar") == []


# --- what expands ---


def test_a_gzip_bomb_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(2**20)) for _ in range(400)]
    path.write_bytes(b"".join([*parts, packer.flush()]))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged gzip: it expands to more than 50 times"):
        load_dataset(path, 4)
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
    (tmp_path / "0.png").write_bytes(picture())
    rows = "".join('{"image": "0.png", "caption": "a"}\n' for _ in range(20_000))
    path.write_bytes(gzip.compress(rows.encode()))  # repeats, but small
    assert load_dataset(path, 4).captions == [["a"]]


def test_parquet_bombs_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    def repeated(value, count):
        index = pyarrow.array(np.zeros(count, np.int32))
        return pyarrow.DictionaryArray.from_arrays(index, pyarrow.array([value]))

    path, about = tmp_path / "a.parquet", {"compression": "zstd", "row_group_size": 10**7}
    million = 1_000_000
    rows = {"image": repeated("a.png", million), "caption": repeated("a", million)}
    parquet.write_table(pyarrow.table(rows), path, **about)
    with pytest.raises(ValueError, match=r"it names 1000000 rows of \d+ bytes, more than \d+ b"):
        load_dataset(path, 4)
    zeros = {"image": pyarrow.array([bytes(40_000_000)]), "caption": ["a"]}
    parquet.write_table(pyarrow.table(zeros), path, **about)
    with pytest.raises(ValueError, match=r"it names 1 rows of \d+ bytes, more than \d+ bytes can"):
        load_dataset(path, 4)
    noise = os.urandom(100_000)  # one picture for many rows, each of which has a caption
    same = {"image": repeated(noise, 2000), "caption": [f"a {n}" for n in range(2000)]}
    parquet.write_table(pyarrow.table(same), path, store_schema=False, use_dictionary=True)
    assert path.stat().st_size < 300_000
    with pytest.raises(ValueError, match=r"unreadable picture: 2000: .* expands to"):
        load_dataset(path, 4)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + min(width, 8)) * min(height, 8)))
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of 20 to 40 bytes, is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (2000, 2000), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


BOMBS = {
    "pixels": (png(30_000, 30_000), "too many pixels"),
    "a line of pixels": (png(2**31 - 1, 1), "too many pixels"),
    "no pixels": (png(0, 8), "not a picture|unreadable picture"),
    "scans": (many_scans(5000), "too many scans"),
    "a profile": (
        png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "unreadable picture|",
    ),
    "texts": (
        png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 200),
        "unreadable picture|",
    ),
    "a postscript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "an icon of other sizes": (
        b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0\xff\xff\xff\x7f\x16\0\0\0",
        "not a",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_expands_is_counted(name, tmp_path):
    content, kind = BOMBS[name]
    (tmp_path / "bad.png").write_bytes(content)
    (tmp_path / "good.png").write_bytes(picture())
    rows = [{"image": f"{which}.png", "caption": which} for which in ("good", "bad")]
    table(tmp_path, rows)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load_dataset(tmp_path, 4)
    assert data.captions[0] == ["good"]
    found = [record.kind for record in data.skipped]
    assert re.fullmatch(kind, "".join(found)) or (found and found[0].startswith(kind))
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_usual_progressive_pictures_are_read():
    assert SCANS > 20
    assert isinstance(decode(Contents(many_scans(0)), 8), np.ndarray)


# --- what hangs, and what leads elsewhere ---


def test_pipes_devices_and_folders_in_place_of_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "good.png").write_bytes(picture())
    names = ("pipe", "zero", "folder", "loop", "good")
    table(tmp_path, [{"image": f"{name}.png", "caption": name} for name in names])
    data = load_dataset(tmp_path, 4)
    assert data.captions == [["good"]]
    reasons = {record.reason.split("/")[-1].split(".")[0]: record.kind for record in data.skipped}
    assert reasons["pipe"] == reasons["zero"] == reasons["folder"] == "not a file"
    for name in ("captions.jsonl", "a.tar", "a.parquet", "a.json"):
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        os.mkfifo(folder / name)
        with pytest.raises((ValueError, OSError)):
            load_dataset(folder / name, 4)
    sidecars = tmp_path / "sidecars"
    sidecars.mkdir()
    for name in ("a", "b"):
        (sidecars / f"{name}.png").write_bytes(picture())
    (sidecars / "a.txt").write_text("a text")
    os.mkfifo(sidecars / "b.txt")
    data = load_dataset(sidecars, 4)
    assert data.captions == [["a text"]]
    assert "named pipe" in data.skipped[0].reason


WAYS_OUT = (
    "../secret.png",
    "{root}/secret.png",
    "link.png",
    "folder/secret.png",
    "./a/../../secret.png",
)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "coco", "metadata"])
def test_paths_that_leave_the_folder_of_untrusted_data(form, tmp_path):
    """By default they are read, because lists with absolute paths are common."""
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(5))
    (data / "good.png").write_bytes(picture())
    (data / "link.png").symlink_to("../secret.png")
    (data / "folder").symlink_to("..")
    places = ["good.png", *(way.format(root=tmp_path) for way in WAYS_OUT)]
    rows = [{"image": place, "caption": place} for place in places]
    path = data / f"list.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        path.write_text("filepath\ttitle\n" + "".join(f"{place}\t{place}\n" for place in places))
    elif form == "coco":
        path = data / "list.json"
        images = [{"id": n, "file_name": place} for n, place in enumerate(places)]
        notes = [{"id": n, "image_id": n, "caption": place} for n, place in enumerate(places)]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    elif form == "metadata":
        path = data
        named = [{"file_name": place, "text": place} for place in places]
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert len(load_dataset(path, 4).captions) == 6
    found = load_dataset(path, 4, untrusted_data=True)
    assert found.captions == [["good.png"]]
    assert [record.kind for record in found.skipped] == ["outside the folder"] * 5


def test_what_a_link_leads_to_is_not_told(tmp_path, capsys):
    """A file of the system in place of a picture, a caption, a list and classes."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n" + SECRET)
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(picture())
    (data / "good.txt").write_text("good")
    for name in ("a.png", "b.txt", "b.json", "c.json"):
        (data / name).symlink_to(secret)
    for name in ("b", "c"):
        (data / f"{name}.png").write_bytes(picture())
    found = load_dataset(data, 4, untrusted_data=True)
    assert found.captions == [["good"]]
    assert len(found.skipped) == 3
    trusted = load_dataset(data, 4)
    told = [*found.skipped, *(record for record in trusted.skipped if ".txt" not in record.reason)]
    assert not any(SECRET in str(record) for record in told)
    (data / "captions.jsonl").symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of the folder") as error:
        load_dataset(data, 4, untrusted_data=True)
    assert SECRET not in str(error.value)


# --- captions ---

LONG = "a red cat \x1b[31m\u202e</script>" * 350_000


def test_a_caption_of_ten_megabytes(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    (tmp_path / "1.png").write_bytes(picture(4))
    rows = [{"image": "0.png", "caption": LONG}, {"image": "1.png", "caption": ["a", {"a": LONG}]}]
    rows += [{"image": LONG, "caption": "a"}, {"image": "1.png", "caption": "b", "split": LONG}]
    table(tmp_path, rows)
    began = time.process_time()
    data = load_dataset(tmp_path, 4)
    assert data.captions[0] == [LONG]
    tokenizer = Tokenizer.train([*data.captions[0], "b c"], 300, 8)
    assert tokenizer([LONG]).shape == (1, 8)
    assert tokenizer.lengths([LONG])[0] > 8
    assert time.process_time() - began < 10
    for record in data.skipped:
        assert len(cli.one_line(f"{record.where}: {record.reason}")) <= 400


def test_what_a_terminal_obeys_is_shown_by_its_number():
    text = "a\x1b]0;title\x07\x9b31m\u202e\u2066\u2069\r\n\b\x00\x7fb"
    shown = cli.one_line(text)
    assert shown.isprintable()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
