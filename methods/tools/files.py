"""Result files: JSON that is written completely or not at all, hashes, free space on the disk."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from methods.errors import MissingInput, UserError

AGAIN = "restore it with git, or delete it and run the stage again"


def write_json(path: Path, value: Any) -> None:
    """Write sorted, indented JSON and move it into place: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path: Path, *keys: str, kind: type = dict) -> Any:
    """The content of a result file: a mapping that has `keys`, or a list with `kind=list`.

    Raises MissingInput without the file and UserError for a damaged one.
    """
    if not path.is_file():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(value, kind):
        raise UserError(
            f"{path} is not what its stage writes (it is not a {'mapping' if kind is dict else 'list'}): {AGAIN}"
        )
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{path} is not what its stage writes ({missing[0]} is missing): {AGAIN}")
    return value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn safetensors' own error for a failed write to `path` into the OSError that other writers raise."""
    try:
        yield
    except SafetensorError as error:
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """One hash of a folder: every file's relative path and hash, in order."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return whole.hexdigest()


def need_room(folder: Path, needed: int, what: str) -> None:
    """Raises UserError where the disk has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"too little disk for {what}: {needed / 2**30:.1f} GiB needed at {folder}, {free / 2**30:.1f} GiB free; "
            "free some (`make clean-cells` removes the weights of finished cells)"
        )
