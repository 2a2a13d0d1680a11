"""The run folder: one process writes it; what is damaged, missing or full is told by name."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quick_run import QUICK, steady

import ito
from ito import compare, evaluate, export, prepare, report, run, search, train
from ito.checkpoint import load_checkpoint, save_checkpoint
from ito.cli import user_errors
from ito.data.dataset import load_dataset
from ito.files import naming, write_atomically
from ito.model.tokenizer import Tokenizer
from ito.resume import fingerprint
from ito.run import Log, RunFolder, locked, resumable
from ito.trainer import Trainer


def refused(command, *arguments, capsys) -> str:
    """What a command says that ends with status 2 and one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after what the bar has drawn
    assert said.startswith("error: ")
    return said


def contents(folder) -> dict:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- one process at a time ---


def test_a_folder_that_is_written_is_refused(copy, capsys):
    before = contents(copy)
    with locked(copy):
        for command, *arguments in (
            (train, "--resume", copy),
            (train, "--out", copy),
            (export, copy),
            (export, copy, "--out", copy / "checkpoints" / ".." / "model"),
        ):
            said = refused(command, *arguments, capsys=capsys)
            assert f"{copy} is in use by process {os.getpid()} on {socket.gethostname()}" in said
        export.main([str(copy), "--out", str(copy.parent / "elsewhere")])  # it writes nothing here
    assert contents(copy) == before
    export.main([str(copy)])


def test_a_killed_process_leaves_no_lock_though_its_workers_live(tmp_path):
    started, ended = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path):
            if not os.fork():  # as a stream's workers: it has the same open files
                os.close(ended[1])
                os.write(started[1], b"x")
                os.read(ended[0], 1)
                os._exit(0)
            os.read(started[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
    for end in (*started, *ended):
        os.close(end)


@pytest.mark.parametrize("kind", ["system", "files"])
def test_where_nothing_can_be_locked_a_line_says_so(kind, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if kind == "system":
        monkeypatch.setattr(run, "fcntl", None)
    else:
        monkeypatch.setattr(run.fcntl, "flock", flock)
    with locked(tmp_path):
        assert f"warning    {tmp_path} cannot be locked (" in capsys.readouterr().out


def test_a_comparison_is_run_once_at_a_time(tmp_path, capsys):
    with locked(tmp_path):
        assert "is in use by process" in refused(compare, "--out", tmp_path, capsys=capsys)


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with write_atomically(path) as first, write_atomically(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose rename came last
    with pytest.raises(TypeError), write_atomically(path) as place:
        place.write_text(3)
    (tmp_path / "link").symlink_to(path)
    with write_atomically(tmp_path / "link") as place:
        place.write_text("third")
    assert path.read_text() == "third"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "link"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_device_is_written_in_place(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    with write_atomically(pipe) as place:
        place.write_text("text")
    reader.join(5)
    assert found == ["text"]
    assert pipe.is_fifo()


# --- what is damaged ---


def test_a_flipped_bit_of_a_checkpoint_is_told_and_how_to_go_on(finished, copy, capsys):
    newest = copy / "checkpoints" / "step_0000006.pt"
    with zipfile.ZipFile(newest) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    flip(newest, part.header_offset + 500 + part.file_size // 2)
    torch.load(newest, weights_only=True)  # to torch it is a weight like any other
    for arguments in ((train, "--resume", copy), (export, copy)):
        said = refused(*arguments, capsys=capsys)
        assert f"{newest} is damaged ({part.filename} does not have its checksum)" in said
        assert said.endswith("remove it, and --resume continues from step_0000003.pt")
    newest.unlink()
    leftover = copy / "checkpoints" / ".step_0000006.pt.0123.tmp"
    leftover.touch()
    train.main(["--resume", str(copy)])
    assert "from step 3" in capsys.readouterr().out
    assert steady(copy) == steady(finished)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_of_an_exported_model_is_told(name, copy):
    path = copy / "model" / name
    if name == "tokenizer.json":
        flip(path, path.read_bytes().index(b'"max_length": 8') + 14)  # becomes 9
    else:
        flip(path, path.stat().st_size - 1000)
    with pytest.raises(ValueError, match=rf"{name} is damaged, or .* \(WrongChecksum\)"):
        ito.load(copy)


def test_a_flipped_bit_of_kept_embeddings_is_told(copy, capsys):
    search.main([str(copy), "red cat"])
    (path,) = (copy / "index").iterdir()
    flip(path, path.stat().st_size - 3)
    assert f"{path} is damaged" in refused(search, copy, "red cat", capsys=capsys)


def test_models_and_checkpoints_of_older_versions_are_taken(copy, capsys):
    weights, path = copy / "model" / "model.safetensors", copy / "checkpoints" / "step_0000006.pt"
    save_file(load_file(weights), weights)
    state = torch.load(path, weights_only=True)
    del state["tokenizer"], state["logged"]
    torch.save(state, path)
    about = json.loads((copy / "environment.json").read_text())
    del about["sha256"]
    (copy / "environment.json").write_text(json.dumps(about))
    train.main(["--resume", str(copy)])
    said = capsys.readouterr().out
    assert "note       an older version began this: changed data, a cut log go unnoticed" in said
    assert "warning" not in said


def test_a_step_that_cannot_be_is_refused(copy, capsys):
    newest = copy / "checkpoints" / "step_0000006.pt"
    renamed = newest.rename(newest.with_name("step_0000009.pt"))
    said = refused(train, "--resume", copy, capsys=capsys)
    assert f"{renamed} holds step 6, which is not the step of its name: remove it" in said
    state = torch.load(renamed, weights_only=True)
    torch.save(state | {"step": -6}, newest)
    renamed.unlink()
    assert "holds step -6" in refused(train, "--resume", copy, capsys=capsys)
    newest.rename(newest.with_name("step_-000006.pt"))
    assert "has no name of a checkpoint" in refused(train, "--resume", copy, capsys=capsys)
    newest.with_name("step_-000006.pt").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"steps": 2}))
    said = refused(train, "--resume", copy, capsys=capsys)
    assert "step_0000003.pt is beyond the 2 steps of the run's config.json" in said


def test_a_log_that_has_lost_lines_is_told(tmp_path):
    whole = Log(tmp_path / "metrics.jsonl")
    whole.start()
    for step in range(1, 7):
        whole.write("train", step, {"loss": 1.0})
    whole.write("stream", 6, {"skipped": 0})
    lines = whole.path.read_bytes().splitlines(keepends=True)
    assert whole.count == 6

    def rewound(text: bytes, step=6, wanted=6):
        whole.path.write_bytes(text)
        log = Log(whole.path)
        amiss = log.rewind(step, wanted)
        assert log.count == len(log.read("train"))
        return amiss, [record["step"] for record in log.read("train")]

    assert rewound(b"".join(lines)) == ([], [1, 2, 3, 4, 5, 6])
    assert rewound(b"".join(lines), 3, 3) == ([], [1, 2, 3])
    short = "up to step 6 it has 5 records, but 6 were written: curves and report show those that "
    short += "it has"
    assert rewound(b"".join(lines[:2] + lines[3:])) == ([short], [1, 2, 4, 5, 6])
    cut = "line 6 is cut off and dropped"
    assert rewound(b"".join(lines[:6])[:-4]) == ([cut, short], [1, 2, 3, 4, 5])
    for wrong in (b"\xff\n", b'{"kind": 1}\n', b"3\n", b'{"kind": 1, "step": Infinity}\n'):
        bad = "line 3 cannot be read and is dropped"
        text = b"".join([*lines[:2], wrong, *lines[3:]])
        assert rewound(text) == ([bad, short], [1, 2, 4, 5, 6])
    more = short.replace("5 records", "7 records")
    assert rewound(b"".join([lines[0], *lines])) == ([more], [1, 1, 2, 3, 4, 5, 6])


def test_resuming_tells_what_the_log_has_lost(copy, capsys):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join([*lines[:3], *lines[4:]])[:-9])
    train.main(["--resume", str(copy)])
    said = capsys.readouterr().out
    assert f"warning    {copy}/metrics.jsonl: line 8 is cut off and dropped" in said
    assert "up to step 6 it has 7 records, but 9 were written" in said
    (copy / "metrics.jsonl").unlink()
    train.main(["--resume", str(copy)])
    assert "it has 0 records, but 9 were written" in capsys.readouterr().out


def test_data_that_changed_since_the_run_began_is_told(data, copy, tmp_path, capsys):
    moved = shutil.copytree(data, tmp_path / "moved")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"train_data": str(moved)}))
    train.main(["--resume", str(copy)])
    assert "warning" not in capsys.readouterr().out
    captions = moved / "captions.jsonl"
    captions.write_text(captions.read_text().replace("red cat", "red cut", 1))
    train.main(["--resume", str(copy)])
    (said,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert said == "warning    captions of the data changed since the run began: numbers differ"
    dataset = load_dataset(moved, 64)
    was = fingerprint(dataset)
    dataset.images[0, 0, 0, 0] ^= 1
    dataset.split[0] = "another"
    now = fingerprint(dataset)
    assert {name for name in was if was[name] != now[name]} == {"pictures", "splits"}


# --- ends ---


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(finished, copy, capsys):
    for name in ("checkpoints", "model"):
        shutil.rmtree(copy / name)
    (copy / "report.html").unlink()
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    train.main(["--resume", str(copy)])
    assert f"{copy} has no checkpoint: it starts again" in capsys.readouterr().out
    assert steady(copy) == steady(finished)


def test_ctrl_c_ends_with_130_after_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def interrupted(self, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(SystemExit) as end:
        train.main(["--train-data", str(data), "--out", str(tmp_path / "run"), *QUICK])
    assert end.value.code == 130
    assert f"stopped after step 3; continue with: python -m ito.train --resume {tmp_path}/run" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "run" / "checkpoints" / "step_0000003.pt").exists()
    with pytest.raises(SystemExit) as end, user_errors():  # any other command, at any time
        signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


@contextmanager
def room(size: int):
    """No file can be longer: a write past that fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "model/tokenizer.json",
        "model/model.safetensors",
        "checkpoints/step_0000006.pt",
        "report.html",
    ],
)
def test_a_full_disk_names_the_file_and_what_is_kept(name, copy, capsys):
    size, kept = (copy / name).stat().st_size - 1, 6
    if name != "report.html":
        (copy / "checkpoints" / "step_0000006.pt").unlink()
        kept = 3
    if name == "metrics.jsonl":  # room for what it holds up to the checkpoint
        size = 10 + len(b"".join((copy / name).read_bytes().splitlines(keepends=True)[:5]))
    model = contents(copy / "model")
    with room(size):
        said = refused(train, "--resume", copy, capsys=capsys)
    assert said == (
        f"error: {copy}/{name}: File too large (the checkpoint of step {kept} is kept; "
        f"continue with: python -m ito.train --resume {copy})"
    )
    if not name.startswith("checkpoints"):  # the model that was there is whole
        assert contents(copy / "model") == model
    assert not list(copy.rglob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and what sets its size in bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size: int, more: str = "remount,") -> int:
        words = ["mount", "-t", "tmpfs", "-o", f"{more}size={size}", "tmpfs", str(place)]
        return subprocess.run(words, capture_output=True).returncode

    if resize(2**24, ""):
        pytest.skip("no file system can be mounted here; RLIMIT_FSIZE stands for a full disk above")
    yield place, resize
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("room", [0, 200_000, 400_000])
def test_a_run_on_a_disk_that_is_full_goes_on_when_there_is_room(
    room, copy, finished, small_disk, capsys
):
    place, resize = small_disk
    (copy / "checkpoints" / "step_0000006.pt").unlink()
    run = shutil.copytree(copy, place / "run")
    used = shutil.disk_usage(place).used
    assert not resize(used + room)
    said = refused(train, "--resume", run, capsys=capsys)
    assert f"error: {run}/" in said
    kept = " (the checkpoint of step 3 is kept; continue with: " * bool(room)  # before it trains
    assert f"No space left on device{kept}" in said
    assert not list(run.rglob(".*.tmp"))
    load_checkpoint(run / "checkpoints")
    ito.load(run)
    assert not resize(2**25)
    train.main(["--resume", str(run)])
    assert steady(run) == steady(finished)
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()


def stop_by(number: int):
    def stop(*_):
        signal.raise_signal(number)

    return stop


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_before_its_first_step_tells_what_is_kept(
    number, status, data, copy, tmp_path, monkeypatch, capsys
):
    (copy / "checkpoints" / "step_0000006.pt").unlink()
    before = signal.getsignal(number)
    monkeypatch.setattr(train, "open_data", stop_by(number))

    def said(*arguments) -> str:
        with pytest.raises(SystemExit) as end:
            train.main([str(argument) for argument in arguments])
        assert end.value.code == status
        assert signal.getsignal(number) is before
        return capsys.readouterr().out.splitlines()[-1]

    resume = f"continue with: python -m ito.train --resume {copy}"
    assert said("--resume", copy) == f"stopped    the checkpoint of step 3 is kept; {resume}"
    new = said("--train-data", data, "--out", tmp_path / "new")
    assert new == "stopped    nothing is written yet"
    shutil.rmtree(copy / "checkpoints")
    assert said("--resume", copy) == f"stopped    no checkpoint yet; {resume}"


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_a_run_that_is_killed_while_it_writes_its_first_files_starts_again(name, data, tmp_path):
    """Killed by no signal that can be handled, so that nothing is cleaned up."""
    run, arguments = tmp_path / "run", ["--train-data", str(data), "--out", str(tmp_path / "run")]
    code = (
        "import os, signal, sys; from ito import train; replace = os.replace\n"
        "def killed(source, target):\n"
        f"    if os.path.basename(target) == {name!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = killed; train.main(sys.argv[1:])"
    )
    # a process of its own: one that is forked from this one may not use its threads
    ended = subprocess.run([sys.executable, "-c", code, *arguments, *QUICK], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"]
    if name == "config.json":
        train.main([*arguments, *QUICK, "--steps", "1"])
        assert not list(run.glob(".*.tmp"))
    else:
        train.main(["--resume", str(run)])
    assert list((run / "checkpoints").iterdir())


def test_a_checkpoint_of_another_name_ends_no_training(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_best.pt").write_bytes(b"a copy")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, {})
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_best.pt", "step_0000002.pt", "step_0000003.pt"}
    with pytest.raises(OSError, match="the checkpoint of step 3 is kept"), resumable(tmp_path):
        raise OSError("no space")
    with pytest.raises(ValueError, match=r"step_best.pt has no name of a checkpoint"):
        load_checkpoint(tmp_path / "checkpoints")


def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept", encoding="utf-8")
    for name in ("link", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / ".lock").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe" / ".lock")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path / name):
            pass
    assert victim.read_text(encoding="utf-8") == "kept"


@contextmanager
def unprivileged():
    """Without root's right to write everywhere."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("used", [False, True])
def test_a_folder_that_cannot_be_written_is_told_as_such(used):
    with tempfile.TemporaryDirectory() as name:  # not in tmp_path, which is root's alone
        folder = Path(name)
        if used:
            (folder / ".lock").touch(0o444)
        folder.chmod(0o555)
        message = f"^{folder} is not writable: Permission denied$"
        with unprivileged(), pytest.raises(OSError, match=message), locked(folder):
            pass
        folder.chmod(0o777)
        if used:  # another user's lock in a folder of all
            with unprivileged(), pytest.raises(PermissionError, match=r"\.lock"), locked(folder):
                pass


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "environment.json",
        "model/config.json",
        "model/tokenizer.json",
        "model/model.safetensors",
        "checkpoints/step_0000006.pt",
    ],
)
def test_a_pipe_in_the_place_of_a_file_of_a_run_is_named(name, copy, capsys):
    """Whoever opens it would wait for ever; after a while it is let go, and finds no text."""
    path = copy / name
    path.unlink()
    os.mkfifo(path)
    timer = threading.Timer(20, lambda: os.close(os.open(path, os.O_RDWR)))
    timer.daemon = True
    timer.start()
    command = train if name.startswith(("checkpoints", "metrics", "environment")) else evaluate
    arguments = ("--resume", copy) if command is train else (copy,)
    began = time.monotonic()
    assert f"{path} is a named pipe, not a file" in refused(command, *arguments, capsys=capsys)
    if name == "metrics.jsonl":
        assert f"{path} is a named pipe" in refused(report, copy, capsys=capsys)
    timer.cancel()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("older", [False, True])
def test_a_tokenizer_of_another_model_is_named(older, copy, capsys):
    tokens, newest = copy / "model" / "tokenizer.json", copy / "checkpoints" / "step_0000006.pt"
    state = torch.load(newest, weights_only=True)
    other = Tokenizer.train(["a b c"], 259, 8)
    other.save(tokens)
    if older:
        del state["tokenizer"]
    else:
        state["tokenizer"] = other.bpe.to_str()
    torch.save(state, newest)
    path = tokens if older else copy / "checkpoints"
    for command in ((train, "--resume", copy), (export, copy)):
        said = refused(*command, capsys=capsys)
        assert said == f"error: {path} is of another model: vocab_size 259, expected 300"
    if not older:
        torch.save(state | {"tokenizer": "{"}, newest)
        assert f"{path} is damaged" in refused(export, copy, capsys=capsys)
    weights = copy / "model" / "model.safetensors"
    save_file(load_file(weights), weights)  # as older versions wrote it, without checksums
    with pytest.raises(ValueError, match=r"tokenizer.json is of another model: vocab_size 259"):
        ito.load(copy)


def test_only_an_error_of_the_file_itself_names_it(tmp_path):
    def handled():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("something else")  # noqa: B904

    def replaced():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise KeyError("a name") from None

    for body, error in ((handled, RuntimeError), (replaced, KeyError)):
        with pytest.raises(error), naming(tmp_path / "file"):
            body()
        with pytest.raises(error), write_atomically(tmp_path / "file"):
            body()
    with pytest.raises(OSError, match=f"{tmp_path}/file"), naming(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("command", "arguments", "option"),
    [
        (evaluate, "{run} --json {loop}", "--json {loop}"),
        (evaluate, "{run} --json {loop}/scores.json", "--json {loop}/scores.json"),
        (evaluate, "{run} --clip-benchmark {loop}", "--clip-benchmark {loop}"),
        (search, "{run} cat --out {loop}", "--out {loop}"),
        (export, "{run} --out {loop}", "--out {loop}"),
        (export, "{run} --open-clip {loop}", "--open-clip {loop}"),
        (train, "--out {loop}", "--out {loop}"),
        (train, "--out {loop}/run", "--out {loop}/run"),
        (compare, "--out {loop}", "--out {loop}"),
        (prepare, "emoji-small --out {loop}", "--out {loop}"),
    ],
)
def test_links_that_form_a_loop_are_told_by_option(command, arguments, option, copy, capsys):
    loop = copy / "a"
    loop.symlink_to(copy / "b")
    (copy / "b").symlink_to(loop)
    places = {"run": copy, "loop": loop}
    said = refused(command, *arguments.format(**places).split(), capsys=capsys)
    assert said == f"error: {option.format(**places)}: Too many levels of symbolic links"


def test_links_that_form_a_loop_in_place_of_a_file_are_told(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "file"):
        with pytest.raises(OSError, match=f"symbolic links: '{path}'"), write_atomically(path):
            pass
    with pytest.raises(OSError, match="symbolic links"):
        load_dataset(tmp_path / "loop" / "table.csv", 8, untrusted_data=True)


def test_a_log_that_is_a_pipe_or_nested_too_deep(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    log.path.write_text("[" * 100_000 + "\n", encoding="utf-8")
    assert log.rewind(1, None) == ["line 1 cannot be read and is dropped"]
    log.path.unlink()
    os.mkfifo(log.path)
    opened = os.open(log.path, os.O_RDWR)
    threading.Timer(2, os.close, [opened]).start()
    with pytest.raises(ValueError, match=r"metrics.jsonl is a named pipe, not a file"):
        log.rewind(1, None)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    with write_atomically(tmp_path / ("n" * 255)) as place:
        place.write_text("whole", encoding="utf-8")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [
        ("n" * 255, "whole")
    ]


def test_hashes_of_the_data_that_are_none_are_told_by_file(tmp_path):
    (tmp_path / "environment.json").write_text('{"sha256": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"environment.json is damaged"):
        RunFolder(tmp_path).read_environment()
