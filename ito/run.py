"""The folder of a run: its files, its lock, its log, and the data that a command reads for it."""

import argparse
import errno
import json
import os
import shlex
import signal
import socket
import stat
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from ito.checkpoint import checkpoints
from ito.cli import reader_gone, reason, shown
from ito.config import Config, flag, from_options
from ito.data.dataset import Dataset
from ito.data.shards import PIPE
from ito.files import (
    TEMPORARY,
    FileError,
    irregular,
    naming,
    read_text,
    require_file,
    undamaged,
    write_atomically,
    write_text,
)
from ito.objectives import user_file
from ito.ranks import RankLost
from ito.source import open_dataset

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEST_BY = "mean_R@1"  # R@1 in both directions, averaged over the validation splits
LOCK_FILES: set[FileIO] = set()  # of the locks that this process has
MOST_THREADS = 1024  # for more OpenMP ends the process without a message
# what of environment.json a command goes by
USED = {"threads": int, "ranks": int, "device": str, "dtype": str, "compile": bool, "sha256": dict}


class RunFolder:
    """The paths of a run's files. No other module of ito knows these names, except that
    `checkpoint.py` names the files in `checkpoints/`, and `model/exported.py` those in `model/`.

    `python -m ito.train` writes the first group: some when it begins, the others with its first
    checkpoint. `ito.search` and `ito.compare` write the second.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # The lock is the kernel's; this file only says which process has it.
        self.lock = self.path / ".lock"
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.card = self.model / "README.md"
        self.report = self.path / "report.html"

        self.index = self.path / "index"
        self.near = self.path / "near.json"
        self.contact_sheet = self.path / "search.png"
        self.evaluation = self.path / "evaluation.json"
        self.cost = self.path / "cost.json"

    def read_config(self) -> Config:
        return Config.load(self.config)

    def read_environment(self) -> dict:
        """What the numbers depend on apart from the configuration, when the run began.

        Raises ValueError if a value that is used is of another type.
        """
        with undamaged(self.environment):
            found = dict(json.loads(read_text(self.environment)))
            for name, kind in USED.items():
                if type(found.get(name, kind())) is not kind:
                    raise TypeError(name)
            if not 0 < found.get("threads", 1) <= MOST_THREADS:
                raise ValueError("threads")
            return found

    def log(self) -> "Log":
        return Log(self.metrics)


def refuse_strange(folder: Path) -> None:
    """Raises ValueError if the folder of a run, or of several, holds a link that leads out of it,
    or anything but files and folders: who wrote it would decide where a command writes. For every
    command that writes in a folder that exists."""
    root = os.path.realpath(folder)
    for top, folders, files in os.walk(folder):
        for path in (Path(top, name) for name in (*folders, *files)):
            if path.is_symlink():
                if not Path(os.path.realpath(path)).is_relative_to(root):
                    raise FileError(f"{path} is a link that leads out of {folder}: remove it")
            elif not path.is_dir() and (found := irregular(path)):
                raise FileError(f"{path} is {found}, not a file")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that only one process writes what a run is resumed from.

    The lock ends with the process, however that ends. Where locks are not supported, a warning is
    printed. Raises BlockingIOError naming the process that has the lock, and OSError if the lock
    file is a link (its target would be overwritten) or no regular file, or cannot be written.
    """
    path = RunFolder(folder).lock
    with FileIO(path, "r+", opener=open_lock) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file: remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                f"{folder} is in use by {holder}: wait until it ends, or name another folder"
            ) from None
        except (AttributeError, OSError) as error:  # Windows, or a file system without locks
            why = reason(error) if fcntl else "not on this system"
            told = f"{shown(folder)} cannot be locked ({why})"
            print(f"warning    {told}: run one process in it at a time")
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        LOCK_FILES.add(file)
        try:
            yield
        finally:
            LOCK_FILES.discard(file)


def open_lock(path: Path, _flags: int) -> int:
    """Open to read and write, or create. A link is refused; a pipe does not block."""
    options = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")  # Windows has only the last
    flags = sum(getattr(os, name, 0) for name in options)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:
        folder = os.path.dirname(path) or "."
        writable = os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not writable:
            raise OSError(f"{folder} is not writable: {error.strerror}") from error
        raise


def close_lock_files() -> None:
    """In a forked child, which otherwise keeps the lock if its parent dies."""
    for file in LOCK_FILES:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_lock_files)


def refuse_used(run: Path) -> None:
    """Raises FileExistsError if `run` is not a folder, or holds any file.

    The lock and temporary files do not count: a run that was killed before it had written its
    config.json leaves them.
    """
    if run.is_dir():
        found = (path.name for path in run.iterdir())
        used = any(name != ".lock" and not TEMPORARY.fullmatch(name) for name in found)
    else:
        used = run.exists()
    if used:
        raise FileExistsError(f"{run} exists; name another --out, or continue it with --resume")


@contextmanager
def created(run: Path, named: bool) -> Iterator[None]:
    """Create the folder and lock it. If the user named it, it may exist already, unused."""
    try:
        run.mkdir(parents=True, exist_ok=named)
    except OSError as error:
        raise OSError(f"--out: cannot create {run}: {error.strerror}") from error
    with locked(run):
        refuse_used(run)
        for path in run.glob(".*.tmp"):
            path.unlink()
        yield


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files that a killed process has left in `checkpoints` and `model`.

    These are written under the lock only. In the rest of the folder a command without the lock may
    be writing.
    """
    run = RunFolder(folder)
    for path in (*run.checkpoints.glob(".*.tmp"), *run.model.glob(".*.tmp")):
        path.unlink()


@contextmanager
def resumable(folder: Path, options: str = "") -> Iterator[None]:
    """Adds to an OSError or ValueError of the body how the run can be continued.

    options: what to add to the command.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, RankLost) or reader_gone(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{reason(error)} ({kept(folder)}{options})") from error


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM was received."""


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Ctrl-C or SIGTERM in the body ends the process, with a line that says what is kept."""

    def stop(number: int, _) -> None:
        raise Stopped(128 + number)

    with on_stop_signals(stop):
        try:
            yield
        except Stopped:
            print(f"stopped    {kept(folder)}")
            raise


@contextmanager
def on_stop_signals(handler: Callable) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` in the body, as `signal.signal` does."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def kept(folder: Path) -> str:
    """The checkpoint that a run can be continued from, and the command, in words."""
    run = RunFolder(folder)
    step = max(checkpoints(run.checkpoints, strict=False), default=None)
    if step is None and not run.config.exists():
        return "nothing is written yet"
    what = "no checkpoint yet" if step is None else f"the checkpoint of step {step} is kept"
    return f"{what}; continue with: {resume_command(folder)}"


def resume_command(folder: Path) -> str:
    """The command that continues a run, with what it runs only if it is given again."""
    try:
        given = executed(RunFolder(folder).read_config())
    except (OSError, ValueError):
        given = {}
    words = [f"{flag(name)} {shlex.quote(value)}" for name, value in given.items()]
    return " ".join(["python -m ito.train --resume", shown(folder), *map(shown, words)])


class Log:
    """A file of JSON lines, one per logged step ("train") and per evaluation ("eval").

    A "stream" line at the end of a streamed run counts the skipped records. `count` is the number
    of all other lines; a checkpoint remembers it.
    """

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def start(self) -> None:
        """Create or empty the file; a run that was killed before its first checkpoint has a log."""
        write_text(self.path, "")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"kind": kind, "step": step} | values) + "\n"
        # The buffer is larger than any line, so that a line is written by one system call and
        # another process never reads a part of it.
        with naming(self.path), self.path.open("ab", buffering=1 << 20) as file:
            file.write(line.encode())
        self.count += kind != "stream"

    def read(self, kind: str | None = None) -> list[dict]:
        """The records, of one kind or all. Raises ValueError naming a line that cannot be read."""
        records = []
        for number, line in enumerate(require_file(self.path).read_bytes().splitlines(), 1):
            with undamaged(Path(f"{self.path}:{number}")):
                record = json.loads(line)
                if kind in (None, record["kind"]):
                    records.append(record)
        return records

    def best(self) -> int | None:
        """The step with the highest BEST_BY, the first of equal ones; None if none was scored."""
        found = [r for r in self.read("eval") if r["step"] and BEST_BY in r]
        return max(found, key=lambda record: record[BEST_BY])["step"] if found else None

    def rewind(self, step: int, expected: int | None) -> list[str]:
        """Drop the lines after `step`, and those that cannot be read. Returns the problems found.

        expected: the `count` at that step, if known. Raises ValueError if it is not a regular file.
        """
        problems, kept_lines = [], []
        text = require_file(self.path).read_bytes() if self.path.exists() else b""
        *lines, rest = text.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                kind, logged = record["kind"], int(record["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                problems.append(f"line {number} cannot be read and is dropped")
                continue
            if logged <= step:
                kept_lines.append(line + b"\n")
                self.count += kind != "stream"
        if rest:
            problems.append(f"line {len(lines) + 1} is cut off and dropped")
        if expected is not None and self.count != expected:
            problems.append(
                f"up to step {step} it has {self.count} records, but {expected} were written: "
                "curves and report show those that it has"
            )
        if b"".join(kept_lines) != text or not self.path.exists():
            with write_atomically(self.path) as temporary:
                temporary.write_bytes(b"".join(kept_lines))
        return problems


def report_step(folder: Path, step: int) -> str:
    """That the exported model is not of the newest checkpoint, in words; "" if it is."""
    newest = max(checkpoints(RunFolder(folder).checkpoints, strict=False), default=step)
    told = f"note       the model is of step {step}; the newest checkpoint is of step {newest}"
    return told * (step != newest)


def open_chosen(options: argparse.Namespace, config: Config) -> Dataset:
    """The data that `choose_data` has chosen. If it is not found, the error says how to name its
    new place."""
    try:
        return open_dataset(config, options.cache)
    except FileNotFoundError as error:
        if options.data is not None or "train_data" in options:
            raise
        told = f"{reason(error)}; if it has moved, name its place with --train-data or --val-data"
        raise FileNotFoundError(told) from None


def choose_data(options: argparse.Namespace) -> Config:
    """The run's configuration with the data that a command's options name.

    Raises ValueError if the configuration names a command and the options do not, and if the
    options name two data sets.
    """
    config, data = from_options(options, RunFolder(options.run).read_config()), options.data
    if data is None:
        refuse_commands(options.run, config, vars(options))
        return config
    for name in ("train_data", "val_data"):
        if name in options:
            about = f"--data {data} and {flag(name)} name the same thing"
            raise ValueError(f"{about}: drop one")
    given = {"train_data": data, "stream": False, "val_data": None}
    # what the run's own data needed
    for name in ("data_format", "image_root", "group_by", "test_share"):
        given[name] = vars(options).get(name, getattr(Config, name))
    return from_options(argparse.Namespace(**given), config)


def executed(config: Config) -> dict[str, str]:
    """The options whose values are run: commands in place of data, and a file with a loss."""
    data = {name: getattr(config, name) for name in ("train_data", "val_data")}
    found = {name: value for name, value in data.items() if f"::{PIPE}" in f"::{value}"}
    return found | ({"objective": config.objective} if user_file(config.objective) else {})


def refuse_commands(
    run: Path, config: Config, given: Container, names: Container = ("train_data", "val_data")
) -> None:
    """Raises ValueError if the run's configuration names a command or a file to run, by an option
    of `names` that is not `given`: a folder of others must not run anything here."""
    for name, value in executed(config).items():
        if name in names and name not in given:
            what = "a file" if name == "objective" else "a command"
            about = f"its config.json names {what}, which is run only if you give it"
            raise ValueError(f"{run}: {about}: {flag(name)} {shlex.quote(value)}")
