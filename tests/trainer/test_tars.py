"""Tars: clip_benchmark's sets, which count classes, and those that a command writes."""

import argparse
import io
import json
import re

import pytest
from PIL import Image
from support.quick_run import TINY
from support.tars import tar

from ito import evaluate, search, train
from ito.config import from_options
from ito.data.dataset import load_dataset
from ito.data.records import find_format, open_shards
from ito.scoring.evaluation import evaluate_fully as full
from ito.stream import Stream

CLASSES = ["tabby cat", "red fox", "mud turtle"]


def picture(n, kind="webp"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * n,) * 3).save(buffer, kind.upper(), lossless=True)
    return buffer.getvalue()


def labelled(*numbers, kind="cls", text=lambda n: f"{n % 3}"):
    members = []
    for n in numbers:
        members += [(f"s{n:07}.webp", picture(n)), (f"s{n:07}.{kind}", text(n))]
    return members


def exported(folder, classes=CLASSES):
    """As clip_benchmark writes them: classes by number, shards below their split."""
    tar(folder / "train" / "0.tar", labelled(0, 1, 2, 3))
    tar(folder / "train" / "1.tar", labelled(4, 5))
    tar(folder / "test" / "0.tar", labelled(6, 7, 8))
    for split, count in (("train", 2), ("test", 1)):
        (folder / split / "nshards.txt").write_text(f"{count}\n")
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return folder


# --- clip_benchmark's sets ---


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ("", [6, 7, 8, 0, 1, 2, 3, 4, 5]),
        ("train", range(6)),
        ("test/0.tar", [6, 7, 8]),
        ("train/{0..1}.tar", range(6)),
        ("test/*.tar", [6, 7, 8]),
    ],
)
def test_the_caption_of_a_class_is_its_name(tmp_path, part, numbers):
    path = f"{exported(tmp_path)}/{part}"
    for untrusted in (False, True):
        assert find_format(path) == "webdataset"
        data = load_dataset(path, 4, only="all", untrusted_data=untrusted)
        assert data.skipped == []
        assert data.captions == [[CLASSES[n % 3]] for n in numbers]
        if not part:
            assert data.split == ["test"] * 3 + ["train"] * 6


def test_an_exported_set_is_trained_on_and_classified(tmp_path, capsys, monkeypatch):
    """Its classes are zero-shot classes, its templates the prompts if they are named."""
    folder = exported(tmp_path / "set")
    seen = []
    monkeypatch.setattr(evaluate, "evaluate_fully", lambda *args: seen.append(args) or full(*args))
    options = [*TINY.split(), "--objective", "clip", "--batch-size", "4", "--image-size", "8"]
    options += ["--load-size", "8", "--threads", "1", "--steps", "1"]
    run = train.main([*options, "--train-data", str(folder), "--out", str(tmp_path / "run")])
    facts = json.loads((run / "data.json").read_text())
    assert [facts[name] for name in ("train_items", "val_items", "captions")] == [6, 3, 9]
    out = tmp_path / "scores.json"
    templates = ["--templates", str(folder / "zeroshot_classification_templates.txt")]
    evaluate.main([str(run), "--json", str(out), *templates])
    assert json.loads(out.read_text())["test/zero_shot/names/classes"] == 3
    evaluate.main([str(run), "--data", f"{folder}/test/{{0..0}}.tar", *templates])
    evaluate.main([str(run), "--prompts", "one {}"])
    prompts = [list(args[-1]) for args in seen]
    assert prompts == [["a photo of a {}."], ["a photo of a {}."], ["one {}"]]


def test_bad_classes_are_skipped_and_counted(tmp_path):
    classes = {1: "-1", 2: "2", 3: "fox", 4: "1.0", 5: "", 6: " 1\n", 7: "9" * 5000}
    tar(tmp_path / "a.tar", labelled(*range(8), text=lambda n: classes.get(n, "0")))
    (tmp_path / "classnames.txt").write_text("cat\n fox \n\n")
    data = load_dataset(tmp_path, 4)
    assert data.captions == [["cat"], ["fox"]]
    reasons = {s.where[-1]: s.reason for s in data.skipped}
    message = "malformed: .cls must be 0 to 2, as classnames.txt, got "
    assert {n: reasons[n] for n in "135"} == {
        "1": f"{message}'-1'",
        "3": f"{message}'fox'",
        "5": f"{message}''",
    }
    assert reasons["2"] == "empty caption"  # of a class without a name
    assert len(reasons) == 6
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"no classnames.txt: 8: .*a.tar:s0000000: no classnames"):
        load_dataset(tmp_path, 4)


def test_a_caption_stands_above_a_class(tmp_path):
    members = labelled(0, 1) + labelled(0, kind="txt", text=lambda n: "a text")[1:]
    members += [("s0000001.json", '{"caption": "an object"}'), ("s0000002.webp", picture(2))]
    members += [("s0000002.txt", "and this"), ("s0000002.cls", b"\xff\x80")]
    tar(tmp_path / "a.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\nfox\n")
    assert load_dataset(tmp_path, 4).captions == [["a text"], ["an object"], ["and this"]]


def test_lines_are_captions_in_sets_for_retrieval_alone(tmp_path):
    tar(tmp_path / "test" / "0.tar", labelled(1, kind="txt", text=lambda n: "one\ntwo\r\n\nthree"))
    assert load_dataset(tmp_path, 4).captions == [["one\ntwo\r\n\nthree"]]
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert load_dataset(tmp_path, 4).captions == [["one", "two", "three"]]


def test_class_names_lead_nowhere_in_untrusted_data(tmp_path):
    folder = exported(tmp_path / "set")
    secret = tmp_path / "secret"
    secret.write_text("1\n2\n3\n")
    (folder / "classnames.txt").unlink()
    (folder / "classnames.txt").symlink_to(secret)
    assert load_dataset(folder, 4).captions[0] == ["1"]
    with pytest.raises(ValueError, match=r"classnames.txt is a link, which --untrusted-data forb"):
        load_dataset(folder, 4, untrusted_data=True)


# --- commands ---


def pairs(*numbers):
    return labelled(*numbers, kind="txt", text=lambda n: f"number {n}")


def test_a_command_writes_a_tar(tmp_path):
    for n in range(3):
        tar(tmp_path / f"{n}.tar", pairs(2 * n, 2 * n + 1))
    late = pairs(6, 7)
    tar(tmp_path / "late.tar", late[::2] + late[:0:-2])
    path = f"pipe:cat {tmp_path}/{{0..1}}.tar::{tmp_path}/2.tar::pipe:cat < '{tmp_path}/late.tar'"
    assert find_format(path) == "webdataset"
    data = load_dataset(path, 4)
    assert data.skipped == []
    assert data.captions == [[f"number {n}"] for n in range(8)]
    assert [round(value / 20) for value in data.images[:, 0, 0, 0].tolist()] == list(range(8))
    with pytest.raises(
        ValueError, match=r"--data-format csv does not fit pipe:.*can be webdataset"
    ):
        load_dataset(path, 4, data_format="csv")


def test_a_command_that_fails_is_counted(tmp_path):
    tar(tmp_path / "a.tar", pairs(*range(4)))
    size = 512 * 9  # the first two samples, and the header of the third
    path = f"pipe:head -c {size} {tmp_path}/a.tar; echo one >&2; echo 'cut off' >&2; exit 3"
    data = load_dataset(f"{path}::{tmp_path}/a.tar", 4)
    assert [tuple(s) for s in data.skipped] == [(path, "failed command: exit status 3: cut off")]
    assert data.captions == [[f"number {n}"] for n in (0, 1, 0, 1, 2, 3)]
    data = load_dataset(f"pipe:cat {tmp_path}/a.tar; false", 4)  # all of it was written
    assert len(data.images) == 4
    assert [s.reason for s in data.skipped] == ["failed command: exit status 1"]
    gone = f"{tmp_path}/gone"
    with pytest.raises(ValueError, match=r"failed command: 1: pipe:cat .*: exit status 1: cat: "):
        load_dataset(f"pipe:cat {gone}", 4)
    with pytest.raises(ValueError, match="damaged tar: 1"):
        load_dataset("pipe:echo hello", 4)


def test_a_command_is_streamed_anew_in_each_pass(tmp_path):
    tar(tmp_path / "a.tar", pairs(*range(6)))
    passes = tmp_path / "passes"
    shards = open_shards(f"pipe:echo >> {passes}; cat {tmp_path}/a.tar")
    stream = Stream(shards, 4, 3, workers=1)
    before = len(passes.read_text())
    batches = stream.batches()
    names = [r.captions[0] for _ in range(4) for r in next(batches).records]
    assert sorted(names[:6]) == sorted(names[6:]) == [f"number {n}" for n in range(6)]
    assert len(passes.read_text()) >= before + 2


def test_no_file_names_a_command(tmp_path):
    """A path in a table, and a file whose name looks like a command, are files."""
    made, good = tmp_path / "made", tmp_path / "0.png"
    good.write_bytes(picture(1, "png"))
    command = f"pipe:touch {made}; cat 0.png"
    rows = [{"image": "0.png", "caption": "a"}, {"image": command, "caption": "b"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [s.kind for s in load_dataset(tmp_path, 4).skipped] == ["no picture"]
    (tmp_path / "a.csv").write_text(f"filepath\ttitle\n0.png\ta\n{command}\tb\n")
    assert [s.kind for s in load_dataset(tmp_path / "a.csv", 4).skipped] == ["no picture"]
    shards = tmp_path / "shards"
    tar(shards / "pipe:touch made;.tar", pairs(3))
    for path in (shards, shards / "*.tar", f"{shards}/pipe*"):
        assert load_dataset(path, 4).captions == [["number 3"]]
    assert not made.exists()
    assert not list(tmp_path.rglob("made"))


def test_a_command_stays_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "pipe:curl -s https://a.b//c-{0..1}.tar"
    given = {"train_data": f"{command}::d.tar", "val_data": command}
    config = from_options(argparse.Namespace(**given))
    assert config.train_data == f"{command}::{tmp_path}/d.tar"
    assert config.val_data == command


def test_only_the_user_s_own_commands_are_run(tmp_path, capsys):
    """A run that others made may name a command: what opens a run's data, and what resumes it,
    refuses it unless it is given again."""
    tar(tmp_path / "a.tar", pairs(*range(8)))
    ran = tmp_path / "ran"
    data = f"pipe:touch {ran}; cat {tmp_path}/a.tar"
    options = [*TINY.split(), "--objective", "clip", "--batch-size", "4", "--image-size", "8"]
    options += ["--load-size", "8", "--threads", "1", "--steps", "1"]
    run = train.main([*options, "--train-data", data, "--out", str(tmp_path / "run")])
    assert ran.exists()
    assert json.loads((run / "data.json").read_text())["format"] == "webdataset"
    ran.unlink()
    capsys.readouterr()
    for command in (evaluate.main, search.main):
        words = [str(run)] if command is evaluate.main else [str(run), "number 3"]
        with pytest.raises(SystemExit) as stopped:
            command(words)
        assert stopped.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "config.json names a command" in said
        assert "--train-data" in said
        assert not ran.exists()
        command([*words, "--train-data", data])
        assert ran.exists()
        ran.unlink()
        command([*words, "--data", f"pipe:cat {tmp_path}/a.tar"])
        assert not ran.exists()
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run)])
    assert "config.json names a command" in capsys.readouterr().err
    assert not ran.exists()
    train.main(["--resume", str(run), "--train-data", data])
    assert ran.exists()


@pytest.mark.parametrize("url", ["https://a.b/c//{000..003}.tar", "s3://a/0.tar", "http://a/b.csv"])
def test_urls_are_told_apart_from_paths(url):
    config = from_options(argparse.Namespace(train_data=url))
    assert config.train_data == url
    with pytest.raises(ValueError, match=rf"{re.escape(url)} is a URL: download it, or .*'pipe:cu"):
        load_dataset(config.train_data, 4)


def test_tars_named_by_their_split(tmp_path):
    for n, name in enumerate(("train-000", "train-001", "val-000")):
        tar(tmp_path / f"{name}.tar", pairs(n))
    assert load_dataset(tmp_path, 4).split == ["train", "train", "val"]
