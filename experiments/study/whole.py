"""Files and folders that appear whole or not at all, whenever their writer is killed.

Each is made in a folder beside its place, which is removed afterwards. That of a writer that was killed is removed by
the next one: the system has taken back its lock.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` at the end; after an error `path` is as it was."""
    with beside(path) as fresh:
        made = fresh / path.name
        made.mkdir()
        yield made
        shutil.rmtree(path, ignore_errors=True)
        made.replace(path)


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """The path of a file that takes the place of `path` at the end; after an error `path` is as it was."""
    with beside(path) as fresh:
        yield fresh / path.name
        (fresh / path.name).replace(path)


def write_text(path: Path, text: str) -> None:
    with file(path) as made:
        made.write_text(text, encoding="utf-8")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside `path`, on the same disk, for what becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}-*.part"):
        _remove_abandoned(old)
    fresh = path.with_name(f".{path.name}-{uuid4().hex[:8]}.part")
    fresh.mkdir()
    handle = os.open(fresh, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield fresh
    finally:
        os.close(handle)
        shutil.rmtree(fresh, ignore_errors=True)


def _remove_abandoned(fresh: Path) -> None:
    """Remove a folder of `beside`, unless its process runs."""
    with suppress(OSError):
        handle = os.open(fresh, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(fresh, ignore_errors=True)
        finally:
            os.close(handle)
