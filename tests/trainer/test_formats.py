"""Data sets in the layouts that people have them in: found by looking, and every picture with its
own captions. Picture n has the grey 20·n and the caption "number n"."""

import argparse
import csv
import gzip
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.tars import tar

from ito.cli import one_line
from ito.config import Config, add_options, from_options
from ito.data.dataset import load_dataset
from ito.data.records import find_format, open_shards
from ito.ranks import Ranks
from ito.run import choose_data
from ito.source import open_data, open_dataset
from ito.summary import (
    count_overlap,
    report_equal_captions,
    report_overlap,
    report_skipped,
    sentence,
    summarise,
)

FORMATS = {"jpg": "JPEG", "jfif": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"}


def encode(picture, kind="png", **options):
    buffer = io.BytesIO()
    kind = kind.lower()
    picture.save(buffer, FORMATS.get(kind, kind.upper()), **options)
    return buffer.getvalue()


def grey(n, kind="png", **options):
    return encode(Image.new("RGB", (8, 8), (20 * n,) * 3), kind, **options)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(path, rows):
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def pairs(*numbers):
    return [m for n in numbers for m in ((f"{n}.png", grey(n)), (f"{n}.txt", f"number {n}"))]


def read(path, form, count, **options):
    """The data set, after checks that each of `count` pictures has the captions of its number."""
    assert find_format(path, options.get("data_format", "auto")) == form
    data = load_dataset(path, 4, **options)
    found = [round(value / 20) for value in data.images[:, 0, 2, 2].tolist()]
    for n, item in zip(found, data.image_item.tolist(), strict=True):
        assert all(text.startswith(f"number {n}") for text in data.captions[item])
    assert sorted(found) == list(range(count))
    return data


# --- JSON ---


def test_a_jsonl_file_is_taken_by_its_path(tmp_path):
    for n in range(4):
        put(tmp_path / "images" / f"{n}.png", grey(n))
    rows = [{"image": f"images/{n}.png", "caption": f"number {n}"} for n in range(4)]
    assert read(lines(tmp_path / "data.jsonl", rows), "jsonl", 4).skipped == []
    (tmp_path / "data.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "images").rename(tmp_path / "moved")
    rows = [{"image": f"{n}.png", "text": f"number {n}", "item": n // 2} for n in range(2)]
    source = lines(tmp_path / "lists" / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"no usable picture .* no picture: 2: .*set --image-root"):
        load_dataset(source, 4)
    data = load_dataset(source, 4, image_root=str(tmp_path / "moved"))
    assert data.items == ["0"]  # a number is a name; 0 too
    assert data.image_item.tolist() == [0, 0]


def test_coco(tmp_path):
    for n in range(4):
        put(tmp_path / "val" / f"{n}.jpg", grey(n, "jpg"))
    notes = [(7, 2, " on white"), (3, 0, ""), (9, 2, ""), (4, 1, ""), (5, 77, ""), (8, 0, 3)]
    found = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "license": 1} for n in range(4)],
        "annotations": [
            {"id": k, "image_id": n, "caption": end if end == 3 else f"number {n}{end}"}
            for k, n, end in notes
        ],
    }
    source = put(tmp_path / "annotations" / "captions.json", json.dumps(found))
    data = read(source, "coco", 3, image_root=str(tmp_path / "val"))
    assert data.captions[2] == ["number 2 on white", "number 2"]
    assert [(s.where.rsplit(":", 1)[1], s.kind) for s in data.skipped] == [
        ("annotation 5", "annotation of no image"),
        ("annotation 8", "annotation without a caption"),
        ("image 3", "empty caption"),
    ]
    for wrong in ("{", "[]", '{"images": []}', '{"images": [3], "annotations": []}'):
        with pytest.raises(ValueError, match=r"captions.json is not COCO's captions"):
            load_dataset(put(source, wrong), 4)


FOREIGN = [
    {"captions": [{"caption": "number 0", "id": 1}]},
    {"caption": ["number 1"]},
    {"text": "number 2"},
    {"title": "number 3", "caption": None},
    {"caption": {"caption": "number 4", "score": 0.9}, "title": 3},
]
UNKNOWN = {"group": None, "style": {"id": 3}, "meta": {"a": [{"b": 1}]}, "subgroup": [1]}


def test_metadata_of_others_is_understood(tmp_path):
    members = []
    for n, value in enumerate(FOREIGN):
        members += [(f"{n}.png", grey(n)), (f"{n}.json", json.dumps(value | {"item": n} | UNKNOWN))]
    for name, content in members:
        put(tmp_path / "files" / name, content)
    put(tmp_path / "files" / "00000_stats.json", "{}")
    assert read(tmp_path / "files", "folder", 5).items == list("01234")
    source = tar(tmp_path / "a.tar", [*members, ("9.png", grey(9)), ("9.json", '{"width": 8}')])
    data = read(source, "webdataset", 5)
    assert data.items == list("01234")
    assert [s.reason for s in data.skipped] == ["empty caption"]


# --- folders ---


def test_pictures_with_a_text_or_json_beside_them(tmp_path):
    """As img2dataset writes them; the .json may hold the page's raw text."""
    for n in range(4):
        place = tmp_path / "files" / f"{n // 2:05}" / f"{n:09}"
        put(place.with_suffix(".jpg"), grey(n, "jpg"))
        put(place.with_suffix(".TXT" if n == 3 else ".txt"), f"number {n}\n")
        raw = {"caption": "DSC_1.JPG" if n % 2 else f"number {n}", "status": "success"}
        put(place.with_suffix(".json"), json.dumps(raw))
    put(tmp_path / "files" / "00000_stats.json", "{}")
    put(tmp_path / "files" / ".hidden" / "a.jpg", b"")
    put(tmp_path / "files" / "more" / "alone.png", grey(9))
    (
        put(tmp_path / "files" / "more" / "bad.png", grey(9)),
        put(tmp_path / "files" / "more" / "bad.json", "{"),
    )
    data = read(tmp_path / "files", "folder", 4)
    assert data.items[0] == "00000/000000000.jpg"
    assert [s.kind for s in data.skipped] == ["empty caption", "malformed"]
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "self").symlink_to(tmp_path / "loop")
    (tmp_path / "loop" / "there").symlink_to(tmp_path / "files" / "00000")
    read(tmp_path / "loop", "folder", 2)
    secret = put(tmp_path / "secret.txt", "secret")
    put(tmp_path / "links" / "a.png", grey(0)), put(tmp_path / "links" / "b.png", grey(0))
    put(tmp_path / "links" / "b.txt", "number 0")
    (tmp_path / "links" / "a.txt").symlink_to(secret)
    data = read(tmp_path / "links", "folder", 1, untrusted_data=True)
    assert "a.txt leads out of" in data.skipped[0].reason


def test_the_text_is_the_caption_and_the_json_metadata_in_tars_too(tmp_path):
    members = []
    for n in range(3):
        about = {"caption": "DSC_1.JPG", "group": f"g{n}"}
        members += [(f"{n}.json", json.dumps(about)), *pairs(n)]
    data = read(tar(tmp_path / "a.tar", members), "webdataset", 3)
    assert data.group == ["g0", "g1", "g2"]


def test_hugging_face_s_imagefolder(tmp_path):
    for split, numbers in (("train", range(3)), ("validation", range(3, 5))):
        for n in numbers:
            put(tmp_path / "a" / split / f"{n % 3}.png", grey(n))
        rows = [
            {"file_name": f"{n % 3}.png", "text": f"number {n}", "objects": {"bbox": [[1]]}}
            for n in numbers
        ]
        lines(tmp_path / "a" / split / "metadata.jsonl", rows)
    data = read(tmp_path / "a", "imagefolder", 5)  # a picture of either split is named 0.png
    assert data.split == ["train"] * 3 + ["validation"] * 2
    assert data.split_by == "split"
    for n in range(2):
        put(tmp_path / "b" / f"{n}.png", grey(n))
    put(tmp_path / "b" / "metadata.csv", 'file_name,text\n0.png,"number 0, flat"\n1.png,number 1\n')
    assert read(tmp_path / "b", "imagefolder", 2).captions == [["number 0, flat"], ["number 1"]]


def test_a_folder_per_class(tmp_path):
    for n in range(4):
        put(tmp_path / "a" / f"number_{n // 2}" / "deeper" / f"{n}.png", grey(n // 2))
    put(tmp_path / "a" / "number_0" / "Thumbs.db", b"\0")
    put(tmp_path / "a" / "stray.png", grey(1))
    put(tmp_path / "a" / "number_0" / "source.tar", b"")
    assert find_format(tmp_path / "a") == "imagefolder"
    data = load_dataset(tmp_path / "a", 4)
    assert data.captions == [["number 0"]] * 2 + [["number 1"]] * 2
    assert [s.reason for s in data.skipped] == ["in no folder of a class"]
    for name in ("train", "car"):  # a class
        put(tmp_path / "c" / name / "0.png", grey(0))
    assert load_dataset(tmp_path / "c", 4).captions == [["car"], ["train"]]
    for split, n in (("train", 0), ("train", 1), ("val", 0)):
        put(tmp_path / "b" / split / f"number_{n}" / f"{split}.png", grey(n))
    data = load_dataset(tmp_path / "b", 4)
    assert sorted(zip(data.split, data.captions, strict=True)) == [
        ("train", ["number 0"]),
        ("train", ["number 1"]),
        ("val", ["number 0"]),
    ]


KINDS = ("webp", "avif", "jfif", "jp2", "bmp", "gif", "tif", "tiff", "jpeg", "JPG", "PNG", "WebP")


def test_pictures_of_every_kind(tmp_path):
    members = []
    for n, kind in enumerate(KINDS):
        members += [(f"{n}.{kind}", grey(n, kind)), (f"{n}.txt", f"number {n}")]
    for name, content in members:
        put(tmp_path / "files" / name, content)
    assert read(tmp_path / "files", "folder", 12).skipped == []
    assert read(tar(tmp_path / "a.tar", members), "webdataset", 12).skipped == []


# --- tars ---


def test_shards_by_pattern_choice_and_joined(tmp_path):
    for n, name in enumerate(("a-098", "a-099", "a-100", "a-101", "b")):
        tar(tmp_path / f"{name}.tar", pairs(n))
    read(f"{tmp_path}/a-*.tar", "webdataset", 4)
    read(f"{tmp_path}/{{a-*,b}}.tar", "webdataset", 5)
    read(f"{tmp_path}/a-{{098..101}}.tar::{tmp_path}/b.tar", "webdataset", 5)
    read(f"{tmp_path}/a-{{098..099}}.tar", "webdataset", 2)
    with pytest.raises(FileNotFoundError, match=r"no data at .*/c-\*.tar \(1 missing\)"):
        load_dataset(f"{tmp_path}/a-*.tar::{tmp_path}/c-*.tar", 4)
    with pytest.raises(ValueError, match=r"\*.csv is a pattern: those are for .tar and .parquet"):
        load_dataset(f"{tmp_path}/*.csv", 4)
    for split, n in (("train", 0), ("val", 1)):
        tar(tmp_path / "sets" / split / "0.tar", pairs(n))
    assert read(tmp_path / "sets", "webdataset", 2).split == ["train", "val"]


def test_img2dataset_s_shards_lie_beside_their_statistics(tmp_path):
    for part in range(2):
        members = pairs(2 * part, 2 * part + 1)
        about = {"caption": f"number {2 * part}", "status": "success", "exif": "{}"}
        tar(tmp_path / f"{part:05}.tar", [*members, (f"{2 * part}.json", json.dumps(about))])
        put(tmp_path / f"{part:05}_stats.json", '{"count": 2}')
        put(tmp_path / f"{part:05}.parquet", b"")
    assert read(tmp_path, "webdataset", 4).skipped == []


def test_a_picture_s_members_need_not_stand_together(tmp_path):
    members = pairs(*range(5))
    source = tar(tmp_path / "late.tar", members[::2] + members[:0:-2])
    assert read(source, "webdataset", 5).skipped == []
    cut = put(tmp_path / "cut.tar", source.read_bytes()[: 512 * 15])  # inside the second text
    assert {s.kind for s in load_dataset(cut, 4).skipped} == {"empty caption", "damaged tar"}


# --- tables ---


def table(path, rows, separator="\t", encoding="utf-8", newline="\n"):
    text = newline.join(separator.join(row) for row in rows) + newline
    return put(path, text.encode(encoding))


def numbered(folder, count, header=("filepath", "title")):
    for n in range(count):
        put(folder / f"{n}.png", grey(n))
    return [header, *((f"{n}.png", f"number {n}, schön") for n in range(count))]


def test_csv_compressed_and_in_utf_16(tmp_path):
    rows = numbered(tmp_path, 3)
    want = [[f"number {n}, schön"] for n in range(3)]
    source = table(tmp_path / "a.csv", rows)
    put(tmp_path / "a.csv.gz", gzip.compress(source.read_bytes()))
    assert read(tmp_path / "a.csv.gz", "csv", 3).captions == want
    table(tmp_path / "b.csv", rows, encoding="utf-16", newline="\r\n")
    assert read(tmp_path / "b.csv", "csv", 3).captions == want
    whole = (tmp_path / "a.csv.gz").read_bytes()
    with pytest.raises(ValueError, match=r"cut.csv.gz: damaged gzip"):
        load_dataset(put(tmp_path / "cut.csv.gz", whole[:-20]), 4)


def test_csv_with_its_own_columns(tmp_path):
    rows = numbered(tmp_path / "store", 4, ("image", " text "))
    source = table(tmp_path / "list.csv", rows[:1] + [(a, f'"{b}"') for a, b in rows[1:]], ",")
    options = {"csv_separator": ",", "csv_img_key": "image", "csv_caption_key": "text"}
    read(source, "csv", 4, image_root=str(tmp_path / "store"), **options)
    rows = [(*row, f"i{n // 2}", "test" if n > 2 else "train") for n, row in enumerate(rows)]
    rows[0] = ("filepath", "title", "item", "split")
    data = load_dataset(table(tmp_path / "store" / "full.csv", rows), 4)
    assert data.items == ["i0", "i1", "i2"]
    assert data.split == ["train", "train", "test", "test"]
    assert data.image_item.tolist() == [0, 1, 1, 2]


def test_what_to_do_about_unknown_captions_and_separators_is_told(tmp_path):
    rows = [{"image": f"{n}.png", "words": f"number {n}"} for n in range(2)]
    for n in range(2):
        put(tmp_path / f"{n}.png", grey(n))
    source = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"expected captions, .*, title; set --csv-caption-key"):
        load_dataset(source, 4)
    read(source, "jsonl", 2, csv_caption_key="words")
    quoted = put(tmp_path / "a.csv", '"filepath","title"\n"0.png","number 0"\n')
    with pytest.raises(ValueError, match=r"no column 'filepath', .* set --csv-separator comma"):
        load_dataset(quoted, 4)
    read(quoted, "csv", 1, csv_separator=",")


def test_items_by_number_and_pictures_in_two_lines(tmp_path):
    for n in range(4):
        put(tmp_path / f"{n}.png", grey(n // 2))
    rows = [{"image": f"{n}.png", "caption": f"number {n // 2}", "item": n // 2} for n in range(4)]
    data = load_dataset(lines(tmp_path / "items.jsonl", rows), 4)
    assert (data.items, data.image_item.tolist()) == (["0", "1"], [0, 0, 1, 1])
    rows = [{"image": f"{n}.png", "caption": f"number {n // 2}"} for n in (0, 2, 1)]
    rows += [{"image": f"{n}.png", "caption": "again"} for n in (0, 2)]
    data = load_dataset(lines(tmp_path / "twice.jsonl", rows), 4)  # 1.png is a copy of 0.png
    assert data.captions == [["number 0", "again"], ["number 1", "again"], ["number 0"]]
    assert len(data.images) == 3


def test_several_rows_a_picture_are_its_captions(tmp_path):
    rows = numbered(tmp_path, 3)
    more = [(name, f"{text}, says {k}") for k in range(4) for name, text in rows[1:]]
    data = read(table(tmp_path / "flickr.csv", rows[:1] + more), "csv", 3)
    assert [len(texts) for texts in data.captions] == [4] * 3


def test_odd_file_names(tmp_path):
    names = ("two words.png", " leading.png", "über/straße.png", "猫.png", "line\nbreak.png")
    names += ("tab\tbed.png", 'quo"ted.png', "-x.png", "100%.png")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["filepath", "title"])
    for n, name in enumerate(names):
        put(tmp_path / name, grey(n))
        writer.writerow([name, f"number {n}"])
    data = read(put(tmp_path / "names.csv", text.getvalue()), "csv", 9, csv_separator=",")
    assert len({one_line(name) for name in data.files}) == 9
    assert all(len(one_line(name).splitlines()) == 1 for name in data.files)


def test_tsv_without_a_header(tmp_path):
    rows = numbered(tmp_path / "images", 3)
    source = table(tmp_path / "a.tsv", [(text, name, "en") for name, text in rows[1:]])
    read(source, "tsv", 3, image_root=str(tmp_path / "images"))
    read(table(tmp_path / "images" / "b.tsv", rows), "tsv", 3)  # with one
    with pytest.raises(ValueError, match=r"c.tsv:1: no column of pictures' paths among 2"):
        load_dataset(table(tmp_path / "c.tsv", [("a", "b"), ("c", "d")]), 4)


@pytest.mark.parametrize("rows", [[("a", "http://a.b/0.jpg")], [("caption", "url"), ("a", "b")]])
@pytest.mark.parametrize("name", ["cc3m.tsv", "cc3m.csv"])
def test_urls_are_to_be_downloaded_first(tmp_path, rows, name):
    if name.endswith("csv"):
        rows = [("caption", "filepath"), ("a", "https://a.b/0.jpg")]
    source = table(tmp_path / name, rows)
    with pytest.raises(ValueError, match=r"cc3m.*URLs.* download the pictures .* img2dataset$"):
        load_dataset(source, 4)


# --- parquet ---


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = put(tmp_path / "a.parquet", b"")
    with pytest.raises(ImportError, match=r"parquet needs pyarrow: pip install 'ito_trainer\[parq"):
        load_dataset(source, 4)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")  # an extra
    from pyarrow import parquet

    def write(path, rows, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
        return path

    rows = [
        {"image": {"bytes": grey(n), "path": "0.png"}, "caption": f"number {n}", "id": n}
        for n in range(7)
    ]
    source = write(tmp_path / "train-0.parquet", rows, row_group_size=3)
    assert read(source, "parquet", 7).skipped == []
    assert len(open_shards(source)) == 3
    rows = [{"jpg": grey(n), "words": [f"number {n}"], "item": n} for n in range(2)]
    options = {"csv_img_key": "jpg", "csv_caption_key": "words"}
    read(write(tmp_path / "b.parquet", rows), "parquet", 2, **options)
    for split, n in (("train", 0), ("validation", 1)):
        rows = [{"image": f"{n}.png", "text": f"number {n}"}]
        write(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
        put(tmp_path / "store" / f"{n}.png", grey(n))
    data = read(tmp_path / "hub", "parquet", 2, image_root=str(tmp_path / "store"))
    assert data.split == ["train", "validation"]
    outside = [{"image": str(tmp_path / "store" / "0.png"), "text": "number 0"}]
    source = write(tmp_path / "hub" / "one.parquet", outside)
    (skipped,) = open_shards(source, untrusted_data=True)[0]()
    assert skipped.kind == "outside the folder"
    urls = write(tmp_path / "c.parquet", [{"URL": "http://a.b/0.jpg", "TEXT": "a"}])
    with pytest.raises(ValueError, match=r"c.parquet: its pictures are URLs: download"):
        load_dataset(urls, 4)
    with pytest.raises(ValueError, match=r"d.parquet is not parquet"):
        load_dataset(put(tmp_path / "d.parquet", "none"), 4)


# --- the format by name ---


def test_a_format_that_does_not_fit_is_refused_by_name(tmp_path):
    put(tmp_path / "a" / "0.png", grey(0)), put(tmp_path / "a" / "0.txt", "number 0")
    with pytest.raises(ValueError, match=r"--data-format coco does not fit .*/a, which can be fol"):
        load_dataset(tmp_path / "a", 4, data_format="coco")
    read(put(tmp_path / "a" / "list.txt", "0.png\tnumber 0\n"), "tsv", 1, data_format="tsv")
    lines(tmp_path / "a" / "captions.jsonl", [{"image": "none.png", "caption": "no"}])
    assert find_format(tmp_path / "a") == "jsonl"
    read(tmp_path / "a", "folder", 1, data_format="folder")


# --- pictures ---


def squares(folder):
    """{name: (bytes, how it is to look)}: a dark square on a ground that is to be white."""
    ground = np.ones((8, 8), bool)
    ground[2:6, 2:6] = False
    flat = np.where(ground[..., None], (10, 90, 40), (215, 30, 30)).astype(np.uint8)
    white = np.where(ground[..., None], 255, flat)
    tones = np.where(ground, 3, 120).astype(np.uint8)
    grey_white = np.repeat(np.where(ground, 255, tones)[..., None], 3, 2)
    palette = Image.fromarray(np.where(ground, 1, 2).astype(np.uint8))
    palette.putpalette([0, 0, 0, 10, 90, 40, 215, 30, 30])
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    want = np.repeat((ramp * 255).round()[..., None], 3, 2)
    many = (ramp * 65535).round()
    deep = np.where(ground, 700, 120 * 257).astype(np.uint16)
    upright = Image.fromarray(white.astype(np.uint8))
    moving = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))], "duration": 80}
    return {
        "rgb.png": (encode(Image.fromarray(flat), transparency=(10, 90, 40)), white),
        "grey.png": (encode(Image.fromarray(tones), transparency=3), grey_white),
        "grey16.png": (encode(Image.fromarray(deep), transparency=700), grey_white),
        "palette.png": (encode(palette, transparency=1), white),
        "table.png": (encode(palette, transparency=bytes([255, 0, 255])), white),
        "float.tif": (encode(Image.fromarray(ramp.astype(np.float32)), "tif"), want),
        "float255.tif": (encode(Image.fromarray(255 * ramp.astype(np.float32)), "tif"), want),
        "short.tif": (encode(Image.fromarray(many.astype(np.uint16)), "tif"), want),
        "short.png": (encode(Image.fromarray(many.astype(np.uint16))), want),
        "int.tif": (encode(Image.fromarray(many.astype(np.int32)), "tif"), want),
        "moving.webp": (encode(upright, "webp", lossless=True, **moving), white),
        "moving.gif": (encode(upright, "gif", **moving), white),
        "cmyk.tif": (encode(upright.convert("CMYK"), "tif"), white),
    }


def test_pictures_of_every_transparency_and_depth(tmp_path):
    twins = squares(tmp_path)
    for name, (content, _) in twins.items():
        put(tmp_path / name, content)
    lines(tmp_path / "captions.jsonl", [{"image": name, "caption": name} for name in twins])
    data = load_dataset(tmp_path, 8)
    assert [name[0] for name in data.captions] == list(twins)
    for name, got in zip(twins, data.images.permute(0, 2, 3, 1).numpy(), strict=True):
        assert np.abs(got - twins[name][1].astype(float)).max() <= 1, name


def test_values_of_no_known_range_are_skipped(tmp_path):
    values = {"below": -1.0, "above": 1e6, "right": 1.0}
    for name, value in values.items():
        picture = Image.fromarray(np.array([[0, value]], np.float32))
        put(tmp_path / f"{name}.tif", encode(picture, "tif"))
    lines(
        tmp_path / "captions.jsonl", [{"image": f"{name}.tif", "caption": "a"} for name in values]
    )
    data = load_dataset(tmp_path, 4)
    assert [s.kind for s in data.skipped] == ["unknown range"] * 2
    assert "below.tif has values from -1.0 to 0.0, expected" in data.skipped[0].reason


def test_a_turned_jpeg_costs_what_an_upright_one_does(tmp_path):
    ramp = np.linspace(0, 255, 1024).reshape(32, 32).astype(np.uint8)
    upright = Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], 2))
    turns = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}
    for number, undo in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        turned = upright.transpose(getattr(Image.Transpose, undo))
        put(tmp_path / f"{number}.JPG", encode(turned, "jpg", quality=95, exif=exif))
        put(tmp_path / f"{number}.txt", "a")
    for got in load_dataset(tmp_path, 32).images.permute(0, 2, 3, 1).numpy():
        assert np.abs(got - np.asarray(upright).astype(float)).mean() < 2


# --- what is said ---


def test_the_data_in_numbers(tmp_path):
    """By hand: three captions are those of other items too; one picture is none, one not there."""
    rows = [
        {"image": "0.png", "captions": ["a", "b", "a"], "item": "x"},
        {"image": "1.png", "captions": ["b", "c"], "item": "x"},
        {"image": "2.png", "captions": ["a"]},
        {"image": "3.png", "captions": ["a", "d"], "split": "train"},
        {"image": "4.png", "captions": ["e"]},
        {"image": "5.png", "captions": ["e"]},
        {"image": "0.png", "captions": [""]},
    ]
    for n in range(4):
        put(tmp_path / f"{n}.png", grey(n))
    put(tmp_path / "4.png", "none")
    lines(tmp_path / "captions.jsonl", rows)
    data = load_dataset(tmp_path, 4)
    facts = summarise("jsonl", [data], 2, count_overlap(data, data))
    assert facts == {
        "format": "jsonl",
        "pictures": 4,
        "items": 3,
        "captions": 6,
        "skipped": {"empty caption": 1, "not a picture": 1, "no picture": 1},
        "cut_captions": 2,
        "equal_captions": 3,
        "train_items": 2,
        "val_items": 1,
        "test_items": 0,
        "split_by": "item",
        "overlap": {"captions": 1, "groups": 0, "items": 0, "pictures": 0},
    }
    assert sentence(facts) == (
        "jsonl: 4 pictures of 3 items with 6 captions, 2 of them cut and 3 equal to one of another "
        "item; 2 to train on, 1 held out, split by item; 3 records skipped (empty caption: 1, not "
        "a picture: 1, no picture: 1)"
    )
    streamed = sentence(facts | {"format": "webdataset", "train_items": None})
    assert streamed.startswith("webdataset: a stream to train on; to score: 4 pictures of 3 items ")
    assert "one of another item; 1 held out, split by item; 3 records" in streamed


def test_a_val_set_is_scored_whole_whatever_it_calls_itself(tmp_path):
    for n in range(4):
        put(tmp_path / f"{n}.png", grey(n))
    for split in ("train", None):
        rows = [{"image": f"{n}.png", "caption": "a", "split": split} for n in range(4)]
        lines(tmp_path / "captions.jsonl", rows)
        assert load_dataset(tmp_path, 4, only="val").split == ["val"] * 4
        assert load_dataset(tmp_path, 4, only="train").split == ["train"] * 4
        assert load_dataset(tmp_path, 4).split.count("heldout") == 1


def test_control_characters_are_shown(tmp_path):
    bad = "bad\x1b]0;title\x07.png"
    put(tmp_path / bad, "none"), put(tmp_path / "0.png", grey(0))
    rows = [{"image": bad, "caption": "\x1b[31m"}, {"image": "0.png", "caption": "\x9b1m"}]
    rows.append({"image": "0.png", "caption": "a", "split": "\x1b[2J"})
    said = report_skipped(load_dataset(lines(tmp_path / "a.jsonl", rows), 4).skipped)
    assert r"bad\x1b]0;title\x07.png" in said
    for text in (said, one_line("\x1b[31m\x07\x7f\x9b1m a\tb\r\nc\ud83d\u202e")):
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)
        text.encode()


# --- splits ---


def labelled(folder, items, **fields):
    """`items` pictures, all different; `fields` are functions of n."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(items):
        put(folder / f"{n}.png", encode(Image.new("RGB", (4, 4), (n, 3 * n, 9))))
        rows.append({"image": f"{n}.png"} | {name: value(n) for name, value in fields.items()})
    lines(folder / "captions.jsonl", rows)
    return [load_dataset(folder, 4, split_seed=seed) for seed in range(3)]


def sides(data, key):
    """The splits of the pictures by their key."""
    found = {}
    for n, split in zip(data.image_item.tolist(), data.split, strict=True):
        found.setdefault(key(int(data.items[n].removesuffix(".png"))), set()).add(split)
    return found.values()


def test_equal_captions_are_on_one_side(tmp_path):
    for data in labelled(tmp_path, 70, caption=lambda n: f"scene {n % 14}"):
        assert data.split_by == "caption"
        assert data.split.count("heldout") == 10  # two captions
        assert all(len(both) == 1 for both in sides(data, lambda n: n % 14))
        assert report_overlap(count_overlap(data, data), data) == ""
        assert "warning    held-out captions" in report_equal_captions(data, "positive")
    several = {"captions": lambda n: [f"own {n}", f"{'A  B' if n % 2 else 'a b'} {n % 5}"]}
    for data in labelled(tmp_path, 30, **several):  # white space and case make no difference
        assert data.split.count("heldout") == 6
        assert all(len(both) == 1 for both in sides(data, lambda n: n % 5))


def test_a_caption_of_nearly_all_is_on_both_sides(tmp_path):
    for data in labelled(tmp_path, 80, captions=lambda n: [f"{n}", "a" if n > 1 else f"own {n}"]):
        assert data.split_by == "item"
        assert data.split.count("heldout") == 8


def test_a_group_is_on_one_side(tmp_path):
    for data in labelled(tmp_path, 66, caption=lambda n: f"{n}", group=lambda n: n % 6):
        assert data.split_by == "group"
        assert data.split.count("heldout") == 11
        assert all(len(both) == 1 for both in sides(data, lambda n: n % 6))


def test_few_classes_are_on_both_sides_and_that_is_said(tmp_path):
    for data in labelled(tmp_path, 32, caption=lambda n: f"class {n % 4}"):
        assert data.split_by == "item"
        assert data.split.count("heldout") == 3
        told = report_overlap(count_overlap(data, data), data)
        assert told == "note       3 of 3 items of heldout have a caption that is trained on too"
        told = report_equal_captions(data, "positive")
        assert told.startswith("note       29 training captions are equal to one of another train")
        assert "warning" not in told


def test_pictures_that_are_all_the_same_are_split_by_item(tmp_path):
    for n in range(8):
        put(tmp_path / f"{n}.png", grey(1)), put(tmp_path / f"{n}.txt", f"number {n}")
    assert load_dataset(tmp_path, 4).split.count("heldout") == 1


# --- options ---


def test_training_data_and_val_data_of_two_formats(tmp_path):
    """A forced format is that of the training data."""
    source = table(tmp_path / "train" / "list.txt", numbered(tmp_path / "train", 4)[1:])
    val = tar(tmp_path / "val.tar", pairs(5, 6))
    config = Config(train_data=str(source), val_data=str(val), data_format="tsv", load_size=4)
    eval_data, train_data = open_data(config, None, 1, Ranks())
    assert (train_data.format, eval_data.format) == ("tsv", "webdataset")
    assert train_data.split == ["train"] * 4
    assert eval_data.split == ["val"] * 2
    facts = summarise("tsv", [train_data, eval_data], 0, {})
    assert (facts["train_items"], facts["val_items"], facts["split_by"]) == (4, 2, "none")
    assert report_overlap(count_overlap(train_data, eval_data), eval_data) == ""
    tar(tmp_path / "val.tar", pairs(3, 6))
    told = "warning    1 of 2 pictures of val are training pictures too"
    again = open_dataset(config)
    assert report_overlap(count_overlap(train_data, again), again).startswith(told)
    tar(tmp_path / "val.tar", pairs(5, 6))
    for stream in (False, True):  # the scored data are the same
        again = open_dataset(replace(config, stream=stream))
        assert again.items == eval_data.items


@pytest.mark.parametrize(
    ("name", "separator"),
    [("comma", ","), ("tab", "\t"), ("\\t", "\t"), ("semicolon", ";"), ("pipe", "|"), ("#", "#")],
)
def test_separators_have_names(name, separator):
    assert Config(csv_separator=name).csv_separator == separator


def test_paths_of_a_pattern_become_absolute_and_data_of_a_command_are_looked_at_anew(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--train-data", "a/{0..1}.tar::b.tar", "--image-root", "c", "--data-format", "tsv"]
    config = from_options(parser.parse_args(words))
    assert config.train_data == f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b.tar"
    assert config.image_root == f"{tmp_path}/c"
    config.save(tmp_path / "config.json")
    given = argparse.Namespace(run=tmp_path, data="x.tar")
    other = choose_data(given)
    assert (other.data_format, other.image_root) == ("auto", None)
    given.image_root = "d"
    assert choose_data(given).image_root == f"{tmp_path}/d"
    given.val_data = "y"
    with pytest.raises(ValueError, match=r"--data x.tar and --val-data name the same thing"):
        choose_data(given)
