"""What is held out and for what: groups by a pattern, validation and test, and what leaks."""

import argparse
import io
import json
import tarfile

import pytest
from PIL import Image
from support.quick_run import TINY

from ito import evaluate, report, search, train
from ito.config import Config
from ito.data.dataset import load_dataset
from ito.run import choose_data
from ito.source import open_dataset
from ito.summary import count_overlap, report_groups, report_overlap, summarise

RUN = [*TINY.split(), "--objective", "clip", "--batch-size", "4", "--image-size", "8"]
RUN += ["--load-size", "8", "--threads", "1"]


def picture(n):
    """Picture n, different from all others."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (n % 256, 3 * n % 256, n // 256)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, count, name=lambda n: f"{n}.png", shown=lambda n: n, **fields):
    """`count` lines; `name`, `shown` (the picture's number) and `fields` are functions of n."""
    rows = []
    for n in range(count):
        place = folder / name(n)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(shown(n)))
        rows.append({"image": name(n)} | {key: value(n) for key, value in fields.items()})
    rows = [{"caption": f"number {n}"} | row for n, row in enumerate(rows)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sides(data, key):
    """The splits that pictures of each key are in; `key` is a function of the item's number."""
    found = {}
    for n, split in zip(data.image_item.tolist(), data.split, strict=True):
        found.setdefault(key(n), set()).add(split)
    return found


# --- groups by a pattern ---


@pytest.mark.parametrize(
    ("pattern", "first"), [(r"film(\d+)", "0"), (r"film\d+", "film0"), ("^.*/(film[^-]*)", "film0")]
)
def test_a_group_by_a_pattern_is_on_one_side(tmp_path, pattern, first):
    write(tmp_path, 60, lambda n: f"shots/film{n % 12}-{n}.png")
    for seed in range(4):
        data = load_dataset(tmp_path, 4, split_seed=seed, group_by=pattern)
        assert data.group[0] == first
        assert data.split_by == "group"
        assert data.split.count("heldout") == 5
        assert all(len(both) == 1 for both in sides(data, lambda n: n % 12).values())
    without = load_dataset(tmp_path, 4)
    assert without.split_by == "item"
    assert any(len(both) == 2 for both in sides(without, lambda n: n % 12).values())


def test_a_pattern_stands_above_a_column_and_what_it_misses_has_no_group(tmp_path):
    names = [f"{'ab'[n % 2]}{n // 6}-{n}.png" if n < 54 else f"{n}.png" for n in range(60)]
    write(tmp_path, 60, names.__getitem__, group=lambda n: "all the same")
    data = load_dataset(tmp_path, 4, group_by="^([ab][0-9]+)-")
    assert data.group == [f"{'ab'[n % 2]}{n // 6}" for n in range(54)] + [None] * 6
    told = report_groups(data, "^([ab][0-9]+)-")
    assert told == "groups     18 by --group-by; 6 of 60 items are in none"
    assert report_groups(data, None) == ""


def test_few_large_groups_of_a_pattern_are_kept_together_too(tmp_path):
    write(tmp_path, 60, lambda n: f"{n % 3}/{n}.png", caption=lambda n: f"class {n % 4}")
    data = load_dataset(tmp_path, 4, group_by="^[0-9]")
    assert (data.split_by, data.split.count("heldout")) == ("group", 20)
    assert all(len(both) == 1 for both in sides(data, lambda n: n % 3).values())
    assert report_overlap(count_overlap(data, data), data) == (
        "note       20 of 20 items of heldout have a caption that is trained on too"
    )


def test_groups_of_a_pattern_are_kept_together_where_all_share_pictures(tmp_path):
    write(tmp_path, 60, lambda n: f"{n % 6}/{n}.png", shown=lambda n: n // 6 % 2)
    data = load_dataset(tmp_path, 4, group_by="^[0-9]")
    assert (data.split_by, data.split.count("heldout")) == ("group", 10)
    assert all(len(both) == 1 for both in sides(data, lambda n: n % 6).values())
    assert count_overlap(data, data)["heldout"]["pictures"] == 10


def test_a_pattern_is_found_in_the_paths_of_samples_of_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n in range(40):
            for kind, content in (("png", picture(n)), ("txt", f"number {n}".encode())):
                info = tarfile.TarInfo(f"film-{n % 8}/{n}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    data = load_dataset(tmp_path / "a.tar", 4, group_by="^film-(.)")
    assert data.group == [f"{n % 8}" for n in range(40)]
    assert all(len(both) == 1 for both in sides(data, lambda n: n % 8).values())


def test_a_pattern_is_found_in_the_paths_of_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")  # an extra
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": picture(n), "path": f"film-{n % 8}.png"}, "text": f"number {n}"}
        for n in range(40)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    data = load_dataset(tmp_path / "a.parquet", 4, group_by="^film-(.)")
    assert data.group == [f"{n % 8}" for n in range(40)]
    assert len(set(data.items)) == 40  # what shares a path is not one item
    rows = [{"image": picture(n), "text": "a"} for n in range(3)]  # without paths
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert load_dataset(tmp_path / "b.parquet", 4, group_by=r"\d$").group == ["1", "2", "3"]


def test_a_bad_pattern_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"--group-by must be a regular expression, got '\(a'"):
        Config(group_by="(a")
    write(tmp_path, 4)
    with pytest.raises(ValueError, match=r"--group-by 'b\+' finds nothing .* 4 pictures.*'0.png'"):
        load_dataset(tmp_path, 4, group_by="b+")
    with pytest.raises(ValueError, match=r"--group-by '\^\\d\\d' finds nothing"):  # as it was typed
        load_dataset(tmp_path, 4, group_by=r"^\d\d")
    load_dataset(tmp_path, 4, group_by="b+", only="val")  # whose groups nothing depends on


# --- validation and test ---


@pytest.mark.parametrize(
    ("fields", "key", "split_by"),
    [
        ({}, lambda n: n, "item"),
        ({"caption": lambda n: f"scene {n % 40}"}, lambda n: n % 40, "caption"),
        ({"group": lambda n: f"{n % 40}"}, lambda n: n % 40, "group"),
        ({"shown": lambda n: n % 40}, lambda n: n % 40, "item"),
    ],
)
def test_a_share_is_held_out_for_the_test(tmp_path, fields, key, split_by):
    write(tmp_path, 120, **fields)
    for seed in range(3):
        data = load_dataset(tmp_path, 4, split_seed=seed, test_share=0.2)
        assert data.split_by == split_by
        assert [data.split.count(name) for name in ("train", "heldout", "test")] == [84, 12, 24]
        assert all(len(both) == 1 for both in sides(data, key).values())
        two = load_dataset(tmp_path, 4, split_seed=seed)
        assert two.rows("heldout").tolist() == data.rows("heldout").tolist()
        assert "test" not in two.split
        facts = summarise("jsonl", [data], 0, count_overlap(data, data))
        assert (facts["train_items"], facts["val_items"], facts["test_items"]) == (84, 36, 24)
        assert facts["overlap"] == {"captions": 0, "groups": 0, "items": 0, "pictures": 0}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("items", [3, 5, 10, 33])
def test_every_split_has_an_item_or_two(tmp_path, items, share):
    data = load_dataset(write(tmp_path, items), 4, test_share=share)
    assert {"train", "heldout", "test"} == set(data.split)
    assert data.split.count("test") == max(1, int(items * share + 1e-9))
    two = load_dataset(write(tmp_path / "two", 2), 4, test_share=share)
    assert sorted(two.split) == ["heldout", "train"]  # something is left to train on


def test_the_share_is_for_data_without_splits(tmp_path):
    write(tmp_path, 4, split=lambda n: "val" if n else "train")
    with pytest.raises(
        ValueError, match=r"--test-share 0.1: the data names its splits, train, val"
    ):
        load_dataset(tmp_path, 4, test_share=0.1)
    with pytest.raises(ValueError, match=r"--test-share .*--val-data .*: drop one"):
        Config(test_share=0.1, val_data="a")
    with pytest.raises(ValueError, match=r"test_share must be at most 0.5, got 0.6"):
        Config(test_share=0.6)


def logged(run):
    """The splits that each evaluation of a run scores, by its step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return {
        r["step"]: {name.split("/")[0] for name in r if "/" in name}
        for r in records
        if r["kind"] == "eval"
    }


@pytest.mark.parametrize("how", ["share", "splits", "val-data", "test alone"])
def test_the_test_is_scored_after_the_last_step_only(tmp_path, capsys, how):
    named = {"splits": ("train", "train", "dev", "test"), "test alone": ("train", "test")}
    splits = named.get(how, (None,))
    write(tmp_path / "data", 40, split=lambda n: splits[n % len(splits)])
    more = ["--test-share", "0.2"] if how == "share" else []
    validation = {"share": "heldout", "test alone": "test"}.get(how, "dev")
    if how == "val-data":
        other = write(
            tmp_path / "b", 20, shown=lambda n: 90 + n, split=lambda n: ("dev", "test")[n % 2]
        )
        more = ["--val-data", str(other)]
    command = ["--train-data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *more]
    run = train.main([*RUN, *command, "--steps", "4", "--eval-every", "2"])
    assert logged(run) == {0: {validation}, 2: {validation}, 4: {validation, "test"}}
    told = f"test is scored once, after the last step: only {validation} is scored before"
    said = capsys.readouterr().out
    assert (told in said) == (how != "test alone")
    assert "\ntest: " in said.partition("trained    ")[0]  # the table
    assert ">test: " in (run / "report.html").read_text()
    if how == "share":
        evaluate.main([str(run), "--json", str(tmp_path / "scores.json")])
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert {name.split("/")[0] for name in scores} == {"heldout", "test"}


@pytest.mark.parametrize("names", [("Train", "Val"), ("TRAIN", "valid"), ("train", "Validation")])
def test_folders_name_splits_in_any_case(tmp_path, names):
    for n in range(6):
        for kind, content in (("png", picture(n)), ("txt", b"a text")):
            place = tmp_path / "a" / names[n // 4] / f"{n}.{kind}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        place = tmp_path / "b" / names[n // 4] / f"class {n % 2}" / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(n))
    for folder in "ab":
        data = load_dataset(tmp_path / folder, 4)
        assert sorted(data.split) == sorted(["train"] * 4 + [names[1].lower()] * 2)
        assert data.split_by == "split"


def test_a_column_may_write_splits_in_any_case_and_with_spaces(tmp_path):
    names = ["TRAIN", " Train", "train ", "TEST", "Val ", "Odd Ones"]
    data = load_dataset(write(tmp_path, 6, split=names.__getitem__), 4)
    assert data.split == ["train"] * 3 + ["test", "val", "Odd Ones"]


# --- what leaks ---


def test_what_is_on_both_sides_is_counted(tmp_path):
    """By hand: of four held-out items one has the caption of a training item but for its case, two
    are of its group, one is a training item's other picture, and one is its picture."""
    rows = [
        {"split": "train", "item": "x", "group": "g", "caption": "A  cat"},
        {"split": "train", "item": "y", "caption": "b"},
        {"split": "val", "item": "x", "group": "g", "caption": "c"},
        {"split": "val", "item": "z", "group": "g", "caption": "d"},
        {"split": "test", "item": "u", "caption": "a Cat"},
        {"split": "test", "item": "v", "group": "h", "caption": "e"},
    ]
    keys = ("split", "item", "group", "caption")
    fields = {key: lambda n, key=key: rows[n].get(key) for key in keys}
    data = load_dataset(write(tmp_path, 6, shown=lambda n: n % 5, **fields), 4)
    found = count_overlap(data, data)
    assert found == {
        "test": {"captions": 1, "groups": 0, "items": 0, "pictures": 1},
        "val": {"captions": 1, "groups": 2, "items": 1, "pictures": 0},  # x is "a cat" too
    }
    total = {"captions": 2, "groups": 2, "items": 1, "pictures": 1}
    assert summarise("jsonl", [data], 0, found)["overlap"] == total
    assert report_overlap(found, data).splitlines() == [
        "warning    1 of 2 pictures of test are training pictures too: their scores do not measure "
        "generalisation",
        "note       1 of 2 items of test have a caption that is trained on too",
        "note       1 of 2 items of val have a caption that is trained on too",
        "note       2 of 2 items of val are of a group that is trained on too",
        "note       1 of 2 items of val have training pictures too",
    ]


def test_what_a_val_set_shares_is_counted(tmp_path):
    trained = load_dataset(write(tmp_path / "a", 6), 4, only="train")
    scored = load_dataset(write(tmp_path / "b", 9, item=lambda n: f"{n}.png"), 4, only="val")
    found = count_overlap(trained, scored)
    assert found == {"val": {"captions": 6, "groups": 0, "items": 6, "pictures": 6}}


# --- the other commands ---


def test_the_commands_split_a_run_s_data_as_the_run_did(tmp_path, capsys):
    data = write(tmp_path / "data", 40, lambda n: f"{n % 8}-{n}.png")
    options = ["--group-by", "^[0-9]", "--test-share", "0.2", "--steps", "1"]
    run = train.main([*RUN, "--train-data", str(data), "--out", str(tmp_path / "run"), *options])
    said = capsys.readouterr().out
    assert "groups     8 by --group-by; 0 of 40 items are in none\n" in said
    facts = json.loads((run / "data.json").read_text())
    assert (facts["val_items"], facts["test_items"], facts["split_by"]) == (10, 5, "group")
    given = argparse.Namespace(run=run, data=None)
    assert summarise("", [open_dataset(choose_data(given))], 0, {})["test_items"] == 5
    evaluate.main([str(run), "--group-by", "[0-9]-"])  # the same groups
    assert "test: 5 pictures" in capsys.readouterr().out
    search.main([str(run), "number 3", "--group-by", "^[0-9]"])
    report.main([str(run), "--group-by", "^[0-9]"])
    other = write(tmp_path / "other", 40, caption=lambda n: f"class {n % 2}")
    evaluate.main([str(run), "--data", str(other)])
    said = capsys.readouterr().out
    assert "trained on" not in said
    assert "all: 40 pictures" in said  # every picture, without splits
    sides = {"split": lambda n: ("train", "val")[n // 3 % 2], "caption": lambda n: f"class {n % 3}"}
    val = write(tmp_path / "val", 40, **sides)  # its "train" was not trained on either
    evaluate.main([str(run), "--val-data", str(val), "--test-share", "0"])
    said = capsys.readouterr().out
    assert "val: " in said
    assert "trained on" not in said
    given.data = str(data)  # other data than the run's, which have their own groups
    config = choose_data(given)
    assert (config.group_by, config.test_share) == (None, 0)
