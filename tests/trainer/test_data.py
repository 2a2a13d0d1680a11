"""The readers of users' data, and the data set that they make."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ito.data.dataset import load_dataset
from ito.data.splits import held_out
from ito.model.exported import Encoder
from ito.summary import count_overlap, report_overlap, report_skipped


def draw(path, colour, size=(10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def overlap(data):
    return report_overlap(count_overlap(data, data), data)


def test_a_folder(tmp_path):
    draw(tmp_path / "a.png", (255, 0, 0))
    draw(tmp_path / "sub" / "b.png", (0, 255, 0))
    draw(tmp_path / "c.png", (0, 0, 255))
    write(
        tmp_path,
        {"image": "a.png", "caption": " red ", "item": "x", "style": "s", "subgroup": "g"},
        {"image": "c.png", "captions": ["blue", "", "sea"], "caption": "not read"},
        "",
        {
            "image": "sub/b.png",
            "captions": [],
            "caption": "rot?",
            "item": "x",
            "split": "test",
            "translations": {"de": "rot", "fr": ["rouge", "vermeil"]},
        },
    )
    data = load_dataset(tmp_path, 4)
    assert data.images.shape == (3, 3, 4, 4)
    assert data.images.dtype == torch.uint8
    assert data.images[:, :, 2, 2].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]
    assert data.items == ["x", "c.png"]
    assert data.files == [str(tmp_path / name) for name in ("a.png", "c.png", "sub/b.png")]
    assert data.image_item.tolist() == [0, 1, 0]
    assert data.captions == [["red", "rot?"], ["blue", "sea"]]
    assert data.split == ["train", "train", "test"]
    assert data.rows("train").tolist() == [0, 1]
    assert data.rows("nowhere").tolist() == []
    assert data.style == ["s", None, None]
    assert data.subgroup == ["g", None]
    assert data.translations == [{"de": ["rot"], "fr": ["rouge", "vermeil"]}, {}]
    assert data.skipped == []


def test_decoding(tmp_path):
    draw(tmp_path / "clear.png", (0, 0, 0, 0))
    draw(tmp_path / "half.png", (0, 0, 0, 128))
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste((255, 0, 0), (10, 0, 20, 10))  # the centred square is red
    wide.save(tmp_path / "wide.png")
    deep = np.full((8, 8), 0x8040, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.new("L", (8, 8), 77).convert("P").save(tmp_path / "palette.gif")
    names = ["clear.png", "half.png", "wide.png", "deep.png", "turned.jpg", "palette.gif"]
    data = load_dataset(write(tmp_path, *({"image": n, "caption": n} for n in names)), 8)
    clear, half, wide, deep, turned, palette = data.images
    assert (clear == 255).all()
    assert (half.int() - 127).abs().max() <= 1
    assert wide[:, 4, 4].tolist() == [255, 0, 0]
    assert wide[0].min() > 200
    assert (deep == 0x80).all()
    assert turned[:, 1].max() < 30 < 200 < turned[:, 6].min()
    assert (palette == 77).all()
    encoder = Encoder(None, None, 8, 0)  # what it makes of open pictures
    for name, want in zip(names, data.images.permute(0, 2, 3, 1), strict=True):
        with Image.open(tmp_path / name) as picture:
            assert (encoder.square(picture, 0) == want.numpy()).all(), name
            if picture.mode == "RGBA":
                for mode in ("RGBa", "PA"):
                    got = encoder.square(picture.convert(mode), 0)
                    assert (got == want.numpy()).all(), (name, mode)


def test_the_order_does_not_depend_on_the_workers(tmp_path):
    for n in range(40):  # the first ones take longest
        draw(tmp_path / f"{n}.png", (n, n, n), (400 - 10 * n, 400 - 10 * n))
    write(tmp_path, *({"image": f"{n}.png", "caption": f"{n}"} for n in range(40)))
    one, many = (load_dataset(tmp_path, 16, workers=n) for n in (1, 7))
    assert one.images[:, 0, 0, 0].tolist() == list(range(40))
    assert torch.equal(one.images, many.images)
    assert one.items == many.items
    assert one.split == many.split


def test_bad_records_are_skipped_and_named(tmp_path):
    draw(tmp_path / "good.png", (1, 2, 3))
    good = (tmp_path / "good.png").read_bytes()
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    header = bytearray(good)
    header[16:20] = b"\x7f\xff\xff\xff"  # two thousand million pixels wide
    (tmp_path / "bomb.png").write_bytes(header)
    names = ["cut.png", "text.png", "empty.png", "folder.png", "bomb.png", "gone.png"]
    write(
        tmp_path,
        *({"image": name, "caption": "bad"} for name in names),
        {"image": "good.png", "caption": "good"},
        {"image": "good.png", "caption": "  "},
        {"image": "good.png", "captions": []},
        {"image": "good.png", "captions": None},
        {"image": "good.png", "caption": "half \ud83d"},
        {"image": "good.png", "caption": "a", "translations": {"de": "\ude00"}},
        {"image": "\ud83d.png", "caption": "a", "item": "a"},
    )
    data = load_dataset(tmp_path, 4)
    assert data.items == ["good.png"]
    assert data.captions == [["good"]]
    assert data.images[:, :, 1, 1].tolist() == [[1, 2, 3]]
    found = dict(data.skipped)
    source = tmp_path / "captions.jsonl"
    for row, name in enumerate(names, 1):
        assert name in found[f"{source}:{row}"]
    assert [found[f"{source}:{row}"] for row in (8, 9, 10)] == ["empty caption"] * 3
    halves = [r"'half \ud83d'", r"'\ude00'", rf"'{tmp_path}/\ud83d.png'"]
    for row, half in enumerate(halves, 11):
        assert found[f"{source}:{row}"] == f"half a character: in {half}"
    assert len(data.skipped) == 12
    report_skipped(data.skipped).encode()  # may be printed
    report = report_skipped(data.skipped, limit=4).splitlines()
    assert report[0] == "skipped 12 records:"
    assert len(report) == 6
    kinds = {record.kind for record in data.skipped}
    told = report_skipped(data.skipped, limit=len(kinds))
    assert len(kinds) == 6
    assert all(f": {kind}" in told for kind in kinds)  # though three have one reason
    assert len(report_skipped(data.skipped, limit=12).splitlines()) == 13
    assert report_skipped([]) == ""


def test_nothing_usable_is_an_error(tmp_path):
    write(tmp_path, {"image": "gone.png", "caption": "a"}, {"image": "b.png", "caption": ""})
    with pytest.raises(ValueError, match=r"no usable picture in .* \(2 records.*gone"):
        load_dataset(tmp_path, 4)
    with pytest.raises(ValueError, match=r"no usable picture in .* \(it holds no record\)"):
        load_dataset(write(tmp_path), 4)


GOOD = {"image": "a.png", "caption": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.png", ', r"not JSON"),
        ("[" * 100_000, r"not JSON: .*recursion"),
        (f'{{"item": {"9" * 5000}}}', r"not JSON: Exceeds the limit"),
        ("[1, 2]", r"malformed: expected a JSON object, got \[1, 2\]"),
        ({"file": "a.png", "caption": "a"}, r"names no image.*'file'"),
        ({"image": 3, "caption": "a"}, r"image must be a text, got 3"),
        (GOOD | {"item": ["b"]}, r"item must be a text, got \['b'\]"),
        (GOOD | {"caption": 3}, r"captions must be.*got 3"),
        ({"image": "a.png", "captions": ["a", 3]}, r"captions must be.*got \['a', 3\]"),
        (GOOD | {"split": {}}, r"split must be a text, got {}"),
        (GOOD | {"split": "a/b"}, r"split must be a printable name without /, got 'a/b'"),
        (GOOD | {"translations": ["b"]}, r"translations must be an object"),
    ],
)
def test_malformed_rows_are_skipped_and_named(tmp_path, row, message):
    draw(tmp_path / "a.png", (1, 2, 3))
    (skipped,) = load_dataset(write(tmp_path, GOOD, row), 4).skipped
    assert skipped.where == f"{tmp_path}/captions.jsonl:2"
    assert skipped.kind in ("not JSON", "malformed")
    assert re.search(message, skipped.reason)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere"):
        load_dataset(tmp_path / "nowhere", 4)
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path} holds no captions.jsonl, .tar")
    ):
        load_dataset(tmp_path, 4)
    (tmp_path / "captions.jsonl").write_bytes(b"{}\n\xff\xfe")
    with pytest.raises(ValueError, match=r"captions.jsonl:2: not UTF-8"):
        load_dataset(tmp_path, 4)


def table(path, *rows, separator="\t", encoding="utf-8"):
    path.write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding=encoding)
    return path


def test_an_open_clip_csv(tmp_path, monkeypatch):
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        draw(tmp_path / "pictures" / f"{name}.png", colour)
    rows = [
        ["title", "filepath"],
        ["a, red", "pictures/a.png"],
        ["green", str(tmp_path / "pictures" / "b.png")],
        ["first", "pictures/a.png"],
        ["", "pictures/c.png"],
        ["nothing", ""],
        ["short row"],
        ["gone", "pictures/gone.png"],
    ]
    source = table(tmp_path / "data.csv", *rows, encoding="utf-8-sig")
    data = load_dataset(source, 4)
    assert data.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0]]
    assert data.captions == [["a, red", "first"], ["green"]]
    rows = {int(where.rsplit(":", 1)[1]) for where, _ in data.skipped}
    assert rows == {5, 6, 7, 8}

    monkeypatch.chdir(tmp_path / "pictures")  # open_clip's paths are the working directory's
    (tmp_path / "lists").mkdir()
    rows = [["path", "text"], ["c.png", "blue"]]
    source = table(tmp_path / "lists" / "data.csv", *rows, separator=",")
    options = {"csv_separator": ",", "csv_img_key": "path", "csv_caption_key": "text"}
    assert load_dataset(source, 4, **options).captions == [["blue"]]


def test_bad_csv_files_are_named(tmp_path):
    source = table(tmp_path / "data.csv", ["filepath", "words"], ["a.png", "a"])
    with pytest.raises(ValueError, match=r"data.csv:1: no column 'title'; found .*'words'"):
        load_dataset(source, 4)
    options = "--csv-separator tab, --csv-img-key, --csv-caption-key"
    with pytest.raises(ValueError, match=rf"'filepath', 'title'; .*separator ','; set {options}"):
        load_dataset(source, 4, csv_separator=",")
    source.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.csv:1: no column 'filepath', 'title'; found \[\]"):
        load_dataset(source, 4)
    source.write_text('filepath\t"title\na.png\ta\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.csv:1: not CSV: unexpected end"):
        load_dataset(source, 4)


LONG = '"' + "x" * 200_000


@pytest.mark.parametrize(
    ("captions", "kept", "reasons"),
    [
        (["a", '"b', "c", "d"], ["a", "c", "d"], {3: "unexpected end of data"}),
        (["a", '"b', "c", '"d" e'], ["a", "c", "d e"], {3: "expected after"}),
        (["a", '"b', "c", 'd"', "e"], ["a", "c", 'd"', "e"], {3: "closed in line 5 only"}),
        (["a", '"b\nand so on, 3"', "", "d"], ["a", "b\nand so on, 3", "d"], {5: "empty caption"}),
        (['"a ""quoted"""', 'b "c"', LONG], ['a "quoted"', 'b "c"'], {4: "field larger"}),
    ],
)
def test_a_quote_that_is_not_closed_costs_its_own_row(tmp_path, captions, kept, reasons):
    rows = [["path", "filepath", "title"]]
    for n, caption in enumerate(captions):
        draw(tmp_path / f"{n}.png", (n, n, n))
        rows.append(["", f"{n}.png", caption])
    data = load_dataset(table(tmp_path / "data.csv", *rows), 4)
    found = {int(where.rsplit(":", 1)[1]): reason for where, reason in data.skipped}
    assert [names[0] for names in data.captions] == list(kept)
    assert found.keys() == reasons.keys()
    assert all(reasons[row] in found[row] for row in found)


@pytest.mark.parametrize(("items", "held"), [(1, 0), (2, 1), (9, 1), (10, 1), (100, 10)])
def test_without_splits_a_tenth_of_the_items_is_held_out(tmp_path, items, held):
    rows = []
    for n in range(items):
        for image in (f"{n}a.png", f"{n}b.png"):
            draw(tmp_path / image, (n, 2, 3))
            rows.append({"image": image, "caption": f"{n}", "item": f"{n}"})
    write(tmp_path, *rows)
    data = load_dataset(tmp_path, 2)

    def heldout(data):
        return {data.items[n] for n in data.image_item[data.rows("heldout")].tolist()}

    assert set(data.split) <= {"train", "heldout"}
    assert len(heldout(data)) == held
    assert len(data.rows("heldout")) == 2 * held  # both pictures of an item
    assert load_dataset(tmp_path, 2).split == data.split
    write(tmp_path, *rows[::-1])
    assert heldout(load_dataset(tmp_path, 2)) == heldout(data)
    if items == 100:
        assert heldout(load_dataset(tmp_path, 2, split_seed=1)) != heldout(data)


@pytest.mark.parametrize("copied", [False, True])  # the picture's path or its bytes are equal
def test_items_that_share_a_picture_are_on_the_same_side(tmp_path, copied):
    rows = []
    for n in range(100):
        shared = n - n % 5  # five items of the first fifty share a picture
        name = f"{n if copied or n >= 50 else shared}.png"
        draw(tmp_path / name, (shared if n < 50 else n, 2, 3))
        rows.append({"image": name, "caption": f"{n}", "item": f"{n}"})
        draw(tmp_path / f"own{n}.png", (n, 200, 3))
        rows.append({"image": f"own{n}.png", "caption": f"{n}", "item": f"{n}"})
    write(tmp_path, *rows)
    for seed in range(6):
        data = load_dataset(tmp_path, 2, split_seed=seed)
        side = dict(zip(data.files, data.split, strict=True))
        sides = [side[str(tmp_path / f"own{n}.png")] for n in range(100)]
        assert sides.count("heldout") == 10
        for n in range(0, 50, 5):
            assert len(set(sides[n : n + 5])) == 1
        assert overlap(data) == ""


def test_groups_that_are_too_large_to_hold_out_are_trained_on():
    groups = [[f"{n}" for n in range(18)], ["a"], ["b"]]
    for seed in range(5):
        assert held_out(groups, seed) == {"a", "b"}
        assert held_out(groups[:1], seed) == set()
        assert held_out([groups[0], ["c", "d", "e", "f"]], seed) == {"c", "d", "e", "f"}


def test_held_out_pictures_that_are_trained_on_are_counted(tmp_path):
    for n in range(4):
        draw(tmp_path / f"{n}.png", (n, 2, 3))
    draw(tmp_path / "copy.png", (1, 2, 3))
    splits = ["train", "train", "val", "val"]
    rows = [{"image": f"{n}.png", "caption": "a", "split": s} for n, s in enumerate(splits)]
    assert "pictures" not in overlap(load_dataset(write(tmp_path, *rows), 2))
    rows.append({"image": "copy.png", "caption": "a", "split": "val"})
    said = overlap(load_dataset(write(tmp_path, *rows), 2))
    assert said.startswith("warning    1 of 3 pictures of val are training pictures too")


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.csv", "a"])
def test_a_picture_in_the_place_of_a_data_set_is_told(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}.*expected a folder with") as error:
        load_dataset(tmp_path / name, 4)
    assert ("is one picture" in str(error.value)) == (name in ("a.png", "a.JPG"))
    assert "\n" not in str(error.value)


def test_untrusted_data_from_a_pipe_is_refused(tmp_path, monkeypatch):
    """As a shell's <(a program) gives it: there is no folder that its pictures may lie in."""
    draw(tmp_path / "a.png", (1, 2, 3))
    monkeypatch.chdir(tmp_path)
    for untrusted in (False, True):
        end, start = os.pipe()
        os.write(start, b"filepath\ttitle\na.png\ta\n")
        os.close(start)
        try:
            if untrusted:
                with pytest.raises(ValueError, match=f"^/dev/fd/{end} lies in no folder .*untrust"):
                    load_dataset(f"/dev/fd/{end}", 4, untrusted_data=True)
            else:
                assert load_dataset(f"/dev/fd/{end}", 4).captions == [["a"]]
        finally:
            os.close(end)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([None], "training needs at least 2 .*, found 1 .1 items, 1 pictures: 1 train"),
        ([None] * 2, "training needs at least 2 .*, found 1 .*: 1 train, 1 heldout"),
        (["train", "val", "val"], "training needs at least 2 .*, found 1 .*: 1 train, 2 val"),
        (["training"] * 3, "training needs at least 2 .*, found 0 .*: 3 training"),
    ],
)
def test_too_little_to_train_on_or_to_hold_out_is_named(tmp_path, splits, message):
    rows = []
    for n, split in enumerate(splits):
        draw(tmp_path / f"{n}.png", (n, 2, 3))
        rows.append({"image": f"{n}.png", "caption": "a", "split": split})
    data = load_dataset(write(tmp_path, *rows), 4)
    with pytest.raises(ValueError, match=message):
        data.training_items(), data.held_out_splits()
