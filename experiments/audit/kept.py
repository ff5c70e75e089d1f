"""Answers that are kept: a file's hash until the file changes, scores and movement by everything they depend on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from methods.errors import UserError
from methods.tools.files import read_json, write_json


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def of_files(files: list[Path], *, folder: Path, name: str, compute: Callable[[], str]) -> str:
    """`compute()`, a text that depends on these files alone; remembered in `folder` until one of them changes.

    A file has changed if its size, times or inode have. `name` is what the text is, such as "weights".
    """
    facts = []
    for file in files:
        about = file.stat()
        facts.append([file.name, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    places = [name, *(os.path.realpath(file) for file in files)]
    note = folder / f"{digest(places)[:32]}.json"
    with contextlib.suppress(UserError, KeyError):
        known = read_json(note)
        if known["files"] == facts:
            return known["value"]
    value = compute()
    write_json(note, {"files": facts, "value": value})
    return value


def folder_of(root: Path, key: Mapping[str, Any]) -> Path:
    """The folder in which what depends on `key` alone is kept."""
    return root / digest(key)[:32]
