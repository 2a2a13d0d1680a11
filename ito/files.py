"""Files that are written whole or not at all, and errors that name the file."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """An OSError that names no file, or the temporary one, names `path`: a full disk names none.

    It is found behind a library's error too: torch.save hides it in a RuntimeError.
    """
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError):
            found = found.__context__
        if found is None or found.filename not in (None, str(temporary)):
            raise
        if found.errno is None:
            raise OSError(f"{path}: {found}") from error
        raise OSError(found.errno, found.strerror, str(path)) from error


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A file to write; flushed to the disk and renamed to `path` when the body ends well.

    Its name is another each time, so that two processes do not meet. A link stays one; what is no
    regular file, a device or a pipe, is written in place. Raises OSError naming `path`.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with naming(path):
            yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")  # a name may be as long as can be
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
    """Names the file that cannot be read: ValueError, or the system's error where it is missing."""
    try:
        yield path
    except OSError:
        raise
    except Exception as error:  # torch, pickle, zipfile and tokenizers raise what they like
        raise ValueError(
            f"{path} is damaged, or not of this run ({type(error).__name__})"
        ) from None
