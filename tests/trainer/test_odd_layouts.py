"""Layouts of data that people bring, which were misread."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from ito import evaluate, export, search, train
from ito.data.dataset import load_dataset


def put(path, content=None, colour=0):
    """A picture, or with `content` a text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    content = buffer.getvalue() if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **options):
    """The captions of each item, and the number of records that were skipped."""
    data = load_dataset(path, 4, workers=1, **options)
    return data.captions, len(data.skipped)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_in_a_tar_may_have_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(2):
            members = {"png": put(tmp_path / "x.png", colour=n).read_bytes()}
            members["txt"] = f"für {n}".encode(encoding)
            members["json"] = json.dumps({"caption": "other"}).encode(encoding)
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{n}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert read(path) == ([["für 0"], ["für 1"]], 0)


def test_one_folder_of_pictures_is_no_class_unless_it_is_said(tmp_path):
    for n in range(4):
        put(tmp_path / "images" / f"{n}.png", colour=n)
    with pytest.raises(ValueError, match=r"one caption, their folder's name 'images'"):
        read(tmp_path)
    assert read(tmp_path, data_format="imagefolder") == ([["images"]] * 4, 0)
    put(tmp_path / "other" / "5.png", colour=5)
    assert read(tmp_path) == ([["images"]] * 4 + [["other"]], 0)


def test_what_macos_adds_to_an_archive_is_no_class(tmp_path):
    for n in range(4):
        put(tmp_path / f"class {n % 2}" / f"{n}.png", colour=n)
        put(tmp_path / "__MACOSX" / f"class {n % 2}" / f"{n}.png", "junk")
    assert read(tmp_path) == ([["class 0"], ["class 0"], ["class 1"], ["class 1"]], 0)


@pytest.mark.parametrize("suffix", ["heic", "svg", "JXL"])
def test_pictures_that_are_not_read_are_named(tmp_path, suffix):
    for n in range(2):
        put(tmp_path / f"{n}.png", colour=n)
        put(tmp_path / f"{n}.txt", f"number {n}")
    put(tmp_path / f"odd.{suffix}", "what no reader knows")
    put(tmp_path / "odd.txt", "a text")
    (skipped,) = load_dataset(tmp_path, 4, workers=1).skipped
    assert skipped.where.endswith(f"odd.{suffix}")
    assert skipped.kind == "not a picture"


def test_a_caption_may_begin_with_quoted_words(tmp_path):
    rows = ['"Quoted" words', 'said "so"', 'an "unclosed', "plain"]
    for n in range(4):
        put(tmp_path / f"{n}.png", colour=n)
    table = "".join(f"{n}.png\t{text}\n" for n, text in enumerate(rows))
    kept = [["Quoted words"], ['said "so"'], ['an "unclosed'], ["plain"]]
    assert read(put(tmp_path / "a.tsv", table)) == (kept, 0)
    long = '4.png\t"a" ' + "x" * 200_000 + "\n"  # above the limit of the module csv
    assert read(put(tmp_path / "b.csv", "filepath\ttitle\n" + table + long)) == (kept, 1)


def test_a_row_with_more_cells_than_columns_is_not_cut_silently(tmp_path):
    for n in range(3):
        put(tmp_path / f"{n}.png", colour=n)
    table = "filepath,title\n0.png,a cat, asleep\n1.png,a dog,\n2.png,a cow\n"
    source = put(tmp_path / "a.csv", table)
    assert read(source, csv_separator=",") == ([["a dog"], ["a cow"]], 1)


def test_a_column_of_links_is_told_to_hold_urls(tmp_path):
    source = put(tmp_path / "a.tsv", "caption\timage_link\na cat\thttps://host/1.jpg\n")
    with pytest.raises(ValueError, match="its pictures are URLs: download"):
        read(source)


def test_numbers_of_coco_may_be_texts_on_one_side(tmp_path):
    for n in range(2):
        put(tmp_path / f"{n}.png", colour=n)
    images = [{"id": str(n), "file_name": f"{n}.png"} for n in range(2)]
    notes = [{"id": n, "image_id": n, "caption": f"number {n}"} for n in range(2)]
    notes.append({"id": 9, "image_id": [0], "caption": "of no image"})
    source = put(tmp_path / "a.json", json.dumps({"images": images, "annotations": notes}))
    assert read(source) == ([["number 0"], ["number 1"]], 1)


@pytest.mark.parametrize("option", ["--train-data", "--val-data", "--image-root"])
@pytest.mark.parametrize("path", ["", "a.tar::"])
def test_an_empty_path_is_not_the_working_directory(tmp_path, capsys, option, path):
    data = [] if option == "--train-data" else ["--train-data", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        train.main([*data, option, path, "--out", os.fspath(tmp_path / "run")])
    assert ended.value.code == 2
    assert f"{option} must be a path, got {path!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [train, evaluate, search, export])
def test_a_bad_option_is_told_in_one_line(capsys, command):
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "--such-an-option", "x"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--such-an-option" in line


def test_a_folder_of_pictures_that_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--train-data", str(tmp_path), "--image-root", str(tmp_path / "no")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --image-root {tmp_path}/no is not a folder\n"


@pytest.mark.parametrize("command", [train, evaluate, search, export])
def test_an_empty_output_is_not_the_working_directory(capsys, command):
    option = "--json" if command is evaluate else "--out"
    with pytest.raises(SystemExit) as ended:
        command.main([*(["run"] if command is not train else []), option, ""])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: argument {option}: must be a path, got ''\n"


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_paths_in_parquet_may_be_texts_of_any_kind(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")  # an extra
    from pyarrow import parquet

    names = pyarrow.array([put(tmp_path / f"{n}.png", colour=n).name for n in range(2)])
    texts = pyarrow.array(["number 0", "number 1"])
    make = "dictionary_encode" if kind == "dictionary" else "cast"
    names, texts = (getattr(a, make)(*[kind] * (make == "cast")) for a in (names, texts))
    parquet.write_table(pyarrow.table({"image": names, "caption": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([["number 0"], ["number 1"]], 0)
