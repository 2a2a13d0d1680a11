"""How runs and commands go on and end: resumed later or elsewhere, stopped, read by nobody."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_run import QUICK, steady, write_set
from support.refused import refused

from ito import evaluate, export, prepare, report, search, train
from ito.run import resumable


def steps_logged(run) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [record["step"] for record in records if record["kind"] == "train"]


# --- beyond the end ---


def test_a_finished_run_goes_on_to_a_later_end(copy, capsys):
    train.main(["--resume", str(copy), "--steps", "9"])
    printed = capsys.readouterr().out
    assert "steps      9 instead of 6: the learning rate goes on at 0.000" in printed
    assert ": as the run began\n" in printed  # the precision, which was not asked for
    assert steps_logged(copy) == list(range(1, 10))
    assert json.loads((copy / "config.json").read_text())["steps"] == 9
    rates = [json.loads(line).get("lr") for line in (copy / "metrics.jsonl").open()]
    rates = [rate for rate in rates if rate is not None]
    assert rates[6] == pytest.approx(7e-4 * 0.25, rel=0.2)  # two thirds on the way down
    assert rates[6] > rates[5]
    assert rates[8] < rates[7] < rates[6]
    told = refused(train, "--resume", copy, "--steps", "4", capsys=capsys)
    assert f"--steps 4: {copy} has done 9 steps already" in told
    assert json.loads((copy / "config.json").read_text())["steps"] == 9
    train.main(["--resume", str(copy)])
    assert "is finished: it has all of its 9 steps" in capsys.readouterr().out


def test_the_end_of_a_run_that_is_not_finished_can_be_moved(copy, capsys):
    (copy / "checkpoints" / "step_0000006.pt").unlink()
    train.main(["--resume", str(copy), "--steps", "4"])
    assert steps_logged(copy) == [1, 2, 3, 4]
    assert json.loads((copy / "config.json").read_text())["steps"] == 4


# --- data that has moved ---


@pytest.fixture
def moved(data, copy, tmp_path):
    """A run at step 3 of 6 whose data has gone from `old` to `new`."""
    shutil.copytree(data, tmp_path / "new")
    about = json.loads((copy / "config.json").read_text())
    about["train_data"] = str(tmp_path / "old")
    (copy / "config.json").write_text(json.dumps(about))
    (copy / "checkpoints" / "step_0000006.pt").unlink()
    return copy


def test_a_run_goes_on_where_its_data_is_now(moved, finished, tmp_path, capsys):
    told = refused(train, "--resume", moved, capsys=capsys)
    assert f"no data at {tmp_path}/old" in told
    assert f"step 3 is kept; continue with: python -m ito.train --resume {moved} --tr" in told
    for command, query in ((evaluate, []), (search, ["red"]), (report, [])):
        told = refused(command, moved, *query, capsys=capsys)
        assert f"no data at {tmp_path}/old" in told
        assert "if it has moved, name its place with --train-data" in told
    train.main(["--resume", str(moved), "--train-data", str(tmp_path / "new")])
    assert f"moved      train_data is {tmp_path}/new\n" in capsys.readouterr().out
    assert steady(moved) == steady(finished)
    evaluate.main([str(moved)])  # it finds the data
    assert "80 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("restarted", [False, True])
def test_other_data_than_the_run_began_with_is_refused(restarted, moved, tmp_path, capsys):
    before = (moved / "config.json").read_bytes()
    if restarted:  # killed before its first checkpoint
        shutil.rmtree(moved / "checkpoints")
    captions = tmp_path / "new" / "captions.jsonl"
    captions.write_text(captions.read_text().replace("red cat", "red cut", 1))
    arguments = ["--resume", moved, "--train-data", tmp_path / "new"]
    told = refused(train, *arguments, capsys=capsys)
    assert f"--train-data {tmp_path}/new is not the data that the run began with: captions" in told
    assert f"--pretrained {moved}" in told
    assert (moved / "config.json").read_bytes() == before


def test_pixels_of_another_pillow_are_told_and_taken(moved, tmp_path, capsys):
    """The data has gone to another machine, whose decoder rounds in another way."""
    about = json.loads((moved / "environment.json").read_text())
    about["sha256"]["pictures"] = "0"
    arguments = ["--resume", str(moved), "--train-data", str(tmp_path / "new")]
    for version, taken in ((about["pillow"], False), ("1.0", True)):
        (moved / "environment.json").write_text(json.dumps(about | {"pillow": version}))
        if not taken:
            assert "pictures differ" in refused(train, *arguments, capsys=capsys)
            continue
        train.main(arguments)
        printed = capsys.readouterr().out
        assert "warning    pictures of the data changed since the run began" in printed
        assert "warning    pillow was 1.0, is " in printed


def test_a_list_of_pictures_that_have_moved_goes_on(tmp_path, data):
    """--image-root and --val-data may move too."""
    run, store, val = tmp_path / "run", tmp_path / "store", tmp_path / "val"
    shutil.copytree(data, store)
    (store / "captions.jsonl").rename(tmp_path / "list.jsonl")
    write_set(val, items=4)
    base = ["--train-data", str(tmp_path / "list.jsonl"), "--image-root", str(store), *QUICK]
    train.main([*base, "--val-data", str(val), "--out", str(run), "--checkpoint-every", "3"])
    whole = steady(run)
    (run / "checkpoints" / "step_0000006.pt").unlink()
    places = {"image-root": store, "val-data": val}
    arguments = []
    for name, old in places.items():
        arguments += [f"--{name}", str(old.rename(tmp_path / f"new-{name}"))]
    train.main(["--resume", str(run), *arguments])
    assert steady(run) == whole


# --- ends ---


def test_data_that_vanishes_while_it_trains_ends_with_what_is_kept(tmp_path, copy):
    told = r"no picture \(the checkpoint of step 6 is kept; continue with: python -m ito.train"
    with pytest.raises(ValueError, match=told), resumable(copy):
        raise ValueError("no picture")


def printing(text: str, **options) -> subprocess.CompletedProcess:
    """A process that prints as every command does; without torch, whose import takes seconds."""
    code = f"from ito.cli import user_errors\nwith user_errors():\n    print({text!r})"
    environment = os.environ | options.pop("environment")
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, stderr=subprocess.PIPE, env=environment, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_nobody_reads_ends_a_command_without_a_word(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    ended = printing("red", stdout=writing, environment={"PYTHONUNBUFFERED": unbuffered})
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_letters_that_the_terminal_lacks_are_shown_by_their_numbers():
    ended = printing("rød 赤", stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"r\\xf8d \\u8d64\n", b"")


def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    code = (
        "import sys, signal; sys.argv = ['-m']; import ito; signal.raise_signal(signal.SIGINT); "
        "print('went on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler  # who imports ito as a library keeps its handler


def test_an_output_that_cannot_be_written_is_named(copy, tmp_path, capsys):
    """Below a file, below a folder of the system, and on a full device."""
    below = tmp_path / "file"
    below.write_text("")
    for command, *arguments in (
        (search, copy, "red cat", "--out"),
        (export, copy, "--out"),
        (evaluate, copy, "--json"),
        (evaluate, copy, "--clip-benchmark"),
        (prepare, "emoji-small", "--out"),
    ):
        for place in (below / "out.x", Path("/proc/out.x")):
            told = refused(command, *arguments, place, capsys=capsys)
            assert str(place) in told
    for command, *arguments in ((evaluate, copy, "--json"), (search, copy, "red cat", "--out")):
        told = refused(command, *arguments, "/dev/full", capsys=capsys)
        assert told == "error: /dev/full: No space left on device\n"


def test_a_folder_s_name_sends_nothing_to_the_terminal(data, tmp_path, capsys):
    """Escape sequences in the names of the run and of its data, in every command."""
    shutil.copytree(data, tmp_path / "data\x1b[31m")
    run = str(tmp_path / "run\x9b31m")
    train.main(["--train-data", str(tmp_path / "data\x1b[31m"), "--out", run, *QUICK])
    train.main(["--resume", run, "--steps", "7"])
    search.main([run, "red \x1b[31mcat"])
    evaluate.main([run])
    report.main([run])
    export.main([run])
    (tmp_path / "data\x1b[31m").rename(tmp_path / "data")
    train.main(["--resume", run, "--train-data", str(tmp_path / "data")])
    (tmp_path / "data").rename(tmp_path / "gone")
    with pytest.raises(SystemExit):
        train.main(["--resume", run])
    printed = capsys.readouterr()
    sent = printed.out + printed.err.replace("\r", "")  # what the bar returns with
    assert "run\\x9b31m" in sent
    assert not re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f]", sent)
