"""Files that are written completely or not at all, and errors that name the file."""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")  # a name of `write_atomically`
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def irregular(path: Path) -> str:
    """What `path` is if it is not a regular file, for example "a named pipe"; "" if it is one.

    Check before opening: opening a named pipe can block for ever, and a device may have no end.
    Raises OSError.
    """
    mode = path.stat().st_mode
    return "" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


class FileError(ValueError):
    """A ValueError whose message names its file."""


def require_file(path: Path) -> Path:
    """`path`, if it is a regular file. Raises FileError, or OSError if it is missing."""
    if found := irregular(path):
        raise FileError(f"{path} is {found}, not a file")
    return path


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file."""
    return require_file(path).read_text(encoding="utf-8")


def read_json(path: Path):
    """The value of a JSON file. Raises ValueError naming the file if it is damaged."""
    with undamaged(path):
        return json.loads(read_text(path))


def follow_links(path: Path) -> Path:
    """The absolute path without links. Raises OSError naming `path` if its links form a loop.

    `Path.resolve` raises RuntimeError for a loop, and `os.path.realpath` returns a part of it.
    """
    real = Path(os.path.realpath(path))
    try:
        looped = stat.S_ISLNK(real.lstat().st_mode)
    except OSError as error:
        looped = error.errno == errno.ELOOP
    if looped:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes an OSError name `path` if it names no file, as on a full disk, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(folder: Path, path: Path) -> None:
    """Create `folder` for the file `path`. Raises OSError naming `path` and what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = error.filename or folder
        if error.errno == errno.EEXIST:
            raise OSError(f"{path}: {at} is not a folder") from None
        raise OSError(f"{path}: cannot create {at}: {error.strerror}") from None


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A file to write; flushed to the disk and renamed to `path` when the body ends without error.

    Its name is random, so that two processes do not write the same one. If `path` is a link, the
    file it leads to is replaced. A device or a pipe is written in place. Raises OSError naming
    `path`.
    """
    target = follow_links(path)
    if target.exists() and not target.is_file():
        with naming(path):
            yield target
        return
    make_folder(target.parent, path)
    # not longer than `path`'s own, which may have the greatest length
    temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
    with naming(path, temporary):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def undamaged(path: Path) -> Iterator[Path]:
    """Turns any error of reading `path` into a ValueError that names it; OSError stays."""
    try:
        yield path
    except (OSError, FileError):
        raise
    except Exception as error:  # torch, pickle, zipfile and tokenizers raise many types
        about = f": {str(error)[:300]}" * bool(str(error))
        told = f"{path} is damaged, or not of this run ({type(error).__name__})"
        raise ValueError(f"{told}{about}") from None
