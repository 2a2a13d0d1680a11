"""The full emoji set, from small packages made here: matching, exclusions, splits, files; npm."""

import base64
import hashlib
import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ito import prepare
from ito.config import Config
from ito.data import emoji_full, emoji_sources, npm
from ito.data.emoji import clean
from ito.data.emoji_sources import STYLES
from ito.data.records import open_shards
from ito.source import locate, open_dataset

# --- packages ---

LABELS = {
    "1F600": "grinning face",
    "1F3CF": "cricket game",
    "1F997": "cricket",
    "1F499": "blue heart",
    "2764": "red heart",
    "1F5A4": "black heart",
    "1F3F4": "black flag",
    "1F3F3": "white flag",
    "1F1EB-1F1F7": "flag: France",
    "1F468": "man",
    "1F469": "woman",
    "1F9D1": "person",
    "1F449": "backhand index pointing right",
    "1F448": "backhand index pointing left",
    "0023-FE0F-20E3": "keycap: #",
    "1F30A": "water wave",
    "1F4BF": "optical disk",
}
GROUPS = {
    "groups": {"0": "things", "9": "flags"},
    "subgroups": {"1": "thing", "98": "country-flag"},
}


def shape(seed, colour="#000"):
    """A drawing that no other seed has: an SVG body on 100 × 100."""
    x, y = seed * 37 % 70, seed * 53 % 70
    return f'<rect x="{x}" y="{y}" width="{20 + seed}" height="25" fill="{colour}"/>'


def icon_set(colour, names, **more):
    icons = {name: {"body": shape(n + 1, colour)} for n, name in enumerate(names)}
    return {"icons": icons, "width": 100, "height": 100} | more


def tarball(folder, spec, files):
    path = folder / npm.tarball(spec)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names_package():
    def table(prefix=""):
        return [
            {"hexcode": code, "label": prefix + label, "tags": [label.split()[-1], ":D", "thing"]}
            | ({"group": 9, "subgroup": 98} if ":" in label and "flag" in label else {})
            | ({"group": 0, "subgroup": 1} if code == "1F600" else {})
            for code, label in LABELS.items()
        ]

    return {
        "en/data.json": table(),
        "en-gb/data.json": table(),
        "de/data.json": table("das "),
        "en/shortcodes/github.json": {
            "1F600": "grinning",
            "1F4BF": ["cd", "disc_optical"],
            "1F468": "adult",
            "1F469": "adult",
            "1F30A": "wave",
            "1F3F4": "banner",
            "1F3F3": "banner",
        },
        "meta/unicode-names.json": {
            "1F3CF": "CRICKET BAT AND BALL",
            "2764": "HEAVY BLACK HEART",
            "1F9D1": "ONE, TWO",
        },
        "meta/groups.json": GROUPS,
    }


def icon_packages():
    slug = {code: re.sub("[^a-z]+", "-", label.lower()) for code, label in LABELS.items()}
    slug |= {"0023-FE0F-20E3": "keycap-hash"}
    coded = {
        "icons.json": icon_set("#c36", slug.values()),
        "chars.json": {c.lower(): n for c, n in slug.items()},
    }
    icons = coded["icons.json"]["icons"]
    icons["person"] = icons["man"]  # drawn once for both
    named = icon_set(
        "#36c",
        [
            "cricket-game",
            "heart-red",
            "unknown",
            "flag-for-flag-france",
            "backhand-index-pointing-left",
        ],
        aliases={
            "cricket": {"parent": "cricket-game"},
            "red-heart": {"parent": "heart-red"},
            "backhand-index-pointing-right": {
                "parent": "backhand-index-pointing-left",
                "hFlip": True,
            },
        },
    )
    named["icons"]["old"] = {"body": shape(9), "hidden": True}
    named["aliases"]["grinning-face"] = {"parent": "old"}
    other = icon_set(
        "#3c6", ["disc-optical", "wave", "man-2", "man-1", "man-3", "grinningface", "banner"]
    )
    other["icons"]["disc-optical"] |= {"width": 50}
    colourless = {"icons.json": icon_set("#000", slug.values()), "chars.json": coded["chars.json"]}
    colourless["icons.json"]["icons"]["cricket"] = {"body": ""}
    webp = io.BytesIO()
    picture = Image.new("RGBA", (32, 32), (10, 200, 30, 255))
    picture.putpixel((16, 16), (0, 0, 0, 0))
    picture.save(webp, "WEBP", lossless=True)
    black = f'<svg viewBox="0 0 100 100" xmlns="http://www.w3.org/2000/svg">{shape(30)}</svg>'
    return {
        "noto": coded,
        "emojione": {"icons.json": named, "chars.json": {}},
        "fxemoji": {"icons.json": other},
        "fluent-high-contrast": colourless,
        "fluent-3d": {"assets/1f600.webp": webp.getvalue(), "assets/keycap.webp": b""},
        "openmoji-black": {"black/svg/1F600.svg": black.encode(), "data.json": []},
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    files = {"emojibase-data": tarball(folder, "emojibase-data@1.0", names_package())}
    keywords = {"😀": ["grinning_face", "happy", ":-)"], "♥": ["unknown"]}
    files["emojilib"] = tarball(folder, "emojilib@1.0", {"dist/emoji-en-US.json": keywords})
    for style, content in icon_packages().items():
        files[STYLES[style].package] = tarball(folder, f"{style}@1.0", content)
    return files


@pytest.fixture(scope="module")
def prepared(packages, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_full, "fetch", lambda needed, cache: packages)
        patch.setattr(emoji_full, "cpu_count", lambda: 2)
        out = tmp_path_factory.mktemp("data") / "set"
        return emoji_full.prepare_emoji_full(out, out.parent / "cache", size=24)


@pytest.fixture(scope="module")
def records(prepared):
    return [json.loads(line) for line in (prepared / "captions.jsonl").open(encoding="utf-8")]


def drawn(records, style):
    return {record["item"] for record in records if record["style"] == style}


# --- matching ---


def test_drawings_are_matched_by_character_or_name(records):
    assert {"1f600", "23-20e3", "1f3cf", "1f3f4"} <= drawn(records, "noto")
    # "cricket" is an alias of the game there, and a hidden icon is none
    want = {"1f3cf", "2764", "1f1eb-1f1f7", "1f448", "1f449"}
    assert drawn(records, "emojione") == want
    # by another name of its own; "wave" is the water's, "banner" could be two
    assert drawn(records, "fxemoji") == {"1f4bf", "1f600", "1f468", "1f30a"}
    assert drawn(records, "fluent-3d") == drawn(records, "openmoji-black") == {"1f600"}


def test_a_mirrored_alias_is_mirrored_and_a_wide_icon_keeps_its_shape(packages, prepared):
    def pixels(style, key):
        with Image.open(prepared / "images" / style / f"{key}.png") as image:
            return np.asarray(image.convert("RGBA")).astype(int)

    left, right = pixels("emojione", "1f448"), pixels("emojione", "1f449")
    assert abs(left[:, ::-1] - right).max() <= 2
    assert abs(left - right).max() > 100
    disk = pixels("fxemoji", "1f4bf")  # 21 × 25 of 50 × 100: on a square of 100, moved by 25
    rows, columns = np.nonzero(disk[..., 3] > 127)
    x = 25 + 37 % 70
    assert abs(columns.min() - x * 0.24) <= 1
    assert abs(columns.max() + 1 - min(x + 21, 100) * 0.24) <= 1
    assert abs(rows.max() + 1 - rows.min() - 25 * 0.24) <= 1


def test_the_first_of_numbered_variants_counts(packages):
    icons = emoji_sources.read_json(packages[STYLES["fxemoji"].package], "icons.json")
    found = emoji_sources.by_name(icons, [{"man": "1f468"}], {})
    assert found == {"1f468": "man-1"}


def test_a_misnamed_icon_goes_to_what_it_shows_or_nowhere():
    icons = icon_set("#000", ["cat", "catside", "mouse"])
    labels = {"cat": "1f408", "catface": "1f431", "mouse": "1f401"}
    misnamed = {"cat": "cat face", "catside": "cat", "mouse": None}
    found = emoji_sources.by_name(icons, [labels], misnamed)
    assert found == {"1f431": "cat", "1f408": "catside"}


def test_misnamed_icons_are_known_by_style_and_show_concepts():
    emoji = pytest.importorskip("emoji", reason="the extra emoji")
    assert set(emoji_sources.MISNAMED) <= set(STYLES)
    labels = {clean(entry["en"]) for entry in emoji.EMOJI_DATA.values()}
    shown = {name for icons in emoji_sources.MISNAMED.values() for name in icons.values()}
    assert shown - {None} <= labels
    names = {"package": 14, "one_colour": 3, "bordered": 2}
    for field, count in names.items():
        values = [getattr(style, field) for style in STYLES.values()]
        assert (len(values) if field == "package" else sum(values)) == count
    named = {spec.rpartition("@")[0] for spec, _ in emoji_sources.PACKAGES}
    assert named == {style.package for style in STYLES.values()} | {"emojibase-data", "emojilib"}


# --- names ---


def test_names_keywords_and_translations(records):
    found = {record["item"]: record for record in records}
    face = found["1f600"]
    assert face["captions"] == ["grinning face", "grinning"]
    assert face["keywords"] == ["face", "thing", "happy"]
    assert face["translations"] == {"de": ["das grinning face"], "en-gb": ["grinning face"]}
    assert (face["group"], face["subgroup"]) == ("things", "thing")
    assert found["1f1eb-1f1f7"]["captions"][0] == "flag for France"
    assert found["1f3cf"]["captions"] == ["cricket game", "cricket bat and ball"]
    assert found["2764"]["captions"] == ["red heart"]  # not the misleading "heavy black heart"
    assert found["1f468"]["captions"] == ["man"]  # "adult" is the woman's too
    assert found["1f9d1"]["captions"] == ["person"]  # not the list of a sequence's characters
    assert found["23-20e3"]["captions"] == ["keycap #"]
    assert found["2764"]["group"] is None


# --- what is left out ---


def test_what_is_left_out_is_counted(prepared, records):
    card = (prepared / "README.md").read_text(encoding="utf-8")
    gone = {why: int(n) for n, why in re.findall(r"^- (\d+) drawings: (.*)$", card, re.M)}
    assert gone == {
        "blank": 1,  # the cricket
        "drawn by the held-out styles alone": 3,  # the cricket, the blue and the black heart
        "flag in a one-colour style": 1,
        "told apart by its colour, in a one-colour style": 3,
        "identical to another concept's drawing": gone["identical to another concept's drawing"],
        "named like another concept": 3,
    }
    contrast = drawn(records, "fluent-high-contrast")
    assert not contrast & {"1f997", "1f1eb-1f1f7", "1f499", "2764", "1f5a4"}
    assert {"1f3f4", "1f3f3"} <= contrast  # black and white flags are told apart without hues
    assert "1f9d1" in drawn(records, "noto")  # of man and person the ungendered one
    assert "1f468" not in drawn(records, "noto")


def test_colours_are_asked_only_of_styles_that_have_them():
    names = {
        "rainbow flag": "flag",
        "transgender flag": "flag",
        "triangular flag": "flag",
        "dark skin tone": "skin-tone",
        "red heart": "heart",
        "blue heart": "heart",
        "black cat": "animal-mammal",
        "black small square": "geometric",
        "black medium square": "geometric",
    }
    concepts = {name: {"captions": [name], "subgroup": group} for name, group in names.items()}
    styles = ("openmoji", "openmoji-black", "fluent-high-contrast")
    drawings = {style: dict.fromkeys(names, "") for style in styles}
    excluded = Counter()
    emoji_full.drop_colourless(drawings, concepts, excluded)
    filled = {"black cat", "black small square"}
    assert set(drawings["openmoji"]) == set(names)
    assert set(drawings["openmoji-black"]) == {"triangular flag", "black medium square"}
    assert set(drawings["fluent-high-contrast"]) == set(drawings["openmoji-black"]) | filled
    assert sorted(excluded.values()) == [2, 4, 6]


def test_no_picture_means_two_things(prepared, records):
    owners = {}
    for record in records:
        with Image.open(prepared / record["image"]) as image:
            assert image.size == (24, 24)
            picture = image.convert("RGBA").tobytes()
        assert owners.setdefault(picture, record["item"]) == record["item"]


# --- splits and files ---


def test_splits(records):
    splits = {}
    for record in records:
        splits.setdefault(record["item"], {})[record["style"]] = record["split"]
    for found in splits.values():
        if "heldout_concept" in found.values():
            assert set(found.values()) == {"heldout_concept"}
        else:
            assert found.pop("noto", "heldout_style") == "heldout_style"
            assert set(found.values()) == {"train"}


def test_the_real_families_split_as_documented():
    """A share of the families near HELDOUT_CONCEPT; noto alone decides the style."""
    names = [f"thing {n}" for n in range(4000)]
    held = [name for name in names if emoji_full.split_of("twemoji", name) == "heldout_concept"]
    assert abs(len(held) / len(names) - emoji_full.HELDOUT_CONCEPT) < 0.02
    assert {emoji_full.split_of("noto", name) for name in held} == {"heldout_concept"}
    rest = set(names) - set(held)
    assert {emoji_full.split_of("noto-v1", name) for name in rest} == {"heldout_style"}
    assert {emoji_full.split_of("fluent", name) for name in rest} == {"train"}


@pytest.mark.parametrize(
    "names",
    [
        ("magnifying glass tilted left", "magnifying glass tilted right"),
        ("up arrow", "down-left arrow", "right arrow", "left-right arrow"),
        ("leftwards hand", "rightwards hand"),
        ("oncoming fist", "left-facing fist"),
        ("waxing gibbous moon", "waning gibbous moon"),
        ("first quarter moon face", "last quarter moon face"),
        ("chart increasing", "chart decreasing"),
        ("horizontal traffic light", "vertical traffic light"),
        ("inbox tray", "outbox tray"),
        ("bus", "oncoming bus"),
    ],
)
def test_directions_are_one_family(names):
    assert len({emoji_sources.full_family(name) for name in names}) == 1


def test_other_things_are_other_families():
    names = ["upwards button", "thumbs up", "fast up button", "play button", "top hat", "bus"]
    assert len({emoji_sources.full_family(name) for name in names}) == len(names)


def test_the_shards_hold_the_same_records(prepared, records):
    found = []
    for tar in sorted((prepared / "shards").glob("*.tar")):
        with tarfile.open(tar) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}
            assert {m.mtime for m in archive.getmembers()} == {0}
        for name in (name for name in members if name.endswith(".json")):
            fields = json.loads(members[name])
            assert tar.name.startswith(fields["split"])
            assert members[name[:-5] + ".txt"].decode() == fields["captions"][0]
            image = f"images/{fields['style']}/{fields['item']}.png"
            assert members[name[:-5] + ".png"] == (prepared / image).read_bytes()
            found.append({"image": image} | fields)
    order = lambda record: record["image"]  # noqa: E731
    assert sorted(found, key=order) == sorted(records, key=order)


def test_the_data_card_tells_licences_and_counts(prepared, records):
    card = (prepared / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Full emoji set, 24 px\n")
    for style, number in Counter(record["style"] for record in records).items():
        assert f"| {style} | {number} | {STYLES[style].licence} |" in card
    for split, number in Counter(record["split"] for record in records).items():
        assert f"| {split} | {number} |" in card


def test_the_bytes_depend_on_neither_time_nor_processes(packages, prepared, tmp_path, monkeypatch):
    def digests(folder):
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*")
            if p.is_file()
        }

    monkeypatch.setattr(emoji_full, "fetch", lambda needed, cache: packages)
    monkeypatch.setattr(emoji_full, "cpu_count", lambda: 1)
    again = emoji_full.prepare_emoji_full(tmp_path / "again", tmp_path, size=24)
    assert digests(again) == digests(prepared)
    # there already: nothing is fetched; another size is another set
    monkeypatch.setattr(emoji_full, "fetch", None)
    assert emoji_full.prepare_emoji_full(again, tmp_path, size=24) == again
    with pytest.raises(FileExistsError, match="is not the full emoji set, 32 px"):
        emoji_full.prepare_emoji_full(again, tmp_path, size=32)


def test_permissive_only_needs_no_share_alike_package(packages, tmp_path, monkeypatch):
    def fetch(needed, cache):
        assert cache == tmp_path / "npm"
        names = {spec.rpartition("@")[0] for spec, _ in needed}
        return {name: path for name, path in packages.items() if name in names}

    monkeypatch.setattr(emoji_full, "fetch", fetch)
    out = emoji_full.prepare_emoji_full(tmp_path / "set", tmp_path, size=8, permissive_only=True)
    styles = {json.loads(line)["style"] for line in (out / "captions.jsonl").open(encoding="utf-8")}
    assert styles == {"noto", "emojione", "fxemoji", "fluent-high-contrast", "fluent-3d"}
    assert "-SA" not in "".join(re.findall(r"^\| .*", (out / "README.md").read_text("utf-8"), re.M))


def test_the_command(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji_full, "fetch", lambda needed, cache: packages)
    prepare.main(["emoji", "--out", str(tmp_path / "set"), "--size", "8"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    for arguments, message in (
        (["emoji", "--size", "8"], "name its folder, --out"),
        (["emoji-small", "--permissive-only"], "are options of emoji, not emoji-small"),
        (["emoji", "--size", "0", "--out", "x"], "--size must be between 8 and 1024, got 0"),
        (["emoji", "--out", str(tmp_path)], "is not the full emoji set, 96 px"),
    ):
        with pytest.raises(SystemExit):
            prepare.main(arguments)
        assert message in capsys.readouterr().err


def test_the_trainers_name_for_it(packages, tmp_path, monkeypatch):
    """Prepared in the cache on first use, then taken as it is; a failure names --cache."""
    monkeypatch.setattr(emoji_full, "fetch", lambda needed, cache: packages)
    config = Config(train_data="emoji-full", load_size=8)
    data = open_dataset(config, tmp_path)
    assert data.held_out_splits() == ["heldout_style", "heldout_concept"]
    assert data.files[0].startswith(str(tmp_path / emoji_full.FOLDER / "images"))
    assert len(list(open_shards(locate(config.train_data, tmp_path))[0]())) == len(data.images)
    (tmp_path / "wrong").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=f"--cache: cannot prepare .*wrong/{emoji_full.FOLDER}"):
        open_dataset(config, tmp_path / "wrong")


# --- npm ---


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A stand-in for npm that copies tarballs from a folder, and notes what it was asked for."""
    (tmp_path / "registry").mkdir()
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "npm"
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
while [ "$1" != --pack-destination ]; do shift; done
cp {tmp_path}/registry/* "$2" || {{ echo "npm error 404" >&2; exit 1; }}
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    return tmp_path / "registry"


def sha512(data):
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def test_fetch_asks_npm_once_and_checks_every_time(registry, tmp_path):
    (registry / "scope-name-1.2.tgz").write_bytes(b"a package")
    wanted = [("@scope/name@1.2", sha512(b"a package"))]
    path = tmp_path / "cache" / "scope-name-1.2.tgz"
    assert npm.fetch(wanted, tmp_path / "cache") == {"@scope/name": path}
    assert path.read_bytes() == b"a package"
    assert npm.fetch(wanted, tmp_path / "cache") == {"@scope/name": path}
    (asked,) = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert asked.startswith("pack --ignore-scripts ")
    assert asked.endswith(" @scope/name@1.2")
    path.write_bytes(b"a pack")  # cut off
    npm.fetch(wanted, tmp_path / "cache")
    assert path.read_bytes() == b"a package"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]


def test_another_hash_a_failing_npm_and_no_npm_are_errors(registry, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with pytest.raises(OSError, match=r"npm cannot fetch name@1: [^|]*404"):
        npm.fetch([("name@1", "x")], cache)
    (registry / "name-1.tgz").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=rf"name@1: SHA-512 is {re.escape(sha512(b'other'))}, expected x"
    ):
        npm.fetch([("name@1", "x")], cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=rf"npm is needed .*or put their tarballs into {cache}"):
        npm.fetch([("name@1", "x")], cache)
    assert list(cache.iterdir()) == []
