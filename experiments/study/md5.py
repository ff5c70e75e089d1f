"""The hashes by which DVC knows files and folders. Only the standard library is imported."""

import json
from hashlib import file_digest, md5
from pathlib import Path


def of(path: Path) -> str:
    """The hash of a file or folder in dvc.lock. Raises FileNotFoundError without it."""
    return folder_md5(path) if path.is_dir() else file_md5(path)


def file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, md5).hexdigest()


def listing(folder: Path) -> list[dict[str, str]]:
    """DVC's list of a folder's files with their hashes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": file_md5(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return sorted(listed, key=lambda entry: entry["relpath"])


def listing_text(listed: list[dict[str, str]]) -> bytes:
    """The bytes of the list, whose md5 with `.dir` behind it is the folder's hash."""
    return json.dumps(listed, sort_keys=True).encode()


def folder_md5(folder: Path) -> str:
    """The hash of a folder in dvc.lock: md5 of DVC's list of its files with theirs, and `.dir`."""
    return md5(listing_text(listing(folder))).hexdigest() + ".dir"
