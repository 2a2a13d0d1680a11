"""How the commands report errors: one line that names the cause, and no traceback."""

import argparse
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from PIL import Image

from ito.files import follow_links
from ito.starting import interrupt_as_usual

# C0, C1, halves of surrogate pairs, and marks that turn the direction of writing
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
USER_ERRORS = (ValueError, OSError, ImportError)
CLOSED = 141  # the status of a command whose reader has gone: 128 + SIGPIPE


def path_of(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """Reports bad options as all errors are reported, in one line. An empty path is one: Path("")
    is the working directory."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", Path, path_of)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, 2000)}\n")


@contextmanager
def user_errors() -> Iterator[None]:
    """Print `error: …` on stderr and exit: with status 2 for errors of options, files or packages,
    with 1 if the training diverged. Ctrl-C exits with status 130, as usual in a shell; a closed
    pipe (`| head`) with 141, without a word.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # --max-pixels is our limit
    interrupt_as_usual()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caption may have letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except USER_ERRORS as error:
        if reader_gone(error):
            sys.exit(CLOSED)
        print(f"error: {one_line(reason(error), 2000)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        about = f": {one_line(str(error))}" * bool(str(error))
        print(f"error: not enough memory{about}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def flush() -> None:
    """Write out what was printed, so that an error of that is raised here; Python would print it as
    "Exception ignored …" when it ends."""
    try:
        if sys.stdout:  # None if it was closed before the start
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to come
        raise


def reader_gone(error: BaseException) -> bool:
    """Whether stdout is a pipe that nobody reads any more. An error of a file names it."""
    return isinstance(error, BrokenPipeError) and error.filename is None


def reason(error: Exception) -> str:
    """The error's message; that of the system's errors without their number."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def output_path(option: str, path: Path) -> Path:
    """`path`, to be written. Raises OSError naming the option if its links form a loop."""
    try:
        follow_links(path)
    except OSError as error:
        raise OSError(f"{option} {reason(error)}") from error
    return path


def shown(path: str | os.PathLike) -> str:
    """A path on one line, never cut, to be copied."""
    return one_line(str(path), len(str(path)))


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, cut to `limit` characters: a caption may be a megabyte long.

    Control characters, which a terminal would obey, are shown as `\\x1b`.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return CONTROL.sub(
        lambda found: found[0].encode("unicode_escape").decode(), " ".join(cut.splitlines())
    )
