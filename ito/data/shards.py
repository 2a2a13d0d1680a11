"""WebDataset tar shards: a sample is the files that share a name up to its first dot.

`000017.jpg`, `000017.txt` and `000017.json` are one sample. Names and captions are read in order.
Pictures are not read, only their offsets in the tar are noted: shuffling a million samples moves no
pixel.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SHARD_SIZE = 1000  # samples per shard written
RANGE = r"\{(\d+)\.\.(\d+)\}"


class Member(NamedTuple):
    """A file inside an uncompressed tar."""

    tar: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}@{self.offset}"

    def read_bytes(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Sample(NamedTuple):
    key: str
    members: dict[str, Member]  # by what follows the first dot, in lower case
    contents: dict[str, bytes]  # of .txt and .json


def expand(pattern: str) -> list[Path]:
    """The paths that the pattern `shard-{00000..00012}.tar` stands for, both ends included."""
    found = re.search(RANGE, pattern)
    if not found:
        return [Path(pattern)]
    first, last = found.groups()
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in expand(
            pattern[: found.start()] + f"{number:0{len(first)}}" + pattern[found.end() :]
        )
    ]


def read_samples(tar: Path) -> Iterator[Sample]:
    """The samples of a shard in order. A file whose name is repeated begins a new sample.

    Raises ValueError where the tar is damaged or cut off, after all samples before that.
    """
    sample = None
    try:
        # names may be any bytes, and must be printable
        with tarfile.open(tar, "r:", errors="backslashreplace") as archive:
            for info in archive:
                # links may lead out of the tar, and a sparse file may expand to a terabyte
                if not info.isfile() or info.issparse():
                    continue
                key, kind = split_name(info.name)
                if sample and (key != sample.key or kind in sample.members):
                    yield sample
                    sample = None
                sample = sample or Sample(key, {}, {})
                sample.members[kind] = Member(tar, info.offset_data, info.size)
                if kind in ("txt", "json"):
                    sample.contents[kind] = archive.extractfile(info).read()
            if sample:
                yield sample
            archive.fileobj.seek(archive.offset)  # tarfile stops silently at a bad header
            ending = archive.fileobj.read(512)
    except tarfile.TarError as error:
        raise ValueError(f"damaged, or not an uncompressed tar: {error}") from None
    if not ending:
        raise ValueError(
            f"no end mark at byte {archive.offset}: cut off after a whole file, or written so; "
            "the samples before it are used"
        )
    if ending != bytes(512):
        raise ValueError(f"damaged: no header at byte {archive.offset}")


def split_name(name: str) -> tuple[str, str]:
    """`part/000017.seg.png` is ("part/000017", "seg.png")."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return folder + slash + key, kind.lower()


def write_shards(folder: Path, records: list[dict], pictures: Iterable[bytes]) -> None:
    """Write `SPLIT-00000.tar` and so on: records with `image`, `captions` and `split`, and PNGs.

    Records are sorted by the hash of the image's path, so that every shard is a random sample.
    """
    folder.mkdir()
    samples = sorted(
        zip(records, pictures, strict=True),
        key=lambda sample: hashlib.sha256(sample[0]["image"].encode()).digest(),
    )
    for split in dict.fromkeys(record["split"] for record in records):
        chosen = [sample for sample in samples if sample[0]["split"] == split]
        for number, start in enumerate(range(0, len(chosen), SHARD_SIZE)):
            with tarfile.open(folder / f"{split}-{number:05}.tar", "w") as tar:
                for place, (record, png) in enumerate(chosen[start : start + SHARD_SIZE], start):
                    fields = {name: value for name, value in record.items() if name != "image"}
                    text = json.dumps(fields, ensure_ascii=False)
                    for kind, data in (
                        ("png", png),
                        ("json", text.encode()),
                        ("txt", record["captions"][0].encode()),
                    ):
                        info = tarfile.TarInfo(f"{place:06}.{kind}")  # no time, no owner
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
