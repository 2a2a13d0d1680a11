"""WebDataset tar shards: a sample is the files that share a name up to its first dot.

`000017.jpg`, `000017.txt` and `000017.json` are one sample. Of pictures only the offsets in the tar
are noted: shuffling a million samples moves no pixel. The package webdataset reads all pictures,
and joins only members that stand together.
"""

import glob
import io
import math
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIPE = "pipe:"
URLS = ("http://", "https://", "s3://", "gs://")
TEXTS = ("txt", "json", "cls")
MOST_FILES = 1_000_000  # that braces may stand for
LONGEST_HEADER = 16_384  # bytes of a name or of attributes; tarfile's time grows with its square
ATTRIBUTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
ATTRIBUTES += (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
BRACES = r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}"


class Member(NamedTuple):
    """A file in a tar; with its content if it is a text, or a command wrote the tar."""

    tar: Path | str
    offset: int
    size: int
    data: bytes | None = None

    def __str__(self) -> str:
        return f"{self.tar}@{self.offset}"

    def read_bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Header(tarfile.TarInfo):
    """A member's header. Refuses a size below 0, with which tarfile would read for ever, and very
    long names and attributes."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type in ATTRIBUTES and found.size > LONGEST_HEADER):
            raise tarfile.ReadError(f"a header names {found.size} bytes")
        return found


class Sample(NamedTuple):
    key: str
    members: dict[str, Member]  # by what follows the first dot, in lower case


def expand(pattern: str) -> list[Path | str]:
    """The paths that a pattern stands for, and the commands, which stay texts.

    `shard-{00000..00012}.tar` has both ends; `{a,b}.tar` is a choice; `*`, `?` and `[…]` are
    matched with the files there are; `A::B` is the one, then the other; `pipe:COMMAND` is the tar
    that a shell command writes. Only what a user wrote is a command: a path that a file names, or
    that is matched, stays a path. Raises ValueError for braces that stand for more than MOST_FILES.
    """
    if "::" in pattern:
        return [path for part in pattern.split("::") for path in expand(part)]
    if found := re.search(BRACES, pattern):
        count = math.prod(
            choice.count(",") + 1 if choice else max(0, int(last[:19]) - int(first[:19]) + 1)
            for first, last, choice in re.findall(BRACES, pattern)
        )
        if count > MOST_FILES:
            raise ValueError(f"{pattern[:300]} stands for more than {MOST_FILES} files")
        first, last, choice = found.groups()
        parts = choice.split(",") if choice else map(str, range(int(first), int(last) + 1))
        filled = [part if choice else part.zfill(len(first)) for part in parts]
        before, after = pattern[: found.start()], pattern[found.end() :]
        return [path for part in filled for path in expand(before + part + after)]
    if pattern.startswith(PIPE):
        return [pattern]
    magic = glob.has_magic(pattern) and not Path(pattern).exists()
    matched = sorted(glob.glob(pattern, recursive=True)) if magic else []
    return [Path(path) for path in matched or [pattern]]


def run(command: str) -> tuple[io.BytesIO, str]:
    """What a shell command writes, and how it failed, if it did."""
    done = subprocess.run(command.removeprefix(PIPE), shell=True, capture_output=True)
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    failed = f"failed command: exit status {done.returncode}{last and ': '}{last}"
    return io.BytesIO(done.stdout), failed * bool(done.returncode)


def read_samples(tar: Path | str) -> Iterator[Sample]:
    """The samples of a shard, in the order of their first files; those of a sample need not stand
    together. A file whose name is repeated belongs to a new sample of that name.

    Raises ValueError where the tar is damaged or cut off, or if the command that writes it fails,
    after all samples before that.
    """
    samples: list[Sample] = []
    named: dict[str, list[Sample]] = {}
    last, end = None, -1
    file, failed = run(tar) if isinstance(tar, str) else (tar.open("rb"), "")
    whole = file.seek(0, os.SEEK_END)
    file.seek(0)
    # names may be any bytes, and must be printable
    how = {"mode": "r:", "errors": "backslashreplace", "tarinfo": Header}
    try:
        with file, tarfile.open(fileobj=file, **how) as archive:
            for info in archive:
                if archive.offset <= end or info.size < 0:
                    raise tarfile.ReadError(f"a member names {info.size} bytes")
                end = archive.offset
                # links may lead out of the tar, and a sparse file may expand to a terabyte
                if not info.isfile() or info.issparse():
                    continue
                key, kind = split_name(info.name)
                same = named.setdefault(key, [])
                sample = next((found for found in same if kind not in found.members), None)
                if sample is None:
                    sample = Sample(key, {})
                    same.append(sample), samples.append(sample)
                last, read = sample, kind in TEXTS or isinstance(tar, str)
                if info.offset_data + info.size > whole:  # of a text, tarfile would take the memory
                    raise tarfile.ReadError("unexpected end of data")
                data = archive.extractfile(info).read() if read else None
                sample.members[kind] = Member(tar, info.offset_data, info.size, data)
            archive.fileobj.seek(archive.offset)  # tarfile stops silently at a bad header
            ending = archive.fileobj.read(512)
    except (tarfile.TarError, ArithmeticError, MemoryError, OSError, RecursionError) as error:
        yield from (sample for sample in samples if sample is not last)  # its files may be missing
        damage = f"damaged tar: or not an uncompressed tar: {error}"
        raise ValueError(failed or damage) from None
    yield from samples
    if failed:
        raise ValueError(failed)
    if not ending:
        raise ValueError(
            f"damaged tar: no end mark at byte {archive.offset}: cut off after a whole file, or "
            "written so; the samples before it are used"
        )
    if ending != bytes(512):
        raise ValueError(f"damaged tar: no header at byte {archive.offset}")


def split_name(name: str) -> tuple[str, str]:
    """`part/000017.seg.png` is ("part/000017", "seg.png")."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return folder + slash + key, kind.lower()
