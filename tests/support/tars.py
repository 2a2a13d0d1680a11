"""Writes tars of given members."""

import io
import tarfile
from pathlib import Path


def tar(path: Path, members) -> Path:
    """A tar at `path` of (name, text or bytes), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
