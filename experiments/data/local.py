"""Rows of files that people have: JSONL, JSON, CSV, TSV, Parquet, folders of text files, and what `datasets` saved.

    .jsonl .ndjson   one object a line, or a list of objects
    .json            a list of objects, or an object in which one column is such a list ({"data": [...]})
    .csv .tsv        a header and rows; every value stays the text that is written, such as 007 or NA
    .parquet         a table; every value keeps its type
    a folder         text files (.txt, .md), one document each, or what `save_to_disk` of `datasets` has written

The texts among them may be packed by gzip, bzip2 or xz, and are UTF-8, or what their byte order mark or `encoding:`
says. Left out and counted are a line that is not JSON, or that has more or fewer cells than its header; a line that is
not UTF-8 in a file whose other lines are; and a document of a folder that is in another encoding.
"""

import contextlib
import csv
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.data import media
from experiments.data.left_out import LeftOut
from experiments.model import archives
from methods.errors import UserError
from methods.tools import jsonl
from methods.tools.files import read_json
from methods.tools.jsonl import Row

TEXTS = (".txt", ".md")
KINDS = ".jsonl, .json, .csv, .tsv, .parquet, a folder of .txt or .md files, or a folder saved by `datasets`"
NOT_UTF8 = "not UTF-8, as other lines of the file are"
_PACKED_NAMES = (".gz", ".bz2", ".xz")


class Broken(Exception):
    """A line or an element of a file that is no row."""


class OtherEncoding(UserError):
    """A file that is not in the encoding it is read in."""


def read(path: Path, *, encoding: str | None, split: str | None) -> tuple[list[Row], LeftOut]:
    """The rows of a file or folder, each with the place it was read from, and what was left out.

    Raises UserError for a path that is not there, an unknown kind, another encoding, and a damaged file.
    """
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r}: give a path from the project's root")
    left_out = LeftOut()
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _saved(path, split), left_out
        return _texts(path, encoding, left_out), left_out
    if split:
        raise UserError(f"{path} is a file, and `split` is of a folder that `datasets` saved: leave it out")
    names = [suffix.lower() for suffix in path.suffixes]
    kind = names[-2] if len(names) > 1 and names[-1] in _PACKED_NAMES else names[-1] if names else ""
    if kind == ".parquet":
        return _parquet(path), left_out
    readers: dict[str, Callable] = {".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
    if kind not in readers:
        hint = "a text file is one document: put it into a folder of text files" if kind in TEXTS else ""
        raise UserError(f"{path}: rows are read from {KINDS}, {hint or f'not from {kind or chr(39) * 2} files'}")
    text = _text(path, encoding, by_line=kind != ".json")
    return list(readers[kind](path, text, left_out)), left_out


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _text(path: Path, encoding: str | None, *, by_line: bool = False) -> str:
    """The decoded content of a file. With `by_line` the lines of a UTF-8 file that are not UTF-8 stay undecoded: they
    hold halves of surrogate pairs, which `_decoded` tells.
    """
    raw = path.read_bytes()
    if other := next((what for magic, what in jsonl.OTHERS.items() if raw.startswith(magic)), None):
        raise UserError(f"{path} is {other}, whatever its name: save its rows as {KINDS}")
    try:
        raw = archives.unpacked(raw, what=path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(f"{path} is packed, and damaged or cut off ({error}): fetch it or pack it again") from error
    found = json.detect_encoding(raw)  # by a byte order mark, or by the zero bytes of UTF-16 and UTF-32
    chosen = found if found != "utf-8" else encoding or found
    try:
        return raw.decode(chosen)
    except UnicodeDecodeError as error:
        if by_line and found == "utf-8" and not encoding:
            text = raw.decode("utf-8", "surrogateescape")
            if any(_decoded(line) for line in text.splitlines() if not line.isascii()):
                return text
        line = raw[: error.start].count(b"\n") + 1
        if encoding:
            remedy = "name the file's own encoding as `encoding`"
        else:
            named = f"rows: {{local: {{path: {path}, encoding: cp1252}}}}"
            remedy = f"if another program wrote it, such as Excel, write `{named}` (`new`: --encoding cp1252)"
        raise OtherEncoding(
            f"{path} line {line} is not {chosen.upper()} (byte {raw[error.start]:#x}, {error.reason}): {remedy}, or "
            "save the file as UTF-8"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise UserError(f"{path}: there is no encoding {chosen!r}: write one such as cp1252 or utf-16-le") from error


def _decoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path, text: str, left_out: LeftOut) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        with contextlib.suppress(Broken):
            yield from _elements(path, _parsed(text), left_out)
            return
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        line = line.removeprefix("\ufeff")  # within the file where files were concatenated
        at = f"{path} line {number}"
        if line.strip():
            try:
                yield _row(_parsed(line), at)
            except Broken as error:
                left_out.add(str(error) if _decoded(line) else NOT_UTF8, at)


def _json(path: Path, text: str, left_out: LeftOut) -> Iterator[Row]:
    try:
        whole = _parsed(text)
    except Broken as error:
        first = text.lstrip().partition("\n")[0]
        try:
            one_a_line = isinstance(_parsed(first), dict)
        except Broken:
            one_a_line = False
        if not one_a_line:
            raise UserError(f"{path}: {error}: correct it, or write one object a line into a .jsonl file") from None
        yield from _lines(path, text, left_out)
        return
    if isinstance(whole, dict):
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path} is an object with {len(lists)} lists ({', '.join(lists[:5])}): write a list of rows, or an "
                'object with one such as {"data": [...]}'
            )
        whole = whole[lists[0]]
    if not isinstance(whole, list):
        raise UserError(f"{path} holds neither a list of rows nor an object with one: write a list of objects")
    yield from _elements(path, whole, left_out)


def _elements(path: Path, values: list[Any], left_out: LeftOut) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        at = f"{path} row {number}"
        try:
            yield _row(value, at)
        except Broken as error:
            left_out.add(str(error), at)


def _csv(path: Path, text: str, left_out: LeftOut) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    header = text.partition("\n")[0]
    delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t|", key=header.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    begins = 1
    try:
        for cells in table:
            at, begins = f"{path} line {begins}", table.line_num + 1
            if not cells or (not columns and cells[0].lower() == "sep="):  # a first line that tells Excel the delimiter
                continue
            if not columns:
                columns = [name.strip() for name in cells]
                if twice := [name for name in columns if columns.count(name) > 1]:
                    raise UserError(f"{at} names the column {twice[0]!r} twice: rename one of them")
            elif not all(map(_decoded, cells)):
                left_out.add(NOT_UTF8, at)
            elif len(cells) == len(columns):
                yield Row(dict(zip(columns, cells)), at=at)
            else:
                kind = "more" if len(cells) > len(columns) else "fewer"
                left_out.add(f"{kind} cells than the header has", at)
    except csv.Error as error:
        raise UserError(
            f"{path} line {begins}: the row that begins there is not CSV ({error}): a quote is not closed, or stands "
            "inside a text without being doubled"
        ) from error


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            size = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
            archives.refuse_bomb(max(size, about.num_rows * about.num_columns), path.stat().st_size, path)
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: a date beyond Python's
        raise UserError(f"{path} is not a readable Parquet file ({error}): write it again") from error
    return [Row(row, at=f"{path} row {number}") for number, row in enumerate(rows, 1)]


def _texts(folder: Path, encoding: str | None, left_out: LeftOut) -> list[Row]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    texts = [path for path in files if path.suffix.lower() in TEXTS]
    if not texts:
        raise UserError(
            f"{folder} is neither a folder of text files (.txt, .md) nor one that `datasets` saved: name a file in it"
        )
    if others := [path for path in files if path not in set(texts)]:
        print(f"{folder}: {len(others)} files are neither .txt nor .md and are not read, such as {others[0].name}")
    rows = []
    for path in texts:
        try:
            text = io.StringIO(_text(path, encoding), newline=None).read()  # CR LF becomes LF
            rows.append(Row({"id": path.relative_to(folder).as_posix(), "text": text}, at=str(path)))
        except OtherEncoding:
            kind = (encoding or "utf-8").upper()
            left_out.add(f"not {kind}: save it as UTF-8, or name the encoding of all files as `encoding`", str(path))
    return rows


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _saved(folder: Path, split: str | None) -> list[Row]:
    import datasets

    sets = folder / "dataset_dict.json"
    if sets.is_file():
        names = splits(folder)
        split = names[0] if split is None and len(names) == 1 else split
        if split not in names:
            stated = f"`split` is {split!r}" if split else "it has several sets"
            raise UserError(f"{folder}: {stated}: write `split:` with one of {', '.join(names)}")
        folder /= split
    elif split:
        raise UserError(f"{folder} holds one set, without splits: leave `split` out")
    try:
        rows = list(media.unopened(datasets.load_from_disk(str(folder))))
    except Exception as error:  # datasets and pyarrow raise many types
        raise UserError(f"{folder} is not a readable folder of `datasets` ({error}): save it again") from error
    return [Row(row, at=f"{folder} row {number}") for number, row in enumerate(rows, 1)]


def splits(folder: Path) -> list[str]:
    """The names of the sets in a folder that `datasets` saved. Raises UserError where they are damaged."""
    file = folder / "dataset_dict.json"
    names = read_json(file, "splits")["splits"]
    if not names or not isinstance(names, list) or not all(re.fullmatch(r"\w[\w.-]*", str(name)) for name in names):
        raise UserError(f"{file} names no sets beside it as `splits`: save the folder again with `datasets`")
    return names


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises Broken for what is not JSON, or could not be written again as it is."""

    def constant(word: str) -> None:
        raise Broken(f"{word} is no JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        columns = dict(pairs)
        if len(columns) < len(pairs):
            raise Broken("an object has one name twice")
        return columns

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except json.JSONDecodeError:
        raise Broken("not JSON") from None
    except RecursionError:
        raise Broken("lists or objects nested too deep") from None
    except ValueError:
        raise Broken("a number that is too long") from None


def _row(value: Any, at: str) -> Row:
    if not isinstance(value, dict):
        raise Broken("not an object with columns")
    try:
        jsonl.refuse_unwritable(value, at)
    except UserError as error:
        raise Broken(str(error).removeprefix(f"{at}, ").removeprefix(f"{at} ")) from None
    return Row(value, at=at)
