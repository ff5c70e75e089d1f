"""The user's own files and folders that a study reads, and hashes of their content.

`resolve` writes the hashes of the files that a stage reads, so that a file that was overwritten in place reruns the
stage; `pipeline` lists the paths in dvc.yaml, so that DVC checks them. A hash is kept until the file's size, times or
inode change.
"""

import contextlib
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from experiments.study.schema import Model, Rows
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.tools import files


def of_model(model: Model) -> list[str]:
    """The folder of a model whose source is `path:DIR`."""
    kind, _, folder = model.source.partition(":")
    return [folder] if kind == "path" else []


def of_rows(rows: Rows, *, prefer: str) -> list[str]:
    """Local files and folders that rows are read from if `data.source` is `prefer`, also those that `hub:` names."""
    if prefer == "pypi" and rows.pypi:
        return []
    if prefer != "hub" or not rows.hub:
        return [source.path for source in (rows.jsonl, rows.local) if source]
    named = rows.hub.data_files or []
    named = [one for value in named.values() for one in _list(value)] if isinstance(named, dict) else _list(named)
    matched = [path for name in named for path in sorted(glob.glob(str(name), recursive=True))]
    return ([rows.hub.path] if os.path.isdir(rows.hub.path) else []) + matched


def of_code(parts: Iterable[Part]) -> list[str]:
    """Source files of parts outside the project and outside installed packages: files that the user edits."""
    own, installed = Path(registry.__file__).parent, [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    sources = {path.resolve() for part in parts for path in registry.source_files(part)}
    return sorted(
        str(path) for path in sources if not any(path.is_relative_to(folder.resolve()) for folder in (own, *installed))
    )


def text(file: str, *, where: str) -> str:
    """The text of a file that the setting `where` names."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is {file!r}, which cannot be read ({error}): correct the path") from error


def digests(paths: Iterable[str], *, kept: Path) -> dict[str, str | None]:
    """The hash of each file's or folder's content by its path as written; None if nothing is there.

    kept  folder in which hashes are remembered
    """
    return {path: _digest(Path(path).expanduser(), kept) for path in sorted(set(paths))}


def _digest(path: Path, kept: Path) -> str | None:
    if path.is_file():
        return _file(path, kept)
    if not path.is_dir():
        return None
    whole = sha256()
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            if not name.startswith(".") and file.is_file():
                whole.update(f"{file.relative_to(path).as_posix()} {_file(file, kept)}\n".encode())
    return whole.hexdigest()


def _file(path: Path, kept: Path) -> str:
    return remembered([path], folder=kept, name="sha256", compute=lambda: files.sha256(path))


def remembered(paths: list[Path], *, folder: Path, name: str, compute: Callable[[], str]) -> str:
    """`compute()`, a text that depends on these files alone; remembered in `folder` until one of them changes.

    A file has changed if its size, times or inode have. `name` is what the text is, such as "sha256".
    """
    facts = []
    for path in paths:
        about = path.stat()
        facts.append([path.name, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    places = json.dumps([name, *(os.path.realpath(path) for path in paths)])
    note = folder / f"{sha256(places.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(UserError, KeyError, TypeError):
        known = files.read_json(note)
        if known["files"] == facts:
            return known["value"]
    value = compute()
    with contextlib.suppress(OSError):  # a full disk, or another process that writes the same note
        files.write_json(note, {"files": facts, "value": value})
    return value


def _list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
